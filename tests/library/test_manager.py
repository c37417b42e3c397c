"""FleetManager's contract, method by method and error by error, over the public fakes in fake time."""

import asyncio
import math
import re
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fleetctl import AgentConfig, AgentState, FleetManager, ScalingDecision, ScalingMetrics, WarmInstance
from fleetctl.errors import ConfigError, FleetctlError, ScaleDownFailed, ScaleUpFailed, SpawnFailed, UsageError
from fleetctl.models import ProcessRef, Usage
from fleetctl.testing import (
    FakeLifecycleManager,
    FakeMachine,
    FakeProcess,
    FakeResourceManager,
    FakeStateManager,
    run_in_fake_time,
    settled,
)

SETTLE, DRAIN = 1.0, 30.0
NO_POOL: Mapping[str, Any] = {"warm_pool": {"enabled": False}}
TEMPLATE = AgentConfig(command=["agent"], environment={"ENV": "production"}, tools=["Read"])


@dataclass
class World:
    """A machine and a disk that outlive the program, and what one program has of them."""

    machine: FakeMachine = field(default_factory=FakeMachine)
    state: FakeStateManager = field(default_factory=FakeStateManager)
    resources: FakeResourceManager = field(default_factory=FakeResourceManager)
    config: Mapping[str, Any] = field(default_factory=dict)

    def run(self, story: Callable[[FleetManager], Awaitable[None]], *, cleanup: bool = True) -> None:
        """One program. Without `cleanup` it is killed where the story ends."""

        async def told() -> None:
            self.lifecycle = FakeLifecycleManager(self.machine)
            fleet = FleetManager(config=self.config)
            await fleet.initialize(self.lifecycle, self.state, self.resources, clock=self.machine.clock)
            await story(fleet)
            if cleanup:
                await fleet.cleanup()
                assert not self.machine.living()

        run_in_fake_time(self.machine.clock, told())

    def living(self, *, stopped: bool = False) -> list[FakeProcess]:
        return [process for process in self.machine.living() if process.stopped == stopped]

    def use(self, cpu_percent: float) -> None:
        """All that live are this busy."""
        self.resources.usage = {
            process.agent_id: Usage(cpu_percent=cpu_percent, memory_bytes=1 << 20, processes=1, frozen=process.stopped)
            for process in self.machine.living()
        }


def world(**config: Any) -> World:
    return World(config={**NO_POOL, **config})


def with_pool(size: int, **config: Any) -> World:
    return World(config={"warm_pool": {"size": size}, **config})


def states(results: list[Any]) -> list[tuple[AgentState, bool]]:
    return [(result.state, result.from_warm_pool) for result in results]


RUNNING = (AgentState.RUNNING, False)
WARM = (AgentState.RUNNING, True)


# -- the configuration


def test_the_defaults_are_the_specifications() -> None:
    fleet = FleetManager()
    health, pool = fleet.get_health_status(), fleet.get_warm_pool_stats()
    assert (health["min_replicas"], health["max_replicas"]) == (1, 100)
    assert (pool["enabled"], pool["target_size"]) == (True, 5)
    assert fleet.get_autoscaling_status()["target_cpu_utilization"] == 70
    spec = fleet._spec_now  # what no method shows
    assert (spec.scale_up_stabilization_seconds, spec.scale_down_stabilization_seconds, spec.autoscaling_interval_seconds) == (60, 300, 30)
    assert spec.warm_pool.refresh_interval_seconds == 3600
    assert (spec.graceful_drain.timeout_seconds, spec.graceful_drain.checkpoint_before_drain) == (30, True)


