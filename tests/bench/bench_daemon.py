"""What fleetctl costs on top of doing the same by hand: start, replace, stop, idle, the command line, and output.

`python -m tests.bench [NAME...]`; each figure has its floor from the same run beside it. Ratios mean something on any
machine, times do not; and a machine that is busy otherwise makes even ratios unsteady.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_state_dir

from tests.bench.figures import Figure, table
from tests.real.harness import Place, eventually, spec

AGENTS, IDLE_AGENTS = 100, 300
IDLE_SECONDS = float(os.environ.get("FLEETCTL_BENCH_IDLE_SECONDS", "60"))
ROUNDS, KILLS, CALLS = 7, 60, 21
OUTPUT_BYTES = 200_000_000
SLEEP = ["sleep", "100000"]
AT_ONCE = {"readiness": {"settle_seconds": 0.0}, "max_replicas": 1000, "cwd": "/"}


@contextmanager
def daemon() -> Iterator[Place]:
    """A daemon whose state is where users have theirs, or in FLEETCTL_BENCH_DIR.

    Not in /tmp: on ext4 a new file has to step over every inode that was removed nearby in the last minutes, which after a run of the
    tests makes a start three times as slow.
    """
    home = Path(os.environ.get("FLEETCTL_BENCH_DIR") or user_state_dir("fleetctl-bench", appauthor=False))
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="fleet-") as folder:
        place = Place(Path(folder))
        try:
            place.start()
            yield place
        finally:
            place.close()
    with suppress(OSError):  # another run may be using it
        home.rmdir()


def spawn_by_hand(count: int, log: int) -> list[subprocess.Popen[bytes]]:
    """The floor: a loop that starts the same processes in the same way."""
    return [subprocess.Popen(SLEEP, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True) for _ in range(count)]


def reap_by_hand(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        os.killpg(child.pid, signal.SIGTERM)
    for child in children:
        child.wait()


def children_of(pid: int) -> list[int]:
    """Cheap enough to be asked for all the time, unlike a pass over /proc."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool]) -> float:
    """The time at which it holds."""
    while not condition():
        time.sleep(0.0005)
    return time.perf_counter()


def bench_start_and_stop() -> list[Figure]:
    """0 -> 100 until the last process executes; 100 -> 0 until the last one is gone."""
    starts, stops, hand_starts, hand_stops = [], [], [], []
    with daemon() as place, open(os.devnull, "wb") as nowhere:
        assert place.daemon is not None
        pid = place.daemon.pid
        place.client.apply("bench", spec("bench", SLEEP, 0, **AT_ONCE))
        for _ in range(ROUNDS):
            began = time.perf_counter()
            children = spawn_by_hand(AGENTS, nowhere.fileno())
            hand_starts.append(time.perf_counter() - began)
            began = time.perf_counter()
            reap_by_hand(children)
            hand_stops.append(time.perf_counter() - began)

            began = time.perf_counter()
            place.client.scale("bench", AGENTS)
            starts.append(wait_for(lambda: len(children_of(pid)) == AGENTS) - began)
            eventually(lambda: place.settled("bench", AGENTS), "all are ready")
            began = time.perf_counter()
            place.client.scale("bench", 0)
            stops.append(wait_for(lambda: not children_of(pid)) - began)
            eventually(lambda: not place.agents(), "all are forgotten")
    return [
        _milliseconds(f"start {AGENTS} agents", starts, hand_starts, 2.0),
        _milliseconds(f"stop {AGENTS} agents", stops, hand_stops, 3.0),
    ]


def _milliseconds(name: str, found: Sequence[float], floor: Sequence[float], target: float) -> Figure:
    return Figure(name=name, value=statistics.median(found) * 1e3, unit="ms", target=target, floor=statistics.median(floor) * 1e3)


def bench_replace() -> list[Figure]:
    """SIGKILL -> the replacement executes: each process writes a byte to a fifo first. The floor waits in waitpid and spawns again."""
    with daemon() as place:
        fifo = f"{place.root}/fifo"
        os.mkfifo(fifo)
        ears = os.open(fifo, os.O_RDWR)
        command = ["sh", "-c", f"echo >{fifo}; exec sleep 100000"]

        def kill(pid: int) -> float:
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            os.read(ears, 1)
            return time.perf_counter() - began

        healthy = {"healthy_after_seconds": 0.001, "crash_loop_failures": 1000}  # each kill is a first failure, without a wait
        place.client.apply("bench", spec("bench", command, 1, restart=healthy, **AT_ONCE))
        os.read(ears, 1)
        found, floor = [], []
        hand = subprocess.Popen(command, start_new_session=True)
        os.read(ears, 1)
        for _ in range(KILLS):
            eventually(lambda: place.settled("bench", 1), "the agent is ready")
            found.append(kill(place.agents()[0]["pid"]))

            def replace_by_hand(dead: "subprocess.Popen[bytes]") -> None:
                nonlocal hand
                dead.wait()
                hand = subprocess.Popen(command, start_new_session=True)

            thread = threading.Thread(target=replace_by_hand, args=(hand,))
            thread.start()
            time.sleep(0.005)  # so that the thread waits already
            floor.append(kill(hand.pid))
            thread.join()
        hand.kill()
        hand.wait()
        os.close(ears)
    value, least = statistics.median(found) * 1e3, statistics.median(floor) * 1e3
    return [Figure(name="replace a killed agent, p50", value=value, unit="ms", target=5.0, floor=least, ratio_is_target=False)]


