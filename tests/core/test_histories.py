"""Random histories over `plan`: a world that carries out orders at once, and what must hold after each of them."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.lifecycle import Move, move
from fleetctl.core.orders import BecomeReady, Create, Drain, Forget, Kill, Mode, Start, Wish
from fleetctl.core.reconcile import next_deadline, plan
from fleetctl.models import Agent, AgentState, FleetSpec, ProcessRef, Replace

S = AgentState
SPEC = FleetSpec(name="demo", command=("sleep", "60"), replicas=3)
SETTLE, DRAIN, RETRY = 0.25, 30.0, 5.0
_MOST_STEPS = 400


class World:
    """Agents as the supervisor would keep them; a process is a number."""

    def __init__(self, *, stubborn: bool) -> None:
        self.wish = Wish(spec=SPEC)
        self.agents: dict[str, Agent] = {}
        self.now = 1000.0
        self.started = 0
        self._stubborn = stubborn

    def act(self) -> int:
        """Ask the rules once and do as they say; how many orders there were."""
        before = list(self.agents.values())
        actions = plan(self.wish, before, self.now)
        assert plan(self.wish, before, self.now) == actions
        named = Counter(action.agent.id for action in actions if not isinstance(action, Create))
        assert not [agent_id for agent_id, number in named.items() if number > 1], f"two orders for one agent: {actions}"
        for action in actions:
            match action:
                case Create(slot):
                    assert slot not in {agent.slot for agent in self.agents.values()}, "a slot that is taken"
                    self._start(Agent(id=f"demo-{self.started}", fleet="demo", slot=slot, created_at=self.now))
                case Start(agent):
                    assert agent.process is None, "started twice"
                    self._start(agent)
                case BecomeReady(agent):
                    self._put(replace(agent, state=move(agent.state, Move.BECOME_READY), ready=True, rolled=False))
                case Drain(agent, leaving, _):
                    assert not agent.leaving, "told to leave twice"
                    assert leaving or agent.state is not S.DRAINING, "asked to stop twice"
                    self._put(
                        replace(
                            agent, state=S.DRAINING, leaving=leaving, ready=False, replace=Replace.ROLLING, drain_deadline=self.now + DRAIN
                        )
                    )
                    if not self._stubborn:
                        self._gone(self.agents[agent.id])
                case Kill(agent):
                    self._gone(agent)
                case Forget(agent):
                    assert agent.process is None, "forgotten with a live process"
                    del self.agents[agent.id]
        self.check()
        return len(actions)

    def settle(self) -> None:
        """Until the rules have no more orders, ever, if nothing happens."""
        for _ in range(_MOST_STEPS):
            if self.act():
                continue
            deadline = next_deadline(self.wish, self.agents.values())
            if deadline is None:
                break
            assert deadline > self.now, "woken for nothing"
            self.now = deadline
        else:
            raise AssertionError("the rules never come to rest")
        if self.wish.paused:
            assert not [agent for agent in self.agents.values() if agent.process], "it runs while its fleet is paused"

    def check(self) -> None:
        staying = [agent for agent in self.agents.values() if not agent.leaving]
        slots = Counter(agent.slot for agent in staying)
        assert not [slot for slot, number in slots.items() if number > 1], "two agents in one slot"
        if self.wish.starts:
            assert len(staying) == self.wish.replicas

    def crash(self, agent: Agent, then: AgentState) -> None:
        if agent.process is not None:
            verdict = {S.BACKOFF: self.now + RETRY, S.FAILED: None, S.TERMINATED: None}[then]
            if agent.state is S.DRAINING:
                self._gone(agent)
            else:
                self._put(replace(agent, state=then, process=None, ready=False, retry_deadline=verdict))

    def _start(self, agent: Agent) -> None:
        self.started += 1
        self._put(
            replace(
                agent,
                state=move(agent.state, Move.START),
                process=ProcessRef(pid=self.started, start_ticks=1, boot_id="b"),
                ready_deadline=self.now + SETTLE,
                spec_hash=self.wish.spec.process_hash,
                rolled=agent.rolled or agent.replace is Replace.ROLLING,
                replace=Replace.NO,
                retry_deadline=None,
            )
        )

    def _gone(self, agent: Agent) -> None:
        state = S.TERMINATED if agent.leaving else S.STARTING
        self._put(replace(agent, state=state, process=None, ready=False, ready_deadline=None, drain_deadline=None))

    def _put(self, agent: Agent) -> None:
        self.agents[agent.id] = agent


KINDS = [
    "scale",
    "down",
    "up",
    "change",
    "roll",
    "restart",
    "backoff",
    "fail",
    "complete",
    "hold",
    "run",
    "stop",
    "pause",
    "step",
    "settle",
]


@settings(max_examples=400, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), max_size=40))
def test_any_history_keeps_the_promises_and_comes_to_rest_as_wished(stubborn: bool, history: list[tuple[str, int]]) -> None:
    world = World(stubborn=stubborn)
    for kind, number in history:
        happen(world, kind, number)
    world.wish = replace(world.wish, mode=Mode.RUN, paused="")
    world.settle()
    assert len(world.agents) == world.wish.replicas
    assert {agent.state for agent in world.agents.values()} <= {S.RUNNING, S.FAILED, S.TERMINATED}
    assert world.act() == 0


def happen(world: World, kind: str, number: int) -> None:
    agents = list(world.agents.values())
    one = agents[number % len(agents)] if agents else None
    match kind:
        case "scale":
            world.wish = replace(world.wish, spec=replace(world.wish.spec, replicas=number))
        case "down" | "up":
            world.wish = replace(world.wish, down=kind == "down")
        case "change":
            world.wish = replace(world.wish, spec=replace(world.wish.spec, environment={"V": str(number)}))
        case "roll" | "restart":
            how = Replace.ROLLING if kind == "roll" else Replace.AT_ONCE
            for agent in agents:
                if not agent.leaving and agent.state is not S.DRAINING:
                    world.agents[agent.id] = replace(agent, replace=how)
        case "backoff" if one:
            world.crash(one, S.BACKOFF)
        case "fail" if one:
            world.crash(one, S.FAILED)
        case "complete" if one:
            world.crash(one, S.TERMINATED)
        case "hold" | "run" | "stop":
            world.wish = replace(world.wish, mode=Mode(kind))
        case "pause":
            world.wish = replace(world.wish, paused="no money" * (number % 2))
        case "step":
            world.act()
        case "settle":
            world.settle()


@given(st.booleans(), st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_a_new_size_touches_no_agent_that_stays(stubborn: bool, sizes: list[int]) -> None:
    world = World(stubborn=stubborn)
    world.settle()
    for size in sizes:
        before = {agent.id: agent.process for agent in world.agents.values()}
        started = world.started
        happen(world, "scale", size)
        world.settle()
        stayed = before.keys() & world.agents.keys()
        assert len(stayed) == min(size, len(before))
        assert all(world.agents[agent_id].process == before[agent_id] for agent_id in stayed)
        assert world.started - started == max(0, size - len(before))
