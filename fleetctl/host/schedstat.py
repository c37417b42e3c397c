"""How long threads ran and how long they waited for a core, in nanoseconds since each began, as Linux tells it in schedstat.

CPU time alone lies on a busy machine: six agents that could each fill a core read a third of one on two cores. What they waited in the
run queue is the rest of what they wanted.
"""

import os
import resource
from collections.abc import Mapping
from typing import NamedTuple

# Reading a thread takes 10 us. An agent with more threads than this is told of by its CPU time alone.
MOST_THREADS = 512


class Times(NamedTuple):
    """Of one thread, in nanoseconds."""

    ran: int
    waited: int


class SchedReader:
    """Reads the threads of processes. Descriptors of processes with one thread are kept: 2 us instead of 12."""

    def __init__(self, keep: int | None = None) -> None:
        self._fds: dict[int, int] = {}
        self._keep = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8 if keep is None else keep
        self.available = os.path.exists("/proc/self/schedstat")

    def read(self, pid: int, threads: int) -> Mapping[int, Times] | None:
        """Each thread's times by its id; None where they cannot be told, or are too many."""
        if not self.available or threads > MOST_THREADS:
            return None
        try:
            if threads == 1:
                return {pid: _parse(self._leader(pid))}
            self.forget(pid)
            found = {}
            for name in os.listdir(f"/proc/{pid}/task"):
                try:
                    found[int(name)] = _parse(_read(f"/proc/{pid}/task/{name}/schedstat"))
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it ended meanwhile
        except (OSError, ValueError, IndexError):  # gone meanwhile, or without descriptors
            return None
        return found

    def _leader(self, pid: int) -> bytes:
        fd = self._fds.get(pid)
        if fd is not None:
            try:
                return os.pread(fd, 256, 0)
            except OSError:  # ESRCH: its process is gone, and another may have the pid
                self.forget(pid)
        fd = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        if len(self._fds) < self._keep:
            self._fds[pid] = fd
            return os.pread(fd, 256, 0)
        try:
            return os.pread(fd, 256, 0)
        finally:
            os.close(fd)

    def forget(self, pid: int) -> None:
        fd = self._fds.pop(pid, None)
        if fd is not None:
            os.close(fd)

    def keep_only(self, pids: Mapping[int, object]) -> None:
        """Let go of processes that are not among these."""
        for pid in [pid for pid in self._fds if pid not in pids]:
            self.forget(pid)

    def close(self) -> None:
        for pid in list(self._fds):
            self.forget(pid)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 256)
    finally:
        os.close(fd)


def _parse(raw: bytes) -> Times:
    ran, waited = raw.split(None, 2)[:2]
    return Times(int(ran), int(waited))
