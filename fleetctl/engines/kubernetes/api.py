"""The one module that talks to the API server: requests with bounded retry, streams, and every refusal in words.

On the standard library, for what we need of a client are five verbs and two streams of plain JSON: the packages there are load 100 to 200
ms of code, read one kubeconfig only, or know no current login plugin.
"""

import json
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Lock
from time import sleep
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from fleetctl.engines.kubernetes import rbac
from fleetctl.engines.kubernetes.identity import Identity
from fleetctl.engines.kubernetes.kubeconfig import Target
from fleetctl.engines.kubernetes.names import Object
from fleetctl.engines.kubernetes.yaml import dump
from fleetctl.errors import ClusterConflict, ClusterRefused, ClusterUnreachable, FleetctlError, NotFound

TIMEOUT_SECONDS = 10.0
TRIES = 4
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
WATCH_SECONDS = 240  # a watch is begun anew after this long
_MOST_BYTES = 256 << 20
_BUSY = (429, 500, 502, 503, 504)
_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_CONFLICT = re.compile(r'conflict with "(?P<manager>[^"]*)"')

APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
PLURALS = {
    "Deployment": "deployments",
    "Pod": "pods",
    "Event": "events",
    "Service": "services",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "NetworkPolicy": "networkpolicies",
    "SandboxTemplate": "sandboxtemplates",
    "SandboxWarmPool": "sandboxwarmpools",
    "PodMetrics": "pods",
}

Query = Mapping[str, str | int | bool | None]


