"""One pass over /proc: who is whose child, in which session, alive or a zombie, started when, and with what in its environment.

Decides nothing. A process that ends while it is read is simply not there.
"""

import errno
import os
import time
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Stat(NamedTuple):
    """Fields of /proc/PID/stat; times in clock ticks, `rss_bytes` in bytes.

    `wait_status`: a zombie's, as wait(2) gives it. `state`: R, S, D, T (stopped), Z (zombie) ...
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    state: str
    start_ticks: int
    cpu_ticks: int
    reaped_cpu_ticks: int
    rss_bytes: int
    wait_status: int

    @property
    def alive(self) -> bool:
        """Whether it still executes: a zombie and a process being taken down do not."""
        return self.state not in "ZX"


@cache
def boot_id() -> str:
    """Differs after every boot, so that nothing recorded before a reboot is taken for alive."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def boot_time() -> float:
    """Unix time, in seconds, at which `start_ticks` counts from zero."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(path: str, *, by_page: bool = False) -> bytes | None:
    """What stands there; None where there is nothing or we may not see it. Raises OSError where we are out of descriptors.

    The difference matters: whoever took the second for the first would bury the living. `by_page`: each read gives what fits on a
    page, which can be less than one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in OUT_OF_MEANS:
            raise
        return None
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
            if len(chunk) < 4096 and not by_page:
                break
        return b"".join(chunks)
    except OSError:
        return None
    finally:
        os.close(fd)


def parse(pid: int, raw: bytes) -> Stat:
    # The command name stands in parentheses and may itself hold spaces and parentheses: count from the last one.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return Stat(
        pid,
        int(fields[1]),
        int(fields[2]),
        int(fields[3]),
        fields[0].decode(),
        int(fields[19]),
        int(fields[11]) + int(fields[12]),
        int(fields[13]) + int(fields[14]),
        int(fields[21]) * PAGE_BYTES,
        int(fields[49]),
    )


def stat(pid: int) -> Stat | None:
    """The process with this pid, zombies included; None where there is none or it cannot be read."""
    raw = _read(f"/proc/{pid}/stat")
    return parse(pid, raw) if raw else None


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def snapshot() -> dict[int, Stat]:
    """Every process of the machine that can be seen, by pid; about 10 us each."""
    return {pid: found for pid in pids() if (found := stat(pid))}


def children(of: int | None = None) -> set[int] | None:
    """Pids of a process's children, by default our own, zombies included; None where this kernel does not tell (CONFIG_PROC_CHILDREN).

    Exact as long as none of them is reaped meanwhile: the kernel counts its way through the list.
    """
    folder = f"/proc/{of or 'self'}/task"
    found: set[int] = set()
    try:
        # A child belongs to the thread that started it or, an orphan, to any of them. Each is a folder, and so one more link.
        alone = of is not None and os.stat(folder).st_nlink == 3
        for thread in [str(of)] if alone else os.listdir(folder):
            raw = _read(f"{folder}/{thread}/children", by_page=True)
            if raw is None and os.path.exists(f"{folder}/{thread}"):
                return None
            found.update(map(int, (raw or b"").split()))
    except FileNotFoundError:
        return set()
    return found


def owner(pid: int) -> int | None:
    """Effective uid of the process; root for one that may not be looked into; None where there is none."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def environ(pid: int) -> dict[str, str]:
    """The environment the process was executed with; empty where it cannot be read or the process wrote over it."""
    raw = _read(f"/proc/{pid}/environ") or b""
    pairs = (item.decode(errors="surrogateescape").partition("=") for item in raw.split(b"\0") if b"=" in item)
    return {name: value for name, _, value in pairs}


def open_files(pid: int) -> set[str]:
    """Paths of the files the process holds open; empty where that cannot be read."""
    folder = f"/proc/{pid}/fd"
    paths = set()
    try:
        for name in os.listdir(folder):
            try:
                paths.add(os.readlink(f"{folder}/{name}"))
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return set()
    return paths
