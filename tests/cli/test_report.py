"""`fleetctl report`: what is in it, and above all what never is."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetctl.cli.redact import GONE, redact
from tests.cli.conftest import Fleetctl
from tests.cli.fake_daemon import FakeDaemon, a_fleet, an_agent

S = "s3cr3t-Value"


@pytest.mark.parametrize(
    "line",
    [
        f"API_KEY={S}",
        f"api-key: {S}",
        f'"password": "{S} and more"',
        f"--token {S}",
        f"--auth-token={S}",
        f"['./agent', '--api-key', '{S}']",
        f"DB_PASSWORD='{S}'",
        f"Authorization: Bearer {S}xyz",
        f"curl -H 'authorization: basic {S}aaaa'",
        f"postgres://user:{S}@host/db",
        f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{S}",
        f"MY_SECRET = {S}",
        f"credentials={S}",
        f"Cookie: {S}",
    ],
)
def test_what_is_called_a_secret_is_taken_out(line: str) -> None:
    assert S not in redact(line)
    assert GONE in redact(line)


@pytest.mark.parametrize(
    "token",
    [
        "sk-proj-abcdefghijklmnop123456",
        "sk_live_abcdefgh1234",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "xoxb-123456789-abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcDEF123",
        "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gI",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_looks_like_a_key_is_taken_out(token: str) -> None:
    assert redact(f"the program said {token} and went on") == f"the program said {GONE} and went on"


@pytest.mark.parametrize(
    "line",
    [
        "2026-01-31 12:00:00Z  agent.started  web-k3x9q  web-k3x9q started (pid 4711)",
        "/srv/app/releases/20260131/bin/python3 -m worker --queue high",
        "web  5 of 5 ready  python3 worker.py",
        "spec_hash 0123456789abcdef",
        'fleetctl_fleet_agents{fleet="web",state="running"} 5',
        "secret_env.API_KEY",
        "https://example.org/path?x=1",
        "graceful_drain.timeout_seconds = 30.0",
    ],
)
def test_what_helps_stays(line: str) -> None:
    assert redact(line) == line


@pytest.mark.parametrize(
    ("known", "text", "left"),
    [
        (["hunter2"], "login hunter2 ok", f"login {GONE} ok"),
        (["test"], "the latest test", f"the latest {GONE}"),
        (["abc"], "abc", "abc"),
        (["two\nlines-here"], "x lines-here y", f"x {GONE} y"),
        (['quo"ted'], r'said "quo"ted" twice', f'said "{GONE}" twice'),
        (["back\\slash"], r"it's 'back\\slash'", f"it's '{GONE}'"),
        (["longest-one", "longest-one-yet"], "longest-one-yet", GONE),
        ([""], "nothing", "nothing"),
    ],
)
def test_known_values_are_taken_out_wherever_they_stand(known: list[str], text: str, left: str) -> None:
    assert redact(text, known) == left


@given(st.text(min_size=8, max_size=40).filter(lambda text: len(text.strip()) >= 8 and len(text.splitlines()) == 1), st.text(max_size=30))
def test_no_known_value_survives(value: str, around: str) -> None:
    assert value.strip() not in redact(f"{around} {value} {around}", [value]).replace(GONE, "")


def test_the_report_has_every_part_though_no_daemon_runs(fleetctl: Fleetctl) -> None:
    result = fleetctl("report")
    assert result.status == 0
    for title in ("Versions", "Doctor", "Status", "Settings", "Events", "History", "The daemon's log", "Metrics"):
        assert f"## {title}\n" in result.out
    assert result.out.count("```") == 16
    assert "Traceback" not in result.out


def test_the_report_tells_what_a_daemon_tells(fleetctl: Fleetctl, daemon: FakeDaemon) -> None:
    assert "None" not in fleetctl("report").out.partition("## Settings")[0].partition("## Status")[2]
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, note="\x1b[31mred```\n")])
    out = fleetctl("report").out
    assert "web-00000" in out
    assert "logs.keep = 5" in out
    assert "\x1b" not in out
    assert out.count("```") == 16


def test_the_report_is_written_for_its_owner_and_over_no_file(fleetctl: Fleetctl) -> None:
    assert fleetctl("report", "--output", "report.md").status == 0
    assert stat.S_IMODE(os.stat("report.md").st_mode) == 0o600
    written = Path("report.md").read_text()
    refused = fleetctl("report", "--output", "report.md")
    assert (refused.status, Path("report.md").read_text()) == (6, written)
