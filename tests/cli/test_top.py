"""`fleetctl top`: who uses the most, in what order, and how much of it fits."""

import json
from collections.abc import Callable

import pytest

from fleetctl.cli.render import plain
from fleetctl.cli.top import ranked, top_lines
from tests.cli.conftest import Fleetctl
from tests.cli.fake_daemon import FakeDaemon, a_fleet, a_status, an_agent
from tests.cli.test_terminal import on_terminal


def an_order(sort: str, **values: list[object]) -> list[int]:
    """The numbers of the agents with these values of one field, as `top` has them."""
    ((field, given),) = values.items()
    agents = [{**an_agent(number), field: value} for number, value in enumerate(given)]
    return [int(row["id"][-1]) for row in ranked(a_status(a_fleet(agents=agents)), [], sort)]


@pytest.mark.parametrize(
    ("order", "numbers"),
    [
        (lambda: an_order("cpu", cpu_percent=[1.0, 250.0, 30.0]), [1, 2, 0]),
        (lambda: an_order("cpu", cpu_percent=[None, 0.0, 5.0]), [2, 1, 0]),
        (lambda: an_order("cpu", cpu_percent=[5.0, 5.0, 5.0]), [0, 1, 2]),
        (lambda: an_order("memory", memory_bytes=[1, None, 3]), [2, 0, 1]),
        (lambda: an_order("restarts", restarts=[0, 9, 3]), [1, 2, 0]),
        (lambda: an_order("uptime", uptime_seconds=[3.0, 2.0, 1.0]), [0, 1, 2]),
    ],
)
def test_the_greediest_comes_first_and_the_unmeasured_last(order: Callable[[], list[int]], numbers: list[int]) -> None:
    assert order() == numbers


def test_only_what_runs_or_wants_to_is_shown() -> None:
    agents = [an_agent(0), an_agent(1, state="terminated", pid=None), an_agent(2, state="failed", pid=None)]
    assert [row["id"] for row in ranked(a_status(a_fleet(agents=agents)), [], "cpu")] == ["web-00000", "web-00002"]


def test_sums_are_of_all_agents_also_of_those_that_do_not_fit() -> None:
    agents = [an_agent(number, cpu_percent=50.0, memory_bytes=1 << 20) for number in range(4)]
    lines = plain(top_lines(ranked(a_status(a_fleet(agents=agents)), [], "cpu"), 80, 2)).splitlines()
    assert lines[0] == "4 agents, 2.00 cores busy, 4.0M of memory"
    assert (len(lines), lines[-1]) == (5, "... 2 more agents")


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_no_line_is_longer_than_the_terminal(columns: int) -> None:
    agents = [an_agent(number, note="x" * 300, cpu_percent=12345.6) for number in range(3)]
    lines = plain(top_lines(ranked(a_status(a_fleet(agents=agents)), [], "cpu"), columns, 2)).splitlines()
    assert max(map(len, lines)) <= columns
    assert "CPU" in lines[1]


def test_top_prints_once_in_a_pipe_and_takes_fleets(fleetctl: Fleetctl, daemon: FakeDaemon) -> None:
    daemon.fleets |= {"web": a_fleet("web", 2), "api": a_fleet("api", 2)}
    result = fleetctl("top", "api", "-n", "1")
    assert result.status == 0
    assert "api-00000" in result.out
    assert "1 more agent" in result.out
    assert "web-0" not in result.out


def test_top_as_json_is_in_order(fleetctl: Fleetctl, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, cpu_percent=1.0), an_agent(1, cpu_percent=9.0)])
    found = json.loads(fleetctl("top", "--json").out)
    assert (found["schema"], [agent["id"] for agent in found["agents"]]) == ("fleetctl/top/v1", ["web-00001", "web-00000"])


@pytest.mark.parametrize(("arguments", "status"), [(("--sort", "colour"), 2), (("-n", "-1"), 2), (("ghost",), 5)])
def test_wrong_words_are_refused(fleetctl: Fleetctl, daemon: FakeDaemon, arguments: tuple[str, ...], status: int) -> None:
    assert fleetctl("top", *arguments).status == status


def test_top_needs_a_daemon(fleetctl: Fleetctl) -> None:
    assert fleetctl("top").status == 4


def test_top_is_live_on_a_terminal(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, cpu_percent=1.0), an_agent(1, cpu_percent=9.0)])
    with on_terminal("top", columns=70, lines=10) as terminal:
        terminal.wait_for(r"web-00001[^\n]*\n[^\n]*web-00000")
        daemon.fleets["web"]["agents"][0]["cpu_percent"] = 99.0
        terminal.wait_for(r"99\.0%[^\n]*\n[^\n]*web-00001")
        terminal.type("\x03")
        assert terminal.end() == 130
