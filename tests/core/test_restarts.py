"""What follows an exit."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetctl.core.restarts import after_exit, backoff, while_blocked
from fleetctl.models import AgentState, Exit, RestartPolicy, RestartSpec

S, P = AgentState, RestartPolicy
SPEC = RestartSpec()
ZERO, ONE, SEGV, UNKNOWN = Exit(code=0), Exit(code=1), Exit(signal=signal.SIGSEGV), Exit()
AGAIN, MISCONFIGURED = Exit(code=75), Exit(code=78)


@pytest.mark.parametrize(
    ("policy", "exit", "state", "retry", "note"),
    [
        (P.ALWAYS, ZERO, S.BACKOFF, 0.0, "exit 0"),
        (P.ALWAYS, ONE, S.BACKOFF, 0.0, "exit 1"),
        (P.ALWAYS, SEGV, S.BACKOFF, 0.0, "killed by SIGSEGV"),
        (P.ALWAYS, UNKNOWN, S.BACKOFF, 0.0, "exit status unknown"),
        (P.ALWAYS, AGAIN, S.BACKOFF, 0.0, "exit 75: asked to be started again"),
        (P.ALWAYS, MISCONFIGURED, S.FAILED, None, "exit 78: bad configuration, not restarted"),
        (P.ON_FAILURE, ZERO, S.TERMINATED, None, "completed"),
        (P.ON_FAILURE, ONE, S.BACKOFF, 0.0, "exit 1"),
        (P.ON_FAILURE, SEGV, S.BACKOFF, 0.0, "killed by SIGSEGV"),
        (P.ON_FAILURE, UNKNOWN, S.BACKOFF, 0.0, "exit status unknown"),
        (P.ON_FAILURE, AGAIN, S.BACKOFF, 0.0, "exit 75: asked to be started again"),
        (P.ON_FAILURE, MISCONFIGURED, S.FAILED, None, "exit 78: bad configuration, not restarted"),
        (P.NEVER, ZERO, S.TERMINATED, None, "completed"),
        (P.NEVER, ONE, S.FAILED, None, "exit 1; restart policy is never"),
        (P.NEVER, SEGV, S.FAILED, None, "killed by SIGSEGV; restart policy is never"),
        (P.NEVER, UNKNOWN, S.FAILED, None, "exit status unknown; restart policy is never"),
        (P.NEVER, AGAIN, S.FAILED, None, "exit 75; restart policy is never"),
        (P.NEVER, MISCONFIGURED, S.FAILED, None, "exit 78: bad configuration, not restarted"),
    ],
)
def test_first_exit(policy: RestartPolicy, exit: Exit, state: AgentState, retry: float | None, note: str) -> None:
    verdict = after_exit(RestartSpec(policy=policy), (), exit, uptime_seconds=5.0, now=100.0, jitter=1.0)
    assert (verdict.state, verdict.retry_after_seconds, verdict.note) == (state, retry, note)


@pytest.mark.parametrize(
    ("failures_in_a_row", "seconds"), [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (9, 60.0), (64, 60.0), (10_000, 60.0)]
)
def test_backoff_starts_at_once_doubles_and_is_capped(failures_in_a_row: int, seconds: float) -> None:
    assert backoff(SPEC, failures_in_a_row, jitter=1.0) == pytest.approx(seconds)


@given(st.integers(2, 1000), st.floats(0, 1, exclude_max=True), st.floats(0.01, 3600), st.floats(0.01, 86400))
def test_jitter_stays_within_a_fifth_and_under_the_cap(failures: int, jitter: float, first: float, cap: float) -> None:
    spec = RestartSpec(backoff_seconds=first, backoff_cap_seconds=cap)
    longest = min(cap, first * 2.0 ** min(failures - 2, 32))
    assert 0.79 * longest <= backoff(spec, failures, jitter) <= longest


def test_failures_in_a_row_wait_longer_each_time() -> None:
    failures: tuple[float, ...] = ()
    delays = []
    for second in range(5):
        verdict = after_exit(SPEC, failures, ONE, uptime_seconds=0.1, now=1000.0 + second, jitter=1.0)
        failures = verdict.failures
        delays.append(verdict.retry_after_seconds)
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0]


def test_a_crash_loop_that_goes_on_after_its_retry_stays_one_until_a_healthy_stretch() -> None:
    failures = tuple(1000.0 + second for second in range(6))
    again = after_exit(SPEC, failures, ONE, uptime_seconds=0.1, now=1305.0, jitter=1.0)
    assert (again.state, again.retry_after_seconds, again.failures) == (S.FAILED, 300.0, failures)
    healed = after_exit(SPEC, failures, ONE, uptime_seconds=SPEC.healthy_after_seconds, now=1400.0, jitter=1.0)
    assert (healed.state, healed.retry_after_seconds) == (S.BACKOFF, 0.0)


def test_a_healthy_stretch_clears_the_record() -> None:
    verdict = after_exit(SPEC, (1.0, 2.0, 3.0), ONE, uptime_seconds=SPEC.healthy_after_seconds, now=100.0, jitter=1.0)
    assert verdict.failures == (100.0,)
    assert verdict.retry_after_seconds == 0.0
    unhealthy = after_exit(SPEC, (1.0, 2.0, 3.0), ONE, uptime_seconds=SPEC.healthy_after_seconds - 0.1, now=100.0, jitter=1.0)
    assert unhealthy.failures == (1.0, 2.0, 3.0, 100.0)


def test_many_failures_inside_the_window_are_a_crash_loop() -> None:
    failures = tuple(1000.0 + second for second in range(5))
    verdict = after_exit(SPEC, failures, SEGV, uptime_seconds=0.1, now=1010.0, jitter=1.0)
    assert verdict.state is S.FAILED
    assert verdict.retry_after_seconds == 300.0
    assert verdict.note == "crash loop: 6 exits in 10 s, last: killed by SIGSEGV"


def test_failures_that_left_the_window_do_not_count_as_a_crash_loop() -> None:
    failures = tuple(1000.0 + second for second in range(5))
    verdict = after_exit(SPEC, failures, ONE, uptime_seconds=0.1, now=1061.0, jitter=1.0)
    assert verdict.state is S.BACKOFF
    assert verdict.failures == (*failures, 1061.0)


def test_a_crash_loop_may_be_for_ever() -> None:
    spec = RestartSpec(crash_loop_failures=2, crash_loop_retry_seconds=0.0)
    verdict = after_exit(spec, (1000.0,), ONE, uptime_seconds=0.1, now=1001.0, jitter=1.0)
    assert (verdict.state, verdict.retry_after_seconds) == (S.FAILED, None)
    assert verdict.note == "crash loop: 2 exits in 1 s, last: exit 1"


def test_asking_to_be_started_again_clears_the_record_but_not_in_a_tight_loop() -> None:
    worked = after_exit(SPEC, (1.0, 2.0), AGAIN, uptime_seconds=1.0, now=100.0, jitter=1.0)
    assert (worked.failures, worked.retry_after_seconds) == ((), 0.0)
    looping = after_exit(SPEC, (1.0, 2.0), AGAIN, uptime_seconds=0.9, now=100.0, jitter=1.0)
    assert looping.failures == (1.0, 2.0, 100.0)
    assert looping.retry_after_seconds == 1.0


def test_what_is_remembered_is_bounded_but_enough_for_a_crash_loop() -> None:
    failures = tuple(100.0 * number for number in range(500))
    few = after_exit(SPEC, failures, ONE, uptime_seconds=0.1, now=100_000.0, jitter=1.0)
    assert len(few.failures) == 64
    many = after_exit(RestartSpec(crash_loop_failures=200), failures, ONE, uptime_seconds=0.1, now=100_000.0, jitter=1.0)
    assert len(many.failures) == 200


@pytest.mark.parametrize(
    ("policy", "exit", "state", "retry"),
    [
        (P.ALWAYS, ZERO, S.BACKOFF, 300.0),
        (P.ALWAYS, ONE, S.BACKOFF, 300.0),
        (P.ALWAYS, AGAIN, S.BACKOFF, 300.0),
        (P.ALWAYS, MISCONFIGURED, S.FAILED, None),
        (P.ON_FAILURE, ONE, S.BACKOFF, 300.0),
        (P.ON_FAILURE, ZERO, S.TERMINATED, None),
        (P.NEVER, ZERO, S.TERMINATED, None),
        (P.NEVER, ONE, S.FAILED, None),
    ],
)
def test_who_ends_while_blocked_is_started_when_that_is_over_if_it_is_started_at_all(
    policy: RestartPolicy, exit: Exit, state: AgentState, retry: float | None
) -> None:
    failures = tuple(float(at) for at in range(5))  # the next would be a crash loop
    verdict = while_blocked(RestartSpec(policy=policy), failures, exit, "rate limit", 300.0)
    assert (verdict.state, verdict.retry_after_seconds) == (state, retry)
    if retry:
        assert verdict.failures == failures