def test_every_documented_key_is_taken() -> None:
    fleet = FleetManager(
        config={
            "min_replicas": 2,
            "max_replicas": 50,
            "target_cpu_utilization": 60,
            "scale_up_stabilization_seconds": 61,
            "scale_down_stabilization_seconds": 301,
            "autoscaling_interval_seconds": 31,
            "warm_pool": {"enabled": False, "size": 6, "refresh_interval_seconds": 3601},
            "graceful_drain": {"timeout_seconds": 31, "checkpoint_before_drain": True},
        }
    )
    spec = fleet._spec_now
    assert (spec.min_replicas, spec.max_replicas, spec.target_cpu_utilization) == (2, 50, 60)
    assert (spec.scale_up_stabilization_seconds, spec.scale_down_stabilization_seconds, spec.autoscaling_interval_seconds) == (61, 301, 31)
    assert (spec.warm_pool.enabled, spec.warm_pool.size, spec.warm_pool.refresh_interval_seconds) == (False, 6, 3601)
    assert spec.graceful_drain.timeout_seconds == 31
    assert fleet.get_warm_pool_stats()["target_size"] == 0  # it is off


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_replica": 2}, r"^min_replica: no such setting; did you mean min_replicas\?$"),
        ({"warm_pool": {"sise": 2}}, r"^warm_pool\.sise: no such setting; did you mean size\?$"),
        ({"warm_pool": 3}, r"^warm_pool = 3: must be a table$"),
        ({"min_replicas": "2"}, r'^min_replicas = "2": must be a whole number'),
        ({"min_replicas": True}, r"^min_replicas = true: must be a whole number"),
        ({"min_replicas": -1}, r"^min_replicas = -1: must be a whole number from 0"),
        ({"min_replicas": 5, "max_replicas": 4}, r"^min_replicas = 5 is more than max_replicas \(4\)"),
        ({"target_cpu_utilization": 170}, r"^target_cpu_utilization = 170: must be a number above 0, at most 90"),
        ({"scale_up_stabilization_seconds": math.nan}, r"^scale_up_stabilization_seconds = nan"),
        ({"name": "x"}, r"^name: is given beside the configuration"),
        ({"replicas": 3}, r"^replicas: is what scale_up and scale_down are told$"),
        ({"command": ["x"]}, r"^command: is of an agent, so it belongs in its AgentConfig$"),
        ([], r"^config: must be a dictionary of settings, not list$"),
        ({"min_replicas": -1, "max_replicas": 0}, r"^2 problems in the configuration:\n  min_replicas = -1.*\n  max_replicas = 0"),
    ],
)
def test_a_wrong_configuration_is_told_when_it_is_given(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FleetManager(config=config)


def test_a_fleet_has_a_name_that_its_agents_bear() -> None:
    with pytest.raises(ConfigError, match="name"):
        FleetManager(name="No Name")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"agent_id": "a"}, r"^config_template: must be an AgentConfig, not dict$"),
        (AgentConfig(trust_level="root"), r'^config_template\.trust_level = "root": must be one of "trusted", "standard", "untrusted"'),
        (AgentConfig(resource_limits={"cpu": 1}), r"^config_template\.resource_limits\.cpu: no such setting"),
        (AgentConfig(resource_limits={"memory_limit_mb": 0}), r"^config_template\.resource_limits\.memory_limit_mb = 0: must be"),
        (AgentConfig(tools="Read"), r'^config_template\.tools = "Read": must be a list of names'),
        (AgentConfig(environment={"1X": "y"}), r"^config_template\.environment\.1X: not a variable's name"),
        (AgentConfig(environment={"FLEETCTL_TOKEN": "y"}), r"^config_template\.environment\.FLEETCTL_TOKEN: .* fleetctl's own"),
        (AgentConfig(environment={"X": 1}), r"^config_template\.environment\.X: must be text"),  # type: ignore[dict-item]  # on purpose
        (AgentConfig(command="agent --fast"), r'^config_template\.command = .*write command = \["agent", "--fast"\]'),
        (AgentConfig(command=[]), r"^config_template\.command = \[\]: must be"),
        (AgentConfig(cwd=""), r'^config_template\.cwd = "": must be'),
    ],
)
def test_a_wrong_template_is_told_and_changes_nothing(template: Any, message: str) -> None:
    here = with_pool(1)

    async def story(fleet: FleetManager) -> None:
        for use in (fleet.acquire_from_warm_pool, fleet.start_autoscaling, lambda wrong: fleet.scale_up(2, wrong)):
            with pytest.raises(ConfigError, match=message):
                await use(template)
        await settled()
        assert not here.machine.processes
        assert not here.state.wishes
        await fleet.scale_up(1, TEMPLATE)
        await asyncio.sleep(3 * SETTLE)
        before = {process.ref for process in here.machine.living()}
        for use in (fleet.acquire_from_warm_pool, fleet.start_autoscaling, lambda wrong: fleet.scale_up(2, wrong)):
            with pytest.raises(ConfigError, match=message):
                await use(template)
        await settled()
        assert {process.ref for process in here.machine.living()} == before

    here.run(story)


# -- before and after


