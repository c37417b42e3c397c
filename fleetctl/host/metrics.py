"""What agents use: CPU and memory of each agent's whole process tree, from one pass over the process table for all of them.

Linux is read from /proc through descriptors that stay open, which is several times cheaper than psutil; psutil reads the machine's own
figures, and everything where there is no such /proc.
"""

import errno
import os
import resource
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, TypedDict

from fleetctl.host import procfs
from fleetctl.host.logread import printable
from fleetctl.host.schedstat import SchedReader, Times
from fleetctl.models import HostUsage, ProcessRef, Usage

SHORTEST_SECONDS = 0.1  # clock ticks are 10 ms: over less than this a percentage is noise
_STATES = {"R": "running", "S": "sleeping", "D": "disk-wait", "T": "stopped", "t": "traced", "Z": "zombie", "X": "dead", "I": "idle"}


class Row(NamedTuple):
    """A process in the table. `cpu`, `reaped`: CPU time of its own and of the children it waited for, in clock ticks."""

    ppid: int
    sid: int
    state: str
    start_ticks: int
    cpu: int
    reaped: int
    rss_bytes: int
    threads: int = 1


class Reader(Protocol):
    def read(self) -> dict[int, Row]:
        """Every process that can be seen, by pid."""
        ...

    def close(self) -> None: ...


def _parse(raw: bytes) -> Row:
    # As procfs.parse, but only the fields that are needed here.
    fields = raw[raw.rindex(b")") + 2 :].split(None, 22)
    return Row(
        int(fields[1]),
        int(fields[3]),
        chr(fields[0][0]),
        int(fields[19]),
        int(fields[11]) + int(fields[12]),
        int(fields[13]) + int(fields[14]),
        int(fields[21]) * procfs.PAGE_BYTES,
        int(fields[17]),
    )


class ProcReader:
    """Reads /proc/PID/stat of every process through descriptors kept open from pass to pass: 5 us a process instead of 12.

    A kept descriptor cannot show another process: once its process is gone it gives ESRCH, whoever has the pid then.
    """

    def __init__(self, keep: int | None = None) -> None:
        self._fds: dict[int, int] = {}
        self._seen: dict[int, tuple[bytes, Row]] = {}
        # Half of the limit: the rest is for the agents' pidfds and the sockets.
        self._keep = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 if keep is None else keep

    def read(self) -> dict[int, Row]:
        try:
            names = os.listdir("/proc")
        except OSError as error:
            self._give_way(error)
            names = os.listdir("/proc")
        pids = [int(name) for name in names if name.isdigit()]
        for pid in self._fds.keys() - set(pids):
            os.close(self._fds.pop(pid))
        seen = {}
        for pid in pids:
            raw = self._stat(pid)
            if raw:
                # Most processes have done nothing since the last pass: then not a byte differs.
                was = self._seen.get(pid)
                seen[pid] = was if was is not None and was[0] == raw else (raw, _parse(raw))
        self._seen = seen
        return {pid: row for pid, (_, row) in seen.items()}

    def _stat(self, pid: int) -> bytes:
        fd = self._fds.get(pid)
        if fd is not None:
            try:
                return os.pread(fd, 2048, 0)
            except OSError:  # ESRCH: its process is gone, and another may have the pid
                os.close(self._fds.pop(pid))
        try:
            fd = self._open(pid)
        except OSError:
            return b""  # gone meanwhile, or not for us to see
        try:
            raw = os.pread(fd, 2048, 0)
        except OSError:
            raw = b""
        if raw and len(self._fds) < self._keep:
            self._fds[pid] = fd
        else:
            os.close(fd)
        return raw

    def _open(self, pid: int) -> int:
        path = f"/proc/{pid}/stat"
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._give_way(error)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _give_way(self, error: OSError) -> None:
        """Where descriptors ran out, close those kept here: others need them, this is only faster with them."""
        if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._fds:
            raise error
        self._keep = len(self._fds) // 2
        self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class PsutilReader:
    """The same table through psutil, for other systems: about ten times dearer."""

    def read(self) -> dict[int, Row]:
        import psutil  # here, because it takes 15 ms and only some need it

        ticks, boot = procfs.TICKS_PER_SECOND, psutil.boot_time()
        letters = {psutil.STATUS_STOPPED: "T", psutil.STATUS_ZOMBIE: "Z", psutil.STATUS_DEAD: "X", psutil.STATUS_RUNNING: "R"}
        rows = {}
        for process in psutil.process_iter():
            try:
                with process.oneshot():
                    times, status = process.cpu_times(), process.status()
                    rows[process.pid] = Row(
                        process.ppid(),
                        os.getsid(process.pid),
                        letters.get(status, "S"),
                        round((process.create_time() - boot) * ticks),
                        round((times.user + times.system) * ticks),
                        round((getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)) * ticks),
                        0 if status == psutil.STATUS_ZOMBIE else process.memory_info().rss,
                    )
            except (psutil.Error, OSError):
                continue  # gone meanwhile, or not for us to see
        return rows

    def close(self) -> None:
        return


