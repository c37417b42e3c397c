"""A Kubernetes API server for tests, over plain HTTP: objects with server-side apply and its owners, dry runs, label queries, pages,
watches, followed logs, and a controller that does at once what a Deployment asks for. Any request can be made to fail.

Written from the API's documentation; `tests/engines/test_real_cluster.py` runs the same tests against a true one.
"""

import copy
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]  # Any: JSON values
Leaf = tuple[str, ...]
TOKEN = "let-me-in"
KINDS = {
    "deployments": "Deployment",
    "pods": "Pod",
    "events": "Event",
    "services": "Service",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "horizontalpodautoscalers": "HorizontalPodAutoscaler",
    "poddisruptionbudgets": "PodDisruptionBudget",
    "networkpolicies": "NetworkPolicy",
    "sandboxtemplates": "SandboxTemplate",
    "sandboxwarmpools": "SandboxWarmPool",
}
_OBJECT = re.compile(
    r"(?P<root>/api/v1|/apis/[^/]+/[^/]+)/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[^/]+))?)?"
)


@dataclass
class Fault:
    """What happens to the next requests that match "METHOD PATH?QUERY". `times`: how often; None: always."""

    pattern: str
    status: int = 500
    message: str = "made to fail"
    details: Json = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int | None = 1
    hang_up: bool = False
    silent: bool = False


