"""What a person at a terminal sees: the commands run on a pseudo-terminal, keys are pressed, signals sent."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.cli.conftest import PROGRAM, environment
from tests.cli.fake_daemon import FakeDaemon, a_fleet, an_agent


class Terminal:
    """A command on a terminal of its own, with what it wrote so far."""

    def __init__(self, process: "subprocess.Popen[bytes]", fd: int) -> None:
        self.process = process
        self.fd = fd
        self.shown = ""

    def wait_for(self, pattern: str, seconds: float = 15.0) -> str:
        """Read until the pattern is there; returns everything shown."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:  # the other side is closed
                    data = b""
                self.shown += data.decode(errors="replace")
                assert data or re.search(pattern, self.shown), f"{pattern!r} is not in {self.shown!r}"
        return self.shown

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Read to the end; the exit status."""
        while True:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                break
            if not data:
                break
            self.shown += data.decode(errors="replace")
        return self.process.wait(15)


@contextmanager
def on_terminal(*arguments: str, columns: int = 80, lines: int = 24, extra: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    # preexec_fn is fine in a test: one thread forks here, and only the command's own terminal gets Ctrl-C as a signal.
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
        env={**environment(), "TERM": "xterm-256color", **(extra or {})},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def test_status_is_live_and_follows_changes_until_ctrl_c(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, note="[bold]as it is[/bold]")], desired_replicas=1)
    with on_terminal("status", columns=120) as terminal:
        terminal.wait_for(r"\[bold\]as it is\[/bold\]")
        daemon.fleets["web"] = a_fleet(agents=[an_agent(7, state="draining")])
        terminal.wait_for("web-00007.*draining")
        terminal.type("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown


@pytest.mark.parametrize("key", ["q", "\x1b"])
def test_a_key_ends_the_live_view_and_no_other_shows(daemon: FakeDaemon, key: str) -> None:
    daemon.fleets["web"] = a_fleet(size=1)
    with on_terminal("status", columns=120) as terminal:
        terminal.wait_for("ends this view")
        terminal.type("rm\r\x1b[A")
        terminal.type(key)
        assert terminal.end() == 0
        assert "rm" not in terminal.shown


def test_live_status_stays_inside_the_terminal(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(size=100)
    with on_terminal("status", columns=70, lines=12) as terminal:
        terminal.wait_for("more agents; `fleetctl ps` shows all")
        terminal.wait_for("Ctrl-C ends this view")
        rows = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", terminal.shown).split("\r\n")
        assert max(map(len, rows)) <= 70
        assert sum("web-000" in row for row in rows) < 12


def test_live_status_of_no_fleet_ends_at_once(daemon: FakeDaemon) -> None:
    with on_terminal("status", "ghost") as terminal:
        assert terminal.end() == 5


def test_status_without_a_daemon_is_no_live_view() -> None:
    with on_terminal("status") as terminal:
        assert terminal.end() == 0
        assert "no fleets" in terminal.shown


def test_status_once_on_a_terminal_is_a_coloured_table(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    with on_terminal("status", "--once") as terminal:
        assert terminal.end() == 0
        assert "\x1b[32mrunning" in terminal.shown
    for extra in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        with on_terminal("status", "--once", extra=extra) as terminal:
            assert terminal.end() == 0
            assert "running" in terminal.shown
            assert "\x1b" not in terminal.shown


def test_status_once_shows_no_more_than_the_terminal_does(daemon: FakeDaemon) -> None:
    daemon.fleets |= {"api": a_fleet("api", size=60), "web": a_fleet(size=2)}
    with on_terminal("status", "--once", columns=70, lines=12) as terminal:
        assert terminal.end() == 0
    assert len(terminal.shown.splitlines()) <= 11
    assert "more agents; `fleetctl ps` shows all" in terminal.shown
    assert "web-00001" in terminal.shown


def test_waiting_shows_progress_and_ctrl_c_leaves_with_130(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, state="starting", ready=False)], desired_replicas=3, ready_replicas=0)
    daemon.obedient = False
    with on_terminal("scale", "3") as terminal:
        terminal.wait_for("web: 0 of 3 ready, 1 starting")
        terminal.type("\x03")
        assert terminal.end() == 130


def test_sigterm_leaves_with_143(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(desired_replicas=3)
    daemon.obedient = False
    with on_terminal("wait", "web") as terminal:
        terminal.wait_for("web: 2 of 3 ready")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 143
        assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("answer", "status", "said"), [("x\r", 2, "nothing was done"), ("\x03", 130, "Keep them running"), ("\x04", 1, "cancelled")]
)
def test_daemon_stop_asks_what_becomes_of_the_agents(answer: str, status: int, said: str, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    with on_terminal("daemon", "stop", columns=200) as terminal:
        terminal.wait_for(r"2 agents run. Keep them running, or drain \(stop\) them\?")
        terminal.type(answer)
        assert terminal.end() == status
        assert said in terminal.shown
        assert terminal.shown.endswith("\n")  # the shell's prompt begins on a line of its own
        assert not [path for method, path, _ in daemon.asked if method == "POST"]


def test_logs_on_a_terminal_cannot_steer_it(daemon: FakeDaemon, state_dir: "os.PathLike[str]") -> None:
    folder = os.path.join(state_dir, "logs", "web")
    os.mkdir(folder, 0o700)
    with open(f"{folder}/web-00000.log", "wb") as file:
        file.write(b"\x1b]0;owned\x07a\tb\x1b[2J\n")
    with on_terminal("logs", "web-00000") as terminal:
        assert terminal.end() == 0
        assert terminal.shown == "a    b\r\n"
