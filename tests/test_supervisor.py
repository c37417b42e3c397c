"""The loop of one fleet, over fakes and in fake time: nothing here waits for real."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.orders import Mode, Wish
from fleetctl.core.recover import recover
from fleetctl.errors import SpawnFailed
from fleetctl.models import Agent, AgentState, FleetSpec, GracefulDrainSpec, ProcessRef, ReadinessSpec, Replace, RestartPolicy, RestartSpec
from fleetctl.supervisor import Supervisor
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled

S = AgentState
TERM, KILL, CONT = int(signal.SIGTERM), int(signal.SIGKILL), int(signal.SIGCONT)
SETTLE, DRAIN = 0.25, 30.0
SPEC = FleetSpec(
    name="demo",
    command=("agent",),
    replicas=3,
    readiness=ReadinessSpec(settle_seconds=SETTLE),
    graceful_drain=GracefulDrainSpec(timeout_seconds=DRAIN),
)


class Checked(FakeLifecycleManager):
    """Refuses to touch a process before the disk knows why."""

    def __init__(self, machine: FakeMachine, state: FakeStateManager) -> None:
        super().__init__(machine)
        self._state = state

    def spawn(self, agent: Agent, spec: FleetSpec) -> ProcessRef:
        assert self._state.agents[agent.id].token == agent.token, "spawned before its intent was on disk"
        return super().spawn(agent, spec)

    def signal(self, agents: Sequence[Agent], *numbers: int) -> None:
        for agent in agents:
            assert self._state.agents[agent.id].state is S.DRAINING, "signalled before the decision was on disk"
        super().signal(agents, *numbers)

    def discard(self, agent: Agent) -> None:
        assert agent.id not in self._state.agents, "tidied up after before it was forgotten on disk"
        super().discard(agent)


class World:
    """A machine and a disk, and one daemon after the other: each has its own supervisor and lifecycle manager."""

    def __init__(self, spec: FleetSpec = SPEC, *, seed: int = 1) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)
        self.state = FakeStateManager()
        self.wish = Wish(spec=spec)
        self.output: list[str] = []
        self.told: list[str] = []
        self.changes = 0
        self.kills = 0
        self._seed = seed

    def run(self, story: Callable[["World"], Awaitable[None]]) -> None:
        async def told() -> None:
            self.boot()
            await story(self)
            self.check()
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

        run_in_fake_time(self.clock, told())

    def boot(self) -> None:
        """A daemon starts, with what is on disk and what lives."""
        self.lifecycle = Checked(self.machine, self.state)
        records = list(self.state.agents.values())
        identities = {agent.id: self.lifecycle.identify(agent.process) for agent in records if agent.process}
        recovery = recover(
            records,
            self.lifecycle.find(),
            identities,
            boot_id=self.machine.boot_id,
            now=self.clock.monotonic(),
            wall=self.clock.time(),
            drain_seconds=DRAIN,
        )
        self.supervisor = Supervisor(
            self.wish,
            lifecycle=self.lifecycle,
            state=self.state,
            clock=self.clock,
            agents=recovery.agents,
            on_change=self._changed,
            on_event=lambda event: self.told.append(event.kind),
            last_output=lambda agent: self.output,
            random_source=random.Random(self._seed),
        )
        self.task = asyncio.ensure_future(self.supervisor.run())

    async def kill_9(self) -> None:
        """The daemon dies where it stands, and with it all it knew."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.kills += 1

    def _changed(self) -> None:
        self.changes += 1

    def ask(self, replicas: int | None = None, **changes: Any) -> None:  # Any: fields of Wish
        changed = replace(self.wish, **changes)
        self.wish = changed if replicas is None else replace(changed, spec=replace(changed.spec, replicas=replicas))
        self.supervisor.set_wish(self.wish)

    async def after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await settled()

    async def ready(self) -> None:
        await self.after(SETTLE + 0.01)

    @property
    def agents(self) -> tuple[Agent, ...]:
        return self.supervisor.published

    @property
    def states(self) -> list[AgentState]:
        return [agent.state for agent in self.agents]

    def pids(self) -> dict[str, int]:
        return {agent.id: agent.process.pid for agent in self.agents if agent.process}

    def crash(self, agent: Agent, code: int | None = 1, signal: int | None = None) -> None:
        self.machine.end(self.machine.leader(agent.id), code=code, signal=signal)

    def stops_sent(self) -> Counter[str]:
        """How often each process, by token, was asked to stop."""
        return Counter({process.token: process.signals.count(TERM) for process in self.machine.processes.values() if process.leads})

    def check(self) -> None:
        """What must hold whenever nothing is under way, however we got here."""
        if self.task.done():
            self.task.result()
        leaders = Counter(process.agent_id for process in self.machine.living() if process.leads)
        assert not [agent_id for agent_id, number in leaders.items() if number > 1], "an agent runs twice"
        slots = Counter(agent.slot for agent in self.agents if not agent.leaving)
        assert not [slot for slot, number in slots.items() if number > 1], "two agents in one slot"
        managed = {agent.token for agent in self.agents}
        assert {process.token for process in self.machine.living() if process.verifiable} <= managed, "a process nobody looks after"
        assert max(self.stops_sent().values(), default=0) <= 1 + self.kills, "asked to stop twice"


