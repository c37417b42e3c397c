"""The notify socket with real senders: who is heard, what is dropped and counted, and that nothing of it costs others or leaks."""

import array
import asyncio
import os
import random
import resource
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fleetctl.errors import StateDirectoryError
from fleetctl.host.notify import BURST, MAX_BYTES, NotifySocket
from tests.helpers import wait_for

Story = Coroutine[Any, Any, None]  # Any: what a coroutine yields is the loop's affair
ME, SIBLING = "demo-aaaaa", "demo-bbbbb"
TOO_MANY, TOO_LARGE = "more than 50 a second", "larger than 4096 bytes"
FLOOD = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    print("READY", flush=True)
    try:
        while True:
            out.sendto(b"STATUS=flood", sys.argv[1])
    except OSError:
        pass
"""
SENDS = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    out.sendto(b"READY=1", sys.argv[1])
"""


class Ear:
    """A notify socket, what it heard, and what went wrong in the loop. `owners`: the agents of the pids that have one."""

    def __init__(self, path: str) -> None:
        self.owners = {os.getpid(): ME}
        self.heard: list[tuple[str, bytes]] = []
        self.broken: list[object] = []
        self.socket = NotifySocket(path, lambda pid: self.owners.get(pid), lambda agent_id, data: self.heard.append((agent_id, data)))
        self.voice = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.voice.setblocking(False)

    def run(self, story: Callable[[], Story]) -> None:
        async def told() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: self.broken.append(context))
            self.socket.open()
            self.socket.listen()
            try:
                await story()
            finally:
                self.socket.close()

        with self.voice:
            asyncio.run(told())
        assert not self.broken

    async def say(self, data: bytes, descriptors: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while True:
            try:
                self.voice.sendmsg([data], rights, 0, self.socket.path)
                return
            except BlockingIOError:  # the kernel holds ten
                await asyncio.sleep(0)

    async def say_and_wait(self, data: bytes) -> None:
        await self.say(data)
        await wait_for(lambda: self.heard and self.heard[-1] == (ME, data))

    @property
    def dropped(self) -> dict[str, int]:
        return self.socket.dropped(ME)


@pytest.fixture
def ear(state_dir: str) -> Ear:
    return Ear(f"{state_dir}/run/notify.sock")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_are_heard_in_order_with_their_agent(ear: Ear) -> None:
    async def story() -> None:
        for number in range(30):
            await ear.say(b"%d" % number)
        await ear.say_and_wait(b"")
        assert [data for _, data in ear.heard] == [*(b"%d" % number for number in range(30)), b""]
        assert {agent_id for agent_id, _ in ear.heard} == {ME}
        assert (ear.dropped, ear.socket.strangers) == ({}, 0)
        assert Path(ear.socket.path).stat().st_mode & 0o777 == 0o600

    ear.run(story)


def test_a_sender_is_who_the_kernel_says(ear: Ear) -> None:
    async def story() -> None:
        with subprocess.Popen([sys.executable, "-c", SENDS, ear.socket.path]) as stranger:
            await wait_for(lambda: ear.socket.strangers)
        with subprocess.Popen([sys.executable, "-c", SENDS, ear.socket.path], stdin=subprocess.PIPE) as sibling:
            ear.owners[sibling.pid] = SIBLING
            await wait_for(lambda: ear.heard)
        assert ear.heard == [(SIBLING, b"READY=1")]
        assert ear.socket.strangers == 1
        assert stranger.returncode == sibling.returncode == 0

    ear.run(story)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_even_send(ear: Ear) -> None:
    async def story() -> None:
        for folder in Path(ear.socket.path).parents[:3]:
            folder.chmod(0o711)  # so that it is the socket itself that refuses
        # After the imports, because that user may not be able to read Python's own files.
        code = SENDS.replace("import socket, sys", "import os, socket, sys\nos.setgroups([])\nos.setuid(65534)")
        sent = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code, ear.socket.path], capture_output=True, text=True)
        assert "PermissionError: [Errno 13]" in sent.stderr
        await ear.say_and_wait(b"READY=1")
        assert len(ear.heard) == 1

    ear.run(story)


