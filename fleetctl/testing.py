"""Fakes of the ports, for our own tests and for people who embed fleetctl and want to test without processes, disks or waiting.

`FakeMachine` is a process table in memory. A `FakeLifecycleManager` works on it, and like a daemon it can die: make another one over
the same machine, read what `FakeStateManager` had committed, and see what is recovered. `run_in_fake_time` runs a coroutine in an
event loop whose time is a `FakeClock`: nothing ever waits for real, and "until everything has settled" is `await settled()`.

A program that uses FleetManager is tested so, with no process and no waiting:

    machine = FakeMachine()

    async def story() -> None:
        fleet = FleetManager()
        await fleet.initialize(FakeLifecycleManager(machine), FakeStateManager(), FakeResourceManager(), clock=machine.clock)
        assert len(await fleet.scale_up(3)) == 3

    run_in_fake_time(machine.clock, story())
"""

import asyncio
import hashlib
import json
import selectors
import signal
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fleetctl.errors import FleetctlError, SpawnFailed, StateDirectoryError, UnknownCheckpoint
from fleetctl.models import (
    Agent,
    Checkpoint,
    CheckpointKind,
    CheckpointsSpec,
    Event,
    Exit,
    FleetSpec,
    Found,
    Identity,
    Probe,
    ProcessRef,
    Saved,
    SavedFile,
    ScalingDecision,
    Usage,
    to_json,
)

T = TypeVar("T")

_SETTLED_SECONDS = 1e-6
_MOST_ROUNDS_WITHOUT_TIME = 100_000


class FakeClock:
    """`ports.Clock` that stands still until it is moved."""

    def __init__(self, monotonic: float = 1_000.0, time: float = 1_700_000_000.0) -> None:
        self._monotonic, self._time = monotonic, time

    def monotonic(self) -> float:
        return self._monotonic

    def time(self) -> float:
        return self._time

    def advance(self, seconds: float) -> None:
        self._monotonic += seconds
        self._time += seconds


