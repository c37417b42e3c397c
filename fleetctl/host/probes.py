"""Asks agents whether they work: an HTTP request, a connection, or a command that is run as the agent is.

Decides nothing: when to ask and what an answer means are the rules'. Only this machine is ever asked.
"""

import asyncio
import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

from fleetctl.addresses import Address, filled, is_loopback, parse, parse_url
from fleetctl.errors import ConfigError, SpawnFailed
from fleetctl.host import environment, pidfd, procfs
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, Exit, FleetSpec, Probe, ProcessRef

PROBE = "FLEETCTL_PROBE"
"""Marks whatever a probe's command starts; what is left of it is found by this and ended."""

_MOST_HEAD_BYTES, _MOST_BODY_BYTES = 16384, 65536
_BODY_SECONDS = 0.1
_KILL_ROUNDS = 20
_REAP_MILLISECONDS = 100


class LocalProber:
    """`ports.Prober` on this machine, for the agents of this lifecycle manager."""

    def __init__(self, lifecycle: LocalLifecycleManager) -> None:
        self._paths, self._lifecycle = lifecycle.paths, lifecycle

    async def check(self, probe: Probe, agent: Agent, spec: FleetSpec, *, timeout_seconds: float) -> str | None:
        values = self._lifecycle.values(agent, spec)
        try:
            async with asyncio.timeout(timeout_seconds):
                return (
                    (await _http(filled(probe.http, values)) if probe.http else None)
                    or (await _tcp(filled(probe.tcp, values)) if probe.tcp else None)
                    or (await self._exec([filled(word, values) for word in probe.exec], agent, spec) if probe.exec else None)
                )
        except TimeoutError:
            return f"no answer in {timeout_seconds:g} s"
        except (OSError, ValueError, SpawnFailed) as error:
            return str(getattr(error, "strerror", None) or error)[:200]

    async def _exec(self, command: list[str], agent: Agent, spec: FleetSpec) -> str | None:
        mark = secrets.token_hex(8)
        environ = self._environment(agent, spec) | {PROBE: mark}
        try:
            # A session of its own, so that it can be ended as a whole and no key pressed in some terminal reaches it.
            child = subprocess.Popen(
                command,
                cwd=spec.cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                umask=self._lifecycle.umask,
            )
        except OSError as error:
            return f"cannot run {command[0]!r}: {error.strerror}"
        child.returncode = 0  # reaped below: keeps Popen from ever waiting for it
        with self._lifecycle.helper(child.pid):
            ended: Exit | None = None
            process = _ref(child.pid)
            try:
                ended = await _end_of(process)
            finally:
                # Also what it left running in its group, whether it passed or not.
                self._end(process, mark, whole=ended is None)
        return None if ended.code == 0 else str(ended)

    def _environment(self, agent: Agent, spec: FleetSpec) -> dict[str, str]:
        """The agent's, without what would make the probe a part of the agent."""
        environ = environment.build(
            agent,
            spec,
            state_root=self._paths.root,
            state_directory=self._paths.agent_state(agent.id),
            claim_path=self._paths.agent_claim(agent.id),
            notify_socket=self._paths.notify,
        )
        return {name: value for name, value in environ.items() if name != environment.TOKEN}

    def _end(self, process: ProcessRef, mark: str, *, whole: bool) -> None:
        pidfd.send(process, signal.SIGKILL, group=True)
        if whole:  # it may have hung in a child that left its group
            for _ in range(_KILL_ROUNDS):
                left = list(_marked(mark))
                for one in left:
                    pidfd.send(one, signal.SIGKILL)
                if not left:
                    break
        _reap(process.pid)


def check_probes(spec: FleetSpec) -> None:
    """Raise ConfigError where a probe of the spec would ask another machine."""
    for table, probe in (("readiness", spec.readiness.probe), ("liveness", spec.liveness.probe)):
        for key, text, address in (("http", probe.http, _url_address), ("tcp", probe.tcp, parse)):
            try:
                found = address(filled(text, {"port": "1", "slot": "0"})) if text else None
            except ValueError:
                continue  # a placeholder of a socket's: known only when that is bound
            if found and found.host and not is_own(found.host):
                raise ConfigError(
                    f"{table}.{key}: {found.host} is no address of this machine, and probes ask nobody else",
                    hint="use 127.0.0.1, or let exec run a command that asks whomever it likes",
                )