class Refused(Exception):
    def __init__(self, status: int, message: str, details: Json | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.details, self.headers = status, details or {}, headers or {}


def leaves(value: Any, path: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    """Items of a list go by their name where all have one; any other list is one leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        for item in value:
            yield from leaves(item, (*path, f"[{item['name']}]"))
    else:
        yield path, value


def built(parts: Mapping[Leaf, Any]) -> Json:
    """The object with these leaves."""
    root: Json = {}
    for path, value in parts.items():
        spot: Any = root
        for at, key in enumerate(path):
            last, nested_list = at == len(path) - 1, at + 1 < len(path) and path[at + 1].startswith("[")
            if key.startswith("["):
                found = next((item for item in spot if item.get("name") == key[1:-1]), None)
                if found is None:
                    found = {"name": key[1:-1]}
                    spot.append(found)
                spot = found
            elif last:
                spot[key] = value
            else:
                spot = spot.setdefault(key, [] if nested_list else {})
    return root


class FakeKubernetes:
    """The cluster. `objects`: by (plural, namespace, name)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Json] = {}
        self.owners: dict[tuple[str, str, str], dict[str, set[Leaf]]] = {}
        self.namespaces = {"default"}
        self.logs: dict[str, list[bytes]] = {}
        self.previous_logs: dict[str, list[bytes]] = {}
        self.usage: dict[str, tuple[str, str]] | None = None
        self.sandbox_version: str | None = None
        self.asked: list[str] = []
        self.headers: list[Message] = []
        self.faults: list[Fault] = []
        self.obedient = True
        self.pod_state: Json = {}  # of new pods, instead of running and ready
        self.tokens = {TOKEN}
        self.page_size = 500
        self.url = ""
        self.changed = threading.Condition(threading.RLock())
        self.changes: list[tuple[str, str, str, Json]] = []  # (plural, namespace, ADDED ..., object)
        self._version = self._number = 0

    # What tests look at and change

    def find(self, plural: str, name: str, namespace: str = "default") -> Json:
        return self.objects[plural, namespace, name]

    def names(self, plural: str, namespace: str = "default") -> list[str]:
        return sorted(name for kind, where, name in self.objects if (kind, where) == (plural, namespace))

    def add(self, plural: str, found: Json, namespace: str = "default", manager: str = "kubectl") -> Json:
        key = (plural, namespace, found["metadata"]["name"])
        with self.changed:
            self.owners[key] = {manager: {path for path, _ in leaves({"spec": found.get("spec", {})})}}
            self._store(key, {"kind": KINDS[plural], **copy.deepcopy(found)})
        return self.objects[key]

    def event(self, kind: str, name: str, reason: str, message: str, *, at: float | None = None, count: int = 1) -> None:
        self._number += 1
        stamp = moment(time.time() if at is None else at)
        self.add(
            "events",
            {
                "metadata": {"name": f"{name}.{self._number:x}", "uid": f"e{self._number}", "creationTimestamp": stamp},
                "involvedObject": {"kind": kind, "name": name},
                "reason": reason,
                "message": message,
                "type": "Normal",
                "count": count,
                "lastTimestamp": stamp,
            },
        )

    def write(self, pod: str, line: bytes) -> None:
        with self.changed:
            self.logs.setdefault(pod, []).append(moment(time.time(), fine=True).encode() + b" " + line)
            self.changed.notify_all()

    def touch(self, plural: str, name: str, change: Json, namespace: str = "default") -> None:
        """As if the cluster itself changed an object."""
        with self.changed:
            self._store((plural, namespace, name), merged(self.objects[plural, namespace, name], change))

    # Answers

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Json | None, kind: str) -> Json:
        if group := re.fullmatch(r"/apis/([^/]+)", path):
            if group[1] == "extensions.agents.x-k8s.io" and self.sandbox_version:
                return {"kind": "APIGroup", "preferredVersion": {"version": self.sandbox_version}}
            raise Refused(404, "the server could not find the requested resource")
        if space := re.fullmatch(r"/api/v1/namespaces/([^/]+)", path):
            self.namespaces ^= {space[1]}  # made or taken away
            return {"kind": "Namespace", "metadata": {"name": space[1]}}
        if path.startswith("/apis/metrics.k8s.io/"):
            return self._metrics()
        found = _OBJECT.fullmatch(path)
        if not found or found["plural"] not in KINDS:
            raise Refused(404, "the server could not find the requested resource")
        namespace, name = unquote(found["namespace"]), unquote(found["name"] or "")
        if not name:
            return self._page(found["plural"], namespace, query)
        key = (found["plural"], namespace, name)
        with self.changed:
            match method, found["sub"]:
                case "GET", None:
                    return copy.deepcopy(self._existing(key))
                case "PATCH", None:
                    assert body is not None
                    return self._patch(key, body, kind, query)
                case "PATCH", "scale":
                    assert body is not None
                    self._patch(key, {"spec": {"replicas": body["spec"]["replicas"]}}, kind, query)
                    return {"kind": "Scale", "spec": body["spec"]}
                case "DELETE", None:
                    return self._delete(key, query)
        raise Refused(405, "the server does not allow this method on the requested resource")

    def _metrics(self) -> Json:
        if self.usage is None:
            raise Refused(404, "the server could not find the requested resource")
        items = [
            {"metadata": {"name": pod}, "containers": [{"name": "agent", "usage": {"cpu": cpu, "memory": memory}}]}
            for pod, (cpu, memory) in self.usage.items()
        ]
        return {"kind": "PodMetricsList", "items": items}

    def _existing(self, key: tuple[str, str, str]) -> Json:
        if key not in self.objects:
            raise Refused(404, f'{key[0]} "{key[2]}" not found', {"kind": key[0], "name": key[2]})
        return self.objects[key]

    def _page(self, plural: str, namespace: str, query: Mapping[str, str]) -> Json:
        wanted = [term.partition("=")[::2] for term in query.get("labelSelector", "").split(",") if term]
        with self.changed:
            items = [
                copy.deepcopy(one)
                for (kind, where, _), one in sorted(self.objects.items())
                if (kind, where) == (plural, namespace) and selected(one, wanted)
            ]
            start = int(query.get("continue", 0))
            end = start + min(self.page_size, int(query.get("limit", 500)))
            metadata = {"resourceVersion": str(self._version)} | ({"continue": str(end)} if end < len(items) else {})
        return {"kind": "List", "metadata": metadata, "items": items[start:end]}

    def _patch(self, key: tuple[str, str, str], body: Json, kind: str, query: Mapping[str, str]) -> Json:
        if key[1] not in self.namespaces:
            raise Refused(404, f'namespaces "{key[1]}" not found', {"kind": "namespaces", "name": key[1]})
        manager, live = query["fieldManager"], self.objects.get(key)
        owners = copy.deepcopy(self.owners.get(key, {}))
        if kind == "application/apply-patch+yaml":
            result = self._applied(key, live, body, owners, manager, force=query.get("force") == "true")
        else:
            result = merged(self._existing(key), body)
            for path, _ in leaves({part: body[part] for part in body if part == "spec"}):
                for other in owners.values():
                    other.discard(path)
                owners.setdefault(manager, set()).add(path)
        if live is not None and _plain(live) == _plain(result):
            if query.get("dryRun") != "All":
                self.owners[key] = owners  # who owns what may change where nothing else does
                live["metadata"]["managedFields"] = self._fields(key)
            return copy.deepcopy(live)
        if query.get("dryRun") == "All":
            return result
        self.owners[key] = owners
        if live is not None and live.get("spec") != result.get("spec"):
            result["metadata"]["generation"] = int(live["metadata"].get("generation", 1)) + 1
        self._store(key, result)
        return copy.deepcopy(self.objects[key])

    def _applied(
        self, key: tuple[str, str, str], live: Json | None, body: Json, owners: dict[str, set[Leaf]], manager: str, *, force: bool
    ) -> Json:
        wanted, there = dict(leaves(body)), dict(leaves(live or {}))
        conflicts = {
            path: other
            for path, value in wanted.items()
            for other, owned in owners.items()
            if other != manager and path in owned and there.get(path) != value
        }
        if conflicts and not force:
            causes = [
                {"reason": "FieldManagerConflict", "message": f'conflict with "{other}" using apps/v1', "field": "." + ".".join(path)}
                for path, other in conflicts.items()
            ]
            raise Refused(409, f"Apply failed with {len(causes)} conflict", {"causes": causes})
        for path in conflicts:
            for owned in owners.values():
                owned.discard(path)
        gone = owners.get(manager, set()) - set(wanted)
        owners[manager] = set(wanted)
        kept = {path: value for path, value in there.items() if path not in gone or any(path in owned for owned in owners.values())}
        result = built({**kept, **wanted})
        if key[0] == "deployments":
            result["spec"].setdefault("replicas", 1)
        return {**result, "kind": KINDS[key[0]], "metadata": {"namespace": key[1], "generation": 1, **result["metadata"]}}

    def _delete(self, key: tuple[str, str, str], query: Mapping[str, str]) -> Json:
        found = self._existing(key)
        if key[0] == "pods" and not self.obedient and query.get("gracePeriodSeconds") != "0":
            self._store(key, merged(found, {"metadata": {"deletionTimestamp": moment(time.time())}}))
        else:
            self._remove(key)
        if key[0] == "deployments":
            for pod in [name for name in self.objects if name[0] == "pods" and self._owner(self.objects[name]) == key[2]]:
                self._delete(pod, query)
        if self.obedient:
            self.reconcile()
        return {"kind": "Status", "status": "Success"}

    # The store and its controller

    def _store(self, key: tuple[str, str, str], found: Json) -> None:
        self._version += 1
        new = key not in self.objects
        stamp = found["metadata"].get("creationTimestamp") or moment(time.time())
        found["metadata"] |= {"resourceVersion": str(self._version), "creationTimestamp": stamp, "managedFields": self._fields(key)}
        self.objects[key] = found
        self.changes.append((key[0], key[1], "ADDED" if new else "MODIFIED", found))
        self.changed.notify_all()
        if key[0] == "deployments" and self.obedient:
            self.reconcile()

    def _fields(self, key: tuple[str, str, str]) -> list[Json]:
        return [
            {
                "manager": manager,
                "fieldsV1": built({tuple(f"f:{part}" for part in path): {} for path in owned if not any("[" in part for part in path)}),
            }
            for manager, owned in self.owners.get(key, {}).items()
        ]

    def _remove(self, key: tuple[str, str, str]) -> None:
        found = self.objects.pop(key)
        self.owners.pop(key, None)
        self.changes.append((key[0], key[1], "DELETED", found))
        self.changed.notify_all()

    def _owner(self, pod: Json) -> str:
        return str(pod["metadata"].get("annotations", {}).get("owner"))

    def reconcile(self) -> None:
        """Pods for every Deployment: as many as asked for, of its newest template, all ready unless `pod_state` says otherwise."""
        for key in [key for key in self.objects if key[0] == "deployments"]:
            deployment = self.objects[key]
            template, size = deployment["spec"]["template"], deployment["spec"].get("replicas", 1)
            own = [name for name in self.objects if name[0] == "pods" and self._owner(self.objects[name]) == key[2]]
            stale = [name for name in own if self.objects[name]["template"] != template]
            cost = "controller.kubernetes.io/pod-deletion-cost"
            fresh = sorted(
                (name for name in own if name not in stale),
                key=lambda name: (-int(self.objects[name]["metadata"].get("annotations", {}).get(cost, 0)), self.objects[name]["number"]),
            )
            for name in [*stale, *fresh[size:]]:
                self._remove(name)
            for _ in range(size - len(fresh)):
                self._new_pod(key, template)
            status = {"observedGeneration": deployment["metadata"].get("generation", 1), "replicas": size, "updatedReplicas": size}
            if deployment.get("status") != status:
                deployment["status"] = status
                self.changes.append((key[0], key[1], "MODIFIED", deployment))
                self.changed.notify_all()

    def _new_pod(self, deployment: tuple[str, str, str], template: Json) -> None:
        self._number += 1
        name = f"{deployment[2]}-6d5f8c7b9d-{self._number:05x}"
        running = {"name": "agent", "restartCount": 0, "state": {"running": {"startedAt": moment(time.time())}}}
        pod = {
            "kind": "Pod",
            "metadata": {"name": name, "labels": template["metadata"]["labels"], "annotations": {"owner": deployment[2]}},
            "spec": {**template["spec"], "nodeName": "node-1"},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [running]},
            "template": copy.deepcopy(template),
            "number": self._number,
        }
        if self.pod_state:
            pod["status"] = copy.deepcopy(self.pod_state)
        self._store(("pods", deployment[1], name), pod)


