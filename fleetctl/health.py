"""How a fleet is, in the specification's words: its size and load, and what is wrong with it. For the library and for `status`."""

import os
from collections.abc import Iterable, Iterator, Mapping

from fleetctl.core.observation import look
from fleetctl.fleet import Fleet
from fleetctl.models import Agent, AgentState, FleetSpec, ScalingMetrics, Usage

_MOST_NAMED = 3
_UNKNOWN = float("nan")


def replicas_of(fleet: Fleet) -> list[Agent]:
    """Those that are to stay; neither the warm pool nor those on their way out."""
    return [agent for agent in fleet.agents if not agent.leaving and not agent.pooled]


def metrics_of(fleet: Fleet, usage: Mapping[str, Usage]) -> ScalingMetrics:
    """A utilization is in percent of the agents' `resource_limits`; without them, of one core and of the machine's memory."""
    replicas = replicas_of(fleet)
    used = [usage[agent.id] for agent in replicas if agent.id in usage]
    reports = fleet.reports
    waiting = sum(reports[agent.id].pending or 0 for agent in replicas if agent.id in reports)
    return ScalingMetrics(
        current_replicas=len(replicas),
        desired_replicas=fleet.wish.replicas,
        avg_cpu_utilization=_mean([_cpu(fleet.spec, one) for one in used]) if replicas else 0.0,
        avg_memory_utilization=_mean([_memory(fleet.spec, one) for one in used]) if replicas else 0.0,
        pending_requests=waiting + (fleet.backlog() or 0),
    )


def problems_of(fleet: Fleet) -> Iterator[str]:
    """What is not as it should be; nothing for a healthy fleet."""
    if fleet.wish.paused:
        yield f"it is paused: {fleet.wish.paused}"
    if fleet.supervisor.trouble is not None:
        yield fleet.supervisor.trouble
    troubled = [agent for agent in fleet.agents if agent.state in (AgentState.FAILED, AgentState.BACKOFF) and not agent.leaving]
    for agent in troubled[:_MOST_NAMED]:
        yield f"{agent.id}: {agent.note or agent.state}"
    if len(troubled) > _MOST_NAMED:
        yield f"{len(troubled) - _MOST_NAMED} more agents do not run"
    wanted = min(fleet.spec.min_replicas, fleet.wish.replicas)
    if fleet.ready_replicas < wanted:
        yield f"{fleet.ready_replicas} of the {wanted} replicas that there have to be are ready"


def _cpu(spec: FleetSpec, usage: Usage) -> float | None:
    return look(usage, spec.resource_limits, at=0.0, seconds=1.0, host=None).cpu


def _memory(spec: FleetSpec, usage: Usage) -> float | None:
    of_limit = look(usage, spec.resource_limits, at=0.0, seconds=1.0, host=None).memory
    return 100.0 * usage.memory_bytes / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if of_limit is None else of_limit


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else _UNKNOWN
