"""A fleet that may spend only so much: paused at its cap, and going on when it may; over fakes and in fake time."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from fleetctl.core.contract import Message
from fleetctl.core.orders import Wish
from fleetctl.errors import FleetctlError
from fleetctl.fleet import Fleet
from fleetctl.models import AgentState, BudgetPeriod, BudgetSpec, FleetSpec, WarmPoolSpec
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time

SPEC = FleetSpec(
    name="demo",
    command=("agent",),
    replicas=2,
    warm_pool=WarmPoolSpec(enabled=True, size=1),
    budget=BudgetSpec(tokens=1000, period=BudgetPeriod.DAY),
)
DAY = 86400.0


class World:
    """One machine and one disk, and the fleet that the daemon of the moment keeps there."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.machine = FakeMachine(self.clock)
        self.state = FakeStateManager()
        self.told: list[str] = []

    def run(self, story: Callable[["World"], Awaitable[None]], spec: FleetSpec = SPEC) -> None:
        async def told() -> None:
            await self.boot(spec)
            await story(self)
            await self.fleet.close()

        run_in_fake_time(self.clock, told())

    async def boot(self, spec: FleetSpec) -> None:
        """Another daemon over what is on disk; the last one is killed where it stands."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        text = self.state.spending.get("demo")
        self.fleet = Fleet(
            Wish(spec=spec),
            lifecycle_manager=FakeLifecycleManager(self.machine),
            state_manager=self.state,
            clock=self.clock,
            agents=list(self.state.agents.values()),
            spending=None if text is None else json.loads(text),
            on_event=lambda event: self.told.append(event.kind),
        )
        self.fleet.start()
        await self.live()

    async def live(self, seconds: float = 10.0) -> None:
        for _ in range(int(seconds / 5.0)):
            await asyncio.sleep(5.0)
            self.fleet.observe({})

    async def spend(self, total: int, number: int = 0) -> None:
        """One agent says so, as its total; the fleet a moment later."""
        replicas = [agent for agent in self.fleet.agents if not agent.pooled]
        self.fleet.hear(replicas[number].id, Message(tokens=(total, 0)))
        await asyncio.sleep(0.5)

    @property
    def running(self) -> int:
        return len(self.machine.living())


def test_a_fleet_whose_budget_is_used_up_is_paused_and_goes_on_the_next_day_as_it_was() -> None:
    async def story(world: World) -> None:
        before = {agent.id for agent in world.fleet.agents if not agent.pooled}
        await world.spend(600)
        await world.live()
        assert world.running == 3
        await world.spend(400, number=1)
        await world.live()
        assert world.running == 0
        assert {agent.id for agent in world.fleet.agents} == before
        assert {agent.state for agent in world.fleet.agents} == {AgentState.TERMINATED}
        with pytest.raises(FleetctlError, match="1,000 tokens per day"):
            await world.fleet.acquire({}, require_warm=False, timeout_seconds=1.0)
        await world.live(DAY)
        assert world.running == 3
        assert {agent.id for agent in world.fleet.agents if agent.ready} == before
        assert (world.told.count("fleet.paused"), world.told.count("fleet.resumed")) == (1, 1)

    World().run(story)


def test_a_pause_outlives_the_daemon() -> None:
    async def story(world: World) -> None:
        await world.spend(1000)
        await world.live()
        assert world.running == 0
        await world.boot(SPEC)
        assert world.running == 0
        assert world.fleet.wish.paused
        await world.boot(replace(SPEC, budget=BudgetSpec(tokens=2000)))
        assert world.running == 3

    World().run(story)


def test_what_agents_that_live_have_spent_is_not_counted_twice_by_the_next_daemon() -> None:
    async def story(world: World) -> None:
        await world.spend(600)
        await world.live()
        for _ in range(5):
            await world.boot(SPEC)
            await world.spend(700)
            await world.live()
        assert world.fleet.budget.ever.tokens == 700
        assert not world.fleet.wish.paused

    World().run(story)


def test_a_larger_budget_or_a_renewed_one_lets_it_go_on() -> None:
    async def story(world: World) -> None:
        await world.spend(1000)
        await world.live()
        await world.fleet.apply(replace(SPEC, budget=BudgetSpec(tokens=1500)))
        await world.live()
        assert world.running == 3
        await world.spend(500)  # of a new process
        await world.live()
        assert world.running == 0
        await world.fleet.renew_budget()
        await world.live()
        assert world.running == 3
        assert world.fleet.budget.ever.tokens == 1500

    World().run(story)


def test_a_paused_fleet_can_be_scaled_and_taken_down() -> None:
    async def story(world: World) -> None:
        await world.spend(1000)
        await world.live()
        await world.fleet.scale(1)
        await world.live()
        assert len(world.fleet.agents) == 1
        await world.fleet.scale(3)
        await world.live()
        assert world.running == 0
        await world.fleet.take_down(now=False)
        await world.live()
        assert world.fleet.supervisor.empty

    World().run(story)


def test_a_full_disk_does_not_keep_it_from_being_paused() -> None:
    async def story(world: World) -> None:
        world.state.fails = lambda attempt: True
        await world.spend(1000)
        assert world.fleet.wish.paused
        await world.live()
        world.state.fails = lambda attempt: False
        await world.live()
        assert world.running == 0
        assert world.told.count("fleet.paused") == 1

    World().run(story)


def test_without_a_budget_it_is_only_counted() -> None:
    async def story(world: World) -> None:
        await world.spend(10**9)
        await world.live()
        assert world.running == 3
        assert world.fleet.budget.status(world.fleet.spec.budget)["tokens"] == 10**9

    World().run(story, replace(SPEC, budget=BudgetSpec()))
