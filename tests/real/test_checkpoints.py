"""Checkpoints with real agents: no work lost or done twice over drains, every listed one whole over kills, and no stop without room.

24 drains and 8 kills with a fixed seed; FLEETCTL_DRAINS=1000, FLEETCTL_CHECKPOINT_KILLS=200 and FLEETCTL_SEED=N on demand.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleetctl.errors import FleetctlError
from fleetctl.host import checkpoints
from fleetctl.host.paths import Paths
from tests.real.harness import Json, Place, eventually, spec

DRAINS = int(os.environ.get("FLEETCTL_DRAINS", "24"))
KILLS = int(os.environ.get("FLEETCTL_CHECKPOINT_KILLS", "8"))
SEED = int(os.environ.get("FLEETCTL_SEED", "1502"))
CHAINS = 4
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")

# Works through the items of a chain: each takes a moment, and is done once it stands in the ledger. It finishes the one in its hands
# before it stops, and remembers the next one only then: whoever goes on from an earlier memory does items twice.
WORKER = """
import os, random, signal, time
state, ledger = os.environ["STATE_DIRECTORY"] + "/memory", os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
try:
    chain, item = open(state).read().split()
except FileNotFoundError:
    chain, item = os.environ["FLEETCTL_AGENT_ID"], "0"
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))

def remember(number):
    with open(state + ".new", "w") as file:
        file.write(f"{chain} {number}")
    os.replace(state + ".new", state)

number = int(item)
remember(number)
while not stop:
    for _ in range(3):
        end = time.monotonic() + random.uniform(0, 0.004)
        while time.monotonic() < end:
            time.sleep(0.001)
        os.write(ledger, f"{chain} {number}\\n".encode())
        number += 1
    if random.random() < 0.3:
        remember(number)
remember(number)
"""
# Keeps many files and writes one after the other anew, so that a copy always meets a change.
BUSY = """
import os, signal, sys
folder, stop, number = os.environ["STATE_DIRECTORY"], [], 0
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while not stop:
    number += 1
    path = f"{folder}/part-{number % 20}"
    with open(path + ".new", "w") as file:
        file.write(str(number) * 3000)
    os.replace(path + ".new", path)
    with open(f"{folder}/log", "a" if number % 500 else "w") as file:
        file.write(f"{number}\\n")
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


def kept(place: Place, fleet: str = "web") -> list[str]:
    """The ids of the checkpoints on disk, each of them checked."""
    paths = Paths(place.root)
    found = checkpoints.places(paths, fleet)
    for one in found:
        checkpoints.verify(paths, one)
    return [one.id for one in found]


def state_of(place: Place, agent_id: str) -> Path:
    return Path(place.root, "agents", agent_id)


def agent(place: Place, agent_id: str) -> Json:
    return next(one for one in place.agents() if one["id"] == agent_id)


def gone(place: Place, agent_id: str) -> bool:
    return agent_id not in {one["id"] for one in place.agents()}


def still_draining(place: Place, agent_id: str) -> bool:
    return any(one["id"] == agent_id and one["state"] == "draining" for one in place.agents())


# -- no work lost, none done twice


