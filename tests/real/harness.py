"""A real state directory with real daemons for tests: start one, kill it, and look at the machine itself for what is true.

What is true is read from /proc here, by other code than fleetctl's own.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetctl.client import Client
from fleetctl.errors import FleetctlError
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]  # Any: JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Proc:
    """A live process that carries a token of the state directory."""

    pid: int
    sid: int
    started: int
    agent_id: str
    fleet: str
    token: str


def eventually(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Wait until the condition holds; what it raises counts as no, and is told when the time is up."""
    deadline, trouble = time.monotonic() + seconds, ""
    while True:
        try:
            if condition():
                return
        except (AssertionError, FleetctlError, OSError, KeyError, IndexError) as error:
            trouble = f": {error!r}"
        if time.monotonic() > deadline:
            raise AssertionError(f"not after {seconds:g} s: {what}{trouble}")
        time.sleep(0.01)


def first_line(fd: int, seconds: float) -> str:
    """The line that a daemon reports with, empty where it ended without one. Not by select, which takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(seconds * 1000), f"no word from the daemon in {seconds:g} s"
    with open(fd, encoding="utf-8", closefd=False) as pipe:
        return pipe.readline()


class Place:
    """One state directory. `close` ends the daemon and every process that carries a token of this directory."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.root = os.path.realpath(folder)
        self.environment = environment or {}
        self.client = Client(self.root, timeout=20.0)
        self.daemon: subprocess.Popen[bytes] | forks.Forked | None = None

    # -- the daemon

    def start(self, *, wait: bool = True, before: Sequence[str] = (), times: Mapping[str, float] | None = None) -> float:
        """Start a daemon in the background, as the command line does; the time when it was started.

        `before`: words before the command; `times`: see `forks.start`.
        """
        reader, writer = os.pipe()
        began = time.monotonic()
        words = ["--state-dir", self.root, "daemon", "--background"]
        with open(f"{self.root}/daemon.log", "ab") as log, open(os.devnull, "rb") as nothing:
            if before:
                command = [*before, sys.executable, "-m", "fleetctl", *words]
                environ = self.environ() | {"FLEETCTL_READY_FD": str(writer)}
                self.daemon = subprocess.Popen(
                    command, cwd="/", env=environ, stdin=nothing, stdout=log, stderr=log, start_new_session=True, pass_fds=(writer,)
                )
            else:
                streams = (nothing.fileno(), log.fileno(), log.fileno())
                self.daemon = forks.start(words, cwd="/", environ=self.environ(), streams=streams, ready=writer, session=True, times=times)
        os.close(writer)
        with open(reader, "rb", buffering=0) as pipe:
            if wait:
                assert first_line(pipe.fileno(), 30) == "ready\n", self.daemon_log()
        return began

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        # The connection that the client keeps is dead now; what it says about that is no news.
        self.client.close()

    def stop(self, mode: str = "keep") -> None:
        assert self.daemon is not None
        self.client.shutdown(mode)
        self.daemon.wait(30)
        self.client.close()

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
        self.client.close()
        for pid in self._daemons():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while found := self.processes():
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)

    def _daemons(self) -> list[int]:
        """Daemons of this directory that commands started."""
        found = []
        for name in os.listdir("/proc"):
            with suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0") if name.isdigit() else []
                if b"--background" in words and os.fsencode(self.root) in words:
                    found.append(int(name))
        return found

    def daemon_log(self) -> str:
        return Path(f"{self.root}/daemon.log").read_text(errors="replace")

    # -- the command line

    def environ(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLEETCTL_")}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**inherited, "PYTHONPATH": path, **self.environment}

    def run(self, *words: str, cwd: Path | None = None, check: bool = True, timeout: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """A command of fleetctl on this state directory."""
        done = forks.run(["--state-dir", self.root, *words], cwd=str(cwd or self.root), environ=self.environ(), timeout=timeout)
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def json(self, *words: str) -> Json:
        found: Json = json.loads(self.run(*words, "--json").stdout)
        return found

    # -- what is so

    def processes(self) -> list[Proc]:
        """Every live process on the machine that carries a token of this state directory."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and (process := _read(int(name), self.root)):
                found.append(process)
        return found

    def leaders(self, fleet: str | None = None) -> dict[str, int]:
        """agent id -> pid of its leader. Fails where an agent has two: that is what "doubled" means.

        Each start of an agent has a token of its own; the first process with it leads. Later ones may lead sessions of their own.
        """
        first: dict[str, Proc] = {}
        for process in sorted(self.processes(), key=lambda process: (process.started, process.pid)):
            if process.pid == process.sid and fleet in (None, process.fleet):
                known = first.setdefault(process.agent_id, process)
                assert known.token == process.token, f"{process.agent_id} is doubled: {known.pid} and {process.pid}"
        return {agent_id: process.pid for agent_id, process in first.items()}

    def agents(self, fleet: str | None = None) -> list[Json]:
        return [dict(agent) for one in self.client.status(fleet)["fleets"] for agent in one["agents"]]

    def shown(self, fleet: str | None = None) -> dict[str, int]:
        """agent id -> pid, as status shows them."""
        return {agent["id"]: agent["pid"] for agent in self.agents(fleet) if agent["pid"] is not None}

    def settled(self, fleet: str, replicas: int) -> bool:
        """Whether exactly so many agents run, all of them ready, and the machine says the same."""
        agents = self.agents(fleet)
        return len(agents) == replicas and all(agent["ready"] for agent in agents) and self.shown(fleet) == self.leaders(fleet)

    def log(self, fleet: str, agent_id: str) -> bytes:
        return Path(f"{self.root}/logs/{fleet}/{agent_id}.log").read_bytes()


def spec(name: str, command: Sequence[str], replicas: int, **settings: object) -> Json:
    """A spec that becomes ready and stops quickly, to be changed by `settings`."""
    return {
        "name": name,
        "command": list(command),
        "cwd": "/",
        "replicas": replicas,
        "readiness": {"settle_seconds": 0.02},
        "graceful_drain": {"timeout_seconds": 5.0},
        **settings,
    }


def _read(pid: int, root: str) -> Proc | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environ = dict(pair.split(b"=", 1) for pair in file.read().split(b"\0") if b"=" in pair)
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return None
    if environ.get(b"FLEETCTL_STATE_DIR") != os.fsencode(root) or b"FLEETCTL_TOKEN" not in environ or fields[0] in b"ZX":
        return None
    return Proc(
        pid=pid,
        sid=int(fields[3]),
        started=int(fields[19]),
        agent_id=environ[b"FLEETCTL_AGENT_ID"].decode(),
        fleet=environ[b"FLEETCTL_FLEET"].decode(),
        token=environ[b"FLEETCTL_TOKEN"].decode(),
    )
