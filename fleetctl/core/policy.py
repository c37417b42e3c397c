"""What the scaling rule is told: the policy, once, and the fleet as it is, each time."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, tzinfo
from math import ceil, floor
from zoneinfo import ZoneInfo

from fleetctl.core.demand import Reading, Target, cpu, custom, memory, occupancy, pending
from fleetctl.cron import parse
from fleetctl.errors import ConfigError
from fleetctl.models import RATE_PATTERN, AutoscalingMode, FallbackBehavior, FleetSpec, MetricScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    behavior: FallbackBehavior = FallbackBehavior.CURRENT
    replicas: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """At most so many replicas, or so many percent of those there were, within a period."""

    value: int
    period_seconds: float
    percent: bool = False

    def __post_init__(self) -> None:
        if self.value <= 0 or not 0 < self.period_seconds <= 86400:
            raise ConfigError(f"rate of {self.value} in {self.period_seconds:g} s: the value must be positive, the period in 0..86400")

    def most(self, start: int) -> int:
        return ceil(start * (1 + self.value / 100)) if self.percent else start + self.value

    def least(self, start: int) -> int:
        return floor(start * (1 - self.value / 100)) if self.percent else start - self.value


DEFAULT_UP_RATES = (Rate(value=4, period_seconds=15), Rate(value=100, percent=True, period_seconds=15))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All that the rule is told once. Bounds and targets are those in force now. `idle_seconds`: after which zero is allowed."""

    min_replicas: int = 1
    max_replicas: int = 100
    targets: tuple[Target, ...] = (cpu(),)
    scale_up_stabilization_seconds: float = 60.0
    scale_down_stabilization_seconds: float = 300.0
    autoscaling_interval_seconds: float = 30.0
    metrics_interval_seconds: float = 5.0
    window_seconds: float = 15.0
    up_rates: tuple[Rate, ...] = DEFAULT_UP_RATES
    down_rates: tuple[Rate, ...] = ()
    strictest_rate: bool = False
    min_available: int = 0
    failure_threshold: int = 3
    fallback: Fallback = Fallback()
    idle_seconds: float | None = None
    recommend: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(f"min_replicas {self.min_replicas} and max_replicas {self.max_replicas}: 0 <= min <= max must hold")
        if not self.targets:
            raise ConfigError("autoscaling needs at least one metric with a target")


def parse_rate(text: str) -> Rate:
    """`4 per 15 s` or `100% per 15 s`."""
    found = re.fullmatch(RATE_PATTERN, text)
    if not found:
        raise ConfigError(f'{text!r} is no rate: write it like "4 per 15 s" or "100% per 15 s"')
    return Rate(value=int(found[1]), percent=bool(found[2]), period_seconds=float(found[3]))


def scheduled(spec: FleetSpec, wall: float) -> FleetSpec:
    """The spec with what its schedules change at this Unix time. Bounds that would cross give way to the fewest agents."""
    for schedule in spec.autoscaling.schedules:
        if not parse(schedule.cron).within(wall, schedule.duration_seconds, _zone(schedule.timezone)):
            continue
        given = {name: value for name in _SCHEDULED if (value := getattr(schedule, name)) is not None}
        spec = replace(spec, **given)
        spec = replace(spec, max_replicas=max(spec.max_replicas, spec.min_replicas))
    return spec


def _zone(name: str) -> tzinfo:
    """UTC needs no database of time zones, which a small machine may not have."""
    return UTC if name == "UTC" else ZoneInfo(name)


_SCHEDULED = ("min_replicas", "max_replicas", "target_cpu_utilization")


def policy_of(spec: FleetSpec) -> Policy:
    """What the rule is told of a fleet with these settings; its schedules aside."""
    wanted = spec.autoscaling
    return Policy(
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        targets=tuple(targets_of(spec)),
        scale_up_stabilization_seconds=spec.scale_up_stabilization_seconds,
        scale_down_stabilization_seconds=spec.scale_down_stabilization_seconds,
        autoscaling_interval_seconds=spec.autoscaling_interval_seconds,
        metrics_interval_seconds=wanted.metrics_interval_seconds,
        window_seconds=wanted.window_seconds,
        up_rates=tuple(parse_rate(rate) for rate in wanted.scale_up_rates),
        down_rates=tuple(parse_rate(rate) for rate in wanted.scale_down_rates),
        min_available=wanted.min_available,
        failure_threshold=wanted.failure_threshold,
        fallback=Fallback(behavior=wanted.fallback, replicas=wanted.fallback_replicas),
        idle_seconds=wanted.idle_seconds,
        recommend=wanted.mode is AutoscalingMode.RECOMMEND,
    )


def targets_of(spec: FleetSpec) -> Iterable[Target]:
    """The metrics that count, with what they should be per agent."""
    wanted = spec.autoscaling
    if wanted.use_cpu:
        yield cpu(spec.target_cpu_utilization)
    if wanted.target_memory_utilization is not None:
        yield memory(wanted.target_memory_utilization)
    # Only agents that speak the contract report it.
    yield occupancy(wanted.target_occupancy, optional=True)
    if wanted.target_pending is not None:
        yield pending(wanted.target_pending)
    for name, metric in wanted.metrics.items():
        if metric.target is not None:
            total = metric.scope is MetricScope.TOTAL and metric.agents is None
            yield custom(name, metric.target, gauge=metric.agents is not None, total=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the machine carries; None where it cannot be told. `pressure_percent`: of PSI memory, `full avg10`."""

    cores: float | None = None
    cores_per_busy_agent: float | None = None
    available_memory: float | None = None
    reserved_memory: float = 0.0
    memory_per_agent: float | None = None
    pressure_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The fleet as it is. `now`: seconds of any clock that outlives the daemon; `at`: Unix time, for the record.

    `replicas`: asked for, that is `starting` and ready ones, `blocked` ones (waiting for a limit to pass) included, neither
    suspended nor draining ones. `protected`: of them, those that no decrease may end. `pending` and `idle` matter only to a fleet
    that may have no replicas. `tick`: decide now, whenever the last decision was.
    """

    now: float
    replicas: int
    readings: Mapping[str, Reading]
    starting: int = 0
    blocked: int = 0
    protected: int = 0
    unavailable: int = 0
    pending: int = 0
    idle: bool = False
    crash_looping: bool = False
    host: Host | None = None
    at: float = 0.0
    tick: bool = False
