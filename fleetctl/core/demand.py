"""What each metric asks for: from samples of agents to a proposed number of replicas, by the band rule (steps 1 to 3 of scaling).

Combining the proposals, and whether anything is done about them, is left to `core/scaling.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite

from fleetctl.errors import ConfigError

DRAIN_SECONDS = 10.0
# Growth is urgent from this load on, in relation to the upper edge of the band. By load, not by the number of replicas: from one to two
# is always twice as many, and a small fleet would follow every gust.
URGENT_LOAD = 1.5
# Whole replicas are counted in floating point: 7 * 70 / 70 must not become 8.
_SLACK = 1e-9
_MOST_REPLICAS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What one metric should be per replica, and how far it may be off before anything is done.

    `ceiling`: where the metric saturates, so that a value there hides how large the demand is. `urgent`: where waiting begins, so that
    growth cannot. `gauge`: it tells of work at hand, and so is true from a replica's first moment. `plausible`: a larger value is a fault
    of the source. `optional`: that nobody reports it is no failure.
    """

    metric: str
    target: float
    label: str
    unit: str = " per replica"
    tolerance_up: float = 0.10
    tolerance_down: float = 0.10
    ceiling: float = inf
    urgent: float = inf
    gauge: bool = False
    plausible: float = 1e12
    checks_futility: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        most = 90.0 if isfinite(self.ceiling) else self.plausible
        if not 0 < self.target <= most:
            raise ConfigError(f"target of {self.metric} is {self.target:g}: it must be more than 0 and at most {most:g}")
        if not (0 <= self.tolerance_up <= 10 and 0 <= self.tolerance_down < 1):
            raise ConfigError(f"tolerances of {self.metric}: up must lie in 0..10 and down in 0..1 (1 excluded)")

    @property
    def upper(self) -> float:
        return min(self.target * (1 + self.tolerance_up), self.ceiling)

    @property
    def lower(self) -> float:
        return self.target * (1 - self.tolerance_down)


def cpu(target: float = 70.0) -> Target:
    """Percent of the agent's effective CPU limit. A busy agent cannot show more than 100, so 95 already hides demand."""
    return Target(metric="cpu", target=target, label="CPU utilization", unit="%", ceiling=95.0, urgent=90.0, plausible=1e5)


def memory(target: float = 80.0) -> Target:
    """Percent of the memory limit. More replicas do not always lower it: it has to prove that they do."""
    return Target(metric="memory", target=target, label="memory utilization", unit="%", plausible=1e4, checks_futility=True)


def occupancy(target: float = 70.0, *, optional: bool = False) -> Target:
    """Busy slots and the pending requests that matter, in percent of the slots: see `occupancy_percent`."""
    return Target(metric="occupancy", target=target, label="occupancy", unit="%", urgent=90.0, gauge=True, plausible=1e8, optional=optional)


def pending(target: float) -> Target:
    """Requests waiting, per replica, where agents report no slots."""
    return Target(metric="pending", target=target, label="pending requests")


