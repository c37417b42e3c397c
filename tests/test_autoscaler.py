"""The autoscaler in a fleet of fakes: what is measured becomes a size, on disk and with its reason; and what must never move anything."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import pytest

from fleetctl.core.contract import Report
from fleetctl.core.observation import Polled
from fleetctl.core.orders import Wish
from fleetctl.errors import FleetctlError
from fleetctl.fleet import Fleet
from fleetctl.host.clock import SystemClock
from fleetctl.models import (
    AgentState,
    AutoscalingMode,
    AutoscalingSpec,
    FleetSpec,
    HostUsage,
    MetricScope,
    MetricSpec,
    ResourceLimitsSpec,
    ScheduleSpec,
    Usage,
    WarmPoolSpec,
)
from fleetctl.polling import Polling
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled
from tests.helpers import wait_for

SPEC = FleetSpec(
    name="demo",
    command=("agent",),
    replicas=2,
    min_replicas=1,
    max_replicas=10,
    autoscaling=AutoscalingSpec(enabled=True),
)
HOST = HostUsage(cpu_percent=20.0, cores=64, memory_total_bytes=1 << 40, memory_available_bytes=1 << 39, pressure_percent=0.0)


def usage(percent: float | None, **changes: object) -> Usage:
    seen = Usage(cpu_percent=percent, memory_bytes=50_000_000, processes=1, demand_percent=percent, hottest_percent=percent)
    return replace(seen, **changes)  # type: ignore[arg-type]  # of any field


class Place:
    """A fleet whose agents all use as much as the test says, measured every 5 s."""

    def __init__(self, spec: FleetSpec = SPEC) -> None:
        self.spec = spec
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)
        self.state = FakeStateManager()
        self.load: Callable[[str], Usage | None] = lambda agent_id: usage(50.0)
        self.host: HostUsage | None = HOST
        self.fleet: Fleet

    def run(self, story: Callable[[Fleet], Awaitable[None]]) -> None:
        async def told() -> None:
            await self.start()
            await story(self.fleet)
            await self.fleet.close()

        run_in_fake_time(self.clock, told())

    async def start(self, spec: FleetSpec | None = None, agents: tuple[object, ...] = ()) -> None:
        wish = Wish(spec=spec or self.spec)
        self.hands = FakeLifecycleManager(self.machine)
        known = tuple(self.state.agents.values())
        self.fleet = Fleet(wish, lifecycle_manager=self.hands, state_manager=self.state, clock=self.clock, agents=known)
        self.fleet.start()
        await settled()

    async def passes(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """So much time with a measurement every 5 s; it ends early where the condition holds."""
        for _ in range(round(seconds / 5)):
            await asyncio.sleep(5.0)
            self.measure()
            await settled()
            if until():
                return

    def measure(self) -> None:
        found: Mapping[str, Usage] = {agent.id: seen for agent in self.fleet.agents if agent.process and (seen := self.load(agent.id))}
        self.fleet.observe(found, self.host)

    @property
    def size(self) -> int:
        return self.fleet.wish.replicas

    def moves(self) -> list[tuple[int, int, str]]:
        return [(one.current_replicas, one.target_replicas, one.cause) for _, one in self.state.history]


def test_a_busy_fleet_grows_at_once_and_says_why() -> None:
    place = Place()

    async def story(fleet: Fleet) -> None:
        await place.passes(30)
        assert place.size == 2
        place.load = lambda agent_id: usage(100.0)
        await place.passes(15, until=lambda: place.size > 2)
        assert place.size == 3
        assert place.state.wishes["demo"][0].replicas == 3
        (name, decision) = place.state.history[-1]
        assert (name, decision.action, decision.cause) == ("demo", "scale_up", "autoscaler")
        assert decision.reason == "CPU utilization 100.0% > target 70%"
        assert decision.details["winner"] == "cpu"
        assert decision.details["proposals"][0]["wish"] == 3
        assert json.loads(json.dumps(decision.details)) == decision.details
        status = fleet.autoscaling_status()
        assert (status["enabled"], status["mode"], status["current_replicas"], status["scale_up_count"]) == (True, "act", 3, 1)
        assert status["last_decision"]["reason"] == decision.reason
        assert 0 < status["next_decision_seconds"] <= 30

    place.run(story)


def test_an_idle_fleet_shrinks_after_calm_and_not_below_its_minimum() -> None:
    place = Place(replace(SPEC, replicas=6, min_replicas=2))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(5.0)
        await place.passes(290)
        assert place.size == 6
        await place.passes(400)
        assert place.size == 2
        assert [move[2] for move in place.moves()] == ["autoscaler"] * len(place.moves())
        assert len(fleet.agents) == 2
        assert fleet.autoscaling_status()["scale_down_count"] == len(place.moves())

    place.run(story)


def test_one_agent_that_works_on_one_thread_of_two_cores_is_not_left_alone() -> None:
    """The specification's own formula never leaves one replica; and a limit of two cores would read 50 %."""
    place = Place(replace(SPEC, replicas=1, resource_limits=ResourceLimitsSpec(cpu_limit=2.0)))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(100.0)
        await place.passes(30)
        assert place.size == 2

    place.run(story)


