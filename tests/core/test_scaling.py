"""The scaling rule: tables for each step, and histories with invariants that hold at every step."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from math import ceil, inf, nan
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.demand import Reading, Sample, Target, cpu, custom, memory, occupancy, occupancy_percent, pending, propose, read
from fleetctl.core.memory import Memory, started
from fleetctl.core.policy import Fallback, Host, Observation, Policy, Rate
from fleetctl.core.scaling import AT_ZERO, Evaluation, evaluate
from fleetctl.errors import ConfigError
from fleetctl.models import FallbackBehavior

SAMPLE, TICK, DOWN = 5.0, 30.0, 300.0
# Wide enough that a doubled down window ends, and the rest after it shows.
LONG = 3 * 3600.0


def seen(now: float, replicas: int, value: float, metric: str = "cpu", **more: object) -> Observation:
    """A fleet whose replicas all read `value`."""
    readings = {metric: Reading(total=value * replicas, replicas=replicas, at=now)}
    return Observation(**{"now": now, "replicas": replicas, "readings": readings, **more})  # type: ignore[arg-type]  # by name


def once(policy: Policy, observation: Observation, memory: Memory | None = None) -> Evaluation:
    return evaluate(policy, observation, memory or Memory())[0]


Move = tuple[float, int]


def drive(
    policy: Policy, load: Callable[[float], float], replicas: int, *, seconds: float, every: float = SAMPLE, metric: str = "occupancy"
) -> tuple[list[Move], int]:
    """Apply the decisions to a load that does not depend on the number of replicas; the moves, and the size at the end."""
    memory, moves, now = started(0.0, replicas), [], 0.0
    while now < seconds:
        now += every
        evaluation, memory = evaluate(policy, seen(now, replicas, load(now) / replicas, metric), memory)
        target = evaluation.decision.target_replicas
        assert policy.min_replicas <= target <= policy.max_replicas
        assert (target != replicas) == evaluation.acts == (evaluation.decision.action != "no_action")
        if target != replicas:
            moves.append((now, target - replicas))
            replicas = target
    return moves, replicas


def turns(moves: Iterable[Move]) -> list[float]:
    """When a move went the other way than the one before."""
    return [at for (_, before), (at, after) in pairwise(moves) if (before > 0) != (after > 0)]


BUSY = Policy(targets=(occupancy(),), max_replicas=400)


def test_the_documented_example_holds() -> None:
    decision = once(Policy(), seen(0, 5, 85.0)).decision
    assert (decision.action, decision.target_replicas, decision.current_replicas) == ("scale_up", 6, 5)
    assert decision.reason == "CPU utilization 85.0% > target 70%"


@pytest.mark.parametrize(
    ("replicas", "value", "wish"),
    [
        (1, 78.0, 2),
        (1, 77.0, 1),
        (5, 77.0, 5),
        (5, 77.1, 6),
        (10, 90.0, 12),
        (10, 100.0, 15),  # saturated: what the demand really is nobody sees
        (10, 63.0, 10),
        (10, 62.9, 9),
        (10, 31.0, 5),
        (7, 70.0, 7),
        (10, 0.0, 1),
        (1, 0.0, 1),
        (3, 60.0, 3),  # below the band, but two would be above the target
    ],
)
def test_band_rule(replicas: int, value: float, wish: int) -> None:
    assert once(Policy(), seen(0, replicas, value)).wish == wish


@pytest.mark.parametrize("replicas", [*range(1, 40), 99, 250, 399])
@pytest.mark.parametrize("value", [77.5, 84.0, 100.0, 140.0, 1000.0])
def test_an_overloaded_fleet_grows_from_every_size(replicas: int, value: float) -> None:
    for goal in (cpu(), occupancy()):
        decision = once(Policy(targets=(goal,), max_replicas=400), seen(0, replicas, value, goal.metric)).decision
        assert decision.action == "scale_up"
        assert decision.target_replicas > replicas


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 25000), st.sampled_from([cpu(), occupancy(), occupancy(35.0), cpu(90.0)]))
def test_constant_load_moves_one_way_and_then_rests(replicas: int, load: float, goal: Target) -> None:
    policy = Policy(targets=(goal,), max_replicas=400)
    moves, size = drive(policy, lambda at: load, replicas, seconds=LONG, every=TICK, metric=goal.metric)
    assert not turns(moves)
    assert not [at for at, _ in moves if at > LONG - 3600]
    assert load / size <= goal.upper or size == policy.max_replicas
    assert load / size >= goal.lower or size == max(1, ceil(load / goal.target - 1e-9))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.floats(70, 9000), st.integers(0, 10_000))
def test_noise_never_turns_the_fleet_round(replicas: int, load: float, seed: int) -> None:
    chance = Random(seed)
    moves, _ = drive(BUSY, lambda at: load * chance.uniform(0.9531, 1.0469), replicas, seconds=3600.0)
    assert not turns(moves)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(st.tuples(st.floats(5, 600), st.floats(0, 6000)), min_size=2, max_size=30))
def test_whatever_the_load_one_turn_from_growth_to_shrinking_in_a_down_window(replicas: int, path: list[tuple[float, float]]) -> None:
    """Random steps of the load, of random length."""
    edges: list[tuple[float, float]] = []
    at = 0.0
    for lasting, level in path:
        at += lasting
        edges.append((at, level))
    moves, _ = drive(BUSY, lambda now: next((level for end, level in edges if now <= end), edges[-1][1]), replicas, seconds=at)
    shrinks = [when for (_, before), (when, after) in pairwise(moves) if before > 0 > after]
    assert all(later - earlier >= DOWN for earlier, later in pairwise(shrinks))
    for (before, _), (when, delta) in pairwise(moves):
        assert delta > 0 or when - before >= DOWN - 1e-6
    for when in turns(moves):
        levels = [level for _, level in edges]
        assert max(levels) > 1.1 * min(levels), when


garbage = st.sampled_from([nan, inf, -inf, -1.0, 1e300, -1e300, 1e30])


@given(st.integers(1, 100), garbage, st.sampled_from(["cpu", "memory", "occupancy", "queue"]))
def test_what_cannot_be_a_value_never_moves_the_fleet(replicas: int, value: float, metric: str) -> None:
    goal = {"cpu": cpu(), "memory": memory(), "occupancy": occupancy(), "queue": custom("queue", 5.0)}[metric]
    for reading in (Reading(total=value, replicas=replicas), Reading(total=value), Reading(total=value * replicas, replicas=1)):
        found = once(Policy(targets=(goal,)), Observation(now=0, replicas=replicas, readings={metric: reading}))
        assert found.decision.action == "no_action"
        assert "unavailable" in found.decision.reason


def test_stale_and_failed_readings_hold_with_their_reason() -> None:
    old = Observation(now=100, replicas=5, readings={"cpu": Reading(total=500, replicas=5, at=69.9)})
    assert once(Policy(), old).decision.reason == "CPU utilization unavailable: its value is too old; held: no metric is available"
    failed = Observation(now=100, replicas=5, readings={"cpu": Reading(error="timed out after 2 s")})
    assert "timed out after 2 s" in once(Policy(), failed).decision.reason
    assert once(Policy(), Observation(now=0, replicas=5, readings={})).decision.action == "no_action"


@given(st.integers(1, 60), st.lists(st.floats(0, 200), min_size=1, max_size=60), st.integers(0, 60))
def test_a_gap_never_argues_for_a_move(replicas: int, values: list[float], starting: int) -> None:
    values = values[:replicas]
    reading = Reading(total=sum(values), replicas=len(values))
    wish = propose(occupancy(), reading, replicas, now=0, max_age_seconds=30).wish
    mean = sum(values) / len(values)
    assert wish >= replicas if mean > 70 else wish <= replicas
    whole = propose(occupancy(), Reading(total=mean * replicas, replicas=replicas), replicas, now=0, max_age_seconds=30).wish
    # Gaps only ever make the move smaller that the measured ones ask for.
    assert (wish <= whole) if mean > 70 else (wish >= whole)


def test_only_settled_lately_sampled_replicas_count() -> None:
    def sample(at: float = 100.0, ready_at: float | None = 0.0, value: float = 50.0) -> Sample:
        return Sample(at=at, ready_at=ready_at, values={"cpu": value, "occupancy": value})

    samples = [sample(), sample(at=69.0), sample(ready_at=None), sample(ready_at=90.0, value=7.0), sample(value=nan), sample(value=-1.0)]
    found = read([cpu(), occupancy(), memory()], samples, now=100.0, window_seconds=15.0)
    assert (found["cpu"].total, found["cpu"].replicas) == (50.0, 1)
    assert (found["occupancy"].total, found["occupancy"].replicas) == (57.0, 2)  # a gauge is true from the first moment
    assert found["memory"].replicas == 0


def test_the_largest_proposal_wins_and_is_named() -> None:
    readings = {"cpu": Reading(total=400, replicas=5), "memory": Reading(total=250, replicas=5), "queue": Reading(total=90)}
    found = once(Policy(targets=(cpu(), memory(), custom("queue", 10.0))), Observation(now=0, replicas=5, readings=readings))
    assert (found.winner, found.wish) == ("queue", 9)
    assert found.decision.reason == "queue 18.0 per replica > target 10"
    assert [one.wish for one in found.proposals] == [6, 4, 9]
    assert json.loads(json.dumps(found.to_json()))["proposals"][1]["reason"] == "memory utilization 50.0% < target 80%"


def test_a_failed_metric_stops_shrinking_but_not_growing() -> None:
    policy = Policy(targets=(cpu(), custom("queue", 10.0)))
    low = Observation(now=0, replicas=5, readings={"cpu": Reading(total=50, replicas=5), "queue": Reading(error="refused")})
    assert once(policy, low).limits[0].kind == "hold"
    assert once(policy, low).decision.target_replicas == 5
    high = replace(low, readings={**low.readings, "cpu": Reading(total=500, replicas=5)})
    assert once(policy, high).decision.action == "scale_up"
    optional = Policy(targets=(cpu(), occupancy(optional=True)))
    assert once(optional, replace(low, readings={"cpu": Reading(total=50, replicas=5)})).decision.action == "scale_down"


@pytest.mark.parametrize(
    ("behavior", "replicas", "expected"),
    [
        (FallbackBehavior.CURRENT, 9, 5),
        (FallbackBehavior.STATIC, 9, 9),
        (FallbackBehavior.STATIC, 2, 2),
        (FallbackBehavior.CURRENT_IF_HIGHER, 9, 9),
        (FallbackBehavior.CURRENT_IF_HIGHER, 2, 5),
        (FallbackBehavior.CURRENT_IF_LOWER, 2, 2),
        (FallbackBehavior.CURRENT_IF_LOWER, 9, 5),
    ],
)
def test_fallback_after_enough_failed_ticks(behavior: FallbackBehavior, replicas: int, expected: int) -> None:
    policy, memory = Policy(fallback=Fallback(behavior=behavior, replicas=replicas)), Memory()
    for tick in range(12):
        found, memory = evaluate(policy, Observation(now=tick * TICK, replicas=5, readings={}), memory)
        if tick < 2:
            assert found.decision.target_replicas == 5
        if found.acts:
            break
    assert found.decision.target_replicas == expected


@given(st.integers(0, 200), st.floats(0, 500), st.integers(0, 50), st.integers(0, 100))
def test_bounds_always_hold(replicas: int, value: float, least: int, more: int) -> None:
    policy = Policy(min_replicas=least, max_replicas=max(1, least + more), targets=(occupancy(),))
    decision = once(policy, seen(0, replicas, value, "occupancy")).decision
    assert decision.target_replicas <= policy.max_replicas
    assert decision.target_replicas >= policy.min_replicas or decision.target_replicas == replicas == 0


def test_outside_its_bounds_the_fleet_returns_at_once() -> None:
    memory = Memory(tick_at=0.0, changed_at=0.0, grown_at=0.0, replicas=20)
    found = once(Policy(max_replicas=10), seen(1, 20, 85.0), memory)
    assert (found.decision.target_replicas, found.decision.reason) == (10, "20 replicas are more than max_replicas 10")
    assert once(Policy(min_replicas=4), seen(1, 2, 10.0)).decision.reason == "2 replicas are fewer than min_replicas 4"


def test_urgent_growth_waits_for_no_tick_and_other_growth_for_two_that_agree() -> None:
    memory = Memory(tick_at=0.0, last_wish=10, replicas=10)
    assert once(Policy(), seen(5, 10, 96.0), memory).decision.target_replicas == 14
    calm, memory = evaluate(Policy(), seen(5, 10, 80.0), memory)
    assert calm.decision.reason == "CPU utilization 80.0% > target 70%; held: the next tick decides (25 s left)"
    first, memory = evaluate(Policy(), seen(30, 10, 80.0), memory)
    assert first.decision.action == "no_action"
    second, memory = evaluate(Policy(), seen(60, 10, 90.0 - 1e-6), memory)
    assert second.decision.target_replicas == 11  # as far as both agree
    assert second.decision.reason.startswith("CPU utilization 90.0% > target 70%")


def test_growth_that_is_not_urgent_waits_after_the_last_one() -> None:
    memory = Memory(tick_at=0.0, last_wish=12, grown_at=0.0, changed_at=0.0, replicas=10)
    held = once(Policy(), seen(30, 10, 80.0), memory)
    assert (held.limits[0].kind, held.limits[0].seconds_left) == ("cooldown", 30.0)
    assert once(Policy(), seen(60, 10, 80.0), memory).decision.target_replicas == 11
    assert once(Policy(), seen(30, 10, 90.0), memory).decision.target_replicas == 12


def test_growth_by_rates_of_the_horizontal_autoscaler() -> None:
    found, memory = evaluate(Policy(targets=(occupancy(),)), seen(0, 2, 2000.0, "occupancy"), Memory())
    assert (found.decision.target_replicas, found.limits[-1].kind) == (6, "rate")
    found, memory = evaluate(Policy(targets=(occupancy(),)), seen(5, 6, 2000.0, "occupancy"), memory)
    assert (found.decision.action, found.limits[-1].seconds_left) == ("no_action", 10.0)
    found, memory = evaluate(Policy(targets=(occupancy(),)), seen(15, 6, 2000.0, "occupancy"), memory)
    assert found.decision.target_replicas == 12
    strict = Policy(targets=(occupancy(),), strictest_rate=True)
    assert once(strict, seen(0, 2, 2000.0, "occupancy")).decision.target_replicas == 4
    assert once(replace(strict, up_rates=()), seen(0, 2, 2000.0, "occupancy")).decision.target_replicas == 57


def test_shrinking_waits_for_calm_and_goes_to_the_largest_wish_of_the_window() -> None:
    policy, memory, replicas, moves = Policy(), started(0.0, 10), 10, []
    for step in range(1, 140):
        value = 300.0 if step < 20 else 200.0  # 5, then 3 replicas' worth
        found, memory = evaluate(policy, seen(step * SAMPLE, replicas, value / replicas), memory)
        if found.acts:
            moves.append((step * SAMPLE, found.decision.target_replicas))
            replicas = found.decision.target_replicas
    assert moves == [(305.0, 5), (605.0, 3)]


def test_shrinking_says_what_holds_it() -> None:
    def held(**more: object) -> tuple[str, float | None]:
        observation = Observation(now=600, replicas=5, readings={"cpu": Reading(total=50, replicas=5)}, **more)  # type: ignore[arg-type]
        found = once(Policy(min_available=5 if not more else 4), observation, past)
        return found.limits[-1].kind, found.limits[-1].seconds_left

    past = Memory(replicas=5, changed_at=500.0)
    assert held() == ("cooldown", 200.0)
    past = Memory(replicas=5, wishes=((450.0, 7), (500.0, 5), (560.0, 4)))
    assert held() == ("window", 200.0)
    past = Memory(replicas=5)
    assert held(starting=1) == ("starting", None)
    assert held(unavailable=1) == ("budget", None)
    assert held() == ("budget", None)


@pytest.mark.parametrize(
    ("rates", "strictest", "expected"),
    [
        ((), False, 2),
        ((Rate(value=3, period_seconds=60),), False, 17),
        ((Rate(value=10, period_seconds=60, percent=True),), False, 18),
        ((Rate(value=3, period_seconds=60), Rate(value=10, period_seconds=60, percent=True)), False, 17),
        ((Rate(value=3, period_seconds=60), Rate(value=10, period_seconds=60, percent=True)), True, 18),
    ],
)
def test_shrinking_by_rates(rates: tuple[Rate, ...], strictest: bool, expected: int) -> None:
    policy = Policy(down_rates=rates, strictest_rate=strictest)
    assert once(policy, seen(0, 20, 5.0)).decision.target_replicas == expected


def test_min_available_leaves_enough() -> None:
    assert once(Policy(min_available=4), seen(0, 10, 5.0)).decision.target_replicas == 4
    assert once(Policy(min_available=4), seen(0, 10, 5.0, unavailable=3)).decision.target_replicas == 7


def test_a_shrink_that_was_a_mistake_makes_the_next_one_wait_twice_as_long() -> None:
    def load(at: float) -> float:
        return 900.0 if at % 600 < 120 else 150.0

    moves, _ = drive(BUSY, load, 3, seconds=3 * 3600)
    shrinks = [at for at, delta in moves if delta < 0]
    # The first cycles shrink after one window; then the load's coming back is expected, and the fleet stays.
    assert 1 <= len(shrinks) <= 3


def test_the_host_limits_growth_and_never_forces_a_shrink() -> None:
    def target(replicas: int, value: float, **host: float) -> int:
        found = once(Policy(), seen(0, replicas, value, host=Host(**host)))
        assert found.decision.target_replicas >= replicas
        return found.decision.target_replicas

    assert target(2, 300.0, cores=2, cores_per_busy_agent=1.0) == 2
    assert target(2, 300.0, cores=4, cores_per_busy_agent=1.0) == 5
    assert target(9, 300.0, cores=2, cores_per_busy_agent=1.0) == 9
    assert target(4, 300.0, available_memory=10e9, reserved_memory=2e9, memory_per_agent=3e9) == 6
    assert target(4, 300.0, available_memory=1e9, reserved_memory=2e9, memory_per_agent=3e9) == 4
    assert target(4, 300.0, pressure_percent=10.1) == 4
    assert target(4, 300.0, pressure_percent=nan, cores=nan, cores_per_busy_agent=nan, available_memory=nan) == 8
    held = once(Policy(), seen(0, 2, 300.0, host=Host(cores=2, cores_per_busy_agent=1.0)))
    assert held.decision.reason.endswith("held: 2 cores carry 2 agents that use 1.00 each")


def test_a_crash_looping_fleet_does_not_grow() -> None:
    found = once(Policy(), seen(0, 5, 100.0, crash_looping=True))
    assert (found.decision.action, found.limits[-1].kind) == ("no_action", "crash-loop")


def test_blocked_agents_are_no_capacity() -> None:
    readings = {"cpu": Reading(total=425, replicas=5)}
    found = once(Policy(), Observation(now=0, replicas=8, blocked=3, readings=readings))
    assert (found.decision.target_replicas, found.decision.reason) == (9, "CPU utilization 85.0% > target 70%")
    nobody = once(Policy(), Observation(now=0, replicas=3, blocked=3, readings={"cpu": Reading(total=0, replicas=0)}))
    assert nobody.decision.action == "no_action"


def test_a_recommendation_is_told_and_not_remembered_as_done() -> None:
    policy, memory = Policy(recommend=True), Memory()
    for tick in range(3):
        found, memory = evaluate(policy, seen(tick * TICK, 5, 85.0), memory)
        assert (found.decision.action, found.decision.target_replicas, found.acts) == ("scale_up", 6, False)
    assert (memory.grown_at, memory.moves) == (None, ())


def test_a_leak_loses_its_vote_for_growth() -> None:
    def leak(goal: Target) -> tuple[Evaluation, Memory, list[int]]:
        memory_, replicas, sizes = started(0.0, 4), 4, []
        for step in range(1, 121):
            observation = seen(step * SAMPLE, replicas, 95.0, "memory")
            found, memory_ = evaluate(Policy(targets=(goal,)), observation, memory_)
            replicas = found.decision.target_replicas
            sizes.append(replicas)
        return found, memory_, sizes

    assert leak(replace(memory(), checks_futility=False))[2][-1] > 10
    found, memory_, sizes = leak(memory())
    policy, replicas = Policy(targets=(memory(),)), sizes[-1]
    assert set(sizes) == {5}
    assert found.proposals[0].futile
    assert found.decision.reason.endswith("growth has not lowered memory utilization")
    found, memory_ = evaluate(policy, seen(630, replicas, 60.0, "memory"), memory_)
    assert not memory_.futile
    assert evaluate(policy, seen(660, replicas, 95.0, "memory"), memory_)[0].wish > replicas


def test_growth_that_helps_keeps_its_vote() -> None:
    moves, size = drive(Policy(targets=(custom("queue", 10.0),)), lambda at: 200.0 + at / 4, 4, seconds=1800.0, metric="queue")
    assert len(moves) > 3
    assert size > 50


def test_scale_to_zero_and_back() -> None:
    policy = Policy(min_replicas=0, targets=(pending(5.0),), idle_seconds=600.0)
    memory, replicas, sizes = Memory(), 1, []
    for step in range(60):
        now = step * TICK
        seen_now = Observation(now=now, replicas=replicas, readings={"pending": Reading(total=0.0)}, idle=now >= 300)
        found, memory = evaluate(policy, seen_now, memory)
        replicas = found.decision.target_replicas
        sizes.append((now, replicas))
    assert next(now for now, size in sizes if size == 0) == 900
    woken = Observation(now=2000, replicas=0, readings={"pending": Reading(total=3.0)}, pending=3)
    found = once(policy, woken, memory)
    assert (found.decision.target_replicas, found.acts) == (1, True)
    assert found.decision.reason == "3 requests are pending and no replica is there"
    assert once(replace(policy, idle_seconds=None), replace(woken, replicas=1, pending=0, idle=True)).decision.target_replicas == 1


TO_ZERO = Policy(min_replicas=0, targets=(cpu(), custom("jobs", 5.0, total=True)), idle_seconds=60.0)


def at_rest(now: float, replicas: int, jobs: float = 0.0, **changes: Any) -> Observation:
    readings = {"cpu": Reading(total=0.4 * replicas, replicas=replicas, at=now), "jobs": Reading(total=jobs, at=now)}
    return replace(Observation(now=now, replicas=replicas, readings=readings, idle=not jobs), **changes)


def test_all_agents_go_at_once_and_at_any_sample_when_none_had_work_for_long() -> None:
    memory = started(0.0, 7)
    for now in range(0, 60, 5):
        found, memory = evaluate(TO_ZERO, at_rest(now, 7), memory)
        assert not found.acts
        assert found.limits[0].kind == "idle"
    assert found.limits[0].seconds_left == 5
    found, memory = evaluate(TO_ZERO, at_rest(60, 7), memory)
    assert (found.decision.target_replicas, found.decision.reason, found.acts) == (0, "no work for 60 s", True)


@pytest.mark.parametrize(
    ("change", "kept", "reason"),
    [
        ({"idle": False}, 1, "CPU utilization 0.4% < target 70%"),
        ({"protected": 2}, 2, "2 agents are protected"),
        ({"starting": 1, "idle": False}, 3, "1 replicas are still starting"),
    ],
)
def test_what_keeps_a_fleet_from_going_to_zero(change: dict[str, Any], kept: int, reason: str) -> None:
    policy, memory, size = replace(TO_ZERO, scale_down_stabilization_seconds=0.0), started(0.0, 3), 3
    for now in range(0, 91, 5):  # to the end of a tick
        found, memory = evaluate(policy, at_rest(now, size, **change), memory)
        size = found.decision.target_replicas
    assert (size, reason in found.decision.reason) == (kept, True), found.decision.reason


def test_a_moment_of_work_and_a_size_set_by_hand_begin_the_wait_anew() -> None:
    memory = started(0.0, 1)
    for now in range(0, 120, 5):
        found, memory = evaluate(TO_ZERO, at_rest(now, 1, idle=now != 50), memory)
        assert found.acts == (now == 115), now
        if found.acts:
            break
    for now in range(120, 400, 5):  # at zero for long
        found, memory = evaluate(TO_ZERO, at_rest(now, 0), memory)
        assert (found.decision.target_replicas, found.decision.reason) == (0, AT_ZERO)
    for now in range(400, 500, 5):
        found, memory = evaluate(TO_ZERO, at_rest(now, 1), memory)
        if found.acts:
            break
    assert now == 465


def test_at_zero_only_what_is_known_without_agents_counts() -> None:
    policy = replace(TO_ZERO, fallback=Fallback(behavior=FallbackBehavior.STATIC, replicas=4))
    memory = started(0.0, 0)
    sockets_only = replace(policy, targets=(cpu(),))
    for now in range(0, 300, 30):  # no agent that could be measured is no failure
        found, memory = evaluate(sockets_only, at_rest(now, 0), memory)
        assert (found.decision.target_replicas, found.decision.reason, found.proposals) == (0, AT_ZERO, ())
    found, memory = evaluate(policy, at_rest(301, 0, jobs=12), memory)
    assert (found.decision.target_replicas, found.decision.reason, found.acts) == (3, "jobs is 12 and no replica is there", True)
    broken = replace(at_rest(400, 0), readings={"jobs": Reading(error="it is broken")}, idle=False)
    found, _ = evaluate(policy, broken, started(0.0, 0))
    assert (found.decision.target_replicas, found.decision.reason) == (0, "jobs unavailable: it is broken; held: no metric is available")


def test_a_size_that_somebody_else_set_starts_the_cooldowns() -> None:
    _, memory = evaluate(Policy(), seen(0, 5, 70.0), Memory())
    held, memory = evaluate(Policy(), seen(400, 10, 20.0), memory)
    assert held.limits[-1].kind == "cooldown"
    assert memory.changed_at == memory.grown_at == 400


def test_memory_survives_being_written_down() -> None:
    policy = Policy(targets=(occupancy(), memory()), max_replicas=50)
    kept = lost = started(0.0, 3)
    replicas = 3
    for step in range(1, 400):
        now, load = step * SAMPLE, 200 + 400 * (step // 60 % 2)
        readings = {"occupancy": Reading(total=load, replicas=replicas), "memory": Reading(total=85.0 * replicas, replicas=replicas)}
        observation = Observation(now=now, replicas=replicas, readings=readings)
        lost = Memory.from_json(json.loads(json.dumps(lost.to_json())))
        (first, kept), (second, lost) = evaluate(policy, observation, kept), evaluate(policy, observation, lost)
        assert (first, kept) == (second, lost)
        replicas = first.decision.target_replicas


@pytest.mark.parametrize("damage", [{"tick_at": "noon"}, {"wishes": [[1]]}, {"wishes": [[nan, 3]]}, {"replicas": []}, {"growths": [{}]}])
def test_a_damaged_memory_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Memory.from_json({**Memory().to_json(), **damage})


def test_a_clock_set_back_lengthens_no_cooldown() -> None:
    memory = Memory(tick_at=1e6, grown_at=1e6, changed_at=1e6, wishes=((1e6, 9),), moves=((1e6, 3),), replicas=5, last_wish=6)
    _, memory = evaluate(Policy(), seen(0, 5, 85.0), memory)
    assert once(Policy(), seen(60, 5, 85.0), memory).decision.action == "scale_up"


def test_memory_stays_small() -> None:
    memory, replicas = started(0.0, 5), 5
    for step in range(1, 2000):
        found, memory = evaluate(BUSY, seen(step * SAMPLE, replicas, (500 - step % 400) / replicas, "occupancy"), memory)
        replicas = found.decision.target_replicas
        assert len(memory.wishes) <= 2 * DOWN / TICK + 2
        assert len(memory.moves) <= 20


@pytest.mark.parametrize(
    ("busy", "waiting", "slots", "service", "expected"),
    [(3, 0, 4, 1.0, 75.0), (4, 100, 4, 0.1, 125.0), (4, 2, 4, 30.0, 150.0), (0, 0, 8, 1.0, 0.0)],
)
def test_occupancy_counts_what_waits_by_the_slots_it_takes(
    busy: float, waiting: float, slots: float, service: float, expected: float
) -> None:
    assert occupancy_percent(busy, waiting, slots, service) == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cpu(0),
        lambda: cpu(90.1),
        lambda: cpu(nan),
        lambda: custom("queue", -1),
        lambda: custom("queue", inf),
        lambda: Policy(min_replicas=5, max_replicas=4),
        lambda: Policy(targets=()),
        lambda: Rate(value=0, period_seconds=15),
        lambda: Rate(value=4, period_seconds=nan),
        lambda: replace(cpu(), tolerance_up=-0.1),
    ],
)
def test_a_policy_that_cannot_be_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()
