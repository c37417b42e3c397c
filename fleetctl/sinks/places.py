"""Where events go. Each place takes a batch in order, and has all of it or raises Trouble; what it has may come again after a failure.

Blocking: the pump calls these in a thread.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

from fleetctl.sinks.envelope import CONTENT_TYPE, Json
from fleetctl.sinks.settings import SinkSettings


class Trouble(Exception):
    """The place did not take the events; they are to be sent again. `taken`: how many of the batch it has nevertheless."""

    def __init__(self, message: str, taken: int = 0) -> None:
        super().__init__(message)
        self.taken = taken


class Place(Protocol):
    def deliver(self, events: Sequence[Json]) -> None:
        """Take these CloudEvents, in this order. Raises Trouble."""
        ...

    def close(self) -> None: ...


def place_of(settings: SinkSettings) -> Place:
    """Opens nothing yet. Raises Trouble where it cannot be used at all, such as without its extra."""
    if settings.type == "file":
        return FilePlace(settings.path)
    if settings.type == "webhook":
        return Webhook(settings)
    return RedisStream(settings)


def secret_of(reference: str) -> str:
    """The value that "env:NAME" or "file:PATH" leads to. Raises Trouble."""
    kind, _, where = reference.partition(":")
    if kind == "env":
        if where not in os.environ:
            raise Trouble(f"the variable {where} is not set where the daemon runs")
        return os.environ[where]
    try:
        with open(where, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as error:
        raise Trouble(f"{where}: {getattr(error, 'strerror', None) or error}") from error


class FilePlace:
    """One line of JSON an event. Opened anew for each batch, so that whoever rotates it may rename it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def deliver(self, events: Sequence[Json]) -> None:
        data = b"".join(_encoded(event) + b"\n" for event in events)
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            try:
                self._append(fd, data)
            finally:
                os.close(fd)
        except OSError as error:
            raise Trouble(f"{self.path}: {error.strerror}") from error

    def _append(self, fd: int, data: bytes) -> None:
        size = os.fstat(fd).st_size
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        except OSError:
            # A full disk: no half line, before which the next try would write the whole.
            with suppress(OSError):
                os.ftruncate(fd, size)
            raise

    def close(self) -> None:
        pass


class Webhook:
    """A POST for each event, signed as standardwebhooks.com has it, over one connection that is kept."""

    def __init__(self, settings: SinkSettings) -> None:
        self._settings = settings
        self._url = urlsplit(settings.url)
        self._connection: http.client.HTTPConnection | None = None

    def deliver(self, events: Sequence[Json]) -> None:
        secret = secret_of(self._settings.secret) if self._settings.secret else ""
        for number, event in enumerate(events):
            try:
                status = self._post(event, secret)
            except (OSError, http.client.HTTPException, ssl.SSLError) as error:
                self.close()
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise Trouble(f"{self._settings.target}: {reason}", number) from error
            # What it calls bad it would call bad for ever; everything else may be different tomorrow.
            if not (200 <= status < 300 or status in (400, 413, 415, 422)):
                self.close()
                raise Trouble(f"{self._settings.target}: HTTP {status}", number)

    def _post(self, event: Json, secret: str) -> int:
        body = _encoded(event)
        if self._connection is None:
            self._connection = self._connected()
        path = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        self._connection.request("POST", path, body, _headers(event, body, secret))
        answer = self._connection.getresponse()
        answer.read(1 << 20)
        if not answer.isclosed():
            self.close()  # more than anybody has to say to an event
        return answer.status

    def _connected(self) -> http.client.HTTPConnection:
        host, seconds = self._url.hostname or "", self._settings.timeout_seconds
        if self._url.scheme == "https":
            return http.client.HTTPSConnection(host, self._url.port, timeout=seconds, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, self._url.port, timeout=seconds)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _headers(event: Json, body: bytes, secret: str) -> dict[str, str]:
    headers = {"Content-Type": CONTENT_TYPE, "User-Agent": "fleetctl"}
    if not secret:
        return headers
    now = str(int(time.time()))
    return headers | {"webhook-id": str(event["id"]), "webhook-timestamp": now, "webhook-signature": signature(event, now, body, secret)}


def signature(event: Json, at: str, body: bytes, secret: str) -> str:
    """HMAC-SHA256 over id, time and body. A secret that begins with whsec_ is base64, as standardwebhooks.com has it."""
    key = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    signed = hmac.new(key, f"{event['id']}.{at}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()


class RedisStream:
    """An entry for each event, a batch all or nothing. Needs the extra: pip install 'fleetctl[redis]'."""

    def __init__(self, settings: SinkSettings) -> None:
        self._settings = settings
        self._client: Any = None  # Any: the library is an extra, and may not be there
        try:
            import redis
        except ImportError as error:
            raise Trouble("the redis package is not installed: pip install 'fleetctl[redis]'") from error
        self._library = redis

    def deliver(self, events: Sequence[Json]) -> None:
        settings = self._settings
        url = secret_of(settings.url) if settings.url.startswith(("env:", "file:")) else settings.url
        try:
            if self._client is None:
                seconds = settings.timeout_seconds
                self._client = self._library.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds)
            with self._client.pipeline(transaction=True) as pipe:
                for event in events:
                    fields: Mapping[str, Any] = {"id": event["id"], "type": event["type"], "event": _encoded(event)}
                    pipe.xadd(settings.stream, dict(fields), maxlen=settings.max_length, approximate=True)
                pipe.execute()
        except (self._library.RedisError, OSError, ValueError) as error:
            self.close()
            raise Trouble(f"{settings.target}: {error}") from error

    def close(self) -> None:
        if self._client is not None:
            with suppress(Exception):  # it is broken already, or it is not: nothing hangs on it
                self._client.close()
            self._client = None


def _encoded(event: Json) -> bytes:
    # With escapes instead of other characters: half a character, as undecodable names have it, passes too.
    return json.dumps(event, separators=(",", ":")).encode()
