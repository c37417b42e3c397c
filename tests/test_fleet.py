"""One fleet as a whole: what it is told becomes the wish, on disk and in force, in the same order."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from fleetctl.core.orders import Wish
from fleetctl.errors import NotFound, StateDirectoryError, UsageError
from fleetctl.fleet import Fleet
from fleetctl.models import FleetSpec
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled

SPEC = FleetSpec(name="demo", command=("agent",), replicas=2, max_replicas=10)


class Place:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)
        self.state = FakeStateManager()

    def run(self, story: Callable[[Fleet], Awaitable[None]]) -> None:
        async def told() -> None:
            fleet = Fleet(Wish(spec=SPEC), lifecycle_manager=FakeLifecycleManager(self.machine), state_manager=self.state, clock=self.clock)
            fleet.start()
            await self.ready()
            await story(fleet)
            await fleet.close()

        run_in_fake_time(self.clock, told())

    async def ready(self) -> None:
        await asyncio.sleep(1.0)
        await settled()

    def stored(self) -> tuple[FleetSpec, bool]:
        return self.state.wishes["demo"]


@pytest.fixture
def place() -> Place:
    return Place()


def test_a_new_size_is_stored_told_and_reached(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        decision = await fleet.scale(5)
        assert decision is not None
        assert (decision.action, decision.current_replicas, decision.target_replicas) == ("scale_up", 2, 5)
        assert place.stored() == (replace(SPEC, replicas=5), False)
        assert place.state.history == [("demo", decision)]
        assert fleet.ready_replicas == 2
        await place.ready()
        assert len([agent for agent in fleet.agents if agent.ready]) == 5
        assert await fleet.scale(5) is None

    place.run(story)


@pytest.mark.parametrize("replicas", [-1, 11])
def test_a_size_out_of_bounds_changes_nothing(place: Place, replicas: int) -> None:
    async def story(fleet: Fleet) -> None:
        with pytest.raises(UsageError):
            await fleet.scale(replicas)
        assert place.state.wishes == {}
        assert fleet.wish == Wish(spec=SPEC)

    place.run(story)


def test_a_fleet_that_shrinks_spares_who_is_protected(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        await fleet.scale(4)
        await place.ready()
        oldest, second, *_ = (agent.id for agent in sorted(fleet.agents, key=lambda agent: (agent.created_at, agent.slot)))
        assert [await fleet.protect(oldest), await fleet.protect(second), await fleet.protect(second)] == [True, True, False]
        assert place.state.agents[oldest].protected
        decision = await fleet.scale(1)
        assert decision is not None
        assert (decision.target_replicas, fleet.wish.replicas) == (2, 2)
        await place.ready()
        assert {agent.id for agent in fleet.agents} == {oldest, second}
        assert await fleet.scale(1) is None
        await fleet.apply(replace(SPEC, replicas=1))
        assert place.stored()[0].replicas == 2
        assert await fleet.protect(oldest, on=False)
        await fleet.scale(1)
        await place.ready()
        assert [agent.id for agent in fleet.agents] == [second]
        await fleet.scale(0)
        await place.ready()
        assert fleet.agents == ()

    place.run(story)


def test_nobody_who_is_unknown_or_leaves_is_protected(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        with pytest.raises(NotFound):
            await fleet.protect("demo-nobody")
        agent_id = fleet.agents[0].id
        place.machine.leader(agent_id).ignores_stop = True
        await fleet.drain(agent_id, now=False)
        await settled()
        with pytest.raises(UsageError):
            await fleet.protect(agent_id)
        assert not place.state.agents[agent_id].protected

    place.run(story)


def test_none_at_all_is_always_possible(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        await fleet.apply(replace(SPEC, min_replicas=2))
        with pytest.raises(UsageError):
            await fleet.scale(1)
        await fleet.scale(0)
        await place.ready()
        assert fleet.agents == ()

    place.run(story)


def test_changes_at_the_same_time_are_both_made_and_stored(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        changed = replace(SPEC, replicas=2, environment={"A": "1"})
        await asyncio.gather(fleet.scale(5), fleet.apply(changed), fleet.scale(4))
        assert (fleet.wish.spec, fleet.wish.down) == place.stored()
        assert fleet.wish.spec == replace(changed, replicas=4)

    place.run(story)


def test_down_and_up_at_the_same_time_leave_the_last_word(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        await asyncio.gather(fleet.take_down(now=False), fleet.apply(SPEC))
        assert (fleet.wish.down, place.stored()) == (False, (SPEC, False))
        await asyncio.gather(fleet.apply(replace(SPEC, replicas=3)), fleet.take_down(now=True))
        assert (fleet.wish.down, fleet.wish.down_now, place.stored()[1]) == (True, True, True)

    place.run(story)


def test_a_change_in_the_making_does_not_undo_the_end_of_the_daemon(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        change = asyncio.ensure_future(fleet.scale(5))
        await asyncio.sleep(0)
        fleet.stop_with_daemon()
        await change
        await place.ready()
        assert fleet.supervisor.stopped
        assert place.machine.living() == []
        assert place.stored()[0].replicas == 5

    place.run(story)


@pytest.mark.parametrize("failing", [0, 2], ids=["the wish", "its record"])  # 1 are the agents
def test_on_a_full_disk_the_wish_in_force_is_the_one_stored(place: Place, failing: int) -> None:
    async def story(fleet: Fleet) -> None:
        await fleet.scale(3)
        await place.ready()
        attempt = place.state.attempts
        place.state.fails = lambda number: number == attempt + failing
        with pytest.raises(StateDirectoryError):
            await fleet.scale(4)
        assert fleet.wish.spec == place.stored()[0]

    place.run(story)


def test_an_unknown_agent_is_not_restarted(place: Place) -> None:
    async def story(fleet: Fleet) -> None:
        with pytest.raises(NotFound):
            fleet.restart(["demo-nobody"], all_at_once=False)
        before = [agent.process for agent in fleet.agents]
        assert fleet.restart(None, all_at_once=True) == [agent.id for agent in fleet.agents]
        await place.ready()
        assert not set(before) & {agent.process for agent in fleet.agents}

    place.run(story)