class _FakeTimeSelector(selectors.SelectSelector):
    """Instead of waiting it moves the clock, so that a loop's timers are due at once and in order."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock
        self._rounds = 0

    # Any: the base class types its keys so.
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        self._rounds = 0 if timeout > 0 else self._rounds + 1
        if self._rounds > _MOST_ROUNDS_WITHOUT_TIME:
            raise RuntimeError("something keeps the loop busy without waiting for anything")
        self._clock.advance(max(0.0, timeout))
        return super().select(0)


class _FakeTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__(_FakeTimeSelector(clock))
        self._fake_clock = clock

    def time(self) -> float:
        return self._fake_clock.monotonic()


def run_in_fake_time(clock: FakeClock, coroutine: Coroutine[Any, Any, T]) -> T:  # Any: what a coroutine yields is the loop's affair
    """Like `asyncio.run`, in a loop whose time is this clock. A loop that is busy without end, or waits for nothing, is an error."""
    with asyncio.Runner(loop_factory=lambda: _FakeTimeLoop(clock)) as runner:
        return runner.run(coroutine)


async def settled() -> None:
    """Return when all that can happen now has happened; only inside `run_in_fake_time`."""
    # The loop's time moves only when nothing is ready to run.
    await asyncio.sleep(_SETTLED_SECONDS)


@dataclass(slots=True, kw_only=True)
class FakeProcess:
    """One process of a `FakeMachine`. With `ignores_stop` only SIGKILL ends it; `stopped` as by SIGSTOP; `warm`: for a warm pool."""

    ref: ProcessRef
    agent_id: str
    fleet: str
    slot: int
    token: str
    spec_hash: str
    leads: bool
    started_at: float
    started_clock: float
    ignores_stop: bool = False
    stopped: bool = False
    warm: bool = False
    waiting_signal: int | None = None
    exit: Exit | None = None
    reaped: bool = False
    verifiable: bool = True
    signals: list[int] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.exit is None


class FakeMachine:
    """A process table. It outlives every `FakeLifecycleManager` that works on it, as a machine outlives the daemon."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        self.boot_id = "boot-1"
        self.processes: dict[int, FakeProcess] = {}
        self.ended: Callable[[FakeProcess], None] = lambda process: None
        self._next_pid = 1000

    def start(self, agent: Agent, *, leads: bool, ignores_stop: bool = False) -> FakeProcess:
        """A process that carries the agent's token."""
        pid = self._next_pid
        self._next_pid += 1
        process = FakeProcess(
            ref=ProcessRef(pid=pid, start_ticks=pid * 7, boot_id=self.boot_id),
            agent_id=agent.id,
            fleet=agent.fleet,
            slot=agent.slot,
            token=agent.token,
            spec_hash=agent.spec_hash,
            leads=leads,
            ignores_stop=ignores_stop,
            warm=agent.pooled,
            started_at=self.clock.time(),
            started_clock=self.clock.monotonic(),
        )
        self.processes[pid] = process
        return process

    def living(self, agent_id: str | None = None) -> list[FakeProcess]:
        """All live processes, or those of one agent, oldest first."""
        return [process for process in self.processes.values() if process.alive and agent_id in (None, process.agent_id)]

    def leader(self, agent_id: str) -> FakeProcess:
        """The live leader of the agent's tree. Raises StopIteration where there is none."""
        return next(process for process in self.living(agent_id) if process.leads)

    def end(self, process: FakeProcess, code: int | None = None, signal: int | None = None) -> None:
        """Have it end, with this exit code or by this signal; with neither, its exit status is unknown."""
        if process.alive:
            process.exit = Exit(code=code, signal=signal, at=self.clock.time())
            self.ended(process)

    def fork(self, process: FakeProcess, *, ignores_stop: bool = False) -> FakeProcess:
        """A child that outlives its parent unless it is ended too."""
        child = self.start(Agent(id=process.agent_id, fleet=process.fleet, slot=process.slot, created_at=0.0), leads=False)
        child.token, child.spec_hash, child.ignores_stop = process.token, process.spec_hash, ignores_stop
        return child

    def send(self, process: FakeProcess, number: int) -> None:
        """As the kernel does it: a stopped process acts on a signal only when it is continued; SIGKILL waits for nothing."""
        if not process.alive:
            return
        process.signals.append(number)
        if number == signal.SIGKILL:
            self.end(process, signal=number)
        elif number == signal.SIGSTOP:
            process.stopped = True
        elif number == signal.SIGCONT:
            process.stopped = False
            if process.waiting_signal is not None:
                self.end(process, signal=process.waiting_signal)
        elif process.ignores_stop:
            return
        elif process.stopped:
            process.waiting_signal = number
        else:
            self.end(process, signal=number)

    def reboot(self, uptime_seconds: float = 30.0) -> None:
        """All processes are gone, and the boot's clock has begun anew."""
        self.boot_id = f"{self.boot_id}+"
        self.processes.clear()
        self.clock.advance(3600.0)
        self.clock._monotonic = uptime_seconds


