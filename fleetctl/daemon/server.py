"""The control plane's server: HTTP/1.1 on a Unix socket, handing each request of `api.OPERATIONS` to a `Control`.

Owns the socket file, the JSON errors and the streams. The daemon's main owns signals and logging and the process.
"""

import asyncio
import fcntl
import logging
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import Server

from fleetctl import errors
from fleetctl.daemon import api
from fleetctl.daemon.api import Control, Operation, Problem, encode, usage
from fleetctl.daemon.guard import GuardedConfig, GuardedProtocol, Limits
from fleetctl.host.paths import SOCKET_PATH_BYTES, file_identity

__all__ = ["Control", "ControlServer", "Limits"]

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0


class ControlServer:
    """Serves one `Control` on one socket path, inside the running event loop. Handles no signals, starts no thread."""

    def __init__(self, control: Control, socket_path: str, *, limits: Limits | None = None) -> None:
        self.socket_path = socket_path
        self._limits = limits or Limits()
        self._app = _App(control, self._limits)
        self._socket: socket.socket | None = None
        self._file: tuple[int, int] | None = None
        self._server: Server | None = None

    async def start(self) -> None:
        """Return once requests are answered. Raises DaemonRunning (another server is alive there), StateDirectoryError."""
        self._socket = bind(self.socket_path, self._limits.backlog)
        self._file = file_identity(self.socket_path)
        config = GuardedConfig(self._app, self._limits)
        config.load()
        # `Server.serve` would take over the signals and wake up ten times a second; its two halves do neither.
        self._server = Server(config)
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[self._socket])
        self._socket.listen(self._limits.backlog)  # asyncio made the queue as short as its batch

    async def keep_open(self) -> None:
        """Listen there anew whenever somebody removed the socket, as a tidy person may with `run/`; never returns."""
        trouble = ""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                await self._ensure()
                trouble = ""
            except errors.FleetctlError as error:  # told once, tried again until it heals
                if error.message != trouble:
                    logger.error("%s", error.message)
                trouble = error.message

    async def _ensure(self) -> None:
        if self._server is None or self._file is None or file_identity(self.socket_path) == self._file:
            return
        with suppress(OSError):  # its parent is not ours to make: where that is gone, so is the whole state directory
            os.mkdir(os.path.dirname(self.socket_path), 0o700)
        fresh = bind(self.socket_path, self._limits.backlog)
        logger.warning("%s was removed and is made again", self.socket_path)
        before = self._server.servers
        self._socket, self._file = fresh, file_identity(self.socket_path)
        await self._server.startup(sockets=[fresh])
        fresh.listen(self._limits.backlog)
        for server in before:  # who is connected stays so
            server.close()

    async def stop(self) -> None:
        """End the streams, let running requests finish for a second, close every connection, remove the socket if it is ours."""
        if self._server is None:
            return
        self._remove_socket()  # first, so that new callers find nobody instead of a closing door
        self._app.stopping.set()
        await asyncio.sleep(0)
        for connection in self._connections():
            if connection.is_deaf_stream:  # it would not even take the end of its stream
                connection.transport.abort()
        await self._server.shutdown(sockets=[self._socket] if self._socket else [])
        for connection in self._connections():
            connection.transport.abort()
        self._server = self._socket = None

    def _connections(self) -> list[GuardedProtocol]:
        found = self._server.server_state.connections if self._server else ()
        return [connection for connection in found if isinstance(connection, GuardedProtocol)]

    def _remove_socket(self) -> None:
        folder = os.path.dirname(self.socket_path) or "."
        # The folder may be gone already, and the socket another server's.
        with suppress(OSError), _locked(folder):
            if file_identity(self.socket_path) == self._file:
                os.unlink(self.socket_path)


# ---- the socket file ----


