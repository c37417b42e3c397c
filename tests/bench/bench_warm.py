"""How soon an agent is there: from the warm pool, from a cold start, and, as the floor, continued or started by hand.

`python -m tests.bench.bench_warm [NAME...]`. Times mean something on a quiet machine only; ratios are of the same run.
"""

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fleetctl.client import Client
from tests.bench.bench_daemon import SLEEP, children_of, daemon, wait_for
from tests.bench.figures import Figure, table
from tests.real.harness import Place, eventually, spec

POOL, ACQUISITIONS, ANSWERS, EARLY = 100, 300, 30, 1000
# A service as people write them: it has libraries to import before it can listen.
SERVICE = """
import os, pydantic, uvicorn
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"right"})
uvicorn.run(app, uds=os.environ["STATE_DIRECTORY"] + "/s", lifespan="off", log_level="error")
"""


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def filled(place: Place, size: int) -> bool:
    return place.client.status("bench")["fleets"][0]["warm_pool"]["current_size"] == size


def pooled(size: int, command: Sequence[str], settle: float) -> dict[str, object]:
    return spec(
        "bench", command, 1, max_replicas=10_000, readiness={"settle_seconds": settle}, warm_pool={"enabled": size > 0, "size": size or 1}
    )


def bench_handover() -> list[Figure]:
    """Request read to answer, as the daemon tells it, with 100 suspended agents; refilled meanwhile, asked at random moments."""
    with daemon() as place:
        place.client.apply("bench", pooled(POOL, SLEEP, 0.05))
        eventually(lambda: filled(place, POOL), "the pool is full", 120)
        moments = random.Random(7)
        resting, busy, rows = [], [], []
        for _ in range(ACQUISITIONS // 10):
            eventually(lambda: filled(place, POOL), "the pool is full again", 120)
            time.sleep(0.3)  # the writes behind the last one are over
            resting.append(place.client.acquire("bench", require_warm=True)["seconds"])
        for _ in range(ACQUISITIONS):
            time.sleep(moments.random() * 0.05)
            busy.append(place.client.acquire("bench", require_warm=True)["seconds"])
        eventually(lambda: filled(place, POOL), "the pool is full again", 120)
        for _ in range(POOL // 2):
            rows.append(place.client.acquire("bench", require_warm=True)["seconds"])
    return [
        _milliseconds("acquire, nothing else going on, p50", statistics.median(resting), 1.0),
        _milliseconds("acquire, nothing else going on, worst", max(resting), 5.0),
        _milliseconds("acquire while the pool refills, p50", statistics.median(busy), 1.0),
        _milliseconds("acquire while the pool refills, p99", percentile(busy, 99), 5.0),
        _milliseconds("50 acquired in a row, p50", statistics.median(rows), 1.0),
        _milliseconds("50 acquired in a row, worst", max(rows), 5.0),
    ]


def _milliseconds(name: str, seconds: float, target: float, floor: float | None = None) -> Figure:
    value, by_hand = seconds * 1e3, None if floor is None else floor * 1e3
    return Figure(name=name, value=value, unit="ms", target=target, floor=by_hand, ratio_is_target=False)


def answer(path: str) -> bytes:
    """What the service says; asks again until it listens."""
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(path)
            except OSError:
                time.sleep(0.0002)
                continue
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            received = b""
            while data := connection.recv(4096):
                received += data
            return received


def timed(work: Callable[[], str]) -> float:
    """Until the agent, whose socket the work returns, has answered rightly."""
    began = time.perf_counter()
    path = work()
    assert answer(path).endswith(b"right")
    return time.perf_counter() - began


def service_by_hand(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    os.makedirs(folder)
    environ = {**os.environ, "STATE_DIRECTORY": folder}
    return subprocess.Popen([sys.executable, "-c", SERVICE], env=environ, start_new_session=True), f"{folder}/s"


def bench_first_answer() -> list[Figure]:
    """Asked for an agent -> its first right answer over HTTP, in Python; cold and warm, by fleetctl and by hand."""
    with daemon() as place:

        def acquired() -> str:
            return f"{place.root}/agents/{place.client.acquire('bench', timeout_seconds=60)['agent_id']}/s"

        def cold_by_hand(number: int) -> float:
            found: list[subprocess.Popen[bytes]] = []

            def start() -> str:
                child, path = service_by_hand(f"{place.root}/by-hand-{number}")
                found.append(child)
                return path

            seconds = timed(start)
            found[0].kill()
            found[0].wait()
            return seconds

        service = [sys.executable, "-c", SERVICE]
        place.client.apply("bench", pooled(0, service, 0.0))
        cold = [timed(acquired) for _ in range(ANSWERS // 3)]
        by_hand_cold = [cold_by_hand(number) for number in range(ANSWERS // 3)]
        place.client.scale("bench", 1)
        eventually(lambda: len(place.agents()) == 1, "the cold ones are gone", 60)
        place.client.apply("bench", pooled(ANSWERS + 5, service, 2.0))
        eventually(lambda: filled(place, ANSWERS + 5), "the pool is full", 300)
        warm = []
        for _ in range(ANSWERS):
            time.sleep(0.3)
            warm.append(timed(acquired))

        child, path = service_by_hand(f"{place.root}/by-hand")
        answer(path)
        by_hand_warm = []
        for _ in range(ANSWERS):
            os.killpg(child.pid, signal.SIGSTOP)
            while Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
                time.sleep(0.001)
            time.sleep(0.3)

            def go_on() -> str:
                os.killpg(child.pid, signal.SIGCONT)
                return path

            by_hand_warm.append(timed(go_on))
        child.kill()
        child.wait()
    median = statistics.median
    return [
        _milliseconds("first answer of a cold start, p50", median(cold), 1000.0, median(by_hand_cold)),
        _milliseconds("first answer of a warm one, p50", median(warm), 5.0, median(by_hand_warm)),
        Figure(name="cold / warm", value=median(cold) / median(warm), unit="x", target=50, at_least=True),
    ]


# Slow to be ready, and it says so itself: what it leaves behind just before proves that it was.
SLOW = """
import os, socket, time
time.sleep(0.1 + 0.2 * (os.getpid() % 5) / 5)
with open(os.environ["STATE_DIRECTORY"] + "/ready", "w"):
    pass
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
    told.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
time.sleep(100000)
"""


def bench_early() -> list[Figure]:
    """Agents handed out before they were ready, of 1,000 asked for by four at once, faster than such agents can start."""
    with daemon() as place:
        slow = [sys.executable, "-S", "-E", "-c", SLOW]
        told = {"readiness": {"notify": True}, "warm_pool": {"enabled": True, "size": 8}}
        place.client.apply("bench", spec("bench", slow, 1, max_replicas=10_000, **told))
        eventually(lambda: filled(place, 8), "the pool is full", 60)
        lock, warm, early = threading.Lock(), [0], [0]

        def ask(times: int) -> None:
            client = Client(state_dir=place.root)
            for _ in range(times):
                got = client.acquire("bench", timeout_seconds=60)
                is_ready = os.path.exists(f"{place.root}/agents/{got['agent_id']}/ready")
                client.drain(got["agent_id"], now=True)  # a thousand of them would be too many for the machine
                with lock:
                    early[0] += not is_ready
                    warm[0] += got["from_warm_pool"]

        threads = [threading.Thread(target=ask, args=(EARLY // 4,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [
        Figure(name=f"handed out early, of {EARLY}", value=early[0], unit="", target=0),
        Figure(name="of these from the warm pool", value=100 * warm[0] / EARLY, unit="%", target=1, at_least=True),
    ]


CLEAN = """
import signal, sys
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
while True:
    signal.pause()
"""


def bench_stop_suspended() -> list[Figure]:
    """100 suspended agents and 100 running ones are stopped, by turns: how long until the last is gone, and how many ended cleanly."""
    clean = [sys.executable, "-S", "-E", "-c", CLEAN]
    seconds: dict[str, list[float]] = {"running": [], "suspended": []}
    unclean = 0
    with daemon() as place:
        assert place.daemon is not None
        pid = place.daemon.pid
        for turn in range(6):
            which = "suspended" if turn % 2 else "running"
            pool = {"enabled": which == "suspended", "size": POOL}
            size = POOL + 1 if which == "running" else 1
            at_rest = {"readiness": {"settle_seconds": 1.0}, "max_replicas": 200, "cwd": "/", "warm_pool": pool}
            place.client.apply("bench", spec("bench", clean, size, **at_rest))
            if which == "suspended":
                eventually(lambda: filled(place, POOL), "the pool is full", 120)
            else:
                eventually(lambda: place.settled("bench", POOL + 1), "all are ready", 120)
            time.sleep(1.0)
            began = time.perf_counter()
            place.client.down("bench")
            seconds[which].append(wait_for(lambda: not children_of(pid)) - began)
            eventually(lambda: not place.client.status()["fleets"], "the fleet is gone", 60)
            ended = [event for event in place.client.events("bench", limit=2 * POOL)["events"] if event["kind"] == "agent.stopped"][
                -POOL - 1 :
            ]
            unclean += sum("(exit 0)" not in event["message"] for event in ended) + POOL + 1 - len(ended)
    running, suspended = (statistics.median(seconds[which]) * 1e3 for which in ("running", "suspended"))
    return [
        Figure(name=f"stop {POOL} suspended, running as floor", value=suspended, unit="ms", target=1.2, floor=running),
        Figure(name="of all those stopped, not cleanly", value=unclean, unit="", target=0),
    ]


BENCHMARKS: dict[str, Callable[[], list[Figure]]] = {
    "handover": bench_handover,
    "first_answer": bench_first_answer,
    "early": bench_early,
    "stop-suspended": bench_stop_suspended,
}

if __name__ == "__main__":
    print(table(figure for name in sys.argv[1:] or BENCHMARKS for figure in BENCHMARKS[name]()))
