"""The gap between what should be and what is, as a list of orders; and when to look again.

`plan` reacts to nothing in particular: it looks at the whole picture each time, so an event that was missed is made up for by
the next look.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fleetctl.models import Agent, AgentState, FleetSpec, Replace


class Mode(StrEnum):
    """RUN: as wished. HOLD: adopt and stop, start nothing. STOP: the daemon is ending; the agents stop and come back with it."""

    RUN = "run"
    HOLD = "hold"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants of one fleet. `down`: nothing of it shall remain; `down_now`: without time to finish."""

    spec: FleetSpec
    mode: Mode = Mode.RUN
    down: bool = False
    down_now: bool = False

    @property
    def replicas(self) -> int:
        return 0 if self.down else self.spec.replicas


@dataclass(frozen=True, slots=True)
class Create:
    """A new agent, in this slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Start:
    """A process for an agent that has none."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class BecomeReady:
    agent: Agent


@dataclass(frozen=True, slots=True)
class Drain:
    """Ask the agent to stop; `leaving` if it is not to come back."""

    agent: Agent
    leaving: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """The time to finish has run out."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class Forget:
    """The agent is gone and shall not come back."""

    agent: Agent


Action = Create | Start | BecomeReady | Drain | Kill | Forget


def plan(wish: Wish, agents: Sequence[Agent], now: float) -> list[Action]:
    """The orders that bring the agents closer to the wish. `now`: seconds of the boot's monotonic clock."""
    actions: list[Action] = [action for agent in agents if (action := _overdue(agent, now))]
    staying = [agent for agent in agents if not agent.leaving]
    if wish.mode is Mode.STOP:
        return actions + [Drain(agent, leaving=False, reason="the daemon stops") for agent in staying if _can_drain(agent)]
    surplus = len(staying) - wish.replicas
    victims = _victims(staying)[: max(0, surplus)]
    actions += [_end(agent, "the fleet is taken down" if wish.down else f"scaled down to {wish.replicas}") for agent in victims]
    leaving = {agent.id for agent in victims}
    staying = [agent for agent in staying if agent.id not in leaving]
    if wish.mode is Mode.HOLD:
        return actions
    starts: list[Action] = [Create(slot) for slot in _free_slots(agents, max(0, -surplus))]
    starts += [Start(agent) for agent in staying if _due_to_start(agent, now)]
    # A roll waits for whatever starts, and must not start it a second time.
    return actions + (starts or _replacements(wish.spec, staying))


def next_deadline(wish: Wish, agents: Iterable[Agent]) -> float | None:
    """When `plan` has to be asked again if nothing happens before, in seconds of the boot's monotonic clock."""
    # A retry that this mode never makes would stay due for ever, and whoever waits for it would never sleep.
    resting = () if wish.mode is Mode.RUN else (AgentState.BACKOFF, AgentState.FAILED)
    return min((at for agent in agents if agent.state not in resting and (at := _deadline(agent)) is not None), default=None)


def _deadline(agent: Agent) -> float | None:
    match agent.state:
        case AgentState.STARTING:
            return agent.ready_deadline
        case AgentState.DRAINING:
            return agent.drain_deadline
        case AgentState.BACKOFF | AgentState.FAILED:
            return agent.retry_deadline
        case _:
            return None


def _overdue(agent: Agent, now: float) -> Action | None:
    if agent.state is AgentState.TERMINATED and agent.leaving:
        return Forget(agent)
    deadline = _deadline(agent)
    if deadline is None or deadline > now:
        return None
    if agent.state is AgentState.STARTING and agent.process and not agent.leader_exit:
        return BecomeReady(agent)
    return Kill(agent) if agent.state is AgentState.DRAINING else None


def _can_drain(agent: Agent) -> bool:
    return agent.process is not None and agent.state in (AgentState.STARTING, AgentState.RUNNING, AgentState.SUSPENDED)


def _end(agent: Agent, reason: str) -> Action:
    if agent.process is None and agent.state is not AgentState.DRAINING:
        return Forget(agent)
    return Drain(agent, leaving=True, reason=reason)


def _victims(agents: Sequence[Agent]) -> list[Agent]:
    """Who goes first: those that do no work anyway, then the oldest."""
    return sorted(agents, key=lambda agent: (agent.process is not None, agent.ready, agent.created_at, agent.slot))


def _free_slots(agents: Sequence[Agent], count: int) -> list[int]:
    taken = {agent.slot for agent in agents}
    return [slot for slot in range(len(taken) + count) if slot not in taken][:count]


def _due_to_start(agent: Agent, now: float) -> bool:
    if agent.process is not None:
        return False
    if agent.state is AgentState.STARTING or agent.replace is not Replace.NO:
        return True
    return agent.state in (AgentState.BACKOFF, AgentState.FAILED) and agent.retry_deadline is not None and agent.retry_deadline <= now


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
