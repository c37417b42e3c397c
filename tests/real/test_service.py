"""The daemon as a service: under systemd's words, and as the first process of a container."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleetctl.client import Client
from tests.real.harness import Place, eventually, spec

# Forks twice: the child ends at once, and the grandchild, an orphan then, soon after.
ORPHANS = "while :; do (sleep 0.05 &); sleep 0.02; done"


class Manager:
    """The socket on which a service manager listens, and what it heard."""

    def __init__(self, path: Path) -> None:
        self.path, self.heard = str(path), list[str]()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)

    def has_heard(self, *words: str) -> bool:
        try:
            while True:
                self.heard += self.socket.recv(4096).decode().splitlines()
        except BlockingIOError:
            return set(words) <= set(self.heard)


@contextmanager
def service(place: Place, *words: str, manager: Manager, watchdog: str = "400000") -> Iterator["subprocess.Popen[bytes]"]:
    """A daemon in the foreground, as systemd starts one."""
    environment = place.environ() | {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": watchdog}
    command = [sys.executable, "-m", "fleetctl", "--state-dir", place.root, "daemon", *words]
    with open(f"{place.root}/daemon.log", "ab") as log:
        daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()
        place.client.close()


def test_agents_survive_a_restart_of_the_unit_and_know_nothing_of_it(place: Place, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    with service(place, "--keep", manager=manager) as daemon:
        eventually(lambda: manager.has_heard("READY=1"), "it says that it is ready")
        place.client.apply("web", spec("web", ["sleep", "600"], 2))
        eventually(lambda: place.settled("web", 2), "the agents are there")
        eventually(lambda: manager.has_heard("WATCHDOG=1", "STATUS=1 fleet, 2 of 2 agents ready"), "it says how it is")
        before = place.leaders("web")
        for pid in before.values():
            own = dict(pair.split(b"=", 1) for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in pair)
            assert own.get(b"NOTIFY_SOCKET", b"").decode() != manager.path
            assert b"WATCHDOG_USEC" not in own
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        assert manager.has_heard("STOPPING=1")
    assert place.leaders("web") == before
    manager.heard.clear()
    with service(place, "--keep", manager=manager):
        eventually(lambda: manager.has_heard("READY=1"), "the next one is ready")
        eventually(lambda: place.settled("web", 2), "and has them")
        assert place.leaders("web") == before


def test_without_keep_the_agents_stop_with_the_unit_and_get_the_time_they_need(place: Place, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    slow = "trap 'sleep 0.6; exit 0' TERM; while :; do sleep 0.05; done"
    with service(place, manager=manager, watchdog="300000") as daemon:
        eventually(lambda: manager.has_heard("READY=1"), "it is ready")
        place.client.apply("web", spec("web", ["sh", "-c", slow], 1))
        eventually(lambda: place.settled("web", 1), "the agent is there")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        manager.has_heard()
        assert any(word.startswith("EXTEND_TIMEOUT_USEC=") for word in manager.heard)
    assert not place.processes()


def test_a_background_daemon_does_not_speak_for_whoever_started_it(place: Place, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    place.environment = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"}
    place.start()
    place.client.apply("web", spec("web", ["sleep", "600"], 1))
    eventually(lambda: place.settled("web", 1), "the agent is there")
    place.stop("keep")
    assert not manager.has_heard("READY=1")
    assert manager.heard == []


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_as_the_first_process_of_a_container_it_reaps_and_hears_signals(place: Place) -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make a PID namespace")
    command = [*unshare, sys.executable, "-m", "fleetctl", "--state-dir", place.root, "daemon"]
    with open(f"{place.root}/daemon.log", "ab") as log:
        outer = subprocess.Popen(command, env=place.environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        client = Client(place.root, timeout=20.0)
        eventually(lambda: client.daemon()["pid"] == 1, "it is process 1 and answers")
        client.apply("web", spec("web", ["sh", "-c", ORPHANS], 2))
        eventually(lambda: client.status()["fleets"][0]["ready_replicas"] == 2, "the agents are there")
        (daemon,) = children(outer.pid)
        seen: set[int] = set()

        def orphans_came() -> bool:
            """Orphans became its children; those of them that ended and are not reaped would pile up."""
            seen.update(children(daemon))
            return len(seen) > 12

        eventually(orphans_came, "orphans come to the daemon")
        eventually(lambda: not [pid for pid in children(daemon) if state_of(pid) == "Z"], "none of them stays a zombie")
        os.kill(daemon, signal.SIGTERM)
        assert outer.wait(20) == 0
        client.close()
    finally:
        outer.kill()
        outer.wait()
