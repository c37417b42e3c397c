"""What every engine does: where a fleet runs differs behind this, and nothing before it. Cheap to import."""

from typing import TYPE_CHECKING, Protocol

from fleetctl.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from fleetctl.daemon.wire import Change, EventInfo, HistoryEntry, Status
    from fleetctl.models import FleetSpec

Process = tuple[str, int | None]
"""An agent's id and its pid: a new one of either is a new process."""


class Follower(Protocol):
    """What an agent writes, as it comes."""

    def read(self) -> "list[bytes]":
        """Lines since the last call; none where none came. Waits for nothing."""
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """A place where fleets run. Opens nothing before it is asked for something; every method raises FleetctlError."""

    def __enter__(self) -> "Self": ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None") -> None: ...

    def capabilities(self) -> "Mapping[str, str]":
        """What it cannot do, by ability (see ABILITIES), each with why. The rest it can."""
        ...

    def alive(self) -> bool:
        """Whether something answers that can be asked."""
        ...

    def fleet_names(self) -> "list[str]": ...

    def status(self) -> "Status": ...

    def watch_status(self, interval: float, fleet: str | None = None) -> "AbstractContextManager[Iterator[Status]]":
        """The status now and after every change, at most once each `interval` seconds, and now and then without one."""
        ...

    def prepare(self) -> str:
        """Make ready for `apply`; in words what had to be started for it."""
        ...

    def apply(self, spec: "FleetSpec", *, replicas_given: bool, dry_run: bool) -> "Change":
        """Make the fleet so; returns when the wish is stored. `replicas_given` False keeps the size that a fleet has."""
        ...

    def outdated(self, spec: "FleetSpec") -> "set[Process]":
        """The processes that would have to be replaced for this spec, where the engine does not tell it by itself (`updating`)."""
        ...

    def scale(self, fleet: str, replicas: int | None, delta: int | None, dry_run: bool) -> "Change": ...

    def restart(self, fleet: str, agents: "Sequence[str] | None", all_at_once: bool, dry_run: bool) -> "Change": ...

    def down(self, fleet: str, now: bool, dry_run: bool) -> "Change": ...

    def drain_seconds(self, fleet: str) -> float:
        """The longest that an agent of the fleet may take to stop. Raises NotFound."""
        ...

    def history(self, fleet: str | None, limit: int) -> "list[HistoryEntry]": ...

    @property
    def source(self) -> str:
        """Whose events these are, as the `source` of CloudEvents."""
        ...

    def events(self, fleet: str | None, limit: int) -> "list[EventInfo]": ...

    def follow_events(self, fleet: str | None, limit: int) -> "AbstractContextManager[Iterator[EventInfo]]":
        """The last so many events, then each new one."""
        ...

    def log_sources(self, names: "Sequence[str]", *, ended: bool = False) -> "tuple[list[tuple[str, str]], int]":
        """(fleet, agent) of the logs that these names mean, and how many were left out because their agents have ended."""
        ...

    def tail(self, fleet: str, agent_id: str, lines: int | None, since: float | None) -> "Iterator[bytes]": ...

    def follower(self, fleet: str, agent_id: str, lines: int | None, since: float | None) -> Follower: ...

    def last_output(self, fleet: str, agent_id: str) -> "list[str]":
        """The last lines that an agent wrote, harmless to show."""
        ...


ABILITIES = (
    "up",
    "scale",
    "status",
    "ps",
    "logs",
    "restart",
    "restart-agent",
    "history",
    "events",
    "wait",
    "down",
    "orphans",
    "command",
    "offline",
    "suspend",
    "acquire",
    "server-dry-run",
)
"""Everything some engine can do: commands, and `restart-agent` (a single one), `orphans` (find and end what no record claims),
`command` (run a command line without an image), `offline` (answer from records while nothing runs), `suspend`, `acquire`, and
`server-dry-run` (have the dry run judged where it would happen)."""


def require(engine: Engine, ability: str, what: str) -> None:
    """Unsupported, with the reason, where the engine cannot do this."""
    if reason := engine.capabilities().get(ability):
        raise Unsupported(f"{what}: {reason}")
