"""Whether an agent hangs on its work: it says that some is in work, and nothing it says shows that it gets any further."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fleetctl.core.contract import Report
from fleetctl.models import Agent, AgentState

_LATE_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What the last look left to remember. `at`: when that was; `since`: from when an agent's silence counts, by its id."""

    at: float = float("-inf")
    since: Mapping[str, float] = field(default_factory=dict)


def look(
    watch: Watch, agents: Iterable[Agent], reports: Mapping[str, Report], after_seconds: float, *, now: float, wall: float
) -> tuple[Watch, dict[str, str]]:
    """What to remember for the next look, and why agents are stuck, by id. Looks come every few seconds.

    The time of an agent stands still while it is suspended, and while it is blocked. A look that comes late proves nothing, for what
    agents said meanwhile may still wait to be read: all begin anew.
    """
    late = now - watch.at > _LATE_SECONDS
    since: dict[str, float] = {}
    stuck: dict[str, str] = {}
    for agent in agents:
        if late or not _at_work(agent, wall):
            since[agent.id] = now
            continue
        since[agent.id] = watch.since.get(agent.id, now)
        report = reports.get(agent.id)
        if report is None or not report.active or report.moved_at is None:
            continue
        if now - max(report.moved_at, since[agent.id]) >= after_seconds:
            stuck[agent.id] = f"stuck: {report.active} in work, and no progress for {after_seconds:g} s"
    return Watch(at=now, since=since), stuck


def _at_work(agent: Agent, wall: float) -> bool:
    blocked = bool(agent.blocked) and agent.blocked_until is not None and agent.blocked_until > wall
    return agent.state is AgentState.RUNNING and agent.process is not None and not agent.leader_exit and not agent.pooled and not blocked
