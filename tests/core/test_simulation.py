"""Our rule on simulated fleets, beside the Kubernetes rule with its defaults: on loads made by chance, and on known hard cases."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pytest

from fleetctl.core import simulation
from fleetctl.core.demand import cpu, occupancy
from fleetctl.core.kubernetes_rule import KubernetesRule, PodMetrics, recommend
from fleetctl.core.plant import PlantSpec
from fleetctl.core.policy import Policy
from fleetctl.core.simulation import Fixed, Kubernetes, Ours, Report, Scene, plan, replay
from fleetctl.core.trace import Bin, steps
from tests.core import loads

STEP, TARGET, MOST = 5.0, 70.0, 200
# Drawn once; no constant of the rule was chosen with these.
SEEDS = (101, 102, 103)
# Here what turns a fleet round is noise. The others swing for longer than the down window: whoever scales down at all has to turn.
NOISY = ("flat", "step", "surge", "wander")


def scene(bins: Sequence[Bin], metric: str = "occupancy", plant: PlantSpec | None = None, **more: object) -> Scene:
    spec, counts = plant or PlantSpec(), steps(bins, STEP)
    chance = [(0.618034 * number) % 1 for number in range(len(counts))]
    start = plan(spec, counts[:1], STEP, TARGET, 1, MOST)[0]
    known = {"plant": spec, "loads": counts, "step_seconds": STEP, "start": start, "target": TARGET, "least": 1, "most": MOST}
    return Scene(**{**known, "objective_seconds": 1.0, "metric": metric, "chance": chance, **more})  # type: ignore[arg-type]  # by name


def both(made: Scene) -> tuple[Report, Report]:
    policy = Policy(max_replicas=MOST, targets=(occupancy(TARGET) if made.metric == "occupancy" else cpu(TARGET),))
    return replay(made, Ours(policy, made)), replay(made, Kubernetes(made))


@lru_cache
def compared(metric: str, lost: float) -> list[tuple[str, Report, Report]]:
    return [
        (f"{name} {seed}", *both(scene(bins, metric, lost=lost))) for seed in SEEDS for name, bins in loads.family(seed, hours=3.0).items()
    ]


@pytest.mark.parametrize(("metric", "lost"), [("occupancy", 0.0), ("cpu", 0.0), ("occupancy", 0.3)])
def test_over_all_kinds_of_load_the_kubernetes_rule_is_beaten(metric: str, lost: float) -> None:
    found = compared(metric, lost)
    ours, theirs = [one for _, one, _ in found], [one for _, _, one in found]
    assert sum(one.over_objective for one in ours) <= sum(one.over_objective for one in theirs)
    assert sum(one.replica_hours for one in ours) <= 1.03 * sum(one.replica_hours for one in theirs)
    if not lost:
        assert sum(one.reversals for one in ours) < 0.9 * sum(one.reversals for one in theirs)


@pytest.mark.parametrize("metric", ["occupancy", "cpu"])
def test_noise_turns_the_fleet_round_much_less_often(metric: str) -> None:
    found = [(one, other) for name, one, other in compared(metric, 0.0) if name.split()[0] in NOISY]
    assert sum(one.reversals for one, _ in found) <= 0.65 * sum(one.reversals for _, one in found)


@pytest.mark.parametrize("metric", ["occupancy", "cpu"])
def test_no_single_load_is_served_much_worse(metric: str) -> None:
    worse = {name: 100 * (one.over_objective - other.over_objective) for name, one, other in compared(metric, 0.0)}
    assert max(worse.values()) < 0.5, worse


def test_a_flat_load_is_left_alone() -> None:
    ours, _ = both(scene(loads.trace(loads.flat(12.0), hours=2.0)))
    assert (ours.actions, ours.over_objective, ours.wait_p95_seconds) == (0, 0.0, 0.0)


@pytest.mark.parametrize("metric", ["occupancy", "cpu"])
def test_a_surge_from_one_replica_is_met(metric: str) -> None:
    ours, theirs = both(scene(loads.trace(loads.surge(0.3, 20.0, 600.0, 300.0), hours=1.0), metric))
    assert ours.over_objective <= theirs.over_objective
    assert ours.largest >= 26
    assert ours.reversals == 0


def test_agents_with_one_thread_and_a_limit_of_two_cores_scale() -> None:
    """By use of their limit they never pass 50 %."""
    plant = PlantSpec(cpu_limit=2.0)
    ours, theirs = both(scene(loads.trace(loads.step(2.0, 8.0, 600.0, 3000.0), hours=1.0), "cpu", plant))
    assert theirs.over_objective > 0.5
    assert ours.over_objective < 0.1
    assert ours.largest >= 11


def test_a_saturated_host_gets_no_more_agents_than_it_carries() -> None:
    plant = PlantSpec(cores=4.0)
    ours, theirs = both(scene(loads.trace(loads.step(2.0, 12.0, 600.0, 3000.0), hours=1.0), plant=plant))
    assert ours.largest == 5
    assert theirs.largest > 50
    assert ours.over_objective == pytest.approx(theirs.over_objective, abs=0.02)


def test_lost_samples_start_no_move() -> None:
    ours, _ = both(scene(loads.trace(loads.flat(12.0), hours=2.0), lost=0.5))
    assert ours.actions == 0


def test_the_same_scene_gives_the_same_report() -> None:
    made = scene(loads.family(7, hours=1.0)["wander"])
    assert both(made) == both(made)


def test_fixed_sizes_and_the_plan() -> None:
    made = scene(loads.trace(loads.step(2.0, 8.0, 600.0, 3000.0), hours=1.0))
    planned = plan(made.plant, made.loads, STEP, TARGET, 1, MOST)
    assert (min(planned), max(planned)) == (3, 12)
    assert simulation.replica_hours(planned, STEP) == pytest.approx((3 * 1200 + 12 * 2400) / 3600)
    report = replay(replace(made, start=12), Fixed(12))
    assert (report.actions, report.over_objective) == (0, 0.0)
    assert report.replica_hours == pytest.approx(12.0)
    short = replay(replace(made, start=4), Fixed(4))
    assert short.wait_p95_seconds > short.wait_mean_seconds > 100
    assert short.requests == pytest.approx(sum(made.loads))


@pytest.mark.parametrize(
    ("mean", "measured", "unready", "missing", "replicas", "expected"),
    [
        (85.0, 5, 0, 0, 5, 7),  # ceil(5 * 85 / 70), where the band rule says 6
        (76.9, 5, 0, 0, 5, 5),
        (63.1, 5, 0, 0, 5, 5),
        (35.0, 10, 0, 0, 10, 5),
        (140.0, 5, 5, 0, 10, 10),  # unready ones count as idle
        (210.0, 5, 5, 0, 10, 15),
        (50.0, 5, 0, 5, 10, 10),  # missing ones count as full when shrinking
        (10.0, 8, 0, 2, 10, 4),
        (90.0, 0, 5, 0, 5, 5),
    ],
)
def test_the_kubernetes_rule_is_as_documented(mean: float, measured: int, unready: int, missing: int, replicas: int, expected: int) -> None:
    assert recommend(PodMetrics(mean=mean, measured=measured, unready=unready, missing=missing), replicas, 70.0) == expected


def test_the_kubernetes_rule_limits_growth_and_waits_to_shrink() -> None:
    def pods(mean: float, replicas: int) -> PodMetrics:
        return PodMetrics(mean=mean, measured=replicas, unready=0, missing=0)

    rule = KubernetesRule(target=70.0, least=1, most=50, now=0.0, replicas=3)
    assert rule.decide(15.0, pods(700.0, 3), 3) == 7
    assert rule.decide(30.0, pods(700.0, 7), 7) == 14
    assert rule.decide(45.0, pods(700.0, 14), 14) == 28
    assert [rule.decide(60.0 + 15 * step, pods(7.0, 28), 28) for step in range(18)] == [28] * 18
    assert rule.decide(346.0, pods(7.0, 28), 28) == 3
