"""Who is probed when, in fake time."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from fleetctl.models import Agent, AgentState, Exit, FleetSpec, LivenessSpec, ProbeOutcome, ProcessRef, ReadinessSpec
from fleetctl.probing import Probing
from fleetctl.testing import FakeClock, FakeProber, run_in_fake_time, settled

SPEC = FleetSpec(name="demo", command=("x",), readiness=ReadinessSpec(tcp="127.0.0.1:1"), liveness=LivenessSpec(tcp="127.0.0.1:1"))
PLAIN = FleetSpec(name="demo", command=("x",))


def agent(state: AgentState, number: int = 1, **changes: Any) -> Agent:  # Any: fields by name
    process = ProcessRef(pid=number, start_ticks=number, boot_id="boot")
    return replace(Agent(id=f"demo-0000{number}", fleet="demo", slot=number, created_at=0.0, state=state, process=process), **changes)


STARTING, READY = agent(AgentState.STARTING), agent(AgentState.RUNNING, ready=True)


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.prober = FakeProber(self.clock)
        self.told: list[tuple[str, ProbeOutcome, str]] = []
        self.probing = Probing(self.prober, self.clock, lambda agent_id, _, outcome, why: self.told.append((agent_id, outcome, why)))

    def run(self, story: Coroutine[Any, Any, None]) -> None:  # Any: what a coroutine yields is the loop's affair
        async def to_the_end() -> None:
            await story
            await self.probing.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        run_in_fake_time(self.clock, to_the_end())


def test_a_starting_agent_is_asked_until_it_passes_and_then_left_alone_until_it_is_ready() -> None:
    world = World()
    world.prober.answers[STARTING.id] = deque(["refused", "refused", None, "refused"])

    async def story() -> None:
        world.probing.update(SPEC, [STARTING])
        await asyncio.sleep(5.0)
        assert world.told == [(STARTING.id, ProbeOutcome.UNREADY, "refused")] * 2 + [(STARTING.id, ProbeOutcome.READY, "")]
        world.probing.update(SPEC, [STARTING])  # it still waits for something else
        await asyncio.sleep(5.0)
        assert len(world.prober.asked) == 3

    world.run(story())


def test_a_ready_agent_is_asked_both_ways_and_what_fails_is_told() -> None:
    world = World()
    world.prober.answers[READY.id] = deque(["no"])

    async def story() -> None:
        world.probing.update(SPEC, [READY])
        await asyncio.sleep(35.0)
        assert sorted(world.told) == [(READY.id, ProbeOutcome.FAILED, "no"), (READY.id, ProbeOutcome.UNREADY, "no")]

    world.run(story())


def test_who_cannot_answer_or_need_not_is_not_asked() -> None:
    world = World()
    others = [
        agent(AgentState.SUSPENDED, 2, pooled=True),
        agent(AgentState.DRAINING, 3),
        agent(AgentState.RUNNING, 4, pooled=True),
        agent(AgentState.RUNNING, 5, resume_owed=True),
        agent(AgentState.RUNNING, 6, leader_exit=Exit(code=0)),
        agent(AgentState.STARTING, 7, process=None),
        agent(AgentState.BACKOFF, 8, process=None),
    ]

    async def story() -> None:
        world.probing.update(SPEC, others)
        world.probing.update(PLAIN, [STARTING, READY])
        await asyncio.sleep(100.0)
        assert not world.prober.asked

    world.run(story())


def test_asking_ends_with_the_stage_of_life_even_while_it_hangs() -> None:
    world = World()
    world.prober.answers[STARTING.id] = deque([1e9])

    async def story() -> None:
        world.probing.update(SPEC, [STARTING])
        await settled()
        world.probing.update(SPEC, [replace(STARTING, state=AgentState.DRAINING)])
        await asyncio.sleep(100.0)
        assert len(world.prober.asked) == 1
        assert not world.told

    world.run(story())


def test_a_new_process_and_a_changed_probe_are_asked_anew() -> None:
    world = World()

    async def story() -> None:
        world.probing.update(SPEC, [STARTING])
        await settled()
        world.probing.update(SPEC, [replace(STARTING, process=ProcessRef(pid=9, start_ticks=9, boot_id="boot"))])
        await settled()
        changed = replace(SPEC, readiness=ReadinessSpec(http="http://127.0.0.1:1"))
        world.probing.update(changed, [STARTING])
        await settled()
        probes = [probe for _, _, probe, _ in world.prober.asked]
        assert probes == [SPEC.readiness.probe, SPEC.readiness.probe, changed.readiness.probe]

    world.run(story())


def test_agents_that_became_ready_at_once_are_not_asked_at_once() -> None:
    world = World()
    spec = replace(SPEC, liveness=LivenessSpec())

    async def story() -> None:
        world.probing.update(spec, [agent(AgentState.RUNNING, number, ready=True) for number in range(1, 10)])
        await asyncio.sleep(10.0)
        times = {at for at, *_ in world.prober.asked}
        assert len(world.prober.asked) == len(times) == 9

    world.run(story())
