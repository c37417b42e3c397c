"""The gap between wish and world, as tables."""

from dataclasses import replace
from typing import Any

import pytest

from fleetctl.core.orders import Action, BecomeReady, Create, Drain, Forget, Kill, Mode, Start, Wish
from fleetctl.core.reconcile import next_deadline, plan
from fleetctl.models import Agent, AgentState, Exit, FleetSpec, ProcessRef, Replace

S = AgentState
NOW = 1000.0
SPEC = FleetSpec(name="demo", command=("sleep", "60"), replicas=3)
OTHER = replace(SPEC, command=("sleep", "61"))


def agent(slot: int, state: AgentState = S.RUNNING, **changes: Any) -> Agent:  # Any: fields of Agent
    live = state in (S.STARTING, S.RUNNING, S.SUSPENDED, S.DRAINING)
    known = {
        "created_at": 100.0 + slot,
        "process": ProcessRef(pid=1000 + slot, start_ticks=1, boot_id="b") if live else None,
        "ready": state is S.RUNNING,
        "spec_hash": SPEC.process_hash,
        "drain_deadline": NOW + 10 if state is S.DRAINING else None,
        "stop_sent": state is S.DRAINING,
    }
    return Agent(id=f"demo-{slot}", fleet="demo", slot=slot, state=state, **{**known, **changes})


def wish(replicas: int = 3, spec: FleetSpec = SPEC, **changes: Any) -> Wish:  # Any: fields of Wish
    return Wish(spec=replace(spec, replicas=replicas), **changes)


def told(actions: list[Action]) -> list[tuple[object, ...]]:
    """Actions in short: what, whom, and whether it leaves."""
    short: list[tuple[object, ...]] = []
    for action in actions:
        match action:
            case Create(slot):
                short.append(("create", slot))
            case Drain(one, leaving, _):
                short.append(("drain", one.slot, "leaves" if leaving else "returns"))
            case Start(one) | BecomeReady(one) | Kill(one) | Forget(one):
                short.append((type(action).__name__.lower(), one.slot))
    return short


THREE = [agent(0), agent(1), agent(2)]


