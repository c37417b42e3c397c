"""Bad days of the state directory: contested, stale, damaged, lost, from before a reboot, read-only, full, too long, another's."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

import pytest

from fleetctl.daemon import main as daemon_main
from fleetctl.errors import FleetctlError
from tests import forks
from tests.real.harness import Place, eventually, first_line, spec

SLEEP = ["sleep", "1000"]
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user or to mount a file system")


def fleet_of(place: Place, replicas: int = 3, times: Mapping[str, float] | None = None) -> dict[str, int]:
    """A fleet that runs; agent id -> pid."""
    place.start(times=times)
    place.client.apply("web", spec("web", SLEEP, replicas))
    eventually(lambda: place.settled("web", replicas), "the fleet is ready")
    return place.leaders()


def rewrite_records(place: Place, **process: object) -> None:
    """Change what the database says about the agents' processes, while no daemon runs."""
    with closing(sqlite3.connect(f"{place.root}/fleetctl.db")) as db:
        for agent_id, text in db.execute("SELECT id, data FROM agents").fetchall():
            data = json.loads(text)
            data["process"] |= process
            db.execute("UPDATE agents SET data = ? WHERE id = ?", (json.dumps(data), agent_id))
        db.commit()


def test_of_twenty_racers_exactly_one_becomes_the_daemon(place: Place) -> None:
    words = ["--state-dir", place.root, "daemon", "--background"]
    racers, pipes = [], []
    for _ in range(20):
        reader, writer = os.pipe()
        with open(os.devnull, "r+b") as nothing:
            streams = (nothing.fileno(), nothing.fileno(), nothing.fileno())
            racers.append(forks.start(words, cwd="/", environ=place.environ(), streams=streams, ready=writer, session=False))
        os.close(writer)
        pipes.append(reader)
    try:
        answers = [first_line(reader, 60) for reader in pipes]
        assert answers.count("ready\n") == 1
        losers = [json.loads(answer.removeprefix("error ")) for answer in answers if answer != "ready\n"]
        assert {loser["code"] for loser in losers} == {"E2005"}
        winner = racers[answers.index("ready\n")]
        assert place.client.daemon()["pid"] == winner.pid
        assert sorted(racer.wait(30) for racer in racers if racer is not winner) == [1] * 19
    finally:
        for racer, reader in zip(racers, pipes, strict=True):
            racer.kill()
            racer.wait()
            os.close(reader)


def test_a_stale_socket_and_a_stale_lock_block_nothing(place: Place) -> None:
    place.start()
    place.kill()
    assert os.path.exists(f"{place.root}/run/control.sock"), "there is no stale socket to test with"
    Path(f"{place.root}/daemon.lock").write_text(f"{os.getpid()}\n")
    assert place.run("daemon", "status").stdout.startswith("no daemon runs")
    place.start()
    assert place.daemon is not None
    assert place.client.daemon()["pid"] == place.daemon.pid


def test_a_file_in_the_place_of_the_socket_is_named_and_left_alone(place: Place) -> None:
    os.mkdir(f"{place.root}/run")
    file = Path(f"{place.root}/run/control.sock")
    file.write_text("no socket")
    done = place.run("daemon", "start", check=False)
    assert done.returncode == 1
    assert f"{file}: in the way of the control socket" in done.stderr
    assert file.read_text() == "no socket"


@pytest.mark.parametrize("what", ["random bytes", "a cut", "nothing at all", "no file"])
def test_agents_of_a_damaged_database_are_found_again(place: Place, what: str) -> None:
    before = fleet_of(place)
    place.kill()
    database = Path(f"{place.root}/fleetctl.db")
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the file itself holds everything
    if what == "no file":
        database.unlink()
    else:
        database.write_bytes(
            {"random bytes": random.Random(3).randbytes(40_000), "a cut": database.read_bytes()[:-5000], "nothing at all": b""}[what]
        )
    place.start()
    eventually(lambda: place.settled("web", 3), "the fleet is ready again")
    assert place.leaders() == before
    if what in ("random bytes", "a cut"):
        note = place.client.status()["daemon"]["note"]
        assert note
        assert "damaged" in note
        assert "set aside" in note
        assert list(Path(place.root).glob("fleetctl.db.damaged-*"))


