"""The socket on which agents say how they are: datagrams in, and who sent each, told by the kernel and not by the sender.

Understands nothing of what is said. A sender that floods it costs the others milliseconds, and one that forges, nothing.
"""

import array
import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from fleetctl.errors import StateDirectoryError
from fleetctl.host.paths import file_identity

log = logging.getLogger(__name__)

MAX_BYTES = 4096
RATE, BURST = 50.0, 100.0  # messages a second of one agent, and how many at once
_PER_ROUND = 64  # about half a millisecond: nobody else waits longer
# Beyond so many dropped messages in a second somebody floods us, and is read more slowly. Not from the first one on: the kernel holds
# ten datagrams for us (net.unix.max_dgram_qlen; SO_RCVBUF does nothing here), and an agent that will not wait loses what comes then.
_FLOOD, _REST_SECONDS = 2000, 0.002
_STRANGER_SECONDS = 0.1
_REMEMBERED_MUTES = 1024
_CREDENTIALS = struct.Struct("3i")
# Credentials come first, then descriptors; those that do not fit are closed by the kernel.
_ANCILLARY_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(array.array("i").itemsize)
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


@dataclass(slots=True)
class _Sender:
    """What one agent may still send, and what of it was not heard, by reason."""

    tokens: float = BURST
    at: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)