def test_over_drains_and_restores_no_item_of_work_is_lost_or_done_twice(place: Place) -> None:
    ledger = Path(place.root, "ledger")
    place.start()
    settings = {"environment": {"LEDGER": str(ledger)}, "checkpoints": {"keep": 2}, "max_replicas": 50}
    place.client.apply("web", spec("web", python(WORKER), CHAINS, **settings))
    eventually(lambda: place.settled("web", CHAINS), "the workers work")
    heads = list(place.leaders("web"))
    dice = random.Random(SEED)

    def pass_on(agent_id: str) -> str:
        """Drain this one in the middle of its work; the id of the one that goes on from its checkpoint."""
        time.sleep(dice.uniform(0, 0.03))
        place.client.drain(agent_id)
        eventually(lambda: gone(place, agent_id), f"{agent_id} has left", 30)
        (taken,) = place.client.checkpoints("web", agent_id)["checkpoints"]
        assert not state_of(place, agent_id).exists()
        new_id = place.client.restore_checkpoint(taken["id"], timeout_seconds=30)["agent_id"]
        assert new_id is not None
        place.client.remove_checkpoint(taken["id"])
        return new_id

    with ThreadPoolExecutor(CHAINS) as pool:
        for _ in range(DRAINS // CHAINS):
            heads = list(pool.map(pass_on, heads))
    place.client.scale("web", 0)
    eventually(lambda: not place.agents(), "the last ones have left")
    done: dict[str, list[int]] = {}
    for line in ledger.read_text().splitlines():
        chain, item = line.split()
        done.setdefault(chain, []).append(int(item))
    assert len(done) == CHAINS
    for chain, items in done.items():
        assert items == list(range(len(items))), f"{chain}: lost {set(range(max(items))) - set(items)}, twice {_twice(items)}"
        assert len(items) > 3 * DRAINS // CHAINS, "hardly anything was done"
    assert {Path(one["path"]).parent.name for one in place.client.checkpoints("web")["checkpoints"]} == set(heads)


def _twice(items: Sequence[int]) -> set[int]:
    return {item for item in items if items.count(item) > 1}


# -- whole, whenever the daemon dies


def test_every_checkpoint_that_is_listed_is_whole_whenever_the_daemon_is_killed(place: Place) -> None:
    """Each round: somebody takes a checkpoint or drains an agent, and the daemon dies in the middle of it."""
    dice = random.Random(SEED)
    place.start()
    place.client.apply("web", spec("web", python(BUSY), 2, max_replicas=50, checkpoints={"keep": 5}))
    taken = 0
    for number in range(KILLS):
        eventually(lambda: place.settled("web", 2), "the agents run", 30)
        victim = dice.choice(list(place.leaders("web")))
        drains = number % 2 == 1

        def ask(victim: str = victim, drains: bool = drains) -> None:
            try:
                if drains:
                    place.client.drain(victim)
                place.client.create_checkpoint(victim)
            except FleetctlError:
                pass  # killed before it answered, or gone before it was asked

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(dice.uniform(0, 0.08))
        place.kill()
        asking.join()
        before = kept(place)
        place.start()
        after = kept(place)
        assert set(before) <= set(after) | set(before[:-5]), f"kill {number} of {KILLS}, FLEETCTL_SEED={SEED}: one was lost"
        if drains:
            eventually(lambda: not still_draining(place, victim), "the drain is over", 30)  # noqa: B023 - called at once
            place.client.scale("web", 2)
        taken = max(taken, len(after))
    eventually(lambda: place.settled("web", 2), "the agents run", 30)
    assert taken, "no checkpoint was ever taken"
    leftovers = [path for path in Path(place.root, "checkpoints").rglob(".*") if path.name.startswith(".20")]
    assert not leftovers
    known = {one["id"] for one in place.agents()}
    assert {path.name.removesuffix(".checkpoint") for path in Path(place.root, "agents").iterdir()} <= known


def test_an_agent_that_crashes_keeps_its_directory_and_a_restored_one_its_own(place: Place) -> None:
    place.start()
    counting = ["sh", "-c", 'echo "$FLEETCTL_LAUNCH" >> "$STATE_DIRECTORY/starts"; exec sleep 600']
    place.client.apply("web", spec("web", counting, 1))
    eventually(lambda: place.settled("web", 1), "it runs")
    ((first, pid),) = place.leaders().items()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: (state_of(place, first) / "starts").read_text() == "cold\n" * 2 and place.settled("web", 1), "it runs again")
    checkpoint = place.run("drain", first).stdout.strip()
    new = place.run("checkpoint", "restore", checkpoint).stdout.strip()
    starts = state_of(place, new) / "starts"
    assert starts.read_text() == "cold\ncold\nrestore\n"
    os.kill(place.leaders()[new], signal.SIGKILL)
    eventually(lambda: starts.read_text() == "cold\ncold\nrestore\ncold\n", "it goes on with its own")


# -- asked for, by a signal, a command or a token

