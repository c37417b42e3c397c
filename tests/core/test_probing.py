"""The cadence of probes: a table for each rule, and starts of programs that answer late, slowly or not at first."""

from collections.abc import Callable

import pytest

from fleetctl.core.probing import Pace, ProbeState, after, running, starting
from fleetctl.models import ProbeOutcome

PACE = Pace(interval_seconds=10.0, timeout_seconds=15.0, failure_threshold=3)
FATAL = Pace(interval_seconds=10.0, timeout_seconds=5.0, failure_threshold=3, fatal=True)

Program = Callable[[float, int], float]
"""How long it takes to answer a request that comes at a time, given how many came before; a refusal is negative."""


def refuses_until(at: float, then: float = 0.001) -> Program:
    return lambda now, _: then if now >= at else -0.001


def hangs_at_first(listens: float) -> Program:
    return lambda now, before: -0.001 if now < listens else (1e9 if before == 0 else 0.01)


def start(program: Program, pace: Pace = PACE, limit: float = 120.0) -> tuple[float, int]:
    """When it is found ready, counted from its start, and with how many tries."""
    state, now, tries, heard = starting(pace, 0.0), 0.0, 0, 0
    while now < limit:
        now = max(now, state.next_at)
        answer = program(now, heard)
        heard += answer >= 0
        tries += 1
        passed = 0 <= answer <= state.timeout_seconds
        now += min(abs(answer), state.timeout_seconds)
        state, news = after(pace, state, passed=passed, now=now)
        if passed:
            assert news is ProbeOutcome.READY
            assert not state.starting
            return now, tries
        assert news is (ProbeOutcome.UNREADY if tries in (1, 2, 4, 8, 16, 32, 64) else None)
    raise AssertionError("never ready")


def test_a_quick_start_is_seen_at_once() -> None:
    ready, _ = start(refuses_until(0.3))
    assert ready < 0.4


def test_a_first_request_that_hangs_costs_a_part_of_the_start_and_not_the_timeout() -> None:
    ready, _ = start(hangs_at_first(1.3))
    assert ready < 1.3 * 1.7


@pytest.mark.parametrize("seconds", [0.1, 1.0, 10.0, 100.0])
def test_a_start_is_seen_a_tenth_too_late_at_most_and_with_few_tries(seconds: float) -> None:
    ready, tries = start(refuses_until(seconds))
    assert ready <= seconds * 1.1 + 0.06
    assert tries < 80


@pytest.mark.parametrize("needs", [0.2, 0.9, 4.0, 14.0])
def test_who_needs_long_for_an_answer_gets_that_long_in_the_end(needs: float) -> None:
    ready, _ = start(lambda now, _: needs)
    assert ready <= needs * 5 + 0.6


def test_no_try_takes_longer_than_the_timeout_and_no_pause_longer_than_the_interval() -> None:
    pace = Pace(interval_seconds=0.5, timeout_seconds=0.2, failure_threshold=1)
    state, now = starting(pace, 0.0), 0.0
    for _ in range(200):
        assert state.timeout_seconds <= 0.2
        assert state.next_at - now <= 0.5 + 1e-9
        now = state.next_at + state.timeout_seconds
        state, _ = after(pace, state, passed=False, now=now)


def play(pace: Pace, state: ProbeState, answers: str) -> list[ProbeOutcome | None]:
    """What is told after each answer: + passed, - failed."""
    told = []
    for answer in answers:
        now = state.next_at
        state, news = after(pace, state, passed=answer == "+", now=now)
        assert state.next_at == now + pace.interval_seconds
        told.append(news)
    return told


READY, UNREADY, FAILED = ProbeOutcome.READY, ProbeOutcome.UNREADY, ProbeOutcome.FAILED


@pytest.mark.parametrize(
    ("pace", "ready", "answers", "told"),
    [
        (PACE, True, "++", [None, None]),
        (PACE, True, "--+--+", [None] * 6),
        (PACE, True, "----", [None, None, UNREADY, None]),
        (PACE, True, "---+", [None, None, UNREADY, READY]),
        (PACE, True, "---+--+", [None, None, UNREADY, READY, None, None, None]),
        (PACE, False, "---", [None, None, None]),
        (PACE, False, "-+", [None, READY]),
        (FATAL, True, "--+---", [None, None, None, None, None, FAILED]),
        (FATAL, True, "----", [None, None, FAILED, FAILED]),
    ],
)
def test_what_a_row_of_answers_amounts_to(pace: Pace, ready: bool, answers: str, told: list[ProbeOutcome | None]) -> None:
    assert play(pace, running(pace, 0.0, ready=ready), answers) == told