def test_before_initialize_it_says_so_and_breaks_nothing() -> None:
    async def story() -> None:
        fleet = FleetManager(config={"min_replicas": 2})
        for error, use in (
            (ScaleUpFailed, fleet.scale_up(2)),
            (ScaleDownFailed, fleet.scale_down(0)),
            (ScaleUpFailed, fleet.acquire_from_warm_pool()),
            (ScaleUpFailed, fleet.start_autoscaling()),
        ):
            with pytest.raises(error, match=r"lifecycle manager not available.*not initialized") as caught:
                await use
            assert caught.value.code in ("E2090", "E2091")
            assert "initialize()" in caught.value.hint
        await fleet.stop_autoscaling()
        await fleet.cleanup()
        assert await fleet.get_fleet_metrics() == ScalingMetrics(0, 0, 0.0, 0.0, 0)
        assert await fleet.get_scaling_history() == []
        health = fleet.get_health_status()
        assert (health["healthy"], health["problems"], health["min_replicas"]) == (False, ["the FleetManager is not initialized"], 2)
        decision = await fleet.evaluate_scaling(metrics(5, 85.0))
        assert decision.target_replicas == 6

    asyncio.run(story())


def test_without_a_lifecycle_manager_nothing_can_be_started_or_ended() -> None:
    async def story() -> None:
        fleet = FleetManager()
        await fleet.initialize(state_manager=FakeStateManager())
        with pytest.raises(ScaleUpFailed, match="lifecycle manager not available") as up:
            await fleet.scale_up(2)
        with pytest.raises(ScaleDownFailed, match="lifecycle manager not available") as down:
            await fleet.scale_down(0)
        assert (up.value.code, down.value.code) == ("E2090", "E2091")
        assert not fleet.get_health_status()["healthy"]
        await fleet.cleanup()

    asyncio.run(story())


def test_with_a_lifecycle_manager_alone_agents_run_and_nothing_is_measured() -> None:
    machine = FakeMachine()

    async def story() -> None:
        fleet = FleetManager(config=NO_POOL)
        await fleet.initialize(lifecycle_manager=FakeLifecycleManager(machine), clock=machine.clock)
        assert states(await fleet.scale_up(2)) == [RUNNING, RUNNING]
        found = await fleet.get_fleet_metrics()
        assert (found.current_replicas, found.desired_replicas, found.pending_requests) == (2, 2, 0)
        assert math.isnan(found.avg_cpu_utilization)
        assert math.isnan(found.avg_memory_utilization)
        assert (await fleet.evaluate_scaling(found)).action == "no_action"
        assert [one.target_replicas for one in await fleet.get_scaling_history()] == [2]
        await fleet.cleanup()
        assert not machine.living()

    run_in_fake_time(machine.clock, story())


def test_initialize_twice_is_refused_and_cleanup_twice_is_not() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        with pytest.raises(UsageError, match="initialized already"):
            await fleet.initialize()
        other = FleetManager()
        twice = [other.initialize(FakeLifecycleManager(FakeMachine(here.machine.clock)), clock=here.machine.clock) for _ in range(2)]
        done, refused = await asyncio.gather(*twice, return_exceptions=True)
        assert done is None
        assert isinstance(refused, UsageError)
        await other.cleanup()
        await fleet.scale_up(2)
        await asyncio.gather(fleet.cleanup(), fleet.cleanup())
        await fleet.cleanup()
        assert not here.machine.living()
        with pytest.raises(ScaleUpFailed, match="not initialized"):
            await fleet.scale_up(2)
        assert fleet.get_health_status()["current_replicas"] == 0
        await fleet.initialize(here.lifecycle, here.state, here.resources, clock=here.machine.clock)
        assert len(await fleet.scale_up(1)) == 1

    here.run(story)