# Speaks the contract with nothing but a socket, as a program in any language can.
ASKED = """
import os, signal, socket, sys, time
def say(*words):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto("\\n".join(words).encode(), os.environ["NOTIFY_SOCKET"])
def save(*_):
    path = os.environ["FLEETCTL_CHECKPOINT_DIR"] + "/memory"
    with open(path, "w") as file:
        file.write("on request")
    say(f"X_FLEETCTL_CHECKPOINT={path}")
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
say("READY=1", "X_FLEETCTL_RESUME=" + "-".join(["secret", "token", "of", "it"]))
while True:
    time.sleep(60)
"""


def test_an_agent_is_asked_for_its_checkpoint_and_its_token_is_nowhere_shown(place: Place) -> None:
    place.start()
    resume = ["sh", "-c", 'echo "resumed $0 with $(cat "$1/written/memory")"; sleep 600; :', "{token}", "{checkpoint}"]
    settings = {
        "readiness": {"notify": True},
        "graceful_drain": {"timeout_seconds": 5.0, "checkpoint_signal": "USR1", "checkpoint_timeout_seconds": 30.0},
        "checkpoints": {"restore_command": resume},
    }
    place.client.apply("web", spec("web", python(ASKED), 1, **settings))
    eventually(lambda: place.settled("web", 1), "it is ready")
    (first,) = place.leaders()
    eventually(lambda: place.client.create_checkpoint(first)["checkpoint"], "its token has been heard")
    checkpoint = place.run("drain", first).stdout.strip()
    shown = place.json("checkpoint", "show", checkpoint)
    assert (shown["kind"], shown["has_token"], [one["path"] for one in shown["contents"]]) == ("files", True, ["written/memory"])
    manifest = Path(shown["path"], "checkpoint.json")
    assert json.loads(manifest.read_text())["resume_token"] == "secret-token-of-it"
    assert manifest.stat().st_mode & 0o777 == 0o600
    place.client.apply("web", spec("web", python(ASKED), 0, **{**settings, "readiness": {"settle_seconds": 0.1}}))
    new = place.run("checkpoint", "restore", checkpoint).stdout.strip()
    eventually(lambda: place.log("web", new) == b"resumed secret-token-of-it with on request\n", "it is resumed with its token")
    told = json.dumps([place.client.status(), place.client.agent(new), place.client.events(limit=1000), place.client.checkpoints()])
    assert "secret-token" not in told + place.daemon_log()
    assert "***" in place.client.agent(new)["processes"][0]["command"]


def test_a_command_writes_the_checkpoint_of_a_program_that_cannot(place: Place) -> None:
    place.start()
    dump = ["sh", "-c", 'cat "$STATE_DIRECTORY/live" > "$FLEETCTL_CHECKPOINT_DIR/dump"']
    live = ["sh", "-c", 'echo data > "$STATE_DIRECTORY/live"; exec sleep 600']
    place.client.apply("web", spec("web", live, 1, checkpoints={"command": dump}))
    eventually(lambda: place.settled("web", 1), "it runs")
    (first,) = place.leaders()
    shown = place.json("checkpoint", "show", place.run("drain", first).stdout.strip())
    assert (shown["kind"], [one["path"] for one in shown["contents"]]) == ("command", ["state/live", "written/dump"])
    assert not state_of(place, first).exists()


def test_a_command_that_fails_keeps_the_agent_and_is_told(place: Place) -> None:
    place.start()
    place.client.apply("web", spec("web", ["sleep", "600"], 1, checkpoints={"command": ["sh", "-c", "echo no such luck; exit 3"]}))
    eventually(lambda: place.settled("web", 1), "it runs")
    ((first, pid),) = place.leaders().items()
    waited = place.run("drain", first, "--timeout", "1", check=False)
    assert waited.returncode == 124
    assert "checkpoints.command: exit 3: no such luck" in waited.stderr
    assert place.leaders() == {first: pid}
    assert place.run("drain", first, "--now").returncode == 0
    assert not place.leaders()


# -- damage


