"""Agents that say how they are, with a real daemon: ready by their word, shown as they say, and no trouble for the others."""

import os
import re
import socket
import sys
from pathlib import Path

import pytest

from tests.real.harness import ROOT, Json, Place, eventually, spec
from tests.servers import require

NOTIFY = {"notify": True, "start_timeout_seconds": 30.0}
IMPORTS = {"environment": {"PYTHONPATH": str(ROOT)}}
EXAMPLE = re.search(r"^## Teach your agent .*?^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
# As systemd-notify does it: says it, waits until that was taken in, and is gone.
SAYS_AND_GOES = """
import array, os, select, socket, sys
reader, writer = os.pipe()
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    out.connect(os.environ["NOTIFY_SOCKET"])
    out.send(b"READY=1\\nSTATUS=said by a child")
    out.sendmsg([b"BARRIER=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))])
os.close(writer)
poll = select.poll()
poll.register(reader, 0)
sys.exit(not poll.poll(20000))
"""
FLOODS = """
import os, socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    out.connect(os.environ["NOTIFY_SOCKET"])
    for number in range(1_000_000):
        out.send((b"READY=1", b"STATUS=\\xff", b"x" * 5000, b"STATUS=%d" % number)[number % 4])
"""
SPEAKS = """
import time
from fleetctl import agent
agent._REPEAT_SECONDS = 0.2
agent.busy(active=2, slots=4)
agent.ready("at work")
time.sleep(600)
"""


@pytest.fixture
def started(place: Place) -> Place:
    place.start()
    return place


def up(place: Place, name: str, *command: str, replicas: int = 1, **settings: object) -> None:
    wanted = spec(name, command, replicas, **{"readiness": NOTIFY, **IMPORTS, **settings})
    place.client.apply(name, wanted)


def one(place: Place, name: str) -> Json:
    return place.agents(name)[0]


def test_the_example_of_the_readme_is_ready_when_it_says_so_and_stops_when_asked(started: Place, tmp_path: Path) -> None:
    assert EXAMPLE is not None
    (tmp_path / "worker.py").write_text(EXAMPLE[1])
    up(started, "w", sys.executable, "worker.py", cwd=str(tmp_path), watchdog_seconds=60.0)
    eventually(lambda: one(started, "w")["ready"], "it says READY=1")
    agent_id = one(started, "w")["id"]
    eventually(lambda: started.client.agent(agent_id)["progress"], "it says how far it is")
    assert "waiting for work" in started.run("ps").stdout
    assert re.search(r"^Work: +[01] in work, 1 at most$", started.run("inspect", agent_id).stdout, re.MULTILINE)
    started.run("down", "w")
    events = started.client.events(limit=100)["events"]
    assert [event["message"] for event in events if event["kind"] == "agent.stopped"] == [f"{agent_id} stopped (exit 0)"]


def test_a_child_that_says_it_and_is_gone_is_heard(started: Place) -> None:
    up(started, "s", "sh", "-c", '"$1" -c "$2" && exec sleep 600', "sh", sys.executable, SAYS_AND_GOES)
    eventually(lambda: one(started, "s")["ready"], "its child says READY=1")
    eventually(lambda: one(started, "s")["status_text"] == "said by a child", "and its status")


def test_neither_a_stranger_nor_a_sibling_speaks_for_an_agent(started: Place) -> None:
    up(started, "quiet", "sleep", "600")
    up(started, "loud", sys.executable, "-c", SPEAKS)
    eventually(lambda: one(started, "loud")["ready"], "the sibling is ready")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"READY=1\nSTATUS=forged", f"{started.root}/run/notify.sock")
    eventually(lambda: "belongs to no agent" in started.daemon_log(), "the stranger was heard, and told from an agent")
    quiet = one(started, "quiet")
    assert (quiet["state"], quiet["status_text"], quiet["dropped_messages"]) == ("starting", "", 0)


def test_a_flooding_agent_is_counted_and_holds_up_nobody(started: Place) -> None:
    up(started, "flood", sys.executable, "-c", FLOODS, readiness={"settle_seconds": 0.1}, restart={"policy": "never"})
    eventually(lambda: one(started, "flood")["dropped_messages"] > 1000, "its messages are dropped")
    up(started, "w", sys.executable, "-c", SPEAKS, replicas=3)
    eventually(lambda: all(agent["status_text"] == "at work" for agent in started.agents("w")), "the others are heard")
    assert all(agent["dropped_messages"] == 0 for agent in started.agents("w"))
    flooding = one(started, "flood")
    assert flooding["state"] == "running"
    shown = started.run("inspect", flooding["id"]).stdout
    assert re.search(r"^Messages: +\d+ dropped: .*\d+ more than 50 a second", shown, re.MULTILINE)


def test_the_next_daemon_learns_what_an_agent_said_to_the_last(started: Place) -> None:
    up(started, "w", sys.executable, "-c", SPEAKS)
    eventually(lambda: one(started, "w")["status_text"] == "at work", "it is heard")
    pid = one(started, "w")["pid"]
    started.kill()
    started.start()
    eventually(lambda: (one(started, "w")["status_text"], one(started, "w")["slots"]) == ("at work", 4), "it is heard again")
    assert one(started, "w")["pid"] == pid


def test_redis_says_itself_that_it_is_ready(started: Place, tmp_path: Path) -> None:
    server = require("redis-server")
    where = ["--port", "0", "--unixsocket", f"{started.root}/redis.sock", "--dir", str(tmp_path), "--save", ""]
    up(started, "redis", server, "--supervised", "systemd", *where)
    eventually(lambda: one(started, "redis")["ready"], "redis says READY=1")
    assert "Ready to accept connections" in one(started, "redis")["status_text"]
    os.kill(one(started, "redis")["pid"], 9)
    eventually(lambda: one(started, "redis")["ready"] and one(started, "redis")["restarts"] == 1, "and again after a crash")
