"""What agents keep, in the loop of a fleet, over fakes and in fake time: saved before a stop and after it, given back, never lost."""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.contract import Message
from fleetctl.core.orders import Mode, Wish
from fleetctl.core.recover import recover, with_acquired
from fleetctl.errors import FleetctlError, NotFound, StateDirectoryError, UnknownCheckpoint, UsageError
from fleetctl.fleet import Fleet
from fleetctl.keeping import RETRY_SECONDS
from fleetctl.models import (
    Agent,
    AgentState,
    Checkpoint,
    CheckpointKind,
    CheckpointsSpec,
    FleetSpec,
    GracefulDrainSpec,
    OnTimeout,
    ReadinessSpec,
    RestartSpec,
    SpawnResult,
    WarmPoolSpec,
)
from fleetctl.testing import (
    FakeCheckpointStore,
    FakeClock,
    FakeLifecycleManager,
    FakeMachine,
    FakeProcess,
    FakeStateManager,
    run_in_fake_time,
    settled,
)

S = AgentState
TERM, KILL, CONT, USR1, USR2 = (int(number) for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2))
SETTLE, DRAIN, ASK = 0.25, 30.0, 10.0
SPEC = FleetSpec(
    name="demo",
    command=("agent",),
    replicas=2,
    max_replicas=20,
    readiness=ReadinessSpec(settle_seconds=SETTLE),
    graceful_drain=GracefulDrainSpec(timeout_seconds=DRAIN, checkpoint_timeout_seconds=ASK),
    restart=RestartSpec(backoff_cap_seconds=2.0, crash_loop_failures=1000),
)


class Hands(FakeLifecycleManager):
    """Signals are heard by whoever listens: what an agent does on its way out, and when it is asked for a checkpoint."""

    def __init__(self, world: "World") -> None:
        super().__init__(world.machine)
        self._world = world

    def signal(self, agents: Sequence[Agent], *numbers: int) -> None:
        for agent in agents:
            assert self._world.state.agents[agent.id].state is S.DRAINING, "signalled before the decision was on disk"
            if TERM in numbers and agent.id in self._world.last_words:
                self._world.last_words[agent.id]()
        super().signal([agent for agent in agents if USR1 not in numbers], *numbers)
        for agent in agents if USR1 in numbers else ():
            self.sent.append((agent.id, USR1))
            if agent.id in self._world.when_asked:
                self._world.when_asked[agent.id]()

    def discard(self, agent: Agent) -> None:
        super().discard(agent)
        self._world.discarded.append(agent.id)


