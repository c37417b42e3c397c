"""The gap between what should be and what is, as a list of orders; and when to look again.

`plan` reacts to nothing in particular: it looks at the whole picture each time, so an event that was missed is made up for by
the next look.
"""

from collections.abc import Collection, Iterable, Sequence

from fleetctl.core import warmpool
from fleetctl.core.orders import (
    Action,
    BecomeReady,
    Create,
    Drain,
    Fail,
    Forget,
    Kill,
    Mode,
    Promote,
    Start,
    Wish,
    end,
    free_slots,
    is_due_to_start,
)
from fleetctl.models import Agent, AgentState, FleetSpec, Replace

NOT_YET = "not ready yet: "
"""Before what its probe said last, in the note of an agent that starts."""


def plan(wish: Wish, agents: Sequence[Agent], now: float, *, idle: Collection[str] = ()) -> list[Action]:
    """The orders that bring the agents closer to the wish.

    `now`: seconds of the boot's monotonic clock; `idle`: ids of agents that said that they have nothing to do.
    """
    actions: list[Action] = [action for agent in agents if (action := _overdue(wish.spec, agent, now))]
    if wish.mode is Mode.STOP:
        # A warm instance has nothing that is worth coming back for: the next daemon fills the pool anew.
        return actions + [
            Drain(agent, leaving=agent.pooled, reason="the daemon stops") for agent in agents if not agent.leaving and _can_drain(agent)
        ]
    staying = [agent for agent in agents if not agent.leaving and not agent.pooled]
    surplus = len(staying) - wish.replicas
    spared = [agent for agent in staying if not agent.protected or not wish.replicas]
    victims = _victims(spared, idle)[:surplus] if surplus > 0 else []
    actions += [end(agent, "the fleet is taken down" if wish.down else f"scaled down to {wish.replicas}") for agent in victims]
    leaving = {agent.id for agent in victims}
    staying = [agent for agent in staying if agent.id not in leaving]
    if wish.paused and not wish.down:
        pool = [agent for agent in agents if agent.pooled and not agent.leaving]
        return actions + [Drain(agent, leaving=agent.pooled, reason=wish.paused) for agent in staying + pool if _can_drain(agent)]
    starts: list[Action] = []
    if wish.mode is Mode.RUN:
        warm = warmpool.available(wish.spec, agents)[:-surplus] if surplus < 0 else []
        starts += [Promote(agent) for agent in warm]
        starts += [Create(slot) for slot in free_slots(agents, -surplus - len(warm))]
        starts += [Start(agent) for agent in staying if is_due_to_start(agent, now)]
        # A roll waits for whatever starts, and must not start it a second time.
        actions += starts or _replacements(wish.spec, staying)
    if starts or (wish.mode is Mode.HOLD and not wish.down):
        return actions
    # The pool waits for the replicas: it never competes with them.
    busy = any(agent.state is AgentState.STARTING for agent in staying)
    return actions + warmpool.orders(wish, agents, now, busy=busy)


def next_deadline(wish: Wish, agents: Iterable[Agent]) -> float | None:
    """When `plan` has to be asked again if nothing happens before, in seconds of the boot's monotonic clock."""
    # What this mode never does would stay due for ever, and whoever waits for it would never sleep.
    resting = () if wish.starts else (AgentState.BACKOFF, AgentState.FAILED, AgentState.SUSPENDED)
    return min((at for agent in agents if agent.state not in resting and (at := _deadline(agent)) is not None), default=None)


def _deadline(agent: Agent) -> float | None:
    match agent.state:
        case AgentState.STARTING:
            return _earlier(agent.ready_deadline, agent.start_deadline)
        case AgentState.DRAINING:
            return agent.drain_deadline
        case AgentState.BACKOFF | AgentState.FAILED:
            return agent.retry_deadline
        case AgentState.SUSPENDED:
            return agent.stale_deadline
        case _:
            return None


def _earlier(one: float | None, other: float | None) -> float | None:
    return min((at for at in (one, other) if at is not None), default=None)


def _overdue(spec: FleetSpec, agent: Agent, now: float) -> Action | None:
    if agent.state is AgentState.TERMINATED and agent.leaving:
        return Forget(agent)
    deadline = _deadline(agent)
    if deadline is None or deadline > now:
        return None
    if agent.state is AgentState.STARTING and agent.process and not agent.leader_exit:
        if agent.ready_deadline is not None and agent.ready_deadline <= now:
            return BecomeReady(agent)
        why = f": {agent.note.removeprefix(NOT_YET)}" if agent.note.startswith(NOT_YET) else ""
        return Fail(agent, f"not ready after {spec.readiness.start_timeout_seconds:g} s{why}")
    return Kill(agent) if agent.state is AgentState.DRAINING else None


def _can_drain(agent: Agent) -> bool:
    return agent.process is not None and agent.state in (AgentState.STARTING, AgentState.RUNNING, AgentState.SUSPENDED)


def _victims(agents: Sequence[Agent], idle: Collection[str]) -> list[Agent]:
    """Who goes first: those that do no work anyway, then those that said so, then the oldest."""
    return sorted(agents, key=lambda agent: (agent.process is not None, agent.ready, agent.id not in idle, agent.created_at, agent.slot))


def _replacements(spec: FleetSpec, staying: Sequence[Agent]) -> list[Action]:
    """Replace processes that run another spec or were asked to restart: one at a time, and only while the others are ready.

    A replacement that fails stops the roll, so that a bad change never takes the whole fleet.
    """
    at_once = [agent for agent in staying if agent.replace is Replace.AT_ONCE and _can_drain(agent)]
    if at_once:
        return [Drain(agent, leaving=False, reason="restart") for agent in at_once]
    wanted = spec.process_hash
    outdated = [agent for agent in staying if agent.replace is Replace.ROLLING or agent.spec_hash not in ("", wanted)]
    names = {agent.id for agent in outdated}
    if any(_moving(agent) for agent in outdated) or any(_unsettled(agent) for agent in staying if agent.id not in names):
        return []
    for agent in sorted(outdated, key=lambda agent: (agent.ready, agent.slot)):
        if _can_drain(agent):
            return [Drain(agent, leaving=False, reason="restart" if agent.replace is Replace.ROLLING else "the spec changed")]
        if agent.state in (AgentState.FAILED, AgentState.TERMINATED):
            return [Start(agent)]
    return []


def _moving(agent: Agent) -> bool:
    """Whether it is between its old process and its new one."""
    return agent.state is AgentState.DRAINING or (agent.state is AgentState.STARTING and agent.process is None)


def _unsettled(agent: Agent) -> bool:
    """Whether the roll has to wait for it. One that had failed before, or has completed, is not waited for."""
    return agent.state in (AgentState.STARTING, AgentState.DRAINING, AgentState.BACKOFF) or (agent.rolled and not agent.ready)
