"""What others do to a state directory, and commands that meet: nothing is lost, doubled, adopted by mistake or signalled."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fleetctl.client import Client
from fleetctl.host import procfs
from tests.real.harness import Place, eventually, spec

SLEEPS = ("sleep", "600")
# Writes NULs over the whole environment, as servers do that show a title there, and goes on.
FORGETS_ITS_ENVIRONMENT = """
import ctypes, os, sys, time
fields = open("/proc/self/stat").read().rpartition(") ")[2].split()
start, end = int(fields[47]), int(fields[48])
ctypes.memset(start, 0, end - start)
print("READY", flush=True)
time.sleep(600)
"""


def started(place: Place, replicas: int = 2) -> dict[str, int]:
    place.start()
    place.client.apply("web", spec("web", SLEEPS, replicas))
    eventually(lambda: place.settled("web", replicas), "the fleet is ready")
    return place.leaders()


def test_callers_that_bring_up_the_same_new_fleet_get_one(place: Place) -> None:
    place.start()
    answers = []

    def up() -> None:
        with Client(place.root, timeout=20.0) as client:
            answers.append(client.apply("web", spec("web", SLEEPS, 3)))

    callers = [threading.Thread(target=up) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    eventually(lambda: place.settled("web", 3), "the fleet is ready")
    assert len(place.processes()) == 3
    assert [answer["created"] for answer in answers].count(True) == 1


def test_no_step_of_many_at_the_same_time_is_lost(place: Place) -> None:
    started(place, 1)

    def one_more() -> None:
        with Client(place.root, timeout=20.0) as client:
            client.scale("web", delta=1)

    callers = [threading.Thread(target=one_more) for _ in range(10)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    eventually(lambda: place.settled("web", 11), "all eleven are ready")


def test_a_copy_of_a_wish_makes_no_second_fleet(place: Place) -> None:
    before = started(place)
    place.kill()
    shutil.copy(f"{place.root}/fleets/web.json", f"{place.root}/fleets/web-backup.json")
    place.start()
    eventually(lambda: place.settled("web", 2), "the fleet is back")
    assert place.leaders() == before
    assert "web-backup.json is not used" in str(place.client.daemon()["note"])
    place.client.down("web")
    eventually(lambda: not place.client.status()["fleets"] and not place.processes(), "all of it ends")


def test_up_takes_back_agents_of_which_nothing_was_recorded(place: Place) -> None:
    before = started(place, 3)
    place.kill()
    for path in [Path(f"{place.root}/fleets/web.json"), *Path(place.root).glob("fleetctl.db*")]:
        path.unlink()
    place.start()
    assert not place.client.status()["fleets"]
    place.client.apply("web", spec("web", SLEEPS, 3))
    eventually(lambda: place.settled("web", 3), "the fleet is back")
    assert place.leaders() == before


@pytest.mark.parametrize("lost", ["the database", "nothing"])
def test_an_agent_that_wrote_over_its_environment_is_found_by_its_lock(place: Place, lost: str) -> None:
    place.start()
    place.client.apply("web", spec("web", [sys.executable, "-c", FORGETS_ITS_ENVIRONMENT], 1))
    eventually(lambda: place.agents()[0]["ready"] and b"READY" in place.log("web", place.agents()[0]["id"]), "it is ready")
    before = place.shown()
    assert not place.processes()  # nothing in its environment tells of us
    place.kill()
    if lost == "the database":
        for path in Path(place.root).glob("fleetctl.db*"):
            path.unlink()
    place.start()
    eventually(lambda: place.agents()[0]["ready"], "it is taken back")
    assert place.shown() == before
    place.client.down("web")
    eventually(lambda: not place.client.status()["fleets"], "it ends")
    found = procfs.stat(next(iter(before.values())))
    assert found is None or not found.alive  # init may reap it late


@pytest.mark.parametrize(
    ("user", "changes"),
    [
        pytest.param("nobody", {}, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")),
        ("ourselves", {"FLEETCTL_AGENT_ID": "../../../victim"}),
        ("ourselves", {"FLEETCTL_SLOT": "²"}),
        ("ourselves", {"FLEETCTL_FLEET": "other"}),
    ],
)
def test_a_stranger_dressed_as_an_agent_is_left_alone(place: Place, user: str, changes: dict[str, str]) -> None:
    before = started(place)
    place.kill()
    dress = {
        "FLEETCTL_STATE_DIR": place.root,
        "FLEETCTL_TOKEN": "a",
        "FLEETCTL_FLEET": "web",
        "FLEETCTL_AGENT_ID": "web-zzzzz",
        "FLEETCTL_SLOT": "7",
    }
    # Not by `place`, which would end it with the agents.
    stranger = subprocess.Popen(["sleep", "600"], env=dress | changes, start_new_session=True, user=65534 if user == "nobody" else None)
    try:
        place.start()
        eventually(lambda: place.shown() == before, "our own agents are back, and only they")
        place.client.down("web")
        eventually(lambda: not place.client.status()["fleets"], "the fleet ends")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_pipe_among_the_wishes_holds_up_nothing(place: Place) -> None:
    before = started(place)
    place.kill()
    os.mkfifo(f"{place.root}/fleets/pipe.json")
    place.start()
    eventually(lambda: place.settled("web", 2), "the fleet is back")
    assert place.leaders() == before
    assert "pipe.json" in place.daemon_log()


def test_a_name_with_absurd_numbers_among_the_logs_stops_no_round(place: Place) -> None:
    before = started(place)
    agent_id = next(iter(before))
    Path(f"{place.root}/logs/web/{agent_id}.log.99999999999999999999.0-99999999999999999999").touch()
    Path(f"{place.root}/logs/README").touch()
    place.stop()
    place.start()
    eventually(lambda: place.agents()[0]["cpu_percent"] is not None, "rounds go on")
    assert "a round broke" not in place.daemon_log()
    assert place.run("logs", "web").returncode == 0


def test_a_daemon_whose_directory_was_removed_ends_and_leaves_its_agents_to_the_next(place: Place) -> None:
    before = started(place)
    shutil.rmtree(place.root)
    os.mkdir(place.root, 0o700)
    assert place.daemon is not None
    place.daemon.wait(30)
    place.client.close()
    place.start()
    place.client.apply("web", spec("web", SLEEPS, 2))
    eventually(lambda: place.settled("web", 2), "the next daemon has them")
    assert place.leaders() == before


def test_up_while_a_fleet_goes_down_is_kept(place: Place) -> None:
    started(place, 1)
    for _ in range(5):
        place.client.down("web", now=True)
        place.client.apply("web", spec("web", SLEEPS, 1))
        eventually(lambda: place.settled("web", 1), "the fleet is there after all")
    assert len(place.processes()) == 1


def test_stray_signals_end_no_daemon(place: Place) -> None:
    before = started(place)
    assert place.daemon is not None
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        place.daemon.send_signal(number)
    eventually(lambda: place.daemon_log().count("ignored") == 3, "the daemon heard them")
    assert place.shown() == before


def test_time_given_to_the_slow_is_not_taken_from_the_quick(place: Place) -> None:
    """A stopped daemon answers nobody, and goes on where it was."""
    before = started(place)
    assert place.daemon is not None
    place.daemon.send_signal(signal.SIGSTOP)
    victim = next(iter(before.values()))
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    place.daemon.send_signal(signal.SIGCONT)
    eventually(lambda: place.settled("web", 2) and victim not in place.leaders().values(), "the agent that ended meanwhile is replaced")
    assert time.monotonic() - began < 5
