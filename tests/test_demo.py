"""The demo agent as a real process: it works, counts on after a restart, rests most of the time, and stops when it is asked to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import wait_until

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start_demo(**environment: str) -> "subprocess.Popen[str]":
        environ = {**os.environ, "FLEETCTL_AGENT_ID": "demo-abcde", "STATE_DIRECTORY": str(tmp_path), **environment}
        demo = subprocess.Popen([sys.executable, "-m", "fleetctl.demo"], stdout=subprocess.PIPE, text=True, env=environ)
        started.append(demo)
        return demo

    yield start_demo
    for demo in started:
        demo.kill()
        demo.wait()
        assert demo.stdout is not None
        demo.stdout.close()


def next_line(demo: "subprocess.Popen[str]") -> str:
    """Waits for it."""
    assert demo.stdout is not None
    return demo.stdout.readline()


def stop(demo: "subprocess.Popen[str]", how: signal.Signals = signal.SIGTERM) -> str:
    demo.send_signal(how)
    out, _ = demo.communicate(timeout=20)
    return out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_says_so_and_exits_with_0(start: Start, tmp_path: Path, how: signal.Signals) -> None:
    demo = start()
    assert next_line(demo).endswith(f"Z demo-abcde: started, process {demo.pid}\n")
    last = stop(demo, how)
    assert demo.returncode == 0
    count = int((tmp_path / "counter").read_text())
    assert count >= 1
    assert last.endswith(f" demo-abcde: {how.name} received, stopped cleanly after {count} units\n")


def test_stopped_for_longer_than_a_wait_it_goes_on_and_still_hears_a_stop(start: Start, tmp_path: Path) -> None:
    demo = start()
    next_line(demo)
    wait_until(lambda: (tmp_path / "counter").exists())
    demo.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, demo.pid, os.WSTOPPED)
    stopped = time.monotonic()
    before = (tmp_path / "counter").read_text()
    wait_until(lambda: time.monotonic() > stopped + 1.2)  # longer than a unit: that is the case
    demo.send_signal(signal.SIGCONT)
    wait_until(lambda: (tmp_path / "counter").read_text() != before)
    assert "SIGTERM received, stopped cleanly" in stop(demo)
    assert demo.returncode == 0


def test_restarted_it_goes_on_counting(start: Start, tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("41\n")
    demo = start()
    assert next_line(demo).endswith("going on from 41 units\n")
    stop(demo)
    assert int((tmp_path / "counter").read_text()) >= 42
    assert os.listdir(tmp_path) == ["counter"]


@pytest.mark.parametrize("content", ["", "many", "-5", "\x00", "9" * 5000])
def test_counter_that_is_no_number_does_not_stop_it(start: Start, tmp_path: Path, content: str) -> None:
    (tmp_path / "counter").write_text(content)
    demo = start()
    assert "started" in next_line(demo)
    assert "stopped cleanly" in stop(demo)
    assert demo.returncode == 0


def test_it_logs_its_work_and_rests_most_of_the_time(start: Start, tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("3\n")
    demo = start()
    next_line(demo)
    assert ": 5 units done, last digest " in next_line(demo)
    demo.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(demo.pid, 0)
    demo.returncode = os.waitstatus_to_exitcode(status)
    assert demo.returncode == 0
    # Two or three bursts of 15 ms and the start of the interpreter in more than a second; a busy loop would take the whole second.
    assert usage.ru_utime + usage.ru_stime < 0.7


@pytest.mark.parametrize("folder", ["", "/no/such/folder"])
def test_it_works_where_it_can_keep_no_counter(start: Start, folder: str) -> None:
    demo = start(STATE_DIRECTORY=folder)
    next_line(demo)
    assert "stopped cleanly" in stop(demo)
    assert demo.returncode == 0


def test_full_disk_under_its_log_does_not_stop_it(tmp_path: Path) -> None:
    environ = {**os.environ, "STATE_DIRECTORY": str(tmp_path)}
    with open("/dev/full", "w") as full, subprocess.Popen([sys.executable, "-m", "fleetctl.demo"], stdout=full, env=environ) as demo:
        while not (tmp_path / "counter").exists():  # nothing else tells that it is at work
            assert demo.poll() is None
            os.sched_yield()
        demo.terminate()
        assert demo.wait(20) == 0


def test_it_imports_nothing_that_costs_start_up_time() -> None:
    code = "import sys; before = set(sys.modules); import fleetctl.demo; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) < 25
    assert not {"asyncio", "logging", "hashlib", "argparse", "typing", "pathlib", "json"} & set(loaded)