def test_recommending_tells_each_change_once_and_moves_nothing() -> None:
    place = Place(replace(SPEC, autoscaling=AutoscalingSpec(enabled=True, mode=AutoscalingMode.RECOMMEND)))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(100.0)
        await place.passes(120)
        assert place.size == 2
        assert place.moves() == [(2, 3, "autoscaler")]
        assert place.state.history[0][1].details["recommended"] is True
        assert [event.kind for event in place.state.events if event.kind.startswith("fleet.")] == ["fleet.recommended"]
        assert fleet.autoscaling_status()["scale_up_count"] == 0

    place.run(story)


def test_windows_and_cooldowns_outlive_the_daemon() -> None:
    place = Place(replace(SPEC, replicas=4))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(5.0)
        await place.passes(250)
        await fleet.close()  # as dead as after a kill: nothing is written at the end
        await place.start(replace(place.spec, replicas=place.size))
        await place.passes(30)
        assert place.size == 4
        await place.passes(60, until=lambda: place.size < 4)
        assert place.size < 4, "the new daemon waits for a whole window again"

    place.run(story)


def test_off_leaves_the_size_and_on_begins_anew() -> None:
    place = Place()

    async def story(fleet: Fleet) -> None:
        await place.passes(30)
        await fleet.stop_autoscaling()
        assert place.state.wishes["demo"][0].autoscaling.enabled is False
        place.load = lambda agent_id: usage(100.0)
        await place.passes(60)
        assert place.size == 2
        assert fleet.autoscaling_status()["enabled"] is False
        await fleet.start_autoscaling(AutoscalingMode.RECOMMEND)
        assert fleet.autoscaling_status()["mode"] == "recommend"
        await fleet.start_autoscaling()
        await place.passes(60)
        assert place.size > 2
        kinds = [event.message for event in place.state.events if event.kind == "fleet.autoscaling"]
        assert kinds == ["demo: autoscaling is off", "demo: autoscaling is on (recommend)", "demo: autoscaling is on (act)"]

    place.run(story)


def test_none_at_all_is_a_wish_that_stands() -> None:
    place = Place()

    async def story(fleet: Fleet) -> None:
        await place.passes(30)
        await fleet.scale(0)
        await place.passes(60)
        assert place.size == 0
        assert fleet.autoscaling_status()["reason"] == "it rests, because the fleet is scaled to 0"
        await fleet.scale(1)
        place.load = lambda agent_id: usage(100.0)
        await place.passes(60)
        assert place.size > 1

    place.run(story)


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(None, id="not measured"),
        pytest.param(usage(None), id="no percentage yet"),
        pytest.param(usage(float("nan")), id="not a number"),
        pytest.param(usage(-5.0, hottest_percent=-5.0), id="negative"),
        pytest.param(usage(1e9), id="huge"),
        pytest.param(usage(0.0, stopped=True), id="stopped by a signal"),
        pytest.param(usage(35.0, demand_percent=None, hottest_percent=None), id="all that a full machine gave it"),
    ],
)
def test_what_tells_nothing_moves_nothing(seen: Usage | None) -> None:
    place = Place(replace(SPEC, replicas=4))
    place.host = replace(HOST, cpu_percent=100.0)

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: seen
        await place.passes(900)
        assert place.size == 4
        assert place.moves() == []
        assert "CPU utilization unavailable" in fleet.autoscaling_status()["reason"]

    place.run(story)


def test_the_warm_pool_changes_no_average_and_its_instances_are_used_first() -> None:
    place = Place(replace(SPEC, warm_pool=WarmPoolSpec(enabled=True, size=3)))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(100.0) if _running(fleet, agent_id) else usage(0.0, stopped=True, frozen=True)
        await place.passes(30, until=lambda: place.size == 3)
        assert place.size == 3
        assert fleet.autoscaling_status()["last_decision"]["proposals"][0]["value"] == 100.0
        assert [agent.from_warm_pool for agent in fleet.agents if not agent.pooled].count(True) == 1

    place.run(story)


