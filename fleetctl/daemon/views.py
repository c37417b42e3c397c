"""Fleets, agents and changes as the JSON values that the control socket tells; docs of the fields are in `wire`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import isnan
from typing import Any

from fleetctl.config import Difference
from fleetctl.core.contract import Report
from fleetctl.fleet import Fleet
from fleetctl.health import metrics_of, problems_of
from fleetctl.host import metrics, sandbox
from fleetctl.host.limits import LocalLimits
from fleetctl.host.paths import Paths
from fleetctl.host.sockets import ListeningSockets
from fleetctl.models import Agent, AgentState, FleetSpec, Replace, Usage, to_json

Json = dict[str, Any]  # Any: JSON values


def fleet_view(
    fleet: Fleet, usage: Mapping[str, Usage], *, now: float, wall: float, dropped: Callable[[str], Mapping[str, int]] = lambda agent_id: {}
) -> Json:
    """A fleet as `status` shows it. `now`: the boot's clock; `wall`: Unix time; `dropped`: an agent's messages that were, by reason."""
    reports, unsaved = fleet.reports, fleet.supervisor.unsaved
    return {
        "name": fleet.spec.name,
        "desired_replicas": fleet.wish.replicas,
        "ready_replicas": fleet.ready_replicas,
        "autoscaling": autoscaling_view(fleet),
        "warm_pool": fleet.warm_pool_stats(),
        "command": list(fleet.spec.command),
        "down": fleet.wish.down,
        "paused": fleet.wish.paused or None,
        "budget": budget_view(fleet),
        "notes": list(_troubles(fleet)),
        **health_view(fleet, usage),
        "agents": [
            agent_view(
                agent,
                usage.get(agent.id),
                now=now,
                wall=wall,
                report=reports.get(agent.id),
                dropped=sum(dropped(agent.id).values()),
                unsaved=unsaved.get(agent.id),
            )
            for agent in fleet.agents
        ],
    }


def budget_view(fleet: Fleet) -> Json:
    told = fleet.budget.status(fleet.spec.budget)
    return {**told, "renewed_at": None if told["renewed_at"] is None else rfc3339(told["renewed_at"])}


def _troubles(fleet: Fleet) -> Iterator[str]:
    if fleet.wish.paused and not fleet.wish.down:
        renewed = budget_view(fleet)["renewed_at"]
        ways = [*([f"at {renewed}"] if renewed else []), "with a larger one (`fleetctl up`)"]
        yield f"paused: {fleet.wish.paused}; it goes on {', '.join(ways)}, or by `fleetctl budget {fleet.spec.name} --renew`"
    if fleet.supervisor.trouble:
        yield fleet.supervisor.trouble
    waiting = fleet.supervisor.unsaved
    for agent_id, problem in sorted(waiting.items())[:1]:
        others = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        yield (
            f"{agent_id}{others}: no checkpoint can be taken ({problem}); free some space, or stop without one: "
            f"`fleetctl drain {agent_id} --now`, `fleetctl down --now`"
        )


def health_view(fleet: Fleet, usage: Mapping[str, Usage]) -> Json:
    """Whether the fleet is as it should be, and its size and load; the library tells the same."""
    seen, problems = metrics_of(fleet, usage), list(problems_of(fleet))
    return {
        "healthy": not problems,
        "problems": problems,
        "metrics": {
            "current_replicas": seen.current_replicas,
            "avg_cpu_utilization": _known(seen.avg_cpu_utilization),
            "avg_memory_utilization": _known(seen.avg_memory_utilization),
            "pending_requests": seen.pending_requests,
        },
    }


def _known(value: float) -> float | None:
    return None if isnan(value) else round(value, 3)


def limits_view(spec: FleetSpec, limits: LocalLimits) -> list[Json]:
    """The limits that an agent has, and what holds it to each; empty where nothing does."""
    held = limits.mechanisms(spec.resource_limits)
    return [{"name": name, "value": getattr(spec.resource_limits, name), "held_by": by} for name, by in held.items()]


def trust_view(spec: FleetSpec) -> Json:
    """How far an agent is trusted, and what holds it to that."""
    return {"level": str(spec.trust_level), "held_by": sandbox.held(spec)}


def sockets_view(fleet: Fleet, sockets: ListeningSockets, notes: list[str]) -> Json:
    """What a fleet's view has besides where it declares listening sockets; a trouble with one is a note."""
    trouble = sockets.trouble(fleet.spec.name)
    waiting = sockets.backlogs(fleet.spec)
    addresses = sockets.addresses(fleet.spec)
    return {
        "sockets": [{"name": name, "address": str(address), "backlog": waiting[name]} for name, address in addresses.items()],
        "notes": [*notes, trouble] if trouble else notes,
    }


def autoscaling_view(fleet: Fleet) -> Json:
    """The autoscaler as `status` shows it; without how it came to its last decision, which nobody reads each second."""
    return {name: value for name, value in fleet.autoscaling_status().items() if name not in ("current_replicas", "last_decision")}


