"""What is typed, and what it means: tables over the pure parsers of the commands."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import pytest

from fleetctl.cli.change import Wish, only_fleet, parse_wishes
from fleetctl.cli.logs import merged, parse_since
from fleetctl.cli.restart import choose, processes_of
from fleetctl.cli.wait import condition
from fleetctl.errors import NotFound, UsageError
from tests.cli.fake_daemon import a_fleet, a_status

if TYPE_CHECKING:
    from fleetctl.daemon.wire import FleetStatus, Status


@pytest.mark.parametrize(
    ("words", "wishes"),
    [
        (["10"], [(None, "replicas", 10)]),
        (["0"], [(None, "replicas", 0)]),
        (["+2"], [(None, "delta", 2)]),
        (["-2"], [(None, "delta", -2)]),
        (["web=3"], [("web", "replicas", 3)]),
        (["web=+3", "worker=-1"], [("web", "delta", 3), ("worker", "delta", -1)]),
    ],
)
def test_scale_reads_numbers_and_differences(words: Sequence[str], wishes: list[Wish]) -> None:
    assert parse_wishes(words) == wishes


@pytest.mark.parametrize(
    "words",
    [["web"], ["1.5"], ["--"], ["--dryrun"], ["-x"], ["=3"], ["web="], ["3", "web=2"], ["web=1", "web=2"], ["1", "2"], ["٣"], ["9" * 10]],
)
def test_scale_refuses_everything_else(words: Sequence[str]) -> None:
    with pytest.raises(UsageError):
        parse_wishes(words)


def test_the_only_fleet_needs_no_name() -> None:
    assert only_fleet(["web"], "fleetctl scale %s=1") == "web"
    with pytest.raises(NotFound):
        only_fleet([], "fleetctl scale %s=1")
    with pytest.raises(UsageError, match=r"api, web") as caught:
        only_fleet(["api", "web"], "fleetctl scale %s=1")
    assert "fleetctl scale api=1" in caught.value.hint


NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90", NOW - 90),
        ("1.5", NOW - 1.5),
        ("30s", NOW - 30),
        ("5m", NOW - 300),
        ("1h30m", NOW - 5400),
        ("2d", NOW - 172800),
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01T01:01:00+01:00", 60.0),
        ("1970-01-01 00:01", 60.0),
    ],
)
def test_since_reads_durations_and_times(text: str, at: float) -> None:
    assert parse_since(text, NOW) == at


@pytest.mark.parametrize("text", ["", "5x", "m", "5m5", "yesterday", "-5m", "2026-13-01"])
def test_since_refuses_everything_else(text: str) -> None:
    with pytest.raises(UsageError):
        parse_since(text, NOW)


def test_lines_of_several_agents_are_merged_by_their_times() -> None:
    a = [b"2026-01-01T00:00:01Z one", b"  more of one", b"2026-01-01T00:00:03Z three"]
    b = [b"2026-01-01 00:00:02 two", b"2026-01-01T00:00:04Z four"]
    assert [line.split()[-1] for _, line in merged([("a", a), ("b", b)])] == [b"one", b"one", b"two", b"three", b"four"]


def test_lines_without_times_keep_their_order_agent_by_agent() -> None:
    assert list(merged([("a", [b"1", b"2"]), ("b", [b"3"])])) == [("a", b"1"), ("a", b"2"), ("b", b"3")]


def test_a_clock_set_back_does_not_unsort_an_agents_own_lines() -> None:
    lines = [b"2026-01-01T00:00:05Z first", b"2026-01-01T00:00:01Z second", b"2026-01-01T00:00:06Z third"]
    assert [line for _, line in merged([("a", lines), ("b", [])])] == lines


STATUS = cast("Status", a_status(a_fleet("api"), a_fleet("web")))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([], {"api": None, "web": None}),
        (["web"], {"web": None}),
        (["web-00000", "web-00001", "api"], {"web": ["web-00000", "web-00001"], "api": None}),
        (["web-00000", "web"], {"web": None}),
        (["web", "web-00000"], {"web": None}),
        (["web-00000", "web-00000"], {"web": ["web-00000"]}),
    ],
)
def test_restart_sorts_names_by_fleet(names: Sequence[str], chosen: dict[str, list[str] | None]) -> None:
    assert choose(STATUS, names) == chosen


def test_restart_refuses_a_name_that_is_neither() -> None:
    with pytest.raises(NotFound, match="ghost"):
        choose(STATUS, ["web", "ghost"])


def test_restart_replaces_the_chosen_processes() -> None:
    assert processes_of(STATUS, "web", None) == {("web-00000", 1000), ("web-00001", 1001)}
    assert processes_of(STATUS, "web", ["web-00001"]) == {("web-00001", 1001)}


@pytest.mark.parametrize(
    ("text", "size", "holds"),
    [("ready", 2, True), ("count=2", 2, True), ("count=3", 2, False), ("drained", 2, False), ("drained", 0, True)],
)
def test_wait_knows_its_conditions(text: str, size: int, holds: bool) -> None:
    assert condition(text)(cast("FleetStatus", a_fleet(size=size))) is holds


@pytest.mark.parametrize("text", ["", "count", "count=", "count=-1", "Ready", "gone"])
def test_wait_refuses_other_conditions(text: str) -> None:
    with pytest.raises(UsageError):
        condition(text)
