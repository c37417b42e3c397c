"""`fleetctl sinks`: what is set up, how far it came, and whether it works."""

import json
from pathlib import Path

from fleetctl.sinks.progress import Progress, save
from tests.cli.conftest import Fleetctl


def set_up(state_dir: Path) -> Path:
    state_dir.mkdir()
    target = state_dir / "events.jsonl"
    (state_dir / "sinks.toml").write_text(f'[[sink]]\nname = "audit"\ntype = "file"\npath = "{target}"\n')
    return target


def test_sinks_are_shown_with_how_far_they_came(fleetctl: Fleetctl, state_dir: Path) -> None:
    target = set_up(state_dir)
    save(str(state_dir / "sinks" / "audit.json"), Progress(position=9, delivered=7, waiting=3, failures=1, trouble="the disk is full"))
    shown = fleetctl("sinks")
    assert (shown.status, "audit" in shown.out, "the disk is full" in shown.out) == (0, True, True)
    (one,) = json.loads(fleetctl("sinks", "--json").out)["sinks"]
    assert (one["target"], one["delivered"], one["waiting"], one["trouble"]) == (str(target), 7, 3, "the disk is full")


def test_without_sinks_it_says_where_to_write_them_and_shows_a_first_one(fleetctl: Fleetctl, state_dir: Path) -> None:
    told = fleetctl("sinks").out
    assert "sinks.toml" in told
    state_dir.mkdir()
    (state_dir / "sinks.toml").write_text(told[told.index("[[sink]]") : told.index("then")])
    assert "is valid: file" in fleetctl("sinks", "check").out


def test_check_finds_mistakes(fleetctl: Fleetctl, state_dir: Path) -> None:
    set_up(state_dir)
    assert "is valid: audit" in fleetctl("sinks", "check").out
    (state_dir / "sinks.toml").write_text("[[sink]]\n")
    assert fleetctl("sinks", "check").status == 6


def test_a_test_event_is_sent_at_once(fleetctl: Fleetctl, state_dir: Path) -> None:
    target = set_up(state_dir)
    assert fleetctl("sinks", "test", "audit").status == 0
    assert json.loads(target.read_text())["type"] == "fleetctl.sink.test"
    assert fleetctl("sinks", "test", "ghost").status == 5
    target.unlink()
    target.mkdir()
    refused = fleetctl("sinks", "test", "audit")
    assert (refused.status, "did not take it" in refused.err) == (1, True)