@pytest.mark.parametrize(
    ("wanted", "agents", "expected"),
    [
        pytest.param(wish(3), [], [("create", 0), ("create", 1), ("create", 2)], id="up"),
        pytest.param(wish(3), THREE, [], id="nothing to do"),
        pytest.param(wish(0), [], [], id="nothing wished"),
        pytest.param(wish(5), THREE, [("create", 3), ("create", 4)], id="scale up leaves the others alone"),
        pytest.param(wish(3), [agent(0), agent(2)], [("create", 1)], id="the free slot is filled"),
        pytest.param(
            wish(3),
            [agent(0, S.DRAINING, leaving=True), agent(1), agent(2)],
            [("create", 3)],
            id="a slot is taken until its agent is gone",
        ),
        pytest.param(wish(1), THREE, [("drain", 0, "leaves"), ("drain", 1, "leaves")], id="scale down ends the oldest first"),
        pytest.param(
            wish(1), [agent(0), agent(1), agent(2, S.STARTING)], [("drain", 2, "leaves"), ("drain", 0, "leaves")], id="not ready goes first"
        ),
        pytest.param(
            wish(2),
            [agent(0), agent(1), agent(2, S.BACKOFF, retry_deadline=NOW + 9)],
            [("forget", 2)],
            id="an agent without process goes first, at once",
        ),
        pytest.param(wish(2), [agent(0), agent(1), agent(2, S.FAILED)], [("forget", 2)], id="a failed one goes first"),
        pytest.param(
            wish(2), [agent(0), agent(1), agent(2, S.DRAINING)], [("drain", 2, "leaves")], id="one that restarts learns that it leaves"
        ),
        pytest.param(wish(2), [*THREE[:2], agent(2, S.DRAINING, leaving=True)], [], id="one that leaves already is not asked again"),
        pytest.param(wish(3, down=True), THREE, [("drain", n, "leaves") for n in range(3)], id="down"),
        pytest.param(
            wish(3, down=True),
            [agent(0, S.BACKOFF, retry_deadline=1.0), agent(1, S.FAILED), agent(2, S.TERMINATED)],
            [("forget", 0), ("forget", 1), ("forget", 2)],
            id="down of what does not run",
        ),
        pytest.param(wish(0), [agent(0, S.TERMINATED, leaving=True)], [("forget", 0)], id="one that left is forgotten"),
        pytest.param(wish(1), [agent(0, S.TERMINATED)], [], id="one that completed stays"),
        pytest.param(wish(1), [agent(0, S.STARTING, process=None)], [("start", 0)], id="an intent that never became a process"),
        pytest.param(wish(1), [agent(0, S.STARTING, ready_deadline=NOW + 0.1)], [], id="not settled yet"),
        pytest.param(wish(1), [agent(0, S.STARTING, ready_deadline=NOW)], [("becomeready", 0)], id="settled"),
        pytest.param(wish(1), [agent(0, S.STARTING, ready_deadline=NOW, leader_exit=Exit(code=1))], [], id="ended before it settled"),
        pytest.param(wish(1), [agent(0, S.BACKOFF, retry_deadline=NOW + 0.1)], [], id="backoff not over"),
        pytest.param(wish(1), [agent(0, S.BACKOFF, retry_deadline=NOW)], [("start", 0)], id="backoff over"),
        pytest.param(wish(1), [agent(0, S.FAILED, retry_deadline=None)], [], id="failed for good"),
        pytest.param(wish(1), [agent(0, S.FAILED, retry_deadline=NOW)], [("start", 0)], id="a crash loop is tried again"),
        pytest.param(wish(1), [agent(0, S.DRAINING, drain_deadline=NOW)], [("kill", 0)], id="out of time"),
        pytest.param(wish(1), [agent(0, S.DRAINING, drain_deadline=NOW + 1)], [], id="still has time"),
        pytest.param(
            wish(1), [agent(0), agent(1, S.DRAINING, leaving=True, drain_deadline=NOW)], [("kill", 1)], id="a leaving one runs out of time"
        ),
        pytest.param(wish(3, mode=Mode.HOLD), [], [], id="hold creates nothing"),
        pytest.param(wish(1, mode=Mode.HOLD), [agent(0, S.BACKOFF, retry_deadline=1.0)], [], id="hold starts nothing"),
        pytest.param(wish(1, mode=Mode.HOLD, spec=OTHER), [agent(0)], [], id="hold replaces nothing"),
        pytest.param(wish(2, mode=Mode.HOLD), THREE, [("drain", 0, "leaves")], id="hold stops what is too much"),
        pytest.param(wish(1, mode=Mode.HOLD), [agent(0, S.DRAINING, drain_deadline=NOW)], [("kill", 0)], id="hold kills"),
        pytest.param(wish(5, mode=Mode.STOP), THREE, [("drain", n, "returns") for n in range(3)], id="stop: all come back later"),
        pytest.param(
            wish(3, mode=Mode.STOP), [agent(0, S.DRAINING), agent(1, S.BACKOFF, retry_deadline=1.0), agent(2, S.FAILED)], [], id="stopping"
        ),
        pytest.param(wish(1, mode=Mode.STOP), [agent(0, S.STARTING, process=None)], [], id="stop starts nothing"),
    ],
)
def test_plan(wanted: Wish, agents: list[Agent], expected: list[tuple[object, ...]]) -> None:
    assert told(plan(wanted, agents, NOW)) == expected