def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_started(place: Place) -> None:
    place.start()
    place.client.apply("web", spec("web", ["sh", "-c", 'echo 7 > "$STATE_DIRECTORY/counter"; exec sleep 600'], 2))
    eventually(lambda: place.settled("web", 2), "they run")
    checkpoint = place.run("drain", next(iter(place.leaders()))).stdout.strip()
    before = place.leaders()
    counter = Path(place.json("checkpoint", "show", checkpoint)["path"], "state/counter")
    counter.write_text("8\n")
    refused = place.run("checkpoint", "restore", checkpoint, check=False)
    assert refused.returncode == 1
    assert f"checkpoint {checkpoint} is damaged: state/counter was changed" in refused.stderr
    assert place.client.status("web")["fleets"][0]["desired_replicas"] == 1
    assert place.leaders() == before
    assert place.run("checkpoint", "restore", "20260101t000000-aaaaa", check=False).returncode == 5


# -- no room

HOARDER = ["sh", "-c", 'head -c 1500000 /dev/zero > "$STATE_DIRECTORY/data"; trap "exit 0" TERM; while :; do sleep 0.05; done']


def crowded(place: Place) -> tuple[str, int, Path]:
    """An agent on a disk with room for the daemon's own writing, but not for its checkpoint: its id, its pid, and what is in the way."""
    place.start(times={"fleetctl.keeping.RETRY_SECONDS": 0.5})
    place.client.apply("web", spec("web", HOARDER, 1))
    eventually(lambda: place.settled("web", 1), "it runs")
    ((agent_id, pid),) = place.leaders().items()
    eventually(lambda: (state_of(place, agent_id) / "data").stat().st_size == 1_500_000, "it keeps what it keeps")
    ballast = Path(place.root, "ballast")
    free = os.statvfs(place.root).f_bavail * os.statvfs(place.root).f_frsize
    ballast.write_bytes(bytes(max(0, free - 1_000_000)))
    return agent_id, pid, ballast


@as_root
def test_without_room_for_its_checkpoint_an_agent_is_not_stopped_until_there_is(small_disk: Place) -> None:
    place = small_disk
    agent_id, pid, ballast = crowded(place)
    waited = place.run("drain", agent_id, "--timeout", "1", check=False)
    assert waited.returncode == 124
    assert "No space left on device" in waited.stderr
    assert f"`fleetctl drain {agent_id} --now`" in waited.stderr
    found = agent(place, agent_id)
    assert (found["state"], found["pid"]) == ("draining", pid)
    assert "No space left on device" in found["unsaved"]
    assert any("no checkpoint can be taken" in note for note in place.client.status("web")["fleets"][0]["notes"])
    assert kept(place) == []
    ballast.unlink()
    eventually(lambda: gone(place, agent_id), "it has left, once there is room", 20)
    (checkpoint,) = kept(place)
    assert Path(place.root, "checkpoints/web", agent_id, checkpoint, "state/data").stat().st_size == 1_500_000
    assert not state_of(place, agent_id).exists()


@as_root
def test_whoever_cannot_wait_for_room_stops_without_a_checkpoint(small_disk: Place) -> None:
    place = small_disk
    agent_id, _, _ = crowded(place)
    stuck = place.run("daemon", "stop", "--drain", "--timeout", "1.5", check=False)
    assert stuck.returncode == 124
    assert "No space left on device" in stuck.stderr
    assert "`fleetctl down --now`" in stuck.stderr
    assert agent_id in place.leaders()
    place.client.drain(agent_id, now=True)
    eventually(lambda: not place.leaders(), "it is gone")
    assert place.daemon is not None
    assert place.daemon.wait(10) == 0  # that was all it waited for
    assert (state_of(place, agent_id) / "data").stat().st_size == 1_500_000  # not saved, so not taken away


def test_an_agent_that_was_asked_and_had_nothing_to_say_leaves_nothing_behind(place: Place) -> None:
    place.start()
    settings = {"graceful_drain": {"timeout_seconds": 5.0, "checkpoint_signal": "USR1", "checkpoint_timeout_seconds": 0.1}}
    place.client.apply("web", spec("web", ["sh", "-c", "trap : USR1; while :; do sleep 0.05; done"], 1, **settings))
    eventually(lambda: place.settled("web", 1), "it runs")
    assert place.run("drain", next(iter(place.leaders()))).stdout == ""
    eventually(lambda: not list(Path(place.root, "agents").iterdir()), "its folders are gone")
