"""The warm pool as tables, and as random histories over `plan` with what must hold after each step."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core import warmpool
from fleetctl.core.lifecycle import Move, move
from fleetctl.core.orders import Action, BecomeReady, Create, Drain, Forget, Kill, Mode, Promote, Start, Suspend, Wish
from fleetctl.core.reconcile import next_deadline, plan
from fleetctl.models import Agent, AgentState, Exit, FleetSpec, ProcessRef, Replace, WarmPoolSpec

S = AgentState
NOW = 1000.0
SPEC = FleetSpec(name="demo", command=("sleep", "60"), replicas=1, warm_pool=WarmPoolSpec(enabled=True, size=3))
OLD = replace(SPEC, command=("sleep", "61")).process_hash


def agent(slot: int, state: AgentState = S.SUSPENDED, **changes: Any) -> Agent:  # Any: fields of Agent
    live = state in (S.STARTING, S.RUNNING, S.SUSPENDED, S.DRAINING)
    known = {
        "pooled": True,
        "created_at": 100.0 + slot,
        "started_clock": 500.0 + slot,
        "process": ProcessRef(pid=1000 + slot, start_ticks=1, boot_id="b") if live else None,
        "ready": state is S.RUNNING,
        "spec_hash": SPEC.process_hash,
        "stale_deadline": NOW + 60 if state is S.SUSPENDED else None,
        "ready_deadline": NOW + 1 if state is S.STARTING else None,
        "drain_deadline": NOW + 10 if state is S.DRAINING else None,
    }
    return Agent(id=f"demo-{slot}", fleet="demo", slot=slot, state=state, **{**known, **changes})


def replica(slot: int = 0, state: AgentState = S.RUNNING, **changes: Any) -> Agent:  # Any: fields of Agent
    return agent(slot, state, **{"pooled": False, **changes})


def wish(size: int = 3, replicas: int = 1, **changes: Any) -> Wish:  # Any: fields of Wish
    pool = WarmPoolSpec(enabled=True, size=size)
    return Wish(spec=replace(SPEC, replicas=replicas, warm_pool=pool), **changes)


def told(actions: list[Action]) -> list[tuple[object, ...]]:
    """Actions in short: what, whom, and why or whether for the pool."""
    short: list[tuple[object, ...]] = []
    for action in actions:
        match action:
            case Create(slot, pooled):
                short.append(("create", slot, "warm" if pooled else "replica"))
            case Drain(one, leaving, reason):
                short.append(("drain", one.slot, reason if leaving else "returns"))
            case Start(one) | BecomeReady(one) | Kill(one) | Forget(one) | Suspend(one) | Promote(one):
                short.append((type(action).__name__.lower(), one.slot))
    return short


ONE = replica()
FULL = [ONE, agent(1), agent(2), agent(3)]


@pytest.mark.parametrize(
    ("wanted", "agents", "expected"),
    [
        pytest.param(wish(), FULL, [], id="full"),
        pytest.param(wish(), [], [("create", 0, "replica")], id="replicas first"),
        pytest.param(wish(), [replica(0, S.STARTING)], [], id="the pool waits until the replicas are ready"),
        pytest.param(wish(), [replica(0, S.BACKOFF, retry_deadline=NOW + 9)], [("create", 1, "warm")], id="but not for one in backoff"),
        pytest.param(wish(), [ONE], [("create", 1, "warm")], id="one at a look"),
        pytest.param(wish(), [ONE, agent(1, S.STARTING)], [("create", 2, "warm")], id="two may be starting"),
        pytest.param(wish(), [ONE, agent(1, S.STARTING), agent(2, S.STARTING)], [], id="and no more"),
        pytest.param(wish(), [ONE, agent(1, S.STARTING, process=None)], [("start", 1)], id="an intent is made good before a new one"),
        pytest.param(
            wish(), [ONE, *(agent(n, S.STARTING, process=None) for n in (1, 2, 3))], [("start", 1)], id="after a reboot one after the other"
        ),
        pytest.param(wish(), [replica(0, S.STARTING), agent(1, S.STARTING, process=None)], [], id="after a reboot behind the replicas"),
        pytest.param(wish(1), [ONE, agent(1, S.RUNNING)], [("suspend", 1)], id="who is ready is suspended"),
        pytest.param(wish(1), [ONE, agent(1, S.RUNNING, ready=False)], [], id="and nobody else"),
        pytest.param(wish(1), [ONE, agent(1, S.RUNNING, leader_exit=Exit(code=1))], [], id="nor who has ended"),
        pytest.param(wish(1), [ONE, agent(1, S.STARTING, ready_deadline=NOW)], [("becomeready", 1)], id="ready before suspended"),
        pytest.param(wish(1), [ONE, agent(1, S.BACKOFF, retry_deadline=NOW + 1)], [], id="one in backoff keeps its place"),
        pytest.param(wish(1), [ONE, agent(1, S.BACKOFF, retry_deadline=NOW)], [("start", 1)], id="until its time has come"),
        pytest.param(
            wish(3),
            [*FULL[:3], agent(3, stale_deadline=NOW)],
            [("drain", 3, "stale in the warm pool"), ("create", 4, "warm")],
            id="a stale one goes and a new one comes",
        ),
        pytest.param(
            wish(1), [ONE, agent(1, spec_hash=OLD)], [("drain", 1, "the spec changed"), ("create", 2, "warm")], id="an outdated one goes"
        ),
        pytest.param(
            wish(1), [ONE, agent(1, replace=Replace.ROLLING)], [("drain", 1, "restart"), ("create", 2, "warm")], id="a restart retires"
        ),
        pytest.param(
            wish(1),
            [ONE, agent(1, S.BACKOFF, replace=Replace.ROLLING, retry_deadline=NOW + 9)],
            [("forget", 1), ("create", 2, "warm")],
            id="also one without a process",
        ),
        pytest.param(wish(1), [ONE, agent(1, S.DRAINING, leaving=True)], [("create", 2, "warm")], id="one that leaves does not count"),
        pytest.param(
            wish(1), FULL, [("drain", 1, "the warm pool holds 1"), ("drain", 2, "the warm pool holds 1")], id="the oldest surplus goes"
        ),
        pytest.param(
            wish(1),
            [ONE, agent(1), agent(2, S.STARTING)],
            [("drain", 2, "the warm pool holds 1")],
            id="but first who is not suspended yet",
        ),
        pytest.param(wish(0), [ONE, agent(1)], [("drain", 1, "the warm pool holds 0")], id="none at all"),
        pytest.param(
            wish(3, 0),
            [agent(1), agent(2, S.BACKOFF, retry_deadline=NOW + 9)],
            [("forget", 2), ("drain", 1, "the warm pool holds 0")],
            id="none where there are no replicas",
        ),
        pytest.param(
            wish(3, 0, pool_alone=True), [agent(1), agent(2)], [("create", 0, "warm")], id="unless the pool is all there shall be"
        ),
        pytest.param(
            wish(1, 0, pool_alone=True, down=True), [agent(1)], [("drain", 1, "the warm pool holds 0")], id="down is down all the same"
        ),
        pytest.param(
            wish(3, down=True), [ONE, agent(1)], [("drain", 0, "the fleet is taken down"), ("drain", 1, "the warm pool holds 0")], id="down"
        ),
        pytest.param(wish(3, 2), FULL, [("promote", 1)], id="scale up takes the oldest"),
        pytest.param(
            wish(3, 6),
            FULL,
            [*(("promote", n) for n in (1, 2, 3)), ("create", 4, "replica"), ("create", 5, "replica")],
            id="then it starts",
        ),
        pytest.param(
            wish(3, 2),
            [ONE, agent(1, spec_hash=OLD), agent(2, leader_exit=Exit(signal=9)), agent(3, replace=Replace.ROLLING), agent(4, S.RUNNING)],
            [("create", 5, "replica")],
            id="never an outdated, dead, retired or running one",
        ),
        pytest.param(wish(3, 1), [replica(0), replica(4), *FULL[1:]], [("drain", 0, "scaled down to 1")], id="scale down leaves the pool"),
        pytest.param(wish(mode=Mode.HOLD), [ONE, agent(1, stale_deadline=NOW), agent(2, S.RUNNING)], [], id="hold leaves it as it is"),
        pytest.param(wish(mode=Mode.HOLD, down=True), [agent(1)], [("drain", 1, "the warm pool holds 0")], id="hold takes down"),
        pytest.param(
            wish(mode=Mode.STOP), [ONE, agent(1)], [("drain", 0, "returns"), ("drain", 1, "the daemon stops")], id="stop ends it for good"
        ),
    ],
)
def test_plan(wanted: Wish, agents: list[Agent], expected: list[tuple[object, ...]]) -> None:
    assert told(plan(wanted, agents, NOW)) == expected


def test_the_oldest_is_handed_out_first_by_the_start_of_its_process() -> None:
    agents = [agent(1, started_clock=30.0), agent(2, started_clock=10.0), agent(3, started_clock=20.0), replica(4), agent(5, S.STARTING)]
    assert [one.slot for one in warmpool.available(SPEC, agents)] == [2, 3, 1]


@pytest.mark.parametrize(
    ("mode", "agents", "expected"),
    [
        (Mode.RUN, [agent(1, stale_deadline=NOW + 5)], NOW + 5),
        (Mode.RUN, [agent(1, stale_deadline=None)], None),
        (Mode.HOLD, [agent(1, stale_deadline=NOW - 5)], None),
        (Mode.RUN, [agent(1, S.RUNNING, stale_deadline=NOW - 5, pooled=False, resume_owed=True)], None),
    ],
)
def test_next_deadline(mode: Mode, agents: list[Agent], expected: float | None) -> None:
    assert next_deadline(wish(mode=mode), agents) == expected


# -- histories

SETTLE, DRAIN, RETRY, AGE = 0.25, 30.0, 5.0, 7200.0
_MOST_STEPS = 400


class World:
    """Agents as the supervisor would keep them; a process is a number. Orders are carried out at once."""

    def __init__(self) -> None:
        self.wish = wish(3, 2)
        self.agents: dict[str, Agent] = {}
        self.now = NOW
        self.started = 0
        self.handed: list[str] = []

    def act(self) -> int:
        """Ask the rules once and do as they say; how many orders there were."""
        before = list(self.agents.values())
        actions = plan(self.wish, before, self.now)
        named = Counter(action.agent.id for action in actions if not isinstance(action, Create))
        assert not [agent_id for agent_id, number in named.items() if number > 1], f"two orders for one agent: {actions}"
        starting = [one for one in before if not one.pooled and not one.leaving and one.state is S.STARTING]
        fresh = [action for action in actions if isinstance(action, Create) and action.pooled]
        assert not (fresh and (starting or any(isinstance(action, Create) and not action.pooled for action in actions))), (
            "the pool competes"
        )
        assert len(fresh) <= 1, "more than one start at a look"
        for action in actions:
            self.carry_out(action)
        self.check()
        return len(actions)

    def carry_out(self, action: Action) -> None:
        match action:
            case Create(slot, pooled):
                assert slot not in {one.slot for one in self.agents.values()}, "a slot that is taken"
                self._start(Agent(id=f"demo-{self.started}", fleet="demo", slot=slot, created_at=self.now, pooled=pooled))
            case Start(one):
                assert one.process is None, "started twice"
                self._start(one)
            case BecomeReady(one):
                self._put(replace(one, state=move(one.state, Move.BECOME_READY), ready=True, rolled=False))
            case Suspend(one):
                assert one.pooled
                self._put(replace(one, state=move(one.state, Move.SUSPEND), ready=False, stale_deadline=self.now + AGE))
            case Promote(one):
                self.hand_out(one)
            case Drain(one, leaving, _):
                assert not one.leaving, "told to leave twice"
                assert leaving or not one.pooled, "an instance of the pool that would come back"
                drained = replace(one, state=S.DRAINING, leaving=leaving, ready=False, replace=Replace.ROLLING)
                self._put(replace(drained, drain_deadline=self.now + DRAIN, stale_deadline=None))
            case Kill(one):
                self.gone(one)
            case Forget(one):
                assert one.process is None, "forgotten with a live process"
                del self.agents[one.id]

    def hand_out(self, one: Agent) -> None:
        assert one.id not in self.handed, "in two hands"
        waiting = [other for other in self.agents.values() if other.pooled and other.state is S.SUSPENDED and not other.leaving]
        older = [other for other in waiting if (other.started_clock or 0.0) < (one.started_clock or 0.0)]
        assert not [other for other in older if other.spec_hash == one.spec_hash and other.replace is Replace.NO], "not the oldest"
        self.handed.append(one.id)
        self._put(replace(one, state=move(one.state, Move.RESUME), pooled=False, ready=True, stale_deadline=None))

    def acquire(self) -> None:
        """As the supervisor does it: the oldest, beyond the wish."""
        if found := warmpool.available(self.wish.spec, list(self.agents.values()))[:1]:
            self.wish = replace(self.wish, spec=replace(self.wish.spec, replicas=self.wish.replicas + 1))
            self.hand_out(found[0])

    def gone(self, one: Agent) -> None:
        state = S.TERMINATED if one.leaving else S.STARTING
        self._put(replace(one, state=state, process=None, ready=False, ready_deadline=None, drain_deadline=None))

    def crash(self, one: Agent) -> None:
        """As the supervisor takes it: whoever dies in the pool is let go of, others are tried again."""
        if one.state is S.DRAINING:
            self.gone(one)
        elif one.state is S.SUSPENDED:
            self.gone(replace(one, leaving=True))
        elif one.process is not None:
            self._put(replace(one, state=S.BACKOFF, process=None, ready=False, retry_deadline=self.now + RETRY))

    def settle(self) -> None:
        """Until nothing more is to be done within the time that an instance may grow old."""
        end = self.now + AGE / 2
        for _ in range(_MOST_STEPS):
            if self.act():
                continue
            deadline = next_deadline(self.wish, self.agents.values())
            if deadline is None or deadline > end:
                return
            assert deadline > self.now, "woken for nothing"
            self.now = deadline
        raise AssertionError("the rules never come to rest")

    def check(self) -> None:
        staying = [one for one in self.agents.values() if not one.leaving]
        slots = Counter(one.slot for one in staying)
        assert not [slot for slot, number in slots.items() if number > 1], "two agents in one slot"
        replicas = [one for one in staying if not one.pooled]
        assert not [one for one in replicas if one.state is S.SUSPENDED], "a replica that is suspended"
        if self.wish.mode is Mode.RUN:
            assert len(replicas) == self.wish.replicas, "the pool counts as replicas"
        assert len(staying) - len(replicas) <= 20

    def _start(self, one: Agent) -> None:
        self.started += 1
        begun = replace(
            one,
            state=move(one.state, Move.START),
            process=ProcessRef(pid=self.started, start_ticks=1, boot_id="b"),
            started_clock=self.now + self.started / 1e6,
            ready_deadline=self.now + SETTLE,
            spec_hash=self.wish.spec.process_hash,
        )
        self._put(replace(begun, rolled=one.rolled or one.replace is Replace.ROLLING, replace=Replace.NO, retry_deadline=None))

    def _put(self, one: Agent) -> None:
        self.agents[one.id] = one


KINDS = ["scale", "size", "acquire", "down", "up", "change", "restart", "crash", "age", "hold", "run", "stop", "step", "settle"]


def happen(world: World, kind: str, number: int) -> None:
    agents, spec = list(world.agents.values()), world.wish.spec
    match kind:
        case "scale":
            world.wish = replace(world.wish, spec=replace(spec, replicas=number))
        case "size":
            world.wish = replace(world.wish, spec=replace(spec, warm_pool=WarmPoolSpec(enabled=number > 0, size=number)))
        case "acquire" if world.wish.mode is Mode.RUN and not world.wish.down:
            world.acquire()
        case "down" | "up":
            world.wish = replace(world.wish, down=kind == "down")
        case "change":
            world.wish = replace(world.wish, spec=replace(spec, environment={"V": str(number)}))
        case "restart":
            for one in agents:
                if not one.leaving and one.state is not S.DRAINING:
                    world.agents[one.id] = replace(one, replace=Replace.AT_ONCE if number % 2 else Replace.ROLLING)
        case "crash" if agents:
            world.crash(agents[number % len(agents)])
        case "age":
            # The rules are always asked in time, so only the ages of instances may be jumped over.
            others = [one for one in agents if one.state is not S.SUSPENDED]
            due = next_deadline(world.wish, others)
            later = world.now + AGE * number / 9
            world.now = later if due is None else max(world.now, min(later, due - 0.01))
        case "hold" | "run" | "stop":
            world.wish = replace(world.wish, mode=Mode(kind))
        case "step":
            world.act()
        case "settle":
            world.settle()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), max_size=40))
def test_any_history_keeps_the_promises_and_comes_to_rest_as_wished(history: list[tuple[str, int]]) -> None:
    world = World()
    for kind, number in history:
        happen(world, kind, number)
    world.wish = replace(world.wish, mode=Mode.RUN)
    world.settle()
    pool = [one for one in world.agents.values() if one.pooled]
    assert len(world.agents) - len(pool) == world.wish.replicas
    assert len(pool) == warmpool.wished_size(world.wish)
    assert {one.state for one in pool} <= {S.SUSPENDED}
    assert {one.spec_hash for one in pool} <= {world.wish.spec.process_hash}
    assert not [one for one in pool if one.stale_deadline is None or one.stale_deadline <= world.now]
    assert world.act() == 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_a_new_size_of_the_pool_touches_no_replica(sizes: list[int]) -> None:
    world = World()
    world.settle()
    before = {one.id: one.process for one in world.agents.values() if not one.pooled}
    for size in sizes:
        happen(world, "size", size)
        world.settle()
    assert {one.id: one.process for one in world.agents.values() if not one.pooled} == before
