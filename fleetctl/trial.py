"""Tries a command out on a real process: start, readiness, suspension, resumption, stop, restart. What is seen is `core/trial`'s to judge.

It uses the daemon's own hands, in a state directory of its own that is gone at the end, as is every process.
"""

import asyncio
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fleetctl.addresses import Address
from fleetctl.core import probing
from fleetctl.core.contract import parse
from fleetctl.core.trial import Pause, Readiness, ReadyBy, Stop, Trial
from fleetctl.errors import FleetctlError, SpawnFailed
from fleetctl.host import logread, procfs, sockets
from fleetctl.host.notify import NotifySocket
from fleetctl.host.probes import LocalProber
from fleetctl.host.process import LocalLifecycleManager, become_subreaper
from fleetctl.models import Agent, Exit, FleetSpec, Probe, ProcessRef, signal_number

_LOOK_SECONDS = 0.02
_QUIET_SECONDS, _QUIET_SHARE = 0.5, 0.05
_ANSWER_TIMEOUT_SECONDS = 5.0
_AFTERMATH_SECONDS = 1.0  # a master that takes its workers for dead ends them in this time
_SHORT_TIMEOUT_SECONDS = 0.5
_TRY_AGAIN_SECONDS = 0.001
_OTHER_SIGNALS = ("INT", "QUIT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to try, and how long to wait for it."""

    pauses: Sequence[float] = (2.0, 10.0)
    ready_timeout_seconds: float = 60.0
    stop_timeout_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was tried, as it is told while the trial goes on. `ok`: it went as one would wish."""

    name: str
    ok: bool
    seconds: float
    text: str


class Trouble(FleetctlError):
    """The command could not be tried out."""


def run(spec: FleetSpec, plan: Plan, on_step: Callable[[Step], None]) -> Trial:
    """Try it, and leave nothing behind, whatever happens. Not in a program that has children of its own: they are taken for its."""
    become_subreaper()
    root = tempfile.mkdtemp(prefix="fleetctl-probe-")
    try:
        return asyncio.run(_run(spec, plan, on_step, root))
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def _run(spec: FleetSpec, plan: Plan, on_step: Callable[[Step], None], root: str) -> Trial:
    subject = _Subject(spec, plan, on_step, root)
    try:
        return await subject.through()
    finally:
        await subject.close()


class _Subject:
    """The one instance that is tried out, started twice."""

    def __init__(self, spec: FleetSpec, plan: Plan, on_step: Callable[[Step], None], root: str) -> None:
        self._spec, self._plan, self._on_step = spec, plan, on_step
        self._lifecycle = LocalLifecycleManager(root, owns_all_children=True)
        self._lifecycle.paths.prepare()
        self._prober = LocalProber(self._lifecycle)
        self._agent = Agent(id=f"{spec.name}-probe", fleet=spec.name, slot=0, created_at=time.time())
        self._said_ready = False
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._notify = NotifySocket(self._lifecycle.paths.notify, self._owner_of, self._heard, inside=self._lifecycle.paths.notify_inside)
        self._notify.open()
        self._notify.listen()

    async def through(self) -> Trial:
        trial = Trial(spec=self._spec)
        self._start("start")
        ready = await self._wait_ready("ready", None)
        if ready is None:
            return trial
        trial = replace(trial, ready=ready)
        for seconds in self._plan.pauses:
            pause = await self._pause(seconds, ready.probe)
            trial = replace(trial, pauses=(*trial.pauses, pause))
            if not pause.alive:
                self._start("start again")
                if await self._wait_ready("ready again", ready) is None:
                    return trial
        trial = replace(trial, stop=await self._stop("stop"))
        await self._end()
        self._start("restart")
        again = await self._wait_ready("ready again", ready)
        if again is None:
            return trial
        trial = replace(trial, restarted=again)
        if trial.stop is not None and trial.stop.signal is not None and all(pause.stopped for pause in trial.pauses):
            trial = replace(trial, stop_while_suspended=await self._stop_while_suspended(trial.stop.signal))
        return trial

    async def close(self) -> None:
        """End whatever is left, as often as it takes."""
        with suppress(OSError):
            await asyncio.shield(self._end())
        self._lifecycle.sockets.close(self._spec.name)
        self._notify.close()

    # -- what is tried

    def _start(self, name: str) -> None:
        self._exit = asyncio.get_running_loop().create_future()
        self._said_ready = False
        self._agent = replace(self._agent, token=secrets.token_hex(16), process=None)
        began = time.monotonic()
        try:
            process = self._lifecycle.spawn(self._agent, self._spec)
        except SpawnFailed as error:
            raise Trouble(error.message, hint=error.hint) from error
        self._agent = replace(self._agent, process=process)
        self._lifecycle.watch(process, self._ended)
        seconds = time.monotonic() - began
        self._tell(name, True, seconds, f"pid {process.pid}, after {_ms(seconds)}")

    async def _wait_ready(self, name: str, known: Readiness | None) -> Readiness | None:
        """None where it ended, or took too long. `known`: from the first start, so that the second is asked in the same way."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._plan.ready_timeout_seconds):
                found = await self._until_ready(began, known)
        except TimeoutError:
            self._tell(name, False, time.monotonic() - began, f"not in {self._plan.ready_timeout_seconds:g} s{self._last_words()}")
            return None
        if found is None:
            self._tell(name, False, time.monotonic() - began, f"it ended: {self._exit.result()}{self._last_words()}")
            return None
        self._tell(name, True, found.seconds, _how_ready(found))
        return found

    async def _until_ready(self, began: float, known: Readiness | None) -> Readiness | None:
        """None where it ended."""
        spec = self._spec.readiness
        if spec.probed:
            return await self._until_it_passes(began, spec.probe)
        only_word = spec.notify or (known is not None and known.by is ReadyBy.NOTIFY)
        quiet = _Quiet()
        while not self._exit.done():
            now = time.monotonic()
            if self._said_ready:
                found, _ = await self._find_probe()
                return self._readiness(now - began, ReadyBy.NOTIFY, found)
            if not only_word:
                found, by = await self._find_probe()
                if found is not None:
                    return self._readiness(time.monotonic() - began, by, found)
                since = quiet.since(now, self._cpu_seconds())
                if since is not None:
                    return self._readiness(since - began, ReadyBy.QUIET, None)
            await asyncio.sleep(_LOOK_SECONDS)
        return None

    async def _until_it_passes(self, began: float, probe: Probe) -> Readiness | None:
        timeout = max(self._spec.readiness.timeout_seconds, _ANSWER_TIMEOUT_SECONDS)
        pace = probing.Pace(interval_seconds=0.5, timeout_seconds=timeout, failure_threshold=1)
        state = probing.starting(pace, began)
        while not self._exit.done():
            trouble = await self._prober.check(probe, self._agent, self._spec, timeout_seconds=state.timeout_seconds)
            now = time.monotonic()
            if trouble is None:
                by = ReadyBy.HTTP if probe.http else ReadyBy.TCP if probe.tcp else ReadyBy.EXEC
                return self._readiness(now - began, by, probe)
            state, _ = probing.after(pace, state, passed=False, now=now)
            await asyncio.sleep(max(0.0, state.next_at - now))
        return None

    async def _find_probe(self) -> tuple[Probe | None, ReadyBy]:
        """What to ask it with: HTTP where it listens and answers that, else a connection, which proves nothing on a socket of ours."""
        held = list(self._lifecycle.sockets.addresses(self._spec).values())
        for address in held or self._listens():
            url = f"{address}:/" if address.path else f"http://{address}/"
            if await self._prober.check(Probe(http=url), self._agent, self._spec, timeout_seconds=_SHORT_TIMEOUT_SECONDS) is None:
                return Probe(http=url), ReadyBy.HTTP
            if not held:
                return Probe(tcp=str(address)), ReadyBy.TCP
        return None, ReadyBy.QUIET

    def _readiness(self, seconds: float, by: ReadyBy, probe: Probe | None) -> Readiness:
        listens = tuple(map(str, self._listens()))
        return Readiness(seconds=seconds, by=by, probe=probe, listens=listens, processes=len(self._tree()))

    async def _pause(self, seconds: float, probe: Probe | None) -> Pause:
        name = f"suspend {seconds:g} s"
        before = set(self._tree())
        began = time.monotonic()
        if self._agent.id not in await self._lifecycle.suspend([self._agent]):
            self._tell(name, False, time.monotonic() - began, "it could not be stopped where it stood")
            await self._lifecycle.resume([self._agent])
            return Pause(seconds=seconds, stopped=False, alive=not self._exit.done())
        stopped = time.monotonic() - began
        await asyncio.wait([self._exit], timeout=seconds)
        await self._lifecycle.resume([self._agent])
        resumed = time.monotonic()
        trouble = await self._answer(probe) if probe is not None else None
        answered = time.monotonic() - resumed
        await asyncio.wait([self._exit], timeout=_AFTERMATH_SECONDS)
        lost = len(before - set(self._tree()))
        pause = Pause(
            seconds=seconds,
            stopped=True,
            alive=not self._exit.done(),
            lost=lost,
            answer_seconds=answered if probe is not None and trouble is None else None,
            trouble=trouble or "",
        )
        self._tell(name, pause.harmless, stopped, _how_paused(pause, stopped, self._exit.result() if self._exit.done() else None))
        return pause

    async def _answer(self, probe: Probe) -> str | None:
        """Why it does not answer, having had time for it."""
        deadline, trouble = time.monotonic() + _ANSWER_TIMEOUT_SECONDS, "no answer"
        while (left := deadline - time.monotonic()) > 0 and not self._exit.done():
            found = await self._prober.check(probe, self._agent, self._spec, timeout_seconds=left)
            if found is None:
                return None
            trouble = found
            await asyncio.sleep(_TRY_AGAIN_SECONDS)
        return trouble

    async def _stop(self, name: str) -> Stop:
        """Ask with its stop signal; where that does nothing, with others."""
        first = self._spec.stop_signal.removeprefix("SIG")
        ignored: list[str] = []
        began = time.monotonic()
        for word in (first, *(other for other in _OTHER_SIGNALS if other != first)):
            asked = time.monotonic()
            self._lifecycle.signal([self._agent], signal_number(word), signal.SIGCONT)
            await asyncio.wait([self._exit], timeout=self._plan.stop_timeout_seconds)
            if self._exit.done():
                stop = Stop(signal=word, seconds=time.monotonic() - asked, ignored=tuple(ignored), exit=self._exit.result())
                self._tell(name, not ignored and stop.clean, stop.seconds, f"{stop.exit}, {_ms(stop.seconds)} after {word}")
                return stop
            ignored.append(word)
        self._tell(name, False, time.monotonic() - began, f"it ended by none of {', '.join(ignored)}; it was killed")
        return Stop(signal=None, seconds=time.monotonic() - began, ignored=tuple(ignored))

    async def _stop_while_suspended(self, word: str) -> Stop:
        name = "stop while suspended"
        await self._lifecycle.suspend([self._agent])
        asked = time.monotonic()
        self._lifecycle.signal([self._agent], signal_number(word), signal.SIGCONT)
        await asyncio.wait([self._exit], timeout=self._plan.stop_timeout_seconds)
        seconds = time.monotonic() - asked
        if not self._exit.done():
            self._tell(name, False, seconds, f"not in {seconds:.1f} s after {word} and CONT")
            return Stop(signal=None, seconds=seconds, ignored=(word,))
        self._tell(name, True, seconds, f"{self._exit.result()}, {_ms(seconds)} after {word} and CONT")
        return Stop(signal=word, seconds=seconds, exit=self._exit.result())

    async def _end(self) -> None:
        """Kill what is left of it, and reap it."""
        while any(self._lifecycle.survivors([self._agent]).values()):
            self._lifecycle.kill([self._agent])
            await asyncio.sleep(_LOOK_SECONDS)
        if self._agent.process is not None:
            self._lifecycle.release(self._agent.process)

    # -- what is seen of it

    def _ended(self, exit: Exit) -> None:
        if not self._exit.done():
            self._exit.set_result(exit)

    def _owner_of(self, pid: int) -> str | None:
        return self._lifecycle.owner(pid, lambda: [self._agent])

    def _heard(self, _: str, data: bytes) -> None:
        message = parse(data)
        self._said_ready = self._said_ready or (not isinstance(message, str) and message.ready)

    def _tree(self) -> tuple[ProcessRef, ...]:
        return self._lifecycle.survivors([self._agent])[self._agent.id]

    def _listens(self) -> list[Address]:
        return sockets.listening(process.pid for process in self._tree())

    def _cpu_seconds(self) -> float:
        found = [procfs.stat(process.pid) for process in self._tree()]
        return sum(stat.cpu_ticks + stat.reaped_cpu_ticks for stat in found if stat) / procfs.TICKS_PER_SECOND

    def _last_words(self) -> str:
        lines = logread.last_lines(self._lifecycle.paths, self._agent.fleet, self._agent.id, 3)
        return f"; last output: {' | '.join(lines)}" if lines else ""

    def _tell(self, name: str, ok: bool, seconds: float, text: str) -> None:
        self._on_step(Step(name=name, ok=ok, seconds=round(seconds, 6), text=text))


class _Quiet:
    """Since when a program hardly uses the CPU: what it did at its start it has done then."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._used = 0.0

    def since(self, now: float, used_seconds: float) -> float | None:
        """The beginning of the quiet, once it has lasted; `used_seconds`: of CPU, so far."""
        if self._since is None or used_seconds - self._used > _QUIET_SHARE * _QUIET_SECONDS:
            self._since, self._used = now, used_seconds
        return self._since if now - self._since >= _QUIET_SECONDS else None


def _how_ready(ready: Readiness) -> str:
    ways = {
        ReadyBy.NOTIFY: "it said READY=1",
        ReadyBy.HTTP: f"{ready.probe and ready.probe.http} answers",
        ReadyBy.TCP: f"{ready.probe and ready.probe.tcp} takes connections",
        ReadyBy.EXEC: "the command passes",
        ReadyBy.QUIET: "it has become quiet",
    }
    more = f", {ready.processes} processes" if ready.processes > 1 else ""
    return f"after {ready.seconds:.2f} s: {ways[ready.by]}{more}"


def _how_paused(pause: Pause, stopped: float, exit: Exit | None) -> str:
    if exit is not None:
        return f"it ended: {exit}"
    if pause.lost:
        return f"{pause.lost} of its processes ended"
    if pause.trouble:
        return f"it did not answer afterwards: {pause.trouble}"
    answered = "it lives on" if pause.answer_seconds is None else f"answered {_ms(pause.answer_seconds)} after it went on"
    return f"stood still after {_ms(stopped)}, {answered}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
