"""Reads a metric of the user's from where it is: a command, a file, an HTTP endpoint, Redis, a Python function. Decides nothing.

Each read is blocking, with a time limit of its own, and may be called in a thread. What it reads is a stranger's: bounded and checked.
"""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from fleetctl.addresses import is_loopback, parse_url
from fleetctl.errors import FleetctlError
from fleetctl.host import environment, helpers
from fleetctl.models import FleetSpec, MetricSpec

_MOST_BYTES = 1 << 20
# Runs in a process of its own: whatever a user's function does, the daemon goes on.
_CALL = "import importlib,sys;m,_,f=sys.argv[1].partition(':');print(float(getattr(importlib.import_module(m),f)()))"
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class LocalMetricReader:
    """`ports.MetricReader` on this machine."""

    def read(self, metric: MetricSpec, spec: FleetSpec) -> float:
        deadline = time.monotonic() + metric.timeout_seconds
        try:
            if metric.command:
                return _number(_output(metric.command, spec, deadline))
            if metric.python is not None:
                return _number(_output((sys.executable, "-c", _CALL, metric.python), spec, deadline, path=spec.cwd))
            if metric.file is not None:
                return _number(_file(os.path.join(spec.cwd, metric.file)))
            if metric.http is not None:
                return _from_text(_http(metric.http, metric, deadline), metric.field)
            if metric.redis is not None:
                return _redis(metric, deadline)
        except TimeoutError:
            raise FleetctlError(f"no answer in {metric.timeout_seconds:g} s") from None
        except OSError as error:
            raise FleetctlError(str(error.strerror or error)[:200]) from None
        except (ValueError, KeyError, IndexError, TypeError, RecursionError, OverflowError) as error:
            raise FleetctlError(str(error)[:200]) from None
        raise FleetctlError("it has no source")


def _number(text: str) -> float:
    """The one number that the text is; of several lines the last that is not empty, as of a command that says more."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not _NUMBER.fullmatch(lines[-1]):
        raise ValueError(f"{(lines[-1] if lines else '')[:40]!r} is no number")
    return float(lines[-1])


def _output(command: tuple[str, ...], spec: FleetSpec, deadline: float, *, path: str | None = None) -> str:
    """What the command prints; the whole of it is killed when its time is up."""
    environ = environment.inherited() | dict(spec.environment)
    if path is not None:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, environ.get("PYTHONPATH")]))
    with helpers.starting():
        process = subprocess.Popen(
            command,
            cwd=spec.cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        helpers.pids.add(process.pid)
    try:
        with process:
            try:
                out, _ = process.communicate(timeout=max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            finally:
                # Also what it left behind, or a child that holds the pipe would be waited for.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        helpers.pids.discard(process.pid)
    if process.returncode:
        raise ValueError(f"{os.path.basename(command[0])} ended with {process.returncode}")
    return out[:_MOST_BYTES].decode(errors="replace")


def _file(path: str) -> str:
    """The text of a regular file: a pipe would be waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no file")
        return file.read(_MOST_BYTES).decode(errors="replace")


def _connect(host: str, port: int, path: str, metric: MetricSpec, deadline: float) -> socket.socket:
    left = max(0.01, deadline - time.monotonic())
    if path:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(left)
        try:
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        return connection
    # The configuration refuses other machines already; a record from elsewhere must not get around that.
    if host not in metric.allow_hosts and not is_loopback(host):
        raise ValueError(f"{host} is not this machine, and not in allow_hosts")
    return socket.create_connection((host, port), timeout=left)


def _receive(connection: socket.socket, deadline: float) -> Iterator[bytes]:
    size = 0
    while True:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        piece = connection.recv(65536)
        if not piece:
            return
        size += len(piece)
        if size > _MOST_BYTES:
            raise ValueError(f"the answer is longer than {_MOST_BYTES} bytes")
        yield piece


