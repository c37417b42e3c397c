"""From what was measured of the agents to what the scaling rule is told: values per agent, the fleet as it is, what the host carries."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite

from fleetctl.core.contract import Report
from fleetctl.core.demand import Reading, Sample, occupancy_percent, read
from fleetctl.core.policy import Host, Observation, Policy
from fleetctl.formula import parse
from fleetctl.models import Agent, AgentState, HostUsage, MetricScope, MetricSpec, Replace, ResourceLimitsSpec, Usage

MIB = 1024 * 1024
# From here on CPU time says what an agent got, and nothing of what it wanted.
SATURATED_PERCENT = 95.0
# An agent below this much of its limit says little about what a busy one takes.
BUSY_PERCENT = 50.0
# An agent that uses more than this has something to do; less is what programs spend on looking at their clocks.
IDLE_PERCENT = 1.0
RESERVED_SHARE = 0.05
# A part of the agents that failed is theirs to explain; this part is the fleet's.
FAILED_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one measurement said of one agent, in percent of its limits, None where unknown. `seconds`: the time it covers."""

    at: float
    seconds: float
    cpu: float | None = None
    memory: float | None = None
    cores: float | None = None
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Polled:
    """What a source outside of the agents said last: a value, or why there is none."""

    at: float
    value: float | None = None
    error: str = ""


def look(usage: Usage, limits: ResourceLimitsSpec, *, at: float, seconds: float, host: HostUsage | None) -> Look:
    cores = usage.cpu_percent if usage.demand_percent is None else usage.demand_percent
    if usage.demand_percent is None and host is not None and (host.cpu_percent or 0.0) >= SATURATED_PERCENT:
        cores = None
    limit = limits.memory_limit_mb
    return Look(
        at=at,
        seconds=seconds,
        cpu=None if cores is None or usage.stopped else _cpu(cores, usage.hottest_percent or 0.0, limits.cpu_limit or 1.0),
        memory=None if limit is None else 100.0 * usage.memory_bytes / (limit * MIB),
        cores=None if cores is None else cores / 100.0,
        memory_bytes=usage.memory_bytes,
    )


def _cpu(tree: float, hottest: float, limit: float) -> float:
    """Percent of the effective limit: an agent with one thread can use one core, however many it may."""
    return max(tree / limit, hottest / min(1.0, limit))


def mean(looks: Sequence[Look], name: str) -> float | None:
    """Of the values of these looks, each for as long as it covers."""
    known = [(value, one.seconds) for one in looks if (value := getattr(one, name)) is not None]
    total = sum(seconds for _, seconds in known)
    return sum(value * seconds for value, seconds in known) / total if total > 0 else None


def sample(looks: Sequence[Look], report: Report | None, ready_at: float | None, gauges: Mapping[str, str]) -> Sample:
    """The last values of one agent: means over the looks, and what it said of its work. `gauges`: of its own, by the metrics' names."""
    values = {name: value for name in ("cpu", "memory") if (value := mean(looks, name)) is not None}
    return Sample(at=looks[-1].at, ready_at=ready_at, values=values | (reported(report, gauges) if report else {}))


def reported(report: Report, gauges: Mapping[str, str]) -> dict[str, float]:
    values = {metric: report.metrics[gauge] for metric, gauge in gauges.items() if gauge in report.metrics}
    if report.slots and report.active is not None:
        # How long a request takes it does not say: what waits counts in full.
        values["occupancy"] = occupancy_percent(report.active, report.pending or 0, report.slots, service_seconds=float("inf"))
    if report.pending is not None:
        values["pending"] = float(report.pending)
    return values


def readings(policy: Policy, samples: Iterable[Sample], *, now: float) -> dict[str, Reading]:
    """Each metric over the agents; one that nobody has to report is left out where nobody does."""
    every = list(samples)
    found = read(policy.targets, every, now=now, window_seconds=policy.window_seconds)
    silent = {one.metric for one in policy.targets if one.optional and not found[one.metric].replicas}
    return {metric: reading for metric, reading in found.items() if metric not in silent}


def custom_readings(
    metrics: Mapping[str, MetricSpec],
    polled: Mapping[str, Polled],
    found: Mapping[str, Reading],
    replicas: int,
    *,
    now: float,
    window_seconds: float,
) -> dict[str, Reading]:
    """The user's own metrics that have a target: those that were read, then the formulas over them and over what was measured."""
    values = {"replicas": float(replicas), **{name: value for name, one in found.items() if (value := _told(name, one)) is not None}}
    every: dict[str, Reading] = {}
    for name, metric in metrics.items():
        if metric.polled:
            every[name] = _polled(metric, polled.get(name), replicas, now=now, window_seconds=window_seconds)
            if not every[name].error:
                said = polled.get(name)
                values[name] = metric.fallback or 0.0 if said is None or said.value is None else said.value
    for name, metric in metrics.items():
        if metric.formula is not None:
            try:
                every[name] = _scoped(metric, parse(metric.formula).value(values), replicas, at=now)
            except ValueError as error:
                every[name] = _failed(metric, str(error), replicas, now=now)
    return {name: reading for name, reading in every.items() if metrics[name].target is not None}