def _plain(found: Json) -> Json:
    return {**found, "metadata": {**found["metadata"], "managedFields": None}}


def selected(found: Json, wanted: list[Any]) -> bool:
    labels = found["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in wanted)


def merged(found: Json, change: Json) -> Json:
    """JSON merge patch."""
    result = copy.deepcopy(found)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def moment(at: float, *, fine: bool = False) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    return f"{whole}.{int(at % 1 * 1e9):09d}Z" if fine else f"{whole}Z"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms
    fake: FakeKubernetes

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_PATCH = do_DELETE = do_POST = do_GET

    def _serve(self) -> None:
        fake, url = self.fake, urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path}"
        fake.asked.append(asked)
        fake.headers.append(self.headers)
        try:
            if self._is_hurt(asked):
                return
            if self.headers.get("Authorization") not in {f"Bearer {token}" for token in fake.tokens}:
                raise Refused(401, "Unauthorized")
            if url.path.endswith("/log"):
                self._log(url.path.split("/")[-2], query)
            elif query.get("watch") == "true":
                self._watch(url.path, query)
            else:
                kind = self.headers.get("Content-Type", "")
                self._send(200, fake.answer(self.command, url.path, query, json.loads(raw) if raw else None, kind))
        except Refused as no:
            body = {"kind": "Status", "status": "Failure", "message": str(no), "details": no.details, "code": no.status}
            self._send(no.status, body, no.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _is_hurt(self, asked: str) -> bool:
        """Whether a fault has taken care of the request."""
        for fault in self.fake.faults:
            if re.search(fault.pattern, asked) and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                if fault.silent:
                    with self.fake.changed:
                        self.fake.changed.wait_for(lambda: not self.fake.faults)
                if fault.hang_up or fault.silent:
                    self.close_connection = True
                    return True
                raise Refused(fault.status, fault.message, fault.details, fault.headers)
        return False

    def _send(self, status: int, body: Json, headers: Mapping[str, str] | None = None) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _watch(self, path: str, query: Mapping[str, str]) -> None:
        fake, found = self.fake, _OBJECT.fullmatch(path)
        assert found is not None
        wanted = [term.partition("=")[::2] for term in query.get("labelSelector", "").split(",") if term]
        self._begin()
        with fake.changed:
            sent = len(fake.changes)
            if "resourceVersion" not in query:  # what is there comes first
                current = fake._page(found["plural"], found["namespace"], query)["items"]
                pending = [("ADDED", one) for one in current]
        while True:
            for kind, one in pending:
                self._chunk(json.dumps({"type": kind, "object": one}).encode() + b"\n")
            with fake.changed:
                if not fake.changed.wait_for(lambda: len(fake.changes) > sent, timeout=5):  # noqa: B023 - called at once
                    return self._chunk(b"")
                news, sent = fake.changes[sent:], len(fake.changes)
                pending = [
                    (kind, copy.deepcopy(one))
                    for plural, namespace, kind, one in news
                    if (plural, namespace) == (found["plural"], found["namespace"]) and selected(one, wanted)
                ]

    def _log(self, pod: str, query: Mapping[str, str]) -> None:
        fake = self.fake
        state = fake.find("pods", pod)["status"] if ("pods", "default", pod) in fake.objects else None
        if state is None:
            raise Refused(404, f'pods "{pod}" not found', {"kind": "pods", "name": pod})
        if query.get("previous") != "true" and state.get("phase") == "Pending":
            raise Refused(400, f'container "agent" in pod "{pod}" is waiting to start: ContainerCreating')
        lines = list((fake.previous_logs if query.get("previous") == "true" else fake.logs).get(pod, []))
        since = query.get("sinceTime", "")
        chosen = [line for line in lines if line[:19].decode() >= since[:19]]
        if "tailLines" in query:
            chosen = chosen[-int(query["tailLines"]) :] if query["tailLines"] != "0" else []
        self._begin()
        for line in chosen:
            self._chunk(self._line(line, query))
        sent = len(lines)
        while query.get("follow") == "true":
            with fake.changed:
                fake.changed.wait_for(lambda: _has_news(fake, pod, sent), timeout=5)  # noqa: B023 - called at once
                news, sent = fake.logs.get(pod, [])[sent:], len(fake.logs.get(pod, []))
            for line in news:
                if line.endswith(b" <break>"):
                    self.close_connection = True
                    return
                self._chunk(self._line(line, query))
            if not news:
                break
        self._chunk(b"")

    def _line(self, line: bytes, query: Mapping[str, str]) -> bytes:
        return (line if query.get("timestamps") == "true" else line.partition(b" ")[2]) + b"\n"


def _has_news(fake: FakeKubernetes, pod: str, sent: int) -> bool:
    return len(fake.logs.get(pod, [])) > sent or ("pods", "default", pod) not in fake.objects


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle of a stream is nothing to report."""


@contextmanager
def running(tls: ssl.SSLContext | None = None) -> Iterator[FakeKubernetes]:
    fake = FakeKubernetes()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    fake.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        with fake.changed:
            fake.faults.clear()
            fake.changed.notify_all()
        server.shutdown()
        server.server_close()


def write_kubeconfig(path: Path, url: str, *, token: str = TOKEN, namespace: str | None = None) -> None:
    """A kubeconfig with one context, `test`."""
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "fake", "cluster": {"server": url}}],
                "users": [{"name": "me", "user": {"token": token}}],
                "contexts": [
                    {"name": "test", "context": {"cluster": "fake", "user": "me", **({"namespace": namespace} if namespace else {})}}
                ],
            }
        )
    )
