"""Each example run as its README says, on real processes: up, at work, a worker killed with -9, nothing lost, down."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.real.harness import ROOT, Place, eventually
from tests.servers import require

JOBS = 90


def test_hello_greets_from_every_agent_and_survives_a_kill(place: Place) -> None:
    done = place.run("up", "--file", str(ROOT / "examples/hello/fleet.toml"))
    assert "hello  3 of 3 ready" in done.stdout
    before = place.leaders()
    eventually(lambda: sorted(_greetings(place)) == ["0", "1", "2"], "every agent has said hello")
    killed, pid = next(iter(before.items()))
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: place.leaders().get(killed) not in (None, pid) and place.settled("hello", 3), "the killed one is replaced")
    after = place.leaders()
    assert after.keys() == before.keys()
    assert {agent_id for agent_id in before if after[agent_id] != before[agent_id]} == {killed}
    eventually(lambda: len(_processes_that_greeted(place)) == 4, "the new process says hello too")
    assert place.agents()[[agent["id"] for agent in place.agents()].index(killed)]["last_exit"]["signal"] == signal.SIGKILL
    assert "hello is down, 3 agents ended" in place.run("down").stdout
    assert not place.processes()


def _greetings(place: Place) -> set[str]:
    return set(re.findall(r"\| hello from agent (\d)", place.run("logs", "hello").stdout))


def _processes_that_greeted(place: Place) -> set[str]:
    return set(re.findall(r"process (\d+)", place.run("logs", "hello").stdout))


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A redis-server of our own on a free port."""
    program = require("redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as db:
            eventually(lambda: _answers(db), "redis-server answers")
        yield url
    finally:
        server.terminate()
        server.wait()


def _answers(db: "redis.Redis") -> bool:
    try:
        return bool(db.ping())
    except redis.ConnectionError:
        return False


def test_queue_workers_lose_no_job_when_they_are_killed(place: Place, redis_url: str) -> None:
    folder = Path(place.root, "example")
    shutil.copytree(ROOT / "examples/queue-worker", folder, ignore=shutil.ignore_patterns(".venv"))
    (folder / "redis.env").write_text(f"REDIS_URL={redis_url}\n")
    (folder / ".venv").symlink_to(sys.prefix)  # stands for the one that the README makes
    worker = folder / "worker.py"
    worker.write_text(worker.read_text().replace("ALIVE_SECONDS = 10", "ALIVE_SECONDS = 3"))
    assert "queue-worker  3 of 3 ready" in place.run("up", "--file", str(folder / "fleet.toml")).stdout
    produce = [sys.executable, str(folder / "produce.py"), str(JOBS)]
    subprocess.run(produce, env={**os.environ, "REDIS_URL": redis_url}, check=True, stdout=subprocess.DEVNULL)
    with redis.Redis.from_url(redis_url, decode_responses=True) as db:
        for number in (1, 2, 3):  # each time a job is in somebody's hands
            eventually(lambda: int(db.hlen("jobs:done")) >= 10 * number, "jobs are being done")  # noqa: B023 - called at once
            agent_id, pid = sorted(place.leaders().items())[number - 1]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: place.leaders().get(agent_id, pid) != pid, "the killed worker is replaced")  # noqa: B023 - called at once
        place.run("scale", "2")  # one of them is asked to stop: it finishes its job first
        eventually(lambda: int(db.hlen("jobs:done")) == JOBS, "every job is done", 30)
        assert sorted(map(int, db.hkeys("jobs:done"))) == list(range(JOBS))
        eventually(lambda: not list(db.scan_iter(match="jobs:taken:*")), "no job is left in anybody's hands", 30)
        assert db.llen("jobs") == 0
    place.run("down")
    assert not place.processes()


