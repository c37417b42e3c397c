"""Hardens uvicorn's HTTP protocol: who may connect, how many, and how long each may take. Knows nothing of what is asked.

uvicorn has a deadline for idle kept connections only. Here each connection is in one phase with one deadline, and one that does not
take what it asked for is dropped.
"""

import asyncio
import os
import socket
import struct
import sys
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fleetctl import errors
from fleetctl.daemon.api import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one caller may take. Times in seconds."""

    connections: int = 256
    streams: int = 64
    body_bytes: int = 1024 * 1024
    head_bytes: int = 16 * 1024
    idle_seconds: float = 60.0
    head_seconds: float = 5.0
    body_seconds: float = 10.0
    write_seconds: float = 30.0  # for a caller that does not read what it asked for
    backlog: int = 1024  # callers that wait to be let in; Linux sends any more away at once
    accept_batch: int = 64  # let in at once, so that a flood cannot take all descriptors before the bound on connections holds


class Phase(Enum):
    IDLE = "between two requests"
    HEAD = "in the middle of a request's head"
    BODY = "in the middle of a request's body"
    ANSWERING = "waiting for the answer"


class GuardedConfig(Config):
    """uvicorn's settings, and ours: uvicorn hands this to every protocol it makes."""

    def __init__(self, app: Any, limits: Limits) -> None:  # Any: an ASGI application; uvicorn's own type of it is private
        super().__init__(
            app,
            loop="none",
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            workers=1,  # else uvicorn reads WEB_CONCURRENCY
            log_config=None,
            log_level="error",  # what callers do wrong is told to them; it must not fill the log
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=limits.accept_batch,  # asyncio takes it for both
            timeout_keep_alive=max(int(limits.idle_seconds) + 1, 1),  # ours comes first
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=limits.head_bytes,
        )
        self.limits = limits


class GuardedProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = cast(GuardedConfig, config).limits  # this class comes into use through GuardedConfig only
        self._phase = Phase.IDLE
        self._since = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the class above
        super().connection_made(transport)
        # 0: a writer waits until all that it wrote is gone, so a deaf reader costs one message of memory and is noticed at once.
        transport.set_write_buffer_limits(high=0)
        self._enter(Phase.IDLE)
        if not may_connect(peer_uid(transport.get_extra_info("socket"))):
            self._refuse(403, "The control socket is for its owner only")
        elif not self._make_room():
            self._refuse(503, "Too many connections are busy; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._deadline)
        _cancel(self._stall)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn keeps this timer, and with it the connection's memory, after a reset

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stall)
        self._stall = None

    def send_400_response(self, msg: str) -> None:
        # uvicorn calls this where it handles h11's error and answers in plain text; ours is JSON, with h11's own status.
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        too_large = f"The request's head is larger than {self._limits.head_bytes} bytes"
        self._refuse(status, too_large if status == 431 else "This is not HTTP/1.1")

    @property
    def is_idle(self) -> bool:
        return self._phase is Phase.IDLE

    @property
    def is_deaf_stream(self) -> bool:
        return self.flow.write_paused and self.scope is not None and "fleetctl.stream" in self.scope

    def _follow(self) -> None:
        phase = self._seen_phase()
        if phase is not self._phase:
            self._enter(phase)

    def _seen_phase(self) -> Phase:
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            return Phase.HEAD if self.conn.trailing_data[0] else Phase.IDLE
        return Phase.BODY if theirs is h11.SEND_BODY else Phase.ANSWERING

    def _enter(self, phase: Phase) -> None:
        """Start the phase's deadline; more bytes do not move it."""
        self._phase, self._since = phase, self.loop.time()
        _cancel(self._deadline)
        limits = self._limits
        seconds = {Phase.IDLE: limits.idle_seconds, Phase.HEAD: limits.head_seconds, Phase.BODY: limits.body_seconds}.get(phase)
        self._deadline = None if seconds is None or self.transport.is_closing() else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self._phase is Phase.IDLE:
            self.transport.close()
        else:
            self._refuse(408, f"The request did not arrive in time: it stopped {self._phase.value}")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without asking h11, which may be in a state of error, and close. An answer that has begun is cut off."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = encode({"error": errors.UsageError(message).to_json()})
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def _make_room(self) -> bool:
        """Whether there is room for this connection, if need be by closing the one that is longest idle, half-sent or deaf."""
        others = [other for other in self.connections if isinstance(other, GuardedProtocol) and not other.transport.is_closing()]
        if len(others) <= self._limits.connections:
            return True
        spare = [other for other in others if other is not self and (other._phase is not Phase.ANSWERING or other.is_deaf_stream)]
        # Those that only hold a place go before those in the middle of something.
        victim = min(spare, key=lambda other: (not other.is_idle, other._since), default=None)
        if victim is not None:
            victim.transport.abort()
        return victim is not None


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def peer_uid(connection: socket.socket) -> int:
    """The user on the other side of a Unix socket, as the kernel saw it when they connected."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def may_connect(uid: int) -> bool:
    """The owner may, and root, who could do anything to the owner's processes anyway."""
    return uid in (0, os.geteuid())
