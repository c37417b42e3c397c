"""What /proc tells about ourselves, on real processes."""

import os
import signal
import threading

from fleetctl.host import procfs


def forked() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def test_children_are_told_to_the_last_of_many_and_zombies_too() -> None:
    before = procfs.children()
    assert before is not None
    started = [forked() for _ in range(1000)]  # more than a page of numbers
    try:
        os.kill(started[0], signal.SIGKILL)
        os.waitid(os.P_PID, started[0], os.WEXITED | os.WNOWAIT)
        assert procfs.children() == before | set(started)
    finally:
        end(started)
    assert procfs.children() == before


def test_children_of_other_threads_are_told() -> None:
    started: list[int] = []
    release = threading.Event()

    def start() -> None:
        started.append(forked())
        release.wait()  # a thread that ends leaves its children to another

    thread = threading.Thread(target=start)
    thread.start()
    try:
        while not started:
            os.sched_yield()
        children = procfs.children()
        assert children is not None
        assert started[0] in children
    finally:
        release.set()
        thread.join()
        end(started)