def test_the_address_of_redis_is_stored_and_shown_nowhere(place: Place) -> None:
    """It stands in an env_file because it may hold a password."""
    folder = Path(place.root, "example")
    shutil.copytree(ROOT / "examples/queue-worker", folder, ignore=shutil.ignore_patterns(".venv"))
    (folder / "redis.env").write_text("REDIS_URL=redis://:hunter2@127.0.0.1:1/0\n")
    (folder / ".venv").symlink_to(sys.prefix)
    place.run("up", "--file", str(folder / "fleet.toml"), "--no-wait")
    eventually(lambda: place.agents()[0]["last_exit"], "a worker found nothing at that address")
    shown = place.run("inspect", "queue-worker", "--json").stdout + place.run("status", "--json").stdout + place.run("events").stdout
    shown += place.run("config", "show", str(folder / "fleet.toml")).stdout
    place.stop("drain") if place.daemon else place.run("daemon", "stop", "--drain")
    assert "hunter2" not in shown
    for path in Path(place.root).rglob("*"):
        if path.is_file() and folder not in path.parents:
            assert b"hunter2" not in path.read_bytes(), path


def test_http_service_answers_everybody_through_a_restart_and_while_it_shrinks(place: Place) -> None:
    folder = Path(place.root, "example")
    shutil.copytree(ROOT / "examples/http-service", folder, ignore=shutil.ignore_patterns(".venv"))
    (folder / ".venv").symlink_to(sys.prefix)  # stands for the one that the README makes
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "fleet.toml"
    file.write_text(file.read_text().replace(":8080", f":{port}") + "\n[fleet.readiness]\nsettle_seconds = 0.2\n")
    assert "http-service  3 of 3 ready" in place.run("up", "--file", str(file)).stdout
    load = subprocess.Popen([sys.executable, str(folder / "load.py"), "4", str(port)], stdout=subprocess.PIPE, text=True)
    before = place.leaders()
    place.run("restart", "http-service")
    assert not set(before.values()) & set(place.leaders().values())
    place.run("scale", "5")
    place.run("scale", "1")
    told, _ = load.communicate(timeout=60)
    assert load.returncode == 0, told
    assert re.fullmatch(r"\d{3,} answers from [4-9] processes, 0 failures\n", told)


def test_autoscaled_fleets_grow_under_load_and_shrink_when_it_is_gone(place: Place) -> None:
    folder = Path(place.root, "example")
    shutil.copytree(ROOT / "examples/autoscale", folder)
    text = (folder / "fleet.toml").read_text()
    for setting, value in {
        "scale_up_stabilization_seconds": 0.5,
        "scale_down_stabilization_seconds": 1,
        "autoscaling_interval_seconds": 0.5,
        "metrics_interval_seconds": 0.25,
        "window_seconds": 1,
        "interval_seconds": 0.25,
    }.items():
        text = re.sub(rf"^{setting} = [0-9.]+", f"{setting} = {value}", text, flags=re.MULTILINE)
    (folder / "fleet.toml").write_text(text)
    place.run("up", "--file", str(folder / "fleet.toml"))
    sizes = {fleet["name"]: fleet["desired_replicas"] for fleet in place.client.status()["fleets"]}
    assert sizes == {"burn": 1, "calls": 1}
    load = [
        subprocess.Popen([sys.executable, str(folder / "load.py"), str(folder / name), rate, "3"], stdout=subprocess.DEVNULL)
        for name, rate in (("burn-jobs", "24"), ("calls-jobs", "20"))
    ]
    try:
        eventually(lambda: _size(place, "burn") > 1 and _size(place, "calls") > 2, "both have grown", seconds=30)
    finally:
        for process in load:
            process.wait()
    eventually(lambda: _size(place, "burn") == _size(place, "calls") == 1, "both are small again", seconds=60)
    reasons = {entry["fleet"]: entry["reason"] for entry in place.client.history(limit=100)["entries"] if entry["action"] == "scale_up"}
    assert "CPU utilization" in reasons["burn"]
    assert "waiting" in reasons["calls"]
    assert "autoscaling is on, between 1 and 8 agents" in place.run("explain", "calls").stdout


