"""What agents say of themselves and what their probes find, as the loop takes it in; over fakes and in fake time."""

from dataclasses import replace

import pytest

from fleetctl.core.contract import Message
from fleetctl.models import (
    Agent,
    AgentState,
    FleetSpec,
    GracefulDrainSpec,
    LivenessSpec,
    OnTimeout,
    ProbeOutcome,
    ReadinessSpec,
    Replace,
    RestartPolicy,
    RestartSpec,
)
from fleetctl.testing import settled
from tests.test_supervisor import CONT, DRAIN, KILL, SETTLE, SPEC, TERM, World, story

S = AgentState
START_TIMEOUT, WATCHDOG = 20.0, 5.0
ONE = replace(SPEC, replicas=1)
NOTIFY = replace(ONE, readiness=ReadinessSpec(notify=True, start_timeout_seconds=START_TIMEOUT))
PROBED = replace(ONE, readiness=ReadinessSpec(tcp="127.0.0.1:1", start_timeout_seconds=START_TIMEOUT))
BOTH = replace(ONE, readiness=ReadinessSpec(notify=True, tcp="127.0.0.1:1", start_timeout_seconds=START_TIMEOUT))
WATCHED = replace(ONE, watchdog_seconds=WATCHDOG)


async def say(world: World, **said: object) -> Agent:
    """The first agent says it; the agent afterwards."""
    await settled()
    world.supervisor.notified(world.agents[0].id, Message(**said))  # type: ignore[arg-type]  # the fields' types are Message's affair
    await settled()
    return world.agents[0]


async def probe(world: World, outcome: ProbeOutcome, reason: str = "") -> Agent:
    await settled()
    agent = world.agents[0]
    assert agent.process is not None
    world.supervisor.probed(agent.id, agent.process, outcome, reason)
    await settled()
    return world.agents[0]


@story(NOTIFY)
async def test_with_notify_an_agent_is_ready_when_it_says_so_and_not_before(world: World) -> None:
    await world.after(START_TIMEOUT / 2)
    assert world.states == [S.STARTING]
    agent = await say(world, ready=True)
    assert (agent.state, agent.ready) == (S.RUNNING, True)
    await world.after(10 * START_TIMEOUT)
    assert world.agents == (agent,)


@story(NOTIFY)
async def test_an_agent_that_does_not_get_ready_in_time_is_a_failed_start(world: World) -> None:
    first = world.pids()
    await world.after(START_TIMEOUT + 0.1)
    (agent,) = world.agents
    assert world.lifecycle.sent == [(agent.id, TERM), (agent.id, CONT)]
    assert agent.failures
    assert agent.restarts == 1
    assert world.pids() != first
    assert "agent.failing" in world.told


@story(NOTIFY)
async def test_an_agent_that_is_starting_is_asked_to_stop_once_it_can_have_heard_of_it(world: World) -> None:
    await world.after(1.0)
    world.ask(0)
    await world.after(1.9)
    assert world.lifecycle.sent == []
    world.supervisor.notified(world.agents[0].id, Message(ready=True))
    await settled()
    assert world.stops_sent().total() == 1
    assert world.agents == ()
    world.ask(1)
    await world.after(1.0)
    world.ask(0)
    await world.after(2.1)
    assert world.stops_sent().total() == 2
    world.ask(1)
    await settled()
    world.ask(down=True, down_now=True)
    await settled()
    assert world.agents == ()


@story(NOTIFY)
async def test_more_time_to_start_is_granted_up_to_an_hour(world: World) -> None:
    agent = await say(world, extend_timeout_seconds=600.0)
    await world.after(599.0)
    assert world.states == [S.STARTING]
    agent = await say(world, extend_timeout_seconds=1e9)
    assert agent.start_deadline is not None
    assert agent.started_clock is not None
    assert agent.start_deadline - agent.started_clock == pytest.approx(3600.0 + START_TIMEOUT)
    shorter = await say(world, extend_timeout_seconds=1.0)
    assert shorter.start_deadline == agent.start_deadline


@story(ONE)
async def test_its_word_makes_an_agent_ready_before_it_has_settled(world: World) -> None:
    agent = await say(world, ready=True)
    assert agent.ready
    assert world.clock.monotonic() < (agent.started_clock or 0.0) + SETTLE


@story(PROBED)
async def test_with_a_probe_an_agent_is_ready_when_it_passes(world: World) -> None:
    assert not (await probe(world, ProbeOutcome.UNREADY, "refused")).ready
    assert (await probe(world, ProbeOutcome.READY)).ready


