"""The vocabulary of the rules: what is wished, and the orders that can follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fleetctl.models import Agent, AgentState, AutoscalingMode, FleetSpec, Replace


class Mode(StrEnum):
    """RUN: as wished. HOLD: adopt and stop, start nothing. STOP: the daemon is ending; the agents stop and come back with it."""

    RUN = "run"
    HOLD = "hold"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants of one fleet. `down`: nothing of it shall remain; `down_now`: without time to finish.

    `pool_alone`: the warm pool is held also where no replicas are wished for, and no load can bring any back. `paused`: why nothing of it
    runs for now; what ran is stopped, and comes back when that is over.
    """

    spec: FleetSpec
    mode: Mode = Mode.RUN
    down: bool = False
    down_now: bool = False
    pool_alone: bool = False
    paused: str = ""

    @property
    def replicas(self) -> int:
        return 0 if self.down else self.spec.replicas

    @property
    def starts(self) -> bool:
        """Whether anything may be started."""
        return self.mode is Mode.RUN and (self.down or not self.paused)

    @property
    def wakes(self) -> bool:
        """Whether a fleet that has no replicas waits for work, which brings one back."""
        wanted = self.spec.autoscaling
        acts = wanted.enabled and wanted.mode is AutoscalingMode.ACT
        return acts and wanted.idle_seconds is not None and not self.down and self.starts


@dataclass(frozen=True, slots=True)
class Create:
    """A new agent, in this slot; `pooled`: for the warm pool."""

    slot: int
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """A process for an agent that has none."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class BecomeReady:
    agent: Agent


@dataclass(frozen=True, slots=True)
class Suspend:
    """Stop a ready agent of the warm pool where it stands."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class Promote:
    """Make a suspended agent of the warm pool one of the replicas, and let it go on."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class Drain:
    """Ask the agent to stop; `leaving` if it is not to come back."""

    agent: Agent
    leaving: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """It lives, but does not work: stop it, and judge that as the failure it is."""

    agent: Agent
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """The time to finish has run out."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class Forget:
    """The agent is gone and shall not come back."""

    agent: Agent


Action = Create | Start | BecomeReady | Suspend | Promote | Drain | Fail | Kill | Forget


def end(agent: Agent, reason: str) -> Action:
    """The order that makes the agent go for good: one without a process is only forgotten."""
    if agent.process is None and agent.state is not AgentState.DRAINING:
        return Forget(agent)
    return Drain(agent, leaving=True, reason=reason)


def is_due_to_start(agent: Agent, now: float) -> bool:
    """Whether it has no process and shall have one now: it never had, was stopped to be replaced, or its backoff is over."""
    if agent.process is not None:
        return False
    if agent.state is AgentState.STARTING or agent.replace is not Replace.NO:
        return True
    return agent.state in (AgentState.BACKOFF, AgentState.FAILED) and agent.retry_deadline is not None and agent.retry_deadline <= now


def free_slots(agents: Sequence[Agent], count: int) -> list[int]:
    """The lowest slots that nobody has; those on their way out still have theirs."""
    if count <= 0:
        return []
    taken = {agent.slot for agent in agents}
    return [slot for slot in range(len(taken) + count) if slot not in taken][:count]
