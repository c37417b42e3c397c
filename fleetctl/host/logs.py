"""Agents' output: a file that the agent appends to by itself, cut from the front while it goes on writing, read as one stream.

The agent holds an O_APPEND descriptor of `<agent>.log` and never learns of any of this. To rotate, whole lines at the front of that
file are copied to a file whose name says which bytes they were, and their blocks are then taken out of the live file
(`fallocate(PUNCH_HOLE)`), which moves no offset. The rename of the copy is the moment that counts, and nothing else is recorded:

    <agent>.log                           the live file; a hole up to the end of the newest copy, then lines
    <agent>.log.<position>.<start>-<end>  copied out of bytes [start, end) of a live file
    <agent>.log.<position>.<start>+<end>  a live file itself, set aside when a new instance started; its lines begin at byte `start`
    <agent>.log.idx                       when the log had which length, for `--since`
    <agent>.log.tmp                       a copy being made; worth nothing until it is renamed

`position` counts the bytes of the agent's output since the first one, over all files. The newest copy is emptied, never removed, while
its agent lives: its name is the record of where the live file's lines begin.

Where the file system cannot punch holes, nothing is cut from a file in use, because every other way can lose lines; the check says
so, and the file is set aside when the agent's next instance starts. Only one process, the daemon, cuts; any number may read, also
while it cuts. Lines can be lost where somebody deletes or truncates the live file, and only there. Imports little, because the `logs`
command reads through this module.
"""

import errno
import fcntl
import os
import re
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from fleetctl.errors import StateDirectoryError
from fleetctl.host.paths import Paths

if TYPE_CHECKING:
    from fleetctl.models import LogSpec

SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 5.0
GONE_AGENTS_KEPT = 200  # agents come and go with the load; without a limit their small logs pile up to the cap, 4 KiB each
CUTS_PER_CHECK = 64  # an agent that writes faster than a disk copies must not hold up the others for ever
LINE_LIMITS = 4  # a line without end is cut when it is this many times as long as `max_bytes`
LONGEST_LINE_BYTES = 1024 * 1024  # a reader hands out an unfinished line when it is this long

_CHUNK = 256 * 1024
# Patterns are compiled when first used (and then kept by `re`): half of the time that importing this module takes.
_PART = r"(.+)\.log\.([0-9]+)\.([0-9]+)([-+])([0-9]+)"
_RECORD = struct.Struct("<dQ")  # Unix time, length of the whole output at that time
_RECORDS, _RECORDS_IN_FULL, _RECORD_SECONDS = 4096, 1024, 1.0
_ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
_CONTROLS = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]"
_CUTTING = threading.Lock()  # rotation runs in a worker thread while the event loop starts agents


class Checked(NamedTuple):
    """What a check of one log did. `wait_seconds`: when to look again; `problem`: why it could not be cut, or empty."""

    wait_seconds: float
    cuts: int
    problem: str


class Total(NamedTuple):
    """What a fleet's logs take on disk after the cap was enforced, and how many files had to go."""

    allocated_bytes: int
    removed: int
    problem: str


class Part(NamedTuple):
    """A file of lines that left the live file; all of what is known about it stands in its name."""

    agent_id: str
    position: int
    start: int
    end: int
    whole: bool
    path: str

    @property
    def position_end(self) -> int:
        return self.position + self.end - self.start


class _Seen(NamedTuple):
    """What the last check saw of a live file, so that the usual check is a single stat."""

    inode: int
    size: int
    at: float
    start: int
    base: int  # position minus offset, for the live file
    indexed_at: float


def _parse(folder: str, name: str) -> Part | None:
    found = re.fullmatch(_PART, name)
    if found is None:
        return None
    agent_id, position, start, kind, end = found.groups()
    return Part(agent_id, int(position), int(start), int(end), kind == "+", f"{folder}/{name}")


def _order(part: Part) -> tuple[int, int]:
    return part.position, part.position_end


def _parts(folder: str, agent_id: str) -> list[Part]:
    """The agent's rotated files, oldest first."""
    prefix = f"{agent_id}.log."
    try:
        names = [name for name in os.listdir(folder) if name.startswith(prefix)]
    except FileNotFoundError:
        return []
    return sorted((part for name in names if (part := _parse(folder, name)) and part.agent_id == agent_id), key=_order)