def test_a_cleanup_that_is_cancelled_goes_on() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        here.lifecycle.ignore_stop = True
        await fleet.scale_up(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await fleet.cleanup()
        with pytest.raises(ScaleUpFailed, match="not initialized"):
            await fleet.scale_up(2)
        assert here.machine.living()
        await fleet.cleanup()
        assert not here.machine.living()

    here.run(story)


def test_a_full_disk_keeps_no_cleanup_from_ending_the_agents() -> None:
    here = with_pool(1)

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(2)
        here.state.fails = lambda attempt: True

    here.run(story)


def test_it_belongs_to_the_loop_that_it_was_initialized_in() -> None:
    fleet, machine = FleetManager(config=NO_POOL), FakeMachine()
    asyncio.run(fleet.initialize(FakeLifecycleManager(machine), clock=machine.clock))
    with pytest.raises(UsageError, match="another event loop") as caught:
        asyncio.run(fleet.scale_up(1))
    assert "one asyncio.run" in caught.value.hint


def test_async_with_initializes_and_cleans_up() -> None:
    async def story() -> None:
        async with FleetManager(config=NO_POOL) as fleet:
            assert fleet.get_health_status()["healthy"]
        assert not fleet.get_health_status()["healthy"]

    asyncio.run(story())


def test_the_next_program_adopts_what_runs_where_the_last_one_was_killed() -> None:
    here = with_pool(1)

    async def first(fleet: FleetManager) -> None:
        await fleet.scale_up(3, TEMPLATE)
        await asyncio.sleep(2 * SETTLE)

    here.run(first, cleanup=False)
    before = {process.agent_id: process.ref for process in here.machine.living()}
    assert len(before) == 4

    async def second(fleet: FleetManager) -> None:
        await settled()
        assert fleet.get_health_status()["current_replicas"] == 3
        assert [one.target_replicas for one in await fleet.get_scaling_history()] == [3]
        assert fleet.get_warm_pool_stats()["current_size"] == 1
        assert {process.agent_id: process.ref for process in here.machine.living()} == before
        assert states(await fleet.scale_up(4)) == [WARM]  # of the same kind, without being told

    here.run(second)
    assert not here.state.wishes  # cleaned up: a third program begins anew


def test_two_fleets_in_one_program_know_nothing_of_each_other() -> None:
    machine, state = FakeMachine(), FakeStateManager()

    async def story() -> None:
        fleets = [FleetManager(config=NO_POOL, name=name) for name in ("one", "two")]
        for fleet in fleets:
            await fleet.initialize(FakeLifecycleManager(machine), state, clock=machine.clock)
        machine.ended = lambda process: None  # each has hands of its own; nobody dies here before the end
        one, two = await asyncio.gather(*(fleet.scale_up(2) for fleet in fleets))
        assert {result.agent_id[:4] for result in one} == {"one-"}
        assert {result.agent_id[:4] for result in two} == {"two-"}
        assert [fleet.get_health_status()["current_replicas"] for fleet in fleets] == [2, 2]

    run_in_fake_time(machine.clock, story())


# -- evaluate_scaling


def metrics(replicas: int, cpu: float, memory: float = 60.0, pending: int = 0) -> ScalingMetrics:
    return ScalingMetrics(
        current_replicas=replicas,
        desired_replicas=replicas,
        avg_cpu_utilization=cpu,
        avg_memory_utilization=memory,
        pending_requests=pending,
    )


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (metrics(5, 85.0), ("scale_up", 6, "CPU utilization 85.0% > target 70%")),
        (metrics(5, 72.0), ("no_action", 5, "CPU utilization 72.0% near target 70%")),
        (metrics(5, 20.0), ("scale_down", 2, "CPU utilization 20.0% < target 70%")),
        (metrics(1, 5.0), ("no_action", 1, "")),
        (metrics(20, 89.0), ("no_action", 20, "")),
        (metrics(30, 50.0), ("scale_down", 20, "30 replicas are more than max_replicas 20")),
        (metrics(0, 0.0), ("scale_up", 1, "0 replicas are fewer than min_replicas 1")),
        (metrics(5, math.nan), ("no_action", 5, "CPU utilization unavailable")),
    ],
)
def test_evaluate_scaling_says_what_the_autoscaler_would_do(seen: ScalingMetrics, expected: tuple[str, int, str]) -> None:
    fleet = FleetManager(config={"max_replicas": 20})

    async def story() -> None:
        for _ in range(2):  # to ask changes nothing
            decision = await fleet.evaluate_scaling(seen)
            action, target, reason = expected
            assert (decision.action, decision.target_replicas, decision.current_replicas) == (action, target, seen.current_replicas)
            assert decision.reason.startswith(reason)

    asyncio.run(story())


def test_evaluate_scaling_counts_memory_and_pending_requests_where_they_have_targets() -> None:
    fleet = FleetManager(config={"autoscaling": {"target_memory_utilization": 80, "target_pending": 10}})

    async def story() -> None:
        assert (await fleet.evaluate_scaling(metrics(4, 70.0, memory=120.0))).reason == "memory utilization 120.0% > target 80%"
        assert (await fleet.evaluate_scaling(metrics(4, 70.0, pending=80))).reason.startswith("pending requests 20.0")
        with pytest.raises(UsageError, match="fewer than none"):
            await fleet.evaluate_scaling(metrics(-1, 70.0))

    asyncio.run(story())


def test_a_target_for_memory_needs_agents_with_a_limit() -> None:
    here = world(autoscaling={"target_memory_utilization": 80})

    async def story(fleet: FleetManager) -> None:
        with pytest.raises(ConfigError, match=r"target_memory_utilization = 80: needs resource_limits\.memory_limit_mb"):
            await fleet.scale_up(1, TEMPLATE)
        assert len(await fleet.scale_up(1, AgentConfig(command=["agent"], resource_limits={"memory_limit_mb": 64}))) == 1

    here.run(story)


