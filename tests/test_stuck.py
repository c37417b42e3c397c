"""An agent that hangs on its work, and who is not to be taken for one; over fakes and in fake time."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from fleetctl.core.contract import Message, Report
from fleetctl.core.orders import Wish
from fleetctl.core.stuck import Watch, look
from fleetctl.fleet import Fleet
from fleetctl.models import Agent, AgentState, Exit, FleetSpec, GracefulDrainSpec, ProcessRef
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time

AFTER, LOOKS = 60.0, 5.0
SPEC = FleetSpec(name="demo", command=("agent",), stuck_after_seconds=AFTER, graceful_drain=GracefulDrainSpec(timeout_seconds=600.0))
AGENT = Agent(
    id="demo-aaaaa",
    fleet="demo",
    slot=0,
    state=AgentState.RUNNING,
    created_at=0.0,
    ready=True,
    process=ProcessRef(pid=1, start_ticks=1, boot_id="boot-1"),
)
BUSY = Report(active=1, moved_at=0.0)


def seen(agents: list[Agent], reports: list[Report], seconds: float, *, every: float = LOOKS) -> dict[str, str]:
    """Who is found stuck at any of the looks; `agents` and `reports`: how it was at each, the last for all that follow."""
    watch, found = Watch(), dict[str, str]()
    for number in range(int(seconds / every) + 1):
        agent, report = agents[min(number, len(agents) - 1)], reports[min(number, len(reports) - 1)]
        now = number * every
        watch, stuck = look(watch, [agent], {agent.id: report}, AFTER, now=now, wall=now)
        found |= stuck
    return found


@pytest.mark.parametrize(
    ("agents", "reports", "stuck"),
    [
        pytest.param([AGENT], [BUSY], True, id="busy, and nothing changes"),
        pytest.param([AGENT], [replace(BUSY, active=0)], False, id="nothing in work"),
        pytest.param([AGENT], [Report(status="busy")], False, id="it never said what is in work"),
        pytest.param([AGENT], [replace(BUSY, moved_at=LOOKS * number) for number in range(30)], False, id="it gets on"),
        pytest.param([replace(AGENT, blocked="rate limit", blocked_until=1e9)], [BUSY], False, id="blocked"),
        pytest.param([replace(AGENT, blocked="rate limit", blocked_until=30.0)], [BUSY], True, id="blocked, but long ago"),
        pytest.param([replace(AGENT, state=AgentState.SUSPENDED, pooled=True)] * 13 + [AGENT], [BUSY], True, id="resumed, but long ago"),
        pytest.param([replace(AGENT, state=AgentState.SUSPENDED, pooled=True)] * 20 + [AGENT], [BUSY], False, id="resumed lately"),
        pytest.param([replace(AGENT, state=AgentState.DRAINING)], [BUSY], False, id="on its way out"),
        pytest.param([replace(AGENT, leader_exit=Exit(code=0))], [BUSY], False, id="ended"),
    ],
)
def test_who_is_stuck(agents: list[Agent], reports: list[Report], stuck: bool) -> None:
    assert list(seen(agents, reports, 2 * AFTER + LOOKS)) == [AGENT.id] * stuck


def test_nobody_is_stuck_before_the_time_is_over() -> None:
    assert seen([AGENT], [BUSY], AFTER - LOOKS) == {}


def test_looks_that_come_late_prove_nothing() -> None:
    """The daemon itself stood still: what agents said meanwhile is not read yet."""
    assert seen([AGENT], [BUSY], 100 * AFTER, every=AFTER) == {}


def test_a_stuck_agent_is_replaced_soon_and_with_the_reason() -> None:
    clock = FakeClock()
    machine = FakeMachine(clock)

    async def live(fleet: Fleet, seconds: float, say: Callable[[], Awaitable[None]] | None = None) -> None:
        for _ in range(int(seconds / LOOKS)):
            await asyncio.sleep(LOOKS)
            if say is not None:
                await say()
            fleet.observe({})

    async def told() -> None:
        fleet = Fleet(Wish(spec=SPEC), lifecycle_manager=FakeLifecycleManager(machine), state_manager=FakeStateManager(), clock=clock)
        fleet.start()
        await asyncio.sleep(2.0)
        (agent,) = fleet.agents
        leader = machine.leader(agent.id)
        leader.ignores_stop = True
        done = 0

        async def get_on() -> None:
            nonlocal done
            done += 1
            fleet.hear(agent.id, Message(active=1, progress=done, pending=done))

        async def only_queue() -> None:
            nonlocal done
            done += 1
            fleet.hear(agent.id, Message(pending=done, status=f"{done} wait", watchdog="ping"))

        await live(fleet, 3 * AFTER, get_on)
        assert leader.signals == []
        await live(fleet, AFTER + LOOKS, only_queue)
        assert leader.signals
        await live(fleet, 10.0)  # of the 600 s that one which works would have
        (agent,) = fleet.agents
        assert not leader.alive
        assert (agent.restarts, agent.ready) == (1, True)
        assert str(agent.last_exit) == "killed by SIGKILL, stopped: stuck: 1 in work, and no progress for 60 s"
        await fleet.close()

    run_in_fake_time(clock, told())