class World:
    """A machine and its disk, and one daemon after the other with the fleet."""

    def __init__(self, spec: FleetSpec = SPEC) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)
        self.state = FakeStateManager()
        self.state.wishes[spec.name] = (spec, False)
        self.store = FakeCheckpointStore(self.clock)
        self.last_words: dict[str, Callable[[], object]] = {}
        self.when_asked: dict[str, Callable[[], object]] = {}
        self.discarded: list[str] = []
        self.mode = Mode.RUN
        self.kills = 0

    def run(self, story: Callable[["World"], Awaitable[None]]) -> None:
        async def told() -> None:
            self.boot()
            await story(self)
            self.check()
            await self.fleet.close()

        run_in_fake_time(self.clock, told())

    def boot(self) -> None:
        self.lifecycle = Hands(self)
        spec, down = self.state.wishes[SPEC.name]
        records = list(self.state.agents.values())
        recovery = recover(
            records,
            self.lifecycle.find(),
            {agent.id: self.lifecycle.identify(agent.process) for agent in records if agent.process},
            boot_id=self.machine.boot_id,
            now=self.clock.monotonic(),
            wall=self.clock.time(),
            drain_seconds=DRAIN,
        )
        spec, agents = with_acquired(spec, recovery.agents)
        self.state.wishes[spec.name] = (spec, down)
        self.fleet = Fleet(
            Wish(spec=spec, down=down, mode=self.mode),
            lifecycle_manager=self.lifecycle,
            state_manager=self.state,
            checkpoint_store=self.store,
            clock=self.clock,
            agents=agents,
        )
        self.task = self.fleet.start()

    async def kill_9(self) -> None:
        await self.fleet.close()
        self.kills += 1

    async def after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await settled()

    async def ready(self) -> None:
        await self.after(SETTLE + 0.01)

    @property
    def agents(self) -> tuple[Agent, ...]:
        return self.fleet.agents

    @property
    def first(self) -> Agent:
        return self.agents[0]

    def keep(self, agent: Agent, **files: str) -> None:
        self.store.states[agent.id] = {name: text.encode() for name, text in files.items()}

    def say(self, agent: Agent, **words: Any) -> None:  # Any: fields of Message
        self.fleet.hear(agent.id, Message(extension=True, **words))

    def process(self, agent: Agent) -> FakeProcess:
        return self.machine.leader(agent.id)

    def terms(self, agent: Agent) -> int:
        return self.lifecycle.sent.count((agent.id, TERM))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [checkpoint for checkpoint, _ in self.store.saved.values()]

    def content(self, checkpoint: Checkpoint) -> dict[str, str]:
        return {path: data.decode() for path, data in self.store.saved[checkpoint.id][1].items()}

    def told(self, kind: str) -> list[str]:
        return [event.message for event in self.state.events if event.kind == kind]

    def fail(self, seconds: float = 1e9) -> None:
        """The disk takes no checkpoint for so long."""
        until = self.clock.monotonic() + seconds
        self.store.fails = lambda attempt: self.clock.monotonic() < until

    def check(self) -> None:
        if self.task.done():
            self.task.result()
        leaders = Counter(process.agent_id for process in self.machine.living() if process.leads)
        assert not [agent_id for agent_id, number in leaders.items() if number > 1], "an agent runs twice"
        asked = Counter({process.token: process.signals.count(TERM) for process in self.machine.processes.values() if process.leads})
        assert max(asked.values(), default=0) <= 1 + self.kills, "asked to stop twice"
        for checkpoint, content in self.store.saved.values():
            assert {file.path for file in checkpoint.files} == content.keys()


