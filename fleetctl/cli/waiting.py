"""Waiting until a fleet is as it was asked to be: pure predicates over a status, and the loop that watches until one holds."""

import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING

from fleetctl.cli.terminal import Progress, harmless, say
from fleetctl.errors import Busy, DaemonUnreachable, FleetctlError, NotFound, NotStopped, TimedOut

if TYPE_CHECKING:
    from fleetctl.cli.outcome import Outcome
    from fleetctl.daemon.wire import AgentStatus, FleetStatus, Status
    from fleetctl.engines.protocol import Engine, Process

WATCH_SECONDS = 0.05
ASK_AGAIN_SECONDS = 0.25
SHOWN_AGENTS = 5
SURVIVOR_SECONDS = 15.0


def find(status: "Status", name: str) -> "FleetStatus | None":
    return next((fleet for fleet in status["fleets"] if fleet["name"] == name), None)


def counted(fleet: "FleetStatus") -> "list[AgentStatus]":
    """The agents that count as replicas, or are on their way out: instances of the warm pool are neither."""
    return [agent for agent in fleet["agents"] if not agent["pooled"]]


def warm(fleet: "FleetStatus | None") -> bool:
    """Whether the warm pool is as it is to be: so many suspended instances, and nobody on the way in or out."""
    if fleet is None:
        return False
    pool = [agent for agent in fleet["agents"] if agent["pooled"]]
    return len(pool) == fleet["warm_pool"]["target_size"] and all(agent["state"] == "suspended" for agent in pool)


def settled(fleet: "FleetStatus | None") -> bool:
    """Whether the fleet is as desired: every replica ready (or done for good), and nobody else there any more."""
    if fleet is None or fleet["down"] or fleet.get("updating"):
        return False
    agents = counted(fleet)
    return len(agents) == fleet["desired_replicas"] and all(agent["ready"] or agent["state"] == "terminated" for agent in agents)


def failed(fleet: "FleetStatus | None") -> "list[AgentStatus]":
    """Agents that nothing will bring up soon: they crash over and over, cannot start, or said that they cannot."""
    return [agent for agent in counted(fleet) if agent["state"] == "failed" and not agent["replacing"]] if fleet else []


def gave_up(fleet: "FleetStatus | None") -> bool:
    """Whether waiting for the fleet to settle is in vain: an agent failed that is not surplus anyway."""
    return fleet is not None and bool(failed(fleet)) and len(counted(fleet)) <= fleet["desired_replicas"]


def drained(fleet: "FleetStatus | None") -> bool:
    return fleet is None or not counted(fleet)


def replaced(fleet: "FleetStatus | None", old: "Collection[Process]") -> bool:
    """Whether the fleet is as desired and none of the old processes is left."""
    return fleet is not None and settled(fleet) and not any((agent["id"], agent["pid"]) in old for agent in fleet["agents"])


def summary(status: "Status", names: Sequence[str]) -> str:
    """One line on how far things are."""
    parts = []
    for name in names:
        fleet = find(status, name)
        if fleet is None:
            parts.append(f"{name}: gone")
            continue
        states: dict[str, int] = {}
        for agent in counted(fleet):
            if not agent["ready"]:
                states[agent["state"]] = states.get(agent["state"], 0) + 1
        rest = "".join(f", {number} {state}" for state, number in sorted(states.items()))
        goal = "" if fleet["down"] else f" of {fleet['desired_replicas']}"
        parts.append(f"{name}: {fleet['ready_replicas']}{goal} ready{rest}")
    return "; ".join(parts)