def _running(fleet: Fleet, agent_id: str) -> bool:
    return any(agent.id == agent_id and agent.state is AgentState.RUNNING for agent in fleet.agents)


def test_a_host_that_is_full_holds_growth_and_says_so() -> None:
    place = Place()
    place.host = replace(HOST, cores=2)

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(100.0)
        await place.passes(120)
        assert place.size == 2
        assert "2 cores carry 2 agents" in fleet.autoscaling_status()["reason"]

    place.run(story)


def test_a_full_disk_holds_the_size_and_the_autoscaler_goes_on_when_there_is_room() -> None:
    place = Place()

    async def story(fleet: Fleet) -> None:
        await place.passes(30)
        place.state.fails = lambda attempt: True
        place.load = lambda agent_id: usage(100.0)
        await place.passes(60)
        assert place.size == 2
        place.state.fails = lambda attempt: False
        await place.passes(120)
        assert place.size > 2

    place.run(story)


def test_what_cannot_be_read_of_the_past_is_forgotten() -> None:
    place = Place()
    place.state.scaling["demo"] = json.dumps({"memory": {"wishes": "nonsense"}, "clock": 1.0, "at": 1.0})

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(100.0)
        await place.passes(60)
        assert place.size > 2

    place.run(story)


def test_no_decision_ends_who_is_protected() -> None:
    place = Place(replace(SPEC, replicas=4, scale_down_stabilization_seconds=30.0))

    async def story(fleet: Fleet) -> None:
        kept = {agent.id for agent in fleet.agents[:3]}
        for agent_id in kept:
            await fleet.protect(agent_id)
        place.load = lambda agent_id: usage(1.0)
        await place.passes(600)
        assert {agent.id for agent in fleet.agents} == kept
        assert place.size == 3
        last = fleet.autoscaler.last
        assert last is not None
        assert [limit.text for limit in last.limits] == ["3 agents are protected"]
        for agent_id in kept:
            await fleet.protect(agent_id, on=False)
        await place.passes(600)
        assert place.size < 3

    place.run(story)


def test_samples_of_load_and_size_are_recorded_at_each_decision() -> None:
    place = Place()

    async def story(fleet: Fleet) -> None:
        await place.passes(300)
        rows = [one for _, one in place.state.samples]
        assert 9 <= len(rows) <= 11
        assert {(one["replicas"], one["metric"], one["value"], one["target"]) for one in rows[1:]} == {(2, "cpu", 50.0, 70.0)}

    place.run(story)


class Reader:
    """`ports.MetricReader` that says what the test says, or hangs until the end of the test."""

    def __init__(self) -> None:
        self.says: dict[str, float | str] = {}
        self.hang = threading.Event()

    def read(self, metric: MetricSpec, spec: FleetSpec) -> float:
        said = self.says.get(metric.file or "")
        if said is None:
            self.hang.wait(30)
            raise FleetctlError("it hung")
        if isinstance(said, str):
            raise FleetctlError(said)
        return said


def metrics_spec(**metrics: MetricSpec) -> FleetSpec:
    return replace(SPEC, autoscaling=AutoscalingSpec(enabled=True, metrics=metrics))


