"""The warm pool of a real daemon: it fills, hands out, survives a kill -9 of the daemon, and goes without being killed."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fleetctl.errors import WarmPoolEmpty
from tests.real.harness import Json, Place, eventually, spec

# Says in its log what happens to it, and exits with 0 on TERM; a stop that lasts is a stop that its ticks show.
AGENT = """
import os, signal, sys
def leave(number, frame):
    print("bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
def go_on(number, frame):
    try:
        print("claim", open(os.environ["FLEETCTL_CLAIM"]).read(), flush=True)
    except FileNotFoundError:
        print("no claim", flush=True)
signal.signal(signal.SIGCONT, go_on)
print("launched", os.environ["FLEETCTL_LAUNCH"], flush=True)
while True:
    signal.pause()
"""
COMMAND = [sys.executable, "-S", "-c", AGENT]
SLEEPER = ["sleep", "600"]


def up(place: Place, *, replicas: int = 1, size: int = 3, command: list[str] = SLEEPER, **settings: object) -> None:
    wanted = spec("w", command, replicas, **{"warm_pool": {"enabled": True, "size": size}, **settings})
    if place.daemon is None:
        place.start()
    place.client.apply("w", wanted)
    eventually(lambda: warm(place, replicas, size), "the pool is full")


def pool(place: Place) -> dict[str, int]:
    """agent id -> pid of the suspended instances, as status shows them."""
    return {agent["id"]: agent["pid"] for agent in place.agents("w") if agent["pooled"] and agent["state"] == "suspended"}


def replicas(place: Place) -> dict[str, int]:
    return {agent["id"]: agent["pid"] for agent in place.agents("w") if not agent["pooled"] and agent["ready"]}


def state(pid: int) -> str:
    """As the kernel tells it: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def warm(place: Place, count: int, size: int) -> bool:
    """Whether there are exactly so many replicas, all running, and so many instances, all stopped, and the machine says the same."""
    running, waiting = replicas(place), pool(place)
    right = (len(running), len(waiting)) == (count, size) and len(place.agents("w")) == count + size
    states = {state(pid) for pid in waiting.values()} <= {"T"} and "T" not in {state(pid) for pid in running.values()}
    return right and states and place.leaders("w") == running | waiting


def exits(place: Place) -> list[str]:
    """How the agents of the fleet ended that are gone, as the events tell it."""
    return [
        event["message"].partition("stopped ")[2] for event in place.client.events("w", 1000)["events"] if event["kind"] == "agent.stopped"
    ]


def test_the_pool_fills_and_hands_out_over_the_command_line(place: Place) -> None:
    up(place, command=COMMAND, readiness={"settle_seconds": 0.5}, warm_pool={"enabled": True, "size": 3, "reads_claim": True})
    before = pool(place)
    assert place.run("warm", "fill").stdout == "w: 3 of 3 warm\n"
    got = place.json("acquire", "w", "--require-warm", "--env", "TASK=7", "--tool", "search")
    assert got["from_warm_pool"]
    assert before[got["agent_id"]] == got["pid"]
    assert got["seconds"] < 1.0
    claim = json.loads(Path(got["claim_path"]).read_text())
    assert (claim["environment"], claim["tools"], claim["agent_id"]) == ({"TASK": "7"}, ["search"], got["agent_id"])
    eventually(lambda: b'claim {"environment": {"TASK": "7"}' in place.log("w", got["agent_id"]), "the agent reads its claim as it goes on")
    assert place.log("w", got["agent_id"]).startswith(b"launched warm\n")
    eventually(lambda: warm(place, 2, 3), "the pool is full again")
    assert place.client.status("w")["fleets"][0]["desired_replicas"] == 2
    eventually(lambda: json.loads(Path(f"{place.root}/fleets/w.json").read_text())["spec"]["replicas"] == 2, "the wish has grown on disk")
    (entry,) = [entry for entry in place.client.history("w")["entries"] if entry["cause"] == "acquire"]
    assert (entry["current_replicas"], entry["target_replicas"]) == (1, 2)


def test_an_empty_pool_means_a_cold_start_with_the_same_answer(place: Place) -> None:
    up(place, size=0, warm_pool={"enabled": False}, command=COMMAND)
    with pytest.raises(WarmPoolEmpty):
        place.client.acquire("w", require_warm=True)
    got = place.client.acquire("w", tools=["search"])
    assert not got["from_warm_pool"]
    assert place.leaders("w")[got["agent_id"]] == got["pid"]
    assert json.loads(Path(got["claim_path"]).read_text())["tools"] == ["search"]
    assert warm(place, 2, 0)


def test_variables_asked_for_are_in_the_environment_of_a_cold_start_and_of_its_restarts(place: Place) -> None:
    up(place, command=["sh", "-c", "echo task=$TASK; exec sleep 600"], readiness={"settle_seconds": 0.1})
    got = place.json("acquire", "w", "--env", "TASK=7")
    assert not got["from_warm_pool"]
    eventually(lambda: place.log("w", got["agent_id"]) == b"task=7\n", "it knows its task")
    os.kill(got["pid"], signal.SIGKILL)
    eventually(lambda: place.log("w", got["agent_id"]) == b"task=7\n" * 2, "and knows it again after a crash")


def test_suspended_instances_survive_the_daemon_and_are_taken_back_as_such(place: Place) -> None:
    up(place, replicas=2)
    before, running = pool(place), replicas(place)
    place.kill()
    assert {state(pid) for pid in before.values()} == {"T"}
    place.start()
    assert (pool(place), replicas(place)) == (before, running)
    assert warm(place, 2, 3)
    got = place.client.acquire("w", require_warm=True)
    assert got["pid"] in before.values()
    assert state(before[got["agent_id"]]) != "T"


def test_an_acquired_agent_counts_after_a_kill_right_behind_the_answer(place: Place) -> None:
    up(place)
    for number in range(5):
        got = place.client.acquire("w", require_warm=True)
        place.kill()
        place.start()
        eventually(lambda number=number: warm(place, 2 + number, 3), "every acquired agent is a replica, and no more")  # type: ignore[misc]
        assert replicas(place)[got["agent_id"]] == got["pid"]


def test_a_kill_at_any_moment_leaves_no_replica_stopped_and_no_instance_running(place: Place) -> None:
    up(place, replicas=1, size=4)
    for step in range(8):
        place.client.scale("w", 1 + step % 4)
        time.sleep(0.005 * step)  # not to wait for anything: the kill is to fall into ever other moments of the change
        place.kill()
        place.start()
    eventually(lambda: warm(place, 4, 4), "all is as wished")


def test_down_ends_suspended_instances_cleanly_and_at_once(place: Place) -> None:
    up(place, size=5, command=COMMAND, readiness={"settle_seconds": 0.5})  # time to set its handlers up
    began = time.monotonic()
    assert place.run("down").returncode == 0
    assert time.monotonic() - began < 5.0
    assert place.processes() == []
    assert exits(place) == ["(exit 0)"] * 6


def test_a_daemon_that_drains_leaves_nothing_and_the_next_fills_the_pool(place: Place) -> None:
    up(place, command=COMMAND)
    place.stop("drain")
    assert place.processes() == []
    place.start()
    eventually(lambda: warm(place, 1, 3), "all is there again")


def test_one_that_a_stranger_kills_or_continues_is_replaced(place: Place) -> None:
    up(place, size=2)
    killed, continued = pool(place)
    os.kill(pool(place)[killed], signal.SIGKILL)
    eventually(lambda: killed not in pool(place) and warm(place, 1, 2), "a killed one is replaced")
    os.kill(pool(place)[continued], signal.SIGCONT)
    eventually(lambda: continued not in pool(place) and warm(place, 1, 2), "a continued one is replaced", 20.0)


def test_scaling_up_takes_warm_ones_first(place: Place) -> None:
    up(place, size=2)
    before = pool(place)
    assert place.run("scale", "4").returncode == 0
    assert before.items() <= replicas(place).items()
    assert [agent["from_warm_pool"] for agent in place.agents("w") if agent["id"] in before] == [True, True]
    eventually(lambda: warm(place, 4, 2), "the pool is full again")


def test_a_restart_replaces_the_pool_too(place: Place) -> None:
    up(place)
    before = set(place.shown("w").values())
    assert place.run("restart").returncode == 0
    assert not before & set(place.shown("w").values())
    eventually(lambda: warm(place, 1, 3), "the pool is full again")


def test_resizing_and_draining_leave_the_replicas_alone(place: Place) -> None:
    up(place, replicas=2)
    running = replicas(place)
    for size in (5, 1, 0):
        assert place.run("warm", "resize", str(size)).stdout == f"w: {size} of {size} warm\n"
        assert warm(place, 2, size)
    assert replicas(place) == running
    assert place.run("status", "--check").returncode == 0


def busy_one(place: Place) -> Json:
    (found,) = [agent for agent in place.agents("w") if not agent["pooled"]]
    return found


def test_suspended_instances_use_nothing_and_are_not_ready(place: Place) -> None:
    up(place, size=2, command=[sys.executable, "-S", "-c", "while True: pass"])
    eventually(lambda: (busy_one(place)["cpu_percent"] or 0.0) > 5.0, "the replica is measured at work", 30.0)
    idle = [agent for agent in place.agents("w") if agent["pooled"]]
    eventually(lambda: all(agent["cpu_percent"] == 0.0 for agent in place.agents("w") if agent["pooled"]), "instances read 0 %", 30.0)
    assert len(idle) == 2
    assert not any(agent["ready"] for agent in idle)
    fleet = place.client.status("w")["fleets"][0]
    assert (fleet["ready_replicas"], fleet["warm_pool"]["current_size"]) == (1, 2)


def test_what_cannot_be_stopped_in_time_is_killed_from_the_pool_too(place: Place) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
    up(place, size=1, command=stubborn, graceful_drain={"timeout_seconds": 0.2})
    assert place.run("warm", "drain").returncode == 0
    assert warm(place, 1, 0)


def test_status_and_warm_tell_of_the_pool_with_a_dead_daemon(place: Place) -> None:
    up(place)
    ids = set(pool(place))
    place.kill()
    told = place.json("warm", "status")["fleets"][0]
    assert (told["enabled"], told["current_size"], told["target_size"]) == (True, 3, 3)
    assert {instance["id"] for instance in told["instances"]} == ids
    assert place.run("ps").stdout.count("in the warm pool") == 3


def test_up_can_ask_for_a_pool(place: Place) -> None:
    done = place.run("up", "--warm", "2", "--name", "w", "--", *SLEEPER)
    assert done.returncode == 0
    place.run("warm", "fill")
    assert len(pool(place)) == 2