def _told(name: str, reading: Reading) -> float | None:
    """A measured metric as a formula sees it: of waiting requests and gauges the sum, of percentages the mean."""
    if reading.error or not reading.replicas:
        return reading.total if reading.replicas is None and not reading.error else None
    return reading.total / reading.replicas if name in ("cpu", "memory", "occupancy") else reading.total


def _polled(metric: MetricSpec, said: Polled | None, replicas: int, *, now: float, window_seconds: float) -> Reading:
    if said is None:
        return _failed(metric, "it is not read yet", replicas, now=now)
    if said.value is None:
        return _failed(metric, said.error, replicas, now=now)
    # What is read seldom is not stale because of that.
    fresh = now - said.at <= max(2 * window_seconds, 2 * metric.interval_seconds + metric.timeout_seconds)
    return _scoped(metric, said.value, replicas, at=now if fresh else said.at)


def _failed(metric: MetricSpec, error: str, replicas: int, *, now: float) -> Reading:
    return Reading(error=error) if metric.fallback is None else _scoped(metric, metric.fallback, replicas, at=now)


def _scoped(metric: MetricSpec, value: float, replicas: int, *, at: float) -> Reading:
    if metric.scope is MetricScope.TOTAL:
        return Reading(total=value, at=at)
    return Reading(total=value * replicas, replicas=replicas, at=at)


def is_idle(
    policy: Policy,
    counts: "Counts",
    found: Mapping[str, Reading],
    seen: Mapping[str, tuple[Look | None, Report | None]],
    *,
    connected: bool,
    since: float,
) -> bool:
    """Whether nothing has work, or waits for somebody to work on it, as far as anybody can tell.

    `seen`: of each agent its last look and its report; `connected`: a connection waits at the fleet's sockets, is open, or was since the
    last time; `since`: when that was. What the agents say counts, and of those that say nothing what they do; where it cannot be told,
    there is work.
    """
    if connected or counts.starting or counts.blocked:
        return False
    totals = (found.get(one.metric) for one in policy.targets)
    if any(one.error or one.total > 0 for one in totals if one is not None and one.replicas is None):
        return False
    return not any(_is_busy(*seen.get(agent.id, (None, None)), since) for agent in counts.working)


def _is_busy(look: Look | None, report: Report | None, since: float) -> bool:
    if report is not None and report.works is not None:
        return report.works or (report.moved_at is not None and report.moved_at >= since)
    return look is None or look.cpu is None or look.cpu >= IDLE_PERCENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The agents of a fleet as the rule counts them. `working`: those whose values count."""

    working: tuple[Agent, ...]
    ready: int
    starting: int
    blocked: int
    failed: int
    protected: int = 0


def count(replicas: int, agents: Iterable[Agent], *, wall: float) -> Counts:
    """Neither the warm pool nor those on their way out count, whatever they do meanwhile."""
    staying = [agent for agent in agents if not agent.leaving and not agent.pooled]
    blocked = [agent for agent in staying if agent.blocked and agent.blocked_until is not None and agent.blocked_until > wall]
    held = {agent.id for agent in blocked}
    starting = sum(_starts(agent) for agent in staying if agent.id not in held)
    return Counts(
        working=tuple(agent for agent in staying if agent.id not in held),
        ready=sum(agent.ready for agent in staying if agent.id not in held),
        starting=starting + max(0, replicas - len(staying)),
        blocked=min(len(blocked), replicas),
        failed=sum(agent.state is AgentState.FAILED for agent in staying),
        protected=sum(agent.protected for agent in staying),
    )


def _starts(agent: Agent) -> bool:
    return agent.state is AgentState.STARTING or (agent.state is AgentState.DRAINING and agent.replace is not Replace.NO)


def host_limits(host: HostUsage | None, looks: Iterable[Look]) -> Host | None:
    """What the machine carries, by what agents were seen to take."""
    if host is None:
        return None
    seen = list(looks)
    busy = [one.cores for one in seen if one.cores is not None and one.cpu is not None and one.cpu >= BUSY_PERCENT]
    sizes = sorted(one.memory_bytes for one in seen if one.memory_bytes > 0)
    pressure = host.pressure_percent
    return Host(
        cores=float(host.cores),
        cores_per_busy_agent=sum(busy) / len(busy) if busy else None,
        available_memory=float(host.memory_available_bytes),
        reserved_memory=RESERVED_SHARE * host.memory_total_bytes,
        memory_per_agent=float(sizes[ceil(0.95 * len(sizes)) - 1]) if sizes else None,
        pressure_percent=pressure if pressure is not None and isfinite(pressure) else None,
    )


def observe(
    replicas: int,
    counts: Counts,
    found: Mapping[str, Reading],
    *,
    now: float,
    wall: float,
    host: Host | None,
    pending: int = 0,
    idle: bool = False,
    tick: bool = False,
) -> Observation:
    return Observation(
        now=now,
        replicas=replicas,
        readings=found,
        starting=min(counts.starting, replicas),
        blocked=counts.blocked,
        protected=min(counts.protected, replicas),
        unavailable=max(0, replicas - counts.ready),
        pending=pending,
        idle=idle,
        crash_looping=counts.failed > 0 and counts.failed >= FAILED_SHARE * replicas,
        host=host,
        at=wall,
        tick=tick,
    )