def test_what_a_killed_daemon_did_not_tidy_up_is_tidied_up_by_the_next(place: Place) -> None:
    agents = fleet_of(place)
    place.kill()
    left = [Path(place.root, path) for path in ("run/locks/web-aaaaa.lock", "run/claims/web-aaaaa.json", "run/claims/web-aaaaa.json.tmp")]
    empty, kept = Path(place.root, "agents/web-aaaaa"), Path(place.root, "agents/web-bbbbb/work")
    for path in left:
        path.write_text("{}")
    empty.mkdir()
    kept.parent.mkdir()
    kept.touch()
    place.start()
    assert not [path for path in (*left, empty) if path.exists()]
    assert kept.exists()
    assert all(Path(place.root, f"run/locks/{agent_id}.lock").exists() for agent_id in agents)
    assert place.settled("web", 3)


def test_run_and_database_that_somebody_removed_come_back_under_a_live_daemon(place: Place) -> None:
    agents = fleet_of(place, times={"fleetctl.daemon.server._CHECK_SECONDS": 0.2, "fleetctl.host.state._CHECK_SECONDS": 0.2})
    shutil.rmtree(f"{place.root}/run")
    os.unlink(f"{place.root}/fleetctl.db")
    place.client.close()
    eventually(lambda: "removed or replaced" in str(place.client.daemon()["note"]), "a new caller is told what happened", 20)
    place.run("scale", "4")
    eventually(lambda: place.settled("web", 4), "another agent starts")
    assert agents.items() <= place.leaders().items()
    agents = place.leaders()
    place.kill()
    place.start()
    eventually(lambda: place.settled("web", 4), "the next daemon knows them")
    assert place.leaders() == agents


def test_agents_of_a_state_directory_that_lost_everything_are_shown_and_can_be_ended(place: Place) -> None:
    before = fleet_of(place)
    place.kill()
    for lost in ("fleetctl.db", "fleetctl.db-wal", "fleetctl.db-shm", "fleets/web.json"):
        with suppress(FileNotFoundError):
            os.unlink(f"{place.root}/{lost}")
    place.start()
    assert place.leaders() == before
    note = place.client.status()["daemon"]["note"] or ""
    assert all(agent_id in note for agent_id in before)
    assert "down --orphans" in note
    place.run("down", "--orphans")
    assert not place.processes()


def test_after_a_reboot_nothing_is_adopted_or_signalled_and_the_fleet_comes_back(place: Place) -> None:
    before = fleet_of(place)
    place.kill()
    for pid in before.values():
        os.kill(pid, 9)
    eventually(lambda: not place.processes(), "the agents are gone, as after a reboot")
    with subprocess.Popen(SLEEP, start_new_session=True) as stranger:
        try:
            # The worst case: a stranger has the recorded pid and even the recorded start time; only the boot id differs.
            ticks = int(Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(") ")[2].split()[19])
            rewrite_records(place, pid=stranger.pid, start_ticks=ticks, boot_id="of-an-earlier-boot")
            place.start()
            eventually(lambda: place.settled("web", 3), "the fleet is back")
            after = place.leaders()
            assert after.keys() == before.keys()
            assert stranger.pid not in after.values()
            place.run("down", "--now")
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_stranger_with_a_recorded_pid_is_never_signalled(place: Place) -> None:
    before = fleet_of(place, 1)
    place.kill()
    for pid in before.values():
        os.kill(pid, 9)
    eventually(lambda: not place.processes(), "the agent is gone")
    with subprocess.Popen(SLEEP, start_new_session=True) as stranger:
        try:
            rewrite_records(place, pid=stranger.pid)  # this boot, and another start time: the pid was reused
            place.start()
            eventually(lambda: place.settled("web", 1), "the agent is back")
            place.run("down", "--now")
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_agents_that_live_are_not_doubled_when_their_records_name_another_boot(place: Place) -> None:
    """No reboot leaves processes behind; a restored copy of the directory does. Their tokens are proof enough."""
    before = fleet_of(place)
    place.kill()
    rewrite_records(place, boot_id="of-an-earlier-boot")
    place.start()
    eventually(lambda: place.settled("web", 3), "the fleet is as wished")
    assert place.leaders() == before