class FakeLifecycleManager:
    """`ports.LifecycleManager` over a `FakeMachine`, and like the real one with `find`.

    `spawn_errors`: for each of the next spawns the error it raises, or None. `ignore_stop`: new processes do not act on the stop
    signal. `suspend_seconds`: how long it takes. `cannot_suspend`, `cannot_resume`: ids of agents that do not do it; `claim_errors`:
    for each of the next claims the error it raises, or None. `spawned`, `sent`, `suspended`, `resumed` and `killed` record what was
    asked for, by agent id; `claims` what was written. `backlogs`: what `backlog` tells, by fleet; `connections`: fleets to whose
    sockets somebody is connected; `awaited`: who is called at the next connection; `limited`: agents
    whose limits were changed while they ran; `only_watched`: what `watched_limits` tells.
    """

    def __init__(self, machine: FakeMachine | None = None) -> None:
        self.machine = machine or FakeMachine()
        self.machine.ended = self._ended
        self.spawn_errors: deque[SpawnFailed | None] = deque()
        self.ignore_stop = False
        self.suspend_seconds = 0.0
        self.cannot_suspend: set[str] = set()
        self.cannot_resume: set[str] = set()
        self.claim_errors: deque[StateDirectoryError | None] = deque()
        self.claims: dict[str, Mapping[str, object]] = {}
        self.backlogs: dict[str, int] = {}
        self.connections: set[str] = set()
        self.awaited: dict[str, Callable[[], None]] = {}
        self.limited: list[str] = []
        self.only_watched: Collection[str] = ()
        self.suspended: list[str] = []
        self.resumed: list[str] = []
        self.spawned: list[str] = []
        self.sent: list[tuple[str, int]] = []
        self.killed: list[str] = []
        self.discarded: list[str] = []
        self._watched: dict[ProcessRef, tuple[asyncio.AbstractEventLoop, Callable[[Exit], None]]] = {}

    def spawn(self, agent: Agent, spec: FleetSpec) -> ProcessRef:
        error = self.spawn_errors.popleft() if self.spawn_errors else None
        if error is not None:
            raise error
        if self.machine.living(agent.id):
            raise SpawnFailed(f"{agent.id}: an earlier process of this agent still holds its lock")
        self.spawned.append(agent.id)
        return self.machine.start(agent, leads=True, ignores_stop=self.ignore_stop).ref

    def watch(self, process: ProcessRef, on_exit: Callable[[Exit], None]) -> None:
        if process in self._watched:
            return
        loop = asyncio.get_running_loop()
        found = self._exactly(process)
        if found is None or not found.verifiable:
            loop.call_soon(on_exit, Exit(at=self.machine.clock.time()))
        else:
            self._watched[process] = (loop, on_exit)
            if found.exit is not None:
                loop.call_soon(on_exit, found.exit)

    def signal(self, agents: Sequence[Agent], *numbers: int) -> None:
        for number in numbers:
            for agent in agents:
                self.sent.append((agent.id, number))
                for process in self._tree(agent):
                    self.machine.send(process, number)

    def survivors(self, agents: Sequence[Agent]) -> Mapping[str, tuple[ProcessRef, ...]]:
        return {agent.id: tuple(process.ref for process in self._tree(agent)) for agent in agents}

    def kill(self, agents: Sequence[Agent]) -> None:
        for agent in agents:
            self.killed.append(agent.id)
            for process in self._tree(agent):
                self.machine.send(process, signal.SIGKILL)

    async def suspend(self, agents: Sequence[Agent]) -> Collection[str]:
        for agent in agents:
            self.suspended.append(agent.id)
            self._send_all(agent, signal.SIGSTOP, unless=self.cannot_suspend)
        await asyncio.sleep(self.suspend_seconds)
        return [agent.id for agent in agents if (tree := self._tree(agent)) and all(process.stopped for process in tree)]

    async def resume(self, agents: Sequence[Agent]) -> Collection[str]:
        for agent in agents:
            self.resumed.append(agent.id)
            self._send_all(agent, signal.SIGCONT, unless=self.cannot_resume)
        await asyncio.sleep(0)
        return [agent.id for agent in agents if (tree := self._tree(agent)) and not any(process.stopped for process in tree)]

    def _send_all(self, agent: Agent, number: int, *, unless: Collection[str]) -> None:
        for process in self._tree(agent):
            if agent.id not in unless:
                self.machine.send(process, number)

    def claim(self, agent: Agent, claim: Mapping[str, object], *, keep: bool = False) -> None:
        error = self.claim_errors.popleft() if self.claim_errors else None
        if error is not None:
            raise error
        if not (keep and agent.id in self.claims):
            self.claims[agent.id] = claim

    def limit(self, agents: Sequence[Agent], spec: FleetSpec) -> None:
        self.limited += [agent.id for agent in agents]

    def watched_limits(self, spec: FleetSpec) -> Collection[str]:
        return self.only_watched

    def backlog(self, spec: FleetSpec) -> int | None:
        return self.backlogs.get(spec.name)

    def connected(self, spec: FleetSpec) -> bool:
        return bool(self.backlogs.get(spec.name)) or spec.name in self.connections

    def on_connection(self, spec: FleetSpec, call: Callable[[], None] | None) -> None:
        if call is None:
            self.awaited.pop(spec.name, None)
        else:
            self.awaited[spec.name] = call

    def connect(self, fleet: str) -> None:
        """One more connection waits at the fleet's sockets."""
        self.backlogs[fleet] = self.backlogs.get(fleet, 0) + 1
        if (call := self.awaited.pop(fleet, None)) is not None:
            call()

    def release(self, process: ProcessRef) -> None:
        self._watched.pop(process, None)
        found = self._exactly(process)
        if found is not None and not found.alive:
            found.reaped = True

    def identify(self, process: ProcessRef) -> Identity:
        found = self._exactly(process)
        if found is None or not found.alive:
            return Identity.GONE
        return Identity.MATCH if found.verifiable else Identity.UNVERIFIABLE

    def discard(self, agent: Agent) -> None:
        self.discarded.append(agent.id)
        self.claims.pop(agent.id, None)

    def find(self) -> list[Found]:
        """Every live tree, as a scan after a crash finds it."""
        trees: dict[str, Found] = {}
        for process in sorted(self.machine.living(), key=lambda process: not process.leads):
            if process.token and process.token not in trees:
                trees[process.token] = Found(
                    agent_id=process.agent_id,
                    fleet=process.fleet,
                    slot=process.slot,
                    token=process.token,
                    spec_hash=process.spec_hash,
                    leader=process.ref if process.leads else None,
                    started_at=process.started_at,
                    started_clock=process.started_clock,
                    suspended=process.warm and process.stopped,
                )
        return list(trees.values())

    def _tree(self, agent: Agent) -> list[FakeProcess]:
        return [process for process in self.machine.living() if process.token == agent.token and process.verifiable]

    def _exactly(self, ref: ProcessRef) -> FakeProcess | None:
        found = self.machine.processes.get(ref.pid)
        return found if found is not None and found.ref == ref and not found.reaped else None

    def _ended(self, process: FakeProcess) -> None:
        loop, on_exit = self._watched.get(process.ref, (None, None))
        if loop is not None and on_exit is not None and process.exit is not None:
            loop.call_soon(on_exit, process.exit)


