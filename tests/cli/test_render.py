"""Rendering is pure: values in, lines out. Tables of cases, and what must hold at any width."""

import re
from typing import TYPE_CHECKING, Any, cast

import pytest

from fleetctl.cli import render
from fleetctl.cli.live import frame
from tests.cli.fake_daemon import a_fleet, a_status, an_agent, an_autoscaler

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Status

NASTY = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\r\n\t[bold]x[/bold]\x9b1m\u202eabc\x00"


def text(lines: list[render.Line]) -> list[str]:
    return render.plain(lines).splitlines()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (-1, "0s"), (0.9, "0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (90061, "1d01h"), (8640000, "100d00h")],
)
def test_duration_has_two_units_at_most(seconds: float | None, words: str) -> None:
    assert render.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (None, "-"),
        (0, "0B"),
        (999, "999B"),
        (1023, "1.0K"),
        (12_345_678, "11.8M"),
        (123_456_789, "118M"),
        (2 << 40, "2.0T"),
        (5000 << 40, "5000T"),
    ],
)
def test_size_has_a_unit_of_1024(count: int | None, words: str) -> None:
    assert render.size(count) == words


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "-"),
        ({"code": 3, "signal": None, "at": None, "text": "exit 3"}, "exit 3"),
        ({"code": None, "signal": 9, "text": ""}, "signal 9"),
        ({"code": 0, "signal": None, "text": ""}, "exit 0"),
        ({"code": None, "signal": None, "text": ""}, "unknown"),
    ],
)
def test_last_exit_in_words(found: dict[str, Any] | None, words: str) -> None:
    assert render.last_exit(found) == words


@pytest.mark.parametrize(
    ("at", "words"),
    [("2026-01-31T12:00:00Z", "2026-01-31 12:00:00Z"), ("2026-01-31T12:00:00.123Z", "2026-01-31 12:00:00Z"), ("soon", "soon")],
)
def test_moment_leaves_out_the_fraction(at: str, words: str) -> None:
    assert render.moment(at) == words


def test_clean_leaves_nothing_that_steers_a_terminal() -> None:
    assert render.clean(NASTY) == "red [bold]x[/bold] 1m abc "
    assert render.clean("\ud800") == "?"
    assert render.clean("naïve 日本") == "naïve 日本"


@pytest.mark.parametrize(
    ("words", "width", "shown"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("日本語", 5, "日本…"), ("日本語", 4, "日…"), ("abc", 1, "…"), ("abc", 0, "")],
)
def test_cut_keeps_to_the_width_in_columns(words: str, width: int, shown: str) -> None:
    assert render.cut(words, width) == shown
    assert render.cell_width(render.cut(words, width)) <= max(width, render.cell_width(words) if words == shown else width)


def a_long_agent(number: int) -> dict[str, Any]:
    note = "waits for " + "日本語 " * 30
    return an_agent(
        number, state="backoff", ready=False, restarts=12345, note=note, last_exit={"code": 3, "signal": None, "text": "exit 3"}
    )


@pytest.mark.parametrize("width", [*range(60, 201, 7), 30, 20])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    agents = [an_agent(0), a_long_agent(1), an_agent(2, id="a-fleet-with-quite-a-long-name-k3x9q", note=NASTY)]
    fleet = a_fleet(command=["python", "-c", "x" * 300], agents=agents, notes=["n" * 300], desired_replicas=3, ready_replicas=2)
    for lines in (
        render.status_lines(a_status(fleet, fleet), width),
        render.ps_lines([{**agent, "fleet": "web"} for agent in agents], width),
    ):
        for line in text(lines):
            assert render.cell_width(line) <= width
            assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)


@pytest.mark.parametrize("width", [60, 80, 200, None])
def test_id_and_state_are_shown_at_any_width(width: int | None) -> None:
    lines = text(render.ps_lines([{**a_long_agent(1), "fleet": "web"}], width))
    assert "web-00001" in lines[1]
    assert "backoff" in lines[1]


