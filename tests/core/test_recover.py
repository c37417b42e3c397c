"""After the daemon's death: records against live processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest

from fleetctl.core.recover import Recovery, recover
from fleetctl.models import Agent, AgentState, Exit, Found, Identity, ProcessRef

S = AgentState
NOW, WALL, BOOT = 1000.0, 1_700_000_000.0, "this-boot"
REF = ProcessRef(pid=100, start_ticks=7, boot_id=BOOT)
OTHER_REF = ProcessRef(pid=200, start_ticks=9, boot_id=BOOT)
EARLIER = ProcessRef(pid=100, start_ticks=7, boot_id="an-earlier-boot")

RUNNING = Agent(
    id="demo-a",
    fleet="demo",
    slot=0,
    state=S.RUNNING,
    created_at=1.0,
    token="t-a",
    process=REF,
    ready=True,
    started_clock=900.0,
    restarts=2,
)
INTENT = replace(RUNNING, state=S.STARTING, process=None, ready=False, started_clock=None, note="starting")


def tree(token: str = "t-a", agent_id: str = "demo-a", leader: ProcessRef | None = REF, slot: int = 0, started_at: float = 50.0) -> Found:
    return Found(
        agent_id=agent_id, fleet="demo", slot=slot, token=token, spec_hash="h", leader=leader, started_at=started_at, started_clock=950.0
    )


def recovered(records: Sequence[Agent], found: Iterable[Found] = (), identities: Mapping[str, Identity] | None = None) -> Recovery:
    return recover(records, found, identities or {}, boot_id=BOOT, now=NOW, wall=WALL, drain_seconds=30.0)


def only(recovery: Recovery) -> Agent:
    (agent,) = recovery.agents
    return agent


@pytest.mark.parametrize("found", [[tree()], []], ids=["its token is seen", "it wrote over its environment"])
def test_an_agent_that_still_runs_is_adopted_as_it_was(found: list[Found]) -> None:
    recovery = recovered([RUNNING], found, {"demo-a": Identity.MATCH})
    assert only(recovery) == RUNNING
    assert (recovery.adopted, recovery.ended, recovery.strays) == (("demo-a",), (), ())


def test_an_agent_that_ended_meanwhile_is_judged_with_an_unknown_exit() -> None:
    recovery = recovered([RUNNING], [], {"demo-a": Identity.GONE})
    assert only(recovery) == replace(RUNNING, leader_exit=Exit(at=WALL))
    assert recovery.ended == ("demo-a",)


def test_an_exit_that_was_recorded_is_kept() -> None:
    record = replace(RUNNING, leader_exit=Exit(code=3, at=5.0))
    assert only(recovered([record], [], {"demo-a": Identity.GONE})) == record


def test_what_a_gone_leader_left_does_not_become_an_agent() -> None:
    recovery = recovered([RUNNING], [tree(leader=None)], {"demo-a": Identity.GONE})
    assert only(recovery) == replace(RUNNING, leader_exit=Exit(at=WALL))
    assert recovery.strays == ()


def test_a_process_that_cannot_be_verified_is_left_alone_and_shown() -> None:
    agent = only(recovered([RUNNING], [], {"demo-a": Identity.UNVERIFIABLE}))
    assert agent == replace(RUNNING, note="its identity cannot be verified: it is left alone")


def test_a_leaving_agent_goes_on_leaving() -> None:
    record = replace(RUNNING, state=S.DRAINING, leaving=True, drain_deadline=1010.0, stop_sent=True, ready=False)
    assert only(recovered([record], [tree()], {"demo-a": Identity.MATCH})) == record


def test_after_a_reboot_nothing_is_adopted_and_the_agent_starts_anew() -> None:
    record = replace(
        RUNNING,
        process=EARLIER,
        failures=(99_000.0,),
        ready_deadline=99_000.0,
        retry_deadline=99_000.0,
        drain_deadline=99_000.0,
        stop_sent=True,
        leader_exit=Exit(code=1),
    )
    agent = only(recovered([record], [], {"demo-a": Identity.GONE}))
    assert (agent.state, agent.process, agent.ready, agent.note) == (S.STARTING, None, False, "the machine was rebooted")
    assert (agent.failures, agent.stop_sent, agent.leader_exit, agent.restarts) == ((), False, None, 2)
    assert (agent.ready_deadline, agent.retry_deadline, agent.drain_deadline, agent.started_clock) == (None, None, None, None)


def test_after_a_reboot_a_leaving_agent_is_gone() -> None:
    agent = only(recovered([replace(RUNNING, process=EARLIER, state=S.DRAINING, leaving=True)]))
    assert (agent.state, agent.process) == (S.TERMINATED, None)


@pytest.mark.parametrize("state", [S.BACKOFF, S.FAILED])
def test_after_a_reboot_a_retry_is_due_at_once(state: AgentState) -> None:
    """Its deadline is a time of the earlier boot's clock, which may have run for months."""
    record = replace(RUNNING, state=state, process=None, ready=False, started_clock=5e6, failures=(5e6 + 1,), retry_deadline=5e6 + 9)
    agent = only(recovered([record]))
    assert agent.retry_deadline == NOW
    assert (agent.state, agent.failures, agent.started_clock) == (state, (), None)


