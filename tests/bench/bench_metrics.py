"""What a sampling round costs: with kept descriptors, without, and through psutil, on the same processes in the same run.

Run with `python -m tests.bench.bench_metrics`. Targets: 300 idle agents under 15 ms of CPU a round (0.3 % of a core at one each 5 s), 500
agents of two processes under 10 ms. The floor is to read one file of each of these processes, through kept descriptors, and do nothing
with it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable

from fleetctl.host import procfs
from fleetctl.host.metrics import LocalResourceManager, ProcReader, PsutilReader
from fleetctl.models import ProcessRef

ROUNDS = 15
FAMILY = "sleep 1000 & exec sleep 1000"


def cpu_milliseconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """CPU time of the cheapest round: other work on the machine makes rounds dearer, never cheaper."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken) * 1000


def measure(count: int, argv: list[str], processes: int, target: float) -> None:
    leaders = [subprocess.Popen(argv, start_new_session=True) for _ in range(count)]
    try:
        agents = {}
        for number, leader in enumerate(leaders):
            found = procfs.stat(leader.pid)
            assert found is not None
            agents[f"bench-{number}"] = ProcessRef(pid=leader.pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())
        kept = LocalResourceManager(ProcReader())
        while sum(usage.processes for usage in kept.sample(agents).values()) != count * processes:
            time.sleep(0.05)
        table = procfs.snapshot()
        sessions = {leader.pid for leader in leaders}
        fds = [os.open(f"/proc/{pid}/stat", os.O_RDONLY) for pid, found in table.items() if found.sid in sessions]
        floor = cpu_milliseconds(lambda: [os.pread(fd, 2048, 0) for fd in fds])
        for fd in fds:
            os.close(fd)
        without, by_psutil = LocalResourceManager(ProcReader(keep=0)), LocalResourceManager(PsutilReader())
        figures = {
            "kept descriptors": cpu_milliseconds(lambda: kept.sample(agents)),
            "open, read, close": cpu_milliseconds(lambda: without.sample(agents)),
            "psutil": cpu_milliseconds(lambda: by_psutil.sample(agents), 3),
        }
        kept.close()
        print(f"metrics, {count} agents x {processes}, {len(table)} processes in all: floor {floor:.1f} ms, target {target:.0f} ms")
        for name, figure in figures.items():
            print(f"  {name}: {figure:.1f} ms a round, ratio {figure / floor:.1f}, {figure / 5000 * 100:.2f} % of a core each 5 s")
    finally:
        for leader in leaders:
            os.killpg(leader.pid, signal.SIGKILL)
        for leader in leaders:
            leader.wait()


def main() -> None:
    measure(300, ["sleep", "1000"], 1, 15)
    measure(500, ["sh", "-c", FAMILY], 2, 10)


if __name__ == "__main__":
    main()
