"""After the daemon's death: which recorded agents still run, which ended meanwhile, and whose processes nobody recorded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fleetctl.models import Agent, AgentState, Exit, FleetSpec, Found, Identity, Saving


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """`agents`: the fleet's table to go on with. `adopted`, `ended`, `strays`: ids in it, for the record."""

    agents: tuple[Agent, ...]
    adopted: tuple[str, ...]
    ended: tuple[str, ...]
    strays: tuple[str, ...]


def recover(
    records: Sequence[Agent],
    found: Iterable[Found],
    identities: Mapping[str, Identity],
    *,
    boot_id: str,
    now: float,
    wall: float,
    drain_seconds: float,
) -> Recovery:
    """Bring the records of one fleet together with what lives.

    `identities`: by agent id, for the records that name a process of this boot. A tree whose token no record holds is adopted
    when its agent is unknown (the database was lost) and ended when the agent has another process.
    """
    by_token = {tree.token: tree for tree in found}
    table: dict[str, Agent] = {}
    adopted: list[str] = []
    ended: list[str] = []
    strays: list[str] = []
    for record in records:
        agent = _recover_one(record, identities.get(record.id), boot_id=boot_id, now=now, wall=wall)
        table[agent.id] = agent
        if agent.process is not None:
            by_token.pop(agent.token, None)
            (ended if agent.leader_exit else adopted).append(agent.id)
    for tree in sorted(by_token.values(), key=lambda tree: tree.started_at):
        known = table.get(tree.agent_id)
        if tree.leader is not None and (known is None or _awaits_its_process(known)):
            table[tree.agent_id] = _adopt(tree, known, now)
            adopted.append(tree.agent_id)
        else:
            stray = _stray(tree, now + drain_seconds)
            table[stray.id] = stray
            strays.append(stray.id)
    return Recovery(agents=tuple(table.values()), adopted=tuple(adopted), ended=tuple(ended), strays=tuple(strays))


def with_acquired(spec: FleetSpec, agents: Sequence[Agent]) -> tuple[FleetSpec, tuple[Agent, ...]]:
    """Agents that were acquired just before the daemon died count, though the stored wish does not say so yet."""
    owed = max((agent.wish_owed for agent in agents if not agent.leaving), default=0)
    replicas = max(spec.replicas, min(owed, spec.max_replicas))
    # And those that were drained do not: of several the newest number is in all of them.
    replicas = min([replicas, *(agent.wish_shrunk for agent in agents if agent.wish_shrunk is not None)])
    return replace(spec, replicas=replicas), tuple(replace(agent, wish_owed=0, wish_shrunk=None) for agent in agents)


def _recover_one(record: Agent, identity: Identity | None, *, boot_id: str, now: float, wall: float) -> Agent:
    if record.process is None:
        return _rested(record, now)
    if record.process.boot_id != boot_id:
        return _rebooted(record)
    match identity:
        case Identity.MATCH:
            return _unheard(record)
        case Identity.GONE:
            return record if record.leader_exit else replace(record, leader_exit=Exit(at=wall))
        case _:
            return replace(record, note="its identity cannot be verified: it is left alone")


def _unheard(record: Agent) -> Agent:
    """What it may have said while nobody listened: one that was starting is believed ready at the latest when its time is over."""
    if record.state is AgentState.STARTING and record.ready_deadline is None and record.start_deadline is not None:
        return replace(record, ready_deadline=record.start_deadline, start_deadline=None)
    return record


def _rebooted(record: Agent) -> Agent:
    """Nothing recorded before a reboot lives, and times of another boot's clock mean nothing."""
    fresh = replace(
        record,
        process=None,
        started_clock=None,
        ready=False,
        ready_deadline=None,
        start_deadline=None,
        said_ready=False,
        retry_deadline=None,
        drain_deadline=None,
        draining_since=None,
        failing="",
        failures=(),
        leader_exit=None,
        stop_sent=False,
        resume_owed=False,
        stale_deadline=None,
        saving=Saving.NO,
    )
    if record.leaving:
        return replace(fresh, state=AgentState.TERMINATED)
    return replace(fresh, state=AgentState.STARTING, note="the machine was rebooted")


def _rested(record: Agent, now: float) -> Agent:
    """Without a process there is no boot id to compare, but a past that lies ahead is another boot's: its retry is due now."""
    past = [*record.failures, *([] if record.started_clock is None else [record.started_clock])]
    if all(at <= now for at in past):
        return record
    return replace(record, failures=(), started_clock=None, retry_deadline=None if record.retry_deadline is None else now)


def _awaits_its_process(agent: Agent) -> bool:
    """Whether its start was on record when the daemon died, but not yet the process."""
    return agent.process is None and agent.state is AgentState.STARTING


def _adopt(tree: Found, known: Agent | None, now: float) -> Agent:
    base = known or Agent(id=tree.agent_id, fleet=tree.fleet, slot=tree.slot, created_at=tree.started_at)
    return replace(
        base,
        state=AgentState.STARTING,
        pooled=tree.suspended or (known is not None and known.pooled),
        token=tree.token,
        spec_hash=tree.spec_hash,
        process=tree.leader,
        started_at=tree.started_at,
        started_clock=tree.started_clock,
        ready_deadline=now,
        note="found again from its live process",
    )


def _stray(tree: Found, deadline: float) -> Agent:
    """A tree that must go: it takes the same way out as every agent."""
    return Agent(
        id=f"{tree.agent_id}-{tree.token[:4]}",
        fleet=tree.fleet,
        slot=tree.slot,
        state=AgentState.DRAINING,
        created_at=tree.started_at,
        token=tree.token,
        process=tree.leader,
        drain_deadline=deadline,
        leaving=True,
        note="left over from an earlier process of this agent",
    )
