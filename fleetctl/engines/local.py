"""Fleets on this machine: the daemon of one state directory, started where a command needs it, and the directory itself when none answers.

Cheap to import: what only some commands need is imported where it is used.
"""

import os
from typing import TYPE_CHECKING, Any, cast

from fleetctl.errors import DaemonRunning, DaemonUnreachable, FleetctlError, NotFound, StateDirectoryError, TimedOut, from_json
from fleetctl.host.paths import Paths, choose_state_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from fleetctl.client import Client
    from fleetctl.daemon.wire import (
        AgentStatus,
        Autoscaling,
        Change,
        CheckpointDetail,
        CheckpointInfo,
        Checkpoints,
        EventInfo,
        ExitInfo,
        FleetStatus,
        HistoryEntry,
        Sample,
        Status,
        WarmPool,
    )
    from fleetctl.engines.protocol import Process
    from fleetctl.host.logread import Follower
    from fleetctl.models import Agent, Exit, FleetSpec

READY_FD = "FLEETCTL_READY_FD"
START_SECONDS = 20.0
LOOK_SECONDS = 1.0


class LocalEngine:
    """One state directory. Opens nothing before it is asked for something."""

    def __init__(self, state_dir: str | None = None) -> None:
        self.paths = Paths(choose_state_dir(state_dir))
        self._client: Client | None = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None") -> None:
        if self._client is not None:
            self._client.close()

    @property
    def client(self) -> "Client":
        """The control socket. Its methods raise DaemonUnreachable where no daemon answers; nothing starts one."""
        if self._client is None:
            from fleetctl.client import Client

            self._client = Client(self.paths.root)
        return self._client

    # What every engine has: fleetctl/engines/protocol.py

    def capabilities(self) -> "dict[str, str]":
        return {"server-dry-run": "the daemon says what it would do, without doing a part of it"}

    def alive(self) -> bool:
        return self.daemon_pid() is not None

    def fleet_names(self) -> list[str]:
        return self.client.daemon()["fleets"]

    def status(self) -> "Status":
        return self.client.status()

    def watch_status(self, interval: float, fleet: str | None = None) -> "AbstractContextManager[Iterator[Status]]":
        return self.client.watch_status(interval, fleet)

    def prepare(self) -> str:
        pid = self.ensure_daemon()
        return "" if pid is None else f"started the daemon (pid {pid})"

    def apply(self, spec: "FleetSpec", *, replicas_given: bool, dry_run: bool) -> "Change":
        from fleetctl.models import to_json

        return self.client.apply(spec.name, to_json(spec), replicas_given, dry_run)

    def outdated(self, spec: "FleetSpec") -> "set[Process]":
        try:
            fleet = self.client.fleet(spec.name)
        except (DaemonUnreachable, NotFound):
            return set()
        same = fleet["spec_hash"] == spec.process_hash
        return set() if same else {(agent["id"], agent["pid"]) for agent in fleet["agents"] if agent["pid"] is not None}

    def scale(self, fleet: str, replicas: int | None, delta: int | None, dry_run: bool) -> "Change":
        return self.client.scale(fleet, replicas, delta, dry_run)

    def restart(self, fleet: str, agents: "Sequence[str] | None", all_at_once: bool, dry_run: bool) -> "Change":
        return self.client.restart(fleet, agents, all_at_once, dry_run)

    def down(self, fleet: str, now: bool, dry_run: bool) -> "Change":
        return self.client.down(fleet, now, dry_run)

    def drain_seconds(self, fleet: str) -> float:
        drain = self.client.fleet(fleet)["spec"]["graceful_drain"]
        return float("inf") if drain["on_timeout"] == "wait" else float(drain["timeout_seconds"] + drain["checkpoint_timeout_seconds"])

    def history(self, fleet: str | None, limit: int) -> "list[HistoryEntry]":
        return self.client.history(fleet, limit)["entries"]

    @property
    def source(self) -> str:
        return self.paths.source

    def events(self, fleet: str | None, limit: int) -> "list[EventInfo]":
        return self.client.events(fleet, limit)["events"]

    def follow_events(self, fleet: str | None, limit: int) -> "AbstractContextManager[Iterator[EventInfo]]":
        return self.client.follow_events(fleet, limit)

    # The daemon, and the state directory without one

    def daemon_pid(self) -> int | None:
        """The pid of the daemon that answers, None where none does."""
        try:
            return int(self.client.daemon()["pid"])
        except DaemonUnreachable:
            return None

    def ensure_daemon(self, *, hold: bool = False) -> int | None:
        """Start a daemon in the background unless one answers; its pid where it was started. Raises what kept it from starting.

        With `hold` it takes back the agents that run and starts no others: enough to take fleets down.
        """
        if self.daemon_pid() is not None:
            return None
        try:
            return self._start_daemon(hold=hold)
        except DaemonRunning:
            self._wait_for_winner()
            return None

    def _wait_for_winner(self) -> None:
        """Another command starts a daemon at this moment: wait until that one answers."""
        from time import monotonic, sleep

        deadline = monotonic() + START_SECONDS
        while self.daemon_pid() is None:
            if monotonic() > deadline:
                raise DaemonUnreachable(
                    f"another daemon holds {self.paths.root} and does not answer", hint="`fleetctl doctor` shows which process it is"
                )
            sleep(0.02)

    def _start_daemon(self, *, hold: bool) -> int:
        import subprocess
        import sys

        self.paths.prepare()
        try:
            log = os.open(self.paths.daemon_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateDirectoryError(f"{self.paths.daemon_log}: {error.strerror}") from error
        start = os.fstat(log).st_size
        reader, writer = os.pipe()
        try:
            command = [sys.executable, "-m", "fleetctl", "--state-dir", self.paths.root, "daemon", "--background"]
            child = subprocess.Popen(
                [*command, "--hold"] if hold else command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(writer),
                start_new_session=True,  # neither this terminal's Ctrl-C nor its end reaches the daemon
                pass_fds=(writer,),
            )
        except OSError as error:
            os.close(reader)
            raise FleetctlError(f"cannot start the daemon: {error.strerror}") from error
        finally:
            os.close(writer)
            os.close(log)
        with open(reader, "rb", buffering=0) as pipe:
            answer = _first_line(pipe.fileno())
        child.returncode = 0  # it outlives us: nothing here is going to wait for it
        return self._judge(answer, child.pid, start)

    def _judge(self, answer: str | None, pid: int, log_start: int) -> int:
        """What the daemon said about its start; `answer` is empty where it died without a word, None where it took too long."""
        if answer == "ready":
            return pid
        if answer and answer.startswith("error "):
            from json import loads

            raise from_json(loads(answer.removeprefix("error ")))
        what = "did not start in time" if answer is None else "ended while it started"
        said = _tail(self.paths.daemon_log, log_start)
        raise FleetctlError(
            f"the daemon (pid {pid}) {what}" + (f"; the end of its log:\n{said}" if said else ""),
            hint=f"look at {self.paths.daemon_log}, and at `fleetctl doctor`",
        )

    def stop_daemon(self, mode: str, timeout: float | None = None, meanwhile: "Callable[[Status], None]" = lambda status: None) -> int:
        """Ask the daemon to end ("keep" or "drain" its agents) and wait until it has; its pid. Raises DaemonUnreachable, TimedOut.

        `meanwhile` is told how things are while that takes its time.
        """
        from contextlib import suppress
        from time import monotonic

        pid = int(self.client.daemon()["pid"])
        try:
            process = os.pidfd_open(pid)
        except OSError:
            return pid  # it ended in between
        with open(process, "rb", buffering=0) as descriptor:
            self.client.shutdown(mode)
            deadline = None if timeout is None else monotonic() + timeout
            while True:
                left = LOOK_SECONDS if deadline is None else max(0.0, min(LOOK_SECONDS, deadline - monotonic()))
                if _readable(descriptor.fileno(), left):
                    break
                if deadline is not None and monotonic() >= deadline:
                    raise TimedOut(f"the daemon (pid {pid}) has not ended after {timeout:g} s; it goes on trying")
                with suppress(DaemonUnreachable, TimedOut):
                    meanwhile(self.client.status())
        return pid

    def offline_status(self) -> "Status":
        """What the state directory and the processes themselves tell, in the shape of the daemon's status, while no daemon runs."""
        from time import time

        from fleetctl import __version__
        from fleetctl.host import state

        wishes = {str(wish["spec"].get("name")): wish for wish in state.read_wishes(self.paths)}
        agents: dict[str, list[AgentStatus]] = {name: [] for name in wishes}
        for agent in state.read_agents(self.paths):
            agents.setdefault(agent.fleet, []).append(_offline_agent(agent))
        return {
            "schema": "fleetctl/status/v1",
            "generated_at": _rfc3339(time()),
            "daemon": {
                "alive": False,
                "pid": None,
                "version": __version__,
                "uptime_seconds": None,
                "state_dir": self.paths.root,
                "note": "no daemon runs",
            },
            "fleets": [_offline_fleet(name, wishes.get(name), found) for name, found in sorted(agents.items())],
        }

    def stored_specs(self) -> "dict[str, Mapping[str, Any]]":
        """The specs of the fleets that are wished for, by name, as they are stored."""
        from fleetctl.host import state

        return {str(wish["name"]): wish["spec"] for wish in state.read_wishes(self.paths) if not wish["down"]}

    def offline_history(self, fleet: str | None, limit: int) -> "list[HistoryEntry]":
        """The last decisions from the database, oldest first, while no daemon runs."""
        from fleetctl.host import state

        return [cast("HistoryEntry", _dated({"details": {}, **row})) for row in state.read_log(self.paths, "history", fleet, limit)]

    def samples(self, fleet: str, limit: int) -> "list[Sample]":
        """The last samples of load and size of an autoscaled fleet, oldest first, with and without a daemon."""
        from fleetctl.host import state

        try:
            return self.client.samples(fleet, limit)["samples"]
        except DaemonUnreachable:
            return [cast("Sample", _dated(row)) for row in state.read_log(self.paths, "samples", fleet, limit)]

    def offline_events(self, fleet: str | None, limit: int) -> "list[EventInfo]":
        """The last events from the database, oldest first, while no daemon runs."""
        from fleetctl.host import state

        return [cast("EventInfo", _dated(row)) for row in state.read_log(self.paths, "events", fleet, limit)]

    def find_orphans(self) -> "list[Agent]":
        """Live agents of this state directory that no record claims. Reads only."""
        from fleetctl.host.process import LocalLifecycleManager
        from fleetctl.host.state import read_agents
        from fleetctl.models import Agent

        # The processes first: an agent is recorded before it is started, so none of these can be one that was just started.
        found = LocalLifecycleManager(self.paths).find()
        claimed = {agent.token for agent in read_agents(self.paths)}
        return [
            Agent(id=tree.agent_id, fleet=tree.fleet, slot=tree.slot, created_at=tree.started_at, token=tree.token, process=tree.leader)
            for tree in found
            if tree.token not in claimed
        ]

    def end_orphans(self, orphans: "Sequence[Agent]", *, seconds: float) -> "list[Agent]":
        """Ask these agents to stop, kill what is left after so many seconds; those that outlived even that."""
        from signal import SIGCONT, SIGTERM
        from time import monotonic, sleep

        from fleetctl.host.process import LocalLifecycleManager

        hands, deadline = LocalLifecycleManager(self.paths), monotonic() + seconds
        if seconds > 0:
            hands.signal(orphans, SIGTERM, SIGCONT)  # a stopped process does not act on the first before the second
        # Whole trees are looked for, so there is no one descriptor to wait on.
        while any(hands.survivors(orphans).values()) and monotonic() < deadline:
            sleep(0.05)
        hands.kill(orphans)
        deadline = monotonic() + 2.0
        while any(left := hands.survivors(orphans).values()) and monotonic() < deadline:
            sleep(0.05)
        return [agent for agent, processes in zip(orphans, left, strict=True) if processes]

    def is_kept_by_program(self) -> bool:
        """Whether a program that embeds the fleet holds the state directory, so that no daemon can."""
        from fleetctl.host.state import is_kept_by_program

        return is_kept_by_program(self.paths)

    def lock_holder(self) -> int | None:
        """The pid of the process that holds this state directory as its daemon; 0 where it is unknown, None where there is none."""
        from fleetctl.host.state import lock_holder

        return lock_holder(self.paths)

    def tail(self, fleet: str, agent_id: str, lines: int | None, since: float | None) -> "Iterator[bytes]":
        """The last lines that an agent wrote (None: all), those since a Unix time."""
        from fleetctl.host.logread import tail

        return tail(self.paths, fleet, agent_id, lines, since)

    def follower(self, fleet: str, agent_id: str, lines: int | None, since: float | None) -> "Follower":
        """The same, then what comes: ask it again and again, and close it."""
        from fleetctl.host.logread import Follower

        return Follower(self.paths, fleet, agent_id, lines, since)

    def last_output(self, fleet: str, agent_id: str) -> list[str]:
        """The last lines that an agent wrote, harmless to show."""
        from fleetctl.host.logread import last_lines

        return last_lines(self.paths, fleet, agent_id)

    def log_sources(self, names: "Sequence[str]", *, ended: bool = False) -> "tuple[list[tuple[str, str]], int]":
        """(fleet, agent id) of the logs that are meant by these names of fleets or agents, all fleets where none is given.

        Of a fleet these are the agents there are now, with `ended` also those there were; the number counts what was left out. An
        agent that is named is always meant. NotFound for a name with no log.
        """
        from fleetctl.host import logfiles

        fleets = {fleet: logfiles.agents(self.paths, fleet) for fleet in _names(self.paths.logs)}
        current = self._recorded_agents()
        sources: list[tuple[str, str]] = []
        left_out = 0
        for name in names or fleets:
            owner = next((fleet for fleet, agents in fleets.items() if name in agents), None)
            if name in fleets:
                chosen = [agent for agent in fleets[name] if ended or agent in current]
                sources += [(name, agent) for agent in chosen]
                left_out += len(fleets[name]) - len(chosen)
            elif owner:
                sources.append((owner, name))
            elif name not in self.known_names()[0] and name not in current:
                raise NotFound(f"no such fleet or agent: {name}")
        return list(dict.fromkeys(sources)), left_out

    def _recorded_agents(self) -> set[str]:
        """Ids of the agents there are, by the records, which a dead daemon leaves too; where they cannot be read by the lock files."""
        from fleetctl.host.state import read_agents

        try:
            return {agent.id for agent in read_agents(self.paths)}
        except StateDirectoryError:
            return set(self.known_names()[1])

    def checkpoints(self, *, agent_id: str | None = None) -> "Checkpoints":
        """What was saved of agents, from the disk, oldest first."""
        from fleetctl.host import checkpoints

        found, problems = checkpoints.listing(self.paths, agent_id=agent_id)
        told = [cast("CheckpointInfo", checkpoints.described(self.paths, one)) for one in found]
        return {"schema": "fleetctl/checkpoints/v1", "checkpoints": told, "problems": problems}

    def checkpoint_ids(self) -> list[tuple[str, str]]:
        """The ids of all checkpoints with their agents', oldest first."""
        from fleetctl.host import checkpoints

        return [(place.id, place.agent_id) for place in checkpoints.places(self.paths)]

    def find_checkpoint(self, checkpoint_id: str) -> "CheckpointDetail":
        """One checkpoint, every byte of it checked. Raises UnknownCheckpoint, CheckpointDamaged."""
        from fleetctl.host import checkpoints

        checkpoint = checkpoints.verify(self.paths, checkpoints.find(self.paths, checkpoint_id))
        return cast("CheckpointDetail", checkpoints.detailed(self.paths, checkpoint))

    def export_checkpoint(self, checkpoint_id: str, path: str) -> int:
        """Write it as a gzipped tar archive; its size. Raises FleetctlError where the file is there already or cannot be written."""
        from fleetctl.host import checkpoints

        return checkpoints.export(self.paths, checkpoints.find(self.paths, checkpoint_id), path)

    def remove_checkpoints(self, checkpoint_ids: "Sequence[str]", *, dry_run: bool) -> None:
        """All of them; none where one is unknown. Raises UnknownCheckpoint."""
        from fleetctl.host import checkpoints

        for place in [checkpoints.find(self.paths, checkpoint_id) for checkpoint_id in checkpoint_ids]:
            if not dry_run:
                checkpoints.remove(self.paths, place)

    def known_names(self) -> tuple[list[str], list[str]]:
        """Names of fleets and ids of agents, for completion: from the folders alone, so that it is quick and never fails."""
        fleets = [entry.removesuffix(".json") for entry in _names(self.paths.fleets) if entry.endswith(".json")]
        running = [entry.removesuffix(".lock") for entry in _names(self.paths.locks) if entry.endswith(".lock")]
        return fleets, running


def local(engine: object) -> LocalEngine:
    """The engine that raised DaemonUnreachable: only this one has a daemon, and records that tell without it."""
    assert isinstance(engine, LocalEngine)
    return engine


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _environment(ready_fd: int) -> dict[str, str]:
    """The daemon's environment: ours, but not what makes an agent an agent, should one of them have called us.

    The daemon runs in /, so a checkout that was found through the current folder has to be named.
    """
    import fleetctl
    from fleetctl.host.environment import OWN

    environment = {name: value for name, value in os.environ.items() if name not in OWN} | {READY_FD: str(ready_fd)}
    root = os.path.dirname(os.path.dirname(os.path.abspath(fleetctl.__file__)))
    if os.path.basename(root) not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return environment


def _readable(fd: int, timeout: float | None) -> bool:
    """Whether there is something to read, or the end, within so many seconds. Not by `select`, which ends at descriptor 1023."""
    import select

    waiter = select.poll()
    waiter.register(fd, select.POLLIN)
    return bool(waiter.poll(None if timeout is None else timeout * 1000))


def _first_line(fd: int) -> str | None:
    """The first line that arrives, empty at the end of the file, None where nothing came in time."""
    from time import monotonic

    deadline, data = monotonic() + START_SECONDS, b""
    while b"\n" not in data:
        left = deadline - monotonic()
        if left <= 0 or not _readable(fd, left):
            return None
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        data += chunk
    return data.partition(b"\n")[0].decode(errors="replace")


def _tail(path: str, start: int, lines: int = 10) -> str:
    """The last lines written behind `start`."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _dated(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the database as the daemon would send it: with its time in words."""
    return {**row, "at": _rfc3339(row.get("at") or 0.0)}


def _rfc3339(at: float) -> str:
    from time import gmtime, strftime

    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(at)) + f".{int(at * 1000) % 1000:03d}Z"


