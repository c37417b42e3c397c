"""Limits of a fleet: changed while agents run, and watched where nothing else holds them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from fleetctl.core.orders import Wish
from fleetctl.fleet import Fleet
from fleetctl.models import FleetSpec, ResourceLimitsSpec, Usage
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled

SPEC = FleetSpec(name="demo", command=("agent",), replicas=2, resource_limits=ResourceLimitsSpec(memory_limit_mb=100))


def run(story: Callable[[Fleet, FakeLifecycleManager], Awaitable[None]]) -> None:
    clock = FakeClock()
    lifecycle = FakeLifecycleManager(FakeMachine(clock))

    async def told() -> None:
        fleet = Fleet(Wish(spec=SPEC), lifecycle_manager=lifecycle, state_manager=FakeStateManager(), clock=clock)
        fleet.start()
        await asyncio.sleep(2.0)
        await story(fleet, lifecycle)
        await fleet.close()

    run_in_fake_time(clock, told())


def used(mebibytes: int) -> Usage:
    return Usage(cpu_percent=0.0, memory_bytes=mebibytes << 20, processes=1)


def test_who_uses_more_than_it_may_is_stopped_and_comes_back_with_the_reason() -> None:
    async def story(fleet: Fleet, lifecycle: FakeLifecycleManager) -> None:
        lifecycle.only_watched = ("memory_limit_mb",)
        greedy, modest = fleet.agents
        fleet.observe({greedy.id: used(101), modest.id: used(100)})
        await settled()
        assert {agent_id for agent_id, _ in lifecycle.sent} == {greedy.id}
        await asyncio.sleep(2.0)
        again = next(agent for agent in fleet.agents if agent.id == greedy.id)
        assert (again.restarts, again.ready) == (1, True)
        assert str(again.last_exit).endswith("stopped: it uses 101 MiB, more than memory_limit_mb = 100")

    run(story)


def test_what_a_control_group_holds_is_not_judged_a_second_time() -> None:
    async def story(fleet: Fleet, lifecycle: FakeLifecycleManager) -> None:
        fleet.observe({agent.id: used(101) for agent in fleet.agents})
        await settled()
        assert not lifecycle.sent

    run(story)


def test_changed_limits_reach_running_agents_and_restart_none() -> None:
    async def story(fleet: Fleet, lifecycle: FakeLifecycleManager) -> None:
        await fleet.apply(replace(SPEC, graceful_drain=replace(SPEC.graceful_drain, timeout_seconds=9.0)))
        assert not lifecycle.limited
        await fleet.apply(replace(SPEC, resource_limits=ResourceLimitsSpec(memory_limit_mb=200, cpu_limit=1.0)))
        assert sorted(lifecycle.limited) == sorted(agent.id for agent in fleet.agents)
        await asyncio.sleep(5.0)
        assert len(lifecycle.spawned) == 2

    run(story)


def test_open_files_cannot_be_changed_under_a_running_program_so_it_is_replaced() -> None:
    changed = replace(SPEC, resource_limits=replace(SPEC.resource_limits, nofile=100))
    assert changed.process_hash != SPEC.process_hash
    assert replace(SPEC, resource_limits=ResourceLimitsSpec(cpu_limit=1.0)).process_hash == SPEC.process_hash
