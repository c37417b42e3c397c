"""Whether a fleet has no work, as far as anybody can tell."""

import pytest

from fleetctl.core.contract import Report
from fleetctl.core.demand import Reading, cpu, custom
from fleetctl.core.observation import Counts, Look, is_idle
from fleetctl.core.policy import Policy
from fleetctl.models import Agent

POLICY = Policy(min_replicas=0, targets=(cpu(), custom("jobs", 5.0, total=True), custom("heat", 50.0)))
SEEN_BEFORE = 100.0
AGENT = Agent(id="a", fleet="demo", slot=0, created_at=0.0)


def told(
    look: Look | None, report: Report | None, *, connected: bool = False, starting: int = 0, blocked: int = 0, **found: Reading
) -> bool:
    counts = Counts(working=(AGENT,), ready=1, starting=starting, blocked=blocked, failed=0)
    return is_idle(POLICY, counts, found, {"a": (look, report)}, connected=connected, since=SEEN_BEFORE)


def using(percent: float | None) -> Look:
    return Look(at=105.0, seconds=5.0, cpu=percent)


@pytest.mark.parametrize(
    ("look", "report", "idle"),
    [
        pytest.param(using(0.3), None, True, id="does nothing"),
        pytest.param(using(4.0), None, False, id="works"),
        pytest.param(using(None), None, False, id="stands still, and so nobody knows"),
        pytest.param(None, None, False, id="was not measured"),
        pytest.param(using(0.3), Report(status="waiting"), True, id="says nothing of work"),
        pytest.param(using(0.3), Report(active=1), False, id="waits for an answer, and says so"),
        pytest.param(using(0.3), Report(pending=1), False, id="has something in its queue"),
        pytest.param(using(80.0), Report(active=0), True, id="uses the CPU for nothing, and says so"),
        pytest.param(using(80.0), Report(idle=True), True, id="is idle"),
        pytest.param(using(0.3), Report(active=0, moved_at=101.0), False, id="worked between two looks"),
        pytest.param(using(0.3), Report(active=0, moved_at=99.0), True, id="worked before"),
    ],
)
def test_an_agent_has_work_or_none(look: Look | None, report: Report | None, idle: bool) -> None:
    assert told(look, report) is idle


def test_whatever_may_be_work_is() -> None:
    rest, quiet = using(0.0), Report(idle=True)
    assert told(rest, quiet, jobs=Reading(total=0.0), heat=Reading(total=40.0, replicas=1))  # each agent's heat is no work
    assert not told(rest, quiet, jobs=Reading(total=0.5))
    assert not told(rest, quiet, jobs=Reading(error="it is broken"))
    assert not told(rest, quiet, connected=True)
    assert not told(rest, quiet, starting=1)
    assert not told(rest, quiet, blocked=1)