def test_evaluate_scaling_waits_some_time_after_the_last_change() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(5)
        held = await fleet.evaluate_scaling(metrics(5, 85.0))
        assert (held.action, held.target_replicas) == ("no_action", 5)
        assert re.search(r"CPU utilization 85.0% > target 70%; held: the fleet grew less than 60 s ago \(59 s left\)", held.reason)
        await asyncio.sleep(60.0)
        assert (await fleet.evaluate_scaling(metrics(5, 85.0))).target_replicas == 6
        assert (await fleet.evaluate_scaling(metrics(5, 20.0))).action == "no_action"
        await asyncio.sleep(240.0)
        assert (await fleet.evaluate_scaling(metrics(5, 20.0))).action == "scale_down"

    here.run(story)


# -- scale_up and scale_down


def test_scale_up_returns_the_new_ones_once_they_are_ready() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        began = here.machine.clock.monotonic()
        first = await fleet.scale_up(target_replicas=2, config_template=TEMPLATE)
        assert here.machine.clock.monotonic() - began >= SETTLE
        assert states(first) == [RUNNING, RUNNING]
        assert {result.pid for result in first} == {process.ref.pid for process in here.living()}
        more = await fleet.scale_up(3)
        assert states(more) == [RUNNING]
        assert not {result.agent_id for result in more} & {result.agent_id for result in first}
        for same in (3, 1):
            assert await fleet.scale_up(same) == []
        assert len(here.living()) == 3

    here.run(story)


def test_scale_up_takes_warm_instances_first() -> None:
    here = with_pool(2)

    async def story(fleet: FleetManager) -> None:
        assert states(await fleet.scale_up(1)) == [RUNNING]  # the first ones are not warm: before them there was no template
        await asyncio.sleep(3 * SETTLE)
        began = here.machine.clock.monotonic()
        assert states(await fleet.scale_up(3)) == [WARM, WARM]
        assert here.machine.clock.monotonic() - began < SETTLE
        assert states(await fleet.scale_up(5))[-1] == RUNNING

    here.run(story)


def test_agents_find_their_tools_and_their_identity_in_the_claim_file() -> None:
    here = with_pool(1)

    async def story(fleet: FleetManager) -> None:
        (one,) = await fleet.scale_up(1, TEMPLATE)
        await asyncio.sleep(3 * SETTLE)
        (warm,) = await fleet.scale_up(2)
        assert warm.from_warm_pool
        for result in (one, warm):
            claim = here.lifecycle.claims[result.agent_id]
            assert (claim["agent_id"], claim["fleet"], claim["tools"]) == (result.agent_id, "fleet", ["Read"])

    here.run(story)


def test_another_template_replaces_the_agents_one_by_one() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        before = {result.agent_id: result.pid for result in await fleet.scale_up(2, TEMPLATE)}
        (new,) = await fleet.scale_up(3, AgentConfig(command=["other"]))
        await asyncio.sleep(10 * SETTLE)
        after = {process.agent_id: process.ref.pid for process in here.living()}
        assert after.keys() == before.keys() | {new.agent_id}
        assert after[new.agent_id] == new.pid
        assert all(after[agent_id] != pid for agent_id, pid in before.items())

    here.run(story)


@pytest.mark.parametrize("target", [11, -1, 1, 2.5, True, "3"])
def test_a_size_that_cannot_be_is_refused(target: Any) -> None:
    here = world(min_replicas=2, max_replicas=10)

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(2)
        for use in (fleet.scale_up, fleet.scale_down):
            with pytest.raises(UsageError, match=r"replicas"):
                await use(target)
        assert len(here.living()) == 2

    here.run(story)


def test_new_agents_that_fail_are_told_with_why() -> None:
    here = world(restart={"crash_loop_failures": 2})

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1)
        here.lifecycle.spawn_errors.extend([SpawnFailed("cannot start it", permanent=True)] * 100)
        with pytest.raises(ScaleUpFailed, match=r"^0 of 2 new agents are ready; fleet-.....: .*cannot start it.*; fleet-.....: ") as caught:
            await fleet.scale_up(3)
        assert (caught.value.code, "scale_down" in caught.value.hint) == ("E2090", True)
        health = fleet.get_health_status()
        assert (health["healthy"], health["desired_replicas"], health["ready_replicas"]) == (False, 3, 1)
        assert any("cannot start it" in problem for problem in health["problems"])
        assert len(await fleet.scale_down(1)) == 2
        assert fleet.get_health_status()["healthy"]

    here.run(story)


