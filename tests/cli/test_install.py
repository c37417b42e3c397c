"""`fleetctl daemon install`: the unit it writes, where, and what it has systemd do."""

import configparser
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fleetctl.cli import install
from fleetctl.cli.systemd import Unit, text
from tests.cli.conftest import Fleetctl
from tests.cli.fake_daemon import FakeDaemon
from tests.servers import require


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that systemd does not run, with folders for units."""
    monkeypatch.setattr(install, "BOOTED", str(tmp_path / "no-systemd"))
    monkeypatch.setattr(install, "SYSTEM_UNITS", str(tmp_path / "system"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def parsed(unit: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keep upper case, as its documentation says
    parser.read_string(unit)
    return parser


def a_unit(**changes: object) -> Unit:
    given = {"command": ["/usr/bin/python3", "-m", "fleetctl", "daemon", "--keep"], "path": "/usr/bin:/bin", **changes}
    return Unit(**given)  # type: ignore[arg-type]  # as given


def test_the_unit_says_what_the_daemon_needs() -> None:
    unit = parsed(text(a_unit(user="fleet")))
    wanted = {"Type": "notify", "KillMode": "process", "Restart": "always", "NotifyAccess": "main", "User": "fleet", "WatchdogSec": "30"}
    assert wanted.items() <= dict(unit["Service"]).items()
    assert unit["Install"]["WantedBy"] == "multi-user.target"


def test_a_unit_of_the_users_own_names_no_user() -> None:
    unit = parsed(text(a_unit()))
    assert "User" not in unit["Service"]
    assert unit["Install"]["WantedBy"] == "default.target"


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/srv/a", "/srv/a"),
        ("/srv/my fleets", '"/srv/my fleets"'),
        ("/srv/100%", '"/srv/100%%"'),
        ("/srv/$HOME", '"/srv/$$HOME"'),
        ('/srv/"q"\\', '"/srv/\\"q\\"\\\\"'),
        ("/srv/a;b", '"/srv/a;b"'),
        ("", '""'),
    ],
)
def test_words_are_written_as_systemd_reads_them_back(word: str, written: str) -> None:
    command = parsed(text(a_unit(command=["/bin/x", word])))["Service"]["ExecStart"]
    assert command == f"/bin/x {written}"


@pytest.mark.parametrize("scope", ["--system", "--user"])
def test_systemd_finds_nothing_wrong_with_it(scope: str, fleetctl: Fleetctl, tmp_path: Path) -> None:
    analyze = require("systemd-analyze", package="systemd")
    unit = tmp_path / "fleetctl.service"
    unit.write_text(fleetctl("--state-dir", str(tmp_path / "my 100% state"), "daemon", "install", scope, "--dry-run").out)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [analyze, "verify", "--man=no", *([scope] if scope == "--user" else []), str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_prints_the_unit_and_writes_nothing(fleetctl: Fleetctl, places: Path) -> None:
    result = fleetctl("daemon", "install", "--user", "--dry-run")
    assert result.status == 0
    words = shlex.split(parsed(result.out)["Service"]["ExecStart"])
    assert words == [sys.executable, "-m", "fleetctl", "--state-dir", os.environ["FLEETCTL_STATE_DIR"], "daemon", "--keep"]
    assert not (places / "config").exists()


def test_without_systemd_it_says_what_to_do_by_hand(fleetctl: Fleetctl, places: Path) -> None:
    result = fleetctl("daemon", "install", "--user")
    written = places / "config/systemd/user/fleetctl.service"
    assert (result.status, result.out) == (0, "")
    assert written.read_text().startswith("# Written by")
    for command in ("systemctl --user daemon-reload", "systemctl --user enable fleetctl", "loginctl enable-linger"):
        assert command in result.err


def test_another_unit_is_not_written_over_unless_told(fleetctl: Fleetctl, places: Path) -> None:
    assert fleetctl("daemon", "install", "--system").status == 0
    again = fleetctl("daemon", "install", "--system")
    assert (again.status, "up to date" in again.err) == (0, True)
    written = places / "system/fleetctl.service"
    written.write_text("mine")
    assert fleetctl("daemon", "install", "--system").status == 6
    assert written.read_text() == "mine"
    assert fleetctl("daemon", "install", "--system", "--name", "fleetctl-two").status == 0
    assert fleetctl("daemon", "install", "--system", "--force").status == 0
    assert written.read_text() != "mine"


@pytest.mark.parametrize(("arguments", "status"), [(("--user", "--system"), 2), (("--name", "../x"), 2)])
def test_wrong_words_are_refused(arguments: tuple[str, ...], status: int, fleetctl: Fleetctl) -> None:
    assert fleetctl("daemon", "install", *arguments).status == status


@pytest.fixture
def systemctl(places: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that systemd runs; what it was told."""
    told = places / "told"
    (places / "bin").mkdir()
    for name in ("systemctl", "loginctl"):
        program = places / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {told}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{places / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(install, "BOOTED", str(places))
    return told


def test_where_systemd_runs_the_unit_is_enabled_and_started(fleetctl: Fleetctl, systemctl: Path) -> None:
    found = json.loads(fleetctl("daemon", "install", "--system", "--json").out)
    commands = ["systemctl daemon-reload", "systemctl enable fleetctl", "systemctl start fleetctl"]
    assert systemctl.read_text().splitlines() == commands
    assert (found["done"], found["next"]) == (commands, [])


def test_it_is_not_started_beside_a_daemon_that_runs(fleetctl: Fleetctl, systemctl: Path, daemon: FakeDaemon) -> None:
    result = fleetctl("daemon", "install", "--system")
    assert "start" not in systemctl.read_text()
    assert "systemctl start fleetctl" in result.err
    assert "daemon stop --keep" in result.err


def test_what_systemd_refuses_is_left_to_be_done(fleetctl: Fleetctl, systemctl: Path, places: Path) -> None:
    (places / "bin/systemctl").write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    result = fleetctl("daemon", "install", "--user")
    assert result.status == 0
    assert "no bus" in result.err
    assert "  systemctl --user enable fleetctl" in result.err
