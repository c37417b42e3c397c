"""Figures of real process trees, and the arithmetic on tables made by hand. Bounds are wide: the machine may be busy."""

import contextlib
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from fleetctl.host import metrics, procfs
from fleetctl.host.metrics import LocalResourceManager, ProcReader, PsutilReader, Reader, Row
from fleetctl.host.schedstat import SchedReader, Times
from fleetctl.models import ProcessRef, Usage

SPIN = "while True: pass"
# For each line it reads a child that works for 20 ms after another, each waited for: nearly all of the time is used by processes that
# are gone. Then it says what the kernel counted of it.
SHORT_LIVED = """
import os, resource, sys, time
def tell():
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(sum(one.ru_utime + one.ru_stime for one in used), flush=True)
tell()
for line in sys.stdin:
    for _ in range(40):
        if not os.fork():
            end = time.process_time() + 0.02
            while time.process_time() < end: pass
            os._exit(0)
        os.wait()
    tell()
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', sys.argv[1]])"
ESCAPE = """
import os, time
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
    print(os.getpid(), flush=True)
time.sleep(600)
"""
HOG = "block = b'x' * 60_000_000; import time; time.sleep(600)"
IDLE = "import time; time.sleep(600)"


@contextmanager
def running(code: str, *arguments: str) -> Iterator[ProcessRef]:
    process = subprocess.Popen([sys.executable, "-S", "-c", code, *arguments], start_new_session=True)
    try:
        yield reference(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reference(pid: int) -> ProcessRef:
    found = procfs.stat(pid)
    assert found is not None
    return ProcessRef(pid=pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def spent(*pids: int) -> float:
    """CPU seconds of these processes and of their children that were waited for."""
    found = [procfs.stat(pid) for pid in pids]
    return sum(stat.cpu_ticks + stat.reaped_cpu_ticks for stat in found if stat) / procfs.TICKS_PER_SECOND


def percent_while(manager: LocalResourceManager, agents: Mapping[str, ProcessRef], pids: list[int], seconds: float) -> tuple[float, float]:
    """What the manager says of agent "a" while these processes use so many CPU seconds, and what the kernel says."""
    manager.sample(agents)
    began, before = time.monotonic(), spent(*pids)
    wait_until(lambda: spent(*pids) >= before + seconds)
    said = manager.sample(agents)["a"].cpu_percent
    assert said is not None
    return said, 100 * (spent(*pids) - before) / (time.monotonic() - began)


@pytest.fixture(params=[ProcReader, PsutilReader])
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    made: Reader = request.param()
    yield made
    made.close()


def test_a_spinning_process_reads_what_the_kernel_says_and_nothing_at_first(reader: Reader) -> None:
    manager = LocalResourceManager(reader)
    with running(SPIN) as process:
        assert manager.sample({"a": process})["a"].cpu_percent is None
        said, true = percent_while(manager, {"a": process}, [process.pid], 0.3)
        assert said == pytest.approx(true, rel=0.2)
        assert said > 20
        usage = manager.sample({"a": process})["a"]
        assert usage.processes == 1
        assert 1_000_000 < usage.memory_bytes < 100_000_000
        assert not usage.stopped


def test_on_a_busy_machine_a_spinning_process_wants_all_of_a_core() -> None:
    """It gets a part of one only: what it waits for is demand too."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack, contextlib.closing(LocalResourceManager()) as manager:
        processes = [stack.enter_context(running(SPIN)) for _ in range(3 * cores)]
        agents = {str(number): process for number, process in enumerate(processes)}
        manager.sample(agents)
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1.0)
        found = list(manager.sample(agents).values())
        used = [usage.cpu_percent or 0.0 for usage in found]
        wanted = [usage.demand_percent or 0.0 for usage in found]
        assert sum(used) / len(used) < 60
        assert sum(wanted) / len(wanted) >= 95
        assert all(90 <= (usage.hottest_percent or 0.0) <= 100 for usage in found)


def test_the_busiest_thread_is_told_apart_from_the_sum() -> None:
    code = """
import threading, time
def work(share):
    while True:
        end = time.thread_time() + 0.01 * share
        while time.thread_time() < end: pass
        time.sleep(0.01 * (1 - share))
threading.Thread(target=work, args=(0.6,)).start()
work(0.2)
"""
    with running(code) as process, contextlib.closing(LocalResourceManager()) as manager:
        wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 2)
        manager.sample({"a": process})
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 0.6)
        usage = manager.sample({"a": process})["a"]
        assert usage.hottest_percent is not None
        assert usage.demand_percent is not None
        assert 20 < usage.hottest_percent < usage.demand_percent


