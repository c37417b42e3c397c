"""Agents' output, with real writers: nothing is lost, torn or doubled, whatever the rotator is doing or dies doing."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fleetctl.errors import StateDirectoryError
from fleetctl.host import logcut, logfiles, logindex, logread, logs, rotation
from fleetctl.host.paths import Paths
from fleetctl.models import LogSpec

FLEET, AGENT = "demo", "demo-k3x9q"
SMALL = LogSpec(max_bytes=4096, keep=1000)
WRITER = """
import os, sys
count, per_write = int(sys.argv[1]), int(sys.argv[2])
for first in range(0, count, per_write):
    os.write(1, b"".join(b"%d %s\\n" % (n, b"x" * (n * 7919 % 90)) for n in range(first, min(count, first + per_write))))
"""
ROTATOR = """
import os, sys
from fleetctl.host import rotation
from fleetctl.host.paths import Paths
from fleetctl.models import LogSpec
os.fdatasync = lambda fd: None
rotator = rotation.Rotator(Paths(sys.argv[1]))
print("up", flush=True)
while True:
    checked = rotator.rotate("demo", "demo-k3x9q", LogSpec(max_bytes=4096, keep=1000))
    assert not checked.problem, checked
"""


class Killed(BaseException):
    """Stands for a kill -9: nothing catches it."""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(str(tmp_path))
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # These tests cut every 4 KiB, where a user's logs are cut every 10 MiB: they would measure the disk.
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


def live(paths: Paths) -> Path:
    return Path(paths.agent_log(FLEET, AGENT))


def parts(paths: Paths, agent_id: str = AGENT) -> list[Path]:
    return [Path(part.path) for part in logfiles.parts(paths.agent_log(FLEET, agent_id))]


def write(paths: Paths, data: bytes, agent_id: str = AGENT) -> None:
    fd = logs.open_log(paths, FLEET, agent_id)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)


def numbered(start: int, stop: int) -> bytes:
    return b"".join(b"%d %s\n" % (n, b"x" * (n * 7919 % 90)) for n in range(start, stop))


def everything(paths: Paths, agent_id: str = AGENT) -> bytes:
    return b"".join(line + b"\n" for line in logread.tail(paths, FLEET, agent_id, lines=None))


def so_far(paths: Paths) -> bytes:
    """Like `everything`, where the last write may be half visible yet."""
    return b"\n".join(logread.tail(paths, FLEET, AGENT, lines=None))


def start_writer(paths: Paths, count: int, per_write: int = 1) -> subprocess.Popen[bytes]:
    fd = logs.open_log(paths, FLEET, AGENT)
    try:
        return subprocess.Popen([sys.executable, "-S", "-c", WRITER, str(count), str(per_write)], stdout=fd)
    finally:
        os.close(fd)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def test_opened_log_is_private_appending_and_not_inherited_by_accident(paths: Paths) -> None:
    fd = logs.open_log(paths, FLEET, AGENT)
    try:
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert live(paths).parent.stat().st_mode & 0o777 == 0o700
        assert not os.get_inheritable(fd)
        assert os.get_blocking(fd)
        live(paths).write_bytes(b"first\n")
        os.write(fd, b"second\n")
        assert live(paths).read_bytes() == b"first\nsecond\n"
    finally:
        os.close(fd)


@pytest.mark.parametrize("per_write", [1, 400])
def test_rotation_loses_tears_and_doubles_nothing_while_the_agent_writes(paths: Paths, per_write: int) -> None:
    count, cuts = 30_000, 0
    expected = numbered(0, count)
    writer, rotator = start_writer(paths, count, per_write), rotation.Rotator(paths)
    while writer.poll() is None:
        checked = rotator.rotate(FLEET, AGENT, SMALL)
        assert checked.problem == ""
        cuts += checked.cuts
        assert expected.startswith(so_far(paths)), "a reader saw something torn, lost or doubled"
    while more := rotator.rotate(FLEET, AGENT, SMALL).cuts:
        cuts += more
    assert everything(paths) == expected
    assert cuts > 20
    for part in parts(paths):
        assert part.read_bytes().endswith(b"\n")
        assert part.stat().st_size <= SMALL.max_bytes
        assert part.stat().st_mode & 0o777 == 0o600
    assert live(paths).stat().st_blocks * 512 < 100_000 < live(paths).stat().st_size


def test_a_reader_in_another_thread_never_sees_a_torn_line_while_files_are_cut(paths: Paths) -> None:
    count, done, wrong = 20_000, threading.Event(), list[str]()
    expected = numbered(0, count)

    def read() -> None:
        while not done.is_set():
            if not expected.startswith(so_far(paths)):
                wrong.append("all")
            last = b"\n".join(logread.tail(paths, FLEET, AGENT, lines=3))
            if last not in expected:
                wrong.append(f"tail {last!r}")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        writer, rotator = start_writer(paths, count), rotation.Rotator(paths)
        while writer.poll() is None:
            rotator.rotate(FLEET, AGENT, SMALL)
    finally:
        done.set()
        reader.join()
    assert wrong == []


def test_killed_rotators_lose_and_double_nothing(paths: Paths) -> None:
    count, kills, dice = 150_000, 0, random.Random(4)
    expected = numbered(0, count)
    writer = start_writer(paths, count)
    while writer.poll() is None or kills < 3:  # what is left to cut is enough for many more
        with subprocess.Popen([sys.executable, "-c", ROTATOR, paths.root], stdout=subprocess.PIPE) as rotator:
            assert rotator.stdout is not None
            assert rotator.stdout.readline() == b"up\n"
            time.sleep(dice.random() * 0.03)  # the moment of the kill is to be random
            rotator.kill()
            kills += 1
        assert rotator.returncode == -signal.SIGKILL
        assert expected.startswith(so_far(paths))
    assert rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL).problem == ""
    assert everything(paths) == expected
    assert len(parts(paths)) > 10


STEPS: list[tuple[ModuleType, str]] = [
    (logcut, "_copy"),
    (os, "rename"),
    (logcut, "punch"),
    (logcut, "prune"),
    (logcut, "empty"),
    (logfiles, "unlink"),
    (logindex, "note"),
]


@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[step for _, step in STEPS])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_kill_around_any_step_is_made_good_by_the_next_check(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, owner: ModuleType, step: str, after: bool, keep: int
) -> None:
    real, calls = getattr(owner, step), 0
    spec = LogSpec(max_bytes=4096, keep=keep)

    def deadly(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls in fatal and not after:
            raise Killed
        result = real(*args, **kwargs)
        if calls in fatal:
            raise Killed
        return result

    fatal = set(range(1, 40, 2))
    monkeypatch.setattr(owner, step, deadly)
    rotator, line, killed = rotation.Rotator(paths), 0, 0
    for _ in range(12):
        write(paths, numbered(line, line + 60))
        line += 60
        try:
            rotator.rotate(FLEET, AGENT, spec)
        except Killed:
            killed += 1
            rotator = rotation.Rotator(paths)
        # What is there is an unbroken run of lines up to the last one; only the oldest may be gone.
        seen = everything(paths)
        assert numbered(0, line).endswith(seen)
        assert seen.startswith(b"%d " % (line - seen.count(b"\n")))
        assert seen.count(b"\n") >= min(line, keep * 60)
    assert killed or (step == "_copy" and keep == 0) or (step == "empty" and keep != 1)
    monkeypatch.undo()
    assert rotation.Rotator(paths).rotate(FLEET, AGENT, spec).problem == ""
    assert numbered(0, line).endswith(everything(paths))
    assert len([part for part in parts(paths) if part.stat().st_size]) <= keep
    assert live(paths).stat().st_blocks * 512 <= 16384


def test_only_so_many_rotated_files_are_kept_and_the_oldest_go(paths: Paths) -> None:
    spec, rotator = LogSpec(max_bytes=4096, keep=2), rotation.Rotator(paths)
    for first in range(0, 3000, 50):
        write(paths, numbered(first, first + 50))
        rotator.rotate(FLEET, AGENT, spec)
    assert len(parts(paths)) == 2
    seen = everything(paths)
    assert numbered(0, 3000).endswith(seen)
    assert 8000 < len(seen) < 3 * 4096


def test_nothing_is_kept_where_keep_is_0_and_the_disk_stays_empty(paths: Paths) -> None:
    spec, rotator = LogSpec(max_bytes=4096, keep=0), rotation.Rotator(paths)
    for first in range(0, 3000, 50):
        write(paths, numbered(first, first + 50))
        rotator.rotate(FLEET, AGENT, spec)
    seen = everything(paths)
    assert numbered(0, 3000).endswith(seen)
    assert 0 < len(seen) <= 4096
    assert sum(path.stat().st_blocks for path in live(paths).parent.iterdir()) * 512 <= 16384


def test_a_line_longer_than_the_limit_is_kept_whole_and_an_endless_one_is_cut(paths: Paths) -> None:
    rotator = rotation.Rotator(paths)
    write(paths, b"short\n" + b"y" * 20_000)
    assert rotator.rotate(FLEET, AGENT, SMALL).cuts == 1
    assert rotator.rotate(FLEET, AGENT, SMALL).cuts == 0
    write(paths, b"\nnext\n")
    assert rotator.rotate(FLEET, AGENT, SMALL).cuts == 1
    assert parts(paths)[1].read_bytes() == b"y" * 20_000 + b"\n"
    write(paths, b"z" * (logfiles.LONGEST_LINE_BYTES + 5000))
    assert rotator.rotate(FLEET, AGENT, SMALL).cuts == 2
    lines = list(logread.tail(paths, FLEET, AGENT, lines=None))
    assert lines == [b"short", b"y" * 20_000, b"next", b"z" * logfiles.LONGEST_LINE_BYTES, b"z" * 5000]


def test_nuls_of_the_agent_are_kept(paths: Paths) -> None:
    rotator = rotation.Rotator(paths)
    for _ in range(20):
        write(paths, b"\0" * 700 + b"\n" + b"\0\0\n")
        rotator.rotate(FLEET, AGENT, SMALL)
    assert everything(paths) == (b"\0" * 700 + b"\n" + b"\0\0\n") * 20
    assert parts(paths)


def test_a_spewing_agent_is_looked_at_again_sooner(paths: Paths) -> None:
    rotator, spec = rotation.Rotator(paths), LogSpec(max_bytes=1 << 20)
    write(paths, b"hello\n")
    rotator.rotate(FLEET, AGENT, spec)
    assert rotator.rotate(FLEET, AGENT, spec).wait_seconds == rotation.LONGEST_WAIT_SECONDS
    for _ in range(5):
        write(paths, b"x" * 99_999 + b"\n")
    assert rotator.rotate(FLEET, AGENT, spec).wait_seconds < 3


def test_tail_counts_lines_over_all_files_and_shows_an_unfinished_last_one(paths: Paths) -> None:
    assert list(logread.tail(paths, FLEET, AGENT)) == []
    rotator = rotation.Rotator(paths)
    write(paths, numbered(0, 500))
    rotator.rotate(FLEET, AGENT, SMALL)
    write(paths, b"half")
    expected = [*numbered(0, 500).split(b"\n")[:-1], b"half"]
    for lines in (0, 1, 2, 60, 200, 501, 502, 9999):
        assert list(logread.tail(paths, FLEET, AGENT, lines=lines)) == (expected[-lines:] if lines else [])


def test_since_begins_at_the_line_that_was_last_then(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    rotator, at = rotation.Rotator(paths), 1_000_000.0
    monkeypatch.setattr(time, "monotonic", lambda: at)
    monkeypatch.setattr(time, "time", lambda: at)
    for first in range(0, 1000, 100):
        at += 60
        write(paths, numbered(first, first + 100))
        rotator.rotate(FLEET, AGENT, SMALL)
    lines = numbered(0, 1000).split(b"\n")[:-1]
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=at - 130)) == lines[700:]
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=at - 120)) == lines[800:]
    assert list(logread.tail(paths, FLEET, AGENT, lines=5, since=at - 130)) == lines[-5:]
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=at + 1)) == []
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=0)) == lines


def test_since_knows_by_the_times_of_the_files_what_the_index_does_not_tell(paths: Paths) -> None:
    before, now = numbered(0, 10), time.time()
    write(paths, before)
    os.utime(live(paths), (now - 100, now - 100))
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=now - 50)) == []  # no index, and nothing written since
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=now - 150)) == before.splitlines()
    follower = logread.Follower(paths, FLEET, AGENT, None, now - 50)
    assert follower.read() == []
    logindex.note(os.fspath(live(paths)), now - 200, 0)  # the last point lies before the last lines
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=now - 50)) == []
    whole = logfiles.new_part(os.fspath(live(paths)), 0, 0, len(before), whole=True)
    os.rename(live(paths), whole.path)  # as when the next instance starts
    write(paths, b"new\n")
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=now - 50)) == [b"new"]
    assert list(logread.tail(paths, FLEET, AGENT, lines=None, since=now - 150)) == [*before.splitlines(), b"new"]
    assert follower.read() == [b"new"]
    follower.close()


def test_the_time_index_is_bounded_and_keeps_recent_times_exact(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    rotator, at = rotation.Rotator(paths), 1_000_000.0
    monkeypatch.setattr(time, "monotonic", lambda: at)
    monkeypatch.setattr(time, "time", lambda: at)
    for _ in range(9000):
        at += 5
        with live(paths).open("ab") if live(paths).exists() else os.fdopen(logs.open_log(paths, FLEET, AGENT), "ab") as file:
            file.write(b"0123456\n")
        rotator.rotate(FLEET, AGENT, LogSpec())
    assert Path(f"{live(paths)}.idx").stat().st_size <= 4096 * 16 + 16
    assert len(list(logread.tail(paths, FLEET, AGENT, lines=None, since=at - 50))) == 10
    assert 5000 <= len(list(logread.tail(paths, FLEET, AGENT, lines=None, since=at - 25_000))) < 5200


def test_follow_goes_over_rotation_and_restarts_and_waits_for_the_file(paths: Paths) -> None:
    count, stopped, lines = 30_000, threading.Event(), list[bytes]()
    follower = logread.Follower(paths, FLEET, AGENT, lines=None)

    def follow() -> None:
        while not stopped.wait(0.002):
            lines.extend(follower.read())

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        rotator = rotation.Rotator(paths)
        writer = start_writer(paths, count)
        while writer.poll() is None:
            rotator.rotate(FLEET, AGENT, SMALL)
        wait_until(lambda: len(lines) == count)
        inode = live(paths).stat().st_ino
        write(paths, b"next instance\n")
        wait_until(lambda: lines[-1] == b"next instance")
        assert live(paths).stat().st_ino == inode, "a file that is being read is not set aside"
    finally:
        stopped.set()
        reader.join()
        follower.close()
    assert b"".join(line + b"\n" for line in lines) == numbered(0, count) + b"next instance\n"


def test_a_follower_goes_on_where_a_live_file_was_set_aside_deleted_or_truncated(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_in_use", lambda fd: False)  # the follower itself has the file open
    rotator = rotation.Rotator(paths)
    write(paths, b"begin\n")
    follower = logread.Follower(paths, FLEET, AGENT)
    try:
        assert follower.read() == [b"begin"]
        number = itertools.count()
        expected: list[bytes] = []

        def say(lines: int) -> None:
            new = [b"%d %s" % (next(number), b"w" * 60) for _ in range(lines)]
            write(paths, b"\n".join(new) + b"\n")
            expected.extend(new)

        for _ in range(3):  # nothing is read meanwhile: three live files are set aside, two of them never seen
            say(2000)
            rotator.rotate(FLEET, AGENT, LogSpec(max_bytes=65536, keep=100))
            say(3)
        assert follower.read() == expected
        live(paths).unlink()
        say(10)
        assert follower.read() == expected[-10:]
        os.truncate(live(paths), 0)
        assert follower.read() == []
        say(5)
        assert follower.read() == expected[-5:]
        write(paths, b"unfinished")
        assert follower.read() == []
        write(paths, b" until now\n")
        assert follower.read() == [b"unfinished until now"]
    finally:
        follower.close()


def test_a_new_instance_gets_a_file_of_its_own_after_cuts_and_no_line_is_lost(paths: Paths) -> None:
    rotator = rotation.Rotator(paths)
    for instance in range(4):
        write(paths, numbered(instance * 2000, instance * 2000 + 2000))
        rotator.rotate(FLEET, AGENT, SMALL)
    assert live(paths).stat().st_size < 200_000, "the apparent size does not add up over instances"
    assert everything(paths) == numbered(0, 8000)


def test_instances_that_say_the_same_are_told_apart(paths: Paths) -> None:
    same = numbered(0, 2000)
    for _ in range(4):
        write(paths, same)
        assert rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL).problem == ""
    assert everything(paths) == same * 4


def test_a_file_that_an_earlier_writer_still_holds_is_not_set_aside(paths: Paths) -> None:
    held = logs.open_log(paths, FLEET, AGENT)
    try:
        os.write(held, numbered(0, 2000))
        rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL)
        write(paths, numbered(2000, 2001))
        os.write(held, numbered(2001, 2002))
        assert everything(paths) == numbered(0, 2002)
    finally:
        os.close(held)


def test_a_live_file_deleted_or_replaced_from_outside_is_taken_as_new(paths: Paths) -> None:
    rotator = rotation.Rotator(paths)
    write(paths, numbered(0, 2000))
    rotator.rotate(FLEET, AGENT, SMALL)
    before = sum(part.stat().st_size for part in parts(paths))
    live(paths).unlink()
    assert "removed" in rotator.rotate(FLEET, AGENT, SMALL).problem
    write(paths, b"new " + numbered(5000, 8000))
    expected = numbered(0, 2000)[:before] + b"new " + numbered(5000, 8000)
    assert everything(paths) == expected
    rotator.rotate(FLEET, AGENT, SMALL)
    assert everything(paths) == expected


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_live_file_truncated_from_outside_while_the_agent_writes_goes_on_rotating(paths: Paths, keep: int) -> None:
    rotator, spec = rotation.Rotator(paths), LogSpec(max_bytes=4096, keep=keep)
    fd = logs.open_log(paths, FLEET, AGENT)
    try:
        os.write(fd, numbered(0, 2000))
        rotator.rotate(FLEET, AGENT, spec)
        before = everything(paths)[: sum(part.stat().st_size for part in parts(paths))]
        os.truncate(live(paths), 0)
        os.write(fd, b"again\n" + numbered(0, 3000))
        assert everything(paths) == before + b"again\n" + numbered(0, 3000)
        assert rotator.rotate(FLEET, AGENT, spec).problem == ""
        seen = everything(paths)
        assert seen == before + b"again\n" + numbered(0, 3000) if keep else numbered(0, 3000).endswith(seen)
    finally:
        os.close(fd)


def test_rotated_files_removed_from_outside_leave_the_rest_readable(paths: Paths) -> None:
    rotator = rotation.Rotator(paths)
    write(paths, numbered(0, 2000))
    rotator.rotate(FLEET, AGENT, SMALL)
    for part in parts(paths):
        part.unlink()
    seen = everything(paths)
    assert 0 < len(seen) < 4096
    assert numbered(0, 2000).endswith(seen)
    assert rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL).problem == ""
    fd = os.open(live(paths), os.O_WRONLY | os.O_APPEND)
    os.write(fd, numbered(2000, 4000))
    os.close(fd)
    assert rotator.rotate(FLEET, AGENT, SMALL).cuts > 10
    assert everything(paths) == seen + numbered(2000, 4000)


@pytest.mark.parametrize("trap", ["symlink", "hard link", "fifo", "folder"])
def test_what_is_no_file_of_ours_is_refused_and_left_alone(paths: Paths, trap: str) -> None:
    precious = Path(paths.root) / "precious"
    precious.write_bytes(numbered(0, 2000))
    live(paths).parent.mkdir()
    {
        "symlink": lambda: live(paths).symlink_to(precious),
        "hard link": lambda: live(paths).hardlink_to(precious),
        "fifo": lambda: os.mkfifo(live(paths)),
        "folder": lambda: live(paths).mkdir(),
    }[trap]()
    with pytest.raises(StateDirectoryError, match=AGENT):
        logs.open_log(paths, FLEET, AGENT)
    checked = rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL)
    assert checked.cuts == 0
    assert checked.problem or trap in ("fifo", "folder")
    assert precious.read_bytes() == numbered(0, 2000)
    if trap != "hard link":
        with pytest.raises(StateDirectoryError, match=AGENT):
            list(logread.tail(paths, FLEET, AGENT))
        assert logread.last_lines(paths, FLEET, AGENT) == []


@pytest.mark.parametrize("names", [("..", AGENT), ("demo", "../x"), ("a/b", "c"), (".", "x")])
def test_names_that_lead_elsewhere_are_refused(paths: Paths, names: tuple[str, str]) -> None:
    with pytest.raises(StateDirectoryError):
        logs.open_log(paths, *names)


def test_a_planted_symlink_in_the_place_of_the_copy_is_not_followed(paths: Paths) -> None:
    precious = Path(paths.root) / "precious"
    precious.write_text("precious")
    write(paths, numbered(0, 500))
    Path(f"{live(paths)}.tmp").symlink_to(precious)
    assert rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL).cuts > 1
    assert precious.read_text() == "precious"


def test_without_hole_punching_nothing_is_cut_or_lost_and_the_next_instance_starts_afresh(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logcut, "_fallocate", lambda: None)
    rotator = rotation.Rotator(paths)
    for first in range(0, 8000, 1000):
        fd = logs.open_log(paths, FLEET, AGENT, LogSpec(max_bytes=4096, keep=3))
        os.write(fd, numbered(first, first + 1000))
        os.close(fd)
        checked = rotator.rotate(FLEET, AGENT, SMALL)
        assert checked.cuts == 0
        assert "cannot free" in checked.problem
    assert everything(paths) == numbered(4000, 8000)
    assert len(parts(paths)) == 3


def test_a_full_disk_during_rotation_loses_nothing_and_heals(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    real = logcut._copy

    def full(source: int, target: int, offset: int, length: int) -> None:
        real(source, target, offset, length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rotator = rotation.Rotator(paths)
    write(paths, numbered(0, 1000))
    with monkeypatch.context() as patched:
        patched.setattr(logcut, "_copy", full)
        checked = rotator.rotate(FLEET, AGENT, SMALL)
        assert "No space left" in checked.problem
        assert checked.wait_seconds == rotation.LONGEST_WAIT_SECONDS
    assert not list(live(paths).parent.glob("*.tmp"))
    assert everything(paths) == numbered(0, 1000)
    assert rotator.rotate(FLEET, AGENT, SMALL).problem == ""
    assert everything(paths) == numbered(0, 1000)


@pytest.fixture
def small_disk() -> Iterator[Paths]:
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"needs to mount a small file system: {mounted.stderr.decode().strip()}")
        try:
            made = Paths(folder)
            made.prepare()
            yield made
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk_loses_nothing_that_was_written(small_disk: Paths) -> None:
    paths, spec, rotator = small_disk, LogSpec(max_bytes=65536, keep=2), rotation.Rotator(small_disk)
    fd = logs.open_log(paths, FLEET, AGENT)
    try:
        written = 0
        while put(fd, written):
            written += 1
        assert written > 2000
        assert "No space left" in rotator.rotate(FLEET, AGENT, spec).problem
        assert numbered(0, written + 1).startswith(so_far(paths))
        assert len(so_far(paths)) >= len(numbered(0, written)) - 1
        # Somebody makes room, less than the log itself takes.
        subprocess.run(["mount", "-o", "remount,size=384k", paths.root], check=True)
        assert rotator.rotate(FLEET, AGENT, spec).problem == ""
        assert len(parts(paths)) == 2
        assert allocated(paths) < 220_000
        os.write(fd, b"\n")
        assert put(fd, written)
        assert everything(paths).endswith(numbered(written, written + 1))
    finally:
        os.close(fd)


def put(fd: int, number: int) -> bool:
    """Write a line as an agent would; False where the disk is full, then perhaps with a part of the line written."""
    line = numbered(number, number + 1)
    try:
        return os.write(fd, line) == len(line)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return False
        raise


def allocated(paths: Paths) -> int:
    return sum(path.stat().st_blocks for path in live(paths).parent.iterdir()) * 512


def test_the_cap_removes_the_oldest_rotated_files_over_all_agents(paths: Paths) -> None:
    spec, rotator, names = LogSpec(max_bytes=8192, keep=100, total_bytes=200_000), rotation.Rotator(paths), ["demo-a", "demo-b", "demo-c"]
    for turn in range(30):
        for name in names:
            write(paths, numbered(turn * 200, turn * 200 + 200), name)
            assert rotator.rotate(FLEET, name, spec).problem == ""
            for number, part in enumerate(parts(paths, name)):
                if part.stat().st_mtime > 2_000_000:
                    os.utime(part, (turn * 1000 + number, turn * 1000 + number))
    assert allocated(paths) > spec.total_bytes
    total = rotator.enforce_total(FLEET, spec, alive=names)
    assert total.problem == ""
    assert total.removed > 10
    assert allocated(paths) == total.allocated_bytes <= spec.total_bytes
    for name in names:  # all of them lost their old lines, none its new ones
        seen = everything(paths, name)
        assert numbered(0, 6000).endswith(seen)
        assert 30_000 < len(seen) < 100_000


def test_the_cap_looks_at_the_files_only_when_there_is_something_new(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: at)
    real, scans = logfiles.scan, 0

    def scan(folder: str) -> list[logfiles.File]:
        nonlocal scans
        scans += 1
        return real(folder)

    monkeypatch.setattr(logfiles, "scan", scan)
    rotator = rotation.Rotator(paths)

    def round_of_the_daemon(seconds: float, *, total_bytes: int = 50_000, alive: tuple[str, ...] = (AGENT,)) -> rotation.Total:
        nonlocal at
        at += seconds
        rotator.rotate(FLEET, AGENT, LogSpec(max_bytes=1 << 20))
        return rotator.enforce_total(FLEET, LogSpec(total_bytes=total_bytes), alive)

    write(paths, numbered(0, 10))
    first = round_of_the_daemon(5)
    assert [round_of_the_daemon(5), round_of_the_daemon(5)] == [first, first]
    assert scans == 1
    write(paths, numbered(10, 2000))
    second = round_of_the_daemon(5)
    assert 30_000 < second.allocated_bytes <= 50_000
    write(paths, numbered(2000, 4000))
    assert round_of_the_daemon(0.2) == second
    assert scans == 2
    assert 30_000 < round_of_the_daemon(5).allocated_bytes <= 50_000
    assert scans == 3
    assert round_of_the_daemon(0.2, total_bytes=30_000).allocated_bytes <= 30_000
    assert round_of_the_daemon(0.2, total_bytes=30_000, alive=()).allocated_bytes <= 30_000
    assert scans == 5


def test_the_cap_reaches_live_files_when_nothing_else_is_left(paths: Paths) -> None:
    spec, rotator = LogSpec(max_bytes=1 << 20, total_bytes=150_000), rotation.Rotator(paths)
    write(paths, numbered(0, 5000), "demo-a")
    write(paths, numbered(0, 100), "demo-b")
    total = rotator.enforce_total(FLEET, spec)
    assert total.problem == ""
    assert allocated(paths) == total.allocated_bytes <= spec.total_bytes
    seen = everything(paths, "demo-a")
    assert 100_000 < len(seen) < 150_000
    assert numbered(0, 5000).endswith(seen)
    assert everything(paths, "demo-b") == numbered(0, 100)
    write(paths, numbered(5000, 5001), "demo-a")
    assert everything(paths, "demo-a") == seen + numbered(5000, 5001)


def test_logs_of_agents_that_are_gone_stay_until_the_cap_needs_their_room(paths: Paths) -> None:
    rotator = rotation.Rotator(paths)
    write(paths, numbered(0, 1000), "demo-old")
    write(paths, numbered(0, 1000), AGENT)
    assert rotator.enforce_total(FLEET, LogSpec(), alive=[AGENT]).removed == 0
    assert everything(paths, "demo-old") == numbered(0, 1000)
    assert logfiles.agents(paths, FLEET) == [AGENT, "demo-old"]
    total = rotator.enforce_total(FLEET, LogSpec(total_bytes=60_000), alive=[AGENT])
    assert total.removed == 1
    assert logfiles.agents(paths, FLEET) == [AGENT]
    assert everything(paths) == numbered(0, 1000)


def test_only_so_many_gone_agents_leave_their_logs(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "GONE_AGENTS_KEPT", 3)
    rotator = rotation.Rotator(paths)
    for number in range(6):
        write(paths, b"x\n", f"demo-{number}")
        rotator.rotate(FLEET, f"demo-{number}", LogSpec())
        for file in live(paths).parent.glob(f"demo-{number}.*"):
            os.utime(file, (number, number))
    Path(paths.agent_log(FLEET, "demo-5") + ".tmp").write_text("unfinished")
    rotator.enforce_total(FLEET, LogSpec(), alive=["demo-0"])
    assert logfiles.agents(paths, FLEET) == ["demo-0", "demo-3", "demo-4", "demo-5"]
    assert rotator.rotate(FLEET, "demo-1", LogSpec()).problem == "", "nothing is remembered of a log that was removed on purpose"
    assert not list(live(paths).parent.glob("*.tmp"))


def test_an_interrupted_cut_is_finished_before_the_cap_empties_its_proof(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    write(paths, numbered(0, 200))
    with monkeypatch.context() as patched:
        patched.setattr(logcut, "punch", lambda fd, offset, length: (_ for _ in ()).throw(Killed) if offset == 0 else None)
        with pytest.raises(Killed):
            rotation.Rotator(paths).rotate(FLEET, AGENT, SMALL)
    assert everything(paths) == numbered(0, 200)
    rotation.Rotator(paths).enforce_total(FLEET, LogSpec(total_bytes=16384))
    seen = everything(paths)
    assert numbered(0, 200).endswith(seen)


def test_last_lines_cannot_steer_a_terminal(paths: Paths) -> None:
    write(paths, b"one\n\x1b[31mred\x1b[0m \x1b]0;title\x07end\r\nbad \xff\x00\x9b byte\n\ttab\n")
    write(paths, "\u202eevil\nlong ".encode() + b"l" * 999)
    expected = ["red end", "bad \ufffd\ufffd byte", "    tab", "evil", "long " + "l" * 395]
    assert logread.last_lines(paths, FLEET, AGENT, 5) == expected


def test_reading_imports_little() -> None:
    code = (
        "import sys; import fleetctl.host.logread; "
        "print({'asyncio', 'ctypes', 'dataclasses', 'fleetctl.host.logcut', 'fleetctl.models', 'psutil'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