def _size(place: Place, fleet: str) -> int:
    return int(place.client.status(fleet)["fleets"][0]["desired_replicas"])


def test_a_session_acquires_an_mcp_server_with_its_folder_and_its_tools(place: Place, tmp_path: Path) -> None:
    folder = Path(place.root, "example")
    shutil.copytree(ROOT / "examples/mcp-pool", folder, ignore=shutil.ignore_patterns(".venv"))
    (folder / ".venv").symlink_to(sys.prefix)  # stands for the one that the README makes
    file = folder / "fleet.toml"
    file.write_text(file.read_text().replace("size = 3", "size = 1") + f'\n[fleet.environment]\nPYTHONPATH = "{ROOT}"\n')
    assert "mcp-pool  1 of 1 ready" in place.run("up", "--file", str(file)).stdout
    eventually(lambda: place.client.status("mcp-pool")["fleets"][0]["warm_pool"]["current_size"] == 1, "a server waits", 20.0)
    workspace = tmp_path / "notes"
    words = [sys.executable, str(folder / "session.py"), str(workspace)]
    environ = {**os.environ, "FLEETCTL_STATE_DIR": place.root, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(words, env=environ, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.fullmatch(
        r"(mcp-pool-\w{5}) at http://127\.0\.0\.1:\d+/mcp, from the warm pool in [\d.]+ ms\n"
        r"the note says '1\. ask\\n2\. do\\n'\n"
        r"its tools: write_note, read_note\n",
        told,
    )
    assert found, told
    assert (workspace / "plan.md").read_text() == "1. ask\n2. do\n"
    eventually(lambda: found[1] not in place.leaders(), "the server ends with its session")
    assert place.client.status("mcp-pool")["fleets"][0]["desired_replicas"] == 1
    place.run("down")
    assert not place.processes()


def test_a_stateful_agent_hands_out_every_number_once_whatever_happens_to_it(place: Place) -> None:
    folder = Path(place.root, "example")
    shutil.copytree(ROOT / "examples/stateful", folder, ignore=shutil.ignore_patterns(".venv", "ledger"))
    (folder / ".venv").symlink_to(sys.prefix)  # stands for the one that the README makes
    file = folder / "fleet.toml"
    file.write_text(file.read_text() + f'\n[fleet.environment]\nUNIT_SECONDS = "0.005"\nPYTHONPATH = "{ROOT}"\n')
    assert "stateful  3 of 3 ready" in place.run("up", "--file", str(file)).stdout

    def handed_out() -> dict[str, list[int]]:
        return {path.name: [int(number) for number in path.read_text().split()] for path in (folder / "ledger").iterdir()}

    def gets_on(names: set[str]) -> None:
        before = handed_out()
        eventually(lambda: all(len(handed_out()[name]) > len(before[name]) + 3 for name in names), "the work goes on")

    names = set(place.leaders())
    gets_on(names)
    for pid in place.leaders().values():
        os.kill(pid, signal.SIGKILL)
    gets_on(names)
    place.run("restart", "stateful")
    os.kill(place.client.daemon()["pid"], signal.SIGKILL)
    place.client.close()
    place.run("daemon", "start")
    gets_on(names)
    place.run("scale", "1")
    left = names - set(place.leaders())
    # The restart made some too: the last one of each counts.
    saved = {found["agent"]: found["id"] for found in place.client.checkpoints("stateful")["checkpoints"] if found["agent"] in left}
    assert len(saved) == len(left) == 2
    for checkpoint_id in saved.values():
        place.client.restore_checkpoint(checkpoint_id)
    assert not left & set(place.leaders())  # others, which go on in their names
    gets_on(names)
    place.run("down")
    for name, numbers in handed_out().items():
        assert numbers == list(range(1, len(numbers) + 1)), name
    assert set(handed_out()) == names
