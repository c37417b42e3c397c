"""The simulated plant against arithmetic done by hand and against laws that every queue obeys."""

from math import exp
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.plant import Plant, PlantSpec, Waits
from fleetctl.core.trace import Bin, parse, steps
from fleetctl.errors import UsageError


def served(plant: Plant) -> float:
    return plant.unwaited + sum(one.requests for one in plant.waits)


def waited(plant: Plant) -> float:
    return sum(one.requests * (one.first + one.last) / 2 for one in plant.waits)


def test_a_fleet_with_room_lets_nobody_wait() -> None:
    plant = Plant(PlantSpec(service_seconds=2.0), 10)
    for second in range(1, 61):
        plant.advance(float(second), 4.0)
    assert plant.waits == []
    assert plant.inside == pytest.approx(8.0)  # Little: 4 a second, 2 seconds each
    assert plant.busy_seconds == pytest.approx(8.0 * 60 - 2 * 8.0, rel=1e-3)  # it took a while to fill


def test_a_queue_grows_and_is_worked_off_first_come_first_served() -> None:
    plant = Plant(PlantSpec(service_seconds=1.0), 10)
    plant.inside = 10.0
    plant.advance(10.0, 150.0)  # 15 a second where 10 can be served
    assert plant.pending == pytest.approx(50.0)
    plant.advance(20.0, 50.0)
    assert plant.pending == pytest.approx(0.0, abs=1e-6)
    assert served(plant) == pytest.approx(200.0)
    assert max(max(one.first, one.last) for one in plant.waits) == pytest.approx(5.0)
    assert waited(plant) == pytest.approx((50 * 10 / 2) + (50 * 10 / 2))  # the area below the queue
    # The last of the first ten seconds waits 5 s; 10 seconds of arrivals wait longer than 2.5 s at one half each.
    assert sum(one.over(2.5) for one in plant.waits) == pytest.approx(75 + 25)


def test_new_replicas_take_from_the_queue_when_they_are_ready() -> None:
    spec = PlantSpec(cold_seconds=10.0, warm_seconds=0.5, pool_size=2, refill_seconds=100.0)
    plant = Plant(spec, 1)
    plant.inside = 1.0
    plant.resize(6)
    assert (plant.replicas, plant.ready) == (6, 1)
    plant.advance(5.0, 50.0)
    assert (plant.ready, plant.settled) == (3, 1)
    plant.advance(12.0, 0.0)
    assert (plant.ready, plant.settled) == (6, 1)
    assert plant.pool == pytest.approx(0.12)
    plant.advance(15.5, 0.0)
    assert plant.settled == 3


def test_the_pool_refills_one_after_the_other() -> None:
    plant = Plant(PlantSpec(pool_size=3, refill_seconds=10.0), 1)
    plant.resize(4)
    assert plant.pool == 0
    plant.advance(25.0, 0.0)
    assert plant.pool == pytest.approx(2.5)
    plant.advance(60.0, 0.0)
    assert plant.pool == 3


def test_shrinking_takes_starting_ones_first_and_lets_work_be_finished() -> None:
    plant = Plant(PlantSpec(pool_size=0, service_seconds=100.0), 10)
    plant.inside = 8.0
    plant.resize(15)
    plant.resize(12)
    assert (plant.replicas, plant.ready) == (12, 10)
    plant.resize(5)
    assert (plant.replicas, plant.ready) == (5, 5)
    assert plant.inside == pytest.approx(4.0)
    assert plant.pending == 0.0


def test_a_host_short_of_cores_serves_no_more_than_they_can() -> None:
    plant = Plant(PlantSpec(cores=2.0), 6)
    plant.inside = 2.0
    plant.advance(10.0, 60.0)
    assert plant.busy_seconds == pytest.approx(20.0)
    assert plant.occupied_seconds > 40.0  # slots are taken, and wait for a core
    assert served(plant) == pytest.approx(20.0)


def test_without_replicas_everybody_waits() -> None:
    plant = Plant(PlantSpec(), 0)
    plant.advance(10.0, 5.0)
    assert plant.pending == pytest.approx(5.0)
    plant.finish()
    assert served(plant) == pytest.approx(5.0)
    assert sum(one.over(1000.0) for one in plant.waits) == pytest.approx(5.0)


def test_work_in_progress_follows_the_load_with_the_service_time() -> None:
    plant = Plant(PlantSpec(service_seconds=10.0), 100)
    plant.advance(10.0, 50.0)
    assert plant.inside == pytest.approx(50 * (1 - exp(-1)))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 200), st.integers(0, 30)), min_size=1, max_size=40),
    st.floats(0.05, 50),
    st.integers(1, 8),
    st.one_of(st.none(), st.floats(0.5, 20)),
)
def test_nobody_is_lost_and_nobody_waits_less_than_nothing(
    path: list[tuple[float, int]], service: float, slots: int, cores: float | None
) -> None:
    plant = Plant(PlantSpec(service_seconds=service, slots=slots, cores=cores, cold_seconds=7.0), 3)
    for number, (requests, size) in enumerate(path, 1):
        plant.advance(number * 5.0, requests)
        plant.resize(size)
        assert plant.replicas == size
        assert plant.inside >= -1e-9
        assert plant.busy_seconds <= plant.occupied_seconds + 1e-6
    plant.finish()
    assert served(plant) == pytest.approx(sum(requests for requests, _ in path), rel=1e-6, abs=1e-6)
    assert all(one.first >= 0 and one.last >= 0 and one.requests > 0 for one in plant.waits)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0.1, 8), st.integers(1, 12))