def test_threads_of_processes_that_did_nothing_are_not_read_again() -> None:
    class Counting(SchedReader):
        asked = 0

        def read(self, pid: int, threads: int) -> Mapping[int, Times] | None:
            self.asked += 1
            return super().read(pid, threads)

    counting = Counting()
    with running(IDLE) as process, contextlib.closing(LocalResourceManager(ProcReader(), counting)) as manager:
        wait_until(lambda: reference_state(process.pid) == "S")
        manager.sample({"a": process})
        for _ in range(3):
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + metrics.SHORTEST_SECONDS)  # noqa: B023 - called at once
            assert manager.sample({"a": process})["a"].demand_percent is not None
        assert counting.asked <= 2  # the first look may have come before its start was over


def test_without_times_of_threads_only_cpu_time_is_told() -> None:
    silent = SchedReader()
    silent.available = False
    with running(SPIN) as process, contextlib.closing(LocalResourceManager(ProcReader(), silent)) as manager:
        manager.sample({"a": process})
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 0.2)
        usage = manager.sample({"a": process})["a"]
        assert usage.cpu_percent is not None
        assert (usage.demand_percent, usage.hottest_percent) == (None, None)


def test_the_machine_has_cores_and_memory() -> None:
    with contextlib.closing(LocalResourceManager()) as manager:
        assert manager.host_usage().cpu_percent is None
        found = manager.host_usage()
        assert 1 <= found.cores <= (os.cpu_count() or 1)
        assert 0 < found.memory_available_bytes <= found.memory_total_bytes
        assert found.pressure_percent is None or 0 <= found.pressure_percent <= 100


def test_an_agent_of_short_lived_children_reads_within_a_tenth_of_what_the_kernel_counted(
    reader: Reader, clock: Callable[[float], None]
) -> None:
    """However often it is looked at meanwhile. The clock stands still but for the samples: how long each took is no matter."""
    manager = LocalResourceManager(reader)

    def seconds() -> float:
        clock(1.0)
        percent = manager.sample(agents)["a"].cpu_percent
        return 0.0 if percent is None else percent / 100

    words = [sys.executable, "-S", "-c", SHORT_LIVED]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdin
        assert process.stdout
        agents, before = {"a": reference(process.pid)}, float(process.stdout.readline())
        said = seconds()
        print(file=process.stdin, flush=True)
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while not poll.poll(70):
            said += seconds()
        true = float(process.stdout.readline()) - before
        said += seconds()
        process.stdin.close()
    assert true >= 0.8
    assert said == pytest.approx(true, rel=0.1)


def test_cpu_and_memory_of_a_child_are_its_agent_s(reader: Reader) -> None:
    manager = LocalResourceManager(reader)
    with running(PARENT, HOG) as hungry, running(PARENT, IDLE) as modest:
        agents = {"hungry": hungry, "modest": modest}
        wait_until(lambda: manager.sample(agents)["hungry"].memory_bytes > 60_000_000)
        usages = manager.sample(agents)
        assert usages["hungry"].processes == 2
        wait_until(lambda: manager.sample(agents)["modest"].processes == 2)
        assert usages["modest"].memory_bytes < 60_000_000


def test_a_suspended_agent_is_stopped_and_uses_nothing(reader: Reader) -> None:
    manager = LocalResourceManager(reader)
    with running(SPIN) as process:
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: manager.sample({"a": process})["a"].stopped)
        began = time.monotonic()
        manager.sample({"a": process})
        wait_until(lambda: time.monotonic() > began + 0.25)
        first = manager.sample({"a": process})["a"]
        wait_until(lambda: time.monotonic() > began + 0.5)
        last = manager.sample({"a": process})["a"]
        assert last == Usage(
            cpu_percent=0.0,
            memory_bytes=first.memory_bytes,
            processes=1,
            stopped=True,
            frozen=True,
            demand_percent=last.demand_percent,
            hottest_percent=last.hottest_percent,
        )
        assert not last.demand_percent
        assert not last.hottest_percent
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: not manager.sample({"a": process})["a"].stopped)