def story(spec: FleetSpec = SPEC) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    def decorate(function: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            World(spec).run(function)

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


def with_drain(**changes: Any) -> FleetSpec:  # Any: fields of GracefulDrainSpec
    return replace(SPEC, graceful_drain=replace(SPEC.graceful_drain, **changes))


def with_checkpoints(**changes: Any) -> FleetSpec:  # Any: fields of CheckpointsSpec
    return replace(SPEC, checkpoints=CheckpointsSpec(**changes))


# -- before the stop, and after


@story()
async def test_what_an_agent_keeps_is_saved_before_it_is_asked_to_stop(world: World) -> None:
    await world.ready()
    victim, order = world.first, list[str]()
    world.keep(victim, counter="7")
    world.last_words[victim.id] = lambda: order.extend(world.content(one)["state/counter"] for one in world.checkpoints)
    await world.fleet.scale(1)
    await settled()
    assert order == ["7"]
    (checkpoint,) = world.checkpoints
    assert (checkpoint.agent_id, checkpoint.kind, checkpoint.reason) == (victim.id, CheckpointKind.FILES, "scaled down to 1")
    assert [agent.id for agent in world.agents] == [world.agents[0].id] != [victim.id]
    assert world.told("checkpoint.saved")[0] == f"{victim.id}: checkpoint {checkpoint.id} (scaled down to 1)"


@story()
async def test_what_it_writes_on_its_way_out_is_in_the_checkpoint_and_its_directory_is_taken_away(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7", job="half done")
    world.last_words[victim.id] = lambda: world.keep(victim, counter="8")
    await world.fleet.scale(1)
    await settled()
    (checkpoint,) = world.checkpoints
    assert world.content(checkpoint) == {"state/counter": "8"}
    assert victim.id not in world.store.states
    assert world.discarded == [victim.id]


@story()
async def test_the_last_token_counts_even_when_it_comes_after_the_end(world: World) -> None:
    await world.ready()
    victim = world.first
    world.say(victim, resume="first")
    await settled()
    world.store.seconds = 1.0
    await world.fleet.scale(1)
    await world.after(1.5)  # saved, asked to stop, and gone; its end is being saved
    assert world.first.process is None
    world.say(victim, resume="last")
    await world.after(10.0)
    (checkpoint,) = world.checkpoints
    assert (checkpoint.kind, checkpoint.resume_token) == (CheckpointKind.TOKEN, "last")
    assert len(world.agents) == 1


@story()
async def test_who_finished_all_its_work_on_the_way_out_leaves_no_checkpoint_to_repeat_it(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, job="to do")
    world.last_words[victim.id] = lambda: world.keep(victim)
    await world.fleet.scale(1)
    await settled()
    assert world.checkpoints == []
    assert len(world.agents) == 1


@story()
async def test_an_agent_that_keeps_nothing_stops_without_any_work_on_the_store(world: World) -> None:
    await world.ready()
    world.store.states[world.first.id] = {}
    await world.fleet.scale(0)
    await settled()
    assert not world.agents
    assert (world.store.attempts, world.checkpoints) == (0, [])


@story(with_drain(checkpoint_before_drain=False))
async def test_without_checkpoints_what_an_agent_kept_stays_where_it_is(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    await world.fleet.scale(1)
    await settled()
    assert (world.store.attempts, world.checkpoints) == (0, [])
    assert victim.id in world.store.states
    assert len(world.agents) == 1


@story()
async def test_a_restart_saves_too_and_the_agent_goes_on_with_its_own(world: World) -> None:
    await world.ready()
    agent = world.first
    world.keep(agent, counter="7")
    world.fleet.restart([agent.id], all_at_once=False)
    await world.ready()
    assert world.store.states[agent.id] == {"counter": b"7"}
    (checkpoint,) = world.checkpoints
    assert (checkpoint.agent_id, checkpoint.reason) == (agent.id, "restart")
    again = next(one for one in world.agents if one.id == agent.id)
    assert (again.restarts, again.checkpoint) == (1, "")


@story()
async def test_a_crash_takes_no_checkpoint_and_the_agent_keeps_its_directory(world: World) -> None:
    await world.ready()
    agent = world.first
    world.keep(agent, counter="7")
    world.machine.end(world.process(agent), code=1)
    await world.ready()
    assert (world.store.attempts, world.store.states[agent.id]) == (0, {"counter": b"7"})
    assert world.first.id == agent.id


@story(replace(SPEC, restart=RestartSpec(crash_loop_failures=2)))
async def test_an_agent_that_has_no_process_is_saved_when_it_is_scaled_away(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    for _ in range(2):
        world.machine.end(world.process(victim), code=1)
        await settled()
    assert world.first.state is S.FAILED
    await world.fleet.scale(1)
    await settled()
    (checkpoint,) = world.checkpoints
    assert (checkpoint.agent_id, world.content(checkpoint)) == (victim.id, {"state/counter": "7"})
    assert victim.id not in world.store.states


@story(replace(SPEC, warm_pool=WarmPoolSpec(enabled=True, size=2)))
async def test_instances_of_the_pool_have_nothing_to_save_but_leave_nothing_behind(world: World) -> None:
    await world.after(2.0)
    pool = [agent for agent in world.agents if agent.pooled]
    for agent in pool:
        world.keep(agent, cache="x")
    await world.fleet.resize_warm_pool(0)
    await settled()
    assert world.checkpoints == []
    assert world.store.states == {}
    assert len(world.agents) == 2


@story(replace(SPEC, warm_pool=WarmPoolSpec(enabled=True, size=1)))
async def test_one_that_was_claimed_is_saved_like_any_other(world: World) -> None:
    await world.after(2.0)
    got = await world.fleet.acquire({}, require_warm=True, timeout_seconds=5.0)
    world.keep(world.fleet.find(got.agent_id), counter="7")
    await world.fleet.drain(got.agent_id, now=False)
    await settled()
    assert [checkpoint.agent_id for checkpoint in world.checkpoints] == [got.agent_id]


@story(with_checkpoints(max_bytes=1))
async def test_what_is_too_large_stays_where_it_is_and_keeps_nobody(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, model="large")
    await world.fleet.scale(1)
    await settled()
    assert len(world.agents) == 1
    assert world.store.states[victim.id] == {"model": b"large"}
    assert "stays where it is" in world.told("checkpoint.incomplete")[-1]


# -- asking for it


@story(with_drain(checkpoint_signal="USR1"))
async def test_an_agent_is_asked_first_and_waited_for(world: World) -> None:
    await world.ready()
    victim = world.first
    await world.fleet.scale(1)
    await world.after(3.0)
    assert world.lifecycle.sent == [(victim.id, USR1)]
    world.keep(victim, counter="9")
    world.say(victim, checkpoint="/somewhere")
    await settled()
    assert world.terms(victim) == 1
    assert world.content(world.checkpoints[0]) == {"state/counter": "9"}


@story(with_drain(checkpoint_signal="USR1"))
async def test_one_that_never_answers_has_had_its_time(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    await world.fleet.scale(1)
    await world.after(ASK - 0.1)
    assert world.terms(victim) == 0
    await world.after(0.2)
    assert world.terms(victim) == 1
    assert len(world.checkpoints) == 1


@story(with_drain(checkpoint_signal="USR1"))
async def test_one_that_is_not_ready_is_not_sent_a_signal_that_could_end_it(world: World) -> None:
    await settled()
    victim = world.first
    world.keep(victim, counter="7")
    await world.fleet.scale(1)
    await settled()
    assert USR1 not in [number for _, number in world.lifecycle.sent]
    assert len(world.checkpoints) == 1


@story(with_checkpoints(command=("dump",)))
async def test_a_command_writes_the_checkpoint_and_the_state_joins_it_after_the_end(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, db="live")
    before: list[dict[str, str]] = []
    world.last_words[victim.id] = lambda: before.append(world.content(world.checkpoints[0]))
    await world.fleet.scale(1)
    await settled()
    assert world.store.commanded == [victim.id]
    assert before == [{"written/dump": "by the command"}]
    (checkpoint,) = world.checkpoints
    assert checkpoint.kind is CheckpointKind.COMMAND
    assert world.content(checkpoint) == {"written/dump": "by the command", "state/db": "live"}
    assert victim.id not in world.store.states


@story(with_checkpoints(command=("dump",)))
async def test_a_command_that_fails_keeps_the_agent_running(world: World) -> None:
    await world.ready()
    victim = world.first
    world.store.command_error = "exit 1"
    await world.fleet.scale(1)
    await world.after(60.0)
    assert world.terms(victim) == 0
    assert world.fleet.supervisor.unsaved == {victim.id: "checkpoints.command: exit 1"}
    world.store.command_error = ""
    await world.after(RETRY_SECONDS)
    assert world.terms(victim) == 1


@story()
async def test_a_checkpoint_that_nobody_asked_for_is_saved_too(world: World) -> None:
    await world.ready()
    agent = world.first
    world.keep(agent, counter="7")
    for _ in range(100):  # it may say so as often as it likes
        world.say(agent, checkpoint="/somewhere")
        await world.after(0.05)
    assert 2 <= len(world.checkpoints) <= 3  # of which three are kept
    assert world.store.attempts <= 6
    assert all(one.reason == "told by the agent" for one in world.checkpoints)
    assert world.first.state is S.RUNNING


@story(with_drain(drain_signal="USR2"))
async def test_an_agent_can_be_asked_to_finish_by_another_signal(world: World) -> None:
    await world.ready()
    victim = world.first
    await world.fleet.scale(1)
    await settled()
    assert world.lifecycle.sent == [(victim.id, USR2), (victim.id, CONT)]
    assert len(world.agents) == 1


# -- no room


@story()
async def test_without_room_for_the_checkpoint_the_agent_is_not_stopped(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.fail(100.0)
    await world.fleet.scale(1)
    await world.after(99.0)
    assert world.terms(victim) == 0
    assert world.process(victim).alive
    assert world.first.state is S.DRAINING
    assert "no space left" in world.fleet.supervisor.unsaved[victim.id]
    assert world.store.attempts == pytest.approx(99 / RETRY_SECONDS, abs=1)
    await world.after(2 * RETRY_SECONDS)
    assert world.terms(victim) == 1
    assert world.fleet.supervisor.unsaved == {}
    assert len(world.agents) == 1


@story()
async def test_its_time_to_finish_begins_when_it_is_asked(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.store.seconds = 2 * DRAIN
    await world.fleet.scale(1)
    await world.after(2 * DRAIN + 1)
    assert (world.terms(victim), world.lifecycle.killed) == (1, [])
    await world.after(DRAIN)
    assert victim.id in world.lifecycle.killed


@story()
async def test_down_now_stops_without_a_checkpoint(world: World) -> None:
    await world.ready()
    world.keep(world.first, counter="7")
    world.fail()
    await world.fleet.take_down(now=False)
    await world.after(60.0)
    assert len(world.machine.living()) == 1
    await world.fleet.take_down(now=True)
    await world.after(1.0)
    assert world.agents == ()
    assert world.store.states  # nothing was saved, so nothing was taken away
    assert world.told("checkpoint.failed")


@story()
async def test_drain_now_stops_one_without_a_checkpoint_and_without_a_reproach(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.fail()
    await world.fleet.drain(victim.id, now=False)
    await world.after(60.0)
    assert world.process(victim).alive
    await world.fleet.drain(victim.id, now=True)
    await settled()
    assert [agent.id for agent in world.agents] == [world.first.id] != [victim.id]
    assert world.fleet.wish.replicas == 1
    assert world.told("drain.timeout") == []


@story()
async def test_without_room_for_its_last_words_a_gone_agent_is_remembered_until_there_is(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")

    def last_words() -> None:
        world.keep(victim, counter="8")
        world.fail(60.0)

    world.last_words[victim.id] = last_words
    await world.fleet.scale(1)
    await world.after(50.0)
    assert (world.first.id, world.first.state, world.first.process) == (victim.id, S.TERMINATED, None)
    assert world.content(world.checkpoints[0]) == {"state/counter": "7"}
    assert victim.id in world.store.states
    await world.after(20.0)
    assert world.content(world.checkpoints[0]) == {"state/counter": "8"}
    assert len(world.agents) == 1


@story()
async def test_the_end_of_the_daemon_waits_for_checkpoints(world: World) -> None:
    await world.ready()
    world.keep(world.first, counter="7")
    world.fail(60.0)
    world.fleet.stop_with_daemon()
    stopped = []
    for seconds in (50.0, 20.0):
        await world.after(seconds)
        stopped.append(world.fleet.supervisor.stopped)
    assert stopped == [False, True]
    assert world.store.states[world.first.id] == {"counter": b"7"}  # it comes back with the next


@story()
async def test_an_agent_that_ends_while_it_is_saved_is_made_up_for_or_gone(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.store.seconds = 5.0
    await world.fleet.scale(1)
    await world.after(1.0)
    world.machine.end(world.process(victim), code=0)
    await world.after(30.0)
    assert world.terms(victim) == 0
    assert [world.content(one) for one in world.checkpoints] == [{"state/counter": "7"}]
    assert len(world.agents) == 1


@story()
async def test_what_an_agent_that_ends_while_it_is_saved_leaves_running_is_ended(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.machine.fork(world.process(victim), ignores_stop=True)
    world.store.seconds = 3.0
    await world.fleet.scale(1)
    await world.after(1.0)
    world.machine.end(world.process(victim), code=0)
    await world.after(30.0)
    assert len(world.agents) == 1
    assert not world.machine.living(victim.id)


# -- past the timeout


@story(with_drain(on_timeout=OnTimeout.WAIT))
async def test_a_slow_one_may_take_its_time_where_that_is_wished(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    victim = world.first
    await world.fleet.scale(1)
    await world.after(DRAIN + 3600.0)
    assert world.lifecycle.killed == []
    assert world.told("drain.timeout") == [f"{victim.id}: E2093 Graceful drain timeout exceeded.; it goes on until it ends by itself"]
    world.machine.end(world.process(victim), code=0)
    await settled()
    assert len(world.agents) == 1


@story(with_drain(on_timeout=OnTimeout.WAIT))
async def test_down_now_waits_for_nobody(world: World) -> None:
    world.lifecycle.ignore_stop = True
    await world.ready()
    await world.fleet.scale(1)
    await world.after(DRAIN + 3600.0)
    await world.fleet.take_down(now=True)
    await settled()
    assert world.agents == ()


# -- draining one


@story()
async def test_draining_one_ends_this_very_agent_and_shrinks_the_fleet(world: World) -> None:
    await world.ready()
    stays, goes = world.agents
    world.keep(goes, counter="7")
    drained = await world.fleet.drain(goes.id, now=False)
    assert (drained.leaving, drained.state) == (True, S.DRAINING)
    await world.after(1.0)
    assert [agent.id for agent in world.agents] == [stays.id]
    assert [checkpoint.agent_id for checkpoint in world.checkpoints] == [goes.id]
    assert world.state.wishes["demo"][0].replicas == 1
    assert [(one.action, one.cause, one.target_replicas) for _, one in world.state.history] == [("scale_down", "drain", 1)]


@story(replace(SPEC, min_replicas=2))
async def test_a_fleet_is_not_drained_below_its_bounds(world: World) -> None:
    await world.ready()
    with pytest.raises(UsageError, match="min_replicas"):
        await world.fleet.drain(world.first.id, now=False)
    assert len(world.agents) == 2


@story()
async def test_who_is_not_there_cannot_be_drained(world: World) -> None:
    with pytest.raises(NotFound):
        await world.fleet.drain("demo-zzzzz", now=False)


@story(replace(SPEC, warm_pool=WarmPoolSpec(enabled=True, size=1)))
async def test_an_instance_of_the_pool_cannot_be_drained(world: World) -> None:
    await world.after(2.0)
    (instance,) = [agent for agent in world.agents if agent.pooled]
    with pytest.raises(UsageError, match="warm pool"):
        await world.fleet.drain(instance.id, now=False)


@story(replace(SPEC, restart=RestartSpec(crash_loop_failures=2)))
async def test_one_without_a_process_is_drained_too(world: World) -> None:
    await world.ready()
    victim = world.first
    for _ in range(2):
        world.machine.end(world.process(victim), code=1)
        await settled()
    await world.fleet.drain(victim.id, now=False)
    await world.after(1.0)
    assert victim.id not in [agent.id for agent in world.agents]
    assert len(world.agents) == world.fleet.wish.replicas == 1


@story()
async def test_a_drain_that_was_answered_counts_whenever_the_daemon_dies(world: World) -> None:
    await world.ready()
    stays, goes = world.agents
    await world.fleet.drain(goes.id, now=False)
    assert world.state.wishes["demo"][0].replicas == 2, "the test is to kill before that is stored"
    await world.kill_9()
    world.boot()
    await world.ready()
    assert ([agent.id for agent in world.agents], world.fleet.wish.replicas) == ([stays.id], 1)


@story()
async def test_of_an_acquisition_and_a_drain_in_a_row_both_count_after_a_kill(world: World) -> None:
    await world.ready()
    one, other = world.agents
    await world.fleet.drain(other.id, now=False)
    got = await world.fleet.acquire({}, require_warm=False, timeout_seconds=60.0)
    await world.fleet.drain(one.id, now=False)
    await world.kill_9()
    world.boot()
    await world.ready()
    assert [agent.id for agent in world.agents] == [got.agent_id]
    assert world.fleet.wish.replicas == 1


# -- on demand


@story()
async def test_a_checkpoint_on_demand_leaves_the_agent_alone(world: World) -> None:
    await world.ready()
    agent = world.first
    world.keep(agent, counter="7")
    saved = await world.fleet.checkpoint(agent.id, "asked for")
    assert saved.checkpoint is not None
    assert world.content(saved.checkpoint) == {"state/counter": "7"}
    await settled()
    assert (world.first.state, world.terms(agent)) == (S.RUNNING, 0)
    assert len(world.told("checkpoint.saved")) == 1


@story()
async def test_a_checkpoint_on_demand_that_does_not_work_is_an_error(world: World) -> None:
    await world.ready()
    world.keep(world.first, counter="7")
    world.fail()
    with pytest.raises(StateDirectoryError):
        await world.fleet.checkpoint(world.first.id, "asked for")
    assert world.fleet.supervisor.unsaved == {}


@story()
async def test_a_drain_waits_for_the_checkpoint_on_demand_that_is_under_way(world: World) -> None:
    await world.ready()
    agent = world.first
    world.keep(agent, counter="7")
    world.store.seconds = 5.0
    asking = asyncio.ensure_future(world.fleet.checkpoint(agent.id, "asked for"))
    await settled()
    await world.fleet.scale(1)
    await world.after(30.0)
    await asking
    assert sorted(one.reason for one in world.checkpoints) == ["asked for", "scaled down to 1"]


# -- restoring


async def drained(world: World, **files: str) -> Checkpoint:
    """A checkpoint of an agent that is gone."""
    await world.ready()
    victim = world.first
    world.keep(victim, **files)
    await world.fleet.drain(victim.id, now=False)
    await world.after(1.0)
    (checkpoint,) = world.checkpoints
    return checkpoint


@story()
async def test_a_restored_agent_is_one_more_and_finds_the_files_before_it_starts(world: World) -> None:
    checkpoint = await drained(world, counter="7")
    result = await world.fleet.restore(checkpoint, timeout_seconds=60.0)
    assert world.store.states[result.agent_id] == {"counter": b"7"}
    assert (len(world.agents), world.fleet.wish.replicas) == (2, 2)
    assert not result.from_warm_pool
    assert [one.cause for _, one in world.state.history][-1:] in (["restore"], ["drain"])


@story()
async def test_it_starts_from_the_checkpoint_until_it_has_been_ready_once(world: World) -> None:
    checkpoint = await drained(world, counter="7")
    restoring = asyncio.ensure_future(world.fleet.restore(checkpoint, timeout_seconds=60.0))
    await settled()
    (new,) = [agent for agent in world.agents if agent.restore]
    assert new.restore == f"{checkpoint.agent_id}/{checkpoint.id}"
    world.keep(new, counter="8")
    world.machine.end(world.process(new), code=1)  # it crashed before it was ready: once more, with what it has by now
    await settled()
    (again,) = [agent for agent in world.agents if agent.restore]
    assert (again.id, again.restarts) == (new.id, 1)
    assert world.store.states[new.id] == {"counter": b"8"}
    assert (await restoring).agent_id == new.id
    assert not [agent for agent in world.agents if agent.restore]


@story()
async def test_a_restored_agent_has_the_token_again(world: World) -> None:
    await world.ready()
    victim = world.first
    world.say(victim, resume="secret")
    await settled()
    await world.fleet.drain(victim.id, now=False)
    await world.after(1.0)
    result = await world.fleet.restore(world.checkpoints[0], timeout_seconds=60.0)
    assert world.fleet.find(result.agent_id).resume_token == "secret"


@story()
async def test_a_daemon_that_dies_while_it_restores_leaves_the_next_to_do_it(world: World) -> None:
    checkpoint = await drained(world, counter="7")
    world.store.seconds = 5.0
    restoring = asyncio.ensure_future(world.fleet.restore(checkpoint, timeout_seconds=60.0))
    await world.after(1.0)
    await world.kill_9()
    restoring.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await restoring
    world.boot()
    await world.after(20.0)
    (new,) = [agent for agent in world.agents if agent.id in world.store.states]
    assert (new.ready, world.store.states[new.id], world.fleet.wish.replicas) == (True, {"counter": b"7"}, 2)


@story()
async def test_without_room_a_restored_agent_waits_and_is_started_when_there_is(world: World) -> None:
    checkpoint = await drained(world, counter="7")
    world.fail(20.0)
    result = await world.fleet.restore(checkpoint, timeout_seconds=600.0)
    assert world.store.states[result.agent_id] == {"counter": b"7"}


@story()
async def test_a_checkpoint_that_vanished_fails_the_restore(world: World) -> None:
    checkpoint = await drained(world, counter="7")
    await world.store.remove(checkpoint.id)
    with pytest.raises(UnknownCheckpoint):
        await world.store.find(checkpoint.id)
    with pytest.raises(FleetctlError, match="not ready"):
        await world.fleet.restore(checkpoint, timeout_seconds=5.0)
    assert any("cannot be restored" in agent.note for agent in world.agents)


# -- at any moment


@story()
async def test_a_daemon_that_dies_while_it_saves_leaves_the_next_to_do_it_under_the_same_id(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.store.seconds = 5.0
    await world.fleet.scale(1)
    await world.after(1.0)
    planned = world.first.checkpoint
    await world.kill_9()
    assert world.terms(victim) == 0
    world.boot()
    await world.after(30.0)
    assert [(one.id, one.agent_id) for one in world.checkpoints] == [(planned, victim.id)]
    assert len(world.agents) == 1


@story()
async def test_after_a_reboot_what_a_leaving_agent_kept_is_saved(world: World) -> None:
    await world.ready()
    victim = world.first
    world.keep(victim, counter="7")
    world.store.seconds = 5.0
    await world.fleet.scale(1)
    await world.after(1.0)
    await world.kill_9()
    world.machine.reboot()
    world.boot()
    await world.after(30.0)
    assert [world.content(one) for one in world.checkpoints] == [{"state/counter": "7"}]
    assert victim.id not in world.store.states


class Worker:
    """An agent that counts: it takes work, and what it has done is in its counter."""

    def __init__(self, world: World, agent: Agent) -> None:
        self.world, self.agent_id = world, agent.id

    def work(self) -> None:
        found = self.world.store.states.setdefault(self.agent_id, {})
        found["counter"] = str(int(found.get("counter", b"0")) + 1).encode()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["drain", "drain now", "scale up", "scale down", "restart", "kill", "crash", "full", "work", "restore", "wait"]),
        st.integers(0, 3),
        st.sampled_from([0.0, 0.01, 0.3, 2.0]),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 2**32))
def test_whatever_happens_nothing_that_was_kept_is_lost(steps: list[tuple[str, int, float]], seed: int) -> None:
    world = World(replace(SPEC, checkpoints=CheckpointsSpec(keep=1000)))
    source = random.Random(seed)
    world.store.seconds = 0.05

    async def story(world: World) -> None:
        await world.ready()
        done: Counter[str] = Counter()  # by agent, how much of its work is to be found somewhere
        asking: list[asyncio.Task[SpawnResult]] = []
        for what, number, seconds in steps:
            agents = [agent for agent in world.agents if not agent.leaving]
            agent = agents[number % len(agents)] if agents else None
            with contextlib.suppress(FleetctlError):
                if what == "kill":
                    for task in asking:
                        task.cancel()
                    await asyncio.gather(*asking, return_exceptions=True)
                    asking.clear()
                    await world.kill_9()
                    world.boot()
                elif what == "full":
                    world.fail(source.random() * 10)
                elif what == "scale up":
                    await world.fleet.scale(min(6, world.fleet.wish.replicas + 1))
                elif what == "scale down":
                    await world.fleet.scale(max(1, world.fleet.wish.replicas - 1))
                elif what == "restore" and world.checkpoints:
                    one = source.choice(world.checkpoints)
                    asking.append(asyncio.ensure_future(world.fleet.restore(one, timeout_seconds=1.0)))
                elif agent is not None and what in ("drain", "drain now") and world.fleet.wish.replicas > 1:
                    await world.fleet.drain(agent.id, now=what == "drain now")
                elif agent is not None and what == "restart":
                    world.fleet.restart([agent.id], all_at_once=True)
                elif agent is not None and what == "crash" and world.machine.living(agent.id):
                    world.machine.end(world.process(agent), code=1)
                elif agent is not None and what == "work" and agent.process and world.machine.living(agent.id):
                    Worker(world, agent).work()
                    done[agent.id] += 1
            await world.after(seconds)
            world.check()
        await world.after(60.0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for agent_id, least in done.items():
            kept = int(world.store.states.get(agent_id, {}).get("counter", b"0"))
            contents = [content for checkpoint, content in world.store.saved.values() if checkpoint.agent_id == agent_id]
            most = max([kept, *(int(content.get("state/counter", b"0")) for content in contents)])
            assert most >= least, f"{agent_id} had done {least}, and {most} of it can be found"
        there = {agent.id for agent in world.agents}
        assert len(there) == world.fleet.wish.replicas
        for agent_id in world.store.states:
            saved = [checkpoint for checkpoint, _ in world.store.saved.values() if checkpoint.agent_id == agent_id]
            assert agent_id in there or world.told("checkpoint.failed"), f"what {agent_id} kept was left behind: {saved}"

    world.run(story)
