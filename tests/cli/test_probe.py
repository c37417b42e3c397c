"""`fleetctl probe` on real programs, good and bad; nothing of them is left."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fleetctl.host import procfs
from tests.helpers import wait_until
from tests.real.harness import ROOT

# Listens where the kernel wants, answers HTTP, ends cleanly.
SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
server.serve_forever()
"""
# Has a worker, and takes it for dead when the clock has jumped; says when it is ready; ends on INT only.
MASTER = """
import os, signal, socket, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen(["sleep", "600"])
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
try:
    while True:
        before = time.monotonic()
        time.sleep(0.05)
        if time.monotonic() - before > 0.25:
            worker.kill()
            worker.wait()
            worker = subprocess.Popen(["sleep", "600"])
except KeyboardInterrupt:
    worker.kill()
    sys.exit(0)
"""


def start(*words: str, cwd: Path, **streams: Any) -> "subprocess.Popen[str]":  # Any: what subprocess takes
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FLEETCTL_")}
    environ |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(cwd), "COLUMNS": "300"}
    command = [sys.executable, "-m", "fleetctl", "probe", *words]
    return subprocess.Popen(command, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


def probe(*words: str, cwd: Path) -> tuple[int, str, str]:
    with start(*words, cwd=cwd) as running:
        try:
            out, err = running.communicate(timeout=30)
        finally:
            running.terminate()
    assert not left(cwd)
    return running.returncode, out, err


def left(folder: Path) -> list[object]:
    """Files and processes of a trial that kept its things in this folder."""
    stats = [stat for stat in procfs.snapshot().values() if stat.alive]
    mine = [stat.pid for stat in stats if procfs.environ(stat.pid).get("FLEETCTL_STATE_DIR", "").startswith(str(folder))]
    return [*mine, *folder.glob("fleetctl-probe-*")]


@pytest.fixture
def folder() -> Any:  # Any: a fixture that yields
    with tempfile.TemporaryDirectory(prefix="fleet-") as path:
        yield Path(os.path.realpath(path))


def test_a_good_server_may_be_suspended_and_its_settings_make_a_fleet(folder: Path) -> None:
    status, out, _ = probe("--json", "--suspend", "0.2", "--", sys.executable, "-I", "-S", "-c", SERVER, cwd=folder)
    report = json.loads(out)
    assert (status, report["schema"], report["ready"], report["warm_pool"]) == (0, "fleetctl/probe/v1", True, "yes")
    names = ["start", "ready", "suspend 0.2 s", "stop", "restart", "ready again", "stop while suspended"]
    assert [(step["name"], step["ok"]) for step in report["steps"]] == [(name, True) for name in names]
    assert report["settings"]["readiness.http"].startswith("http://127.0.0.1:")
    assert report["settings"]["warm_pool.size"] == 3
    (folder / "fleet.toml").write_text('[fleet]\nname = "web"\ncommand = ["true"]\n\n' + report["toml"])
    status, out, err = probe("web", cwd=folder)
    assert status == 1  # not that it would run: but it is read, and tried
    assert "ready                 no  it ended: exit 0" in out
    assert not err


def test_a_master_that_loses_its_workers_is_not_suspended_and_gets_the_signal_that_ends_it(folder: Path) -> None:
    words = ("--suspend", "0.4", "--stop-timeout", "0.3", "--", sys.executable, "-I", "-S", "-c", MASTER)
    status, out, _ = probe(*words, cwd=folder)
    assert status == 0, out
    assert "it said READY=1, 2 processes" in out
    assert "suspend 0.4 s         no  1 of its processes ended" in out
    assert "no warm pool: 1 process of it was gone after 0.4 s" in out
    assert "note: TERM did not end it, INT did" in out
    assert '[fleet]\nstop_signal = "INT"\n\n[fleet.readiness]\nnotify = true\n' in out
    assert "[fleet.warm_pool]" not in out


def test_a_command_that_ends_at_once_says_its_last_words(folder: Path) -> None:
    status, out, _ = probe("--", "sh", "-c", "echo no database >&2; exit 3", cwd=folder)
    assert status == 1
    assert "ready                 no  it ended: exit 3; last output: no database" in out
    assert "no warm pool: it never became ready" in out


def test_a_command_that_is_never_ready_is_given_up(folder: Path) -> None:
    status, out, _ = probe("--ready-timeout", "0.3", "--http", "http://127.0.0.1:9/", "--", "sleep", "600", cwd=folder)
    assert status == 1
    assert "ready                 no  not in 0.3 s" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--", "/no/such/program"), 6, "/no/such/program"),
        (("--suspend", "0", "--", "true"), 2, "--suspend takes seconds above 0"),
        (("--stop-timeout", "0", "--", "true"), 2, "take seconds above 0"),
        (("--http", "https://example.com", "--", "true"), 6, '--http "https'),
        ((), 2, "there is no fleet.toml here"),
    ],
)
def test_bad_input_is_refused(folder: Path, words: tuple[str, ...], status: int, message: str) -> None:
    found, _, err = probe(*words, cwd=folder)
    assert found == status, err
    assert message in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_trial_leaves_nothing(folder: Path, number: signal.Signals, status: int) -> None:
    running = start("--suspend", "600", "--", "sh", "-c", "trap '' TERM; setsid sleep 600 & sleep 600 & wait", cwd=folder)
    assert running.stdout is not None
    wait_until(lambda: len(left(folder)) >= 4)
    while "ready" not in (line := running.stdout.readline()):
        assert line
    running.send_signal(number)
    running.communicate(timeout=30)
    assert running.returncode == status
    assert not left(folder)