def test_an_oversized_message_is_dropped_and_the_next_one_heard(ear: Ear) -> None:
    async def story() -> None:
        for size in (MAX_BYTES + 1, 100_000):
            await ear.say(b"x" * size)
        await ear.say_and_wait(b"x" * MAX_BYTES)
        assert ear.dropped == {TOO_LARGE: 2}

    ear.run(story)


def test_an_agent_is_heard_fifty_times_a_second_and_some_more_at_once(ear: Ear) -> None:
    async def story() -> None:
        for _ in range(500):
            await ear.say(b"STATUS=again")
        await wait_for(lambda: len(ear.heard) + ear.dropped.get(TOO_MANY, 0) == 500)
        assert BURST <= len(ear.heard) < 500
        await asyncio.sleep(0.1)  # what refills is time
        await ear.say_and_wait(b"READY=1")

    ear.run(story)


def test_a_flood_delays_nobody(ear: Ear) -> None:
    async def story() -> None:
        with subprocess.Popen([sys.executable, "-c", FLOOD, ear.socket.path], stdout=subprocess.PIPE) as flood:
            try:
                ear.owners[flood.pid] = SIBLING
                assert flood.stdout is not None
                await asyncio.to_thread(flood.stdout.readline)
                await wait_for(lambda: sum(ear.socket.dropped(SIBLING).values()) > 3000)
                for number in range(20):  # a sender that waits for its turn, as systemd's own library does
                    await asyncio.to_thread(blocking_send, ear.socket.path, b"%d" % number)
                await wait_for(lambda: [data for agent_id, data in ear.heard if agent_id == ME] == [b"%d" % number for number in range(20)])
                assert flood.poll() is None
            finally:
                flood.kill()
        assert ear.dropped == {}

    ear.run(story)


def blocking_send(path: str, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.settimeout(5.0)
        out.sendto(data, path)


def test_what_is_sent_before_it_listens_waits(state_dir: str) -> None:
    ear = Ear(f"{state_dir}/run/notify.sock")

    async def story() -> None:
        ear.socket.open()
        await ear.say(b"READY=1")
        await asyncio.sleep(0.01)
        assert ear.heard == []
        ear.socket.listen()
        await wait_for(lambda: ear.heard)
        ear.socket.close()

    with ear.voice:
        asyncio.run(story())


def test_a_barrier_opens_when_what_was_said_before_is_taken_in(ear: Ear) -> None:
    async def story() -> None:
        reader, writer = os.pipe()
        await ear.say(b"READY=1")
        await ear.say(b"BARRIER=1", [writer])
        os.close(writer)
        poll = select.poll()
        poll.register(reader, 0)
        assert await asyncio.to_thread(poll.poll, 5000) == [(reader, select.POLLHUP)]
        os.close(reader)
        assert ear.heard == [(ME, b"READY=1"), (ME, b"BARRIER=1")]

    ear.run(story)


def test_a_flood_of_descriptors_leaks_none(ear: Ear) -> None:
    async def story() -> None:
        reader, writer = os.pipe()
        before = open_descriptors()
        for number in (1, 2, 3, 253):
            await ear.say(b"x%d" % number, [reader] * number)
        await ear.say(b"y" * (MAX_BYTES + 1), [reader, writer])
        for _ in range(300):  # most of them too many
            await ear.say(b"z", [reader, reader, writer])
        await wait_for(lambda: ear.dropped.get(TOO_MANY))
        await asyncio.sleep(0.1)
        await ear.say_and_wait(b"READY=1")
        assert open_descriptors() == before
        os.close(reader)
        os.close(writer)

    ear.run(story)


def test_out_of_descriptors_it_still_hears(ear: Ear) -> None:
    async def story() -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        reader, writer = os.pipe()
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() - 1, limit[1]))
        try:
            await ear.say(b"READY=1", [reader, writer])
            await wait_for(lambda: ear.heard == [(ME, b"READY=1")])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            os.close(reader)
            os.close(writer)

    ear.run(story)