def test_after_a_reboot_a_failure_for_good_stays_one() -> None:
    record = replace(RUNNING, state=S.FAILED, process=None, ready=False, started_clock=5e6, failures=(5e6,), retry_deadline=None)
    agent = only(recovered([record]))
    assert (agent.state, agent.retry_deadline, agent.failures) == (S.FAILED, None, ())


def test_in_the_same_boot_a_retry_keeps_its_time() -> None:
    record = replace(RUNNING, state=S.BACKOFF, process=None, ready=False, failures=(999.0,), retry_deadline=1003.0)
    assert only(recovered([record])) == record


def test_an_intent_without_a_process_stays_an_intent() -> None:
    assert only(recovered([INTENT])) == INTENT


def test_an_intent_whose_process_was_started_adopts_it() -> None:
    recovery = recovered([INTENT], [tree()])
    agent = only(recovery)
    assert (agent.state, agent.process, agent.started_at, agent.started_clock, agent.ready_deadline) == (S.STARTING, REF, 50.0, 950.0, NOW)
    assert (agent.restarts, recovery.adopted, recovery.strays) == (2, ("demo-a",), ())


def test_what_an_intents_process_left_behind_is_ended_and_not_forgotten() -> None:
    """The process was started, was not recorded, and died; its child lives. The agent gets a new token: nobody else would end it."""
    recovery = recovered([INTENT], [tree(leader=None)])
    agents = {agent.id: agent for agent in recovery.agents}
    assert agents["demo-a"] == INTENT
    (stray,) = recovery.strays
    assert (agents[stray].state, agents[stray].token, agents[stray].leaving) == (S.DRAINING, "t-a", True)
    again = recovered(list(recovery.agents), [tree(leader=None)])
    assert set(again.agents) == set(recovery.agents)


def test_with_a_lost_database_agents_are_found_again() -> None:
    recovery = recovered([], [tree(), tree("t-b", "demo-b", OTHER_REF, slot=1)])
    assert [(agent.id, agent.slot, agent.process, agent.state, agent.token) for agent in recovery.agents] == [
        ("demo-a", 0, REF, S.STARTING, "t-a"),
        ("demo-b", 1, OTHER_REF, S.STARTING, "t-b"),
    ]
    assert all(agent.spec_hash == "h" and not agent.leaving and agent.ready_deadline == NOW for agent in recovery.agents)
    assert recovery.adopted == ("demo-a", "demo-b")


def test_with_a_lost_database_a_tree_without_a_leader_is_ended() -> None:
    agent = only(recovered([], [tree(leader=None)]))
    assert (agent.state, agent.leaving, agent.process, agent.drain_deadline) == (S.DRAINING, True, None, NOW + 30)


def test_a_second_tree_of_an_agent_is_ended() -> None:
    recovery = recovered([RUNNING], [tree(), tree("t-old", leader=OTHER_REF)], {"demo-a": Identity.MATCH})
    agents = {agent.id: agent for agent in recovery.agents}
    assert agents.pop("demo-a") == RUNNING
    (stray,) = agents.values()
    assert (stray.token, stray.process, stray.state, stray.leaving, stray.drain_deadline) == (
        "t-old",
        OTHER_REF,
        S.DRAINING,
        True,
        NOW + 30,
    )
    assert recovery.strays == (stray.id,)


def test_a_stray_that_was_recorded_is_not_made_anew() -> None:
    first = recovered([RUNNING], [tree(), tree("t-old", leader=OTHER_REF)], {"demo-a": Identity.MATCH})
    stray = first.strays[0]
    records = [replace(agent, stop_sent=agent.leaving) for agent in first.agents]
    again = recovered(records, [tree(), tree("t-old", leader=OTHER_REF)], {"demo-a": Identity.MATCH, stray: Identity.MATCH})
    assert list(again.agents) == records
    assert again.strays == ()


def test_of_two_trees_of_an_unknown_agent_one_is_adopted() -> None:
    recovery = recovered([], [tree("t-new", leader=OTHER_REF, started_at=60.0), tree("t-old", started_at=50.0)])
    assert [(agent.token, agent.leaving) for agent in recovery.agents] == [("t-old", False), ("t-new", True)]
