"""The mark that agents hand down: who has it, who has not, and that it changes nothing for them."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from fleetctl.host import helpers, tag

FREE = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
LEAVES_ITS_PARENT = """
import os, time
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(600)
os.wait()
"""


def elsewhere(work: Callable[[], object]) -> str:
    """What the work returns in a process of its own, as text: limits that were lowered cannot be raised again."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def test_children_and_theirs_are_born_with_it_and_we_go_without() -> None:
    with tag.worn("secret"):
        child = subprocess.Popen([sys.executable, "-S", "-c", LEAVES_ITS_PARENT], stdout=subprocess.PIPE, env={}, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert tag.read(child.pid) == tag.read(grandchild) == tag.of("secret")
    assert tag.read(os.getpid()) is None
    assert resource.getrlimit(15) == FREE
    os.kill(grandchild, 9)
    child.communicate()


def test_what_another_thread_starts_meanwhile_is_born_without() -> None:
    born: list[int | None] = []

    def start() -> None:
        with helpers.starting():
            child = subprocess.Popen(["sleep", "600"])
        born.append(tag.read(child.pid))
        child.kill()
        child.wait()

    with tag.worn("secret"):
        thread = threading.Thread(target=start)
        thread.start()
        assert tag.read(os.getpid()) is not None
    thread.join(10)
    assert born == [None]


def test_it_is_told_apart_and_does_not_give_the_token_away() -> None:
    marks = {tag.of(f"{number:032x}") for number in range(1000)}
    assert len(marks) == 1000
    assert not any(f"{number:x}" in f"{tag.of(f'{number:032x}'):x}" for number in range(1 << 40, (1 << 40) + 100))


def test_a_process_that_runs_already_can_be_given_one() -> None:
    child = subprocess.Popen(["sleep", "600"])
    assert tag.read(child.pid) is None
    tag.give(child.pid, "late")
    assert tag.read(child.pid) == tag.of("late")
    child.kill()
    child.wait()


def test_a_limit_that_somebody_chose_is_left_alone() -> None:
    def work() -> object:
        resource.setrlimit(15, (1_000_000, 2_000_000))
        with tag.worn("secret"):
            inside = resource.getrlimit(15)
        tag.give(os.getpid(), "secret")
        tag.shed()
        return inside, resource.getrlimit(15), tag.read(os.getpid())

    assert elsewhere(work) == str(((1_000_000, 2_000_000), (1_000_000, 2_000_000), None))


def test_who_was_started_by_an_agent_can_shed_its_mark() -> None:
    def work() -> object:
        with tag.worn("an agent's"):
            before = tag.read(os.getpid())
            tag.shed()
            return before is not None, tag.read(os.getpid()), resource.getrlimit(15) == FREE

    assert elsewhere(work) == str((True, None, True))


def test_a_process_of_a_real_time_class_is_not_bothered_by_it() -> None:
    code = """
import os, time
try:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
except PermissionError:
    print("may not", flush=True)
    os._exit(0)
end = time.monotonic() + 0.1
while time.monotonic() < end: pass
print("fine", flush=True)
"""
    with tag.worn("secret"):
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    if done.stdout == "may not\n":
        pytest.skip("this user may not use a real-time class")
    assert done.stdout == "fine\n"