def test_a_sender_that_cannot_be_looked_up_is_a_stranger(ear: Ear) -> None:
    def owner_of(pid: int) -> str | None:
        raise OSError(24, "Too many open files")

    async def story() -> None:
        ear.socket._owner_of = owner_of
        await ear.say(b"READY=1")
        await wait_for(lambda: ear.socket.strangers == 1)
        assert ear.heard == []

    ear.run(story)


@pytest.mark.parametrize("left", ["socket", "file", "link"])
def test_what_an_earlier_daemon_left_is_replaced(ear: Ear, left: str, tmp_path: Path) -> None:
    path = Path(ear.socket.path)
    path.parent.mkdir(parents=True)
    if left == "socket":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as earlier:
            earlier.bind(str(path))
    elif left == "file":
        path.write_text("not a socket")
    else:
        path.symlink_to(tmp_path / "elsewhere")

    async def story() -> None:
        await ear.say_and_wait(b"READY=1")
        assert os.listdir(path.parent) == ["notify.sock"]
        assert not (tmp_path / "elsewhere").exists()

    ear.run(story)


@pytest.mark.parametrize("gone", ["its file", "its folder", "replaced"])
def test_removed_it_is_made_anew(ear: Ear, gone: str) -> None:
    path = Path(ear.socket.path)

    async def story() -> None:
        before = open_descriptors()
        path.unlink()
        if gone == "its folder":
            shutil.rmtree(path.parent)
        if gone == "replaced":
            path.write_text("")
        with pytest.raises(OSError):
            await ear.say(b"READY=1")
        ear.socket.ensure()
        await ear.say_and_wait(b"READY=1")
        identity = path.stat().st_ino
        ear.socket.ensure()
        assert path.stat().st_ino == identity
        assert open_descriptors() == before

    ear.run(story)
    assert not path.exists()


def test_a_socket_that_cannot_be_made_is_told_and_the_old_one_stays(ear: Ear) -> None:
    async def story() -> None:
        path = Path(ear.socket.path)
        path.unlink()
        path.mkdir()
        with pytest.raises(StateDirectoryError, match=r"notify\.sock cannot be made: Is a directory"):
            ear.socket.ensure()
        assert os.listdir(path.parent) == ["notify.sock"]
        path.rmdir()
        ear.socket.ensure()
        await ear.say_and_wait(b"READY=1")

    ear.run(story)


def test_it_removes_no_file_that_is_not_its_own(ear: Ear) -> None:
    path = Path(ear.socket.path)

    async def story() -> None:
        path.unlink()
        path.write_text("another daemon's")

    ear.run(story)
    assert path.read_text() == "another daemon's"


def test_counts_of_agents_that_are_gone_are_forgotten(ear: Ear) -> None:
    ear.socket.drop(ME, "not UTF-8")
    ear.socket.drop(SIBLING, "not UTF-8")
    ear.socket.forget({ME})
    assert (ear.socket.dropped(ME), ear.socket.dropped(SIBLING)) == ({"not UTF-8": 1}, {})
    ear.voice.close()


def test_whatever_is_sent_breaks_nothing_and_leaks_nothing(ear: Ear) -> None:
    """Two thousand of them here; `python -m tests.bench notify` sends a million through the whole chain."""
    source = random.Random(20261125)

    async def story() -> None:
        reader, writer = os.pipe()
        before = open_descriptors()
        ear.owners[os.getpid()] = ME
        for _ in range(2000):
            data = source.randbytes(source.choice((0, 1, 20, 200, 4096, 4097, 9000)))
            await ear.say(data, [reader, writer] * source.choice((0, 0, 0, 1, 5)))
        await wait_for(lambda: len(ear.heard) + sum(ear.dropped.values()) == 2000)
        assert set(ear.dropped) <= {TOO_MANY, TOO_LARGE}
        assert open_descriptors() == before
        os.close(reader)
        os.close(writer)

    ear.run(story)
