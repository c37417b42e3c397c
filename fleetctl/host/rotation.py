"""When logs are cut: each before it is larger than it may be, and all of a fleet's together under their cap.

Where the file system cannot punch holes, nothing can be cut from a file in use; the check says so, and the file is set aside when the
agent's next instance starts.
"""

import os
import time
from collections.abc import Collection
from typing import NamedTuple

from fleetctl.host import logcut, logfiles, logindex
from fleetctl.host.paths import Paths
from fleetctl.models import LogSpec

SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 5.0
GONE_AGENTS_KEPT = 200  # agents come and go with the load; without a limit their small logs pile up to the cap, 4 KiB each
CUTS_PER_CHECK = 64  # an agent that writes faster than a disk copies must not hold up the others for ever


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


class _Seen(NamedTuple):
    """What the last check saw of a live file, so that the usual check is a single stat."""

    inode: int
    size: int
    at: float
    start: int
    base: int  # position minus offset, for the live file
    indexed_at: float


class Rotator:
    """Keeps the logs of a daemon's agents inside their limits. Safe to call in a worker thread."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._seen: dict[str, _Seen] = {}
        self._grown: set[str] = set()  # folders where something was written since the cap was last enforced
        self._enforced: dict[str, tuple[float, object, Total]] = {}

    def rotate(self, fleet: str, agent_id: str, spec: LogSpec) -> Checked:
        """Cut the agent's log while it is larger than it may be, and note how long it is. Never raises for what is on disk."""
        path = logfiles.log_path(self._paths, fleet, agent_id)
        try:
            with logcut.CUTTING:
                return self._check(path, spec)
        except OSError as error:
            self._seen.pop(path, None)
            return Checked(LONGEST_WAIT_SECONDS, 0, f"{path}: not rotated: {error.strerror}")

    def _check(self, path: str, spec: LogSpec) -> Checked:
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
            if now - indexed_at >= logindex.RECORD_SECONDS:
                logindex.note(path, time.time(), base + found.st_size)
                indexed_at = now
        wait = _wait(seen, found, now, start + spec.max_bytes, more=cuts == CUTS_PER_CHECK)
        self._seen[path] = _Seen(found.st_ino, found.st_size, now, start, base, indexed_at)
        return Checked(wait, cuts, problem)

    def _cut_all(self, path: str, spec: LogSpec) -> tuple[int, int, int, str]:
        fd = logcut.open_live(path)
        try:
            parts = logfiles.parts(path)
            start, pending = logfiles.locate(fd, parts)
            base = parts[-1].position_end - start if parts else 0
            size = os.fstat(fd).st_size
            if (pending or size - start >= spec.max_bytes) and not logcut.can_punch(fd):
                problem = f"{path}: this file system cannot free the front of a file; rotated only when the agent starts anew"
                return start, base, 0, problem
            if pending:
                logcut.punch(fd, 0, start)
            cuts = 0
            while size - start >= spec.max_bytes and cuts < CUTS_PER_CHECK:
                end = logcut.cut_at(fd, start, size, spec.max_bytes)
                if end is None:
                    break
                # What this cut makes surplus goes first, so that a full disk has room for the copy.
                parts = logcut.prune(parts, max(0, spec.keep - 1))
                parts.append(logcut.cut(fd, path, start, end, base + start, keep=spec.keep > 0))
                start, cuts, size = end, cuts + 1, os.fstat(fd).st_size
            logcut.prune(parts, spec.keep)
            return start, base, cuts, ""
        finally:
            os.close(fd)

    def enforce_total(self, fleet: str, spec: LogSpec, alive: Collection[str] | None = None) -> Total:
        """Bring the fleet's logs under their cap, the oldest lines first.

        Rotated files go by age, and with them the logs of agents not in `alive` (None: all may be); then the front of the largest
        live files. Never raises for what is on disk. Looks at all files, 2 us each, at most once a second, and only when a check saw
        new output or the settings or agents changed; else it repeats its last answer.
        """
        folder = os.path.dirname(logfiles.log_path(self._paths, fleet, "any"))
        now, wish = time.monotonic(), (spec.total_bytes, None if alive is None else frozenset(alive))
        at, last_wish, last = self._enforced.get(folder, (0.0, None, Total(0, 0, "")))
        if wish == last_wish and (folder not in self._grown or now - at < 1.0):
            return last._replace(removed=0)
        try:
            with logcut.CUTTING:
                total = self._enforce(folder, spec, alive)
        except OSError as error:
            return Total(0, 0, f"{folder}: cap not enforced: {error.strerror}")
        self._grown.discard(folder)
        self._enforced[folder] = now, wish, total
        return total

    def _enforce(self, folder: str, spec: LogSpec, alive: Collection[str] | None) -> Total:
        files = logfiles.scan(folder)
        removed = 0
        for file in _left_over(files, alive):
            self._remove(file)
            files.remove(file)
            removed += 1
        total = sum(file.allocated for file in files)
        rotated = sorted((file.part for file in files if file.part), key=logfiles.by_age)
        newest = {part.agent_id: part for part in rotated}
        for file in sorted(files, key=lambda file: file.modified_at):
            if total <= spec.total_bytes:
                break
            gone = alive is not None and file.agent_id not in alive
            if file.part is None and not gone:
                continue
            if file.part is not None and file.part is newest[file.part.agent_id] and not gone:
                logcut.empty(file.path)
            else:
                self._remove(file)
            total -= file.allocated
            removed += file.allocated > 0
        live = [file for file in files if file.path.endswith(".log") and (alive is None or file.agent_id in alive)]
        for file in sorted(live, key=lambda file: -file.allocated):
            if total <= spec.total_bytes:
                break
            total -= self._shorten(file.path, min(total - spec.total_bytes + 8192, file.allocated))
        return Total(total, removed, "" if total <= spec.total_bytes else f"{folder}: larger than the cap, and nothing can be removed")

    def _remove(self, file: logfiles.File) -> None:
        logfiles.unlink(file.path)
        self._seen.pop(file.path, None)  # else what was seen of agents that are gone would add up

    def _shorten(self, path: str, surplus: int) -> int:
        """Drop lines from the front of a live file; returns the bytes freed."""
        fd = logcut.open_live(path)
        try:
            if not logcut.can_punch(fd):
                return 0
            before = os.fstat(fd)
            parts = logfiles.parts(path)
            start, pending = logfiles.locate(fd, parts)
            if pending:
                logcut.punch(fd, 0, start)
            end = logcut.cut_at(fd, start, before.st_size, min(surplus, before.st_size - start))
            if end is None or end <= start:
                return 0
            logcut.cut(fd, path, start, end, parts[-1].position_end if parts else start, keep=False)
            for part in parts:
                if os.stat(part.path).st_size == 0:
                    logfiles.unlink(part.path)  # a record of an older beginning
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


def _left_over(files: list[logfiles.File], alive: Collection[str] | None) -> list[logfiles.File]:
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
