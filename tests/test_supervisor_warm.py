"""The warm pool in the loop, over fakes and in fake time: filled, handed out, refilled, and true over kills and full disks."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.contract import Message
from fleetctl.core.orders import Mode, Wish
from fleetctl.core.recover import recover, with_acquired
from fleetctl.errors import FleetctlError, SpawnFailed, StateDirectoryError, TimedOut, UsageError, WarmPoolEmpty
from fleetctl.fleet import Fleet
from fleetctl.models import (
    Agent,
    AgentState,
    FleetSpec,
    GracefulDrainSpec,
    ProcessRef,
    ReadinessSpec,
    RestartPolicy,
    RestartSpec,
    SpawnResult,
    WarmPoolSpec,
)
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeProcess, FakeStateManager, run_in_fake_time, settled

S = AgentState
SETTLE, DRAIN, INTERVAL = 0.25, 30.0, 3600.0
SPEC = FleetSpec(
    name="demo",
    command=("agent",),
    replicas=2,
    max_replicas=30,
    readiness=ReadinessSpec(settle_seconds=SETTLE),
    graceful_drain=GracefulDrainSpec(timeout_seconds=DRAIN),
    restart=RestartSpec(backoff_cap_seconds=2.0, crash_loop_failures=1000),
    warm_pool=WarmPoolSpec(enabled=True, size=3, refresh_interval_seconds=INTERVAL, reads_claim=True),
)


class World:
    """A machine and a disk, and one daemon after the other with a manager of the fleet."""

    def __init__(self, spec: FleetSpec = SPEC) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)
        self.state = FakeStateManager()
        self.state.wishes[spec.name] = (spec, False)
        self.handed: list[SpawnResult] = []
        self.asking: list[asyncio.Task[None]] = []
        self.mode = Mode.RUN

    def run(self, story: Callable[["World"], Awaitable[None]]) -> None:
        async def told() -> None:
            self.boot()
            await story(self)
            self.check()
            for task in self.asking:
                task.cancel()
            await asyncio.gather(*self.asking, return_exceptions=True)
            await self.fleet.close()

        run_in_fake_time(self.clock, told())

    def boot(self) -> None:
        """A daemon starts, with what is on disk and what lives; as `Control.restore` does it."""
        self.lifecycle = FakeLifecycleManager(self.machine)
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
        wish = Wish(spec=spec, down=down, mode=self.mode)
        self.fleet = Fleet(wish, lifecycle_manager=self.lifecycle, state_manager=self.state, clock=self.clock, agents=agents)
        self.task = self.fleet.start()

    async def kill_9(self) -> None:
        """The daemon dies where it stands, and with it all it knew; who was waiting for an answer gets none."""
        for task in self.asking:
            task.cancel()
        await asyncio.gather(*self.asking, return_exceptions=True)
        self.asking.clear()
        await self.fleet.close()

    async def after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await settled()

    async def fleet_does(self, change: Awaitable[object]) -> None:
        """A change that a full disk may refuse."""
        with contextlib.suppress(FleetctlError):  # it was not promised, and what is in force is what is stored
            await change

    async def insist(self, change: Callable[[], Awaitable[object]]) -> None:
        """Ask until the disk has room for it."""
        while True:
            try:
                await change()
                return
            except StateDirectoryError:
                await self.after(1.0)

    async def full(self) -> None:
        """Long enough for every replica to be ready and for the pool to fill."""
        await self.after(20 * (SETTLE + 0.01))

    async def acquire(self, **claim: object) -> SpawnResult:
        result = await self.fleet.acquire(claim, require_warm=False, timeout_seconds=60.0)
        self.handed.append(result)
        return result

    def ask(self, *, require_warm: bool = False, **claim: object) -> None:
        """Acquire one beside the story."""

        async def asking() -> None:
            with contextlib.suppress(FleetctlError):  # refused: nothing was handed out
                self.handed.append(await self.fleet.acquire(claim, require_warm=require_warm, timeout_seconds=5.0))

        self.asking.append(asyncio.ensure_future(asking()))

    @property
    def agents(self) -> tuple[Agent, ...]:
        return self.fleet.agents

    @property
    def pool(self) -> list[Agent]:
        return [agent for agent in self.agents if agent.pooled]

    @property
    def replicas(self) -> list[Agent]:
        return [agent for agent in self.agents if not agent.pooled and not agent.leaving]

    def process(self, agent: Agent | str) -> FakeProcess:
        return self.machine.leader(agent if isinstance(agent, str) else agent.id)

    def states(self) -> list[tuple[AgentState, bool]]:
        """State and whether it counts as a replica."""
        return sorted((agent.state, not agent.pooled) for agent in self.agents)

    def check(self) -> None:
        """What must hold whenever nothing is under way, however we got here."""
        if self.task.done():
            self.task.result()
        ids = [result.agent_id for result in self.handed]
        assert len(set(ids)) == len(ids), "an agent in two hands"
        living = self.machine.living()
        assert {process.token for process in living} <= {agent.token for agent in self.agents}, "a process nobody looks after"
        for agent in self.agents:
            tree = self.machine.living(agent.id)
            if agent.state is S.SUSPENDED:
                assert agent.pooled
                assert not agent.ready
                assert all(process.stopped for process in tree), "an instance of the pool that runs"
            elif agent.state is S.RUNNING:
                assert not any(process.stopped for process in tree), "a replica that is stopped"

    async def at_rest(self) -> None:
        await self.after(10 * DRAIN)
        self.check()
        expected = 0 if self.fleet.wish.down else self.fleet.spec.replicas
        size = self.fleet.spec.warm_pool.size if self.fleet.spec.warm_pool.enabled and expected else 0
        assert self.states() == sorted([(S.RUNNING, True)] * expected + [(S.SUSPENDED, False)] * size)
        stored, down = self.state.wishes[SPEC.name]
        assert (stored, down) == (self.fleet.spec, self.fleet.wish.down)
        assert dict(self.state.agents) == {agent.id: agent for agent in self.agents}
        assert not any(agent.wish_owed or agent.resume_owed for agent in self.agents)


def story(spec: FleetSpec = SPEC) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """Makes a test of what happens in a world."""

    def decorate(function: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            World(spec).run(function)

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


def with_pool(**changes: Any) -> FleetSpec:  # Any: fields of WarmPoolSpec
    return replace(SPEC, warm_pool=replace(SPEC.warm_pool, **changes))


# -- filling


@story()
async def test_the_pool_fills_behind_the_replicas_two_at_a_time(world: World) -> None:
    await settled()
    assert world.states() == [(S.STARTING, True)] * 2
    await world.after(SETTLE)
    assert world.states() == [(S.RUNNING, True)] * 2 + [(S.STARTING, False)] * 2
    await world.after(SETTLE)
    assert world.states() == [(S.RUNNING, True)] * 2 + [(S.STARTING, False)] + [(S.SUSPENDED, False)] * 2
    await world.after(SETTLE)
    assert world.states() == [(S.RUNNING, True)] * 2 + [(S.SUSPENDED, False)] * 3
    assert (world.fleet.ready_replicas, world.fleet.wish.replicas) == (2, 2)
    assert world.fleet.warm_pool_stats() == {
        "enabled": True,
        "current_size": 3,
        "target_size": 3,
        "hits": 0,
        "misses": 0,
        "hit_rate_percent": None,
    }


@story()
async def test_a_full_pool_costs_nothing_until_its_instances_are_stale(world: World) -> None:
    await world.full()
    attempts = world.state.attempts
    await world.after(1.8 * INTERVAL)
    assert world.state.attempts == attempts


@story()
async def test_stale_instances_are_replaced_by_and_by(world: World) -> None:
    await world.full()
    before = {agent.id for agent in world.pool}
    ends = {agent.stale_deadline for agent in world.pool}
    assert len(ends) == 3
    assert all(deadline and 1.8 * INTERVAL < deadline - 1000.0 < 2.2 * INTERVAL for deadline in ends)
    await world.after(2.2 * INTERVAL)
    assert not before & {agent.id for agent in world.pool}
    assert len(world.fleet.warm_instances) == 3
    assert all(process.exit and process.exit.signal == 15 for process in world.machine.processes.values() if process.agent_id in before)


@story()
async def test_an_instance_that_cannot_be_suspended_is_replaced(world: World) -> None:
    await world.after(SETTLE)
    (first, second) = [agent.id for agent in world.pool]
    world.lifecycle.cannot_suspend.add(first)
    await world.full()
    assert len(world.fleet.warm_instances) == 3
    assert first not in {agent.id for agent in world.agents}
    assert second in {agent.id for agent in world.pool}


@story(replace(SPEC, restart=replace(SPEC.restart, policy=RestartPolicy.NEVER)))
async def test_an_instance_that_dies_in_the_pool_is_replaced_whatever_the_restart_policy(world: World) -> None:
    await world.full()
    victim = world.pool[1]
    world.machine.end(world.process(victim), signal=9)
    await world.full()
    assert len(world.fleet.warm_instances) == 3
    assert victim.id not in {agent.id for agent in world.agents}
    assert world.lifecycle.discarded == [victim.id]


@story()
async def test_an_instance_that_a_stranger_continued_is_replaced(world: World) -> None:
    await world.full()
    victim = world.pool[0]
    world.machine.send(world.process(victim), 18)
    world.fleet.supervisor.woken([victim.id])
    await world.full()
    assert len(world.fleet.warm_instances) == 3
    assert victim.id not in {agent.id for agent in world.agents}
    assert "agent.woken" in [event.kind for event in world.state.events]


@story()
async def test_the_pool_follows_its_size(world: World) -> None:
    await world.full()
    replicas = {agent.id: agent.process for agent in world.replicas}
    for size in (5, 1, 0, 2):
        await world.fleet.resize_warm_pool(size)
        await world.full()
        assert len(world.fleet.warm_instances) == len(world.pool) == size
    assert {agent.id: agent.process for agent in world.replicas} == replicas


@story()
async def test_a_fleet_that_runs_nothing_holds_nothing_ready(world: World) -> None:
    await world.full()
    await world.fleet.scale(0)
    await world.full()
    assert world.agents == ()
    assert world.fleet.warm_pool_stats()["target_size"] == 0
    await world.fleet.scale(1)
    await world.full()
    assert world.states() == [(S.RUNNING, True)] + [(S.SUSPENDED, False)] * 3


@story()
async def test_going_down_ends_the_pool_at_once_by_the_stop_signal(world: World) -> None:
    await world.full()
    await world.fleet.take_down(now=False)
    await settled()
    assert world.agents == ()
    assert [process.exit.signal for process in world.machine.processes.values() if process.exit] == [15] * 5
    assert world.lifecycle.killed == []


@story()
async def test_going_down_in_the_middle_of_a_suspension_leaves_nobody_stopped(world: World) -> None:
    world.lifecycle.suspend_seconds = 0.1
    await world.after(2 * SETTLE + 0.05)
    assert sum(process.stopped for process in world.machine.living()) == 2
    assert world.fleet.warm_instances == ()
    await world.fleet.take_down(now=False)
    await world.after(0.1)
    assert world.machine.living() == []
    assert world.lifecycle.killed == []


@story()
async def test_agents_are_handed_out_while_others_are_being_suspended(world: World) -> None:
    await world.full()
    world.lifecycle.suspend_seconds = 10.0
    first = await world.acquire()
    await world.after(SETTLE + 0.1)
    at = world.clock.monotonic()
    assert (await world.acquire()).agent_id != first.agent_id
    assert world.clock.monotonic() == at
    await world.at_rest()


@story()
async def test_the_pool_ends_with_the_daemon_and_is_filled_anew_by_the_next(world: World) -> None:
    await world.full()
    before = {agent.id for agent in world.pool}
    replicas = {agent.id for agent in world.replicas}
    world.fleet.stop_with_daemon()
    await settled()
    assert world.machine.living() == []
    await world.kill_9()
    world.boot()
    await settled()
    assert [agent for agent in world.agents if agent.pooled] == []
    await world.full()
    assert {agent.id for agent in world.replicas} == replicas
    assert len(world.fleet.warm_instances) == 3
    assert not before & {agent.id for agent in world.pool}


@story()
async def test_a_held_fleet_sleeps_although_its_instances_are_stale(world: World) -> None:
    await world.full()
    await world.kill_9()
    world.mode = Mode.HOLD
    world.boot()
    await world.after(3 * INTERVAL)
    assert len(world.fleet.warm_instances) == 3


@story()
async def test_a_restart_retires_the_pool(world: World) -> None:
    await world.full()
    before = {agent.id: agent.process for agent in world.agents}
    world.fleet.restart(None, all_at_once=False)
    await world.full()
    assert {agent.id for agent in world.replicas} <= before.keys()
    assert not before.keys() & {agent.id for agent in world.pool}
    assert not set(before.values()) & {agent.process for agent in world.agents}
    assert len(world.fleet.warm_instances) == 3


@story()
async def test_a_changed_spec_retires_the_pool(world: World) -> None:
    await world.full()
    before = {agent.id for agent in world.pool}
    changed = replace(SPEC, environment={"A": "1"})
    await world.fleet.apply(changed)
    await world.full()
    assert not before & {agent.id for agent in world.pool}
    assert {agent.spec_hash for agent in world.agents} == {changed.process_hash}
    assert len(world.fleet.warm_instances) == 3


@story()
async def test_after_a_reboot_the_pool_does_not_start_before_the_replicas(world: World) -> None:
    await world.full()
    await world.kill_9()
    world.machine.reboot()
    world.boot()
    await settled()
    assert {process.agent_id for process in world.machine.living()} == {agent.id for agent in world.replicas}
    await world.after(SETTLE)
    assert sum(process.warm for process in world.machine.living()) == 2
    await world.at_rest()


@story(with_pool(size=5))
async def test_instances_that_do_not_start_back_off_and_keep_nobody_waiting(world: World) -> None:
    await world.after(SETTLE - 0.1)
    world.lifecycle.spawn_errors.extend(SpawnFailed("cannot start 'agent'", permanent=True) for _ in range(6))
    await world.after(0.2)
    assert world.fleet.ready_replicas == 2
    await world.full()
    assert len(world.fleet.warm_instances) == 5


@story()
async def test_with_a_lost_database_suspended_instances_are_found_again_as_such(world: World) -> None:
    await world.full()
    before = {agent.process for agent in world.agents}
    await world.kill_9()
    world.state.agents.clear()
    world.boot()
    await world.full()
    assert {agent.process for agent in world.agents} == before
    await world.at_rest()


# -- handing out


@story(replace(with_pool(reads_claim=False), environment={"A": "1"}))
async def test_variables_reach_a_program_that_does_not_know_fleetctl_only_by_a_cold_start(world: World) -> None:
    await world.full()
    with pytest.raises(WarmPoolEmpty, match="reads no claim"):
        await world.fleet.acquire({"environment": {"TASK": "7"}}, require_warm=True, timeout_seconds=5.0)
    assert not (await world.acquire(environment={"TASK": "7"})).from_warm_pool
    assert (await world.acquire(environment={"A": "1"}, tools=["search"])).from_warm_pool  # as it runs already
    oldest = min(world.pool, key=lambda agent: agent.started_clock or 0.0)
    world.fleet.supervisor.notified(oldest.id, Message(extension=True))
    await settled()
    result = await world.acquire(environment={"TASK": "8"})
    assert (result.agent_id, result.from_warm_pool) == (oldest.id, True)


@story()
async def test_acquire_hands_out_the_oldest_at_once_and_the_pool_refills(world: World) -> None:
    await world.full()
    oldest = min(world.pool, key=lambda agent: agent.started_clock or 0.0)
    at = world.clock.monotonic()
    result = await world.acquire(environment={"TASK": "7"}, tools=["search"])
    assert world.clock.monotonic() == at
    assert result == SpawnResult(agent_id=oldest.id, state=S.RUNNING, from_warm_pool=True, pid=world.process(oldest).ref.pid)
    assert not world.process(oldest).stopped
    assert world.lifecycle.claims[oldest.id] == {
        "schema": "fleetctl/claim/v1",
        "agent_id": oldest.id,
        "fleet": "demo",
        "slot": oldest.slot,
        "environment": {"TASK": "7"},
        "tools": ["search"],
    }
    assert (world.fleet.wish.replicas, world.fleet.ready_replicas) == (3, 3)
    assert len(list(world.fleet.warm_instances)) == 2
    await world.full()
    assert len(world.fleet.warm_instances) == 3
    assert world.state.wishes["demo"][0].replicas == 3
    ((_, decision),) = world.state.history
    assert (decision.current_replicas, decision.target_replicas, decision.cause) == (2, 3, "acquire")
    assert world.fleet.warm_pool_stats()["hit_rate_percent"] == 100.0
    await world.at_rest()


@story()
async def test_it_counts_on_disk_before_it_goes_on(world: World) -> None:
    await world.full()
    asked = asyncio.ensure_future(world.acquire())
    while not world.lifecycle.resumed:
        await asyncio.sleep(0)
    (agent_id,) = world.lifecycle.resumed
    assert (world.state.agents[agent_id].resume_owed, world.state.agents[agent_id].wish_owed) == (True, 3)
    await asked


@story()
async def test_more_than_the_pool_holds_start_cold_with_their_claims(world: World) -> None:
    await world.full()
    results = await asyncio.gather(*(world.acquire(tools=[str(number)]) for number in range(5)))
    assert [result.from_warm_pool for result in results] == [True] * 3 + [False] * 2
    assert len({result.agent_id for result in results}) == 5
    for number, result in enumerate(results):
        assert world.lifecycle.claims[result.agent_id]["tools"] == [str(number)]
    assert world.fleet.wish.replicas == 7
    stats = world.fleet.warm_pool_stats()
    assert (stats["hits"], stats["misses"], stats["hit_rate_percent"]) == (3, 2, 60.0)
    await world.at_rest()


@story(with_pool(enabled=False))
async def test_without_a_pool_acquire_starts_one(world: World) -> None:
    await world.full()
    result = await world.acquire()
    assert (result.from_warm_pool, result.state) == (False, S.RUNNING)
    with pytest.raises(WarmPoolEmpty):
        await world.fleet.acquire({}, require_warm=True, timeout_seconds=1.0)
    assert world.fleet.wish.replicas == 3


@story(replace(SPEC, max_replicas=3))
async def test_acquire_keeps_to_the_bounds(world: World) -> None:
    await world.full()
    await world.acquire()
    with pytest.raises(UsageError, match="max_replicas"):
        await world.acquire()
    assert len(world.fleet.warm_instances) == 2
    await world.at_rest()


@pytest.mark.parametrize("warm", [True, False])
def test_of_a_fleet_that_goes_down_nothing_is_handed_out(warm: bool) -> None:
    async def story(world: World) -> None:
        await world.full()
        world.lifecycle.ignore_stop = True
        await world.fleet.take_down(now=False)
        with pytest.raises(FleetctlError, match="taken down"):
            await world.fleet.acquire({}, require_warm=warm, timeout_seconds=1.0)
        await world.at_rest()

    World().run(story)


@story(with_pool(enabled=False))
async def test_a_cold_start_that_takes_too_long_says_so_and_goes_on(world: World) -> None:
    await world.full()
    with pytest.raises(TimedOut, match="goes on starting"):
        await world.fleet.acquire({}, require_warm=False, timeout_seconds=SETTLE / 2)
    await world.full()
    assert world.fleet.ready_replicas == 3


@story()
async def test_one_that_dies_on_the_way_out_is_made_up_for_by_the_next(world: World) -> None:
    await world.full()
    oldest = min(world.pool, key=lambda agent: agent.started_clock or 0.0)
    asked = asyncio.ensure_future(world.acquire())
    while world.fleet.wish.replicas == 2:
        await asyncio.sleep(0)
    world.machine.end(world.process(oldest), signal=9)
    assert world.lifecycle.resumed == []
    result = await asked
    assert result.agent_id != oldest.id
    assert result.from_warm_pool
    assert world.fleet.wish.replicas == 3
    await world.at_rest()


@story()
async def test_one_that_cannot_go_on_is_made_up_for_by_the_next(world: World) -> None:
    await world.full()
    first, second, _ = sorted(world.pool, key=lambda agent: agent.started_clock or 0.0)
    world.lifecycle.cannot_resume.add(first.id)
    assert (await world.acquire()).agent_id == second.id
    assert world.fleet.wish.replicas == 3
    world.lifecycle.cannot_resume.clear()
    await world.after(DRAIN)
    await world.at_rest()


@story(replace(SPEC, replicas=20))
async def test_whoever_asks_while_many_are_started_does_not_wait_for_all_of_them(world: World) -> None:
    await world.full()
    spawn = world.lifecycle.spawn
    started: list[bool] = []

    def spawn_and_ask(agent: Agent, spec: FleetSpec) -> ProcessRef:
        if not started:
            world.ask(require_warm=True)
        started.append(bool(world.handed))
        return spawn(agent, spec)

    world.lifecycle.spawn = spawn_and_ask  # type: ignore[method-assign]
    for agent in world.replicas:
        world.machine.end(world.process(agent), code=1)
    await world.after(5.0)
    assert len(started) >= 20
    assert started[:20].count(True) >= 10


@story()
async def test_two_at_the_same_time_get_two(world: World) -> None:
    await world.full()
    first, second = await asyncio.gather(world.acquire(), world.acquire())
    assert first.agent_id != second.agent_id
    assert world.fleet.wish.replicas == 4


@story()
async def test_whoever_stops_waiting_does_not_take_one_along(world: World) -> None:
    await world.full()
    for steps in range(30):
        asked = asyncio.ensure_future(world.acquire())
        for _ in range(steps):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await world.full()
        world.check()
        assert world.fleet.wish.replicas == len(world.replicas) == world.fleet.ready_replicas
        assert world.state.wishes["demo"][0] == world.fleet.spec
        await world.fleet.scale(2)
        await world.full()


@story()
async def test_scaling_up_takes_warm_ones_first(world: World) -> None:
    await world.full()
    warm = {agent.id for agent in world.pool}
    await world.fleet.scale(6)
    await settled()
    assert world.fleet.ready_replicas == 5
    assert warm <= {agent.id for agent in world.replicas}
    assert all(world.lifecycle.claims[agent_id]["tools"] == [] for agent_id in warm)
    await world.at_rest()


@story()
async def test_scaling_down_ends_replicas_and_leaves_the_pool(world: World) -> None:
    await world.full()
    pool = {agent.process for agent in world.pool}
    await world.fleet.scale(1)
    await world.full()
    assert {agent.process for agent in world.pool} == pool
    assert len(world.replicas) == 1


@story()
async def test_a_smaller_size_asked_for_after_an_acquisition_holds_over_a_kill(world: World) -> None:
    await world.full()
    await world.acquire()
    await world.fleet.scale(1)
    await world.kill_9()
    world.boot()
    assert world.fleet.wish.replicas == 1
    await world.at_rest()


# -- full disks


@story()
async def test_on_a_full_disk_nothing_is_handed_out_and_nothing_is_lost(world: World) -> None:
    await world.full()
    pool = {agent.process for agent in world.pool}
    world.state.fails = lambda attempt: True
    for _ in range(3):
        with pytest.raises(StateDirectoryError):
            await world.acquire()
    assert world.fleet.wish.replicas == 2
    assert all(process.stopped for process in world.machine.living() if process.warm)
    world.state.fails = lambda attempt: False
    await world.after(5.0)
    assert {agent.process for agent in world.pool} == pool
    assert (await world.acquire()).from_warm_pool
    await world.at_rest()


@story()
async def test_a_claim_that_cannot_be_written_leaves_the_instance_in_the_pool(world: World) -> None:
    await world.full()
    pool = {agent.process for agent in world.pool}
    world.lifecycle.claim_errors.append(StateDirectoryError("no space left on device"))
    with pytest.raises(StateDirectoryError):
        await world.acquire()
    assert world.fleet.wish.replicas == 2
    await world.after(5.0)
    assert {agent.process for agent in world.pool} == pool
    await world.at_rest()


@story(with_pool(enabled=False))
async def test_a_cold_start_waits_until_its_claim_can_be_written(world: World) -> None:
    await world.full()
    world.lifecycle.claim_errors.append(StateDirectoryError("no space left on device"))
    result = await world.acquire(tools=["a"])
    assert world.lifecycle.claims[result.agent_id]["tools"] == ["a"]


async def everything(world: World) -> None:
    """A life of a pool, each part with time for a disk to heal."""
    await world.after(8.0)
    for _ in range(2):
        world.ask()
        await world.after(3.0)
    await world.insist(lambda: world.fleet.scale(5))
    await world.after(5.0)
    world.machine.end(world.process(world.pool[0]), signal=9)
    await world.after(5.0)
    await world.insist(lambda: world.fleet.resize_warm_pool(1))
    await world.after(5.0)
    await world.at_rest()
    await world.insist(lambda: world.fleet.take_down(now=False))
    await world.at_rest()
    assert world.machine.living() == []
    assert world.state.agents == {}


@pytest.mark.parametrize("long", [1, 3])
def test_a_full_disk_at_any_moment_loses_nothing_and_heals(long: int) -> None:
    whole = World()
    whole.run(everything)
    assert whole.state.attempts > 40
    for first in range(whole.state.attempts):
        world = World()
        world.state.fails = lambda attempt, first=first: first <= attempt < first + long  # type: ignore[misc]  # the default binds it
        world.run(everything)


# -- kill -9


async def killed_after(world: World, steps: int, pool_size: int = 3) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)
    answered = len(world.handed)
    stored = world.state.wishes["demo"][0].replicas
    await world.kill_9()
    world.boot()
    assert world.fleet.wish.replicas >= stored
    await world.at_rest()
    assert len(world.pool) == pool_size
    kept = {agent.id for agent in world.replicas}
    assert {result.agent_id for result in world.handed[:answered]} <= kept, "an acquired agent is lost"


@pytest.mark.parametrize("steps", range(40))
def test_a_kill_while_the_pool_fills_leaves_no_instance_running_and_no_replica_stopped(steps: int) -> None:
    async def story(world: World) -> None:
        await world.after(SETTLE)
        await asyncio.sleep(SETTLE - 2e-6)
        before = {process.ref for process in world.machine.living()}
        await killed_after(world, steps)
        assert before <= {agent.process for agent in world.agents}
        assert world.fleet.wish.replicas == 2

    World().run(story)


@pytest.mark.parametrize("steps", range(40))
def test_a_kill_while_agents_are_acquired_loses_none_and_counts_each_once(steps: int) -> None:
    async def story(world: World) -> None:
        await world.full()
        before = {process.ref for process in world.machine.living()}
        for _ in range(4):
            world.ask()
        await killed_after(world, steps)
        assert before <= {agent.process for agent in world.agents}, "a process was given up"
        assert 2 + len(world.handed) <= world.fleet.wish.replicas <= 6

    World().run(story)


@pytest.mark.parametrize("milliseconds", [0, 90, 101, 150])
def test_a_kill_after_the_answer_counts_the_agent_once(milliseconds: int) -> None:
    async def story(world: World) -> None:
        await world.full()
        await world.acquire()
        await world.after(milliseconds / 1000)
        await killed_after(world, 0)
        assert world.fleet.wish.replicas == 3
        await killed_after(world, 0)
        assert world.fleet.wish.replicas == 3

    World().run(story)


@pytest.mark.parametrize("steps", range(30))
def test_a_kill_while_scaling_up_with_warm_ones_leaves_none_of_them_stopped(steps: int) -> None:
    async def story(world: World) -> None:
        await world.full()
        await world.fleet.scale(4)
        await killed_after(world, steps)
        assert len(world.machine.processes) == 2 + 3 + 2

    World().run(story)


@story()
async def test_a_claim_that_was_heard_already_is_not_overwritten_after_a_kill(world: World) -> None:
    await world.full()
    world.ask(tools=["a"])
    while not world.lifecycle.resumed:
        await asyncio.sleep(0)
    (agent_id,) = world.lifecycle.resumed
    await world.fleet.close()
    assert world.state.agents[agent_id].resume_owed
    written = world.lifecycle.claims
    await world.kill_9()
    world.boot()
    world.lifecycle.claims = written
    await world.at_rest()
    assert written[agent_id]["tools"] == ["a"]
    assert agent_id in {agent.id for agent in world.replicas}


@story()
async def test_a_claim_of_whoever_never_got_the_agent_is_not_left_to_the_next(world: World) -> None:
    await world.full()
    world.state.fails = lambda attempt: True
    with pytest.raises(StateDirectoryError):
        await world.acquire(tools=["a"])
    ((agent_id, claim),) = [(key, claim) for key, claim in world.lifecycle.claims.items() if claim["tools"]]
    assert claim["tools"] == ["a"]
    written = world.lifecycle.claims
    await world.kill_9()
    world.state.fails = lambda attempt: False
    world.boot()
    world.lifecycle.claims = written
    await world.fleet.scale(3)
    await world.at_rest()
    assert [agent.id for agent in world.replicas if agent.from_warm_pool] == [agent_id]
    assert written[agent_id]["tools"] == []


MOVES = ["ask", "ask warm", "scale", "resize", "down", "up", "roll", "change", "crash", "wake", "stubborn", "kill", "fill", "heal", "wait"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 30)), max_size=25))
def test_any_history_hands_each_agent_to_one_and_ends_as_wished(moves: list[tuple[str, int]]) -> None:
    async def story(world: World) -> None:
        for move, number in moves:
            await step(world, move, number)
            for _ in range(number):
                await asyncio.sleep(0)
            leaders = [process.agent_id for process in world.machine.living() if process.leads]
            assert len(leaders) == len(set(leaders)), "an agent runs twice"
        world.state.fails = lambda attempt: False
        world.lifecycle.cannot_resume.clear()
        world.lifecycle.cannot_suspend.clear()
        await world.at_rest()

    World().run(story)


async def step(world: World, move: str, number: int) -> None:
    living = world.machine.living()
    fleet = world.fleet
    match move:
        case "ask" | "ask warm":
            for _ in range(1 + number % 3):
                world.ask(require_warm=move == "ask warm")
        case "scale":
            await world.fleet_does(fleet.scale(number % 7))
        case "resize":
            await world.fleet_does(fleet.resize_warm_pool(number % 5))
        case "down":
            await world.fleet_does(fleet.take_down(now=number % 2 == 0))
        case "up":
            await world.fleet_does(fleet.apply(replace(fleet.spec, replicas=2)))
        case "change":
            await world.fleet_does(fleet.apply(replace(fleet.spec, environment={"V": str(number)})))
        case "roll":
            fleet.restart(None, all_at_once=number % 2 == 0)
        case "crash" if living:
            world.machine.end(living[number % len(living)], code=number % 3)
        case "wake" if fleet.warm_instances:
            victim = fleet.warm_instances[number % len(fleet.warm_instances)]
            for process in world.machine.living(victim.id):
                world.machine.send(process, 18)
            fleet.supervisor.woken([victim.id])
        case "stubborn" if living:
            victim_id = living[number % len(living)].agent_id
            (world.lifecycle.cannot_resume if number % 2 else world.lifecycle.cannot_suspend).add(victim_id)
        case "kill":
            await world.kill_9()
            world.boot()
        case "fill":
            world.state.fails = lambda attempt: True
        case "heal":
            world.state.fails = lambda attempt: False
        case "wait":
            await world.after(number / 10)


@story(replace(with_pool(), tools=("read",)))
async def test_every_replica_is_told_its_tools_and_one_that_was_acquired_keeps_what_it_was_told(world: World) -> None:
    await world.full()
    claims = world.lifecycle.claims
    assert {key: claim["tools"] for key, claim in claims.items()} == {agent.id: ["read"] for agent in world.replicas}
    acquired = [
        (await world.acquire(tools=["write"])).agent_id,
        (await world.fleet.acquire({}, require_warm=True, timeout_seconds=5.0)).agent_id,
    ]
    assert [claims[agent_id]["tools"] for agent_id in acquired] == [["write"], ["read"]]
    assert {claim["agent_id"] for claim in claims.values()} == claims.keys()
    world.fleet.restart(None, all_at_once=True)
    await world.at_rest()
    assert claims[acquired[0]]["tools"] == ["write"]