def test_agents_run_on_after_stop_keep_and_come_back_after_stop_drain(place: Place) -> None:
    before = fleet_of(place)
    place.stop("keep")
    assert place.leaders() == before
    assert [agent["pid"] for agent in place.json("ps")["agents"]] == [before[agent["id"]] for agent in place.json("ps")["agents"]]
    place.start()
    eventually(lambda: place.settled("web", 3), "the agents are adopted")
    assert place.leaders() == before
    place.stop("drain")
    assert not place.processes()
    place.start()
    eventually(lambda: place.settled("web", 3), "the fleet comes back")


def test_a_path_too_long_for_a_socket_is_refused_with_the_reason(place: Place) -> None:
    long = f"{place.root}/{'x' * 100}"
    done = place.run("--state-dir", long, "up", "--", *SLEEP, check=False)
    assert done.returncode == 1
    assert "too long" in done.stderr
    assert "--state-dir" in done.stderr
    assert not os.path.exists(long)


@as_root
def test_a_directory_of_another_user_is_refused_with_the_reason(place: Place) -> None:
    folder = Path(place.root, "theirs")
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    done = place.run("--state-dir", str(folder), "up", "--", *SLEEP, check=False)
    assert done.returncode == 1
    assert f"belongs to another user (uid {NOBODY}" in done.stderr
    assert list(folder.iterdir()) == []


@as_root
def test_a_read_only_directory_is_refused_with_the_reason(place: Place) -> None:
    folder = Path(place.root, "fixed")
    folder.mkdir(mode=0o500)
    os.chown(folder, NOBODY, NOBODY)
    os.chmod(place.root, 0o755)
    error = _daemon_as(NOBODY, str(folder))
    assert error["code"] == "E2006"
    assert str(error["message"]).endswith("Permission denied")
    assert str(folder) in str(error["message"])


def _daemon_as(uid: int, state_dir: str) -> dict[str, object]:
    """The error that a daemon of this user ends with. A child of this process: root reads anywhere, which is no test."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.environ["FLEETCTL_READY_FD"] = str(writer)
            daemon_main.run(state_dir, background=True)
        except FleetctlError:
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.readline()
    os.waitpid(child, 0)
    found: dict[str, object] = json.loads(answer.removeprefix("error "))
    return found


@as_root
def test_a_full_disk_stops_no_agent_and_heals_by_itself(small_disk: Place) -> None:
    place = small_disk
    before = fleet_of(place)
    ballast = Path(place.root, "ballast")
    with pytest.raises(OSError, match="No space left"), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with suppress(FleetctlError):  # refused, or taken and not carried out: both are honest
        place.client.scale("web", 6)
    assert place.leaders() == before
    os.kill(next(iter(before.values())), 9)  # something to write about, so that the trouble shows whatever scale said
    eventually(lambda: "fleetctl.db" in str(place.client.status()["daemon"]["note"]), "status says what is wrong")
    alive = place.leaders()
    assert len(alive) == 2
    assert alive.items() <= before.items()
    assert place.shown().items() <= before.items()
    ballast.unlink()
    place.client.scale("web", 6)
    eventually(lambda: place.settled("web", 6), "the fleet is as wished, once there is room again")
    assert alive.items() <= place.leaders().items()
    eventually(lambda: not place.client.status()["daemon"]["note"], "the trouble is over")
