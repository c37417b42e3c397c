"""Metrics on a TCP port of the loopback address, for a Prometheus that cannot read a Unix socket. Answers GET /metrics, nothing else.

Any user of the machine can read them there: names of fleets and numbers, and neither variables nor command lines.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from fleetctl.daemon.exposition import CONTENT_TYPE
from fleetctl.errors import UsageError

HOST = "127.0.0.1"
_HEAD_BYTES = 8192
_SECONDS = 5.0
_CONNECTIONS = 16


class MetricsPort:
    """Create it in the running loop, `open` it, `close` it at the end. `tell`: the text of all metrics."""

    def __init__(self, tell: Callable[[], Awaitable[str]], port: int) -> None:
        self._tell, self.port = tell, port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises UsageError where the port is not to be had. Port 0 takes a free one, and `port` says which."""
        try:
            self._server = await asyncio.start_server(self._serve, HOST, self.port, limit=_HEAD_BYTES)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--metrics-port {self.port}: {reason}", hint="choose another port") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._tasks) < _CONNECTIONS:
                self._tasks.add(task)
                async with asyncio.timeout(_SECONDS):
                    await self._answer(reader, writer)
        # A caller that is slow, gone or talks nonsense is no matter for the daemon.
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *fields = head.split("\r\n")
        status, text = await self._reply(first.split(" "), _field(fields, "host"))
        body = text.encode()
        kind = CONTENT_TYPE if status.startswith("200") else "text/plain; charset=utf-8"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
        if not first.startswith("HEAD "):
            writer.write(body)
        await writer.drain()

    async def _reply(self, request: list[str], host: str) -> tuple[str, str]:
        if len(request) != 3 or not request[2].startswith("HTTP/1."):
            return "400 Bad Request", "this is not HTTP/1.1\n"
        if host.partition(":")[0].lower() not in ("localhost", HOST):
            # A page in a browser can have a name of its own lead to this address; only its Host field gives it away.
            return "403 Forbidden", "ask for http://127.0.0.1\n"
        if request[1].partition("?")[0] != "/metrics":
            return "404 Not Found", "there is only /metrics\n"
        if request[0] not in ("GET", "HEAD"):
            return "405 Method Not Allowed", "only GET is possible here\n"
        return "200 OK", await self._tell()


def _field(fields: list[str], name: str) -> str:
    with contextlib.suppress(StopIteration):
        return next(value.strip() for key, colon, value in (field.partition(":") for field in fields) if colon and key.lower() == name)
    return ""