@pytest.mark.parametrize(
    ("wanted", "agents", "idle", "leave"),
    [
        pytest.param(2, THREE, {2}, [2], id="an idle one before the oldest"),
        pytest.param(1, THREE, {2}, [2, 0], id="then the oldest"),
        pytest.param(1, THREE, {1, 2}, [1, 2], id="of idle ones the oldest first"),
        pytest.param(2, THREE, set(), [0], id="nobody said so"),
        pytest.param(2, [agent(0), agent(1), agent(2, S.STARTING)], {0}, [2], id="one that is not ready goes before an idle one"),
        pytest.param(3, THREE, {0, 1, 2}, [], id="idle ones stay where nobody has to go"),
    ],
)
def test_who_has_nothing_to_do_goes_first(wanted: int, agents: list[Agent], idle: set[int], leave: list[int]) -> None:
    actions = plan(wish(wanted), agents, NOW, idle={f"demo-{slot}" for slot in idle})
    assert told(actions) == [("drain", slot, "leaves") for slot in leave]


SAFE = [agent(0, protected=True), agent(1), agent(2, protected=True)]


@pytest.mark.parametrize(
    ("wanted", "agents", "expected"),
    [
        pytest.param(wish(2), SAFE, [("drain", 1, "leaves")], id="the oldest that is not protected"),
        pytest.param(wish(1), SAFE, [("drain", 1, "leaves")], id="fewer than are protected"),
        pytest.param(wish(1), [agent(0, protected=True), agent(1, protected=True)], [], id="all are protected"),
        pytest.param(wish(1), [agent(0), agent(1, S.FAILED, protected=True)], [("drain", 0, "leaves")], id="also while it is failed"),
        pytest.param(wish(0), SAFE, [("drain", n, "leaves") for n in range(3)], id="none at all means none"),
        pytest.param(wish(3, down=True), SAFE, [("drain", n, "leaves") for n in range(3)], id="so does down"),
        pytest.param(wish(3, mode=Mode.STOP), SAFE, [("drain", n, "returns") for n in range(3)], id="it stops with the daemon"),
        pytest.param(
            wish(3), [agent(0, protected=True, replace=Replace.ROLLING), *THREE[1:]], [("drain", 0, "returns")], id="it is restarted"
        ),
    ],
)
def test_who_is_protected_is_spared(wanted: Wish, agents: list[Agent], expected: list[tuple[object, ...]]) -> None:
    assert told(plan(wanted, agents, NOW)) == expected


