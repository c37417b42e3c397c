"""When an agent is probed, how long it may take to answer, and what a row of answers amounts to.

While an agent starts, many short tries: a program whose very first request hangs is asked anew after a quarter of a second, and not
after the whole timeout. Both the pause between two tries and the time for one grow with the time the start has taken so far, so that
a quick start is seen at once, a slow one costs little, and whoever needs long for an answer gets that long in the end.
"""

from dataclasses import dataclass, replace

from fleetctl.models import ProbeOutcome

_FIRST_TIMEOUT_SECONDS, _TIMEOUT_SHARE = 0.25, 0.5
_FIRST_PAUSE_SECONDS, _PAUSE_SHARE = 0.05, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often is asked, and how often it has to fail. `fatal`: failing so often is the agent's failure, and not just a lack of
    readiness."""

    interval_seconds: float
    timeout_seconds: float
    failure_threshold: int
    fatal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeState:
    """One probe of one process of an agent. `next_at`: when to ask; times are seconds of one clock."""

    since: float
    next_at: float
    timeout_seconds: float
    starting: bool
    passing: bool
    failures: int = 0


def starting(pace: Pace, now: float) -> ProbeState:
    """An agent that has to pass once to be ready."""
    return ProbeState(since=now, next_at=now, timeout_seconds=_first_timeout(pace), starting=True, passing=False)


def running(pace: Pace, now: float, *, ready: bool, wait_seconds: float | None = None) -> ProbeState:
    """An agent that was ready before; it is asked after `wait_seconds`, or an interval."""
    wait = pace.interval_seconds if wait_seconds is None else wait_seconds
    return ProbeState(since=now, next_at=now + wait, timeout_seconds=pace.timeout_seconds, starting=False, passing=ready)


def after(pace: Pace, state: ProbeState, *, passed: bool, now: float) -> tuple[ProbeState, ProbeOutcome | None]:
    """What follows an answer, or the lack of one: when to ask again, and what is to be told; None: nothing new."""
    if passed:
        news = None if state.passing else ProbeOutcome.READY
        done = replace(state, starting=False, passing=True, failures=0)
        return replace(done, next_at=now + pace.interval_seconds, timeout_seconds=pace.timeout_seconds), news
    failures = state.failures + 1
    if state.starting:
        elapsed = now - state.since
        pause = min(pace.interval_seconds, max(_FIRST_PAUSE_SECONDS, _PAUSE_SHARE * elapsed))
        timeout = min(pace.timeout_seconds, max(_first_timeout(pace), _TIMEOUT_SHARE * elapsed))
        told = ProbeOutcome.UNREADY if failures & (failures - 1) == 0 else None  # the 1st, 2nd, 4th ...: people want to know, disks do not
        return replace(state, failures=failures, next_at=now + pause, timeout_seconds=timeout), told
    failed = replace(state, failures=failures, next_at=now + pace.interval_seconds)
    if failures < pace.failure_threshold:
        return failed, None
    if pace.fatal:
        return replace(failed, passing=False), ProbeOutcome.FAILED
    return replace(failed, passing=False), ProbeOutcome.UNREADY if state.passing else None


def _first_timeout(pace: Pace) -> float:
    return min(_FIRST_TIMEOUT_SECONDS, pace.timeout_seconds)
