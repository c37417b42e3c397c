"""Replays a load against a simulated fleet under a scaling policy, on a virtual clock, and reports what users waited and what it cost."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple, Protocol

from fleetctl.core.demand import Reading, occupancy_percent
from fleetctl.core.kubernetes_rule import SYNC_SECONDS, KubernetesRule, PodMetrics
from fleetctl.core.memory import Memory, started
from fleetctl.core.plant import Plant, PlantSpec, Waits
from fleetctl.core.policy import Host, Observation, Policy
from fleetctl.core.scaling import evaluate

WINDOW_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A load, in requests of each step, on a fleet that starts with `start` replicas, and what is asked of its size.

    `lost`: the share of samples that fail; `chance`: a number in [0, 1) for each step, which decides how many they are.
    """

    plant: PlantSpec
    loads: Sequence[float]
    step_seconds: float
    start: int
    target: float
    least: int
    most: int
    objective_seconds: float
    metric: str = "occupancy"
    lost: float = 0.0
    chance: Sequence[float] = ()


class View(NamedTuple):
    """What can be measured of the fleet at the end of a step. Percentages are means over a window, of a replica.

    `occupancy`: slots and pending requests; `demand`: CPU that was used or waited for, of what an agent can use; `usage`: CPU that
    was used, of the limit. `measured`: replicas with CPU values to trust, `reporting`: with occupancy, which is true at once;
    `missing`: those whose sample was lost. A tuple, because one is made for each step.
    """

    now: float
    replicas: int
    starting: int
    measured: int
    reporting: int
    missing: int
    occupancy: float
    demand: float
    usage: float


class Controller(Protocol):
    def decide(self, view: View) -> int:
        """The number of replicas to have from now on."""
        ...


class Ours:
    """The rule that the daemon runs."""

    def __init__(self, policy: Policy, scene: Scene) -> None:
        self.policy, self.metric = policy, scene.metric
        self.memory: Memory = started(0.0, scene.start)
        plant = scene.plant
        self.host = None if plant.cores is None else Host(cores=plant.cores, cores_per_busy_agent=plant.replica_cores)

    def decide(self, view: View) -> int:
        value, measured = (view.occupancy, view.reporting) if self.metric == "occupancy" else (view.demand, view.measured)
        reading = Reading(total=value * measured, replicas=measured, at=view.now)
        seen = Observation(
            now=view.now, replicas=view.replicas, readings={self.metric: reading}, starting=view.starting, host=self.host, at=view.now
        )
        evaluation, self.memory = evaluate(self.policy, seen, self.memory)
        return evaluation.decision.target_replicas


class Kubernetes:
    """The Kubernetes rule on the same metric, CPU as its metrics server tells it."""

    def __init__(self, scene: Scene) -> None:
        self.metric, self.next_sync = scene.metric, SYNC_SECONDS
        self.rule = KubernetesRule(target=scene.target, least=scene.least, most=scene.most, now=0.0, replicas=scene.start)

    def decide(self, view: View) -> int:
        if view.now < self.next_sync - 1e-6:
            return view.replicas
        self.next_sync += SYNC_SECONDS
        mean, measured = (view.occupancy, view.reporting) if self.metric == "occupancy" else (view.usage, view.measured)
        unready = view.replicas - measured - view.missing
        return self.rule.decide(view.now, PodMetrics(mean=mean, measured=measured, unready=unready, missing=view.missing), view.replicas)