def custom(name: str, target: float, *, gauge: bool = False, total: bool = False) -> Target:
    """A metric of the user's own, as a value per replica or as a total to be shared by the replicas: its reading says which.

    A total, such as the length of a queue, need not prove that growth lowers it: more comes in than goes out until there are enough.
    """
    return Target(metric=name, target=target, label=name, checks_futility=not total, gauge=gauge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The last values of one replica that works: not suspended, not draining, not blocked. Times are of the rule's clock."""

    at: float
    ready_at: float | None
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One metric over the fleet: the sum over `replicas` measured ones, or with None a total that needs no replica to be measured."""

    total: float = 0.0
    replicas: int | None = None
    at: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What one metric asks for. `value`: per replica, gaps filled; `mean`: of those measured; `error`: why it has no vote."""

    target: Target
    wish: int
    value: float = 0.0
    mean: float = 0.0
    load: float = 0.0
    gaps: int = 0
    futile: bool = False
    error: str = ""

    @property
    def reason(self) -> str:
        """In words, such as `CPU utilization 85.0% > target 70%`."""
        goal = self.target
        if self.error:
            return f"{goal.label} unavailable: {self.error}"
        relation = ">" if self.value > goal.upper else "<" if self.value < goal.lower else "near"
        return f"{goal.label} {self.value:.1f}{goal.unit} {relation} target {goal.target:g}{'%' if goal.unit == '%' else ''}"

    @property
    def urgent(self) -> bool:
        """Whether growth can wait for nothing: half as much again as the fleet can take, or agents that have no time left."""
        goal = self.target
        return not self.error and self.value > goal.upper and (self.value >= URGENT_LOAD * goal.upper or self.mean >= goal.urgent)

    def to_json(self) -> dict[str, object]:
        return {
            "metric": self.target.metric,
            "wish": None if self.error else self.wish,
            "value": None if self.error else self.value,
            "target": self.target.target,
            "unit": self.target.unit.strip(),
            "gaps": self.gaps,
            "futile": self.futile,
            "error": self.error or None,
            "optional": self.target.optional,
            "reason": self.reason,
        }


def occupancy_percent(busy: float, pending: float, slots: float, service_seconds: float, drain_seconds: float = DRAIN_SECONDS) -> float:
    """Occupancy in percent of `slots`, pending requests included as the slots it takes to work them off in `drain_seconds`."""
    return 100.0 * (busy + pending * min(1.0, service_seconds / drain_seconds)) / slots


def read(targets: Iterable[Target], samples: Iterable[Sample], *, now: float, window_seconds: float) -> dict[str, Reading]:
    """Each metric over the replicas whose values can be trusted: sampled lately, plausible, and ready (no gauge: for a full window)."""
    oldest, newest, ripe = now - 2 * window_seconds, now + window_seconds, now - window_seconds
    ready = [one for one in samples if oldest <= one.at <= newest and one.ready_at is not None]
    settled = [one.values for one in ready if one.ready_at is not None and one.ready_at <= ripe]
    every = settled if len(settled) == len(ready) else [one.values for one in ready]
    return {target.metric: _sum(target, every if target.gauge else settled, now) for target in targets}


def _sum(target: Target, trusted: Sequence[Mapping[str, float]], now: float) -> Reading:
    """A value that is not a number fails every comparison, and so counts as a gap like the others."""
    name, plausible = target.metric, target.plausible
    values = [value for one in trusted if (value := one.get(name)) is not None and 0 <= value <= plausible]
    return Reading(total=sum(values), replicas=len(values), at=now)


def propose(target: Target, reading: Reading | None, replicas: int, *, now: float, max_age_seconds: float) -> Proposal:
    """The number of replicas that this metric asks for, of `replicas` that are there to work."""
    error = _problem(target, reading, replicas, now - max_age_seconds)
    if error or reading is None:
        return Proposal(target=target, wish=replicas, error=error)
    total = reading.total
    measured = replicas if reading.replicas is None else reading.replicas
    if not replicas:
        return Proposal(target=target, wish=_whole(total / target.target), value=total, mean=total, load=total)
    mean = total / measured
    gaps = replicas - measured if measured < replicas else 0
    goal = target.target
    # A gap argues for nothing: where the others have too much to do it counts as idle, else as on target.
    load = total + goal * gaps if gaps and mean <= goal else total
    value = load / replicas
    wish = replicas
    if value > (upper := target.upper):
        wish = max(replicas + 1, _whole(load / upper))
        if mean >= target.ceiling:
            wish = max(wish, _whole(load / goal))  # what the demand really is nobody sees
        elif value >= URGENT_LOAD * upper or mean >= target.urgent:
            # More may be coming: go on to the target itself, but no further than where noise could not bring the fleet back.
            wish = max(wish, floor(min(load / goal, _MOST_REPLICAS)))
    elif value < target.lower and (mean <= goal or not gaps):
        wish = min(replicas, _whole(load / goal))
    return Proposal(target=target, wish=wish, value=value, mean=mean, load=load, gaps=gaps)


def _problem(target: Target, reading: Reading | None, replicas: int, oldest: float) -> str:
    """Why the reading cannot be used; empty where it can."""
    if reading is None:
        return "no values"
    if reading.error:
        return reading.error
    measured = replicas if reading.replicas is None else reading.replicas
    if reading.replicas is not None and measured <= 0:
        return "no replica is measured yet"
    if not 0 <= reading.total <= target.plausible * max(1, measured):
        return f"its value {reading.total:g} is not plausible"
    if reading.at is not None and reading.at < oldest:
        return "its value is too old"
    return ""


def _whole(replicas: float) -> int:
    return ceil(min(replicas, _MOST_REPLICAS) - _SLACK)