@story(PROBED)
async def test_a_start_that_took_too_long_says_what_the_probe_said_last(world: World) -> None:
    agent = await probe(world, ProbeOutcome.UNREADY, "connection refused")
    assert agent.note == "not ready yet: connection refused"
    await world.after(START_TIMEOUT + 1.0)
    failing = [event.message for event in world.state.events if event.kind == "agent.failing"]
    assert failing == [f"{agent.id} does not work and is stopped: not ready after {START_TIMEOUT:g} s: connection refused"]


@pytest.mark.parametrize("word_first", [True, False])
def test_with_both_it_takes_its_word_and_the_probe(word_first: bool) -> None:
    async def told(world: World) -> None:
        await settled()
        before = await (say(world, ready=True) if word_first else probe(world, ProbeOutcome.READY))
        assert not before.ready
        after = await (probe(world, ProbeOutcome.READY) if word_first else say(world, ready=True))
        assert after.ready

    World(BOTH).run(told)


@story(BOTH)
async def test_what_was_found_of_an_earlier_process_says_nothing_of_the_next(world: World) -> None:
    await settled()
    old = world.agents[0]
    assert old.process is not None
    await probe(world, ProbeOutcome.READY)
    world.crash(old)
    await settled()
    world.supervisor.probed(old.id, old.process, ProbeOutcome.READY)
    agent = await say(world, ready=True)
    assert not agent.ready
    assert (await probe(world, ProbeOutcome.READY)).ready


@story(PROBED)
async def test_a_failing_readiness_probe_takes_a_running_agent_out_and_brings_it_back(world: World) -> None:
    await probe(world, ProbeOutcome.READY)
    agent = await probe(world, ProbeOutcome.UNREADY, "503")
    assert (agent.state, agent.ready, agent.note) == (S.RUNNING, False, "not ready: 503")
    assert (await probe(world, ProbeOutcome.READY)).ready
    assert world.lifecycle.sent == []


@story(replace(ONE, liveness=LivenessSpec(tcp="127.0.0.1:1")))
async def test_a_failed_liveness_probe_is_a_failure_of_the_agent(world: World) -> None:
    await world.ready()
    first = world.pids()
    agent = await probe(world, ProbeOutcome.FAILED, "timed out")
    assert world.lifecycle.sent == [(agent.id, TERM), (agent.id, CONT)]
    assert world.pids() != first
    assert len(agent.failures) == 1


@pytest.mark.parametrize("policy", [RestartPolicy.NEVER, RestartPolicy.ON_FAILURE])
def test_a_stuck_agent_that_then_exits_cleanly_has_failed_all_the_same(policy: RestartPolicy) -> None:
    async def told(world: World) -> None:
        await world.ready()
        world.lifecycle.ignore_stop = True
        leader = world.machine.leader(world.agents[0].id)
        leader.ignores_stop = True
        await probe(world, ProbeOutcome.FAILED, "timed out")
        world.machine.end(leader, code=0)
        await settled()
        (agent,) = world.agents
        assert agent.state is (S.FAILED if policy is RestartPolicy.NEVER else S.STARTING)

    World(replace(ONE, restart=RestartSpec(policy=policy))).run(told)


@story(WATCHED)
async def test_a_silent_agent_is_missed(world: World) -> None:
    await world.ready()
    first = world.pids()
    for _ in range(5):
        await world.after(WATCHDOG - 0.1)
        await say(world, watchdog="ping")
    assert world.pids() == first
    await world.after(WATCHDOG + 0.1)
    assert world.pids() != first
    assert world.told.count("agent.failing") == 1


@story(WATCHED)
async def test_an_agent_can_trigger_its_watchdog(world: World) -> None:
    await world.ready()
    first = world.pids()
    await say(world, watchdog="trigger")
    assert world.pids() != first


@story(WATCHED)
async def test_the_next_daemon_gives_the_whole_time_anew(world: World) -> None:
    await world.ready()
    first = world.pids()
    await world.after(WATCHDOG - 0.1)
    await world.kill_9()
    await world.after(60.0)
    world.boot()
    await world.after(WATCHDOG - 0.1)
    await say(world, watchdog="ping")
    assert world.pids() == first


@story(replace(NOTIFY, replicas=1))
async def test_a_word_that_no_daemon_heard_costs_the_agent_nothing(world: World) -> None:
    await settled()
    first = world.pids()
    await world.kill_9()
    world.boot()
    await world.after(START_TIMEOUT + 1.0)
    assert world.pids() == first
    assert world.agents[0].ready


@story(replace(ONE, graceful_drain=GracefulDrainSpec(timeout_seconds=DRAIN)))
async def test_more_time_to_finish_is_granted(world: World) -> None:
    await world.ready()
    leader = world.machine.leader(world.agents[0].id)
    leader.ignores_stop = True
    world.ask(0)
    await world.after(DRAIN - 1.0)
    await say(world, extend_timeout_seconds=100.0)
    await world.after(99.0)
    assert leader.signals == [TERM, CONT]
    await world.after(2.0)
    assert leader.signals == [TERM, CONT, KILL]


