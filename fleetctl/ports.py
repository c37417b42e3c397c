"""The sockets in the wall between rules and hands: what the supervisor needs of the machine, and nothing more.

`host/` implements these for this machine, `testing.py` as public fakes. The three managers' names are the specification's.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fleetctl.models import (
    Agent,
    Checkpoint,
    CheckpointsSpec,
    Event,
    Exit,
    FleetSpec,
    Found,
    Identity,
    MetricSpec,
    Probe,
    ProcessRef,
    Saved,
    ScalingDecision,
    Usage,
)


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since boot; the same for every process of this boot."""
        ...

    def time(self) -> float:
        """Unix time in seconds, for people and files."""
        ...


class LifecycleManager(Protocol):
    """Starts, watches, signals and ends agents' processes. Called from the supervisor's event loop; never blocks for long."""

    def spawn(self, agent: Agent, spec: FleetSpec) -> ProcessRef:
        """Start the agent's process in a session of its own; returns once the program is executing. Raises SpawnFailed."""
        ...

    def watch(self, process: ProcessRef, on_exit: Callable[[Exit], None]) -> None:
        """Call `on_exit` once, from the event loop, when the process ends (at once when it has ended already)."""
        ...

    def signal(self, agents: Sequence[Agent], *numbers: int) -> None:
        """Send signals, in this order, once to every process of the trees of these agents, each verified; gone is no error."""
        ...

    def survivors(self, agents: Sequence[Agent]) -> Mapping[str, tuple[ProcessRef, ...]]:
        """For each agent, by id, every live process of its tree, the leader included, zombies aside; one scan for all."""
        ...

    def kill(self, agents: Sequence[Agent]) -> None:
        """SIGKILL every live process of the trees of these agents, as often as it takes to leave no time to fork."""
        ...

    async def suspend(self, agents: Sequence[Agent]) -> Collection[str]:
        """Stop every process of these agents' trees where it stands; the ids of those that were seen to have stopped."""
        ...

    async def resume(self, agents: Sequence[Agent]) -> Collection[str]:
        """Let suspended agents go on; the ids of those that were seen to do so."""
        ...

    def claim(self, agent: Agent, claim: Mapping[str, object], *, keep: bool = False) -> None:
        """Write what an agent learns late, whole or not at all, where its FLEETCTL_CLAIM points; `keep`: unless it is there already.

        Raises StateDirectoryError.
        """
        ...

    def limit(self, agents: Sequence[Agent], spec: FleetSpec) -> None:
        """Hold the trees of these running agents to the spec's limits from now on."""
        ...

    def watched_limits(self, spec: FleetSpec) -> Collection[str]:
        """Those of the spec's limits that nothing holds but a look at what the agents use, such as "memory_limit_mb"."""
        ...

    def backlog(self, spec: FleetSpec) -> int | None:
        """How many connections wait in the fleet's listening sockets; None where it has none, or the kernel does not tell."""
        ...

    def connected(self, spec: FleetSpec) -> bool:
        """Whether a connection waits at the fleet's listening sockets, is open, or was there since the last call."""
        ...

    def on_connection(self, spec: FleetSpec, call: Callable[[], None] | None) -> None:
        """Call this once, from the event loop, when a connection waits at the fleet's listening sockets; None: do so no more."""
        ...

    def release(self, process: ProcessRef) -> None:
        """Reap and forget a process that ended and whose tree is empty."""
        ...

    def identify(self, process: ProcessRef) -> Identity:
        """Whether the recorded process is the one that has its pid now."""
        ...

    def discard(self, agent: Agent) -> None:
        """Remove what was made for an agent that will never run again, except its output and what it saved itself."""
        ...


class Prober(Protocol):
    """Asks agents whether they work."""

    async def check(self, probe: Probe, agent: Agent, spec: FleetSpec, *, timeout_seconds: float) -> str | None:
        """None where the agent passed, else why it did not, in a few words. Cancelled, it leaves nothing behind."""
        ...