def test_scale_down_ends_the_oldest_and_returns_when_they_are_gone() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        old = [result.agent_id for result in await fleet.scale_up(2)]
        await asyncio.sleep(1.0)
        young = [result.agent_id for result in await fleet.scale_up(4)]
        assert sorted(await fleet.scale_down(target_replicas=2)) == sorted(old)
        assert {process.agent_id for process in here.living()} == set(young)
        assert signal.SIGTERM in [number for agent_id, number in here.lifecycle.sent if agent_id == old[0]]
        assert await fleet.scale_down(3) == []
        assert sorted(await fleet.scale_down(0)) == sorted(young)

    here.run(story)


def test_a_drain_past_its_time_is_recorded_and_told_as_e2093() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        here.lifecycle.ignore_stop = True
        (one,) = await fleet.scale_up(1)
        began = here.machine.clock.monotonic()
        assert await fleet.scale_down(0) == [one.agent_id]
        assert DRAIN <= here.machine.clock.monotonic() - began < DRAIN + 2
        (error,) = fleet.get_health_status()["errors"]
        assert (error["code"], error["agent_id"]) == ("E2093", one.agent_id)
        assert "Graceful drain timeout exceeded" in error["message"]
        assert [event.data["code"] for event in here.state.events if event.kind == "drain.timeout"] == ["E2093"]

    here.run(story)


def test_several_who_scale_at_once_are_told_of_different_agents() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        one, two, three = await asyncio.gather(fleet.scale_up(2), fleet.scale_up(5), fleet.scale_up(4))
        told = [result.agent_id for results in (one, two, three) for result in results]
        assert (len(one), len(two), three, len(set(told))) == (2, 3, [], 5)
        gone = await asyncio.gather(fleet.scale_down(4), fleet.scale_down(1))
        assert [len(ids) for ids in gone] == [1, 3]
        assert len({*gone[0], *gone[1]}) == 4

    here.run(story)


def test_scale_up_that_is_overtaken_by_scale_down_returns_what_is_left() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        up, down = await asyncio.gather(fleet.scale_up(5), fleet.scale_down(2))
        assert len(up) == 2
        assert len(down) <= 3
        assert {process.agent_id for process in here.living()} == {result.agent_id for result in up}

    here.run(story)


def test_scale_up_ends_when_the_fleet_is_cleaned_up_meanwhile() -> None:
    here = world(readiness={"settle_seconds": 100})

    async def story(fleet: FleetManager) -> None:
        scaling = asyncio.create_task(fleet.scale_up(2))
        await settled()
        await fleet.cleanup()
        with pytest.raises(FleetctlError, match=r"taken down|not looked after"):
            await scaling

    here.run(story)


def test_cancelling_ends_the_waiting_and_not_what_was_asked_for() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        for seconds in (0.0, 0.5):  # before anything is on disk, and while they start
            size = len(here.living()) + 2
            scaling = asyncio.create_task(fleet.scale_up(size))
            await asyncio.sleep(seconds)
            scaling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await scaling
            await asyncio.sleep(2 * SETTLE)
            assert fleet.get_health_status()["ready_replicas"] == size
            assert here.state.wishes["fleet"][0].replicas == size
        shrinking = asyncio.create_task(fleet.scale_down(1))
        await asyncio.sleep(0)
        shrinking.cancel()
        await asyncio.sleep(2 * SETTLE)
        assert len(here.living()) == 1
        assert len(await fleet.scale_up(2)) == 1  # and of the new ones it tells those that are new

    here.run(story)


# -- the warm pool


def test_acquire_hands_out_the_oldest_and_an_empty_pool_is_none_and_a_miss() -> None:
    here = with_pool(2)

    async def story(fleet: FleetManager) -> None:
        assert fleet.get_warm_pool_stats() == {
            "enabled": True,
            "current_size": 0,
            "target_size": 2,
            "hits": 0,
            "misses": 0,
            "hit_rate_percent": 0.0,
            "instances": [],
        }
        assert await fleet.acquire_from_warm_pool(TEMPLATE) is None  # nobody had said what to keep warm; now it is known
        await asyncio.sleep(3 * SETTLE)
        stats = fleet.get_warm_pool_stats()
        assert (stats["current_size"], stats["misses"]) == (2, 1)
        oldest, other = stats["instances"]
        assert isinstance(oldest, WarmInstance)
        assert (oldest.state, oldest.created_at <= other.created_at) == (AgentState.SUSPENDED, True)
        result = await fleet.acquire_from_warm_pool(TEMPLATE)
        assert result is not None
        assert (result.agent_id, result.state, result.from_warm_pool) == (oldest.agent_id, AgentState.RUNNING, True)
        assert next(process.agent_id for process in here.living()) == result.agent_id
        assert fleet.get_warm_pool_stats()["hit_rate_percent"] == 50.0
        claim = here.lifecycle.claims[result.agent_id]
        assert (claim["template"], claim["tools"], claim["environment"]) == ("template", ["Read"], {"ENV": "production"})
        await asyncio.sleep(3 * SETTLE)
        assert fleet.get_warm_pool_stats()["current_size"] == 2  # it fills up again
        assert fleet.get_health_status()["current_replicas"] == 1
        assert (await fleet.get_scaling_history())[-1].reason == "one more was acquired"

    here.run(story)