def default_reader() -> Reader:
    return ProcReader() if os.path.exists("/proc/self/stat") else PsutilReader()


class _Before(NamedTuple):
    """What an earlier sample saw of an agent: when, of which leader, the CPU time of each process, and what it answered."""

    at: float
    leader_start: int
    spent: Mapping[int, tuple[int, int, int]]  # pid -> start_ticks, cpu, reaped
    threads: Mapping[int, Mapping[int, Times]]  # pid -> thread -> times, of processes that have been read
    cpu_percent: float | None
    demand_percent: float | None
    hottest_percent: float | None


class LocalResourceManager:
    """`ports.ResourceManager` on this machine. Keeps what it saw last, so have one of it, called by one thread at a time."""

    def __init__(self, reader: Reader | None = None, threads: SchedReader | None = None) -> None:
        self._reader = reader or default_reader()
        # Times of threads belong to the processes that ProcReader sees, and to no others.
        self._threads = threads or (SchedReader() if isinstance(self._reader, ProcReader) else None)
        self._before: dict[str, _Before] = {}
        self.trees: Mapping[str, frozenset[tuple[int, int]]] = {}
        """Who belonged to each agent's tree at the last sample, as (pid, start ticks)."""
        self._host_before: tuple[float, float] | None = None

    def sample(self, agents: Mapping[str, ProcessRef], extra: Mapping[str, Iterable[int]] | None = None) -> Mapping[str, Usage]:
        """Usage of each agent's whole tree since the last call, by agent id; agents whose leader is gone are left out.

        To the tree belong the leader, its session, their descendants, and the pids in `extra`: processes that escaped both. Empty
        where the process table cannot be read, for want of descriptors; the next sample then covers the longer time.
        """
        now = time.monotonic()
        try:
            rows = self._reader.read()
        except OSError:
            return {}
        leaders = {ref.pid: name for name, ref in agents.items() if _leads(rows.get(ref.pid), ref)}
        members = _trees(rows, leaders, extra or {})
        usages, before, trees = {}, {}, {}
        for pid, name in leaders.items():
            tree = {member: rows[member] for member in members[name]}
            was = self._before.get(name)
            before[name] = seen = _remember(now, pid, tree, was, self._threads)
            trees[name] = frozenset((member, row.start_ticks) for member, row in tree.items())
            live = [row for row in tree.values() if row.state not in "ZX"]
            usages[name] = Usage(
                cpu_percent=seen.cpu_percent,
                memory_bytes=sum(row.rss_bytes for row in live),
                processes=len(live),
                stopped=rows[pid].state == "T",
                frozen=bool(live) and all(row.state == "T" for row in live),
                demand_percent=seen.demand_percent,
                hottest_percent=seen.hottest_percent,
            )
        self._before, self.trees = before, trees
        if self._threads is not None:
            self._threads.keep_only(rows)
        return usages

    def host_usage(self) -> HostUsage:
        """The machine's own figures since the last call."""
        import psutil  # here, because it takes 15 ms and only the daemon needs it

        times = psutil.cpu_times()
        # Guest time is in user time already.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        busy = total - times.idle - getattr(times, "iowait", 0.0)
        was, self._host_before = self._host_before, (busy, total)
        percent = None
        if was is not None and total > was[1]:
            percent = min(100.0, max(0.0, 100 * (busy - was[0]) / (total - was[1])))
        memory = psutil.virtual_memory()
        return HostUsage(
            cpu_percent=percent,
            cores=_cores(),
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            pressure_percent=_memory_pressure(),
        )

    def close(self) -> None:
        self._reader.close()
        if self._threads is not None:
            self._threads.close()