class ApiError(ClusterRefused):
    """The API server said no. `status`: of HTTP; `owners`: field -> manager, of a conflict."""

    def __init__(self, message: str, *, status: int, hint: str | None = None, owners: Mapping[str, str] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.owners = dict(owners or {})


def path_of(api_version: str, kind: str, namespace: str, name: str = "") -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return f"{root}/namespaces/{quote(namespace)}/{PLURALS[kind]}" + (f"/{quote(name)}" if name else "")


class Stream:
    """Lines of an answer that goes on; closing it from another thread ends the reading."""

    def __init__(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """Until the server ends it, or the connection breaks, which is the same to us."""
        try:
            while line := self._response.readline():
                yield line
        except (OSError, HTTPException, ValueError, AttributeError):  # the last two: closed meanwhile
            return

    def close(self) -> None:
        try:
            if self._connection.sock is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)  # wakes whoever reads
        except OSError:
            pass  # it is closed already
        self._connection.close()


class Api:
    """One cluster, by one identity. Threads may share it: requests take turns, streams have connections of their own."""

    def __init__(self, target: Target, *, pause: Callable[[float], None] = sleep) -> None:
        self.target = target
        self._identity = Identity(target)
        self._pause = pause
        self._kept: HTTPConnection | None = None
        self._turn = Lock()

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def get(self, path: str, query: Query | None = None, *, tries: int = TRIES) -> Object:
        return self._json("GET", path, query, tries=tries)

    def find(self, path: str) -> Object | None:
        """What is there; None where nothing is."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, path: str, *, labels: str | None = None, tries: int = TRIES) -> list[Object]:
        """All items, page by page."""
        items: list[Object] = []
        going_on = None
        while True:
            page = self.get(path, {"labelSelector": labels, "limit": 500, "continue": going_on}, tries=tries)
            items += page.get("items") or []
            going_on = (page.get("metadata") or {}).get("continue")
            if not going_on:
                return items

    def patch(self, path: str, body: Object, kind: str, *, manager: str, force: bool = False, dry_run: bool = False) -> Object:
        query = {"fieldManager": manager, "force": True if force and kind == APPLY else None, "dryRun": "All" if dry_run else None}
        return self._json("PATCH", path, query, body, kind)

    def delete(self, path: str, *, grace_seconds: int | None = None) -> bool:
        """Whether there was something to delete. What belongs to it goes after it."""
        try:
            self._json("DELETE", path, {"gracePeriodSeconds": grace_seconds, "propagationPolicy": "Background"})
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def text(self, path: str, query: Query | None = None) -> bytes:
        return self._answer("GET", path, query, None, None, TRIES)

    def stream(self, path: str, query: Query | None = None, *, seconds: float | None = None) -> Stream:
        """An answer that goes on. `seconds`: a longer silence ends it."""
        connection = self._connect()
        try:
            response = self._send(connection, "GET", path, query, None, None)
            if response.status >= 400:
                raise self._refusal(response.status, response.read(1 << 20), "GET", path)
        except (OSError, HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        except FleetctlError:
            connection.close()
            raise
        if connection.sock is not None:
            connection.sock.settimeout(seconds)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return Stream(connection, response)

    def watch(self, path: str, *, labels: str | None = None, version: str | None = None) -> Stream:
        query = {"watch": True, "labelSelector": labels, "resourceVersion": version, "timeoutSeconds": WATCH_SECONDS}
        return self.stream(path, query, seconds=WATCH_SECONDS + TIMEOUT_SECONDS)

    def _json(
        self, method: str, path: str, query: Query | None, body: Object | None = None, kind: str | None = None, *, tries: int = TRIES
    ) -> Object:
        raw = self._answer(method, path, query, body, kind, tries)
        try:
            value = json.loads(raw)
        except ValueError:
            raise ClusterRefused(f"{self.target.server} does not answer as Kubernetes does: {raw[:80]!r}") from None
        if not isinstance(value, dict):
            raise ClusterRefused(f"{self.target.server} does not answer as Kubernetes does: {raw[:80]!r}")
        return value

    def _answer(self, method: str, path: str, query: Query | None, body: Object | None, kind: str | None, tries: int) -> bytes:
        """The body of a good answer. All we ask can be asked twice, so what may have been lost is asked again, a few times."""
        renewed = False
        for number in range(1, tries + 1):
            last, wait = number == tries, min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (number - 1))
            try:
                with self._turn:
                    status, raw, later = self._exchange(method, path, query, body, kind)
            except (OSError, HTTPException) as error:
                if last:
                    raise self._unreachable(error) from error
                self._pause(wait)
                continue
            if status == 401 and self._identity.renewable and not renewed and not last:
                self._identity.renew()
                renewed = True
            elif status < 400:
                return raw
            elif status not in _BUSY or last:
                raise self._refusal(status, raw, method, path)
            else:
                self._pause(max(wait, min(LONGEST_PAUSE_SECONDS, later)))
        raise AssertionError("the last try returns or raises")

    def _exchange(self, method: str, path: str, query: Query | None, body: Object | None, kind: str | None) -> tuple[int, bytes, float]:
        """Status, body, and the seconds after which the server wants to be asked again."""
        if self._kept is None:
            self._kept = self._connect()
        try:
            response = self._send(self._kept, method, path, query, body, kind)
            raw = response.read(_MOST_BYTES)
        except (OSError, HTTPException):
            self._kept.close()
            self._kept = None
            raise
        if response.will_close:
            self._kept.close()
            self._kept = None
        later = response.headers.get("Retry-After", "")
        return response.status, raw, float(later) if later.isdigit() else 0.0

    def _send(
        self, connection: HTTPConnection, method: str, path: str, query: Query | None, body: Object | None, kind: str | None
    ) -> HTTPResponse:
        given = {key: _word(value) for key, value in (query or {}).items() if value is not None}
        url = urlsplit(self.target.server).path + path + (f"?{urlencode(given)}" if given else "")
        headers = {"Accept": "application/json", "User-Agent": "fleetctl", **self._identity.headers()}
        connection.putrequest(method, url)
        for name, value in headers.items():
            connection.putheader(name, value)
        for group in self.target.impersonate_groups:
            connection.putheader("Impersonate-Group", group)
        payload = None if body is None else json.dumps(body).encode()
        if payload is not None:
            connection.putheader("Content-Type", kind or "application/json")
            connection.putheader("Content-Length", str(len(payload)))
        connection.endheaders(payload)
        return connection.getresponse()

    def _connect(self) -> HTTPConnection:
        url = urlsplit(self.target.server)
        host, port = url.hostname or "", url.port
        if url.scheme == "http":
            return HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
        proxy = urlsplit(self.target.proxy or _proxy_for(host))
        context = self._identity.tls()
        if self.target.server_name:
            connection: HTTPSConnection = _Renamed(host, port or 443, self.target.server_name, timeout=TIMEOUT_SECONDS, context=context)
            return connection
        if proxy.hostname:
            connection = HTTPSConnection(proxy.hostname, proxy.port or 3128, timeout=TIMEOUT_SECONDS, context=context)
            connection.set_tunnel(host, port or 443)
            return connection
        return HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context)

    def _unreachable(self, error: Exception) -> ClusterUnreachable:
        target = self.target
        where = f"the cluster of context {target.context} ({target.server})"
        if isinstance(error, ssl.SSLCertVerificationError):
            return ClusterUnreachable(
                f"{where} shows a certificate that is not to be trusted: {error.verify_message}",
                hint="the kubeconfig's certificate-authority must be the cluster's",
            )
        if isinstance(error, TimeoutError):
            return ClusterUnreachable(f"{where} did not answer within {TIMEOUT_SECONDS:g} s")
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ClusterUnreachable(f"{where} cannot be reached: {reason}")

    def _refusal(self, status: int, raw: bytes, method: str, path: str) -> FleetctlError:
        try:
            said = json.loads(raw)
            message = str(said["message"])
        except (ValueError, KeyError, TypeError):
            said, message = {}, raw[:200].decode(errors="replace").strip()
        return _explained(status, message, said, self.target, f"{method} {path}")


class _Renamed(HTTPSConnection):
    """Expects the certificate of another name than the one it connects to."""

    def __init__(self, host: str, port: int, name: str, *, timeout: float, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._name, self._tls = name, context

    def connect(self) -> None:
        HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


def _word(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _proxy_for(host: str) -> str:
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return ""
    from urllib.request import getproxies, proxy_bypass  # takes some milliseconds

    return "" if proxy_bypass(host) else getproxies().get("https", "")


def _explained(status: int, message: str, said: Any, target: Target, asked: str) -> FleetctlError:  # Any: a Status of the API, or anything
    """A refusal in words: what was refused, why, and who can help."""
    details = said.get("details") or {} if isinstance(said, dict) else {}
    if status == 401:
        return ApiError(
            f"the cluster of context {target.context} does not know who asks: {message or 'Unauthorized'}",
            status=status,
            hint="the token has expired or was never right; log in again with your cluster's tool (`kubectl get pods` asks the same)",
        )
    if status == 403 and (found := _FORBIDDEN.search(message)):
        return _missing_permission(found, target)
    if status == 404 and (details.get("kind") == "namespaces" or re.search(r'namespaces? "[^"]*" not found', message)):
        name = details.get("name") or target.namespace
        where = f"the cluster of context {target.context}"
        return NotFound(f"there is no namespace {name} in {where}", hint=f"`kubectl create namespace {name}`")
    if status == 409 and (owners := _owners(details)):
        return ApiError(message, status=status, owners=owners)
    if status == 429:
        return ApiError(f"the cluster has too much to do: {message or 'too many requests'}", status=status, hint="try again later")
    if status >= 500:
        return ClusterUnreachable(f"the cluster of context {target.context} is in trouble (HTTP {status}): {message or asked}")
    return ApiError(message or f"HTTP {status} to {asked}", status=status)


def _missing_permission(found: re.Match[str], target: Target) -> ApiError:
    namespace = found["namespace"] or target.namespace
    resource = f"{found['resource']}.{found['group']}" if found["group"] else found["resource"]
    role = dump(rbac.role_for(found["verb"], found["group"], found["resource"], namespace))
    who = found["user"]
    subject = f"--serviceaccount={':'.join(who.split(':')[2:])}" if who.startswith("system:serviceaccount:") else f"--user={who}"
    return ApiError(
        f"{who} may not {found['verb']} {resource} in namespace {namespace}; this Role grants it:\n{role}",
        status=403,
        hint=f"apply it, then `kubectl create rolebinding fleetctl-more --role=fleetctl-more {subject} --namespace={namespace}`; "
        "`fleetctl export kubernetes --role` prints all that is needed",
    )


def _owners(details: Any) -> dict[str, str]:  # Any: details of a Status of the API
    """Who owns what an apply would have changed: field -> manager."""
    owners = {}
    for cause in details.get("causes") or ():
        if cause.get("reason") == "FieldManagerConflict" and (found := _CONFLICT.search(str(cause.get("message")))):
            owners[str(cause.get("field", "")).lstrip(".")] = found["manager"]
    return owners


def conflict(what: str, owners: Mapping[str, str]) -> ClusterConflict:
    """The error for fields of an object that somebody else owns."""
    told = ", ".join(f"{field} to {manager}" for field, manager in sorted(owners.items()))
    return ClusterConflict(
        f"{what} is left as it is, because parts of it belong to others: {told}",
        hint="leave these settings to their owner, or take them over: "
        "`fleetctl export kubernetes | kubectl apply --server-side --field-manager=fleetctl --force-conflicts -f -`",
    )
