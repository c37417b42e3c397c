"""What follows an exit: another start, at once or later, a verdict of failure, or nothing.

Restarting: at once after the first failure, then with exponential backoff, jitter and a cap; a healthy stretch clears the
record. Many failures inside one window are a crash loop. Exit status 75 (EX_TEMPFAIL) means "stopped with my work saved, start me
again", 78 (EX_CONFIG) "my configuration is bad, do not": sysexits.h.
"""

from dataclasses import dataclass

from fleetctl.models import AgentState, Exit, RestartPolicy, RestartSpec

START_ME_AGAIN, BAD_CONFIGURATION = 75, 78
_REMEMBERED_FAILURES = 64
_TOO_SHORT_TO_HAVE_WORKED_SECONDS = 1.0
_LONGEST_BLOCK_SECONDS = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`state` is BACKOFF, FAILED or TERMINATED; `retry_after_seconds` None means never by itself."""

    state: AgentState
    retry_after_seconds: float | None
    failures: tuple[float, ...]
    note: str


def after_exit(
    spec: RestartSpec,
    failures: tuple[float, ...],
    exit: Exit,
    *,
    uptime_seconds: float,
    now: float,
    jitter: float,
) -> Verdict:
    """Judge the exit of an agent that nobody asked to stop. `failures`: times of the earlier ones in a row; `jitter` in [0, 1).

    The exit status of one that was stopped because it did not work says nothing.
    """
    code, ended = (None, exit.failing) if exit.failing else (exit.code, str(exit))
    if code == BAD_CONFIGURATION:
        return Verdict(
            state=AgentState.FAILED, retry_after_seconds=None, failures=failures, note="exit 78: bad configuration, not restarted"
        )
    if spec.policy is RestartPolicy.NEVER or (spec.policy is RestartPolicy.ON_FAILURE and code == 0):
        state = AgentState.TERMINATED if code == 0 else AgentState.FAILED
        note = "completed" if code == 0 else f"{ended}; restart policy is never"
        return Verdict(state=state, retry_after_seconds=None, failures=failures, note=note)
    if code == START_ME_AGAIN and uptime_seconds >= _TOO_SHORT_TO_HAVE_WORKED_SECONDS:
        return Verdict(state=AgentState.BACKOFF, retry_after_seconds=0.0, failures=(), note="exit 75: asked to be started again")
    if uptime_seconds >= spec.healthy_after_seconds:
        failures = ()
    if not _is_crash_loop(spec, failures):  # a loop that goes on after its retry stays the loop it was
        failures = (*failures, now)[-max(_REMEMBERED_FAILURES, spec.crash_loop_failures) :]
    if _is_crash_loop(spec, failures):
        span = failures[-1] - failures[-spec.crash_loop_failures]
        note = f"crash loop: {spec.crash_loop_failures} exits in {span:.0f} s, last: {ended}"
        return Verdict(state=AgentState.FAILED, retry_after_seconds=spec.crash_loop_retry_seconds or None, failures=failures, note=note)
    delay = backoff(spec, len(failures), jitter)
    note = ended if delay == 0 else f"{ended}, {len(failures)} in a row"
    return Verdict(state=AgentState.BACKOFF, retry_after_seconds=delay, failures=failures, note=note)


def while_blocked(spec: RestartSpec, failures: tuple[float, ...], exit: Exit, blocked: str, seconds_left: float) -> Verdict:
    """An agent that ended while it could not work anyway: no failure, and of no use before the block is over.

    One that would not be started again after this exit is not started then either.
    """
    alone = after_exit(spec, (), exit, uptime_seconds=0.0, now=0.0, jitter=0.0)
    if alone.retry_after_seconds is None:
        return alone
    wait = min(seconds_left, _LONGEST_BLOCK_SECONDS)
    return Verdict(state=AgentState.BACKOFF, retry_after_seconds=wait, failures=failures, note=f"{exit}; blocked: {blocked}")


def _is_crash_loop(spec: RestartSpec, failures: tuple[float, ...]) -> bool:
    """Whether the last so many failures in a row fell inside one window."""
    last = failures[-spec.crash_loop_failures :]
    return len(last) == spec.crash_loop_failures and last[-1] - last[0] < spec.crash_loop_window_seconds


def backoff(spec: RestartSpec, failures_in_a_row: int, jitter: float) -> float:
    """Seconds to wait before the next start: 0, then doubling from `backoff_seconds` up to the cap.

    Up to 20 % less by chance, so that a fleet that failed together does not come back in step.
    """
    if failures_in_a_row <= 1:
        return 0.0
    doublings = min(failures_in_a_row - 2, 32)
    return min(spec.backoff_cap_seconds, spec.backoff_seconds * 2.0**doublings) * (0.8 + 0.2 * jitter)
