"""Takes whole lines out of the front of a log while its agent goes on writing. When and how much is `rotation`'s to say.

Where the file system cannot punch holes, nothing is cut from a file in use, because every other way can lose lines.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from functools import cache

from fleetctl.host import logfiles
from fleetctl.host.logfiles import Part

CUTTING = threading.Lock()  # rotation runs in a worker thread while the event loop starts agents
LINE_LIMITS = 4  # a line without end is cut when it is this many times as long as `max_bytes`


def _refusal(found: os.stat_result) -> str:
    """Why this cannot be an agent's log: cutting it would damage what somebody else put in its place."""
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_nlink > 1:
        return "has a second name (hard link)"
    return "" if found.st_uid == os.geteuid() else f"belongs to another user (uid {found.st_uid})"


def stat_own(fd: int) -> os.stat_result:
    """The status of an open log. Where it cannot be an agent's log, closes it and raises OSError."""
    found = os.fstat(fd)
    refusal = _refusal(found)
    if refusal:
        os.close(fd)
        raise OSError(errno.EPERM, refusal)
    return found


def open_live(path: str) -> int:
    """A descriptor to cut the file at `path` with; OSError where that is not an agent's log."""
    fd = logfiles.open_file(path, os.O_RDWR)
    stat_own(fd)
    return fd


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    import ctypes  # here, because a process that only opens logs does not need it

    libc = ctypes.CDLL(None, use_errno=True)
    found = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if found is None:
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    found.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        return 0 if found(fd, mode, offset, length) == 0 else ctypes.get_errno()

    return call


def punch(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back to the file system; the range then reads as NULs, and no offset moves."""
    fallocate = _fallocate()
    while True:
        number = fallocate(fd, 0x01 | 0x02, offset, length) if fallocate else errno.EOPNOTSUPP  # KEEP_SIZE | PUNCH_HOLE
        if number == 0:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def can_punch(fd: int) -> bool:
    """Asked far behind the end, where a punch changes nothing, before a copy is made that would otherwise be for nothing."""
    try:
        punch(fd, os.fstat(fd).st_size + (1 << 30), 4096)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def cut_at(fd: int, start: int, size: int, limit: int) -> int | None:
    """Just behind the last newline inside the limit, else behind the first after it; None while a very long line goes on."""
    offset = start + limit
    while offset > start:
        low = max(start, offset - 65536)
        found = os.pread(fd, offset - low, low).rfind(b"\n")
        if found >= 0:
            return low + found + 1
        offset = low
    bound = start + max(limit * LINE_LIMITS, logfiles.LONGEST_LINE_BYTES)
    offset = start + limit
    while offset < min(size, bound) and (chunk := os.pread(fd, min(logfiles.CHUNK_BYTES, bound - offset), offset)):
        found = chunk.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(chunk)
    return bound if size >= bound else None


def cut(fd: int, path: str, start: int, end: int, position: int, *, keep: bool) -> Part:
    """Take [start, end) out of the live file, into a part; without `keep` the part is left empty and the lines are gone.

    Each step can be the last one this process ever does. Before the rename nothing has happened; after it, the part is where the
    lines are, and `logfiles.locate` sees that the punch is to be done; where the part is empty, it sees that the lines are still there.
    """
    part = logfiles.new_part(path, position, start, end, whole=False)
    temporary = f"{path}.tmp"
    logfiles.unlink(temporary)
    target = logfiles.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if keep:
            _copy(fd, target, start, end - start)
            # After a power failure the copy has to be whole where the punch is known; once for `max_bytes`, so it costs nothing.
            os.fdatasync(target)
        os.rename(temporary, part.path)
    except OSError:
        logfiles.unlink(temporary)
        raise
    finally:
        os.close(target)
    punch(fd, 0, end)
    return part


def _copy(source: int, target: int, offset: int, length: int) -> None:
    end = offset + length
    try:
        while offset < end and (done := os.copy_file_range(source, target, end - offset, offset)):
            offset += done
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
            raise
    while offset < end:
        chunk = os.pread(source, min(logfiles.CHUNK_BYTES, end - offset), offset)
        if not chunk:
            raise OSError(errno.ESTALE, "truncated while it was copied")
        offset += os.write(target, chunk)


def prune(parts: list[Part], keep: int) -> list[Part]:
    """Remove the oldest parts beyond `keep`; the newest is only emptied, and has to be punched before."""
    surplus = parts[: max(0, len(parts) - keep)]
    for part in surplus:
        if part is parts[-1]:
            empty(part.path)
        else:
            logfiles.unlink(part.path)
    return parts[min(len(surplus), len(parts) - 1) :] if parts else []


def empty(path: str) -> None:
    os.close(logfiles.open_file(path, os.O_WRONLY | os.O_TRUNC))