def _http(url: str, metric: MetricSpec, deadline: float) -> str:
    """The body of the answer to a GET. HTTP/1.0, so that it ends with the connection and comes in one piece."""
    target = parse_url(url)
    address = target.address
    with _connect(address.host, address.port, address.path, metric, deadline) as connection:
        request = f"GET {target.path} HTTP/1.0\r\nHost: {target.host_header}\r\nAccept: application/json, text/plain\r\n\r\n"
        connection.sendall(request.encode("ascii"))
        raw = b"".join(_receive(connection, deadline))
    head, _, body = raw.partition(b"\r\n\r\n")
    status = head.split(None, 2)[1:2]
    if not head.startswith(b"HTTP/") or status != [b"200"]:
        raise ValueError(f"HTTP status {status[0].decode(errors='replace')[:10]}" if status else "the answer is not HTTP")
    return body.decode(errors="replace")


def _from_text(text: str, field: str | None) -> float:
    """The number in a JSON document or in Prometheus text; without a field the text is the number."""
    if field is None:
        return _number(text)
    if text.lstrip()[:1] in ("{", "["):
        return _in_json(json.loads(text), field)
    return prometheus(text, field)


def _in_json(value: Any, field: str) -> float:  # Any: JSON values
    for part in field.split("."):
        if isinstance(value, list):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise ValueError(f"the answer has no {field}")
    # Anything else but a number or the text of one is told as what it is.
    return _number(json.dumps(value) if not isinstance(value, str) else value)


def prometheus(text: str, selector: str) -> float:
    """The sum of the samples that have this name and at least these labels: `requests` or `requests{queue="a"}`."""
    name, labels = _series(selector)
    found = [value for series, value in _samples(text) if series[0] == name and labels.items() <= series[1].items()]
    if not found:
        raise ValueError(f"the answer has no {selector}")
    return sum(found)


def _samples(text: str) -> Iterator[tuple[tuple[str, dict[str, str]], float]]:
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        matched = re.fullmatch(r"\s*([a-zA-Z_:][\w:]*(?:\{.*\})?)\s+(\S+)(?:\s+-?\d+)?\s*", line)
        if matched:
            with contextlib.suppress(ValueError):
                yield _series(matched[1]), float(matched[2])


def _series(text: str) -> tuple[str, dict[str, str]]:
    matched = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?", text.strip())
    if not matched:
        raise ValueError(f"{text[:60]!r} names no series")
    labels = re.findall(r'([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"', matched[2] or "")
    return matched[1], {name: value.replace('\\"', '"').replace("\\\\", "\\") for name, value in labels}


def _redis(metric: MetricSpec, deadline: float) -> float:
    assert metric.redis is not None
    where = metric.redis_url
    if where.startswith("env:"):
        where = os.environ[where.removeprefix("env:")]
    elif where.startswith("file:"):
        where = _file(where.removeprefix("file:")).strip()
    url = urlsplit(where)
    host, port, path = (url.hostname or "127.0.0.1", url.port or 6379, url.path) if url.scheme == "redis" else ("", 0, url.path)
    commands: list[tuple[str, ...]] = []
    if url.password:
        commands.append(("AUTH", *([unquote(url.username)] if url.username else []), unquote(url.password)))
    if url.scheme == "redis" and (database := path.strip("/")):
        commands.append(("SELECT", database))
    commands.append(tuple(metric.redis.split()))
    with _connect(host, port, "" if url.scheme == "redis" else path, metric, deadline) as connection:
        connection.sendall(b"".join(map(_resp, commands)))
        pieces, ahead = _receive(connection, deadline), b""
        for _ in commands:
            answer, ahead = _reply(pieces, ahead)
    return _number(answer)


def _resp(words: tuple[str, ...]) -> bytes:
    encoded = [word.encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)


def _reply(pieces: Iterator[bytes], ahead: bytes) -> tuple[str, bytes]:
    """One answer, which is a line or a line and a text; and what came behind it."""

    def line(data: bytes) -> tuple[bytes, bytes]:
        while b"\r\n" not in data:
            piece = next(pieces, b"")
            if not piece:
                raise ValueError("Redis closed the connection")
            data += piece
        first, _, rest = data.partition(b"\r\n")
        return first, rest

    first, ahead = line(ahead)
    kind, text = first[:1], first[1:].decode(errors="replace")
    if kind == b"-":
        raise ValueError(f"Redis says: {text}")
    if kind == b"$" and text != "-1":
        body, ahead = line(ahead)
        return body.decode(errors="replace"), ahead
    if kind not in (b":", b"+"):
        raise ValueError("Redis has no such value" if kind == b"$" else "the answer is no number of Redis")
    return text, ahead
