"""The engine and the everyday commands over real daemons and real processes: start, races, death, adoption, offline reading, the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fleetctl.cli.doctor import Finding, examine
from fleetctl.client import Client
from fleetctl.config import settings
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import FleetctlError
from tests.cli.conftest import PROGRAM, call, environment
from tests.cli.fake_daemon import running
from tests.real.harness import Place, eventually, spec


@pytest.fixture(autouse=True)
def clean_end(state_dir: Path) -> Iterator[None]:
    """Whatever a test started under this state directory ends with it."""
    yield
    engine = LocalEngine(str(state_dir))
    if holder := engine.lock_holder():
        os.kill(holder, signal.SIGKILL)
        while engine.lock_holder():
            time.sleep(0.01)
    if not state_dir.is_dir():
        return
    for file in state_dir.glob("fleetctl.db*"):  # without these no record claims what still runs
        file.rmdir() if file.is_dir() else file.unlink()
    assert engine.end_orphans(engine.find_orphans(), seconds=0) == []


def started(state_dir: Path, *fleets: str, replicas: int = 1, command: Sequence[str] = ("sleep", "1000")) -> dict[str, int]:
    """Have a daemon with these fleets, which are ready at once; agent -> pid."""
    state_dir.mkdir(mode=0o700)
    place = Place(state_dir)
    place.start()
    for fleet in fleets:
        place.client.apply(fleet, spec(fleet, command, replicas))
        eventually(lambda: place.settled(fleet, replicas), f"{fleet} is ready")  # noqa: B023 - called at once
    place.client.close()
    return place.shown()


def kill_daemon(state_dir: Path) -> None:
    engine = LocalEngine(str(state_dir))
    pid = engine.lock_holder()
    assert pid
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    while engine.lock_holder() is not None:
        time.sleep(0.01)
    os.close(descriptor)


def pids(*arguments: str) -> dict[str, int]:
    return {agent["id"]: agent["pid"] for agent in json.loads(call("ps", "--json", *arguments).stdout)["agents"]}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def fleet_file(name: str, **settings: object) -> str:
    """A fleet.toml whose agents are ready at once."""
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in {"name": name, "command": ["sleep", "1000"], **settings}.items()]
    return "".join(["[fleet]\n", *lines, "[fleet.readiness]\nsettle_seconds = 0.02\n"])


def test_a_fleet_from_up_to_down() -> None:
    Path("fleet.toml").write_text(fleet_file("web", replicas=2))
    up = call("up")
    assert (up.returncode, up.stderr.splitlines()[0][:23]) == (0, "started the daemon (pid")
    assert up.stdout.startswith("web  2 of 2 ready  sleep 1000\n")
    again = call("up")
    assert again.returncode == 0
    assert "started the daemon" not in again.stderr
    before = pids()
    wrong = call("scale", "99999999")
    assert wrong.stderr == "error: replicas: 99999999 is not between 0 and 100000\nhint: `fleetctl scale --help` explains\n"
    assert call("scale", "+1").stdout == "web: 3 of 3 ready\n"
    assert pids().items() >= before.items()
    assert call("scale", "-2").stdout == "web: 1 of 1 ready\n"
    kept = pids()
    assert call("restart").returncode == 0
    assert set(pids().values()).isdisjoint(kept.values())
    assert call("down").stdout == "web is down, 1 agent ended\n"
    assert call("daemon", "stop").returncode == 0
    assert call("daemon", "status", "--check").returncode == 3


def test_up_with_another_command_waits_until_all_run_it(state_dir: Path) -> None:
    before = started(state_dir, "web", replicas=2)
    assert call("up", "-n", "2", "--name", "web", "--", "sleep", "2000").returncode == 0
    after = pids()
    assert set(after.values()).isdisjoint(before.values())
    assert [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in after.values()] == [b"sleep\x002000\x00"] * 2


def test_up_names_the_agent_that_cannot_run_and_shows_its_last_words() -> None:
    up = call("up", "--name", "bad", "--", "sh", "-c", "echo the reason; exit 78")
    assert (up.returncode, up.stdout) == (1, "")
    assert "failed: exit 78" in up.stderr
    assert "    the reason\n" in up.stderr


def test_up_gives_up_after_its_timeout_and_the_fleet_goes_on() -> None:
    up = call("up", "--name", "slow", "--timeout", "0.6", "--", "sh", "-c", "exit 3")
    assert up.returncode == 124
    assert "slow: 0 of 1 ready" in up.stderr
    assert [agent.rpartition("-")[0] for agent in pids()] == ["slow"]


def test_ctrl_c_while_up_waits_leaves_the_fleet_starting(state_dir: Path) -> None:
    up = subprocess.Popen(
        [*PROGRAM, "up", "--name", "slow", "--", "sh", "-c", "exit 3"], stderr=subprocess.PIPE, text=True, env=environment()
    )
    with Client(str(state_dir)) as client:
        while not (LocalEngine(str(state_dir)).daemon_pid() and client.daemon()["fleets"]):
            time.sleep(0.02)
    assert up.stderr
    said = up.stderr.readline() + up.stderr.readline()
    assert "slow: " in said
    up.send_signal(signal.SIGINT)
    assert "goes on starting in the background" in up.stderr.read()
    assert up.wait(10) == 130
    assert pids()


def test_with_a_dead_daemon_ps_logs_and_down_still_work(state_dir: Path) -> None:
    before = started(state_dir, "web", replicas=2, command=["sh", "-c", "echo hello; exec sleep 1000"])
    kill_daemon(state_dir)
    shown = call("ps", "--json")
    told = json.loads(shown.stdout)
    assert told["daemon"]["alive"] is False
    assert {agent["id"]: agent["pid"] for agent in told["agents"]} == before
    assert "does not run" in shown.stderr
    assert sorted(call("logs").stdout.splitlines()) == sorted(f"{agent} | hello" for agent in before)
    first = next(iter(before))
    os.kill(before[first], signal.SIGKILL)
    while alive(before[first]):
        time.sleep(0.01)
    states = {agent["id"]: agent["state"] for agent in json.loads(call("ps", "--json").stdout)["agents"]}
    assert (states.pop(first), set(states.values())) == ("terminated", {"running"})
    down = call("down")
    assert (down.returncode, "started one" in down.stderr) == (0, True)
    assert not any(map(alive, before.values()))
    assert LocalEngine(str(state_dir)).lock_holder() is None
    assert json.loads(call("ps", "--json").stdout)["agents"] == []


def test_down_of_one_fleet_with_a_dead_daemon_leaves_the_other_running(state_dir: Path) -> None:
    before = started(state_dir, "api", "web")
    kill_daemon(state_dir)
    assert call("down", "web").returncode == 0
    assert {agent: alive(pid) for agent, pid in before.items()} == {agent: agent.startswith("api") for agent in before}
    assert call("daemon", "start").returncode == 0
    assert pids().items() <= before.items()


def test_orphans_are_shown_and_ended(state_dir: Path) -> None:
    before = started(state_dir, "web", replicas=2)
    assert call("down", "--orphans", "--dry-run").stdout.endswith("0 orphans would be ended\n")
    kill_daemon(state_dir)
    for file in ("fleetctl.db", "fleetctl.db-wal", "fleetctl.db-shm", "fleets/web.json"):
        (state_dir / file).unlink(missing_ok=True)
    doctor = json.loads(call("doctor", "--json").stdout)
    assert [finding["level"] for finding in doctor["findings"] if finding["check"] == "orphans"] == ["warn"]
    done = call("down", "--orphans")
    assert (done.returncode, done.stdout) == (0, "2 orphans ended\n")
    assert not any(map(alive, before.values()))


@pytest.mark.parametrize(("how", "runs_on"), [("--keep", True), ("--drain", False)])
def test_daemon_stop_keeps_or_drains(state_dir: Path, how: str, runs_on: bool) -> None:
    before = started(state_dir, "web")
    refused = call("daemon", "stop")
    assert (refused.returncode, "--keep" in refused.stderr) == (2, True)
    assert call("daemon", "stop", how).returncode == 0
    assert list(map(alive, before.values())) == [runs_on]
    assert call("daemon", "start").returncode == 0
    assert call("wait", "web").returncode == 0
    assert (pids() == before) is runs_on


def test_racing_ups_start_one_daemon() -> None:
    racers = [
        subprocess.Popen(
            [*PROGRAM, "up", "--name", f"f{number}", "--", "sleep", "1000"], stderr=subprocess.PIPE, text=True, env=environment()
        )
        for number in range(4)
    ]
    said = [racer.communicate(timeout=60)[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, said
    assert sum("started the daemon" in words for words in said) == 1
    assert len(pids()) == 4


def test_daemon_that_cannot_start_says_why(state_dir: Path) -> None:
    state_dir.mkdir(mode=0o700)
    (state_dir / "fleetctl.db").mkdir()
    started = call("daemon", "start")
    assert started.returncode == 1
    assert "fleetctl.db" in started.stderr
    assert "Traceback" not in started.stderr


def test_daemon_that_dies_without_a_word_shows_the_end_of_its_log(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(FleetctlError, match="ended while it started") as caught:
        LocalEngine(str(state_dir)).ensure_daemon()
    assert "daemon.log" in caught.value.hint
    script = state_dir / "python"
    script.write_text("#!/bin/sh\necho last words >&2\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(FleetctlError, match="last words"):
        LocalEngine(str(state_dir)).ensure_daemon()


def test_daemon_log_is_private(state_dir: Path) -> None:
    call("daemon", "start")
    assert (state_dir / "daemon.log").stat().st_mode & 0o777 == 0o600
    assert call("daemon", "start").stdout.startswith("the daemon runs already")


def test_a_state_directory_that_is_a_file_is_told(state_dir: Path) -> None:
    state_dir.write_text("")
    for command in (["up"], ["daemon", "start"]):
        done = call(*command)
        assert (done.returncode, "\nerror: " in f"\n{done.stderr}") == (1, True)
    assert call("doctor").returncode == 1


def test_logs_follow_and_stop_with_the_reader(state_dir: Path) -> None:
    folder = state_dir / "logs" / "web"
    folder.mkdir(parents=True)
    log = folder / "web-00000.log"
    log.write_bytes(b"one\ntwo\n")
    follower = subprocess.Popen([*PROGRAM, "logs", "-f", "-n", "1", "web-00000"], stdout=subprocess.PIPE, env=environment())
    assert follower.stdout
    assert follower.stdout.readline() == b"two\n"
    with open(log, "ab") as file:
        file.write(b"\x1b[31mthree\n")
    assert follower.stdout.readline() == b"\x1b[31mthree\n"
    follower.stdout.close()
    with open(log, "ab") as file:
        file.write(b"four\n")
    assert follower.wait(10) == 0


def test_logs_follow_agents_that_come_later(state_dir: Path) -> None:
    folder = state_dir / "logs" / "web"
    folder.mkdir(parents=True)
    (folder / "web-00000.log").write_bytes(b"2026-01-01T00:00:00Z old\n")
    follower = subprocess.Popen([*PROGRAM, "logs", "-af", "web"], stdout=subprocess.PIPE, env=environment())
    assert follower.stdout
    assert follower.stdout.readline() == b"web-00000 | 2026-01-01T00:00:00Z old\n"
    (folder / "web-00001.log").write_bytes(b"new\n")
    assert follower.stdout.readline() == b"web-00001 | new\n"
    follower.send_signal(signal.SIGINT)
    assert follower.wait(10) == 130
    follower.stdout.close()


def test_logs_show_the_last_lines_or_those_since(state_dir: Path) -> None:
    folder = state_dir / "logs" / "web"
    folder.mkdir(parents=True)
    (folder / "web-00000.log").write_bytes(b"".join(b"%d\n" % number for number in range(200)))
    assert call("logs", "web-00000", "-n", "2").stdout == "198\n199\n"
    assert len(call("logs", "web-00000").stdout.splitlines()) == 100
    assert len(call("logs", "web-00000", "--since", "1h").stdout.splitlines()) == 200
    assert call("logs", "web", "--tail", "1", "--all").stdout == "web-00000 | 199\n"


def test_logs_of_a_fleet_are_those_of_the_agents_there_are_now(state_dir: Path) -> None:
    (first,) = started(state_dir, "web", command=["sh", "-c", "echo hello; exec sleep 1000"])
    assert call("logs", "web").stdout == f"{first} | hello\n"
    call("down")
    for command in (["logs"], ["logs", "web"]):
        old = call(*command)
        assert (old.returncode, old.stdout) == (0, "")
        assert f"1 agent that has ended: `fleetctl logs -a{' web' if command[1:] else ''}`" in old.stderr
    assert call("logs", first).stdout == "hello\n"
    assert call("up", "--name", "web", "--no-wait", "--", "sleep", "1000").returncode == 0
    (second,) = pids()
    silent = call("logs")
    assert (silent.stdout, "nothing was written yet" in silent.stderr, "python3 -u" in silent.stderr) == ("", True, True)
    assert call("logs", "-a", "web").stdout == f"{first} | hello\n"
    kill_daemon(state_dir)
    assert call("logs", "web").stdout == ""
    assert call("logs", second).stdout == ""


def test_doctor_tells_what_keeps_untrusted_agents_in_and_what_to_do_where_nothing_does(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, Finding]:
        with LocalEngine(str(state_dir)) as engine:
            return {finding.check: finding for finding in examine(engine)}

    monkeypatch.setattr("fleetctl.host.sandbox.rehearse", lambda: "unshare: new namespaces: Operation not permitted")
    told = found()
    assert told["sandbox"].level == "warn"
    assert told["sandbox"].message == (
        'fleets with trust_level = "untrusted" are refused: unshare: new namespaces: Operation not permitted'
    )
    assert told["sandbox"].advice
    assert {"control groups", "ptrace"} <= told.keys()
    monkeypatch.setattr("fleetctl.host.sandbox.rehearse", lambda: "")
    assert found()["sandbox"].level == "ok"


def test_doctor_finds_a_stale_socket_open_modes_and_a_hung_daemon(state_dir: Path) -> None:
    def levels() -> dict[str, str]:
        return {finding["check"]: finding["level"] for finding in json.loads(call("doctor", "--json").stdout)["findings"]}

    with running(state_dir):
        assert levels()["daemon"] == "ok"
    (state_dir / "run" / "control.sock").touch()
    os.chmod(state_dir, 0o755)
    found = levels()
    assert (found["state directory"], found["daemon"]) == ("warn", "ok")
    assert state_dir.stat().st_mode & 0o777 == 0o755  # it looks and changes nothing
    os.chmod(state_dir, 0o700)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(state_dir / "daemon.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout
    assert holder.stdin
    holder.stdout.readline()
    assert levels()["daemon"] == "fail"
    assert call("doctor").returncode == 1
    holder.stdin.close()
    holder.stdout.close()
    holder.wait(10)


def test_config_commands(tmp_path: Path) -> None:
    shown = call("config", "init", "--name", "web", "--dry-run")
    assert shown.returncode == 0
    assert call("config", "check").returncode == 6
    assert call("config", "init", "--name", "web").returncode == 0
    assert (tmp_path / "here" / "fleet.toml").read_text() == shown.stdout
    assert call("config", "init").returncode == 6
    assert call("config", "check").stdout == "fleet.toml is valid: web\n"
    assert json.loads(call("config", "show", "--json").stdout)["fleets"][0]["name"] == "web"
    printed = call("config", "show", "--file", "fleet.toml").stdout
    assert printed == call("config", "show").stdout == call("config", "show", "fleet.toml").stdout
    given = {line.split()[0] for line in printed.splitlines()[2:-1]}
    assert "more settings as they are by default; --all shows them" in printed.splitlines()[-1]
    rows = {line.split()[0]: line.split()[1] for line in call("config", "show", "--all").stdout.splitlines()[2:]}
    assert {"name", "command"} <= given < rows.keys()
    assert (rows["restart.policy"], rows["shell"], rows["name"], rows["env_file"]) == ('"always"', "false", '"web"', "-")
    assert rows.keys() == {setting.key for setting in settings() if setting.supported}
    assert call("config", "check", "x", "--file", "y").returncode == 2
    assert json.loads(call("config", "schema").stdout)["type"] == "object"
    (tmp_path / "here" / "fleet.toml").write_text(
        '[fleet]\nname = "web"\ncommand = ["sleep", "9"]\nreplicsa = 3\nenvironment = {SECRET = "hidden"}\n'
    )
    wrong = call("config", "check")
    assert wrong.returncode == 6
    assert "fleet.toml:4" in wrong.stderr
    assert "replicas" in wrong.stderr
    (tmp_path / "here" / "fleet.toml").write_text('[fleet]\nname = "web"\ncommand = ["sleep", "9"]\nenvironment = {SECRET = "hidden"}\n')
    for command in (["config", "show"], ["config", "show", "--json"]):
        done = call(*command)
        assert done.returncode == 0
        assert "SECRET" in done.stdout
        assert "hidden" not in done.stdout


def test_what_a_flag_says_leaves_what_another_said() -> None:
    sleep = ["--name", "web", "--no-wait", "--", "sleep", "1000"]
    for flags in (["--min", "1", "--max", "3"], ["--warm", "2"], []):
        assert call("up", *flags, *sleep).returncode == 0
    (fleet,) = json.loads(call("status", "--json").stdout)["fleets"]
    scaling, pool = fleet["autoscaling"], fleet["warm_pool"]
    assert (scaling["enabled"], scaling["min_replicas"], scaling["max_replicas"], pool["target_size"]) == (True, 1, 3, 2)
    assert call("up", "--max", "5", *sleep).returncode == 0
    (fleet,) = json.loads(call("status", "--json").stdout)["fleets"]
    assert (fleet["autoscaling"]["max_replicas"], fleet["warm_pool"]["target_size"]) == (5, 2)
    assert call("down", "--now").returncode == 0
    assert call("up", *sleep).returncode == 0
    (fleet,) = json.loads(call("status", "--json").stdout)["fleets"]
    assert (fleet["autoscaling"]["enabled"], fleet["warm_pool"]["enabled"]) == (False, False)


def test_up_reads_the_file_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "here" / "fleet.toml").write_text(fleet_file("from-file", replicas=2))
    assert call("up").stdout.startswith("from-file  2 of 2 ready  sleep 1000\n")
    assert call("up", "-n", "1").stdout.startswith("from-file  1 of 1 ready  sleep 1000\n")
    (tmp_path / "other.toml").write_text(fleet_file("other"))
    other = call("up", "--file", str(tmp_path / "other.toml"))
    assert "also running: from-file; `fleetctl down from-file` ends it\n" in other.stderr
    told = json.loads(call("up", "--json").stdout)
    assert [fleet["ready_replicas"] for fleet in told["fleets"]] == [2]