def test_the_mean_wait_is_the_area_below_the_queue(loads: list[float], service: float, replicas: int) -> None:
    """Little's law, with the queue measured in steps a hundred times finer."""
    plant, area, fine = Plant(PlantSpec(service_seconds=service), replicas), 0.0, 50
    for number, load in enumerate(loads):
        for part in range(1, fine + 1):
            before = plant.pending
            plant.advance(5.0 * (number + part / fine), load / fine)
            area += (before + plant.pending) / 2 * 5.0 / fine
    area += plant.pending**2 / 2 * service / replicas  # what is left is worked off
    plant.finish()
    assert waited(plant) == pytest.approx(area, rel=1e-2, abs=0.5)


@pytest.mark.parametrize(("first", "last", "expected"), [(0, 4, 7.5), (4, 0, 7.5), (2, 3, 10), (0, 1, 0)])
def test_those_over_an_objective(first: float, last: float, expected: float) -> None:
    assert Waits(10, first, last).over(1.0) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [{"service_seconds": 0}, {"slots": -1}, {"cold_seconds": float("nan")}, {"pool_size": -1}, {"cores": 0}])
def test_a_plant_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad)).replace("_", " ")):
        PlantSpec(**bad)  # type: ignore[arg-type]  # by name


GOOD = ["seconds,requests", "0,59", "30,132", "60,0"]


def test_a_trace_is_read() -> None:
    expected = [Bin(0, 30, 59), Bin(30, 60, 132), Bin(60, 90, 0)]
    assert parse(GOOD, "t") == expected
    assert parse(GOOD[1:], "t") == expected
    assert parse(["\ufeff" + GOOD[0], "", *GOOD[1:], "  "], "t") == expected
    assert parse(['"0" , "59"', "30,1.32e2", "60, 0"], "t") == expected
    assert parse(["100,59", "130,132", "160,0"], "t") == expected
    assert parse(["5,7"], "t") == [Bin(0, 60, 7)]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "no rows"),
        (["", "  "], "no rows"),
        (["seconds,requests"], "no rows"),
        (["0,1", "60"], "line 2: 1 column instead of the two"),
        (["0,1,2"], "line 1: 3 columns"),
        (["0;1"], "line 1: 1 column"),
        (["0,1", "x,2"], "line 2: 'x' is not a number"),
        (["0,1", "60,"], "line 2: '' is not a number"),
        (["0,nan"], "line 1: 'nan' is not a number"),
        (["0,1", "seconds,requests"], "line 2: 'seconds' is not a number"),
        (["0,-3"], "line 1: '-3' requests: a count cannot be negative"),
        (["0,inf"], "line 1: 'inf' requests are more than 1e"),
        (["0,1e13"], "line 1: '1e13' requests are more than"),
        (["inf,1"], "line 1: 'inf' is no time"),
        (["0,1", "60,2", "30,3"], "line 3: second 30 comes after second 60"),
        (["0,1", "0,2"], "line 2: second 0 comes after second 0"),
        (["0,1", "1e9,2"], "line 2: second 1e[+]09 is more than 400 days"),
        (["\x00\x01\x1b[31m,\x02"], r"line 1: '\?\?\?\[31m' is not a number"),
        (["0,1", "9" * 5000 + ",1"], r"line 2: '9{37}\.\.\.' is no time"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(lines: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse(lines, "load.csv")


@given(
    st.lists(st.tuples(st.floats(0.5, 500), st.floats(0, 1e6)), min_size=1, max_size=50),
    st.sampled_from([1.0, 5.0, 7.3, 30.0]),
    st.one_of(st.none(), st.integers(0, 99)),
)
def test_steps_lose_no_request(bins: list[tuple[float, float]], seconds: float, seed: int | None) -> None:
    made, at = [], 0.0
    for length, requests in bins:
        made.append(Bin(at, at + length, requests))
        at += length
    counts = steps(made, seconds, 2.0, None if seed is None else iter(Random(seed).random, 2.0))
    assert sum(counts) == pytest.approx(2 * sum(requests for _, requests in bins), rel=1e-6, abs=1e-3)
    assert min(counts) >= 0
    assert len(counts) * seconds >= at - 1e-6


def test_chance_spreads_requests_within_their_bin() -> None:
    bins = [Bin(60.0 * number, 60.0 * number + 60, 600.0) for number in range(200)]
    counts = steps(bins, 5.0, 1.0, iter(Random(1).random, 2.0))
    assert all(sum(counts[begin : begin + 12]) == pytest.approx(600) for begin in range(0, 2400, 12))
    mean = sum(counts) / len(counts)
    variance = sum((count - mean) ** 2 for count in counts) / len(counts)
    assert variance == pytest.approx(50 * 11 / 12, rel=0.1)
    assert counts == steps(bins, 5.0, 1.0, iter(Random(1).random, 2.0))