class CheckpointStore(Protocol):
    """Keeps what agents keep: each checkpoint whole, or not there. Its methods raise StateDirectoryError where the disk does not take it.

    One agent's are called one after the other.
    """

    def keeps_nothing(self, agent: Agent) -> bool:
        """Whether the agent's STATE_DIRECTORY is empty, told by one look."""
        ...

    async def prepare(self, agent: Agent) -> None:
        """Have an empty folder where the agent's FLEETCTL_CHECKPOINT_DIR points."""
        ...

    async def command(self, agent: Agent, spec: FleetSpec) -> None:
        """Have `checkpoints.command` write there what is to be saved. Raises FleetctlError where it fails or takes too long."""
        ...

    async def save(self, agent: Agent, spec: CheckpointsSpec, *, checkpoint_id: str, reason: str, commanded: bool = False) -> Saved:
        """Save what it keeps, what was written for the checkpoint, and its resume token, under this id, and remove older ones as asked.

        `commanded`: what was written is all there is to save. A checkpoint that has this id already becomes the new one in one step, and
        goes where nothing is left to save; what the agent has no folder for any more stays in it as it is.
        """
        ...

    async def clear(self, agent: Agent) -> None:
        """Remove what it keeps, in one step."""
        ...

    async def fill(self, agent: Agent) -> None:
        """Give an agent that has none yet the STATE_DIRECTORY of the checkpoint that its `restore` names.

        Raises UnknownCheckpoint, CheckpointDamaged.
        """
        ...

    async def find(self, checkpoint_id: str) -> Checkpoint:
        """A checkpoint, with every byte of it checked. Raises UnknownCheckpoint, CheckpointDamaged."""
        ...

    async def checkpoints(self, fleet: str | None = None, agent_id: str | None = None) -> Sequence[Checkpoint]:
        """All of a fleet, or of one agent, oldest first."""
        ...

    async def remove(self, checkpoint_id: str) -> None:
        """Raises UnknownCheckpoint."""
        ...


class MetricReader(Protocol):
    """Reads metrics that are found outside of the agents."""

    def read(self, metric: MetricSpec, spec: FleetSpec) -> float:
        """Its value now. Blocks, for as long as its timeout says at most; called in a thread. Raises FleetctlError, which says why not."""
        ...


class StateManager(Protocol):
    """What must outlive the daemon. Every method returns once the change will; raises StateDirectoryError."""

    async def save(
        self,
        agents: Iterable[Agent] = (),
        *,
        forget: Iterable[str] = (),
        events: Iterable[Event] = (),
        history: Iterable[tuple[str, ScalingDecision]] = (),
    ) -> None:
        """Write agents, forget others by id, append events and decisions (with their fleet's name), all or nothing."""
        ...

    async def save_wish(self, spec: FleetSpec, *, down: bool) -> None:
        """Write what is wished of a fleet; `down`: that it be taken down."""
        ...

    async def forget_wish(self, name: str) -> None:
        """Forget what was wished of a fleet, and what its autoscaler remembers."""
        ...

    async def save_scaling(self, fleet: str, memory: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write what a fleet's autoscaler has to remember, and append samples of load and size, each with its time `at`."""
        ...

    async def load_scaling(self, fleet: str) -> Mapping[str, Any] | None:
        """What `save_scaling` wrote last; None where there is nothing."""
        ...

    async def save_spending(self, fleet: str, spending: Mapping[str, Any]) -> None:
        """Write what a fleet's agents have spent; forgotten with its wish."""
        ...

    async def load_spending(self, fleet: str) -> Mapping[str, Any] | None:
        """What `save_spending` wrote last; None where there is nothing."""
        ...


@runtime_checkable
class Finder(Protocol):
    """A lifecycle manager that finds again what its predecessor started."""

    def find(self) -> Sequence[Found]:
        """Every live tree of an agent."""
        ...


@runtime_checkable
class Archive(Protocol):
    """A state manager that knows what was saved before it was made."""

    async def open(self) -> Sequence[Agent]:
        """The recorded agents."""
        ...

    async def read_wish(self, name: str) -> Mapping[str, Any] | None:
        """What is wished of a fleet, as {"spec": ..., "down": ...}; None where nothing is."""
        ...

    async def last(self, table: str, fleet: str | None, limit: int) -> Sequence[Mapping[str, Any]]:
        """The last `limit` rows of "events" or "history", oldest first."""
        ...


class ResourceManager(Protocol):
    """Collects what agents use."""

    def sample(self, agents: Mapping[str, ProcessRef]) -> Mapping[str, Usage]:
        """Usage of each agent's whole tree since the last call, by agent id. Takes milliseconds; may be called in a thread."""
        ...