def _log_path(paths: Paths, fleet: str, agent_id: str) -> str:
    if "/" in fleet or "/" in agent_id or fleet.startswith(".") or agent_id.startswith("."):
        raise StateDirectoryError(f"{fleet!r}, {agent_id!r}: no names of a fleet and an agent")
    return paths.agent_log(fleet, agent_id)


def _open(path: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO put in the file's place would hold up the open; on a regular file it does nothing.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)


def _refusal(found: os.stat_result) -> str:
    """Why this cannot be an agent's log: cutting it would damage what somebody else put in its place."""
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_nlink > 1:
        return "has a second name (hard link)"
    return "" if found.st_uid == os.geteuid() else f"belongs to another user (uid {found.st_uid})"


def _open_live(path: str) -> int:
    fd = _open(path, os.O_RDWR)
    refusal = _refusal(os.fstat(fd))
    if refusal:
        os.close(fd)
        raise OSError(errno.EPERM, refusal)
    return fd


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    import ctypes  # here, because readers do not need it

    libc = ctypes.CDLL(None, use_errno=True)
    found = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if found is None:
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    found.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        return 0 if found(fd, mode, offset, length) == 0 else ctypes.get_errno()

    return call


def _punch(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back to the file system; the range then reads as NULs, and no offset moves."""
    fallocate = _fallocate()
    while True:
        number = fallocate(fd, 0x01 | 0x02, offset, length) if fallocate else errno.EOPNOTSUPP  # KEEP_SIZE | PUNCH_HOLE
        if number == 0:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _can_punch(fd: int) -> bool:
    """Asked far behind the end, where a punch changes nothing, before a copy is made that would otherwise be for nothing."""
    try:
        _punch(fd, os.fstat(fd).st_size + (1 << 30), 4096)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def _first_data(fd: int, size: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size  # nothing but hole
        if error.errno == errno.EINVAL:
            return 0  # a file system that knows no holes
        raise


def _skip_nuls(fd: int, offset: int, size: int) -> int:
    while offset < size and (chunk := os.pread(fd, min(_CHUNK, size - offset), offset)):
        rest = chunk.lstrip(b"\0")
        offset += len(chunk) - len(rest)
        if rest:
            break
    return offset


def _locate(fd: int, last: Part | None) -> tuple[int, bool]:
    """Where the lines of the live file begin, and whether bytes before that were copied but not yet punched.

    The newest part's name says where they should begin. The bytes decide whether the file is still the one it was copied from: in
    front of that place there is either hole, or exactly what was copied (a kill came between the rename and the punch). Anything
    else means that the file was truncated or replaced from outside, and then all of it is new.
    """
    size = os.fstat(fd).st_size
    if last is None:
        data = _first_data(fd, size)
        return (_skip_nuls(fd, data, size) if data else 0), False  # somebody removed the parts of a cut file
    if last.whole or size < last.end:
        return 0, False
    for _ in range(3):  # a reader may look in the middle of a punch; that is over when it looks again
        found = _compare(fd, _first_data(fd, size), last)
        if found is not None:
            return found
    return 0, False


def _compare(fd: int, data: int, last: Part) -> tuple[int, bool] | None:
    """What `_locate` returns where the live file is still the one that `last` was cut from; `data`: where its hole ends."""
    if data >= last.end:
        return last.end, False
    if data < last.start and not _all_nul(fd, data, last.start):
        return None
    data = max(data, last.start)
    if _all_nul(fd, data, last.end):
        return last.end, False  # the last block of a hole is filled up with NULs
    try:
        copy = _open(last.path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if os.fstat(copy).st_size == 0:
            return last.start, False  # lines to be dropped, killed before the punch: they may as well stay
        return (last.end, True) if _equal(fd, copy, last) else None
    finally:
        os.close(copy)


def _all_nul(fd: int, offset: int, end: int) -> bool:
    return _skip_nuls(fd, offset, end) >= end


def _equal(fd: int, copy: int, last: Part) -> bool:
    for offset in range(last.start, last.end, _CHUNK):
        chunk = os.pread(fd, min(_CHUNK, last.end - offset), offset)
        if not chunk or chunk != os.pread(copy, len(chunk), offset - last.start):
            return False
    return True


def _cut_at(fd: int, start: int, size: int, limit: int) -> int | None:
    """Just behind the last newline inside the limit, else behind the first after it; None while a very long line goes on."""
    offset = start + limit
    while offset > start:
        low = max(start, offset - 65536)
        found = os.pread(fd, offset - low, low).rfind(b"\n")
        if found >= 0:
            return low + found + 1
        offset = low
    bound = start + max(limit * LINE_LIMITS, LONGEST_LINE_BYTES)
    offset = start + limit
    while offset < min(size, bound) and (chunk := os.pread(fd, min(_CHUNK, bound - offset), offset)):
        found = chunk.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(chunk)
    return bound if size >= bound else None


def _copy(source: int, target: int, offset: int, length: int) -> None:
    end = offset + length
    try:
        while offset < end and (done := os.copy_file_range(source, target, end - offset, offset)):
            offset += done
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
            raise
    while offset < end:
        chunk = os.pread(source, min(_CHUNK, end - offset), offset)
        if not chunk:
            raise OSError(errno.ESTALE, "truncated while it was copied")
        offset += os.write(target, chunk)


def _cut(fd: int, path: str, start: int, end: int, position: int, *, keep: bool) -> Part:
    """Take [start, end) out of the live file, into a part; without `keep` the part is left empty and the lines are gone.

    Each step can be the last one this process ever does. Before the rename nothing has happened; after it, the part is where the
    lines are, and `_locate` sees that the punch is to be done; where the part is empty, it sees that the lines are still there.
    """
    part = Part(os.path.basename(path).removesuffix(".log"), position, start, end, False, f"{path}.{position:016}.{start}-{end}")
    temporary = f"{path}.tmp"
    _unlink(temporary)
    target = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if keep:
            _copy(fd, target, start, end - start)
            # After a power failure the copy has to be whole where the punch is known; once for `max_bytes`, so it costs nothing.
            os.fdatasync(target)
        os.rename(temporary, part.path)
    except OSError:
        _unlink(temporary)
        raise
    finally:
        os.close(target)
    _punch(fd, 0, end)
    return part


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _empty(path: str) -> None:
    os.close(_open(path, os.O_WRONLY | os.O_TRUNC))


def _prune(parts: list[Part], keep: int) -> list[Part]:
    """Remove the oldest parts beyond `keep`; the newest is only emptied, and has to be punched before."""
    surplus = parts[: max(0, len(parts) - keep)]
    for part in surplus:
        if part is parts[-1]:
            _empty(part.path)
        else:
            _unlink(part.path)
    return parts[min(len(surplus), len(parts) - 1) :] if parts else []


def _in_use(fd: int) -> bool:
    """Whether anybody else has the file open: the kernel grants a write lease only to the sole user of a file."""
    try:
        # Somebody who opens the file while the lease is held makes the kernel send us a signal: SIGIO, which ends a process, unless
        # another is chosen. SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)  # other errors: no leases here; what is set aside is not lost
    return False


def _set_aside(path: str, spec: "LogSpec | None") -> bool:
    """Let a new instance begin with a file of its own where the old one is mostly hole, or too large and cannot be cut.

    Without this the apparent size would grow for ever, up to limits of file systems and of RLIMIT_FSIZE. Only a rename, so nothing
    can be lost; not done while a process is left that writes (or reads) there.
    """
    if not _CUTTING.acquire(blocking=False):
        return False  # a rotation is going on; the file does as it is
    try:
        fd = _open_live(path)
        try:
            if _in_use(fd):
                return False
            folder, name = os.path.split(path)
            parts = _parts(folder, name.removesuffix(".log"))
            last = parts[-1] if parts else None
            start, pending = _locate(fd, last)
            size = os.fstat(fd).st_size
            if pending:
                _punch(fd, 0, start)
            if start == 0 and (spec is None or size < spec.max_bytes):
                return False
            position = last.position_end if last else 0
            os.rename(path, f"{path}.{position:016}.{start}+{size}")
            if spec is not None:
                _prune(_parts(folder, name.removesuffix(".log")), max(1, spec.keep))
            return True
        finally:
            os.close(fd)
    finally:
        _CUTTING.release()


def open_log(paths: Paths, fleet: str, agent_id: str, spec: "LogSpec | None" = None) -> int:
    """A descriptor for the stdout and stderr of a new instance of the agent. Raises StateDirectoryError; about 10 us.

    With `spec`, a file that is full already is set aside; needed where the file system cannot punch holes.
    """
    path = _log_path(paths, fleet, agent_id)
    try:
        fd = _open_append(path)
        found = os.fstat(fd)
        refusal = _refusal(found)
        if refusal:
            os.close(fd)
            raise _unusable(path, OSError(errno.EPERM, refusal))
        sparse = found.st_size - found.st_blocks * 512 > 65536
        if sparse or (spec is not None and found.st_size >= spec.max_bytes):
            os.close(fd)
            with suppress(OSError):  # an improvement only, and a full disk must not keep an agent from starting
                _set_aside(path, spec)
            fd = _open_append(path)
    except OSError as error:
        raise _unusable(path, error) from error
    # O_NONBLOCK was for the open; an agent may be upset by it.
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def _unusable(path: str, error: OSError) -> StateDirectoryError:
    reason = "a symbolic link stands where the log should be" if error.errno == errno.ELOOP else error.strerror
    return StateDirectoryError(f"{path}: {reason}", hint="move it away; the agent's next start makes a new one")


def _open_append(path: str) -> int:
    try:
        return _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _index(path: str, now: float, position: int) -> None:
    fd = _open(f"{path}.idx", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, _RECORD.pack(now, position))
        full = os.fstat(fd).st_size > _RECORDS * _RECORD.size
    finally:
        os.close(fd)
    if full:
        _thin(path)


def _thin(path: str) -> None:
    """Leave out every second of the older records: the further back, the coarser."""
    records = _records(path)
    older, newer = records[:-_RECORDS_IN_FULL], records[-_RECORDS_IN_FULL:]
    temporary = f"{path}.idx.tmp"
    _unlink(temporary)
    fd = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.write(fd, b"".join(_RECORD.pack(*record) for record in older[::2] + newer))
    finally:
        os.close(fd)
    os.rename(temporary, f"{path}.idx")


def _records(path: str) -> list[tuple[float, int]]:
    try:
        fd = _open(f"{path}.idx", os.O_RDONLY)
    except OSError:
        return []
    try:
        raw = os.pread(fd, (_RECORDS + 64) * _RECORD.size, 0)
    finally:
        os.close(fd)
    return [(at, position) for at, position in _RECORD.iter_unpack(raw[: len(raw) // _RECORD.size * _RECORD.size])]


def _position_at(path: str, at: float) -> int:
    """How long the output was at that time, or a little before; 0 where nothing is known."""
    records = _records(path)
    earlier = [index for index, record in enumerate(records) if record[0] <= at]
    # Later records can be lower: the live file was deleted from outside. All that came after that time is wanted.
    return min(position for _, position in records[earlier[-1] :]) if earlier else 0


class Rotator:
    """Keeps the logs of a daemon's agents inside their limits. Safe to call in a worker thread."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._seen: dict[str, _Seen] = {}
        self._grown: set[str] = set()  # folders where something was written since the cap was last enforced
        self._enforced: dict[str, tuple[float, object, Total]] = {}

    def rotate(self, fleet: str, agent_id: str, spec: "LogSpec") -> Checked:
        """Cut the agent's log while it is larger than it may be, and note how long it is. Never raises for what is on disk."""
        path = _log_path(self._paths, fleet, agent_id)
        try:
            with _CUTTING:
                return self._check(path, spec)
        except OSError as error:
            self._seen.pop(path, None)
            return Checked(LONGEST_WAIT_SECONDS, 0, f"{path}: not rotated: {error.strerror}")

    def _check(self, path: str, spec: "LogSpec") -> Checked:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            gone = self._seen.pop(path, None) is not None
            return Checked(LONGEST_WAIT_SECONDS, 0, f"{path} was removed; output is lost until the agent's next start" if gone else "")
        now = time.monotonic()
        seen = self._seen.get(path)
        cuts, problem = 0, ""
        if seen is None or seen.inode != found.st_ino or found.st_size < seen.size or found.st_size - seen.start >= spec.max_bytes:
            start, base, cuts, problem = self._cut_all(path, spec)
        else:
            start, base = seen.start, seen.base
        indexed_at = seen.indexed_at if seen else 0.0
        if seen is None or found.st_size != seen.size:
            self._grown.add(os.path.dirname(path))
        if (seen is None or found.st_size != seen.size) and now - indexed_at >= _RECORD_SECONDS:
            _index(path, time.time(), base + found.st_size)
            indexed_at = now
        wait = _wait(seen, found, now, start + spec.max_bytes, more=cuts == CUTS_PER_CHECK)
        self._seen[path] = _Seen(found.st_ino, found.st_size, now, start, base, indexed_at)
        return Checked(wait, cuts, problem)

    def _cut_all(self, path: str, spec: "LogSpec") -> tuple[int, int, int, str]:
        folder, name = os.path.split(path)
        fd = _open_live(path)
        try:
            parts = _parts(folder, name.removesuffix(".log"))
            start, pending = _locate(fd, parts[-1] if parts else None)
            base = parts[-1].position_end - start if parts else 0
            size = os.fstat(fd).st_size
            if (pending or size - start >= spec.max_bytes) and not _can_punch(fd):
                problem = f"{path}: this file system cannot free the front of a file; rotated only when the agent starts anew"
                return start, base, 0, problem
            if pending:
                _punch(fd, 0, start)
            cuts = 0
            while size - start >= spec.max_bytes and cuts < CUTS_PER_CHECK:
                end = _cut_at(fd, start, size, spec.max_bytes)
                if end is None:
                    break
                # What this cut makes surplus goes first, so that a full disk has room for the copy.
                parts = _prune(parts, max(0, spec.keep - 1))
                parts.append(_cut(fd, path, start, end, base + start, keep=spec.keep > 0))
                start, cuts, size = end, cuts + 1, os.fstat(fd).st_size
            _prune(parts, spec.keep)
            return start, base, cuts, ""
        finally:
            os.close(fd)

    def forget(self, fleet: str, agent_id: str) -> None:
        """The agent is gone; its log stays."""
        self._seen.pop(_log_path(self._paths, fleet, agent_id), None)

    def enforce_total(self, fleet: str, spec: "LogSpec", alive: Collection[str] | None = None) -> Total:
        """Bring the fleet's logs under their cap, the oldest lines first.

        Rotated files go by age, and with them the logs of agents not in `alive` (None: all may be); then the front of the largest
        live files. Never raises for what is on disk. Looks at all files, 2 us each, at most once a second, and only when a check saw
        new output or the settings or agents changed; else it repeats its last answer.
        """
        folder = os.path.dirname(_log_path(self._paths, fleet, "any"))
        now, wish = time.monotonic(), (spec.total_bytes, None if alive is None else frozenset(alive))
        at, last_wish, last = self._enforced.get(folder, (0.0, None, Total(0, 0, "")))
        if wish == last_wish and (folder not in self._grown or now - at < 1.0):
            return last._replace(removed=0)
        try:
            with _CUTTING:
                total = self._enforce(folder, spec, alive)
        except OSError as error:
            return Total(0, 0, f"{folder}: cap not enforced: {error.strerror}")
        self._grown.discard(folder)
        self._enforced[folder] = now, wish, total
        return total

    def _enforce(self, folder: str, spec: "LogSpec", alive: Collection[str] | None) -> Total:
        files = _scan(folder)
        removed = 0
        for file in _left_over(files, alive):
            _unlink(file.path)
            files.remove(file)
            removed += 1
        total = sum(file.allocated for file in files)
        newest = {agent_id: max(parts, key=_order) for agent_id, parts in _by_agent(files).items()}
        for file in sorted(files, key=lambda file: file.modified_at):
            if total <= spec.total_bytes:
                break
            gone = alive is not None and file.agent_id not in alive
            if file.part is None and not gone:
                continue
            if file.part is not None and file.part is newest[file.agent_id] and not gone:
                _empty(file.path)
            else:
                _unlink(file.path)
                if file.part is None:
                    self._seen.pop(file.path, None)
            total -= file.allocated
            removed += file.allocated > 0
        live = [file for file in files if file.path.endswith(".log") and (alive is None or file.agent_id in alive)]
        for file in sorted(live, key=lambda file: -file.allocated):
            if total <= spec.total_bytes:
                break
            total -= self._shorten(file.path, min(total - spec.total_bytes + 8192, file.allocated))
        return Total(total, removed, "" if total <= spec.total_bytes else f"{folder}: larger than the cap, and nothing can be removed")

    def _shorten(self, path: str, surplus: int) -> int:
        """Drop lines from the front of a live file; returns the bytes freed."""
        fd = _open_live(path)
        try:
            if not _can_punch(fd):
                return 0
            before = os.fstat(fd)
            parts = _parts(os.path.dirname(path), os.path.basename(path).removesuffix(".log"))
            start, pending = _locate(fd, parts[-1] if parts else None)
            if pending:
                _punch(fd, 0, start)
            end = _cut_at(fd, start, before.st_size, min(surplus, before.st_size - start))
            if end is None or end <= start:
                return 0
            _cut(fd, path, start, end, parts[-1].position_end if parts else start, keep=False)
            for part in parts:
                if os.stat(part.path).st_size == 0:
                    _unlink(part.path)  # a record of an older beginning
            self._seen.pop(path, None)
            return max(0, (before.st_blocks - os.fstat(fd).st_blocks) * 512)
        finally:
            os.close(fd)


def _wait(seen: _Seen | None, found: os.stat_result, now: float, full_at: int, *, more: bool) -> float:
    """Seconds until the file may be full, at the rate it grew at since the last look."""
    if seen is None or more:
        return SHORTEST_WAIT_SECONDS
    rate = (found.st_size - seen.size) / max(now - seen.at, 1e-3)
    if rate <= 0:
        return LONGEST_WAIT_SECONDS
    return min(LONGEST_WAIT_SECONDS, max(SHORTEST_WAIT_SECONDS, (full_at - found.st_size) / rate))


class _File(NamedTuple):
    path: str
    agent_id: str
    part: Part | None
    allocated: int
    modified_at: float


def _scan(folder: str) -> list[_File]:
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                agent_id, dot, _ = entry.name.partition(".log")
                if not dot or not entry.is_file(follow_symlinks=False):
                    continue
                found = entry.stat(follow_symlinks=False)
                files.append(_File(entry.path, agent_id, _parse(folder, entry.name), found.st_blocks * 512, found.st_mtime))
    except FileNotFoundError:
        return []
    return files


def _by_agent(files: list[_File]) -> dict[str, list[Part]]:
    grouped: dict[str, list[Part]] = {}
    for file in files:
        if file.part is not None:
            grouped.setdefault(file.agent_id, []).append(file.part)
    return grouped


def _left_over(files: list[_File], alive: Collection[str] | None) -> list[_File]:
    """Copies that a kill left unfinished, and all files of the agents that went first, when there are too many of those."""
    unfinished = [file for file in files if file.path.endswith(".tmp")]
    if alive is None:
        return unfinished
    last_words: dict[str, float] = {}
    for file in files:
        if file.agent_id not in alive:
            last_words[file.agent_id] = max(file.modified_at, last_words.get(file.agent_id, 0.0))
    too_many = set(sorted(last_words, key=lambda agent_id: last_words[agent_id])[: max(0, len(last_words) - GONE_AGENTS_KEPT)])
    return unfinished + [file for file in files if file.agent_id in too_many and file not in unfinished]


def remove(paths: Paths, fleet: str, agent_id: str) -> None:
    """Delete all that is left of an agent's output."""
    path = _log_path(paths, fleet, agent_id)
    with _CUTTING:
        for part in _parts(os.path.dirname(path), agent_id):
            _unlink(part.path)
        for suffix in ("", ".idx", ".tmp", ".idx.tmp"):
            _unlink(path + suffix)


def agents(paths: Paths, fleet: str) -> list[str]:
    """Ids of the agents with output here, also of those that no longer exist."""
    folder = os.path.dirname(_log_path(paths, fleet, "any"))
    return sorted({file.agent_id for file in _scan(folder) if file.part or file.path.endswith(".log")})


class _View:
    """All of an agent's output as one stream of bytes, addressed by position, while it may be cut at any moment."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._folder, name = os.path.split(path)
        self._agent_id = name.removesuffix(".log")
        self._part_fd: tuple[str, int] | None = None
        self.live: int | None = None
        self.parts: list[Part] = []
        self._open()

    def _open(self) -> None:
        while True:
            parts = _parts(self._folder, self._agent_id)
            self.live = self._open_live()
            start = _locate(self.live, parts[-1] if parts else None)[0] if self.live is not None else 0
            if parts == _parts(self._folder, self._agent_id):
                break
            self.close()
        self.parts = parts
        self.base = parts[-1].position_end - start if parts else 0
        self.live_begin = self.base + start
        self.begin = parts[0].position if parts else self.live_begin

    def _open_live(self) -> int | None:
        try:
            fd = _open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self._path, error) from error
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise StateDirectoryError(f"{self._path}: not a regular file")

    def close(self) -> None:
        if self.live is not None:
            os.close(self.live)
            self.live = None
        if self._part_fd:
            os.close(self._part_fd[1])
            self._part_fd = None

    @property
    def end(self) -> int:
        size = os.fstat(self.live).st_size if self.live is not None else 0
        return max(self.live_begin, self.base + size)

    def changed(self, position: int) -> bool:
        """Whether another file is in the live one's place by now, or it was truncated to before `position`."""
        try:
            found = os.lstat(self._path)
        except FileNotFoundError:
            return False  # perhaps the moment between two instances; what was opened can still be read
        if self.live is None:
            return True
        return found.st_ino != os.fstat(self.live).st_ino or self.base + found.st_size < position

    def reopen(self, position: int) -> int:
        """Go over to the file that is in place now; returns where to go on."""
        old = os.fstat(self.live) if self.live is not None else None
        inode, end = (old.st_ino, self.base + old.st_size) if old else (0, 0)
        base, begin = self.base, self.live_begin
        # Looked up while the old file is still open, so that its inode cannot be another's.
        aside = [part for part in _parts(self._folder, self._agent_id) if part.whole and inode and _inode(part.path) == inode]
        self.close()
        self._open()
        truncated = self.live is not None and os.fstat(self.live).st_ino == inode
        if not inode or (position > end and not truncated):
            return position  # parts of later files were read already
        if aside:
            return min(position, aside[-1].position_end)
        # Deleted or truncated from outside: positions go on from what had been copied by then.
        copied = [part.position_end for part in self.parts if part.position - part.start == base and part.position_end <= position]
        return max(copied, default=begin)

    def read(self, position: int, size: int) -> tuple[int, bytes]:
        """Bytes from the first position not before `position` that still exists; none at the end."""
        while True:
            part = next((part for part in self.parts if position < part.position_end), None)
            if part is None:
                break
            position = max(position, part.position)
            data = self._read_part(part, position, min(size, part.position_end - position))
            if data:
                return position, data
            position = part.position_end  # emptied or removed
        position = max(position, self.live_begin)
        if self.live is None:
            return position, b""
        data = os.pread(self.live, size, position - self.base)
        if b"\0" in data and self._copied_meanwhile(position):
            return self.read(position, size)
        return position, data

    def _copied_meanwhile(self, position: int) -> bool:
        # A punch leaves NULs, and the copy is in place before the punch: NULs that have no copy were written by the agent.
        parts = _parts(self._folder, self._agent_id)
        if any(part.position <= position < part.position_end for part in parts):
            self.parts = parts
            return True
        return False

    def _read_part(self, part: Part, position: int, size: int) -> bytes:
        if self._part_fd is None or self._part_fd[0] != part.path:
            if self._part_fd:
                os.close(self._part_fd[1])
                self._part_fd = None
            try:
                self._part_fd = part.path, _open(part.path, os.O_RDONLY)
            except FileNotFoundError:
                return b""
        return os.pread(self._part_fd[1], size, position - part.position + (part.start if part.whole else 0))

    def last(self, lines: int, end: int) -> int:
        """Where the last so many lines before `end` begin."""
        if lines <= 0:
            return end
        position, left = end, lines
        for low, data in self._backwards(end):
            # The newline that ends the last line begins no other.
            text = data[:-1] if position == end else data
            position = low
            count = text.count(b"\n")
            if count >= left:
                at = len(text)
                for _ in range(left):
                    at = text.rindex(b"\n", 0, at)
                return low + at + 1
            left -= count
        return self.begin

    def line_start(self, position: int) -> int:
        """Where the line begins that this position is in."""
        if position <= self.begin:
            return self.begin
        for low, data in self._backwards(min(position, self.end)):
            found = data.rfind(b"\n")
            if found >= 0:
                return low + found + 1
        return self.begin

    def _backwards(self, end: int) -> Iterator[tuple[int, bytes]]:
        ranges = [(part.position, part.position_end) for part in self.parts] + [(self.live_begin, self.end)]
        for low, high in reversed(ranges):
            high = min(high, end)
            while high > low:
                at = max(low, high - _CHUNK)
                data = self._exactly(at, high)
                if data:
                    yield at, data
                high = at

    def _exactly(self, low: int, high: int) -> bytes:
        """The bytes of a range, or none where it does not exist in full any more."""
        chunks, at = [], low
        while at < high:
            found, data = self.read(at, high - at)
            if found != at or not data:
                return b""
            chunks.append(data)
            at += len(data)
        return b"".join(chunks)


def _inode(path: str) -> int:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return 0


def _beginning(view: _View, path: str, end: int, lines: int | None, since: float | None) -> int:
    begin = view.begin if since is None else view.line_start(_position_at(path, since))
    return begin if lines is None else max(begin, view.last(lines, end))


def _split(pending: bytes, data: bytes) -> tuple[list[bytes], bytes]:
    lines = (pending + data).split(b"\n")
    rest = lines.pop()
    while len(rest) > LONGEST_LINE_BYTES:
        lines.append(rest[:LONGEST_LINE_BYTES])
        rest = rest[LONGEST_LINE_BYTES:]
    return lines, rest


def tail(paths: Paths, fleet: str, agent_id: str, lines: int | None = 100, since: float | None = None) -> Iterator[bytes]:
    """The agent's last lines (None: all), without their newlines, oldest first, over all its files; none where there is no log.

    `since`: a Unix time. Lines carry no time, so it is as exact as the checks were frequent, and gives rather more than less.
    """
    path = _log_path(paths, fleet, agent_id)
    view = _View(path)
    try:
        end = view.end
        position, rest = _beginning(view, path, end, lines, since), b""
        while position < end:
            position, data = view.read(position, min(_CHUNK, end - position))
            if not data:
                break
            position += len(data)
            found, rest = _split(rest, data)
            yield from found
        if rest:
            yield rest
    finally:
        view.close()


class Follower:
    """Hands out an agent's lines as they come; several can be asked in turn by one thread."""

    def __init__(self, paths: Paths, fleet: str, agent_id: str, lines: int | None = 100, since: float | None = None) -> None:
        path = _log_path(paths, fleet, agent_id)
        self._view = _View(path)
        self.position = _beginning(self._view, path, self._view.end, lines, since)
        self._rest = b""

    def read(self) -> list[bytes]:
        """Whole lines that came since the last call, without their newlines; does not wait. At most a few MiB at once."""
        lines: list[bytes] = []
        for _ in range(16):
            changed = self._view.changed(self.position)  # asked first: what is read next is then all that the old file will get
            position, data = self._view.read(self.position, _CHUNK)
            if data:
                self.position = position + len(data)
                found, self._rest = _split(self._rest, data)
                lines += found
            elif changed:
                self.position = self._view.reopen(self.position)
            else:
                break
        return lines

    @property
    def end(self) -> int:
        return self._view.end

    def rest(self) -> bytes:
        """The unfinished line, which is then forgotten."""
        rest, self._rest = self._rest, b""
        return rest

    def close(self) -> None:
        self._view.close()


def follow(
    paths: Paths,
    fleet: str,
    agent_id: str,
    lines: int | None = 100,
    since: float | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    poll_seconds: float = 0.15,
) -> Iterator[bytes]:
    """The agent's last lines, then each new one, over rotation and restarts, until `stop` says so. The file may appear later."""
    follower = Follower(paths, fleet, agent_id, lines, since)
    try:
        end = None  # set when asked to stop: what was there by then is still handed out
        while True:
            end = follower.end if end is None and stop() else end
            found = follower.read()
            yield from found
            if end is not None and (not found or follower.position >= end):
                break
            if not found:
                time.sleep(poll_seconds)
        rest = follower.rest()
        if rest:
            yield rest
    finally:
        follower.close()


def printable(raw: bytes) -> str:
    """A line of an agent as text that cannot steer a terminal."""
    text = re.sub(_ESCAPES, "", raw.decode(errors="replace")).replace("\t", "    ")
    return re.sub(_CONTROLS, "", text)


def last_lines(paths: Paths, fleet: str, agent_id: str, lines: int = 5, width: int = 400) -> list[str]:
    """The last lines for a report of a crash, harmless and short; empty where the log cannot be read."""
    try:
        return [printable(line)[:width] for line in tail(paths, fleet, agent_id, lines)]
    except (OSError, StateDirectoryError):
        return []