def test_columns_that_say_nothing_are_left_out() -> None:
    header = text(render.ps_lines([{**an_agent(), "fleet": "web"}], None))[0]
    assert header.split() == ["AGENT", "FLEET", "STATE", "PID", "CPU", "MEMORY", "UPTIME", "RESTARTS"]


def test_numbers_are_aligned_right_and_unknown_ones_are_a_dash() -> None:
    lines = text(render.ps_lines([{**an_agent(), "fleet": "web"}, {**an_agent(1, pid=None, cpu_percent=None), "fleet": "web"}], None))
    assert lines[1][: lines[0].index("PID") + 3].endswith(" 1000")
    assert lines[2][: lines[0].index("PID") + 3].endswith(" -")
    assert lines[1].split()[4:7] == ["12.3%", "11.8M", "1m01s"]


def test_state_is_said_in_words_and_only_coloured_on_top() -> None:
    agents = [an_agent(number, state=state) for number, state in enumerate(["running", "failed"])] + [an_agent(2, ready=False)]
    lines = render.fleet_lines(a_fleet(agents=agents, desired_replicas=3), 100)
    plain, coloured = render.plain(lines), render.ansi(lines)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert "\x1b[1;31mfailed\x1b[0m" in coloured
    assert "running, not ready" in plain


def test_fleet_title_tells_what_is_going_on() -> None:
    fleet = a_fleet(
        down=True,
        ready_replicas=1,
        autoscaling=an_autoscaler(enabled=True, mode="recommend", max_replicas=9),
        warm_pool={"enabled": True, "current_size": 1, "target_size": 5},
    )
    assert text([render.fleet_title(fleet)]) == ["web  1 of 2 ready, being taken down, autoscaling (recommend) 1..9, 1 of 5 warm  sleep 60"]


def test_status_without_fleets_says_what_to_do() -> None:
    assert text(render.status_lines(a_status(), 80)) == ["no fleets; `fleetctl up` starts one"]


@pytest.mark.parametrize("height", [4, 5, 20])
def test_status_shows_what_fits_and_counts_the_rest(height: int) -> None:
    lines = text(render.status_lines(a_status(a_fleet(size=50)), 80, height))
    assert len(lines) == height
    assert f"{53 - height} more agents" in lines[-1]


@pytest.mark.parametrize("height", range(1, 70))
@pytest.mark.parametrize("notes", [[], ["a note"]])
def test_every_fleet_is_headed_at_any_height(height: int, notes: list[str]) -> None:
    fleets = [a_fleet("api", 60, notes=notes), a_fleet("web", 2), a_fleet("none", 0)]
    lines = text(render.status_lines(a_status(*fleets), 80, height))
    assert len(lines) <= height
    headed = sum(line.startswith(f"{fleet['name']}  ") for fleet in fleets for line in lines)
    assert headed == (3 if height >= 3 else height - 1)


def test_agents_that_are_not_ready_are_shown_before_the_others_where_room_is_scarce() -> None:
    states = {57: "failed", 58: "backoff", 59: "draining"}
    agents = [an_agent(number, "api", state=states.get(number, "running"), ready=number not in states) for number in range(60)]
    fleets = [a_fleet("api", 60, agents=agents, ready_replicas=57), a_fleet("web", 2)]
    lines = text(frame(cast("Status", a_status(*fleets)), 100, 30))
    assert len(lines) <= 30
    assert lines[0].startswith("api  57 of 60 ready")
    assert [line.split()[1] for line in lines[2:6]] == ["failed", "backoff", "draining", "running"]
    assert any(line.startswith("web  2 of 2 ready") for line in lines)
    assert {"web-00000", "web-00001"} <= {line.split()[0] for line in lines if line}
    (more,) = [line for line in lines if line.startswith("... ")]
    shown = sum(line.startswith("api-") for line in lines)
    assert f"{60 - shown} more agents" in more
    assert shown >= 15