@contextmanager
def deadline(seconds: float | None, what: str) -> Iterator[None]:
    """Raises TimedOut inside the block when the time is over, whatever it waits for at that moment. None: no limit."""
    if not seconds:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimedOut(f"{what} within {seconds:g} s", hint="`fleetctl status` shows how far it is; what was asked for goes on")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Troubles:
    """What keeps agents from being stopped, said once each, so that no command waits without a word."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, status: "Status", names: Sequence[str] | None = None) -> None:
        for fleet in status["fleets"]:
            waiting = [agent for agent in fleet["agents"] if agent["unsaved"] and (names is None or fleet["name"] in names)]
            if waiting and waiting[0]["unsaved"] not in self._said:
                first, others = waiting[0], f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
                self._said.add(str(first["unsaved"]))
                say(
                    f"{first['id']}{others}: no checkpoint can be taken ({harmless(str(first['unsaved']))}), and without one it is not"
                    f" stopped. Free some space, or stop without one: `fleetctl drain {first['id']} --now`, `fleetctl down --now`"
                )


class Watched:
    """Waiting for the daemon to report what was asked for; keeps the last status seen, for a word on how far things came."""

    def __init__(self, engine: "Engine", names: Sequence[str]) -> None:
        self.engine = engine
        self.names = names
        self.last: Status | None = None
        self.troubles = Troubles()
        self._draining: frozenset[str] = frozenset()
        self._draining_since = 0.0
        self._drain_seconds: float | None = None

    def until(self, done: Callable[["Status"], bool], *, timeout: float | None, what: str) -> "Status":
        """The first status that `done` accepts. Shows progress on a terminal.

        Raises TimedOut; NotStopped for agents that outlive even being killed; DaemonUnreachable when the daemon ends.
        """
        progress = Progress()
        try:
            with deadline(timeout, f"{', '.join(self.names)}: {what}"):
                for status in self._statuses():
                    self.last = status
                    if done(status):
                        return status
                    self.troubles.tell(status, self.names)
                    self._check_survivors(status)
                    progress.update(summary(status, self.names))
        except TimedOut as error:
            raise TimedOut("\n".join([error.message, *self._delays()]), hint=error.hint) from error
        finally:
            progress.end()
        raise DaemonUnreachable("the daemon was stopped while this command waited for it")

    def _statuses(self) -> "Iterator[Status]":
        yield self.engine.status()  # often enough, and cheaper than a stream
        try:
            with self.engine.watch_status(WATCH_SECONDS) as stream:
                yield from stream
        except Busy:  # so many watch that there is no stream left for us
            while True:
                yield self.engine.status()
                sleep(ASK_AGAIN_SECONDS)

    def _check_survivors(self, status: "Status") -> None:
        """The daemon kills what does not stop in its time; who is still there a good while later will not go, and is named."""
        found = [
            agent["id"]
            for fleet in status["fleets"]
            if fleet["name"] in self.names
            for agent in fleet["agents"]
            if agent["state"] == "draining" and not agent["unsaved"]
        ]
        if (draining := frozenset(found)) != self._draining:
            self._draining, self._draining_since = draining, monotonic()
        if draining and monotonic() - self._draining_since > self._longest_drain() + SURVIVOR_SECONDS:
            raise NotStopped(f"still alive, though killed: {', '.join(sorted(draining))}", hint="`fleetctl inspect` shows their processes")

    def _longest_drain(self) -> float:
        if self._drain_seconds is None:
            self._drain_seconds = 0.0
            for name in self.names:
                with suppress(NotFound):
                    self._drain_seconds = max(self._drain_seconds, self.engine.drain_seconds(name))
        return self._drain_seconds

    def _delays(self) -> list[str]:
        """How far things are, and a few of the agents that keep them waiting."""
        if self.last is None:
            return []
        fleets = [fleet for name in self.names if (fleet := find(self.last, name))]
        late = [agent for fleet in fleets for agent in counted(fleet) if not agent["ready"] or fleet["down"]]
        lines = [f"{agent['id']}: {agent['state']}" + (f", {agent['note']}" if agent["note"] else "") for agent in late]
        return [summary(self.last, self.names), *lines[:SHOWN_AGENTS], *(["..."] if len(lines) > SHOWN_AGENTS else [])]


def wait_until_settled(
    engine: "Engine", outcome: "Outcome", timeout: float | None, old: "Mapping[str, Collection[Process]] | None" = None
) -> str:
    """Watch the changed fleets until each is as desired, or an agent of it failed; a line on how they are now.

    `old`: processes, by fleet, that have to be gone by then.
    """
    names, leaving = outcome.changed_fleets, old or {}

    def done(status: "Status") -> bool:
        fleets = {name: find(status, name) for name in names}
        for name, fleet in fleets.items():
            if fleet is None or fleet["down"]:
                raise FleetctlError(f"{name} was taken down meanwhile")
        return any(map(gave_up, fleets.values())) or all(replaced(fleet, leaving.get(name, ())) for name, fleet in fleets.items())

    watched = Watched(engine, names)
    try:
        watched.until(done, timeout=timeout, what="not everything was as asked for")
    except (TimedOut, NotStopped) as error:
        outcome.failures.append((", ".join(names), error))
    status = watched.last
    if status is None:
        return ""
    outcome.fleets = [fleet for fleet in status["fleets"] if fleet["name"] in names]
    outcome.failures += [
        (fleet["name"], explain_failures(engine, fleet["name"], failed(fleet))) for fleet in outcome.fleets if gave_up(fleet)
    ]
    return "" if outcome.failures else summary(status, names) + "\n"


def wait_until_warm(engine: "Engine", names: Sequence[str], timeout: float | None) -> "Status":
    """Watch the fleets until the warm pool of each is as it is to be; the status then. Raises FleetctlError where that is in vain."""

    def done(status: "Status") -> bool:
        fleets = {name: find(status, name) for name in names}
        for name, fleet in fleets.items():
            if fleet is None or fleet["down"]:
                raise FleetctlError(f"{name} was taken down meanwhile")
            if lost := [agent for agent in fleet["agents"] if agent["pooled"] and agent["state"] in ("failed", "terminated")]:
                raise explain_failures(engine, name, lost)
        return all(map(warm, fleets.values()))

    return Watched(engine, names).until(done, timeout=timeout, what="the warm pool is not as asked for")


def explain_failures(engine: "Engine", fleet: str, agents: "Sequence[AgentStatus]") -> FleetctlError:
    """An error that says why agents failed, each reason once, and shows the last lines that the first one wrote."""
    from fleetctl.cli.render import failure_hint

    first = agents[0]["id"]
    why: dict[str, list[str]] = {}
    for agent in agents:
        why.setdefault(agent["note"] or (agent["last_exit"] or {"text": "no reason is known"})["text"], []).append(agent["id"])
    lines = [f"{ids[0]}{f' and {len(ids) - 1} more' if ids[1:] else ''} failed: {reason}" for reason, ids in why.items()]
    if output := engine.last_output(fleet, first):
        lines += [f"last lines of {first}:", *(f"  {line}" for line in output)]
    return FleetctlError("\n".join(lines), hint=failure_hint(fleet, agents[0]))