def test_sources_are_polled_while_the_load_decides_and_a_hanging_one_delays_no_other() -> None:
    """In real time, because threads come back in no other."""
    reader, clock = Reader(), SystemClock()
    reader.says = {"a": 5.0, "b": "it is broken"}
    metrics = {name: MetricSpec(target=1.0, file=name, interval_seconds=0.2, timeout_seconds=0.1) for name in ("a", "b", "hangs")}
    spec = metrics_spec(**metrics)

    async def story() -> None:
        polling = Polling(reader, clock)
        polling.update(spec)
        await wait_for(lambda: {"a", "b"} <= polling.polled.keys())
        assert (polling.polled["a"].value, polling.polled["b"].error) == (5.0, "it is broken")
        first = polling.polled["a"].at
        await wait_for(lambda: polling.polled["a"].at > first)
        assert threading.active_count() < 10
        polling.update(replace(spec, autoscaling=replace(spec.autoscaling, enabled=False)))
        assert polling.polled.get("a") is None
        await polling.close()
        reader.hang.set()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("metric", "said", "expected", "reason"),
    [
        (MetricSpec(target=10.0, file="x"), 45.0, 5, "queue 22.5 per replica > target 10"),
        (MetricSpec(target=10.0, file="x", scope=MetricScope.PER_REPLICA), 25.0, 5, "queue 25.0 per replica > target 10"),
        (MetricSpec(target=10.0, file="x", fallback=45.0), None, 5, "queue 22.5 per replica > target 10"),
        (MetricSpec(target=10.0, file="x"), None, 2, "CPU utilization 20.0% < target 70%; held: queue unavailable: it is broken"),
        (MetricSpec(target=10.0, file="x"), float("nan"), 2, "held: queue unavailable: its value nan is not plausible"),
        (MetricSpec(target=10.0, file="x"), -1.0, 2, "not plausible"),
        (MetricSpec(target=10.0, file="x"), 1e300, 2, "not plausible"),
        (MetricSpec(target=10.0, formula="raw * 2 + cpu * 0"), 22.5, 5, "queue 22.5 per replica > target 10"),
        (MetricSpec(target=10.0, formula="raw / (replicas - 2)"), 1.0, 2, "queue unavailable: division by zero"),
    ],
)
def test_a_metric_of_one_s_own_decides_or_holds(metric: MetricSpec, said: float | None, expected: int, reason: str) -> None:
    place = Place(metrics_spec(queue=metric, raw=MetricSpec(file="raw")))

    async def story(fleet: Fleet) -> None:
        def measure() -> None:
            found = {agent.id: usage(20.0) for agent in fleet.agents}
            now = place.clock.monotonic()
            polled = Polled(at=now, value=said) if said is not None else Polled(at=now, error="it is broken")
            fleet.autoscaler.take(fleet.spec, fleet.agents, found, place.host, {}, polled={"queue": polled, "raw": polled})

        place.measure = measure  # type: ignore[method-assign]  # what a Polling would have said stands beside it
        await place.passes(120, until=lambda: place.size != 2)
        assert place.size == expected
        last = place.state.history[-1][1].reason if place.state.history else fleet.autoscaling_status()["reason"]
        assert reason in last

    place.run(story)


def test_a_queue_that_grows_faster_than_the_fleet_goes_on_asking_for_more() -> None:
    """It is no metric that growth does not help, as a leak of memory is: there are just too few agents yet."""
    place = Place(metrics_spec(queue=MetricSpec(target=5.0, file="x")))

    async def story(fleet: Fleet) -> None:
        began = place.clock.monotonic()

        def measure() -> None:
            now = place.clock.monotonic()
            polled = {"queue": Polled(at=now, value=20 + 4 * (now - began))}
            fleet.autoscaler.take(fleet.spec, fleet.agents, {agent.id: usage(5.0) for agent in fleet.agents}, place.host, {}, polled=polled)

        place.measure = measure  # type: ignore[method-assign]  # what a Polling would have said stands beside it
        await place.passes(300, until=lambda: place.size == 10)
        assert place.size == 10

    place.run(story)


def test_schedules_change_the_bounds_while_they_are_in_force() -> None:
    # The fake day begins at 22:13:20 UTC.
    schedule = ScheduleSpec(cron="20 22 * * *", duration_seconds=600, min_replicas=5)
    place = Place(replace(SPEC, scale_down_stabilization_seconds=60.0, autoscaling=AutoscalingSpec(enabled=True, schedules=(schedule,))))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(20.0)
        await place.passes(300)
        assert place.size < 3
        await place.passes(300, until=lambda: place.size == 5)
        assert place.size == 5
        assert place.state.history[-1][1].reason.endswith("fewer than min_replicas 5")
        assert fleet.autoscaling_status()["min_replicas"] == 5
        await place.passes(1200, until=lambda: place.size < 5)
        assert place.size < 5
        assert fleet.autoscaling_status()["min_replicas"] == 1

    place.run(story)


def test_slots_and_gauges_that_agents_report_count() -> None:
    place = Place(metrics_spec(depth=MetricSpec(target=4.0, agents="depth")))

    async def story(fleet: Fleet) -> None:
        def measure() -> None:
            report = Report(active=1, slots=4, pending=0, metrics={"depth": 9.0})
            found = {agent.id: usage(50.0) for agent in fleet.agents}
            fleet.autoscaler.take(fleet.spec, fleet.agents, found, place.host, {agent.id: report for agent in fleet.agents})

        place.measure = measure  # type: ignore[method-assign]  # what the agents would have said stands beside it
        await place.passes(5)
        last = fleet.autoscaling_status()["last_decision"]
        assert {one["metric"]: (one["value"], one["wish"]) for one in last["proposals"][1:]} == {"occupancy": (25.0, 1), "depth": (9.0, 5)}
        await place.passes(60, until=lambda: place.size > 2)
        assert place.size > 2

    place.run(story)


