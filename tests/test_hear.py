"""What a fleet keeps of what its agents say, and for how long; over fakes and in fake time."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fleetctl.core.contract import Message
from fleetctl.core.orders import Wish
from fleetctl.fleet import Fleet
from fleetctl.models import AgentState, FleetSpec, ReadinessSpec
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled

SPEC = FleetSpec(name="demo", command=("agent",), replicas=2, max_replicas=50, readiness=ReadinessSpec(notify=True))


class Place:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)

    def run(self, story: Callable[[Fleet], Awaitable[None]]) -> None:
        async def told() -> None:
            lifecycle, state = FakeLifecycleManager(self.machine), FakeStateManager()
            fleet = Fleet(Wish(spec=SPEC), lifecycle_manager=lifecycle, state_manager=state, clock=self.clock)
            fleet.start()
            await settled()
            await story(fleet)
            await fleet.close()

        run_in_fake_time(self.clock, told())


@pytest.fixture
def place() -> Place:
    return Place()


def test_what_an_agent_says_reaches_the_loop_and_the_picture_of_its_work(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        first, second = fleet.agents
        fleet.hear(first.id, Message(ready=True, active=1, slots=4))
        fleet.hear(first.id, Message(status="busy"))
        await settled()
        assert [agent.state for agent in fleet.agents] == [AgentState.RUNNING, AgentState.STARTING]
        report = fleet.reports[first.id]
        assert (report.active, report.slots, report.status, report.process) == (1, 4, "busy", first.process)
        assert second.id not in fleet.reports

    place.run(story)


def test_it_is_heard_from_the_moment_its_process_exists(place: Place) -> None:
    """Before that is on disk and published: a fast agent is ready sooner than a slow disk."""

    async def story(fleet: Fleet) -> None:
        known = {agent.id for agent in fleet.agents}
        await fleet.scale(20)  # many, so that the loop takes a breath between them
        while not (new := [process.agent_id for process in place.machine.living() if process.agent_id not in known]):
            await asyncio.sleep(0)
        assert not any(agent.process for agent in fleet.agents if agent.id not in known)
        fleet.hear(new[0], Message(ready=True, pending=2))
        await settled()
        assert fleet.reports[new[0]].pending == 2
        assert [agent.id for agent in fleet.agents if agent.ready] == [new[0]]

    place.run(story)


def test_the_next_process_starts_with_a_clean_picture(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        agent = fleet.agents[0]
        fleet.hear(agent.id, Message(active=1, pending=7))
        place.machine.end(place.machine.leader(agent.id), code=1)
        await settled()
        assert fleet.reports == {}
        fleet.hear(agent.id, Message(active=2))
        assert fleet.reports[agent.id].pending is None
        assert len(fleet.reports) == 1

    place.run(story)


def test_who_is_unknown_is_not_heard(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        fleet.hear("demo-nobody", Message(ready=True, active=1))
        await settled()
        assert fleet.reports == {}

    place.run(story)


@pytest.mark.parametrize(
    ("said", "goes"),
    [
        pytest.param((Message(active=1), Message(idle=True)), 1, id="idle"),
        pytest.param((Message(active=1, pending=0), Message(active=0, pending=0)), 1, id="nothing in work, nothing waits"),
        pytest.param((Message(active=1), Message(active=0, pending=3)), 0, id="something waits"),
        pytest.param((Message(idle=True), Message(idle=True)), 0, id="both are idle: the oldest"),
        pytest.param((), 0, id="nobody said anything: the oldest"),
    ],
)
def test_a_fleet_that_shrinks_ends_who_has_nothing_to_do(place: Place, said: tuple[Message, ...], goes: int) -> None:
    async def story(fleet: Fleet) -> None:
        before = [agent.id for agent in fleet.agents]
        for agent_id in before:
            fleet.hear(agent_id, Message(ready=True))
        for agent_id, message in zip(before, said, strict=False):
            fleet.hear(agent_id, message)
        await settled()
        await fleet.scale(1)
        await settled()
        assert [agent.id for agent in fleet.agents] == [before[1 - goes]]

    place.run(story)