def agent_view(
    agent: Agent,
    usage: Usage | None,
    *,
    now: float,
    wall: float,
    report: Report | None = None,
    dropped: int = 0,
    unsaved: str | None = None,
) -> Json:
    """An agent as `status` and `ps` show it."""
    usage = usage if agent.process else None
    exit = agent.last_exit
    running = agent.process is not None and not agent.leader_exit
    uptime = now - agent.started_clock if running and agent.started_clock is not None else None
    retry = agent.retry_deadline
    next_try = None if retry is None or agent.process else max(0.0, retry - now)
    return {
        "id": agent.id,
        "slot": agent.slot,
        "pid": agent.process.pid if agent.process and running else None,
        "state": str(agent.state),
        "ready": agent.ready,
        "cpu_percent": usage.cpu_percent if usage else None,
        "memory_bytes": usage.memory_bytes if usage else None,
        "uptime_seconds": None if uptime is None else round(max(0.0, uptime), 3),
        "restarts": agent.restarts,
        "last_exit": {"code": exit.code, "signal": exit.signal, "at": rfc3339(exit.at), "text": str(exit)} if exit else None,
        "from_warm_pool": agent.from_warm_pool,
        "next_try_seconds": None if next_try is None else round(next_try, 3),
        "replacing": agent.replace is not Replace.NO,
        "pooled": agent.pooled,
        "protected": agent.protected,
        "unsaved": unsaved,
        "note": "; ".join([*([f"no checkpoint can be taken: {unsaved}"] if unsaved else []), *_notes(agent, usage, next_try, wall)]),
        "status_text": report.status if report else "",
        "active": report.active if report else None,
        "slots": report.slots if report else None,
        "pending": report.pending if report else None,
        "dropped_messages": dropped,
    }


def _without_token(agent: Agent, process: Mapping[str, Any]) -> Json:
    """A process of the agent's tree, whose command may be the one that resumes by its token."""
    command = process["command"]
    return {**process, "command": command.replace(agent.resume_token, "***") if agent.resume_token else command}


def _notes(agent: Agent, usage: Usage | None, next_try: float | None, wall: float) -> Iterator[str]:
    running = agent.state is AgentState.RUNNING and agent.process is not None and not agent.leader_exit
    if next_try:
        yield f"next try in {next_try:.0f} s"
    if agent.note:
        yield agent.note
    if running and agent.blocked and agent.blocked_until is not None and agent.blocked_until > wall:
        yield f"blocked for {agent.blocked_until - wall:.0f} s: {agent.blocked}"
    if running and usage and usage.stopped and not agent.pooled:
        yield "stopped by a signal; `kill -CONT` continues it"


def inspected(
    fleet: Fleet, agent: Agent, usage: Usage | None, paths: Paths, *, now: float, wall: float, dropped: Mapping[str, int]
) -> Json:
    """All that is known of one agent, as `inspect` shows it."""
    spec, report = fleet.spec, fleet.reports.get(agent.id)
    return {
        "schema": "fleetctl/agent/v1",
        **agent_view(
            agent,
            usage,
            now=now,
            wall=wall,
            report=report,
            dropped=sum(dropped.values()),
            unsaved=fleet.supervisor.unsaved.get(agent.id),
        ),
        "fleet": agent.fleet,
        "created_at": rfc3339(agent.created_at),
        "started_at": rfc3339(agent.started_at) if agent.started_at else None,
        "command": list(spec.command),
        "cwd": spec.cwd,
        "log_path": paths.agent_log(agent.fleet, agent.id),
        "state_directory": paths.agent_state(agent.id),
        "processes": [_without_token(agent, one) for one in metrics.tree(agent.process.pid)] if agent.process else [],
        "environment": sorted({*spec.environment, *spec.secret_env}),
        "idle": report.idle if report else None,
        "progress": report.progress if report else None,
        "metrics": dict(report.metrics) if report else {},
        "tokens": {"in": report.tokens[0], "out": report.tokens[1]} if report and report.tokens else None,
        "cost": report.cost if report else None,
        "dropped_by_reason": dict(dropped),
    }


def change_view(
    fleet: str,
    replicas: int,
    actions: list[str],
    message: str,
    *,
    created: bool = False,
    dry_run: bool = False,
    changed: bool | None = None,
    differences: Sequence[Difference] = (),
) -> Json:
    return {
        "schema": "fleetctl/change/v1",
        "fleet": fleet,
        "changed": (bool(actions) if changed is None else changed) and not dry_run,
        "created": created,
        "dry_run": dry_run,
        "desired_replicas": replicas,
        "actions": actions,
        "message": message,
        "differences": [to_json(one) for one in differences],
    }


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def dated(row: Mapping[str, Any]) -> Json:
    """An event or a decision with its time as people and files write it."""
    return {**row, "at": rfc3339(row["at"])}


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
