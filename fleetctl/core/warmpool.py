"""The warm pool: suspended instances that become replicas in a millisecond. Whom to hand out, when to refill, whom to retire.

An instance of the pool is an agent like every other, in state SUSPENDED, that is not counted as a replica until it is promoted.
"""

from collections.abc import Sequence

from fleetctl.core.orders import Action, Create, Mode, Start, Suspend, Wish, end, free_slots, is_due_to_start
from fleetctl.models import Agent, AgentState, FleetSpec, Replace

STARTING_AT_ONCE = 2
"""Pacing of the refill: so many instances of a pool may be starting at the same time."""


def wished_size(wish: Wish) -> int:
    """How many instances the pool shall hold; a fleet that runs nothing needs none, unless it waits for work or they are what it is for."""
    needed = not wish.down and (wish.replicas > 0 or wish.pool_alone or wish.wakes)
    if wish.mode is not Mode.RUN or not needed or not wish.spec.warm_pool.enabled:
        return 0
    return wish.spec.warm_pool.size


def available(spec: FleetSpec, agents: Sequence[Agent], *, aware: bool = False) -> list[Agent]:
    """The instances that can be handed out now, the oldest first; `aware`: only those that read their claim."""
    wanted = spec.process_hash
    fit = [
        agent
        for agent in agents  # somebody waits for the answer: no calls in here
        if agent.pooled
        and agent.state is AgentState.SUSPENDED
        and not agent.leaving
        and agent.process is not None
        and agent.leader_exit is None
        and agent.replace is Replace.NO
        and agent.spec_hash == wanted
        and (agent.aware or not aware)
    ]
    return sorted(fit, key=lambda agent: (agent.started_clock or 0.0, agent.slot))


def orders(wish: Wish, agents: Sequence[Agent], now: float, *, busy: bool) -> list[Action]:
    """Suspend who is ready, retire who is outdated, stale or surplus, and refill at a pace; nothing new while the fleet is `busy`."""
    pool = [agent for agent in agents if _in_pool(agent)]
    wanted = wish.spec.process_hash if pool else ""  # once: it is dear
    reasons = {agent.id: _unfit(agent, wanted, now) for agent in pool}
    retired = [end(agent, reason) for agent in pool if (reason := reasons[agent.id])]
    fit = [agent for agent in pool if not reasons[agent.id]]
    size = wished_size(wish)
    surplus = max(0, len(fit) - size)
    if surplus:
        fit.sort(key=lambda agent: (agent.state is AgentState.SUSPENDED, agent.created_at, agent.slot))
    dropped = [end(agent, f"the warm pool holds {size}") for agent in fit[:surplus]]
    kept = fit[surplus:]
    suspended = [Suspend(agent) for agent in kept if _is_live(agent, AgentState.RUNNING) and agent.ready]
    return [*retired, *dropped, *suspended, *_refill(wish, agents, kept, now, busy=busy)]


def _refill(wish: Wish, agents: Sequence[Agent], kept: Sequence[Agent], now: float, *, busy: bool) -> list[Action]:
    """One start at a look, so that whoever acquires an instance meanwhile waits for one start at most."""
    if wish.mode is not Mode.RUN:
        return []
    retries = [agent for agent in kept if agent.state is not AgentState.STARTING and is_due_to_start(agent, now)]
    if retries:  # their backoff is a pace of its own
        return [Start(agent) for agent in retries]
    starting = sum(agent.state is AgentState.STARTING and agent.process is not None for agent in kept)
    if busy or starting >= STARTING_AT_ONCE:
        return []
    waiting = [Start(agent) for agent in kept if is_due_to_start(agent, now)][:1]
    room = wished_size(wish) > len(kept)
    return [*waiting] or [Create(slot, pooled=True) for slot in free_slots(agents, int(room))]


def _is_live(agent: Agent, state: AgentState) -> bool:
    return agent.state is state and agent.process is not None and agent.leader_exit is None


def _in_pool(agent: Agent) -> bool:
    return agent.pooled and not agent.leaving


def _unfit(agent: Agent, wanted: str, now: float) -> str:
    """Why the instance has to go, or nothing."""
    if agent.replace is not Replace.NO:
        return "restart"
    if agent.process is not None and agent.spec_hash != wanted:
        return "the spec changed"
    if agent.state is AgentState.SUSPENDED and agent.stale_deadline is not None and agent.stale_deadline <= now:
        return "stale in the warm pool"
    return ""
