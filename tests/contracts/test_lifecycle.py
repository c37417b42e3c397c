"""What every `LifecycleManager` must do, the fake as well as the real one."""

import signal
from dataclasses import replace

import pytest

from fleetctl.errors import SpawnFailed
from fleetctl.models import Agent, Exit, FleetSpec, Identity, ProcessRef
from tests.contracts.harness import FakeWorld, Program, RealWorld, World, new_agent
from tests.helpers import wait_for

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


def test_a_suspended_tree_is_stopped_whole_and_goes_on_whole(world: World) -> None:
    async def story() -> None:
        agent, other = await world.start(Program.HAS_CHILDREN), await world.start(Program.HAS_CHILDREN)
        await world.until(lambda: len(world.states(agent)) == 3)
        assert list(await world.manager.suspend([agent])) == [agent.id]
        assert world.states(agent) == [True] * 3
        assert world.states(other) == [False] * 3
        assert list(await world.manager.resume([agent])) == [agent.id]
        assert world.states(agent) == [False] * 3

    world.run(story())


def test_many_are_suspended_and_resumed_at_once(world: World) -> None:
    async def story() -> None:
        agents = [await world.start(Program.SLEEPS) for _ in range(5)]
        assert set(await world.manager.suspend(agents)) == {agent.id for agent in agents}
        assert all(world.states(agent) == [True] for agent in agents)
        assert set(await world.manager.resume(agents[:3])) == {agent.id for agent in agents[:3]}
        assert [world.states(agent) for agent in agents] == [[False]] * 3 + [[True]] * 2

    world.run(story())


def test_one_that_is_gone_is_neither_suspended_nor_resumed(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.EXITS_3)
        await end_of(world, agent)
        assert list(await world.manager.suspend([agent])) == []
        assert list(await world.manager.resume([agent])) == []

    world.run(story())


def test_one_that_was_killed_while_it_was_suspended_is_not_resumed(world: World) -> None:
    async def story() -> None:
        agent, other = await world.start(Program.SLEEPS), await world.start(Program.SLEEPS)
        await world.manager.suspend([agent, other])
        world.manager.kill([agent])
        await end_of(world, agent)
        assert list(await world.manager.resume([agent, other])) == [other.id]

    world.run(story())


def test_a_stopped_one_can_be_suspended_and_a_running_one_resumed(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        world.manager.signal([agent], STOP)
        assert list(await world.manager.suspend([agent])) == [agent.id]
        world.manager.signal([agent], CONT)
        assert list(await world.manager.resume([agent])) == [agent.id]
        assert world.states(agent) == [False]

    world.run(story())


def test_a_suspended_one_ends_on_term_and_cont(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.HAS_CHILDREN)
        await world.until(lambda: len(world.states(agent)) == 3)
        await world.manager.suspend([agent])
        world.manager.signal([agent], TERM, CONT)
        assert (await end_of(world, agent)).signal == TERM
        await world.until(lambda: not world.manager.survivors([agent])[agent.id])

    world.run(story())


def test_who_only_has_the_pid_of_a_suspended_one_is_not_touched(world: World) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        confused = replace(new_agent(), process=replace(ref(agent), start_ticks=1))
        assert list(await world.manager.suspend([confused])) == []
        assert world.states(agent) == [False]
        await world.manager.suspend([agent])
        assert list(await world.manager.resume([confused])) == []
        assert world.states(agent) == [True]

    world.run(story())


def test_a_warm_one_is_found_as_suspended_while_it_is_stopped(world: World) -> None:
    async def story() -> None:
        warm, cold = await world.start(Program.SLEEPS, replace(new_agent(), pooled=True)), await world.start(Program.SLEEPS)
        await world.manager.suspend([warm, cold])
        assert {tree.agent_id: tree.suspended for tree in world.manager.find()} == {warm.id: True, cold.id: False}
        await world.manager.resume([warm])
        assert not any(tree.suspended for tree in world.manager.find())

    world.run(story())


def test_a_claim_is_kept_where_told_and_else_replaced(world: World) -> None:
    agent = new_agent()
    world.manager.claim(agent, {"tools": ["a"]}, keep=True)
    world.manager.claim(agent, {"tools": ["b"]}, keep=True)
    assert world.claim_of(agent) == {"tools": ["a"]}
    world.manager.claim(agent, {"tools": ["c"]})
    assert world.claim_of(agent) == {"tools": ["c"]}

    async def story() -> None:
        world.manager.discard(agent)
        await wait_for(lambda: world.claim_of(agent) is None)

    world.run(story())