class NotifySocket:
    """One datagram socket for all agents of a state directory. Create, `open`, `listen` in the running loop, and `close` it at the end.

    `owner_of` tells the agent that a pid belongs to, None for a stranger; `on_message` gets the agent and what it sent. `inside`: a
    second name of it, in a folder of its own, for agents in a sandbox: what they see of `run/` is that folder.
    """

    def __init__(
        self, path: str, owner_of: Callable[[int], str | None], on_message: Callable[[str, bytes], None], *, inside: str | None = None
    ) -> None:
        self.path, self._inside = path, inside
        self.strangers = 0
        """Messages of processes that belong to no agent."""
        self._owner_of, self._on_message = owner_of, on_message
        self._socket: socket.socket | None = None
        self._listening = False
        self._file: tuple[int, int] | None = None
        self._senders: dict[str, _Sender] = {}
        self._muted: dict[int, tuple[float, str | None]] = {}  # pid -> until when it is not listened to, and whose it is
        self._second, self._excess = 0, 0
        self._resting: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Make the socket, replacing what an earlier daemon left there; what is sent waits. Raises StateDirectoryError."""
        folder, name = os.path.split(self.path)
        temporary = f"{folder}/.{secrets.token_hex(4)}"  # shorter than the name, whose length was checked
        fresh = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            fresh.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            # On Linux the file takes over the mode of the descriptor: at no moment is it open to others.
            os.fchmod(fresh.fileno(), 0o600)
            os.makedirs(folder, mode=0o700, exist_ok=True)
            fresh.bind(temporary)
            if self._inside:
                _name_too(temporary, self._inside)
            os.rename(temporary, self.path)
            self._file = file_identity(self.path)
        except OSError as error:
            fresh.close()
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise StateDirectoryError(f"{self.path}: the socket {name} cannot be made: {error.strerror or error}") from error
        self._let_go()
        self._socket = fresh
        if self._listening:
            self.listen()

    def listen(self) -> None:
        """Hear what is sent."""
        assert self._socket is not None
        self._listening = True
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)

    def ensure(self) -> None:
        """Make the socket anew where somebody removed or replaced its file. Raises StateDirectoryError."""
        if self._file is None or file_identity(self.path) != self._file:
            self.open()

    def close(self) -> None:
        if self._file is not None and file_identity(self.path) == self._file:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._file = None
        self._let_go()

    def _let_go(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # -- what was not heard

    def drop(self, agent_id: str, why: str) -> None:
        """Count a message that does not get through; the first of each kind is told in the log."""
        dropped = self._sender(agent_id).dropped
        dropped[why] += 1
        if dropped[why] == 1:
            log.warning("%s: a message was dropped: %s", agent_id, why)

    def dropped(self, agent_id: str) -> dict[str, int]:
        """How many messages of the agent did not get through, by reason."""
        sender = self._senders.get(agent_id)
        return dict(sender.dropped) if sender else {}

    def forget(self, known: Collection[str]) -> None:
        """Keep the counts of these agents only."""
        self._senders = {agent_id: sender for agent_id, sender in self._senders.items() if agent_id in known}

    # -- what comes in

    def _drain(self) -> None:
        """Read some of what waits. The loop calls again where there is more."""
        assert self._socket is not None
        now = time.monotonic()
        if int(now) != self._second:
            self._second, self._excess = int(now), 0
        for _ in range(_PER_ROUND):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(MAX_BYTES, _ANCILLARY_BYTES, _FLAGS)
            except BlockingIOError:
                break
            except OSError as error:
                log.warning("%s: %s", self.path, error.strerror)
                break
            pid, descriptors = _attached(ancillary)
            try:
                self._take(pid, data, flags, now)
            finally:
                # At last, so that whoever sent BARRIER=1 sees it closed when all it said before was taken in.
                for descriptor in descriptors:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
        if self._excess > _FLOOD:
            self._rest()

    def _rest(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._socket is not None
        loop.remove_reader(self._socket.fileno())
        self._resting = loop.call_later(_REST_SECONDS, self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        self.listen()

    def _take(self, pid: int, data: bytes, flags: int, now: float) -> None:
        until, agent_id = self._muted.get(pid, (0.0, None))
        if now < until:  # without a look at the process: what is dropped must be cheap
            self._exceed(agent_id)
            return
        try:
            agent_id = self._owner_of(pid)
        except OSError:  # out of descriptors: nobody knows whose it is
            agent_id = None
        if agent_id is None:
            self._mute(pid, now + _STRANGER_SECONDS, None)
            self._exceed(None)
            return
        sender = self._sender(agent_id)
        sender.tokens = min(BURST, sender.tokens + (now - sender.at) * RATE)
        sender.at = now
        if sender.tokens < 1.0:
            self._mute(pid, now + (1.0 - sender.tokens) / RATE, agent_id)
            self._exceed(agent_id)
            return
        sender.tokens -= 1.0
        if flags & socket.MSG_TRUNC:
            self.drop(agent_id, f"larger than {MAX_BYTES} bytes")
            return
        self._on_message(agent_id, data)

    def _exceed(self, agent_id: str | None) -> None:
        self._excess += 1
        if agent_id is not None:
            self.drop(agent_id, f"more than {RATE:g} a second")
            return
        self.strangers += 1
        if self.strangers == 1:
            log.warning("%s: a message of a process that belongs to no agent was dropped", self.path)

    def _sender(self, agent_id: str) -> _Sender:
        return self._senders.setdefault(agent_id, _Sender())

    def _mute(self, pid: int, until: float, agent_id: str | None) -> None:
        if len(self._muted) >= _REMEMBERED_MUTES:
            self._muted.clear()
        self._muted[pid] = (until, agent_id)


def _attached(ancillary: Iterable[tuple[int, int, bytes]]) -> tuple[int, list[int]]:
    """The sender's pid, 0 where the kernel tells none, and the descriptors that came along, which are ours to close."""
    pid, descriptors = 0, array.array("i")
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(data)[0]
        elif kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return pid, descriptors.tolist()


def _name_too(path: str, other: str) -> None:
    """Give the socket a second name. Root's agents in a sandbox are another user, and the way to both names is the owner's alone."""
    folder, name = os.path.split(other)
    os.makedirs(folder, exist_ok=True)
    os.chmod(folder, 0o755)
    staged = f"{folder}/.{name}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staged)
    os.link(path, staged)
    if os.geteuid() == 0:
        os.chmod(staged, 0o666)
    os.rename(staged, other)