@dataclass(frozen=True, slots=True)
class Fixed:
    """So many replicas, whatever comes."""

    replicas: int

    def decide(self, view: View) -> int:
        return self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a policy did with the load. `sizes`: replicas asked for, by step."""

    requests: float
    wait_mean_seconds: float
    wait_p95_seconds: float
    over_objective: float
    replica_hours: float
    actions: int
    reversals: int
    largest: int
    sizes: Sequence[int]


def replay(scene: Scene, controller: Controller) -> Report:
    """Run the load through the fleet, asking the controller after each step."""
    plant, length = Plant(scene.plant, scene.start, WINDOW_SECONDS), scene.step_seconds
    meter = _Meter(plant, max(1, round(WINDOW_SECONDS / length)))
    sizes, size, lost, chance = [], scene.start, scene.lost, scene.chance
    for number, requests in enumerate(scene.loads, 1):
        sizes.append(size)
        plant.advance(number * length, requests)
        view = meter.read(int(plant.ready * lost + chance[number - 1]) if lost else 0)
        size = controller.decide(view)
        if size != view.replicas:
            plant.resize(size)
    plant.finish()
    return _report(scene, plant, sizes)


def plan(plant: PlantSpec, loads: Sequence[float], step_seconds: float, target: float, least: int, most: int) -> list[int]:
    """The fewest replicas, step by step, that carry the load at the target: what somebody who knew the future would have had."""
    each = 100.0 * plant.service_seconds / (step_seconds * plant.slots * target)
    return [max(least, min(most, ceil(load * each - 1e-9))) for load in loads]


def replica_hours(sizes: Sequence[int], step_seconds: float) -> float:
    return sum(sizes) * step_seconds / 3600


class _Meter:
    """Reads the plant as the daemon reads its agents: means over the last steps."""

    def __init__(self, plant: Plant, steps: int) -> None:
        self.plant, self.at = plant, 0.0
        self.occupied: deque[float] = deque(maxlen=steps)
        self.busy: deque[float] = deque(maxlen=steps)

    def read(self, missing: int) -> View:
        plant, spec = self.plant, self.plant.spec
        ready, replicas = plant.ready, plant.replicas
        slots = max(1e-9, ready * spec.slots)
        scale = 100.0 / (slots * (plant.now - self.at))
        self.at = plant.now
        self.occupied.append(plant.occupied_seconds * scale)
        self.busy.append(plant.busy_seconds * scale)
        plant.occupied_seconds = plant.busy_seconds = 0.0
        occupied, pending = sum(self.occupied) / len(self.occupied), plant.pending
        waiting = occupancy_percent(0.0, pending, slots, spec.service_seconds) if pending else 0.0
        return View(
            now=plant.now,
            replicas=replicas,
            starting=replicas - ready,
            measured=max(0, plant.settled - missing),
            reporting=ready - missing,
            missing=missing,
            occupancy=occupied + waiting,
            demand=occupied,
            usage=sum(self.busy) / len(self.busy) * spec.replica_cores / spec.cpu_limit,
        )


def _report(scene: Scene, plant: Plant, sizes: Sequence[int]) -> Report:
    total = plant.unwaited + sum(one.requests for one in plant.waits)
    moves = [after - before for before, after in pairwise(sizes) if after != before]
    return Report(
        requests=total,
        wait_mean_seconds=sum(one.requests * (one.first + one.last) / 2 for one in plant.waits) / total if total else 0.0,
        wait_p95_seconds=_quantile(plant.waits, total, 0.95),
        over_objective=sum(one.over(scene.objective_seconds) for one in plant.waits) / total if total else 0.0,
        replica_hours=replica_hours(sizes, scene.step_seconds),
        actions=len(moves),
        reversals=sum((before > 0) != (after > 0) for before, after in pairwise(moves)),
        largest=max(sizes),
        sizes=sizes,
    )


def _quantile(waits: Sequence[Waits], total: float, share: float) -> float:
    """The wait that this share of all requests did not exceed."""
    ordered = sorted(((one.first + one.last) / 2, one.requests) for one in waits)
    unwaited = total - sum(requests for _, requests in ordered)
    if not ordered or unwaited >= share * total:
        return 0.0
    reached = list(accumulate((requests for _, requests in ordered), initial=unwaited))[1:]
    return ordered[min(len(ordered) - 1, bisect_left(reached, share * total))][0]
