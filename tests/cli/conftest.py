"""What the tests of the command line share: a state directory, a fake daemon, and ways to call `fleetctl`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleetctl.cli import app
from tests import forks
from tests.cli.fake_daemon import FakeDaemon, running

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "fleetctl"]


@dataclass(frozen=True, slots=True)
class Result:
    status: int
    out: str
    err: str


class Fleetctl:
    """Calls the command line in this process and returns what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        status = app.run(arguments)
        out, err = self._capsys.readouterr()
        return Result(status, out, err)


@pytest.fixture
def fleetctl(capsys: pytest.CaptureFixture[str]) -> Fleetctl:
    return Fleetctl(capsys)


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state directory, chosen by the environment; and a folder without a fleet.toml as the current one."""
    folder, here = tmp_path / "state", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("FLEETCTL_STATE_DIR", str(folder))
    for name in ("COLUMNS", "NO_COLOR", "FLEETCTL_DEBUG", "FLEETCTL_REPLICAS", "FLEETCTL_NAME"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def daemon(state_dir: Path) -> Iterator[FakeDaemon]:
    with running(state_dir) as fake:
        yield fake


def environment() -> dict[str, str]:
    """For a `fleetctl` of its own process, started from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def call(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """Run `fleetctl` as a process of its own."""
    return forks.run(arguments, cwd=os.getcwd(), environ=environment(), stdin=stdin, timeout=30)
