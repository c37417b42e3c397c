"""How soon an autoscaled fleet answers a step in load, and how true its measurements are, on real processes.

`python -m tests.bench.bench_autoscale`, or with the others as `python -m tests.bench autoscale_step demand`.
"""

import os
import signal
import statistics
import subprocess
import sys
import time

from fleetctl.host import procfs
from fleetctl.host.metrics import LocalResourceManager
from fleetctl.models import ProcessRef
from tests.bench.bench_daemon import daemon
from tests.bench.figures import Figure
from tests.real.harness import Place, eventually, spec

INTERVAL_SECONDS, STEPS = 0.5, 5
# Says that all of its slots are taken as soon as it is told so, and before that that none is.
AGENT = """
import os, signal, socket
where = os.environ["NOTIFY_SOCKET"]
tell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
def say(active):
    tell.sendto(f"X_FLEETCTL_ACTIVE={active}\\nX_FLEETCTL_SLOTS=4".encode(), "\\0" + where[1:] if where[0] == "@" else where)
signal.signal(signal.SIGUSR1, lambda *_: say(4))
signal.signal(signal.SIGUSR2, lambda *_: say(0))
say(0)
while True: signal.pause()
"""
SPIN = "while True: pass"


def _ready(place: Place) -> int:
    return int(place.client.status("bench")["fleets"][0]["ready_replicas"])


def bench_step() -> list[Figure]:
    """From the moment at which the agents say that they are full to the first new ready one, out of the warm pool; the slowest of some."""
    taken = []
    with daemon() as place:
        wanted = spec(
            "bench",
            [sys.executable, "-S", "-c", AGENT],
            2,
            min_replicas=2,
            max_replicas=50,
            scale_up_stabilization_seconds=0,
            autoscaling_interval_seconds=INTERVAL_SECONDS,
            warm_pool={"size": 3},
            autoscaling={"metrics_interval_seconds": INTERVAL_SECONDS, "window_seconds": 2 * INTERVAL_SECONDS, "scale_up_rates": []},
        )
        place.client.apply("bench", wanted)
        for _ in range(STEPS):
            before = _ready(place)
            eventually(lambda: place.client.status("bench")["fleets"][0]["warm_pool"]["current_size"] == 3, "the pool is full", 60)
            time.sleep(3 * INTERVAL_SECONDS)  # calm: the rounds are in step with nothing
            agents = [agent["pid"] for agent in place.agents("bench") if not agent["pooled"]]
            began = time.monotonic()
            for pid in agents:
                os.kill(pid, signal.SIGUSR1)
            while _ready(place) <= before:
                time.sleep(0.002)
            taken.append(time.monotonic() - began)
            for pid in agents:
                os.kill(pid, signal.SIGUSR2)
    target = 1000 * INTERVAL_SECONDS + 50
    slowest = Figure(name="step in load to a new ready agent, slowest", value=1000 * max(taken), unit="ms", target=target)
    return [
        slowest,
        Figure(name="step in load to a new ready agent, median", value=1000 * statistics.median(taken), unit="ms", target=target),
    ]


def bench_demand() -> list[Figure]:
    """What spinning agents read on a machine that has a third of a core for each."""
    count = 3 * len(os.sched_getaffinity(0))
    running = [subprocess.Popen([sys.executable, "-S", "-c", SPIN], start_new_session=True) for _ in range(count)]
    try:
        agents = {}
        for number, process in enumerate(running):
            found = procfs.stat(process.pid)
            assert found is not None
            agents[str(number)] = ProcessRef(pid=process.pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())
        manager = LocalResourceManager()
        manager.sample(agents)
        time.sleep(5)
        usage = manager.sample(agents).values()
        lowest = min(one.demand_percent or 0.0 for one in usage)
        manager.close()
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [Figure(name="spinning on a full machine, lowest reading", value=lowest, unit="%", target=95.0, at_least=True)]


BENCHMARKS = {"autoscale_step": bench_step, "demand": bench_demand}


def main() -> None:
    from tests.bench.figures import table

    print(table([figure for bench in BENCHMARKS.values() for figure in bench()]))


if __name__ == "__main__":
    main()