def test_a_template_given_to_the_constructor_fills_the_pool_at_once() -> None:
    machine = FakeMachine()

    async def story() -> None:
        fleet = FleetManager(config={"warm_pool": {"size": 2}}, config_template=TEMPLATE)
        await fleet.initialize(FakeLifecycleManager(machine), clock=machine.clock)
        await asyncio.sleep(3 * SETTLE)
        assert fleet.get_warm_pool_stats()["current_size"] == 2
        assert states(await fleet.scale_up(2)) == [WARM, WARM]
        await fleet.cleanup()

    run_in_fake_time(machine.clock, story())


@pytest.mark.parametrize(
    "asked",
    [
        AgentConfig(command=["agent"], environment={"ENV": "production", "TASK": "7"}, tools=["Read"]),
        AgentConfig(command=["other"], environment={"ENV": "production"}),
        AgentConfig(command=["agent"], environment={"ENV": "production"}, trust_level="trusted"),
    ],
)
def test_what_no_warm_instance_can_become_is_a_miss_too(asked: AgentConfig) -> None:
    here = with_pool(1)

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1, TEMPLATE)
        await asyncio.sleep(3 * SETTLE)
        before = {process.ref for process in here.machine.living()}
        assert await fleet.acquire_from_warm_pool(asked) is None
        await settled()
        assert {process.ref for process in here.machine.living()} == before
        assert (fleet.get_warm_pool_stats()["current_size"], fleet.get_warm_pool_stats()["misses"]) == (1, 1)

    here.run(story)


def test_variables_reach_warm_instances_that_read_their_claim() -> None:
    here = World(config={"warm_pool": {"size": 1, "reads_claim": True}})

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1, TEMPLATE)
        await asyncio.sleep(3 * SETTLE)
        result = await fleet.acquire_from_warm_pool(
            AgentConfig(agent_id="seventh", command=["agent"], environment={"ENV": "production", "TASK": "7"}, tools=["Edit"])
        )
        assert result is not None
        claim = here.lifecycle.claims[result.agent_id]
        assert (claim["template"], claim["tools"], claim["environment"]) == ("seventh", ["Edit"], {"ENV": "production", "TASK": "7"})

    here.run(story)


def test_acquire_beyond_the_maximum_is_refused() -> None:
    here = with_pool(1, max_replicas=1)

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1)
        await asyncio.sleep(3 * SETTLE)
        with pytest.raises(UsageError, match="more than max_replicas"):
            await fleet.acquire_from_warm_pool()
        assert fleet.get_warm_pool_stats()["current_size"] == 1

    here.run(story)


def test_an_agent_that_was_acquired_is_not_told_to_who_scales_up_meanwhile() -> None:
    here = with_pool(1)

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1)
        await asyncio.sleep(3 * SETTLE)
        acquired, grown = await asyncio.gather(fleet.acquire_from_warm_pool(), fleet.scale_up(3))
        assert acquired is not None
        assert len(grown) == 1  # it is one of the three
        assert acquired.agent_id not in {result.agent_id for result in grown}

    here.run(story)


# -- autoscaling


def test_autoscaling_follows_the_load_until_it_is_stopped() -> None:
    here = world(min_replicas=2, max_replicas=10)

    async def story(fleet: FleetManager) -> None:
        assert fleet.get_autoscaling_status()["enabled"] is False
        await fleet.start_autoscaling(TEMPLATE)
        await asyncio.sleep(2 * SETTLE)
        status = fleet.get_autoscaling_status()
        assert (status["enabled"], status["current_replicas"], status["scale_up_count"], status["scale_down_count"]) == (True, 2, 0, 0)
        assert (await fleet.get_scaling_history())[0].reason == "autoscaling begins at min_replicas"
        for _ in range(30):
            here.use(95.0)
            await asyncio.sleep(5.0)
        status = fleet.get_autoscaling_status()
        assert status["current_replicas"] > 2
        assert status["scale_up_count"] >= 1
        assert fleet.get_health_status()["autoscaling"]["enabled"]
        assert "CPU utilization 95.0% > target 70%" in (await fleet.get_scaling_history())[-1].reason
        size = status["current_replicas"]
        await fleet.stop_autoscaling()
        for _ in range(100):
            here.use(5.0)
            await asyncio.sleep(5.0)
        assert len(here.living()) == size
        assert not fleet.get_autoscaling_status()["enabled"]

    here.run(story)


