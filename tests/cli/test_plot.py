"""`history --plot` and `--svg`: what was recorded of load and size, as people see it."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from fleetctl.cli import plot
from tests.cli.conftest import Fleetctl
from tests.cli.fake_daemon import FakeDaemon, a_fleet, a_sample

SAMPLES = [a_sample(number, 2 if number < 5 else 4) for number in range(10)]
GROWTH = {
    "at": "2026-01-31T12:00:05.100Z",
    "action": "scale_up",
    "current_replicas": 2,
    "target_replicas": 4,
    "reason": "CPU <85%> \x1b[31m",
}
SHRINKAGE = {**GROWTH, "at": "2026-01-31T12:00:08.500Z", "action": "scale_down"}
BEFORE = {**GROWTH, "at": "2026-01-30T12:00:05.100Z"}


@pytest.mark.parametrize("columns", [20, 80, 300])
def test_a_chart_shows_load_agents_and_where_decisions_fell(columns: int) -> None:
    lines = plot.chart_lines("web", SAMPLES, [BEFORE, GROWTH, SHRINKAGE], columns)
    assert lines[0] == "web, 2026-01-31 12:00:00Z to 2026-01-31 12:00:09Z"
    assert "cpu per agent, aimed at 70" in lines
    assert "agents, between 1 and 9" in lines
    assert lines[-1] == "       ^  v"  # below the sixth and the ninth moment
    assert all(len(line) <= max(columns, 60) for line in lines)


def test_a_chart_of_a_fleet_without_any_metric_is_no_error() -> None:
    nothing = [a_sample(number, 0, metric=None, value=None, target=None) for number in range(3)]
    assert "load per agent" in plot.chart_lines("web", nothing, [], 80)
    ElementTree.fromstring(plot.svg("web", nothing, []))


def test_a_picture_holds_the_reasons_and_nothing_that_breaks_it() -> None:
    root = ElementTree.fromstring(plot.svg("web", SAMPLES, [BEFORE, GROWTH]))
    assert [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")] == ["2 -> 4: CPU <85%> "]


def test_history_plots_every_fleet_that_has_something_to_show(daemon: FakeDaemon, fleetctl: Fleetctl, tmp_path: Path) -> None:
    daemon.fleets |= {"api": a_fleet("api"), "web": a_fleet()}
    shown = fleetctl("history", "--plot")
    assert (shown.status, "nothing was recorded yet" in shown.err) == (5, True)
    daemon.samples = SAMPLES
    shown = fleetctl("history", "--plot")
    assert shown.out.startswith("web, 2026-01-31")
    assert fleetctl("history", "--svg", str(tmp_path / "x.svg")).status == 2  # of which of the two?
    assert fleetctl("history", "web", "--svg", str(tmp_path / "x.svg")).status == 0
    ElementTree.fromstring((tmp_path / "x.svg").read_text())
    assert "cannot write" in fleetctl("history", "web", "--svg", str(tmp_path / "no/x.svg")).err
    assert fleetctl("history", "ghost", "--plot").status == 5