OLD = OTHER.process_hash


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        pytest.param([agent(n, spec_hash=OLD) for n in range(3)], [("drain", 0, "returns")], id="one at a time"),
        pytest.param([agent(0, S.DRAINING, spec_hash=OLD), agent(1, spec_hash=OLD), agent(2)], [], id="the next waits for the stop"),
        pytest.param([agent(0, S.STARTING), agent(1, spec_hash=OLD), agent(2)], [], id="the next waits until it is ready"),
        pytest.param([agent(0), agent(1, spec_hash=OLD), agent(2)], [("drain", 1, "returns")], id="then the next"),
        pytest.param([agent(0, S.BACKOFF, retry_deadline=NOW + 9), agent(1, spec_hash=OLD), agent(2)], [], id="a failure stops the roll"),
        pytest.param([agent(0, S.FAILED, rolled=True), agent(1, spec_hash=OLD), agent(2)], [], id="a crash loop stops the roll"),
        pytest.param(
            [agent(0, S.FAILED), agent(1, spec_hash=OLD), agent(2)], [("drain", 1, "returns")], id="one that had failed before does not"
        ),
        pytest.param(
            [agent(0, S.FAILED, spec_hash=OLD, retry_deadline=NOW), agent(1, spec_hash=OLD), agent(2)],
            [("start", 0)],
            id="one whose retry is due is started once, and waited for",
        ),
        pytest.param(
            [agent(0, S.STARTING, process=None, spec_hash=OLD), agent(1, spec_hash=OLD), agent(2)],
            [("start", 0)],
            id="one that waits for its start is waited for",
        ),
        pytest.param([agent(1, spec_hash=OLD), agent(2)], [("create", 0)], id="a new agent is waited for"),
        pytest.param(
            [agent(0, spec_hash=OLD), agent(1, S.STARTING, spec_hash=OLD), agent(2)], [("drain", 1, "returns")], id="unready outdated first"
        ),
        pytest.param(
            [agent(0, S.FAILED, spec_hash=OLD), agent(1, spec_hash=OLD), agent(2)], [("start", 0)], id="a failed one tries the new"
        ),
        pytest.param(
            [agent(0, S.BACKOFF, spec_hash=OLD, retry_deadline=NOW + 9), agent(1, spec_hash=OLD), agent(2)],
            [("drain", 1, "returns")],
            id="an outdated one in backoff holds nobody up",
        ),
        pytest.param([agent(0, spec_hash=""), agent(1), agent(2)], [], id="an unknown spec is left alone"),
        pytest.param([agent(n, replace=Replace.ROLLING) for n in range(3)], [("drain", 0, "returns")], id="rolling restart"),
        pytest.param([agent(n, replace=Replace.AT_ONCE) for n in range(3)], [("drain", n, "returns") for n in range(3)], id="all at once"),
        pytest.param([agent(0, replace=Replace.AT_ONCE), agent(1), agent(2)], [("drain", 0, "returns")], id="one only"),
        pytest.param([agent(0, S.FAILED, replace=Replace.ROLLING), agent(1), agent(2)], [("start", 0)], id="restart of a failed one"),
        pytest.param(
            [agent(0, S.BACKOFF, replace=Replace.AT_ONCE, retry_deadline=NOW + 9), agent(1), agent(2)],
            [("start", 0)],
            id="cuts backoff short",
        ),
    ],
)
def test_replacing_processes(agents: list[Agent], expected: list[tuple[object, ...]]) -> None:
    assert told(plan(wish(3), agents, NOW)) == expected


def test_a_new_size_alone_does_not_change_what_a_process_has_to_match() -> None:
    assert replace(SPEC, replicas=9, max_replicas=50, stop_signal="INT").process_hash == SPEC.process_hash
    assert replace(SPEC, environment={"A": "1"}).process_hash != SPEC.process_hash
    assert replace(SPEC, watchdog_seconds=5.0).process_hash != SPEC.process_hash  # it is told so when it starts


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        ([], None),
        ([agent(0)], None),
        ([agent(0, S.STARTING, ready_deadline=NOW + 2)], NOW + 2),
        ([agent(0, S.DRAINING, drain_deadline=NOW + 3)], NOW + 3),
        ([agent(0, S.BACKOFF, retry_deadline=NOW + 4)], NOW + 4),
        ([agent(0, S.FAILED, retry_deadline=NOW + 5)], NOW + 5),
        ([agent(0, S.FAILED)], None),
        ([agent(0, S.TERMINATED)], None),
        ([agent(0, S.BACKOFF, retry_deadline=NOW + 4), agent(1, S.DRAINING, drain_deadline=NOW + 3)], NOW + 3),
    ],
)
def test_next_deadline(agents: list[Agent], expected: float | None) -> None:
    assert next_deadline(wish(3), agents) == expected


@pytest.mark.parametrize("mode", [Mode.HOLD, Mode.STOP])
def test_there_is_no_deadline_for_a_start_that_this_mode_never_makes(mode: Mode) -> None:
    resting = [agent(0, S.BACKOFF, retry_deadline=NOW - 1), agent(1, S.FAILED, retry_deadline=NOW - 1)]
    assert next_deadline(wish(2, mode=mode), resting) is None
    assert next_deadline(wish(2, mode=mode), [*resting, agent(2, S.DRAINING, drain_deadline=NOW + 3)]) == NOW + 3
    assert next_deadline(wish(2, mode=mode), [*resting, agent(2, S.DRAINING, process=None, drain_deadline=NOW + 3)]) == NOW + 3