def _offline_fleet(name: str, wish: dict[str, Any] | None, agents: "list[AgentStatus]") -> "FleetStatus":
    spec = wish["spec"] if wish else {}
    return {
        "name": name,
        "desired_replicas": 0 if wish is None or wish["down"] else int(spec.get("replicas") or 0),
        "ready_replicas": sum(1 for agent in agents if agent["ready"]),
        "autoscaling": _offline_autoscaling(wish["spec"] if wish else {}),
        "warm_pool": _offline_pool(spec.get("warm_pool") or {}, agents),
        "command": list(spec.get("command") or []),
        "down": wish is None or wish["down"],
        "notes": [] if wish else ["what it is to be is not recorded"],
        "agents": agents,
    }


def _offline_pool(spec: dict[str, Any], agents: "list[AgentStatus]") -> "WarmPool":
    enabled = bool(spec.get("enabled"))
    return {
        "enabled": enabled,
        "current_size": sum(1 for agent in agents if agent["pooled"] and agent["state"] == "suspended"),
        "target_size": int(spec.get("size") or 0) if enabled else 0,
        "hits": None,
        "misses": None,
        "hit_rate_percent": None,
    }


def _offline_agent(agent: "Agent") -> "AgentStatus":
    """The record, corrected by what the process tells: a process that ended is not running, whatever was recorded."""
    from time import time

    from fleetctl.host.pidfd import identify
    from fleetctl.models import AgentState, Identity

    state, note, verdict = agent.state, agent.note, identify(agent.process) if agent.process else Identity.GONE
    if verdict is Identity.UNVERIFIABLE:
        note = "its process cannot be verified and is left alone"
    elif verdict is Identity.GONE and agent.process:
        state, note = AgentState.TERMINATED, "its process ended while no daemon ran"
    alive = agent.process is not None and verdict is not Identity.GONE
    return {
        "id": agent.id,
        "slot": agent.slot,
        "pid": agent.process.pid if agent.process and alive else None,
        "state": str(state),
        "ready": agent.ready and alive,
        "cpu_percent": None,
        "memory_bytes": None,
        "uptime_seconds": max(0.0, time() - agent.started_at) if alive and agent.started_at else None,
        "restarts": agent.restarts,
        "last_exit": _exit_info(agent.last_exit) if agent.last_exit else None,
        "from_warm_pool": agent.from_warm_pool,
        "next_try_seconds": None,
        "replacing": False,
        "pooled": agent.pooled,
        "protected": agent.protected,
        "unsaved": None,
        "note": note,
        "status_text": "",
        "active": None,
        "slots": None,
        "pending": None,
        "dropped_messages": 0,
    }


def _offline_autoscaling(spec: "Mapping[str, Any]") -> "Autoscaling":
    """As wished; while no daemon runs nothing is decided. A wish from before there was an autoscaler says nothing of it."""
    wanted = spec.get("autoscaling") or {}
    enabled = bool(wanted.get("enabled"))
    return {
        "enabled": enabled,
        "mode": str(wanted.get("mode")) if enabled else None,
        "min_replicas": int(spec.get("min_replicas", 0)),
        "max_replicas": int(spec.get("max_replicas", 0)),
        "scale_up_count": 0,
        "scale_down_count": 0,
        "next_decision_seconds": None,
        "reason": "no daemon runs" if enabled else None,
    }


def _exit_info(found: "Exit") -> "ExitInfo":
    return {"code": found.code, "signal": found.signal, "at": _rfc3339(found.at) if found.at else None, "text": str(found)}