# -- metrics, history, health


def test_metrics_are_means_in_percent_of_the_limits() -> None:
    here = with_pool(1, sockets={"http": "127.0.0.1:0"})

    async def story(fleet: FleetManager) -> None:
        assert await fleet.get_fleet_metrics() == ScalingMetrics(0, 0, 0.0, 0.0, 0)
        limited = AgentConfig(command=["agent"], resource_limits={"cpu_limit": 2.0, "memory_limit_mb": 4})
        results = await fleet.scale_up(2, limited)
        await asyncio.sleep(3 * SETTLE)
        here.use(90.0)  # the warm instance too, which counts in no mean
        here.lifecycle.backlogs["fleet"] = 4
        here.resources.usage[results[0].agent_id] = Usage(cpu_percent=30.0, memory_bytes=3 << 20, processes=1)
        await asyncio.sleep(10.0)
        found = await fleet.get_fleet_metrics()
        assert (found.current_replicas, found.desired_replicas, found.pending_requests) == (2, 2, 4)
        assert found.avg_cpu_utilization == pytest.approx((90 + 30) / 2 / 2)
        assert found.avg_memory_utilization == pytest.approx((25 + 75) / 2)

    here.run(story)


def test_metrics_wait_a_moment_for_agents_that_were_not_measured_twice_yet() -> None:
    class TakesTwoLooks(FakeResourceManager):
        def sample(self, agents: Mapping[str, ProcessRef]) -> Mapping[str, Usage]:
            seen, self.usage = self.usage, {name: Usage(cpu_percent=40.0, memory_bytes=1, processes=1) for name in agents}
            return {name: replace(usage, cpu_percent=usage.cpu_percent if name in seen else None) for name, usage in self.usage.items()}

    here = World(config=NO_POOL, resources=TakesTwoLooks())

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1)
        began = here.machine.clock.monotonic()
        assert (await fleet.get_fleet_metrics()).avg_cpu_utilization == pytest.approx(40.0)
        assert here.machine.clock.monotonic() - began <= 3.0

    here.run(story)


def test_history_is_the_last_decisions_the_newest_last() -> None:
    here = world()

    async def story(fleet: FleetManager) -> None:
        for size in (1, 3, 2):
            await (fleet.scale_up(size) if size != 2 else fleet.scale_down(size))
        history = await fleet.get_scaling_history(limit=2)
        assert all(isinstance(one, ScalingDecision) for one in history)
        assert [(one.action, one.current_replicas, one.target_replicas) for one in history] == [("scale_up", 1, 3), ("scale_down", 3, 2)]
        assert all(one.reason for one in history)
        assert len(await fleet.get_scaling_history()) == 3
        assert await fleet.get_scaling_history(0) == []
        with pytest.raises(UsageError, match="negative"):
            await fleet.get_scaling_history(-1)

    here.run(story)


def test_health_says_what_is_wrong_and_until_when() -> None:
    here = world(min_replicas=2)

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(2)
        health = fleet.get_health_status()
        assert (health["healthy"], health["problems"], health["active_instances"]) == (True, [], 2)
        assert (health["min_replicas"], health["max_replicas"]) == (2, 100)
        assert health["autoscaling"]["enabled"] is False
        assert (health["warm_pool"]["current_size"], health["warm_pool"]["target_size"]) == (0, 0)
        here.machine.end(here.living()[0], code=1)
        await settled()
        health = fleet.get_health_status()
        assert not health["healthy"]
        assert any("1 of the 2 replicas that there have to be are ready" in problem for problem in health["problems"])
        await asyncio.sleep(10.0)
        assert fleet.get_health_status()["healthy"]
        here.state.fails = lambda attempt: True
        here.machine.end(here.living()[0], code=1)
        await asyncio.sleep(2.0)
        assert any("no space left" in problem for problem in fleet.get_health_status()["problems"])
        here.state.fails = lambda attempt: False
        await asyncio.sleep(10.0)
        assert fleet.get_health_status()["healthy"]

    here.run(story)
