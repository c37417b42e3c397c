"""Reads an agent's output as one stream of lines, over all its files, also while it is cut and while no daemon is there."""

import os
import re
import stat
from collections.abc import Iterator

from fleetctl.errors import StateDirectoryError
from fleetctl.host import logfiles, logindex
from fleetctl.host.logfiles import Part
from fleetctl.host.paths import Paths

TIMESTAMP_SECONDS = 0.05  # the kernel takes a file's times from a clock that ticks this seldom, at most
_ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
_CONTROLS = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]"


class _View:
    """All of an agent's output as one stream of bytes, addressed by position, while it may be cut at any moment."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._part_fd: tuple[str, int] | None = None
        self.live: int | None = None
        self.parts: list[Part] = []
        self._open()

    def _open(self) -> None:
        while True:
            parts = logfiles.parts(self._path)
            self.live = self._open_live()
            start = logfiles.locate(self.live, parts)[0] if self.live is not None else 0
            if parts == logfiles.parts(self._path):
                break
            self.close()
        self.parts = parts
        self.base = parts[-1].position_end - start if parts else 0
        self.live_begin = self.base + start
        self.begin = parts[0].position if parts else self.live_begin

    def _open_live(self) -> int | None:
        try:
            fd = logfiles.open_file(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise logfiles.unusable(self._path, error) from error
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
        aside = [part for part in logfiles.parts(self._path) if part.whole and inode and _inode(part.path) == inode]
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
        parts = logfiles.parts(self._path)
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
                self._part_fd = part.path, logfiles.open_file(part.path, os.O_RDONLY)
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

    def settled_before(self, at: float, end: int) -> int:
        """Up to where everything was surely written before this Unix time, by the times of the files; `end`: looked up before this."""
        settled = self.begin
        for part in self.parts:
            if _modified_at(part.path) + TIMESTAMP_SECONDS < at:
                settled = max(settled, part.position_end)
        if self.live is not None and os.fstat(self.live).st_mtime + TIMESTAMP_SECONDS < at:
            settled = max(settled, end)
        return settled

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
                at = max(low, high - logfiles.CHUNK_BYTES)
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


def _modified_at(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:
        return 0.0  # removed: there is nothing left in it


def _beginning(view: _View, path: str, end: int, lines: int | None, since: float | None) -> int:
    begin = view.begin
    if since is not None:
        # The index may be missing, or lack the last lines. Nothing in a file is younger than the file, whatever the index tells.
        begin = max(view.line_start(logindex.position_at(path, since)), view.settled_before(since, end))
    return begin if lines is None else max(begin, view.last(lines, end))


def _split(pending: bytes, data: bytes) -> tuple[list[bytes], bytes]:
    lines = (pending + data).split(b"\n")
    rest = lines.pop()
    while len(rest) > logfiles.LONGEST_LINE_BYTES:
        lines.append(rest[: logfiles.LONGEST_LINE_BYTES])
        rest = rest[logfiles.LONGEST_LINE_BYTES :]
    return lines, rest


def tail(paths: Paths, fleet: str, agent_id: str, lines: int | None = 100, since: float | None = None) -> Iterator[bytes]:
    """The agent's last lines (None: all), without their newlines, oldest first, over all its files; none where there is no log.

    `since`: a Unix time. Lines carry no time, so it is as exact as the checks were frequent, and gives rather more than less.
    """
    path = logfiles.log_path(paths, fleet, agent_id)
    view = _View(path)
    try:
        end = view.end
        position, rest = _beginning(view, path, end, lines, since), b""
        while position < end:
            position, data = view.read(position, min(logfiles.CHUNK_BYTES, end - position))
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
        path = logfiles.log_path(paths, fleet, agent_id)
        self._view = _View(path)
        self._position = _beginning(self._view, path, self._view.end, lines, since)
        self._rest = b""

    def read(self) -> list[bytes]:
        """Whole lines that came since the last call, without their newlines; does not wait. At most a few MiB at once."""
        lines: list[bytes] = []
        for _ in range(16):
            changed = self._view.changed(self._position)  # asked first: what is read next is then all that the old file will get
            position, data = self._view.read(self._position, logfiles.CHUNK_BYTES)
            if data:
                self._position = position + len(data)
                found, self._rest = _split(self._rest, data)
                lines += found
            elif changed:
                self._position = self._view.reopen(self._position)
            else:
                break
        return lines

    def close(self) -> None:
        self._view.close()


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