TO_ZERO = replace(
    SPEC,
    replicas=3,
    min_replicas=0,
    sockets={"http": "127.0.0.1:8080"},
    warm_pool=WarmPoolSpec(enabled=True, size=1),
    autoscaling=AutoscalingSpec(enabled=True, idle_seconds=60.0),
)


def test_a_fleet_without_work_goes_to_zero_and_the_first_connection_wakes_a_warm_instance_at_once() -> None:
    place = Place(TO_ZERO)

    async def story(fleet: Fleet) -> None:
        hands = place.hands
        place.load = lambda agent_id: usage(0.2)
        hands.connections.add("demo")
        await place.passes(200)
        assert place.size == 3, "somebody is connected"
        assert not hands.awaited, "agents take the connections"
        hands.connections.clear()
        await place.passes(70, until=lambda: place.size == 0)
        await place.passes(40)
        assert [(move[0], move[1]) for move in place.moves()] == [(3, 0)]
        (pooled,) = fleet.agents
        assert (pooled.state, pooled.pooled) == (AgentState.SUSPENDED, True)
        assert fleet.autoscaling_status()["reason"] == "at zero, waiting for a request"
        asked = place.clock.monotonic()
        hands.connect("demo")
        await settled()
        assert (place.size, [agent.ready for agent in fleet.agents if agent.id == pooled.id]) == (1, [True])
        assert place.clock.monotonic() < asked + 1, "not at the next measurement"
        decision = place.state.history[-1][1]
        assert (decision.reason, decision.cause) == ("1 request is pending and no replica is there", "autoscaler")
        assert not hands.awaited

    place.run(story)


def test_a_full_disk_at_zero_keeps_nobody_busy_and_the_connection_is_not_forgotten() -> None:
    place = Place(replace(TO_ZERO, replicas=0))

    async def story(fleet: Fleet) -> None:
        place.state.fails = lambda attempt: True
        place.hands.connect("demo")
        await settled()
        assert (place.size, place.hands.awaited) == (0, {})
        place.state.fails = lambda attempt: False
        await place.passes(5)
        assert place.size == 1

    place.run(story)


def test_a_schedule_and_a_size_set_by_hand_bring_a_fleet_back_from_zero() -> None:
    # The fake day begins at 22:13:20 UTC.
    schedule = ScheduleSpec(cron="20 22 * * *", duration_seconds=600, min_replicas=2)
    place = Place(replace(TO_ZERO, replicas=0, autoscaling=replace(TO_ZERO.autoscaling, schedules=(schedule,))))

    async def story(fleet: Fleet) -> None:
        place.load = lambda agent_id: usage(0.2)
        await fleet.scale(1)
        await place.passes(50)
        assert place.size == 1
        await place.passes(60, until=lambda: place.size == 0)
        assert place.size == 0
        await place.passes(400, until=lambda: place.size == 2)
        assert place.state.history[-1][1].reason == "0 replicas are fewer than min_replicas 2"
        await place.passes(900, until=lambda: place.size == 0)
        assert place.size == 0

    place.run(story)


def test_only_a_fleet_that_waits_for_work_looks_at_its_sockets() -> None:
    async def awaited(**changes: object) -> bool:
        await place.start(replace(TO_ZERO, replicas=0))
        assert place.hands.awaited
        await place.fleet.apply(replace(place.fleet.spec, **changes))  # type: ignore[arg-type]  # by name
        await settled()
        waits = bool(place.hands.awaited)
        await place.fleet.close()
        return waits

    off = replace(TO_ZERO.autoscaling, enabled=False)
    recommending = replace(TO_ZERO.autoscaling, mode=AutoscalingMode.RECOMMEND)
    for changes, waits in (({"max_replicas": 5}, True), ({"replicas": 1}, False), ({"autoscaling": off}, False)):
        place = Place()
        assert run_in_fake_time(place.clock, awaited(**changes)) is waits
    place = Place()
    assert run_in_fake_time(place.clock, awaited(autoscaling=recommending)) is False


def test_connections_that_wait_in_the_sockets_count_as_pending() -> None:
    place = Place(replace(SPEC, autoscaling=AutoscalingSpec(enabled=True, target_pending=2.0)))

    async def story(fleet: Fleet) -> None:
        def measure() -> None:
            found = {agent.id: usage(50.0) for agent in fleet.agents}
            fleet.autoscaler.take(fleet.spec, fleet.agents, found, place.host, {}, backlog=12)

        place.measure = measure  # type: ignore[method-assign]  # what the kernel would have said stands beside it
        await place.passes(10, until=lambda: place.size > 2)
        assert place.size == 6
        assert place.state.history[-1][1].reason == "pending requests 6.0 per replica > target 2"

    place.run(story)
