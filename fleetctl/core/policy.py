"""What the scaling rule is told: the policy, once, and the fleet as it is, each time."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, floor

from fleetctl.core.demand import Reading, Target, cpu
from fleetctl.errors import ConfigError


class Behavior(StrEnum):
    """What to wish for when no metric has been readable for a while."""

    STATIC = "static"
    CURRENT = "current"
    CURRENT_IF_HIGHER = "current-if-higher"
    CURRENT_IF_LOWER = "current-if-lower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    behavior: Behavior = Behavior.CURRENT
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
    suspended nor draining ones. `pending` and `idle` matter only to a fleet that may have no replicas. `tick`: decide now, whenever
    the last decision was.
    """

    now: float
    replicas: int
    readings: Mapping[str, Reading]
    starting: int = 0
    blocked: int = 0
    unavailable: int = 0
    pending: int = 0
    idle: bool = False
    crash_looping: bool = False
    host: Host | None = None
    at: float = 0.0
    tick: bool = False