def bind(path: str, backlog: int) -> socket.socket:
    """A socket that listens at `path`, replacing a stale one in one step: at no moment is it missing, open to others, or deaf.

    Raises DaemonRunning when somebody listens there, StateDirectoryError when it cannot be made.
    """
    folder, name = os.path.split(path)
    folder = folder or "."
    temporary = os.path.join(folder, "." + secrets.token_hex(5))  # shorter than "control.sock", whose length was checked
    if max(len(os.fsencode(path)), len(os.fsencode(temporary))) > SOCKET_PATH_BYTES:
        raise errors.StateDirectoryError(f"{path}: too long for a Unix socket ({SOCKET_PATH_BYTES} bytes are possible)")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(folder):  # of two servers that start at once, the second sees the first
            _refuse_if_taken(path)
            # On Linux the file takes over the mode of the descriptor: no umask to change for the whole process, no moment at 0777.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(temporary)
            try:
                listener.listen(backlog)
                os.rename(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
    except OSError as error:
        listener.close()
        raise errors.StateDirectoryError(f"{path}: the control socket {name} cannot be made: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Alone in this folder among the servers that start or stop; never held for more than a few milliseconds."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_if_taken(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise errors.StateDirectoryError(f"{path}: in the way of the control socket, and not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # stale: who listened there is gone
        except BlockingIOError:
            pass  # alive, with a full queue
    raise errors.DaemonRunning(f"Another daemon listens at {path}")


# ---- requests ----


class _App:
    """The ASGI application: finds the operation, checks the request, answers in JSON whatever happens."""

    def __init__(self, control: Control, limits: Limits) -> None:
        self.stopping = asyncio.Event()
        self._control = control
        self._limits = limits
        self._streams = 0
        routes = [Route(path, _Endpoint(self, methods)) for path, methods in api.by_path().items()]
        self._router: ASGIApp = Router(routes, redirect_slashes=False, default=_no_such_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Before anything else, so that no answer, an error neither, leaves a body behind that then has to be read and dropped.
            scope["fleetctl.body"] = await self._body(Request(scope, receive))
            await self._router(scope, receive, send)
        except ClientDisconnect:
            return  # there is nobody to answer
        except Exception as error:
            problem = as_problem(error)
            headers = {"connection": "close"} if problem.status == 413 else {}  # do not read the rest
            if problem.allow:
                headers["allow"] = problem.allow
            await _json({"error": problem.error.to_json()}, problem.status, headers)(scope, receive, send)

    async def answer(self, request: Request, methods: Mapping[str, Operation]) -> Response:
        """The response to a request for a path that has these methods."""
        operation = methods.get(request.method)
        if operation is None:
            raise Problem(405, errors.UsageError(f"{request.method} is not possible here"), allow=", ".join(methods))
        call = api.Call(
            control=self._control,
            path=api.parse_path(request.path_params),
            query=api.parse_query(request.scope["query_string"], operation),
            body=api.parse_body(request.scope["fleetctl.body"], operation),
        )
        answer = await operation.run(call)
        if isinstance(answer, str):
            return Response(answer.encode(), media_type=operation.media)
        return _json(answer) if isinstance(answer, dict) else await self._stream(answer)

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body_bytes
        too_large = usage(f"The request's body is larger than {most} bytes", 413)
        length = request.headers.get("content-length", "0")
        if int(length) > most:  # digits only: h11 checked it
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    async def _stream(self, objects: api.Stream) -> Response:
        if self._streams >= self._limits.streams:
            await objects.aclose()
            raise errors.Busy
        return _Lines(self, objects)

    @contextmanager
    def counted(self) -> Iterator[None]:
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


class _Endpoint:
    """One path. An object, because starlette lets a function answer GET only, and says 405 in plain text."""

    def __init__(self, app: _App, methods: Mapping[str, Operation]) -> None:
        self._app, self._methods = app, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._app.answer(Request(scope, receive), self._methods)
        await response(scope, receive, send)


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"] if len(scope["path"]) <= 80 else scope["path"][:77] + "..."
    raise Problem(404, errors.NotFound(f"There is no {path}", hint="/openapi.json lists every path"))


def as_problem(error: Exception) -> Problem:
    """What a caller is told about an exception. One that nobody foresaw goes to the log, and only its kind to the caller."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, errors.FleetctlError):
        return Problem(error.http_status, error)
    logger.error("a request failed", exc_info=error)
    return Problem(500, errors.FleetctlError(f"The daemon failed inside ({type(error).__name__})", hint="its log, daemon.log, tells more"))


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(value), status, headers=dict(headers or {}), media_type="application/json")


class _Lines(Response):
    """A stream of JSON objects, one a line, until they end, the caller goes away or the server stops."""

    def __init__(self, app: _App, objects: api.Stream) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = "application/x-ndjson"
        self.init_headers()
        self._app = app
        self._objects = objects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["fleetctl.stream"] = True  # the guard treats a deaf one as it deserves
        with self._app.counted():
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            ends = [asyncio.create_task(wait) for wait in (self._pump(send), _wait_gone(receive), self._app.stopping.wait())]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ends:
                    task.cancel()
                await asyncio.gather(*ends, return_exceptions=True)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        try:
            async for item in self._objects:
                await _send_line(send, item)
                # Sending does not yield while the caller keeps up: let others have their turn, and hear if this one has gone.
                await asyncio.sleep(0)
        except Exception as error:
            await _send_line(send, {"error": as_problem(error).error.to_json()})
        finally:
            await self._objects.aclose()


async def _send_line(send: Send, item: Mapping[str, Any]) -> None:
    await send({"type": "http.response.body", "body": encode(item) + b"\n", "more_body": True})


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