def test_history_shows_the_change_and_the_reason() -> None:
    entry = {
        "at": "2026-01-31T12:00:00Z",
        "fleet": "web",
        "current_replicas": 2,
        "target_replicas": 5,
        "reason": "asked",
        "cause": "manual",
    }
    assert text(render.history_lines([entry], 80))[1] == "2026-01-31 12:00:00Z  web    2 -> 5  manual  asked"
    assert text(render.history_lines([], 80)) == ["no decisions yet"]


def test_event_is_one_line() -> None:
    event = {"at": "2026-01-31T12:00:00Z", "kind": "agent.failed", "fleet": "web", "agent_id": None, "message": "a\nb"}
    assert text([render.event_line(event)]) == ["2026-01-31 12:00:00Z  agent.failed      web               a b"]


def test_settings_are_told_by_their_key_path() -> None:
    assert render.flatten({"a": 1, "b": {"c": {"d": [1]}}, "e": {}}) == [("a", 1), ("b.c.d", [1]), ("e", None)]


CRASH_LOOP = "crash loop: 6 exits in 8 s, last: exit 3; next try in 300 s"


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ("", ""),
        ("restarting in 4 s", "restarting in 4 s"),
        (CRASH_LOOP, "exit 3; crash loop: 6 exits in 8 s; next try in 300 s"),
        (f"{CRASH_LOOP}; last output: no; such key", '"no; such key"; exit 3; crash loop: 6 exits in 8 s; next try in 300 s'),
        ("next try in 9 s; exit 78; last output: bad key", '"bad key"; exit 78; next try in 9 s'),
    ],
)
def test_a_note_that_is_cut_begins_with_the_most_telling_part(note: str, words: str) -> None:
    assert render.telling_first(note) == words


def test_a_note_that_fits_is_left_as_it_is() -> None:
    agent = {**an_agent(0, state="failed", note=f"{CRASH_LOOP}; last output: bad key"), "fleet": "web"}
    assert text(render.ps_lines([agent], None))[1].endswith(agent["note"])
    assert '"bad key"; exit 3' in text(render.ps_lines([agent], 100))[1]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, ["say `fleetctl logs web`, or look."]),
        (80, ["say `fleetctl logs web`, or look."]),
        (24, ["say `fleetctl logs web`,", "or look."]),
        (20, ["say", "`fleetctl logs web`,", "or look."]),
        (7, ["say", "`fleet…", "or", "look."]),
    ],
)
def test_words_are_wrapped_and_commands_stay_whole(width: int | None, lines: list[str]) -> None:
    assert text(render.wrapped("say `fleetctl logs web`, or look.", width)) == lines


def test_where_no_agent_has_a_process_the_reason_has_the_room() -> None:
    gone: dict[str, Any] = {"pid": None, "cpu_percent": None, "memory_bytes": None, "uptime_seconds": None}
    agents = [an_agent(number, state="failed", ready=False, note=f"{CRASH_LOOP}; last output: bad key", **gone) for number in range(5)]
    lines = text(render.fleet_lines(a_fleet(agents=agents), 80))
    assert max(map(len, lines)) <= 80
    assert "PID" not in lines[1]
    assert '"bad key"; exit 3' in lines[2]


def test_the_live_view_says_what_to_do_about_a_failed_agent() -> None:
    agents = [an_agent(number, state="failed", ready=False) for number in range(40)]
    lines = text(frame(cast("Status", a_status(a_fleet(agents=agents))), 60, 24))
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 60
    told = lines[lines.index("40 agents failed; `fleetctl logs web-00000` shows its") :]
    assert told[1] == "output, `fleetctl restart web` tries again at once"


def test_what_to_do_about_failed_agents() -> None:
    failed: dict[str, Any] = {"state": "failed", "ready": False}
    assert render.failure_words([a_fleet()]) == ""
    words = render.failure_words([a_fleet(agents=[an_agent(0), an_agent(1, **failed), an_agent(2, **failed)])])
    assert words == "2 agents failed; `fleetctl logs web-00001` shows its output, `fleetctl restart web` tries again at once"
    done = an_agent(0, **failed, last_exit={"code": 0, "signal": None, "text": "exit 0"})
    assert "restart.policy" in render.failure_words([a_fleet(agents=[done])])
