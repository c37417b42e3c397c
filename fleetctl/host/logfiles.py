"""The files that hold an agent's output: their names, their order, and where the lines in them begin.

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

Only one process, the daemon, cuts; any number may read, also while it cuts. Lines can be lost where somebody deletes or truncates the
live file, and only there. Around this format: `logs` opens a file for an agent, `logcut` takes lines out of it, `rotation` says when,
`logindex` keeps the times, `logread` reads. Imports little, because the `logs` command reads through this module.
"""

import errno
import os
import re
from typing import NamedTuple

from fleetctl.errors import StateDirectoryError
from fleetctl.host.paths import Paths

LONGEST_LINE_BYTES = 1024 * 1024  # a reader hands out an unfinished line when it is this long
CHUNK_BYTES = 256 * 1024  # read at once

# Compiled when first used (and then kept by `re`): patterns are half of the time that importing this and `logread` takes.
_PART = r"(.+)\.log\.([0-9]{1,18})\.([0-9]{1,18})([-+])([0-9]{1,18})"


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


class File(NamedTuple):
    """Any file in the folder of a fleet's logs."""

    path: str
    agent_id: str
    part: Part | None
    allocated: int
    modified_at: float


def _parse(folder: str, name: str) -> Part | None:
    found = re.fullmatch(_PART, name)
    if found is None:
        return None
    agent_id, position, start, kind, end = found.groups()
    return Part(agent_id, int(position), int(start), int(end), kind == "+", f"{folder}/{name}")


def new_part(path: str, position: int, start: int, end: int, *, whole: bool) -> Part:
    """What is to leave the live file at `path`."""
    return Part(agent_of(path), position, start, end, whole, f"{path}.{position:016}.{start}{'+' if whole else '-'}{end}")


def agent_of(path: str) -> str:
    return os.path.basename(path).removesuffix(".log")


def by_age(part: Part) -> tuple[int, int]:
    return part.position, part.position_end


def parts(path: str) -> list[Part]:
    """The rotated files of the log whose live file is at `path`, oldest first."""
    folder, live = os.path.split(path)
    try:
        names = [name for name in os.listdir(folder) if name.startswith(f"{live}.")]
    except FileNotFoundError:
        return []
    agent_id = agent_of(path)
    return sorted((part for name in names if (part := _parse(folder, name)) and part.agent_id == agent_id), key=by_age)


def log_path(paths: Paths, fleet: str, agent_id: str) -> str:
    if "/" in fleet or "/" in agent_id or fleet.startswith(".") or agent_id.startswith("."):
        raise StateDirectoryError(f"{fleet!r}, {agent_id!r}: no names of a fleet and an agent")
    return paths.agent_log(fleet, agent_id)


def open_file(path: str, flags: int) -> int:
    """Like `os.open`, for what may not be the file that should be there."""
    # O_NONBLOCK: a FIFO put in the file's place would hold up the open; on a regular file it does nothing.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)


def unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def unusable(path: str, error: OSError) -> StateDirectoryError:
    """What to tell the user where a log cannot be opened."""
    reason = "a symbolic link stands where the log should be" if error.errno == errno.ELOOP else error.strerror
    return StateDirectoryError(f"{path}: {reason}", hint="move it away; the agent's next start makes a new one")


def scan(folder: str) -> list[File]:
    """All files of all agents; 2 us each."""
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                agent_id, dot, _ = entry.name.partition(".log")
                if not dot or not entry.is_file(follow_symlinks=False):
                    continue
                found = entry.stat(follow_symlinks=False)
                files.append(File(entry.path, agent_id, _parse(folder, entry.name), found.st_blocks * 512, found.st_mtime))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return files


def fleets(paths: Paths) -> list[str]:
    """Names of the fleets with output here, also of those that no longer exist."""
    try:
        return sorted(entry.name for entry in os.scandir(paths.logs) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def agents(paths: Paths, fleet: str) -> list[str]:
    """Ids of the agents with output here, also of those that no longer exist."""
    folder = os.path.dirname(log_path(paths, fleet, "any"))
    return sorted({file.agent_id for file in scan(folder) if file.part or file.path.endswith(".log")})


def locate(fd: int, parts: list[Part]) -> tuple[int, bool]:
    """Where the lines of the live file begin, and whether bytes before that were copied but not yet punched.

    The newest part's name says where they should begin. The bytes decide whether the file is still the one it was copied from: in
    front of that place there is either hole, or exactly what was copied (a kill came between the rename and the punch). Anything
    else means that the file was truncated or replaced from outside, and then all of it is new.
    """
    size = os.fstat(fd).st_size
    if not parts:
        data = _first_data(fd, size)
        return (_skip_nuls(fd, data, size) if data else 0), False  # somebody removed the parts of a cut file
    last = parts[-1]
    if last.whole or size < last.end:
        return 0, False
    for _ in range(3):  # a reader may look in the middle of a punch; that is over when it looks again
        found = _compare(fd, _first_data(fd, size), last)
        if found is not None:
            return found
    return 0, False


def _compare(fd: int, data: int, last: Part) -> tuple[int, bool] | None:
    """What `locate` returns where the live file is still the one that `last` was cut from; `data`: where its hole ends."""
    if data >= last.end:
        return last.end, False
    if data < last.start and not _all_nul(fd, data, last.start):
        return None
    data = max(data, last.start)
    if _all_nul(fd, data, last.end):
        return last.end, False  # the last block of a hole is filled up with NULs
    try:
        copy = open_file(last.path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if os.fstat(copy).st_size == 0:
            return last.start, False  # lines to be dropped, killed before the punch: they may as well stay
        return (last.end, True) if _equal(fd, copy, last) else None
    finally:
        os.close(copy)


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
    while offset < size and (chunk := os.pread(fd, min(CHUNK_BYTES, size - offset), offset)):
        rest = chunk.lstrip(b"\0")
        offset += len(chunk) - len(rest)
        if rest:
            break
    return offset


def _all_nul(fd: int, offset: int, end: int) -> bool:
    return _skip_nuls(fd, offset, end) >= end


def _equal(fd: int, copy: int, last: Part) -> bool:
    for offset in range(last.start, last.end, CHUNK_BYTES):
        chunk = os.pread(fd, min(CHUNK_BYTES, last.end - offset), offset)
        if not chunk or chunk != os.pread(copy, len(chunk), offset - last.start):
            return False
    return True
