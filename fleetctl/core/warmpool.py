"""The warm pool: suspended instances that become replicas in a millisecond. Whom to hand out, when to refill, whom to retire.

An instance of the pool is an agent like every other, in state SUSPENDED, that is not counted as a replica until it is promoted.
"""

from collections.abc import Sequence

from fleetctl.core.orders import Action, Create, Mode, Suspend, Wish, end, free_slots
from fleetctl.models import Agent, AgentState, FleetSpec, Replace

STARTING_AT_ONCE = 2
"""Pacing of the refill: so many instances of a pool may be starting at the same time."""


def wished_size(wish: Wish) -> int:
    """How many instances the pool shall hold; a fleet that runs nothing needs none."""
    if wish.mode is not Mode.RUN or wish.replicas == 0 or not wish.spec.warm_pool.enabled:
        return 0
    return wish.spec.warm_pool.size


def available(spec: FleetSpec, agents: Sequence[Agent]) -> list[Agent]:
    """The instances that can be handed out now, the oldest first."""
    fit = [agent for agent in agents if _in_pool(agent) and agent.state is AgentState.SUSPENDED and _fresh(spec, agent)]
    return sorted(fit, key=lambda agent: (agent.started_clock or 0.0, agent.slot))


def orders(wish: Wish, agents: Sequence[Agent], now: float, *, busy: bool) -> list[Action]:
    """Suspend who is ready, retire who is outdated, stale or surplus, and refill at a pace; nothing new while the fleet is `busy`."""
    pool = [agent for agent in agents if _in_pool(agent)]
    retired = [end(agent, reason) for agent in pool if (reason := _unfit(wish, agent, now))]
    fit = [agent for agent in pool if not _unfit(wish, agent, now)]
    size = wished_size(wish)
    surplus = sorted(fit, key=lambda agent: (agent.state is AgentState.SUSPENDED, agent.created_at))[: max(0, len(fit) - size)]
    dropped = [end(agent, f"the warm pool holds {size}") for agent in surplus]
    suspended = [
        Suspend(agent) for agent in fit if agent not in surplus and agent.state is AgentState.RUNNING and agent.ready and agent.process
    ]
    starting = sum(agent.state is AgentState.STARTING for agent in fit)
    room = 0 if busy else max(0, min(size - len(fit), STARTING_AT_ONCE - starting))
    return [*retired, *dropped, *suspended, *(Create(slot, pooled=True) for slot in free_slots(agents, room))]


def _in_pool(agent: Agent) -> bool:
    return agent.pooled and not agent.leaving


def _fresh(spec: FleetSpec, agent: Agent) -> bool:
    return agent.spec_hash == spec.process_hash and agent.replace is Replace.NO


def _unfit(wish: Wish, agent: Agent, now: float) -> str:
    """Why the instance has to go, or nothing."""
    if agent.process is not None and not _fresh(wish.spec, agent):
        return "the spec changed" if agent.replace is Replace.NO else "restart"
    if agent.state is AgentState.SUSPENDED and agent.stale_deadline is not None and agent.stale_deadline <= now:
        return "stale in the warm pool"
    return ""