@story(ONE)
async def test_a_blocked_agent_that_ends_is_started_when_the_block_is_over_and_has_not_failed(world: World) -> None:
    await world.ready()
    agent = await say(world, blocked="rate limit", blocked_until=world.clock.time() + 100.0, extension=True)
    assert (agent.blocked, agent.aware) == ("rate limit", True)
    world.crash(agent)
    await settled()
    (agent,) = world.agents
    assert (agent.state, agent.failures) == (S.BACKOFF, ())
    await world.after(99.0)
    assert world.states == [S.BACKOFF]
    await world.after(2.0)
    assert world.states == [S.RUNNING]


@story(ONE)
async def test_one_that_blocks_and_ends_again_and_again_waits_each_time_and_is_no_crash_loop(world: World) -> None:
    for _ in range(3 * ONE.restart.crash_loop_failures):
        await world.ready()
        agent = await say(world, blocked="rate limit", blocked_until=world.clock.time() + 2.0)
        world.crash(agent)
        await settled()
        assert world.states == [S.BACKOFF]
        await world.kill_9()
        world.boot()
        await world.after(1.0)
        assert world.states == [S.BACKOFF]
        await world.after(1.1)
    assert "agent.failed" not in world.told


@story(replace(WATCHED, graceful_drain=GracefulDrainSpec(timeout_seconds=600.0)))
async def test_a_silent_agent_that_does_not_act_on_the_signal_is_soon_killed(world: World) -> None:
    await world.ready()
    leader = world.machine.leader(world.agents[0].id)
    leader.ignores_stop = True
    await world.after(WATCHDOG)
    assert leader.signals == [TERM, CONT]
    await world.after(5.0)
    assert leader.signals == [TERM, CONT, KILL]


@story(replace(WATCHED, graceful_drain=GracefulDrainSpec(timeout_seconds=600.0, on_timeout=OnTimeout.WAIT)))
async def test_a_hung_agent_that_asks_for_time_gets_it_but_not_for_ever(world: World) -> None:
    await world.ready()
    leader = world.machine.leader(world.agents[0].id)
    leader.ignores_stop = True
    await world.after(WATCHDOG)
    await say(world, extend_timeout_seconds=100.0)
    await world.after(99.0)
    assert leader.alive
    await world.after(2.0)
    assert leader.signals == [TERM, CONT, KILL]


@story(ONE)
async def test_a_block_is_lifted_by_saying_so_or_by_its_time(world: World) -> None:
    await world.ready()
    await say(world, blocked="rate limit", blocked_until=world.clock.time() + 100.0)
    assert (await say(world, blocked="", blocked_until=None)).blocked_until is None
    assert (await say(world, blocked="late", blocked_until=world.clock.time() - 1.0)).blocked == ""


@story()
async def test_an_agent_can_ask_to_be_replaced(world: World) -> None:
    await world.ready()
    first, *others = world.agents
    pids = world.pids()
    await say(world, recycle=True)
    await world.ready()
    assert {agent.id: world.pids()[agent.id] for agent in others} == {agent.id: pids[agent.id] for agent in others}
    assert world.pids()[first.id] != pids[first.id]
    assert world.agents[0].replace is Replace.NO


@story(ONE)
async def test_a_resume_token_is_on_disk_at_once_and_survives(world: World) -> None:
    await world.ready()
    agent = await say(world, resume="token-1")
    assert world.state.agents[agent.id].resume_token == "token-1"
    world.crash(agent)
    await world.ready()
    assert world.agents[0].resume_token == "token-1"


@story(ONE)
async def test_what_is_said_again_and_again_is_not_written_again_and_again(world: World) -> None:
    await world.ready()
    await say(world, ready=True, resume="a", extension=True)
    before = world.state.attempts
    for _ in range(100):
        await say(world, ready=True, resume="a", watchdog="ping", extension=True)
    assert world.state.attempts == before


@story(ONE)
async def test_what_comes_after_the_end_is_not_heard(world: World) -> None:
    await world.ready()
    agent = world.agents[0]
    world.ask(0)
    world.supervisor.notified(agent.id, Message(ready=True, watchdog="trigger"))
    world.supervisor.notified("demo-nobody", Message(ready=True))
    await settled()
    world.supervisor.notified(agent.id, Message(ready=True))
    await settled()
    assert world.agents == ()


def test_settings_of_readiness_tell_what_is_waited_for() -> None:
    assert not FleetSpec(name="a", command=("b",)).readiness.probed
    assert PROBED.readiness.probed
