"""Listening sockets that a fleet declares: bound once, held here, handed to every agent, and got back from a live agent after a crash.

As long as anybody holds such a socket the kernel goes on queueing connections, so a request that comes while every agent is suspended,
restarting or not there yet waits instead of being refused. Nothing is ever accepted here.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fleetctl.addresses import Address, parse
from fleetctl.errors import ConfigError
from fleetctl.host import pidfd, procfs
from fleetctl.host.paths import Paths, file_identity
from fleetctl.models import FleetSpec, ProcessRef

log = logging.getLogger(__name__)

FIRST_FD = 3
"""Where sd_listen_fds(3) looks for the first socket."""

_BACKLOG = 4096  # the kernel takes net.core.somaxconn where that is less
_HELD_FROM = 64  # ours are kept clear of the numbers that they are to have in an agent
_SYS_PIDFD_GETFD = 438
_TCP_INFO_UNACKED = 24  # offset in struct tcp_info; of a listening socket it is the length of its accept queue
_ESTABLISHED_BUT_OURS_TO_SERVE = {0x01, 0x08}  # ESTABLISHED, CLOSE_WAIT: somebody may wait for an answer
_CLOSED = {0x04, 0x05, 0x06, 0x09, 0x0B}  # FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK, CLOSING
_SO_ACCEPTCON = 1 << 16


@dataclass(frozen=True, slots=True)
class Held:
    """A listening socket of ours. `inode`: of its path, where it has one, so that no other file is ever removed for it."""

    address: Address
    socket: socket.socket
    inode: tuple[int, int] | None = None


class ListeningSockets:
    """The sockets of all fleets of one state directory. `umask`: of the paths of Unix sockets, as if an agent had made them."""

    def __init__(self, paths: Paths, *, umask: int = -1) -> None:
        self._paths, self._umask = paths, umask
        self._held: dict[str, dict[str, Held]] = {}
        self._troubles: dict[str, ConfigError] = {}
        self._connections: dict[str, set[str]] = {}

    def listen(self, spec: FleetSpec, processes: Iterable[ProcessRef] = ()) -> None:
        """Hold every socket that the spec declares: those that live agents have, others by binding them. Raises ConfigError.

        `processes`: of the fleet's agents, where they may have been started by a daemon that died.
        """
        mine = self._held.setdefault(spec.name, {})
        new: list[str] = []
        remembered = self._remembered(spec.name)
        processes = list(processes)
        try:
            for name, text in spec.sockets.items():
                key = _key(name, text)
                if key not in mine:
                    mine[key] = self._found_or_bound(spec.name, name, text, remembered.get(key), processes)
                    new.append(key)
        except ConfigError:
            for key in new:
                self._close(mine.pop(key))
            raise
        if new:
            self._remember(spec.name)
        # All are held: whatever was wrong is so no more.
        self._troubles.pop(spec.name, None)

    @contextlib.contextmanager
    def changing(self, spec: FleetSpec, processes: Iterable[ProcessRef] = ()) -> Iterator[None]:
        """Hold the spec's sockets before the change to it is made; after it, close those that it no longer has.

        Agents that still have one of those go on listening on it until they are replaced. Where the change fails nothing has changed.
        """
        before = set(self._held.get(spec.name, {}))
        self.listen(spec, processes)
        wanted = {_key(name, text) for name, text in spec.sockets.items()}
        try:
            yield
        except BaseException:
            self._drop(spec.name, set(self._held[spec.name]) - before)
            raise
        self._drop(spec.name, set(self._held[spec.name]) - wanted)

    def check(self, spec: FleetSpec) -> None:
        """Raise ConfigError where a socket of the spec could not be bound now; changes nothing."""
        mine = self._held.get(spec.name, {})
        for name, text in spec.sockets.items():
            if _key(name, text) not in mine:
                self._close(self._bound(spec.name, name, parse(text)))

    def restore(self, spec: FleetSpec, processes: Iterable[ProcessRef]) -> None:
        """As `listen`, for a daemon that follows another: what does not work is told by `trouble`."""
        try:
            self.listen(spec, processes)
        except ConfigError as error:
            log.error("%s: %s", spec.name, error.message)
            self._troubles[spec.name] = error

    def close(self, fleet: str) -> None:
        """Let go of all sockets of a fleet of which nothing is left."""
        self._drop(fleet, set(self._held.get(fleet, {})))
        self._held.pop(fleet, None)
        self._connections.pop(fleet, None)
        self._troubles.pop(fleet, None)
        with contextlib.suppress(OSError):
            os.unlink(self._paths.sockets(fleet))

    def held(self, spec: FleetSpec) -> list[Held]:
        """The spec's sockets in the order in which agents get them. Raises ConfigError where one cannot be had."""
        if not spec.sockets:
            return []
        try:
            self.listen(spec)
        except ConfigError as error:
            raise self._troubles.get(spec.name, error) from error
        mine = self._held[spec.name]
        return [mine[_key(name, text)] for name, text in spec.sockets.items()]

    def addresses(self, spec: FleetSpec) -> dict[str, Address]:
        """Where the fleet listens, by the socket's name; without those that are not held."""
        mine = self._held.get(spec.name, {})
        return {name: mine[key].address for name, text in spec.sockets.items() if (key := _key(name, text)) in mine}

    def ports(self, spec: FleetSpec) -> dict[str, int]:
        return {name: address.port for name, address in self.addresses(spec).items() if not address.path}

    def backlogs(self, spec: FleetSpec) -> dict[str, int | None]:
        """How many connections wait to be accepted, by the socket's name; None where the kernel does not tell."""
        mine = self._held.get(spec.name, {})
        return {name: backlog(mine[key].socket) for name, text in spec.sockets.items() if (key := _key(name, text)) in mine}

    def has(self, fleet: str) -> bool:
        """Whether any socket is held for the fleet."""
        return bool(self._held.get(fleet))

    def trouble(self, fleet: str) -> str | None:
        """Why a socket of the fleet could not be had again after a crash."""
        return self._troubles[fleet].message if fleet in self._troubles else None

    def serving(self, fleet: str, pids: Iterable[int]) -> bool:
        """Whether one of these processes has accepted a connection on a socket of the fleet, and not closed it."""
        addresses = [held.address for held in self._held.get(fleet, {}).values()]
        return bool(addresses) and is_serving(addresses, pids)

    def connected(self, fleet: str) -> bool:
        """Whether a connection to a socket of the fleet waits, is open, or was there since the last call, as far as the kernel knows.

        What was closed by our end, or by a client on this machine, it knows for a minute; of others only what is open now.
        """
        held = list(self._held.get(fleet, {}).values())
        known, self._connections[fleet] = self._connections.get(fleet, set()), _closed({one.address.port for one in held} - {0})
        addresses = [one.address for one in held]
        return any(backlog(one.socket) for one in held) or bool(_accepted(addresses)) or bool(self._connections[fleet] - known)

    def _found_or_bound(self, fleet: str, name: str, text: str, remembered: str | None, processes: list[ProcessRef]) -> Held:
        declared = parse(text)
        wanted = parse(remembered) if remembered and declared.port == 0 and not declared.path else declared
        refused = ""
        for process in processes:
            try:
                found = _taken_back(process, wanted)
            except PermissionError as error:
                refused = error.strerror or "permission denied"
                continue
            if found is not None:
                return Held(_address_of(found), _moved_up(found), file_identity(declared.path) if declared.path else None)
        try:
            return self._bound(fleet, name, wanted)
        except ConfigError as error:
            if not refused:
                raise
            raise ConfigError(
                f"sockets.{name}: {wanted} is held by agents that run, and the kernel does not let it be taken back from them ({refused}); "
                "they go on serving, but no new agent can be given it",
                hint="`fleetctl down` and `up`, or let it next time: `sysctl kernel.yama.ptrace_scope=0`, or a daemon with CAP_SYS_PTRACE",
            ) from error

    def _bound(self, fleet: str, name: str, address: Address) -> Held:
        try:
            found = self._bind(address)
        except OSError as error:
            raise ConfigError(f"sockets.{name}: {self._why_not(fleet, address, error)}", hint=_hint(address, error)) from error
        return Held(_address_of(found), _moved_up(found), file_identity(address.path) if address.path else None)

    def _bind(self, address: Address) -> socket.socket:
        family = socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            if address.path:
                _clear_the_way(address.path)
                self._bind_path(made, address.path)
            else:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(("127.0.0.1" if address.host == "localhost" else address.host, address.port))
            made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
        return made

    def _bind_path(self, made: socket.socket, path: str) -> None:
        made.bind(path)  # with our own umask: for nobody else until the next line
        before = os.umask(0) if self._umask < 0 else self._umask
        if self._umask < 0:
            os.umask(before)
        os.chmod(path, 0o777 & ~before)

    def _why_not(self, fleet: str, address: Address, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE and not address.path:
            owner = self._holder(address)
            if owner == fleet:
                return f"{address} is taken by this fleet itself, as long as its agents have the socket it had before"
            return f"{address} is taken{f' by fleet {owner}' if owner else ''}"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{address.host} is no address of this machine"
        if error.errno == errno.EACCES and not address.path:
            return f"port {address.port} needs a permission that this user does not have"
        if address.path and (owner := self._holder(address)):
            return f"{address.path} is taken by fleet {owner}"
        return f"{address.path} {error.strerror}" if error.errno == errno.EEXIST else f"{address}: {error.strerror}"

    def _holder(self, address: Address) -> str | None:
        for fleet, sockets in self._held.items():
            for held in sockets.values():
                if (held.address.path, held.address.port) == (address.path, address.port):
                    return fleet
        return None

    def _drop(self, fleet: str, keys: Iterable[str]) -> None:
        mine = self._held.get(fleet, {})
        dropped = [mine.pop(key) for key in keys]
        for held in dropped:
            self._close(held)
        if dropped:
            self._remember(fleet)

    def _close(self, held: Held) -> None:
        held.socket.close()
        if held.inode is not None and file_identity(held.address.path) == held.inode:
            with contextlib.suppress(OSError):
                os.unlink(held.address.path)

    def _remembered(self, fleet: str) -> dict[str, str]:
        """Where the kernel put the sockets that may be anywhere, so that they are there again after a restart."""
        try:
            with open(self._paths.sockets(fleet), encoding="utf-8") as file:
                return {str(key): str(parse(text)) for key, text in json.load(file).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _remember(self, fleet: str) -> None:
        path = self._paths.sockets(fleet)
        with contextlib.suppress(OSError):  # a full disk: then a socket on port 0 may get another port after a crash
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                json.dump({key: str(held.address) for key, held in self._held[fleet].items()}, file)
            os.replace(f"{path}.tmp", path)


def backlog(sock: socket.socket) -> int | None:
    """How many connections wait in the accept queue of a listening socket; None where the kernel does not tell."""
    try:
        if sock.family == socket.AF_UNIX:
            return _unix_backlog(os.fstat(sock.fileno()).st_ino)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
        return int(struct.unpack_from("I", info, _TCP_INFO_UNACKED)[0])
    except (OSError, struct.error):
        return None


def is_serving(addresses: Iterable[Address], pids: Iterable[int]) -> bool:
    """Whether one of these processes holds a connection that was accepted at one of these addresses."""
    connected = _accepted(addresses)
    return any(f"socket:[{inode}]" in files for files in map(procfs.open_files, pids) for inode in connected)


def _accepted(addresses: Iterable[Address]) -> set[str]:
    """The inodes of the connections that were accepted at one of these addresses, and are open."""
    addresses = list(addresses)
    ports, paths = {address.port for address in addresses if not address.path}, {address.path for address in addresses if address.path}
    return (_tcp_connections(ports) if ports else set()) | (_unix_connections(paths) if paths else set())


def _closed(ports: set[int]) -> set[str]:
    """Connections at these ports of which one end was closed not long ago, as the kernel's table names them."""
    found = set()
    for table in ("tcp", "tcp6") if ports else ():
        with contextlib.suppress(OSError), open(f"/proc/net/{table}", encoding="ascii") as file:
            next(file)
            for line in file:
                _, ours, theirs, state, _ = line.split(None, 4)
                # Who closes first keeps the trace of it; where that is a client on this machine, its end is the near one.
                ends = (ours, theirs) if ours.partition(":")[0] == theirs.partition(":")[0] else (ours,)
                if int(state, 16) in _CLOSED and any(int(end.rpartition(":")[2], 16) in ports for end in ends):
                    found.add(f"{ours} {theirs}")
    return found


def listening(pids: Iterable[int]) -> list[Address]:
    """Where these processes listen, as an address that they can be asked at from here."""
    names = {name for pid in pids for name in procfs.open_files(pid)}
    files = {name.removeprefix("socket:[").removesuffix("]") for name in names if name.startswith("socket:")}
    found: dict[str, Address] = {}
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        with contextlib.suppress(OSError), open(f"/proc/net/{table}", encoding="ascii") as file:
            next(file)
            for line in file:
                fields = line.split(None, 10)
                if fields[3] == "0A" and fields[9] in files:
                    found.setdefault(fields[9], _asked_at(family, fields[1]))
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as unix:
        next(unix)
        for line in unix:
            parts = line.rstrip("\n").split(None, 7)
            if len(parts) == 8 and parts[6] in files and int(parts[3], 16) & _SO_ACCEPTCON and parts[7].startswith("/"):
                found.setdefault(parts[6], Address(path=parts[7]))
    return sorted(set(found.values()), key=lambda address: (address.path, address.port))


def _asked_at(family: socket.AddressFamily, text: str) -> Address:
    """From the kernel's table, where an address is in 32-bit words of the machine's byte order; "any" is asked at loopback."""
    digits, _, port = text.partition(":")
    words = (int(digits[at : at + 8], 16) for at in range(0, len(digits), 8))
    host = socket.inet_ntop(family, b"".join(struct.pack("=I", word) for word in words))
    return Address(host={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port=int(port, 16))


def _tcp_connections(ports: set[int]) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{table}", encoding="ascii") as file:
            next(file)
            for line in file:
                fields = line.split(None, 10)
                if int(fields[1].rpartition(":")[2], 16) in ports and int(fields[3], 16) in _ESTABLISHED_BUT_OURS_TO_SERVE:
                    inodes.add(fields[9])
    return inodes - {"0"}  # those that wait to be accepted have none yet


def _unix_connections(paths: set[str]) -> set[str]:
    inodes = set()
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        next(file)
        for line in file:
            fields = line.rstrip("\n").split(None, 7)
            if len(fields) == 8 and fields[7] in paths and not int(fields[3], 16) & _SO_ACCEPTCON:
                inodes.add(fields[6])
    return inodes


def _unix_backlog(inode: int) -> int | None:
    """From sock_diag(7), which looks it up by its inode; None where the kernel has no such module."""
    request = struct.pack("=IHHII BBHIIIII", 40, 20, 1, 1, 0, socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, 0x10, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as asked:  # 4: NETLINK_SOCK_DIAG
        asked.send(request)
        answer = asked.recv(4096)
    kind = struct.unpack_from("=H", answer, 4)[0]
    at = 32  # behind the two headers, of 16 bytes each
    while kind == 20 and at + 4 <= len(answer):
        length, attribute = struct.unpack_from("=HH", answer, at)
        if attribute == 4:  # UNIX_DIAG_RQLEN
            return int(struct.unpack_from("=I", answer, at + 4)[0])
        at += max(4, length + 3 & ~3)
    return None


def _key(name: str, text: str) -> str:
    """The same as long as it is the same socket: a new name for an old address is no new socket, but each port 0 is one."""
    return f"{name}={text}" if parse(text).port == 0 and not text.startswith("unix:") else text


def _address_of(sock: socket.socket) -> Address:
    name = sock.getsockname()
    return Address(path=name) if sock.family == socket.AF_UNIX else Address(host=name[0], port=name[1])


def _moved_up(sock: socket.socket) -> socket.socket:
    moved = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, _HELD_FROM)
    sock.close()
    return socket.socket(fileno=moved)


def _clear_the_way(path: str) -> None:
    """Remove a socket of ours on which nobody listens any more, as one is left by a crash. Raises OSError for anything else there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise FileExistsError(errno.EEXIST, "exists already, and is no socket that is ours to replace")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        tried.setblocking(False)  # a full queue is an answer too
        try:
            tried.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass
    raise FileExistsError(errno.EEXIST, "exists already, and somebody listens on it")


def _taken_back(process: ProcessRef, wanted: Address) -> socket.socket | None:
    """A copy of the process's descriptor of the socket that listens there. Raises PermissionError where the kernel refuses."""
    try:
        fd = pidfd.open_verified(process)
    except OSError:
        return None
    if fd is None:
        return None
    refused: OSError | None = None
    try:
        for number in _socket_fds(process.pid):
            try:
                found = _copied(fd, number)
            except PermissionError as error:
                refused = error
                continue
            except OSError:
                continue
            if _listens_at(found, wanted):
                return found
            found.close()
    finally:
        os.close(fd)
    if refused is not None:
        raise refused
    return None


def _socket_fds(pid: int) -> list[int]:
    folder = f"/proc/{pid}/fd"
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}").startswith("socket:"):
                    found.append(int(name))
    return sorted(found)


def _copied(fd: int, number: int) -> socket.socket:
    """pidfd_getfd(2)."""
    copy = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, fd, number, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return socket.socket(fileno=copy)


def _listens_at(sock: socket.socket, wanted: Address) -> bool:
    try:
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        found = _address_of(sock)
    except (OSError, ValueError, IndexError):
        return False
    return (found.host, found.port, found.path) == ("127.0.0.1" if wanted.host == "localhost" else wanted.host, wanted.port, wanted.path)


def _hint(address: Address, error: OSError) -> str | None:
    if error.errno == errno.EADDRINUSE:
        return f"`ss -ltnp 'sport = :{address.port}'` shows who listens there; choose another port, or end that first"
    if error.errno == errno.EACCES and not address.path:
        return "choose a port from 1024 on, or let everybody: `sysctl net.ipv4.ip_unprivileged_port_start=0`"
    if error.errno == errno.EEXIST:
        return "choose another path, or remove what is there"
    if error.errno == errno.ENOENT:
        return "create the directory first"
    return None


def values(addresses: Mapping[str, Address]) -> dict[str, str]:
    """What stands for {fd}, {port}, {fd:NAME} and {port:NAME}; without a name the first one is meant."""
    found: dict[str, str] = {}
    for index, (name, address) in enumerate(addresses.items()):
        own = {"fd": str(FIRST_FD + index), **({} if address.path else {"port": str(address.port)})}
        for kind, value in own.items():
            found.setdefault(kind, value)
            found[f"{kind}:{name}"] = value
    return found
