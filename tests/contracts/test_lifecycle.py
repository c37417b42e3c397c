"""What every `LifecycleManager` must do, the fake as well as the real one."""

import signal
from dataclasses import replace

import pytest

from fleetctl.errors import SpawnFailed
from fleetctl.models import Agent, Exit, FleetSpec, Identity, ProcessRef
from tests.contracts.harness import FakeWorld, Program, RealWorld, World, new_agent

TERM, CONT, STOP = signal.SIGTERM, signal.SIGCONT, signal.SIGSTOP


@pytest.fixture(params=["fake", "real"])
def world(request: pytest.FixtureRequest, state_dir: str) -> World:
    return FakeWorld() if request.param == "fake" else RealWorld(state_dir)


def ref(agent: Agent) -> ProcessRef:
    assert agent.process is not None
    return agent.process


async def end_of(world: World, agent: Agent) -> Exit:
    """How its leader ended, once it did."""
    exits: list[Exit] = []
    world.manager.watch(ref(agent), exits.append)
    await world.until(lambda: exits)
    return exits[0]


def test_a_spawned_process_is_the_one_recorded(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        assert world.manager.identify(ref(agent)) is Identity.MATCH
        assert world.manager.survivors([agent]) == {agent.id: (ref(agent),)}

    world.run(story())


def test_another_start_time_or_another_boot_is_another_process(world: World) -> None:
    async def story() -> None:
        process = ref(await world.start(Program.SLEEPS))
        assert world.manager.identify(replace(process, start_ticks=process.start_ticks + 1)) is Identity.GONE
        assert world.manager.identify(replace(process, boot_id="earlier")) is Identity.GONE

    world.run(story())


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "earlier"}])
def test_a_process_that_only_has_the_recorded_pid_is_never_touched(world: World, change: dict[str, object]) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        confused = replace(new_agent(), process=replace(ref(agent), **change))  # type: ignore[arg-type]  # of fields by name
        assert world.manager.survivors([confused]) == {confused.id: ()}
        world.manager.signal([confused], TERM)
        world.manager.kill([confused])
        assert (await end_of(world, confused)).code is None
        assert world.manager.identify(ref(agent)) is Identity.MATCH

    world.run(story())


def test_an_exit_code_is_told_once(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.EXITS_3)
        exits: list[Exit] = []
        world.manager.watch(ref(agent), exits.append)
        world.manager.watch(ref(agent), exits.append)
        await world.until(lambda: exits)
        assert [(exit.code, exit.signal) for exit in exits] == [(3, None)]

    world.run(story())


def test_a_signal_is_told(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        world.manager.signal([agent], TERM)
        ended = await end_of(world, agent)
        assert (ended.code, ended.signal) == (None, TERM)
        assert world.manager.survivors([agent]) == {agent.id: ()}
        assert world.manager.identify(ref(agent)) is Identity.GONE

    world.run(story())


def test_a_process_that_is_gone_is_told_of_with_an_unknown_exit(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.EXITS_3)
        await end_of(world, agent)
        world.manager.release(ref(agent))
        ended = await end_of(world, agent)
        assert (ended.code, ended.signal) == (None, None)

    world.run(story())


def test_a_stopped_process_ends_on_term_and_cont(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        world.manager.signal([agent], STOP)
        world.manager.signal([agent], TERM, CONT)
        assert (await end_of(world, agent)).signal == TERM

    world.run(story())


def test_only_killing_ends_what_ignores_the_stop_signal(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.IGNORES_STOP)
        world.manager.signal([agent], TERM, CONT)
        assert world.manager.identify(ref(agent)) is Identity.MATCH
        world.manager.kill([agent])
        assert (await end_of(world, agent)).signal == signal.SIGKILL
        await world.until(lambda: not world.manager.survivors([agent])[agent.id])

    world.run(story())


def test_what_a_leader_left_survives_it_and_keeps_the_agent_from_starting(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.LEAVES_CHILD)
        assert (await end_of(world, agent)).code == 0
        (child,) = world.manager.survivors([agent])[agent.id]
        assert child != agent.process
        with pytest.raises(SpawnFailed, match="still holds its lock") as refused:
            world.manager.spawn(agent, FleetSpec(name="demo", command=("true",), cwd="/"))
        assert not refused.value.permanent
        world.manager.signal([agent], TERM, CONT)
        await world.until(lambda: not world.manager.survivors([agent])[agent.id])
        world.manager.release(ref(agent))
        again = await world.start(Program.SLEEPS, agent)
        assert world.manager.survivors([again]) == {agent.id: (ref(again),)}

    world.run(story())


def test_signals_reach_the_agents_named_and_no_other(world: World) -> None:
    async def story() -> None:
        agents = [await world.start(Program.SLEEPS) for _ in range(4)]
        world.manager.signal(agents[:2], TERM, CONT)
        await world.until(lambda: not any(world.manager.survivors(agents[:2]).values()))
        assert all(world.manager.identify(ref(agent)) is Identity.MATCH for agent in agents[2:])

    world.run(story())


def test_trees_are_found_by_their_token(world: World) -> None:
    async def story() -> None:
        sleeper = await world.start(Program.SLEEPS)
        left = await world.start(Program.LEAVES_CHILD)
        await end_of(world, left)
        found = {tree.agent_id: tree for tree in world.manager.find()}
        assert found.keys() == {sleeper.id, left.id}
        tree = found[sleeper.id]
        assert (tree.token, tree.leader, tree.fleet, tree.slot, tree.spec_hash) == (sleeper.token, sleeper.process, "demo", 3, "hash")
        assert found[left.id].leader is None

    world.run(story())