def story(spec: FleetSpec = SPEC) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """Makes a test of what happens in a world."""

    def decorate(function: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            World(spec).run(function)

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


def with_restart(**changes: Any) -> FleetSpec:  # Any: fields of RestartSpec
    return replace(SPEC, replicas=1, restart=RestartSpec(**changes))


@story()
async def test_agents_start_and_become_ready(world: World) -> None:
    await settled()
    assert world.states == [S.STARTING] * 3
    assert [agent.slot for agent in world.agents] == [0, 1, 2]
    await world.ready()
    assert world.states == [S.RUNNING] * 3
    assert all(agent.ready and agent.note == "" for agent in world.agents)
    assert len(set(world.pids().values())) == 3
    assert world.told.count("agent.ready") == 3
    assert dict(world.state.agents) == {agent.id: agent for agent in world.agents}


@story()
async def test_an_idle_fleet_does_nothing(world: World) -> None:
    await world.ready()
    attempts, changes = world.state.attempts, world.changes
    await world.after(10 * 86400.0)
    assert (world.state.attempts, world.changes) == (attempts, changes)


@story()
async def test_a_first_crash_is_made_up_for_at_once(world: World) -> None:
    await world.ready()
    victim, before = world.agents[1], world.pids()
    at = world.clock.monotonic()
    world.crash(victim, signal=KILL, code=None)
    await settled()
    assert world.clock.monotonic() - at < 0.001
    after = world.pids()
    assert after.keys() == before.keys()
    assert {agent_id for agent_id in before if before[agent_id] != after[agent_id]} == {victim.id}
    replaced = world.agents[1]
    assert (replaced.restarts, replaced.state) == (1, S.STARTING)
    assert str(replaced.last_exit) == "killed by SIGKILL"
    assert "agent.exited" in world.told


@story(with_restart(crash_loop_failures=4, crash_loop_retry_seconds=100.0))
async def test_a_crash_loop_ends_in_failed_with_its_last_output_and_is_tried_again(world: World) -> None:
    world.output = ["Traceback", "KeyError: 'x'"]
    await settled()
    for longest_backoff in (0.0, 0.6, 1.2):
        world.crash(world.agents[0], code=3)
        await world.after(longest_backoff)
        assert world.states[0] in (S.STARTING, S.RUNNING)
    world.crash(world.agents[0], code=3)
    await settled()
    (agent,) = world.agents
    assert (agent.state, agent.process, agent.restarts) == (S.FAILED, None, 3)
    assert agent.note.startswith("crash loop: 4 exits in ")
    assert agent.note.endswith("last: exit 3; last output: KeyError: 'x'")
    (event,) = [event for event in world.state.events if event.kind == "agent.failed"]
    assert event.data["last_output"] == world.output
    await world.after(99.0)
    assert world.states == [S.FAILED]
    await world.after(1.0)
    assert world.states == [S.STARTING]


@story(with_restart())
async def test_a_bad_configuration_is_not_tried_again(world: World) -> None:
    await world.ready()
    world.crash(world.agents[0], code=78)
    await world.after(86400.0)
    assert world.states == [S.FAILED]
    assert world.agents[0].note == "exit 78: bad configuration, not restarted"


@story(with_restart(crash_loop_failures=2))
async def test_an_agent_that_asks_for_it_is_started_again_any_number_of_times(world: World) -> None:
    for number in range(1, 6):
        await world.after(1.0)
        world.crash(world.agents[0], code=75)
        await settled()
        assert (world.states, world.agents[0].restarts) == ([S.STARTING], number)


@story(with_restart(policy=RestartPolicy.ON_FAILURE))
async def test_an_agent_that_completed_stays_so(world: World) -> None:
    await world.ready()
    world.crash(world.agents[0], code=0)
    await world.after(86400.0)
    assert world.states == [S.TERMINATED]
    assert world.agents[0].note == "completed"
    assert "agent.failed" not in world.told


@story(with_restart())
async def test_what_a_crashed_agent_left_is_ended_before_its_restart(world: World) -> None:
    await world.ready()
    leader = world.machine.leader(world.agents[0].id)
    child = world.machine.fork(leader, ignores_stop=True)
    world.machine.end(leader, code=1)
    await world.after(0.05)
    (agent,) = world.agents
    assert agent.state is S.DRAINING
    assert agent.note == f"exit 1; ending what it left: pid {child.ref.pid}"
    assert child.signals == [TERM, CONT]
    await world.after(5.0)
    assert not child.alive
    assert child.signals == [TERM, CONT, KILL]
    assert world.states == [S.STARTING]
    assert world.agents[0].restarts == 1
    assert str(world.agents[0].last_exit) == "exit 1"
    assert "drain.timeout" not in world.told


@story()
async def test_scaling_down_ends_the_oldest_and_touches_no_other(world: World) -> None:
    await world.ready()
    oldest, *others = world.agents
    pids = world.pids()
    world.ask(2)
    await settled()
    assert world.agents == tuple(others)
    assert world.pids() == {agent.id: pids[agent.id] for agent in others}
    assert world.lifecycle.sent == [(oldest.id, TERM), (oldest.id, CONT)]
    assert world.lifecycle.discarded == [oldest.id]
    assert oldest.id not in world.state.agents


@story()
async def test_a_stop_is_written_before_and_with_its_outcome_and_not_in_between(world: World) -> None:
    await world.ready()
    attempts = world.state.attempts
    world.ask(0)
    await settled()
    assert world.agents == ()
    assert world.state.attempts == attempts + 2


@story()
async def test_that_an_agent_was_asked_to_stop_is_on_disk_while_it_takes_its_time(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    world.ask(2)
    await world.after(0.05)
    (leaving,) = [agent for agent in world.state.agents.values() if agent.state is S.DRAINING]
    assert leaving.stop_sent


@story()
async def test_scaling_up_touches_no_other(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.ask(6)
    await world.ready()
    assert before.items() <= world.pids().items()
    assert [agent.slot for agent in world.agents] == list(range(6))
    assert world.lifecycle.sent == []


@story()
async def test_a_suspended_agent_stops_at_once(world: World) -> None:
    await world.ready()
    for process in world.machine.living():
        world.machine.send(process, signal.SIGSTOP)
    world.ask(down=True)
    await settled()
    assert world.machine.living() == []
    assert world.supervisor.empty


@story()
async def test_an_agent_that_ignores_the_stop_signal_is_killed_when_its_time_is_over(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    oldest = world.agents[0]
    world.ask(2)
    await world.after(DRAIN - 0.1)
    assert world.machine.leader(oldest.id).alive
    assert world.states == [S.DRAINING, S.RUNNING, S.RUNNING]
    await world.after(0.2)
    assert world.machine.living(oldest.id) == []
    assert world.lifecycle.killed == [oldest.id]
    (event,) = [event for event in world.state.events if event.kind == "drain.timeout"]
    assert (event.agent_id, event.data["code"]) == (oldest.id, "E2093")
    assert len(world.agents) == 2


@story()
async def test_a_process_that_survives_being_killed_is_killed_again_but_told_of_once(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    world.ask(2)
    kill, world.lifecycle.kill = world.lifecycle.kill, lambda agents: None  # type: ignore[method-assign]  # as in uninterruptible sleep
    await world.after(DRAIN + 10.0)
    assert world.states == [S.DRAINING, S.RUNNING, S.RUNNING]
    assert world.told.count("drain.timeout") == 1
    world.lifecycle.kill = kill  # type: ignore[method-assign]
    await world.after(1.0)
    assert world.states == [S.RUNNING, S.RUNNING]


@story()
async def test_taking_the_fleet_down_now_gives_no_time(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    world.ask(2)
    await settled()
    world.ask(down=True, down_now=True)
    await settled()
    assert world.machine.living() == []
    assert world.supervisor.empty
    assert world.state.agents == {}
    assert "drain.timeout" not in world.told


@story()
async def test_a_fleet_that_comes_up_again_while_it_goes_down(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    old = world.pids()
    world.ask(down=True)
    await settled()
    world.lifecycle.ignore_stop = False
    world.ask(down=False)
    await world.ready()
    assert [agent.slot for agent in world.agents if agent.ready] == [3, 4, 5]
    await world.after(DRAIN)
    assert not old.keys() & world.pids().keys()
    assert world.states == [S.RUNNING] * 3


@story()
async def test_agents_that_stop_with_the_daemon_come_back_with_the_next(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.ask(mode=Mode.STOP)
    await settled()
    assert world.supervisor.stopped
    assert world.machine.living() == []
    await world.after(86400.0)
    assert world.machine.living() == []
    await world.kill_9()
    world.wish = replace(world.wish, mode=Mode.RUN)
    world.boot()
    await world.ready()
    assert world.pids().keys() == before.keys()
    assert world.states == [S.RUNNING] * 3


@story(replace(SPEC, replicas=1))
async def test_a_held_fleet_sleeps_although_a_retry_is_due(world: World) -> None:
    await world.ready()
    world.crash(world.agents[0])
    await settled()
    world.crash(world.agents[0])
    await settled()
    assert world.states == [S.BACKOFF]
    world.ask(mode=Mode.HOLD)
    await world.after(86400.0)
    assert world.states == [S.BACKOFF]
    world.ask(mode=Mode.RUN)
    await settled()
    assert world.states == [S.STARTING]


@story()
async def test_a_wrong_command_ends_in_failed(world: World) -> None:
    world.lifecycle.spawn_errors.extend(SpawnFailed("cannot start 'agent': No such file", permanent=True) for _ in range(18))
    await world.after(40.0)
    assert world.states == [S.FAILED] * 3
    assert world.agents[0].note == "cannot start 'agent': No such file"
    assert world.agents[0].restarts == 0


@story(replace(SPEC, replicas=1))
async def test_a_machine_that_is_short_of_something_is_waited_for(world: World) -> None:
    world.lifecycle.spawn_errors.extend(SpawnFailed("cannot fork: Resource temporarily unavailable") for _ in range(20))
    await settled()
    assert world.states == [S.BACKOFF]
    await world.after(1200.0)
    assert world.states == [S.RUNNING]
    assert world.agents[0].restarts == 0


@story(replace(SPEC, replicas=1))
async def test_a_restart_counts_once_however_often_its_spawn_was_tried(world: World) -> None:
    await world.ready()
    world.lifecycle.spawn_errors.extend(SpawnFailed("cannot fork: Resource temporarily unavailable") for _ in range(3))
    world.crash(world.agents[0])
    await world.after(60.0)
    assert (world.states, world.agents[0].restarts) == ([S.RUNNING], 1)


@story()
async def test_a_rolling_restart_takes_one_at_a_time(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.supervisor.replace_processes(before, Replace.ROLLING)
    for done in range(1, 4):
        await settled()
        assert sum(agent.ready for agent in world.agents) == 2
        await world.ready()
        assert sum(before[agent_id] != pid for agent_id, pid in world.pids().items()) == min(3, done + (done < 3))
    assert world.states == [S.RUNNING] * 3
    assert [agent.restarts for agent in world.agents] == [1, 1, 1]


@story()
async def test_a_restart_at_once_takes_all(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.supervisor.replace_processes(before, Replace.AT_ONCE)
    await settled()
    assert world.states == [S.STARTING] * 3
    assert not set(before.values()) & set(world.pids().values())
    assert before.keys() == world.pids().keys()


@story()
async def test_a_rolling_restart_starts_a_failed_agent_once(world: World) -> None:
    await world.ready()
    world.crash(world.agents[1], code=78)
    await settled()
    world.supervisor.replace_processes([agent.id for agent in world.agents], Replace.ROLLING)
    await settled()
    assert len(world.machine.living()) == 3
    world.check()
    await world.after(10.0)
    assert world.states == [S.RUNNING] * 3


@story()
async def test_a_changed_spec_that_fails_stops_after_the_first_agent(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.lifecycle.spawn_errors.extend(SpawnFailed("cannot start 'worse'", permanent=True) for _ in range(1000))
    world.ask(spec=replace(SPEC, command=("worse",)))
    await world.after(200.0)
    assert world.states == [S.FAILED, S.RUNNING, S.RUNNING]
    assert len(before.items() & world.pids().items()) == 2
    world.lifecycle.spawn_errors.clear()
    world.ask(spec=replace(SPEC, command=("better",)))
    await world.after(10.0)
    assert world.states == [S.RUNNING] * 3
    assert not before.items() & world.pids().items()


class Repetitive(random.Random):
    """Makes every name twice."""

    def __init__(self) -> None:
        super().__init__(1)
        self._last: list[Any] | None = None

    def choices(self, *args: Any, **kwargs: Any) -> list[Any]:  # Any: the signature of the base class
        if self._last is not None:
            last, self._last = self._last, None
            return last
        self._last = super().choices(*args, **kwargs)
        return self._last


def test_two_new_agents_never_get_the_same_name() -> None:
    clock, state = FakeClock(), FakeStateManager()

    async def story() -> None:
        lifecycle = FakeLifecycleManager()
        supervisor = Supervisor(Wish(spec=SPEC), lifecycle=lifecycle, state=state, clock=clock, random_source=Repetitive())
        task = asyncio.ensure_future(supervisor.run())
        await settled()
        assert len(supervisor.published) == 3
        assert {process.token for process in lifecycle.machine.living()} == {agent.token for agent in state.agents.values()}
        task.cancel()

    run_in_fake_time(clock, story())


# -- a disk that fills up


async def everything(world: World) -> None:
    """A life with something of all, each part with time for a disk to heal."""
    await world.after(5.0)
    world.crash(world.agents[1])
    await world.after(5.0)
    world.ask(1)
    await world.after(5.0)
    world.ask(4)
    await world.after(5.0)
    world.supervisor.replace_processes([agent.id for agent in world.agents], Replace.ROLLING)
    await world.after(15.0)
    assert world.states == [S.RUNNING] * 4
    world.check()
    world.ask(down=True)
    await world.after(5.0)
    assert world.supervisor.empty
    assert world.machine.living() == []
    assert world.state.agents == {}


def commits_of_everything() -> int:
    world = World()
    world.run(everything)
    return world.state.attempts


@pytest.mark.parametrize("long", [1, 3])
def test_a_full_disk_at_any_moment_loses_nothing_and_heals(long: int) -> None:
    """Checked underneath: nothing is spawned or signalled before the disk knows, and nobody is asked to stop twice."""
    number = commits_of_everything()
    assert number > 20
    for first in range(number):
        world = World()
        world.state.fails = lambda attempt, first=first: first <= attempt < first + long  # type: ignore[misc]  # the default binds it
        world.run(everything)


@story()
async def test_a_full_disk_stops_no_running_agent_and_is_told(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.state.fails = lambda attempt: True
    world.crash(world.agents[0])
    world.ask(2)
    await world.after(3600.0)
    trouble = world.supervisor.trouble
    assert trouble
    assert len(world.machine.living()) == 2
    assert world.lifecycle.sent == []
    world.state.fails = lambda attempt: False
    await world.after(2.0)
    assert world.supervisor.trouble is None
    assert len(before.items() & world.pids().items()) >= 1
    assert world.states == [S.RUNNING] * 2


@story(replace(SPEC, replicas=1))
async def test_a_restart_that_a_full_disk_held_up_counts_once(world: World) -> None:
    await world.ready()
    world.state.fails = lambda attempt: True
    world.crash(world.agents[0])
    await world.after(60.0)
    world.state.fails = lambda attempt: False
    await world.after(2.0)
    assert (world.states, world.agents[0].restarts) == ([S.RUNNING], 1)


@story()
async def test_a_roll_remembers_over_a_full_disk_that_its_first_has_to_become_ready(world: World) -> None:
    await world.ready()
    before = world.pids()
    world.lifecycle.spawn_errors.extend(SpawnFailed("cannot start 'worse'", permanent=True) for _ in range(1000))
    world.ask(spec=replace(SPEC, command=("worse",)))
    world.state.fails = lambda attempt: True
    await world.after(10.0)
    world.state.fails = lambda attempt: False
    await world.after(200.0)
    assert world.states == [S.FAILED, S.RUNNING, S.RUNNING]
    assert len(before.items() & world.pids().items()) == 2


@story()
async def test_a_full_disk_does_not_fill_the_memory_with_events(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    world.ask(2)
    await settled()
    told = len(world.state.events)
    world.state.fails = lambda attempt: True
    await world.after(3600.0)
    world.state.fails = lambda attempt: False
    await world.after(2.0)
    assert len(world.state.events) - told < 10


# -- kill -9


@pytest.mark.parametrize("steps", range(0, 60, 2))
def test_a_daemon_killed_while_it_starts_its_agents_leaves_none_behind_and_doubles_none(steps: int) -> None:
    async def story(world: World) -> None:
        for _ in range(steps):
            await asyncio.sleep(0)
        await world.kill_9()
        started = {process.ref for process in world.machine.living()}
        world.boot()
        await world.ready()
        world.check()
        assert world.states == [S.RUNNING] * 20
        assert started <= {agent.process for agent in world.agents}
        assert len(world.machine.processes) == 20

    World(replace(SPEC, replicas=20)).run(story)


HEALTHY = RestartSpec(backoff_cap_seconds=2.0, crash_loop_failures=1000)
MOVES = [
    "crash",
    "crash and leave",
    "scale",
    "down",
    "up",
    "roll",
    "restart",
    "change",
    "kill",
    "fill",
    "heal",
    "stubborn",
    "obedient",
    "wait",
]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 30)), max_size=25))
def test_any_history_with_kills_ends_as_wished(seed: int, moves: list[tuple[str, int]]) -> None:
    async def story(world: World) -> None:
        for move, number in moves:
            await step(world, move, number)
            for _ in range(number):
                await asyncio.sleep(0)
            assert all(n == 1 for n in Counter(one.agent_id for one in world.machine.living() if one.leads).values())
        world.state.fails = lambda attempt: False
        await world.after(10 * DRAIN)
        world.check()
        assert len(world.agents) == world.wish.replicas
        assert set(world.states) <= {S.RUNNING}
        assert len(world.machine.living()) == world.wish.replicas
        assert dict(world.state.agents) == {agent.id: agent for agent in world.agents}
        assert {agent.spec_hash for agent in world.agents} <= {world.wish.spec.process_hash}

    World(replace(SPEC, restart=HEALTHY), seed=seed).run(story)


async def step(world: World, move: str, number: int) -> None:
    living = world.machine.living()
    match move:
        case "crash" if living:
            world.machine.end(living[number % len(living)], code=number % 3)
        case "crash and leave" if living:
            victim = living[number % len(living)]
            world.machine.fork(victim, ignores_stop=number % 2 == 0)
            world.machine.end(victim, signal=KILL)
        case "scale":
            world.ask(number % 7)
        case "down":
            world.ask(down=True, down_now=number % 2 == 0)
        case "up":
            world.ask(down=False, down_now=False)
        case "roll" | "restart":
            how = Replace.ROLLING if move == "roll" else Replace.AT_ONCE
            world.supervisor.replace_processes([agent.id for agent in world.agents], how)
        case "change":
            world.ask(spec=replace(world.wish.spec, environment={"V": str(number)}))
        case "kill":
            await world.kill_9()
            world.boot()
        case "fill":
            world.state.fails = lambda attempt: True
        case "heal":
            world.state.fails = lambda attempt: False
        case "stubborn" | "obedient":
            world.lifecycle.ignore_stop = move == "stubborn"
        case "wait":
            await world.after(number / 10)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 120), st.integers(0, 40), st.integers(0, 40))
def test_agents_that_stay_are_not_touched_by_kills_during_scaling(first: int, second: int, third: int) -> None:
    async def story(world: World) -> None:
        await world.ready()
        before = world.pids()
        for replicas, steps in ((8, first), (5, second), (6, third)):
            world.ask(replicas)
            for _ in range(steps):
                await asyncio.sleep(0)
            await world.kill_9()
            world.boot()
        await world.after(DRAIN)
        world.check()
        assert world.states == [S.RUNNING] * 6
        # Three that do not stay of at most eight: the oldest, or such as were not ready yet.
        stopped = [process for process in world.machine.processes.values() if process.signals]
        assert len(stopped) <= 3
        assert all(process.signals.count(TERM) <= 2 for process in stopped)
        assert len(before.items() & world.pids().items()) + len(stopped) >= 3

    World().run(story)


@story()
async def test_after_a_reboot_the_fleet_comes_back_and_nothing_is_signalled(world: World) -> None:
    await world.ready()
    ids = set(world.pids())
    world.crash(world.agents[0])
    await settled()
    world.crash(world.agents[0])
    await settled()
    assert world.states[0] is S.BACKOFF
    await world.kill_9()
    world.machine.reboot()
    world.boot()
    await world.ready()
    assert set(world.pids()) == ids
    assert world.states == [S.RUNNING] * 3
    assert world.lifecycle.sent == []


@story()
async def test_with_a_lost_database_the_agents_are_adopted_with_the_same_pids(world: World) -> None:
    await world.ready()
    before = world.pids()
    await world.kill_9()
    world.state.agents.clear()
    world.boot()
    await world.ready()
    assert world.pids() == before
    assert world.states == [S.RUNNING] * 3
    assert world.lifecycle.sent == []


@story(replace(SPEC, replicas=1))
async def test_an_unverifiable_process_is_neither_signalled_nor_doubled(world: World) -> None:
    await world.ready()
    (process,) = world.machine.living()
    await world.kill_9()
    process.verifiable = False
    world.boot()
    await world.after(60.0)
    assert process.signals == []
    assert world.machine.living() == [process]