class FakeProber:
    """`ports.Prober` that answers as it was told.

    `answers`: by agent id, what comes next: None for passed, text for why not, or a number of seconds that the agent hangs; the last
    one stays. Without an entry the agent passes. `asked` records when each agent was asked, and with what timeout.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.answers: dict[str, deque[str | float | None]] = {}
        self.asked: list[tuple[float, str, Probe, float]] = []
        self._clock = clock

    async def check(self, probe: Probe, agent: Agent, spec: FleetSpec, *, timeout_seconds: float) -> str | None:
        self.asked.append((self._clock.monotonic(), agent.id, probe, timeout_seconds))
        answers = self.answers.get(agent.id)
        answer = None if not answers else answers.popleft() if len(answers) > 1 else answers[0]
        if not isinstance(answer, float):
            await asyncio.sleep(0)
            return answer
        await asyncio.sleep(min(answer, timeout_seconds))
        return None if answer < timeout_seconds else f"no answer in {timeout_seconds:g} s"


class FakeCheckpointStore:
    """`ports.CheckpointStore` in memory. Like a disk it outlives the daemon.

    `states`: what each agent keeps, as the content of files by their names; None of an agent that has no STATE_DIRECTORY. `written`: the
    same of what was written for its checkpoint. `fails`: asked for each attempt to save, fill or clear, numbered from 0; while it says
    True, they raise StateDirectoryError and change nothing. `seconds`: how long each takes. `command_error`: what the command ends with.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.states: dict[str, dict[str, bytes]] = {}
        self.written: dict[str, dict[str, bytes]] = {}
        self.saved: dict[str, tuple[Checkpoint, dict[str, bytes]]] = {}
        self.fails: Callable[[int], bool] = lambda attempt: False
        self.attempts = 0
        self.seconds = 0.0
        self.command_error = ""
        self.commanded: list[str] = []
        self._clock = clock

    def keeps_nothing(self, agent: Agent) -> bool:
        return not self.states.get(agent.id) and not self.written.get(agent.id)

    async def prepare(self, agent: Agent) -> None:
        self.written[agent.id] = {}

    async def command(self, agent: Agent, spec: FleetSpec) -> None:
        await asyncio.sleep(self.seconds)
        self.commanded.append(agent.id)
        if self.command_error:
            raise FleetctlError(f"checkpoints.command: {self.command_error}")
        self.written[agent.id] = {"dump": b"by the command"}

    async def save(self, agent: Agent, spec: CheckpointsSpec, *, checkpoint_id: str, reason: str, commanded: bool = False) -> Saved:
        await self._try()
        known = self.saved.get(checkpoint_id)
        content = {} if commanded else self._part("state/", self.states.get(agent.id), known)
        content |= self._part("written/", self.written.get(agent.id) or None, known)
        if sum(map(len, content.values())) > spec.max_bytes:
            problem = "it is too large and stays where it is"
            return Saved(checkpoint=known[0] if known else None, complete=False, fresh=False, problem=problem)
        if not content and not agent.resume_token:
            self.saved.pop(checkpoint_id, None)
            return Saved(checkpoint=None)
        if known is None or (known[1], known[0].resume_token) != (content, agent.resume_token):
            files = CheckpointKind.COMMAND if commanded or (known and known[0].kind is CheckpointKind.COMMAND) else CheckpointKind.FILES
            checkpoint = Checkpoint(
                id=checkpoint_id,
                fleet=agent.fleet,
                agent_id=agent.id,
                slot=agent.slot,
                spec_hash=agent.spec_hash,
                created_at=self._clock.time(),
                reason=reason,
                kind=files if content else CheckpointKind.TOKEN,
                resume_token=agent.resume_token,
                files=tuple(
                    SavedFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), mode=0o644)
                    for path, data in sorted(content.items())
                ),
                keep_seconds=spec.keep_seconds,
            )
            self.saved[checkpoint_id] = (checkpoint, content)
        mine = [one for one, (checkpoint, _) in self.saved.items() if checkpoint.agent_id == agent.id]
        for old in mine[: -spec.keep]:
            del self.saved[old]
        return Saved(checkpoint=self.saved[checkpoint_id][0], complete=not commanded, fresh=self.saved[checkpoint_id] is not known)

    async def clear(self, agent: Agent) -> None:
        await self._try()
        self.states.pop(agent.id, None)
        self.written.pop(agent.id, None)

    async def fill(self, agent: Agent) -> None:
        await self._try()
        if agent.id not in self.states:
            _, content = self._known(agent.restore.partition("/")[2])
            self.states[agent.id] = {path.removeprefix("state/"): data for path, data in content.items() if path.startswith("state/")}

    async def find(self, checkpoint_id: str) -> Checkpoint:
        return self._known(checkpoint_id)[0]

    async def checkpoints(self, fleet: str | None = None, agent_id: str | None = None) -> list[Checkpoint]:
        every = (checkpoint for checkpoint, _ in self.saved.values())
        return [one for one in every if fleet in (None, one.fleet) and agent_id in (None, one.agent_id)]

    async def remove(self, checkpoint_id: str) -> None:
        self._known(checkpoint_id)
        del self.saved[checkpoint_id]

    def _known(self, checkpoint_id: str) -> tuple[Checkpoint, dict[str, bytes]]:
        if checkpoint_id not in self.saved:
            raise UnknownCheckpoint(f"no checkpoint {checkpoint_id}")
        return self.saved[checkpoint_id]

    def _part(self, top: str, there: dict[str, bytes] | None, known: tuple[Checkpoint, dict[str, bytes]] | None) -> dict[str, bytes]:
        """What is there, or where nothing is what the checkpoint has of it."""
        if there is None:
            return {path: data for path, data in known[1].items() if path.startswith(top)} if known else {}
        return {f"{top}{name}": data for name, data in there.items()}

    async def _try(self) -> None:
        """One attempt: others run before it, so that whoever waits for it can be cancelled."""
        await asyncio.sleep(self.seconds)
        attempt = self.attempts
        self.attempts += 1
        if self.fails(attempt):
            raise StateDirectoryError("no space left on device (a test says so)")