def test_a_dead_leader_is_left_out_reaped_or_not(reader: Reader) -> None:
    manager = LocalResourceManager(reader)
    process = subprocess.Popen([sys.executable, "-S", "-c", IDLE], start_new_session=True)
    agents = {"a": reference(process.pid)}
    assert "a" in manager.sample(agents)
    process.kill()
    wait_until(lambda: (found := procfs.stat(process.pid)) is not None and found.state == "Z")
    assert manager.sample(agents) == {}
    process.wait()
    assert manager.sample(agents) == {}


def test_a_later_process_with_the_pid_of_an_agent_is_left_out(reader: Reader) -> None:
    manager = LocalResourceManager(reader)
    with running(IDLE) as process:
        earlier = ProcessRef(pid=process.pid, start_ticks=process.start_ticks - 100, boot_id=process.boot_id)
        assert manager.sample({"a": earlier}) == {}
        assert manager.sample({"a": process}).keys() == {"a"}


def test_both_readers_show_the_same_table() -> None:
    with running(PARENT, SPIN) as parent, running(IDLE) as idle, running(SHORT_LIVED):
        os.kill(idle.pid, signal.SIGSTOP)
        wait_until(lambda: reference_state(idle.pid) == "T")
        wait_until(lambda: len(metrics.tree(parent.pid)) == 2)
        pids = [parent.pid, idle.pid, next(info["pid"] for info in metrics.tree(parent.pid) if info["pid"] != parent.pid)]
        with contextlib.closing(ProcReader()) as reader:
            by_proc, by_psutil = reader.read(), PsutilReader().read()
        for pid in pids:
            ours, theirs = by_proc[pid], by_psutil[pid]
            assert (ours.ppid, ours.sid) == (theirs.ppid, theirs.sid)
            assert ours.start_ticks == theirs.start_ticks == reference(pid).start_ticks
            assert abs(ours.cpu - theirs.cpu) < 100
            assert abs(ours.reaped - theirs.reaped) < 100
        assert by_proc[idle.pid].state == by_psutil[idle.pid].state == "T"
        # Of the stopped one only: the others may still be growing between the two looks.
        assert by_proc[idle.pid].rss_bytes == pytest.approx(by_psutil[idle.pid].rss_bytes, abs=1_000_000)


def reference_state(pid: int) -> str:
    found = procfs.stat(pid)
    return found.state if found else ""


def test_a_double_forked_process_in_a_session_of_its_own_is_counted_when_it_is_named() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ESCAPE], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    escaped = int(process.stdout.readline())
    try:
        agents = {"a": reference(process.pid)}
        with contextlib.closing(LocalResourceManager()) as manager:
            wait_until(lambda: manager.sample(agents)["a"].processes == 1)
            assert manager.sample(agents, {"a": [escaped]})["a"].processes == 2
        assert [info["pid"] for info in metrics.tree(process.pid, [escaped]) if info["state"] != "zombie"] == [process.pid, escaped]
    finally:
        os.kill(escaped, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_kept_descriptors_are_bounded_and_given_back() -> None:
    def open_now() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, reader = open_now(), ProcReader(keep=5)
    with running(IDLE) as process:
        for _ in range(3):
            assert process.pid in reader.read()
            assert open_now() <= before + 5
    reader.close()
    assert open_now() == before


def test_descriptors_of_processes_that_ended_are_closed() -> None:
    reader = ProcReader(keep=10_000)
    with running(IDLE) as process:
        reader.read()
        assert process.pid in reader._fds
    assert process.pid not in reader.read()
    assert process.pid not in reader._fds
    reader.close()


def test_a_kept_descriptor_of_a_pid_that_another_process_has_by_now_is_not_believed() -> None:
    reader = ProcReader()
    with running(IDLE) as process, running(IDLE) as other:
        stale = subprocess.Popen(["true"])
        fd = os.open(f"/proc/{stale.pid}/stat", os.O_RDONLY)
        stale.wait()
        reader._fds[process.pid] = fd  # as if the pid had been `stale`'s
        assert reader.read()[process.pid].start_ticks == process.start_ticks
        assert reader.read()[other.pid].start_ticks == other.start_ticks
    reader.close()


def test_without_free_descriptors_the_table_is_read_all_the_same() -> None:
    code = """
import os, resource
from fleetctl.host.metrics import ProcReader
reader = ProcReader(keep=1000)
everybody = set(reader.read())
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True: taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
reader._fds.popitem()
missing = everybody - set(reader.read())
print(len([pid for pid in missing if os.path.exists(f"/proc/{pid}")]), len(reader._fds) < 1000)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "0 True\n", answer


def test_without_any_descriptor_nothing_is_told_and_nothing_is_lost(clock: Callable[[float], None]) -> None:
    table = Table()
    manager = LocalResourceManager(table)
    table.rows = {10: row(1, 10)}
    manager.sample(LEADER)
    clock(1.0)
    table.error = OSError(errno.EMFILE, "Too many open files")
    assert manager.sample(LEADER) == {}
    clock(1.0)
    table.error = None
    table.rows = {10: row(1, 10, 50)}
    assert manager.sample(LEADER)["a"].cpu_percent == pytest.approx(2500 / procfs.TICKS_PER_SECOND)


def test_half_of_the_descriptors_are_left_to_others() -> None:
    assert ProcReader()._keep == resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


class Table:
    """A process table made by hand."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.error: OSError | None = None

    def read(self) -> dict[int, Row]:
        if self.error:
            raise self.error
        return dict(self.rows)

    def close(self) -> None:
        return


def now_ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * procfs.TICKS_PER_SECOND)