def bench_idle() -> list[Figure]:
    """CPU and memory of a daemon that looks after 300 agents that do nothing."""
    with daemon() as place:
        assert place.daemon is not None
        pid = place.daemon.pid
        place.client.apply("bench", spec("bench", SLEEP, IDLE_AGENTS, **AT_ONCE))
        eventually(lambda: place.settled("bench", IDLE_AGENTS), "all are ready", 60)
        time.sleep(6)  # the first round of measurements, which opens files
        began, before = time.perf_counter(), _cpu_seconds(pid)
        time.sleep(IDLE_SECONDS)
        percent = (_cpu_seconds(pid) - before) / (time.perf_counter() - began) * 100
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        pss = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return [
        Figure(name=f"idle CPU, {IDLE_AGENTS} agents, {IDLE_SECONDS:g} s", value=percent, unit="%", target=0.5),
        Figure(name=f"memory (PSS), {IDLE_AGENTS} agents", value=pss, unit="MB", target=45.0),
    ]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_commands() -> list[Figure]:
    """Whole commands, as a person starts them, beside an interpreter that does nothing."""
    with daemon() as place:
        place.client.apply("bench", spec("bench", SLEEP, AGENTS, **AT_ONCE))
        eventually(lambda: place.settled("bench", AGENTS), "all are ready")
        program = str(Path(sys.executable).with_name("fleetctl"))
        environ = place.environ() | {"FLEETCTL_STATE_DIR": place.root}
        environ.pop("PYTHONPATH")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "scale 100": [program, "scale", str(AGENTS)],
            "status --once --json": [program, "status", "--once", "--json"],
            "ps --json": [program, "ps", "--json"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(CALLS):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
                times[name].append(time.perf_counter() - began)
    floor = times.pop("python -c pass")
    return [_milliseconds(f"fleetctl {name}, {AGENTS} agents", found, floor, 7.0) for name, found in times.items()]


def bench_output() -> list[Figure]:
    """200 MB of an agent's output, in blocks of 8 KiB, into a log that is rotated and into a plain file."""
    code = (
        "import os, time\nblock = (b'x' * 127 + b'\\n') * 64\nbegan = time.perf_counter()\n"
        f"for _ in range({OUTPUT_BYTES} // len(block)): os.write(1, block)\n"
        "took = time.perf_counter() - began\nopen(os.environ['TOOK'], 'w').write(f'{took}\\n')\ntime.sleep(1000)"
    )
    command = [sys.executable, "-S", "-c", code]
    found, floor = [], []
    with daemon() as place:
        for number in range(ROUNDS):
            took = Path(place.root, f"took-{number}")
            with open(f"{place.root}/plain", "ab") as plain:
                child = subprocess.Popen(command, stdout=plain, env={**os.environ, "TOOK": str(took)})
                floor.append(_seconds_in(took))
                child.kill()
                child.wait()
            os.unlink(f"{place.root}/plain")
            took.unlink()
            place.client.apply("bench", spec("bench", command, 1, environment={"TOOK": str(took)}))
            found.append(_seconds_in(took))
            place.run("down", "--now")
    rate, plain_rate = (OUTPUT_BYTES / statistics.median(times) / 1e6 for times in (found, floor))
    return [Figure(name="output of one agent, 200 MB", value=rate, unit="MB/s", target=0.95, floor=plain_rate, at_least=True)]


def _seconds_in(path: Path) -> float:
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    return float(path.read_text())


BENCHES = {
    "start-stop": bench_start_and_stop,
    "replace": bench_replace,
    "commands": bench_commands,
    "output": bench_output,
    "idle": bench_idle,
}


def main(names: Sequence[str]) -> int:
    figures: list[Figure] = []
    for name in names or BENCHES:
        for figure in BENCHES[name]():
            print(figure, flush=True)
            figures.append(figure)
    print("\n" + table(figures))
    return 0 if all(figure.met for figure in figures) else 1
