"""When a fleet is as it was asked to be: a table of predicates, and the loop around them over a fake daemon."""

import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from fleetctl.cli import waiting
from fleetctl.errors import TimedOut
from tests.cli.fake_daemon import a_fleet, a_pool, a_status, a_warm_one, an_agent

if TYPE_CHECKING:
    from fleetctl.daemon.wire import FleetStatus, Status


def fleet(*agents: dict[str, Any], desired: int, **changes: Any) -> "FleetStatus":
    ready = sum(agent["ready"] for agent in agents)
    return cast("FleetStatus", a_fleet(agents=list(agents), desired_replicas=desired, ready_replicas=ready, **changes))


READY, STARTING = an_agent(0), an_agent(1, state="starting", ready=False)
DRAINING, FAILED = an_agent(2, state="draining", ready=False), an_agent(3, state="failed", ready=False, pid=None)
DONE, WARM = an_agent(4, state="terminated", ready=False, pid=None), a_warm_one(5)


@pytest.mark.parametrize(
    ("found", "settled", "gave_up", "drained"),
    [
        (None, False, False, True),
        (fleet(desired=0), True, False, True),
        (fleet(READY, desired=1), True, False, False),
        (fleet(READY, STARTING, desired=2), False, False, False),
        (fleet(READY, DRAINING, desired=1), False, False, False),
        (fleet(READY, desired=2), False, False, False),
        (fleet(READY, DONE, desired=2), True, False, False),
        (fleet(READY, WARM, desired=1), True, False, False),
        (fleet(READY, a_warm_one(6, state="starting"), desired=1), True, False, False),
        (fleet(READY, a_warm_one(6, state="failed"), desired=1), True, False, False),
        (fleet(READY, a_warm_one(6, state="draining"), desired=1), True, False, False),
        (fleet(READY, an_agent(6, state="draining", ready=False), desired=1), False, False, False),
        (fleet(WARM, desired=0), True, False, True),
        (fleet(READY, FAILED, desired=2), False, True, False),
        (fleet(FAILED, desired=0), False, False, False),
        (fleet(READY, desired=1, down=True), False, False, False),
    ],
)
def test_predicates(found: "FleetStatus | None", settled: bool, gave_up: bool, drained: bool) -> None:
    assert (waiting.settled(found), waiting.gave_up(found), waiting.drained(found)) == (settled, gave_up, drained)


@pytest.mark.parametrize(
    ("found", "warm"),
    [
        (None, False),
        (fleet(READY, desired=1), True),
        (fleet(READY, desired=1, warm_pool=a_pool(1)), False),
        (fleet(READY, WARM, desired=1, warm_pool=a_pool(1)), True),
        (fleet(STARTING, WARM, desired=1, warm_pool=a_pool(1)), True),
        (fleet(READY, WARM, a_warm_one(6), desired=1, warm_pool=a_pool(1)), False),
        (fleet(READY, WARM, a_warm_one(6, state="running"), desired=1, warm_pool=a_pool(2)), False),
        (fleet(READY, WARM, desired=1, warm_pool=a_pool(0)), False),
    ],
)
def test_a_pool_is_warm_when_exactly_so_many_are_suspended(found: "FleetStatus | None", warm: bool) -> None:
    assert waiting.warm(found) is warm


def test_replaced_means_settled_without_any_of_the_old_processes() -> None:
    assert waiting.replaced(fleet(READY, desired=1), {(READY["id"], 999)})
    assert not waiting.replaced(fleet(READY, desired=1), {(READY["id"], READY["pid"])})
    assert not waiting.replaced(fleet(STARTING, desired=1), {(READY["id"], 999)})
    assert not waiting.replaced(fleet(READY, desired=1, updating=True), set())
    assert not waiting.replaced(None, set())
    assert not waiting.replaced(fleet(READY, WARM, desired=1), {(WARM["id"], WARM["pid"])})


def test_summary_is_one_line_for_all_fleets() -> None:
    status = cast("Status", a_status(cast(dict[str, Any], fleet(READY, STARTING, DRAINING, desired=2))))
    assert waiting.summary(status, ["web", "gone"]) == "web: 1 of 2 ready, 1 draining, 1 starting; gone: gone"


def test_deadline_breaks_off_whatever_blocks() -> None:
    before = time.monotonic()
    with pytest.raises(TimedOut, match=r"x within 0\.05 s"), waiting.deadline(0.05, "x"):
        time.sleep(30)
    assert time.monotonic() - before < 10


def test_no_deadline_rings_after_the_block() -> None:
    with waiting.deadline(0.02, "x"):
        pass
    time.sleep(0.04)  # long enough for an alarm that was left set to end the test