def row(ppid: int, sid: int, cpu: int = 0, reaped: int = 0, state: str = "S", start: int = 7) -> Row:
    return Row(ppid, sid, state, start, cpu, reaped, 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    return advance


LEADER = {"a": ProcessRef(pid=10, start_ticks=7, boot_id="")}


@pytest.mark.parametrize(
    ("before", "after", "ticks"),
    [
        pytest.param({10: row(1, 10, 100)}, {10: row(1, 10, 150)}, 50, id="its own"),
        pytest.param({10: row(1, 10), 11: row(10, 10, 300)}, {10: row(1, 10), 11: row(10, 10, 330)}, 30, id="a child"),
        pytest.param({10: row(1, 10, 0, 0), 11: row(10, 10, 90)}, {10: row(1, 10, 0, 100)}, 10, id="a child was waited for"),
        pytest.param({10: row(1, 10, 0, 0), 11: row(10, 10, 90)}, {10: row(1, 10, 5, 0)}, 5, id="a child ended and nobody waited"),
        pytest.param({10: row(1, 10)}, {10: row(1, 10, 0, 40)}, 40, id="a child came and went"),
        pytest.param({10: row(1, 10)}, {10: row(1, 10), 12: row(11, 12, 900)}, 0, id="a stranger"),
        pytest.param({10: row(1, 10)}, {10: row(1, 10), 12: row(10, 12, 900)}, 0, id="an old process joined"),
        pytest.param(
            {10: row(1, 10), 11: row(10, 10, 50)},
            {10: row(1, 10), 11: row(10, 10, 55, state="Z")},
            5,
            id="a zombie is counted until it is waited for",
        ),
        pytest.param({10: row(1, 10, 500)}, {10: row(1, 10, 400)}, 0, id="never negative"),
    ],
)
def test_cpu_is_what_the_tree_used_since_the_last_sample(
    before: dict[int, Row], after: dict[int, Row], ticks: int, clock: Callable[[float], None]
) -> None:
    table = Table()
    manager = LocalResourceManager(table)
    table.rows = before
    assert manager.sample(LEADER)["a"].cpu_percent is None
    clock(2.0)
    table.rows = after
    assert manager.sample(LEADER)["a"].cpu_percent == pytest.approx(100 * ticks / procfs.TICKS_PER_SECOND / 2)


def test_a_new_child_counts_with_all_it_used(clock: Callable[[float], None]) -> None:
    table = Table()
    manager = LocalResourceManager(table)
    table.rows = {10: row(1, 10)}
    manager.sample(LEADER)
    clock(1.0)
    table.rows = {10: row(1, 10), 11: row(10, 10, 30, 12, start=now_ticks())}
    assert manager.sample(LEADER)["a"].cpu_percent == pytest.approx(100 * 42 / procfs.TICKS_PER_SECOND)


def test_two_looks_in_a_row_give_the_same_figure_and_lose_nothing(clock: Callable[[float], None]) -> None:
    table = Table()
    manager = LocalResourceManager(table)
    table.rows = {10: row(1, 10, 0)}
    manager.sample(LEADER)
    clock(1.0)
    table.rows = {10: row(1, 10, 50)}
    assert manager.sample(LEADER)["a"].cpu_percent == pytest.approx(5000 / procfs.TICKS_PER_SECOND)
    clock(0.01)
    table.rows = {10: row(1, 10, 51)}
    assert manager.sample(LEADER)["a"].cpu_percent == pytest.approx(5000 / procfs.TICKS_PER_SECOND)
    clock(0.99)
    assert manager.sample(LEADER)["a"].cpu_percent == pytest.approx(100 / procfs.TICKS_PER_SECOND)


def test_a_replaced_leader_starts_anew(clock: Callable[[float], None]) -> None:
    table = Table()
    manager = LocalResourceManager(table)
    table.rows = {10: row(1, 10, 900)}
    manager.sample(LEADER)
    clock(1.0)
    table.rows = {10: row(1, 10, 3, start=9)}
    assert manager.sample(LEADER) == {}
    assert manager.sample({"a": ProcessRef(pid=10, start_ticks=9, boot_id="")})["a"].cpu_percent is None


def test_trees_are_made_of_sessions_and_descendants_and_every_process_has_one_owner() -> None:
    rows = {
        1: row(0, 1),
        10: row(1, 10),
        11: row(10, 10),
        12: row(11, 12),  # a session of its own, but a descendant
        13: row(12, 12),
        14: row(1, 10),  # its parent is gone, but it is of the session
        20: row(13, 20),  # another agent, below the first
        21: row(20, 20),
        22: row(21, 22),
        30: row(1, 30),
        40: row(41, 40),
        41: row(40, 41),  # a circle, as a table read in pieces can show
        50: row(1, 50),  # escaped, but named
        51: row(50, 51),
        60: row(30, 30),  # an agent in a session that is not its own
    }
    agents = {name: ProcessRef(pid=pid, start_ticks=7, boot_id="") for name, pid in (("a", 10), ("b", 20), ("c", 60))}
    table = Table()
    table.rows = rows
    usages = LocalResourceManager(table).sample(agents, {"a": [50, 999]})
    assert {name: usage.processes for name, usage in usages.items()} == {"a": 7, "b": 3, "c": 1}
    assert usages["a"].memory_bytes == 7000


def test_zombies_are_no_processes_and_take_no_memory() -> None:
    table = Table()
    table.rows = {10: row(1, 10), 11: row(10, 10, state="Z")}
    assert LocalResourceManager(table).sample(LEADER)["a"] == Usage(cpu_percent=None, memory_bytes=1000, processes=1)


def test_tree_tells_of_each_process_what_it_runs_without_control_characters() -> None:
    with running(PARENT, IDLE + " # \x1b[31m\tred\n") as process:
        wait_until(lambda: len(metrics.tree(process.pid)) == 2 and "sleep" in metrics.tree(process.pid)[1]["command"])
        wait_until(lambda: metrics.tree(process.pid)[1]["state"] == "sleeping")
        parent, child = metrics.tree(process.pid)
        assert (parent["pid"], parent["ppid"], child["ppid"]) == (process.pid, os.getpid(), process.pid)
        assert child["command"].endswith("import time; time.sleep(600) #     red ")
        assert "\x1b" not in parent["command"] + child["command"]


def test_tree_of_a_pid_that_is_gone_is_empty() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert metrics.tree(process.pid) == []
    assert metrics.command(process.pid) == ""


def test_the_machine_s_own_figures() -> None:
    manager = LocalResourceManager()
    first = manager.host_usage()
    assert first.cpu_percent is None
    assert first.cores == os.cpu_count()
    assert 0 < first.memory_available_bytes <= first.memory_total_bytes
    assert first.memory_total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with running(SPIN) as process:
        start = spent(process.pid)
        wait_until(lambda: spent(process.pid) > start + 0.2)
        percent = manager.host_usage().cpu_percent
    assert percent is not None
    assert 2 < percent <= 100


def test_psutil_is_loaded_only_where_it_is_needed() -> None:
    code = (
        "import sys; from fleetctl.host.metrics import LocalResourceManager as Manager; "
        "Manager().sample({}); print('psutil' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
