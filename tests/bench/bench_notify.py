"""What a million senseless messages of one agent cost the others: the daemon's answers, their own words, descriptors, memory.

`python -m tests.bench notify`.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.bench.bench_daemon import daemon, wait_for
from tests.bench.figures import Figure
from tests.real.harness import ROOT, eventually, spec

MESSAGES = 1_000_000
NOTIFY = {"readiness": {"notify": True}, "environment": {"PYTHONPATH": str(ROOT)}}
# Random bytes, sizes and descriptors, as fast as they are taken.
FUZZES = f"""
import array, os, random, socket, time
source, reader = random.Random(7), os.pipe()[0]
out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
words = [b"READY=1", b"X_FLEETCTL_PENDING=", b"X_FLEETCTL_METRIC=a=", b"WATCHDOG=trigge", b"STATUS=", b"EXTEND_TIMEOUT_USEC="]
for _ in range({MESSAGES}):
    data = source.choice(words) + source.randbytes(source.choice((0, 3, 3, 50, 50, 4096, 9000)))
    descriptors = array.array("i", [reader] * source.choice((0,) * 57 + (1, 2, 250)))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
    out.sendmsg([data], rights, 0, os.environ["NOTIFY_SOCKET"])
open(os.environ["STATE_DIRECTORY"] + "/done", "w").close()
time.sleep(1000)
"""
SPEAKS = "from fleetctl import agent; import time; agent.ready('at work'); time.sleep(1000)"


def bench_notify() -> list[Figure]:
    with daemon() as place:
        assert place.daemon is not None
        pid = place.daemon.pid
        place.client.apply("fuzz", spec("fuzz", [sys.executable, "-c", FUZZES], 1, restart={"policy": "never"}))
        eventually(lambda: place.agents("fuzz")[0]["dropped_messages"] > 1000, "it floods")
        before, began, answers = resident_bytes(pid), time.perf_counter(), list[float]()
        asking = threading.Event()
        asker = threading.Thread(target=ask, args=(place.root, answers, asking))
        asker.start()
        ready = []
        for number in range(5):
            name = f"w{number}"
            asked = time.perf_counter()
            place.client.apply(name, spec(name, [sys.executable, "-c", SPEAKS], 1, **NOTIFY))
            eventually(lambda: place.agents(name)[0]["ready"], "another agent is heard")  # noqa: B023 - called at once
            ready.append(time.perf_counter() - asked)
        agent_id = place.agents("fuzz")[0]["id"]
        done = Path(place.root, "agents", agent_id, "done")
        wait_for(done.exists)
        took = time.perf_counter() - began
        asking.set()
        asker.join()
        grown = resident_bytes(pid) - before
        left = pipes(pid)
        lost = [agent for agent in place.agents() if agent["state"] != "running" or agent["restarts"]]
    slow = sorted(answers)[len(answers) * 99 // 100]
    return [
        Figure(name="a million senseless messages", value=took, unit="s", target=300.0),
        Figure(name="status meanwhile, 99 of 100", value=slow * 1000, unit="ms", target=100.0),
        Figure(name="another agent's READY=1 meanwhile, slowest", value=max(ready) * 1000, unit="ms", target=1500.0),
        Figure(name="descriptors left over", value=left, unit="", target=0.0),
        Figure(name="memory of the daemon, grown by", value=grown / 1e6, unit="MB", target=10.0),
        Figure(name="agents that came to harm", value=len(lost), unit="", target=0.0),
    ]


def ask(root: str, answers: list[float], enough: threading.Event) -> None:
    from fleetctl.client import Client

    with Client(root) as client:
        while not enough.wait(0.05):
            began = time.perf_counter()
            client.status()
            answers.append(time.perf_counter() - began)


def pipes(pid: int) -> int:
    """How many ends of pipes the process holds: what it was sent; it has none of its own."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/{pid}/fd/{name}").startswith("pipe:")
    return found


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


BENCHMARKS = {"notify": bench_notify}