def _cores() -> int:
    """Those we may use: taskset and containers leave fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _memory_pressure() -> float | None:
    try:
        with open("/proc/pressure/memory", encoding="ascii") as file:
            lines = file.read().splitlines()
        full = next(line for line in lines if line.startswith("full "))
        return float(full.partition("avg10=")[2].split()[0])
    except (OSError, StopIteration, ValueError, IndexError):  # an older kernel, or one built without it
        return None


def _leads(row: Row | None, ref: ProcessRef) -> bool:
    """Whether the pid is still the agent's: a later process with the same pid started at another time."""
    return row is not None and row.start_ticks == ref.start_ticks and row.state not in "ZX"


def _trees(rows: Mapping[int, Row], leaders: Mapping[int, str], extra: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Pids of each tree. A process belongs to its session's leader, else to the nearest leader above it, and so to one agent only."""
    owner: dict[int, str | None] = {pid: name for name, pids in extra.items() for pid in pids}
    # Nearly all are found by their session; only the others' ancestors have to be looked at.
    owner.update({pid: leaders[row.sid] for pid, row in rows.items() if row.sid in leaders})
    owner.update(leaders)
    for pid in rows:
        if pid not in owner:
            _find_owner(pid, rows, owner)
    members: dict[str, list[int]] = {name: [] for name in leaders.values()}
    for pid, owned_by in owner.items():
        if owned_by in members and pid in rows:
            members[owned_by].append(pid)
    return members


def _find_owner(pid: int, rows: Mapping[int, Row], owner: dict[int, str | None]) -> None:
    path = []
    while pid not in owner and pid in rows:
        path.append(pid)
        owner[pid] = None  # ends the walk, should a table that is read in pieces show a circle
        pid = rows[pid].ppid
    found = owner.get(pid)
    for each in path:
        owner[each] = found


def _remember(now: float, leader: int, tree: Mapping[int, Row], was: _Before | None, reader: SchedReader | None) -> _Before:
    leader_start = tree[leader].start_ticks
    known = was if was is not None and was.leader_start == leader_start else None
    if known is not None and now - known.at < SHORTEST_SECONDS:
        return known
    threads = _read_threads(tree, known, reader)
    spent = {pid: (row.start_ticks, row.cpu, row.reaped) for pid, row in tree.items()}
    if known is None:
        return _Before(now, leader_start, spent, threads, None, None, None)
    seconds = now - known.at
    percent = 100 * _spent(tree, known, seconds) / procfs.TICKS_PER_SECOND / seconds
    if reader is None or not reader.available:
        return _Before(now, leader_start, spent, threads, percent, None, None)
    waited, hottest = _wanted(tree, known, threads, _since(seconds))
    scale = 100 / 1e9 / seconds
    # No thread can want more than all of the time; the counters are read a moment apart, and so may say a little more.
    return _Before(now, leader_start, spent, threads, percent, percent + waited * scale, min(100.0, hottest * scale))


def _since(seconds: float) -> float:
    """The start ticks of a process that started so many seconds ago."""
    return (time.clock_gettime(time.CLOCK_BOOTTIME) - seconds) * procfs.TICKS_PER_SECOND - 2


def _read_threads(tree: Mapping[int, Row], was: _Before | None, reader: SchedReader | None) -> dict[int, Mapping[int, Times]]:
    """The threads' times; of a process that did nothing since they were read last, those of then: most are such, and reading costs."""
    if reader is None:
        return {}
    found: dict[int, Mapping[int, Times]] = {}
    for pid, row in tree.items():
        if row.state in "ZX":
            continue
        known = None
        if was is not None and (spent := was.spent.get(pid)) and spent[:2] == (row.start_ticks, row.cpu) and row.state != "R":
            known = was.threads.get(pid)
        times = reader.read(pid, row.threads) if known is None else known
        if times is not None:
            found[pid] = times
    return found


def _wanted(tree: Mapping[int, Row], was: _Before, threads: Mapping[int, Mapping[int, Times]], since: float) -> tuple[int, int]:
    """Nanoseconds that all threads waited for a core since then, and that the busiest one ran or waited."""
    waited = hottest = 0
    for pid, now in threads.items():
        before = was.threads.get(pid) if was.spent.get(pid, (-1,))[0] == tree[pid].start_ticks else None
        if before is now:
            continue
        if before is None and tree[pid].start_ticks < since:
            continue  # never read before, and older than the interval: its past is not this interval's
        for thread, times in now.items():
            earlier = (before or {}).get(thread, Times(0, 0))
            more = max(0, times.waited - earlier.waited)
            waited += more
            hottest = max(hottest, more + max(0, times.ran - earlier.ran))
    return waited, hottest


def _spent(tree: Mapping[int, Row], was: _Before, seconds: float) -> int:
    """Clock ticks that the tree used since then, children that came and went included; never negative.

    When a process is waited for, all it ever used moves into `reaped` of its parent. Of that, what earlier samples had counted is taken
    off. Where nobody waited (SIGCHLD ignored, or the parent outside of the tree), it is simply gone.
    """
    # A process that joined the tree and is older than the last sample brings a past that is not this interval's.
    since = _since(seconds)
    own = reaped = 0
    gone = 0
    for pid, (start, cpu, waited_for) in was.spent.items():
        if pid not in tree or tree[pid].start_ticks != start:
            gone += cpu + waited_for
    for pid, row in tree.items():
        start, cpu, waited_for = was.spent.get(pid, (-1, 0, 0))
        if start == row.start_ticks:
            own += max(0, row.cpu - cpu)
            reaped += max(0, row.reaped - waited_for)
        elif row.start_ticks >= since:
            own += row.cpu
            reaped += row.reaped
    return own + max(0, reaped - gone)


class ProcessInfo(TypedDict):
    pid: int
    ppid: int
    state: str
    command: str


def tree(pid: int, extra: Iterable[int] = ()) -> list[ProcessInfo]:
    """The processes of the tree that this leader has, zombies included, the leader first, for `inspect`."""
    rows = {stat.pid: Row(stat.ppid, stat.sid, stat.state, stat.start_ticks, 0, 0, 0) for stat in procfs.snapshot().values()}
    if pid not in rows:
        return []
    members = _trees(rows, {pid: ""}, {"": extra})[""]
    return [
        {"pid": member, "ppid": rows[member].ppid, "state": _STATES.get(rows[member].state, rows[member].state), "command": command(member)}
        for member in sorted(members, key=lambda member: (member != pid, member))
    ]


def command(pid: int) -> str:
    """The command line of a process as text that is harmless to show; its name in brackets where it has none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            raw = file.read(65536)
        if not raw:
            with open(f"/proc/{pid}/comm", "rb") as file:
                raw = b"[" + file.read().rstrip(b"\n") + b"]"
    except OSError:
        return ""
    return printable(raw.rstrip(b"\0").replace(b"\0", b" ").replace(b"\n", b" "))