class FakeStateManager:
    """`ports.StateManager` in memory. What it holds is what would be on disk: all a test has left after a kill -9.

    `fails`: asked for each attempt to write, numbered from 0; while it says True, writes raise StateDirectoryError and change
    nothing.
    """

    def __init__(self) -> None:
        self.agents: dict[str, Agent] = {}
        self.events: list[Event] = []
        self.history: list[tuple[str, ScalingDecision]] = []
        self.wishes: dict[str, tuple[FleetSpec, bool]] = {}
        self.scaling: dict[str, str] = {}
        self.spending: dict[str, str] = {}
        self.samples: list[tuple[str, dict[str, Any]]] = []  # Any: JSON values
        self.attempts = 0
        self.fails: Callable[[int], bool] = lambda attempt: False

    async def save(
        self,
        agents: Iterable[Agent] = (),
        *,
        forget: Iterable[str] = (),
        events: Iterable[Event] = (),
        history: Iterable[tuple[str, ScalingDecision]] = (),
    ) -> None:
        rows, gone, told, decided = list(agents), list(forget), list(events), list(history)
        async with _Write(self):
            self.agents |= {agent.id: agent for agent in rows}
            for agent_id in gone:
                self.agents.pop(agent_id, None)
            self.events += told
            self.history += decided

    async def save_wish(self, spec: FleetSpec, *, down: bool) -> None:
        async with _Write(self):
            self.wishes[spec.name] = (spec, down)

    async def open(self) -> list[Agent]:
        return list(self.agents.values())

    async def read_wish(self, name: str) -> Mapping[str, Any] | None:
        wish = self.wishes.get(name)
        return None if wish is None else {"spec": json.loads(json.dumps(to_json(wish[0]))), "down": wish[1]}

    async def last(self, table: str, fleet: str | None, limit: int) -> list[dict[str, Any]]:
        rows: list[tuple[str, Event | ScalingDecision]] = (
            [(event.fleet, event) for event in self.events] if table == "events" else [*self.history]
        )
        return [{**to_json(row), "fleet": name} for name, row in rows if fleet in (None, name)][-limit:]

    async def forget_wish(self, name: str) -> None:
        async with _Write(self):
            self.wishes.pop(name, None)
            self.scaling.pop(name, None)
            self.spending.pop(name, None)

    async def save_scaling(self, fleet: str, memory: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        # Through JSON, as on disk: whoever changes his own later changes nothing here.
        text, rows = json.dumps(memory), [(fleet, dict(one)) for one in samples]
        async with _Write(self):
            self.scaling[fleet] = text
            self.samples += rows

    async def load_scaling(self, fleet: str) -> Mapping[str, Any] | None:
        text = self.scaling.get(fleet)
        return None if text is None else dict(json.loads(text))

    async def save_spending(self, fleet: str, spending: Mapping[str, Any]) -> None:
        text = json.dumps(spending)
        async with _Write(self):
            self.spending[fleet] = text

    async def load_spending(self, fleet: str) -> Mapping[str, Any] | None:
        text = self.spending.get(fleet)
        return None if text is None else dict(json.loads(text))


class _Write:
    """One attempt to write: others run before and after it, so that whoever waits for it can be cancelled on either side."""

    def __init__(self, state: FakeStateManager) -> None:
        self._state = state

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)
        attempt = self._state.attempts
        self._state.attempts += 1
        if self._state.fails(attempt):
            raise StateDirectoryError("no space left on device (a test says so)")

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)


class FakeResourceManager:
    """`ports.ResourceManager` that tells what it was told: set `usage` by agent id."""

    def __init__(self) -> None:
        self.usage: dict[str, Usage] = {}

    def sample(self, agents: Mapping[str, ProcessRef]) -> Mapping[str, Usage]:
        return {agent_id: self.usage[agent_id] for agent_id in agents if agent_id in self.usage}
