"""Asks agents whether they work: an HTTP request, a connection, or a command that is run as the agent is.

Decides nothing: when to ask and what an answer means are the rules'. Only this machine is ever asked.
"""

import asyncio
import contextlib
import socket

from fleetctl.addresses import Address, filled, is_loopback, parse, parse_url
from fleetctl.errors import ConfigError, SpawnFailed
from fleetctl.host import commands
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, FleetSpec, Probe

_MOST_HEAD_BYTES, _MOST_BODY_BYTES = 16384, 65536
_BODY_SECONDS = 0.1


class LocalProber:
    """`ports.Prober` on this machine, for the agents of this lifecycle manager."""

    def __init__(self, lifecycle: LocalLifecycleManager) -> None:
        self._lifecycle = lifecycle

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
        try:
            ended = await commands.run(command, agent, spec, self._lifecycle)
        except OSError as error:
            return f"cannot run {command[0]!r}: {error.strerror}"
        return None if ended.code == 0 else str(ended)


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


def _url_address(text: str) -> Address:
    return parse_url(text).address


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