def is_own(host: str) -> bool:
    """Whether this literal address is this machine's."""
    if is_loopback(host):
        return True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as tried:
        try:
            tried.bind((host, 0))
        except OSError:
            return False
    return True


def end_leftover_probes(state_root: str) -> None:
    """Kill what a daemon that was killed itself had running of its probes: nobody waits for that any more."""
    for pid in procfs.pids():
        environ = procfs.environ(pid)
        if PROBE in environ and environ.get(environment.STATE_DIR) == state_root and procfs.owner(pid) == os.geteuid():
            with contextlib.suppress(OSError):
                pidfd.send(_ref(pid), signal.SIGKILL)


def _url_address(text: str) -> Address:
    return parse_url(text).address


def _ref(pid: int) -> ProcessRef:
    found = procfs.stat(pid)
    if found is None:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessRef(pid=pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())


def _reap(pid: int) -> None:
    """A child that was killed is gone in a moment; one that hangs in the kernel must not keep us, and is reaped as an orphan."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        poll = select.poll()  # not select: the descriptor may be beyond 1023
        poll.register(fd, select.POLLIN)
        poll.poll(_REAP_MILLISECONDS)
        os.close(fd)
        os.waitpid(pid, os.WNOHANG)


def _marked(mark: str) -> Iterator[ProcessRef]:
    for stat in procfs.snapshot().values():
        if stat.alive and procfs.environ(stat.pid).get(PROBE) == mark:
            yield ProcessRef(pid=stat.pid, start_ticks=stat.start_ticks, boot_id=procfs.boot_id())


async def _end_of(process: ProcessRef) -> Exit:
    """Wait for our child to end; it stays to be reaped."""
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(process.pid)
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _settle, ended)
    try:
        await ended
        return pidfd.exit_of(fd, process, time.time()) or Exit(at=time.time())
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.path:
        return await asyncio.open_unix_connection(address.path, limit=_MOST_HEAD_BYTES)
    if address.host != "localhost":
        if not is_own(address.host):
            raise OSError(f"{address.host} is no address of this machine")
        return await asyncio.open_connection(address.host, address.port, limit=_MOST_HEAD_BYTES)
    try:  # by hand: the resolver is a thread, and a file that somebody may have edited
        return await asyncio.open_connection("127.0.0.1", address.port, limit=_MOST_HEAD_BYTES)
    except ConnectionRefusedError:
        return await asyncio.open_connection("::1", address.port, limit=_MOST_HEAD_BYTES)


async def _tcp(text: str) -> str | None:
    _, writer = await _connect(parse(text))
    writer.close()
    return None


async def _http(url: str) -> str | None:
    target = parse_url(url)
    reader, writer = await _connect(target.address)
    try:
        writer.write(
            f"GET {target.path} HTTP/1.1\r\nHost: {target.host_header}\r\n"
            "User-Agent: fleetctl-probe\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode()
        )
        status = await _status(reader)
        # Read on for a moment: a server that is cut off in the middle of its answer complains of it in its log.
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_BODY_SECONDS):
                await reader.read(_MOST_BODY_BYTES)
        return None if 200 <= status < 400 else f"HTTP status {status}"
    finally:
        writer.close()


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of the final answer; ValueError where what comes is not HTTP."""
    for _ in range(8):
        line = await reader.readline()
        if not line:
            raise ValueError("closed the connection without an answer")
        words = line.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or len(words[1]) != 3 or not words[1].isdigit():
            raise ValueError("answered something else than HTTP")
        status = int(words[1])
        if status >= 200:
            return status
        while (await reader.readline()).strip():  # the head of an answer such as 100 Continue, which announces another
            pass
    raise ValueError("answered without end")
