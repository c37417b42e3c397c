"""The loop of one fleet: an event comes in, the rules are asked, their orders are carried out, and it sleeps until the next deadline.

It is the only writer of the fleet's table of agents, so there are no locks. Others change the wish, or post what happened; both only
wake it. Every change is on disk before it is published, and an agent is on disk before its process exists.
"""

import asyncio
import logging
import random
import secrets
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, assert_never

from fleetctl.core import restarts, warmpool
from fleetctl.core.contract import Message
from fleetctl.core.lifecycle import Move, move
from fleetctl.core.orders import Action, BecomeReady, Create, Drain, Fail, Forget, Kill, Mode, Promote, Start, Suspend, Wish, free_slots
from fleetctl.core.reconcile import NOT_YET, next_deadline, plan
from fleetctl.errors import DrainTimeout, FleetctlError, NotFound, SpawnFailed, StateDirectoryError
from fleetctl.keeping import Keeping, new_id
from fleetctl.models import Agent, AgentState, Checkpoint, Event, Exit, OnTimeout, ProbeOutcome, ProcessRef, Replace, Saved, Saving, replace
from fleetctl.ports import CheckpointStore, Clock, LifecycleManager, StateManager

log = logging.getLogger(__name__)
T = TypeVar("T")

_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
_SPAWNS_IN_A_ROW = 8
_TROUBLE_RETRY_SECONDS = 1.0
_KILL_AGAIN_SECONDS = 1.0
_MOMENT_SECONDS = 0.02
_LEFTOVER_SECONDS = 5.0
_NAMED_SURVIVORS = 5
_MOST_EXTENSION_SECONDS = 3600.0
_NOT_READY_YET_SECONDS = 2.0
_HUNG_SECONDS = 5.0  # for one that does not answer: enough to act on the signal, if it does that at all


@dataclass(frozen=True, slots=True)
class _Acquisition:
    """Somebody who wants one more agent, and shall be told which; `cold`: a new one will do; `restore`: only one that begins from this."""

    claim: Mapping[str, object]
    cold: bool
    restore: Checkpoint | None
    answer: "asyncio.Future[Agent | None]"


class Supervisor:
    """Keeps one fleet as wished. Create it in a running event loop, then `run` it as a task."""

    def __init__(
        self,
        wish: Wish,
        *,
        lifecycle: LifecycleManager,
        state: StateManager,
        clock: Clock,
        checkpoints: CheckpointStore | None = None,
        agents: Iterable[Agent] = (),
        on_change: Callable[[], None] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
        last_output: Callable[[Agent], Sequence[str]] = lambda agent: (),
        idle: Callable[[], Collection[str]] = lambda: (),
        random_source: random.Random | None = None,
    ) -> None:
        self.wish = wish
        self.published: tuple[Agent, ...] = ()
        self.trouble: str | None = None
        self._lifecycle, self._state, self._clock = lifecycle, state, clock
        self._on_change, self._on_event, self._last_output, self._idle = on_change, on_event, last_output, idle
        self._random = random_source or random.Random()
        self._agents = {agent.id: agent for agent in agents}
        self._dirty: set[str] = set(self._agents)
        self._forgotten: set[str] = set()
        self._discarding: list[Agent] = []  # forgotten, and to be tidied up after once that is on disk
        self._events: list[Event] = []
        self._untold: list[Event] = []  # on disk, and told when the table is published: nobody waits for that
        self._unsaved: list[asyncio.Future[None]] = []  # who waits for the next write
        self._inbox: deque[Callable[[], None]] = deque()
        self._wanted: deque[_Acquisition] = deque()  # nobody has looked at these yet
        self._acquiring: dict[str, _Acquisition] = {}  # by the instance that is on its way to whoever asked
        self._claims: dict[str, Mapping[str, object]] = {}  # by the agent that is to find it when it starts
        # Handed out by a daemon that died before it knew that they go on: the claim that may be there is the right one.
        self._claimed_before = {agent.id for agent in self._agents.values() if agent.resume_owed}
        self._suspending: set[str] = set()
        # When each has to have said WATCHDOG=1 again. Not on disk: who comes back gets its whole time anew.
        self._watchdogs: dict[str, float] = {}
        # Asked to stop before they said READY=1: they may have no handler for the signal yet, and get this long to have one.
        self._not_yet: dict[str, float] = {}
        self._passed: dict[str, ProcessRef] = {}  # the probe of this process of the agent has passed
        self._tasks: set[asyncio.Task[Collection[str]]] = set()
        self.warm_hits = 0
        self._keeping = Keeping(checkpoints, lifecycle, clock)
        self._parting: set[str] = set()  # gone for good, but for what they kept
        self._filling: set[str] = set()  # to be started once they have what they are restored from
        self._filled: set[str] = set()
        self._hurried: set[str] = set()  # shall go now, with or without a checkpoint
        # Agents whose leader has ended, until nothing of their trees is left.
        self._ending = {agent.id for agent in self._agents.values() if _leaderless(agent)}
        self._wake = asyncio.Event()
        self._publish()

    @property
    def empty(self) -> bool:
        """Whether nothing of the fleet is left: no process, no record."""
        return not self._agents and not self._forgotten

    @property
    def stopped(self) -> bool:
        """Whether no agent of the fleet has a process, and that is on disk."""
        return not self._dirty and not any(agent.process or agent.state is AgentState.DRAINING for agent in self._agents.values())

    def set_wish(self, wish: Wish) -> None:
        self.wish = wish
        self._post(self._hurry if wish.down_now else lambda: None)

    def replace_processes(self, agent_ids: Iterable[str], how: Replace) -> None:
        """Have these agents' processes replaced by new ones; the agents stay who they are."""
        ids = list(agent_ids)
        self._post(lambda: self._mark_for_replacement(ids, how))

    def protect(self, agent_id: str, *, on: bool) -> None:
        """Spare this agent where the fleet shrinks, or no longer."""
        self._post(lambda: self._protect(agent_id, on=on))

    @property
    def protected(self) -> int:
        """How many agents a fleet that shrinks has to spare, as of this moment."""
        return sum(agent.protected and not agent.leaving and not agent.pooled for agent in self._agents.values())

    async def wait_saved(self) -> None:
        """Return once all that was asked for so far is on disk. Raises StateDirectoryError where it cannot be written now."""
        saved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._unsaved.append(saved))
        await saved

    def acquire(self, claim: Mapping[str, object], *, cold: bool) -> "asyncio.Future[Agent | None]":
        """One agent beyond the wish: the oldest warm instance, once it goes on; else, with `cold`, a new one at once, not ready yet.

        The agent is told the claim. None where the pool has none and it may not be cold. Raises FleetctlError where the fleet can
        have no more, StateDirectoryError where the disk is full. The wish grows by the agent, which remembers that until the caller
        has had the wish saved, and says so with `wish_saved`. Until the answer nobody else may change the number of replicas.
        """
        return self._want(_Acquisition(claim, cold, None, asyncio.get_running_loop().create_future()))

    def restore(self, checkpoint: Checkpoint) -> "asyncio.Future[Agent | None]":
        """The same, for a new agent that goes on from what is in the checkpoint."""
        return self._want(_Acquisition({}, True, checkpoint, asyncio.get_running_loop().create_future()))

    def _want(self, wanted: _Acquisition) -> "asyncio.Future[Agent | None]":
        self._wanted.append(wanted)
        self._wake.set()
        return wanted.answer

    def drain(self, agent_id: str, *, now: bool) -> "asyncio.Future[Agent]":
        """Have this very agent leave for good, and the wish shrink by it; `now`: without a checkpoint, and without time to finish.

        Like those who acquire, the caller has the smaller wish saved and says so; the agent remembers it until then. Raises NotFound.
        """
        answer: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._drain_one(agent_id, answer, now=now))
        return answer

    async def checkpoint(self, agent: Agent, reason: str) -> Saved:
        """Save what an agent keeps while it goes on. Raises FleetctlError, OSError."""
        checkpoint_id = new_id(self._clock.time(), self._random)
        saved = await self._keeping.take(agent, self.wish.spec, checkpoint_id=checkpoint_id, reason=reason, ask=agent.ready)
        self._post(lambda: self._tell_saved(agent, saved))
        return saved

    @property
    def unsaved(self) -> Mapping[str, str]:
        """Why agents wait for their checkpoint before they stop, or leave, by id."""
        problems = self._keeping.problems
        return {agent.id: problems[agent.id] for agent in self._waiting_for_their_keep() if agent.id in problems}

    def wish_saved(self, replicas: int) -> None:
        """A wish for so many is on disk."""
        self._post(lambda: self._forget_owed_wishes(replicas))

    def woken(self, agent_ids: Collection[str]) -> None:
        """These suspended agents were found running: a stranger continued them."""
        self._post(lambda: self._retire_woken(agent_ids))

    def process_of(self, agent_id: str) -> ProcessRef | None:
        """The agent's process as of this moment, which need not be on disk and published yet."""
        agent = self._agents.get(agent_id)
        return agent.process if agent is not None and not agent.leader_exit else None

    def notified(self, agent_id: str, message: Message) -> None:
        """An agent said something of itself on its notify socket. What is no news wakes nobody: agents may say it fifty times a second."""
        agent = self._agents.get(agent_id)
        if agent is None:
            return
        if message.watchdog == "ping":
            self._rearm_watchdog(agent)
        if _is_news(agent, message):
            self._post(lambda: self._heed(agent_id, message))

    def probed(self, agent_id: str, process: ProcessRef, outcome: ProbeOutcome, reason: str = "") -> None:
        """What the probes of this very process amount to."""
        self._post(lambda: self._judge_probes(agent_id, process, outcome, reason))

    def exceeded(self, agent_id: str, process: ProcessRef, reason: str) -> None:
        """This very process uses more than it may, and nothing but stopping it holds it back."""
        self._post(lambda: self._end_failing(agent_id, process, reason))

    def hangs(self, agent_id: str, process: ProcessRef, reason: str) -> None:
        """This very process gets no further with its work."""
        self._post(lambda: self._end_failing(agent_id, process, reason, hangs=True))

    async def run(self) -> None:
        """Until cancelled. Cancelling touches no agent."""
        for agent in list(self._agents.values()):
            self._watch(agent)
            self._rearm_watchdog(agent)
        try:
            await self._run()
        finally:
            self._keeping.close()
            for task in self._tasks:
                task.cancel()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            pause = None
            try:
                await self._settle()
                if self.trouble is not None:
                    self.trouble = None
                    self._on_change()
            except (StateDirectoryError, OSError) as error:
                # A full disk, or no descriptor left to look at a process with, stops no running agent: it is tried again until it heals.
                if self.trouble is None:
                    log.error("%s: %s", self.wish.spec.name, error)
                self.trouble = str(error)
                self._refuse_acquisitions(error)
                pause = _TROUBLE_RETRY_SECONDS
            self._publish()
            await self._sleep(pause)

    async def _sleep(self, pause: float | None) -> None:
        deadlines = [
            next_deadline(self.wish, self._agents.values()),
            *self._watchdogs.values(),
            *self._not_yet.values(),
            *self._keep_deadlines(),
        ]
        deadline = min((at for at in deadlines if at is not None), default=None)
        if pause is None and deadline is None:
            await self._wake.wait()
            return
        due = max(0.0, deadline - self._clock.monotonic()) if deadline is not None else float("inf")
        timer = asyncio.get_running_loop().call_later(min(due, 86400.0) if pause is None else pause, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    async def _settle(self) -> None:
        """Carry out orders until the rules have no more, or only such as wait for the outside."""
        while True:
            self._take_in()
            if self._wanted or self._acquiring:
                await self._hand_out()
                continue
            # What agents say of their work wakes nobody: it is asked for when it may matter who goes.
            idle = self._idle() if len(self._agents) > self.wish.replicas else ()
            planned = plan(self.wish, list(self._agents.values()), self._clock.monotonic(), idle=idle)
            actions = [action for action in planned if not self._is_under_way(action)]
            if not (actions or self._inbox or self._owed_a_stop() or self._owed_a_resume() or self._owed_their_keep()):
                await self._flush()
                return
            await self._carry_out(actions)
            if not self._dirty:
                self._publish()

    def _is_under_way(self, action: Action) -> bool:
        """Whether it happens beside the loop already, or waits for what does."""
        match action:
            case Suspend(agent):
                return agent.id in self._suspending
            case Start(agent):
                return agent.id in self._filling
            case Forget(agent):  # one that was drained is what tells that the fleet shrank, until the stored wish does
                return agent.id in self._parting or agent.wish_shrunk is not None
            case _:
                return False

    async def _hand_out(self) -> None:
        """Serve who waits for an instance, before anything else; may be asked between any two steps that take time."""
        while self._wanted:
            self._acquire(self._wanted.popleft())
        if self._acquiring:
            await self._save_and_resume(self._owed_a_resume())

    def _owed_a_stop(self) -> list[Agent]:
        """One that is being suspended has to wait: a stop behind our CONT would leave it stopped. So does one that is to be saved."""
        return [
            agent
            for agent in self._agents.values()
            if agent.state is AgentState.DRAINING
            and not agent.stop_sent
            and agent.saving is Saving.NO
            and agent.id not in self._suspending
            and (agent.id not in self._not_yet or agent.leader_exit is not None)
        ]

    def _waiting_for_their_keep(self) -> list[Agent]:
        """Whose state has to be saved, taken away or given before they go on."""
        waiting = [*self._parting, *self._filling]
        waiting += [agent.id for agent in self._agents.values() if agent.saving is not Saving.NO and agent.state is AgentState.DRAINING]
        return [self._agents[agent_id] for agent_id in dict.fromkeys(waiting)]

    def _owed_their_keep(self) -> list[Agent]:
        return [agent for agent in self._waiting_for_their_keep() if self._keeping.due(agent.id) and agent.id not in self._suspending]

    def _keep_deadlines(self) -> list[float]:
        retries = (self._keeping.retry_at(agent.id) for agent in self._waiting_for_their_keep())
        return [at for at in retries if at is not None]

    def _owed_a_resume(self) -> list[Agent]:
        return [
            agent for agent in self._agents.values() if agent.resume_owed and agent.state is AgentState.RUNNING and not agent.leader_exit
        ]

    def _take_in(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._collect_ended()
        self._miss_the_dead()
        self._miss_the_silent()
        now = self._clock.monotonic()
        self._not_yet = {agent_id: at for agent_id, at in self._not_yet.items() if at > now and agent_id in self._agents}

    async def _carry_out(self, actions: Sequence[Action]) -> None:
        starting: list[Agent] = []
        killing: list[Agent] = []
        suspending: list[Agent] = []
        for action in actions:
            match action:
                case Create(slot, pooled):
                    starting.append(self._created(slot, pooled))
                case Start(agent) if agent.restore and agent.id not in self._filled:
                    self._about_to_fill(agent)
                case Start(agent):
                    starting.append(agent)
                case BecomeReady(agent):
                    self._become_ready(agent)
                case Suspend(agent):
                    suspending.append(agent)
                case Promote(agent):
                    self._promote(agent)
                case Drain(agent, leaving, reason):
                    self._drain(agent, leaving, reason)
                case Fail(agent, reason):
                    self._fail(agent, reason)
                case Kill(agent):
                    killing += self._out_of_time(agent)
                case Forget(agent):
                    self._part(agent)
                case _:
                    assert_never(action)
        starting = [self._about_to_start(agent) for agent in starting]
        await self._save_and_resume(self._owed_a_resume())
        stopping = self._owed_a_stop()
        self._stop(stopping)
        if killing:
            self._lifecycle.kill(killing)
        for number, agent in enumerate(starting, 1):
            await self._hand_out()
            self._spawn(self._agents.get(agent.id, agent))
            if number % _SPAWNS_IN_A_ROW == 0:
                await asyncio.sleep(0)
        await self._hand_out()
        self._suspend(suspending)
        self._begin_keeping()
        if stopping and not starting:
            await self._see_off({agent.id for agent in stopping})
        else:
            await self._flush()

    async def _see_off(self, agent_ids: Collection[str]) -> None:
        """Wait a moment for those that were just asked to stop: most end at once, and then one write tells of both.

        A daemon that dies before asks again, as one that dies between the signal and its record always does.
        """
        wish, until = self.wish, self._clock.monotonic() + _MOMENT_SECONDS
        timer = asyncio.get_running_loop().call_later(_MOMENT_SECONDS, self._wake.set)
        try:
            while self.wish is wish and not (self._wanted or self._acquiring) and any(map(self._is_on_its_way_out, agent_ids)):
                due = next_deadline(self.wish, self._agents.values())
                if self._clock.monotonic() >= min(until, due or until):
                    break
                if not self._inbox:
                    self._wake.clear()
                    await self._wake.wait()
                self._take_in()
        finally:
            timer.cancel()

    def _is_on_its_way_out(self, agent_id: str) -> bool:
        agent = self._agents.get(agent_id)
        return agent is not None and agent.state is AgentState.DRAINING

    def _become_ready(self, agent: Agent) -> None:
        ready = replace(agent, state=move(agent.state, Move.BECOME_READY), ready=True, rolled=False, restore="", note="")
        self._filled.discard(agent.id)
        self._rearm_watchdog(self._put(replace(ready, ready_deadline=None, start_deadline=None)))
        self._tell("agent.ready", f"{agent.id} is ready", agent)

    def _heed(self, agent_id: str, message: Message) -> None:
        """Take in what an agent said of itself. What it says over and over changes nothing on disk."""
        agent = self._agents.get(agent_id)
        if agent is None:
            return
        if message.resume is not None and message.resume != agent.resume_token:  # also the last thing it said: that is what counts
            agent = self._put(replace(agent, resume_token=message.resume))
        if agent.process is None or agent.leader_exit:
            return
        if message.extension and not agent.aware:
            agent = self._put(replace(agent, aware=True))
        if message.checkpoint is not None and self._keeping.told(agent_id) and not agent.pooled:
            self._save_beside(agent)
        if message.blocked is not None:
            agent = self._blocked(agent, message.blocked, message.blocked_until)
        if message.extend_timeout_seconds is not None:
            agent = self._extended(agent, message.extend_timeout_seconds)
        if message.recycle and agent.replace is Replace.NO and not agent.leaving and agent.state is AgentState.RUNNING:
            agent = self._put(replace(agent, replace=Replace.ROLLING))
            self._tell("agent.recycle", f"{agent.id} asks to be replaced", agent)
        if message.ready and not agent.said_ready:
            agent = self._put(replace(agent, said_ready=True))
            self._not_yet.pop(agent_id, None)
            self._consider_ready(agent)
        if message.stopping and agent.ready and agent.state is AgentState.RUNNING:
            agent = self._put(replace(agent, ready=False, note="it says that it is stopping"))
        if message.watchdog == "trigger":
            self._fail(agent, "it triggered its watchdog")

    def _consider_ready(self, agent: Agent) -> None:
        """Ready at the next look, if nothing more is waited for: its word where that is asked for, and its probe where it has one."""
        spec, passed = self.wish.spec.readiness, self._passed.get(agent.id) == agent.process
        if agent.state is AgentState.STARTING and (agent.said_ready or not spec.notify) and (passed or not spec.probed):
            self._put(replace(agent, ready_deadline=self._clock.monotonic(), start_deadline=None))

    def _judge_probes(self, agent_id: str, process: ProcessRef, outcome: ProbeOutcome, reason: str) -> None:
        agent = self._agents.get(agent_id)
        if agent is None or agent.process != process or agent.leader_exit:
            return
        running = agent.state is AgentState.RUNNING and not agent.pooled
        match outcome:
            case ProbeOutcome.READY:
                self._passed[agent_id] = process
                if agent.note.startswith(NOT_YET):
                    agent = self._put(replace(agent, note=""))
                self._consider_ready(agent)
                if running and not agent.ready:
                    self._put(replace(agent, ready=True, note=""))
                    self._tell("agent.ready", f"{agent_id} is ready again", agent)
            case ProbeOutcome.UNREADY:
                if agent.state is AgentState.STARTING:
                    self._put(replace(agent, note=f"{NOT_YET}{reason}"))
                elif running and agent.ready:
                    self._put(replace(agent, ready=False, note=f"not ready: {reason}"))
                    self._tell("agent.unready", f"{agent_id} is not ready: {reason}", agent)
            case ProbeOutcome.FAILED:
                if running:
                    self._fail(agent, f"liveness probe: {reason}")
            case _:
                assert_never(outcome)

    def _blocked(self, agent: Agent, reason: str, until: float | None) -> Agent:
        now = self._clock.time()
        blocked, until = (reason, until) if reason and until is not None and until > now else ("", None)
        if (blocked, until) == (agent.blocked, agent.blocked_until):
            return agent
        if blocked and not agent.blocked:
            self._tell("agent.blocked", f"{agent.id} cannot work for {(until or now) - now:.0f} s: {reason}", agent)
        return self._put(replace(agent, blocked=blocked, blocked_until=until))

    def _extended(self, agent: Agent, seconds: float) -> Agent:
        """More time to start or to finish, as sd_notify(3) has it: from now on, and never less than it has; an hour in all at most."""
        now, spec = self._clock.monotonic(), self.wish.spec
        if agent.state is AgentState.STARTING and agent.start_deadline is not None and agent.started_clock is not None:
            longest = agent.started_clock + spec.readiness.start_timeout_seconds + _MOST_EXTENSION_SECONDS
            return self._put(replace(agent, start_deadline=max(agent.start_deadline, min(now + seconds, longest))))
        draining = agent.state is AgentState.DRAINING and not self.wish.down_now
        if draining and agent.drain_deadline is not None and agent.draining_since is not None:
            longest = agent.draining_since + spec.graceful_drain.timeout_seconds + _MOST_EXTENSION_SECONDS
            return self._put(replace(agent, drain_deadline=max(agent.drain_deadline, min(now + seconds, longest))))
        return agent

    def _rearm_watchdog(self, agent: Agent) -> None:
        """Only one that runs can be late: the time of a suspended one stands still."""
        seconds = self.wish.spec.watchdog_seconds
        if seconds is not None and agent.ready and agent.state is AgentState.RUNNING and agent.process is not None:
            self._watchdogs[agent.id] = self._clock.monotonic() + seconds

    def _miss_the_silent(self) -> None:
        now, seconds = self._clock.monotonic(), self.wish.spec.watchdog_seconds
        for agent_id, deadline in list(self._watchdogs.items()):
            agent = self._agents.get(agent_id)
            if seconds is None or agent is None or agent.state is not AgentState.RUNNING or agent.leader_exit:
                del self._watchdogs[agent_id]
            elif deadline <= now and agent_id not in self._suspending:
                del self._watchdogs[agent_id]
                self._fail(agent, f"no WATCHDOG=1 for {seconds:g} s", hangs=True)

    def _end_failing(self, agent_id: str, process: ProcessRef, reason: str, *, hangs: bool = False) -> None:
        agent = self._agents.get(agent_id)
        if agent is not None and agent.process == process:
            self._fail(agent, reason, hangs=hangs)

    def _fail(self, agent: Agent, reason: str, *, hangs: bool = False) -> None:
        """Stop an agent that lives but does not work; when it is gone, that is judged like an exit that failed.

        One that `hangs` has little time for it, though it may ask for more: it will hardly finish what it did not get on with.
        """
        if agent.state not in (AgentState.STARTING, AgentState.RUNNING) or agent.process is None or agent.leader_exit:
            return
        self._tell("agent.failing", f"{agent.id} does not work and is stopped: {reason}", agent)
        stopping = replace(self._stopping(agent, reason, leaving=agent.leaving, replaced=agent.replace), failing=reason)
        if hangs and stopping.drain_deadline is not None:
            stopping = replace(stopping, drain_deadline=min(stopping.drain_deadline, self._clock.monotonic() + _HUNG_SECONDS))
        self._put(stopping)

    def _suspend(self, agents: Sequence[Agent]) -> None:
        """Takes its time, so it happens beside the loop; what comes of it is an event like every other."""
        if not agents:
            return
        self._suspending.update(agent.id for agent in agents)
        task = asyncio.ensure_future(self._lifecycle.suspend(agents))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._post(lambda: self._suspended(agents, done)))

    def _suspended(self, agents: Sequence[Agent], done: "asyncio.Task[Collection[str]]") -> None:
        self._tasks.discard(done)
        # Without a descriptor left nothing can be signalled, and so nothing be suspended.
        stopped = () if isinstance(done.exception(), OSError) else done.result()
        interval = self.wish.spec.warm_pool.refresh_interval_seconds
        for before in agents:
            self._suspending.discard(before.id)
            agent = self._agents.get(before.id)
            if agent is None or agent.process != before.process or agent.state is not AgentState.RUNNING or agent.leader_exit:
                continue
            if agent.id not in stopped:
                self._drain(agent, leaving=True, reason="it could not be suspended")
                continue
            # Jitter, so that a pool filled at once is not renewed at once.
            age = interval * (1.9 + 0.2 * self._random.random())
            stale = (agent.started_clock or self._clock.monotonic()) + age
            self._put(replace(agent, state=move(agent.state, Move.SUSPEND), ready=False, stale_deadline=stale))
            self._tell("agent.suspended", f"{agent.id} waits in the warm pool", agent)

    def _promote(self, agent: Agent, *, wish_owed: int = 0) -> None:
        promoted = replace(agent, pooled=False, ready=True, from_warm_pool=True, resume_owed=True, note="")
        self._put(replace(promoted, wish_owed=wish_owed, claimed=wish_owed > 0, state=move(agent.state, Move.RESUME)))

    def _take_back(self, agent: Agent) -> None:
        """It was not told to go on yet, and goes on waiting in the pool."""
        returned = replace(agent, pooled=True, ready=False, from_warm_pool=False, resume_owed=False)
        self._put(replace(returned, wish_owed=0, claimed=False, state=move(agent.state, Move.SUSPEND)))

    async def _save_and_resume(self, agents: Sequence[Agent]) -> None:
        """Write the claims of agents that leave the warm pool, have every change on disk, and only then let them go on."""
        for agent in agents:
            claim = self._acquiring[agent.id].claim if agent.id in self._acquiring else {}
            self._claim(agent, claim, keep=agent.id in self._claimed_before)
        await self._flush()
        if agents:
            await self._resume(agents)

    async def _resume(self, agents: Sequence[Agent]) -> None:
        resumed = await self._lifecycle.resume(agents)
        for agent in agents:
            taken = self._put(replace(agent, resume_owed=False, stale_deadline=None))
            self._rearm_watchdog(taken)
            if agent.id in resumed:
                self.warm_hits += 1
                self._tell("agent.resumed", f"{agent.id} left the warm pool", taken)
            else:
                self._drain(taken, leaving=True, reason="it could not be resumed")
        self._publish()
        for agent in agents:
            if agent.id in resumed and (wanted := self._acquiring.pop(agent.id, None)) and not wanted.answer.done():
                wanted.answer.set_result(self._agents[agent.id])
        self._miss_the_dead()
        await asyncio.sleep(0)  # whoever waits for one hears of it before anything is started

    def _claim(self, agent: Agent, claim: Mapping[str, object], *, keep: bool = False) -> None:
        identity = {"schema": "fleetctl/claim/v1", "agent_id": agent.id, "fleet": agent.fleet, "slot": agent.slot}
        self._lifecycle.claim(agent, {"environment": {}, "tools": list(self.wish.spec.tools), **claim, **identity}, keep=keep)

    def _acquire(self, wanted: _Acquisition) -> None:
        if wanted.answer.done():  # whoever asked has gone
            return
        wish = self.wish
        if wish.down or not wish.starts:
            reason = "is being taken down" if wish.down else f"is paused: {wish.paused}" if wish.paused else "starts nothing now"
            wanted.answer.set_exception(FleetctlError(f"fleet {wish.spec.name} {reason}, so nothing of it can be acquired"))
            return
        agents = list(self._agents.values())
        oldest = [] if wanted.restore else warmpool.available(wish.spec, agents, aware=self._must_read(wanted.claim))[:1]
        if not oldest and not wanted.cold:
            wanted.answer.set_result(None)
            return
        size = wish.replicas + 1
        self.wish = replace(wish, spec=replace(wish.spec, replicas=size))
        for one in agents:  # the newest number is the right one
            if one.wish_shrunk is not None:
                self._put(replace(one, wish_shrunk=size))
        if oldest:
            self._acquiring[oldest[0].id] = wanted
            self._promote(oldest[0], wish_owed=size)
            return
        (slot,) = free_slots(agents, 1)
        agent = self._put(replace(self._created(slot, pooled=False), wish_owed=size, claimed=wanted.restore is None))
        if wanted.restore is not None:
            origin = f"{wanted.restore.agent_id}/{wanted.restore.id}"
            agent = self._put(replace(agent, restore=origin, resume_token=wanted.restore.resume_token))
        else:
            self._claims[agent.id] = wanted.claim
        wanted.answer.set_result(agent)

    def _must_read(self, claim: Mapping[str, object]) -> bool:
        """A running process learns of further variables only from its claim, which one that does not know fleetctl never reads."""
        spec, asked = self.wish.spec, claim.get("environment")
        beyond = isinstance(asked, Mapping) and not asked.items() <= spec.environment.items()
        return beyond and not spec.warm_pool.reads_claim

    def _shrink_wish(self) -> None:
        self.wish = replace(self.wish, spec=replace(self.wish.spec, replicas=max(0, self.wish.spec.replicas - 1)))

    def _miss_the_dead(self) -> None:
        """An instance that ended on its way to whoever acquired it: it goes, and the next one is looked for."""
        if not self._acquiring:
            return
        owed = {agent.id for agent in self._owed_a_resume()}
        for agent_id in [agent_id for agent_id in self._acquiring if agent_id not in owed]:
            wanted, agent = self._acquiring.pop(agent_id), self._agents.get(agent_id)
            self._shrink_wish()
            if agent is not None and agent.process is None:
                self._part(agent)
            elif agent is not None:
                self._put(replace(agent, leaving=True, wish_owed=0))
            self._wanted.append(wanted)

    def _refuse_acquisitions(self, error: Exception) -> None:
        """Nothing is handed out that could not be remembered."""
        for agent in self._owed_a_resume():
            wanted = self._acquiring.pop(agent.id, None)
            if wanted is None:
                continue
            self._shrink_wish()
            self._take_back(agent)
            if not wanted.answer.done():
                wanted.answer.set_exception(StateDirectoryError(str(error)))

    def _forget_owed_wishes(self, replicas: int) -> None:
        for agent in list(self._agents.values()):
            if 0 < agent.wish_owed <= replicas:
                agent = self._put(replace(agent, wish_owed=0))
            if agent.wish_shrunk is not None and (replicas <= agent.wish_shrunk or replicas == sys.maxsize):
                self._put(replace(agent, wish_shrunk=None))

    def _retire_woken(self, agent_ids: Collection[str]) -> None:
        for agent_id in agent_ids:
            agent = self._agents.get(agent_id)
            if agent is not None and agent.state is AgentState.SUSPENDED and agent.pooled:
                self._tell("agent.woken", f"{agent_id} was continued by somebody else and is replaced", agent)
                self._drain(agent, leaving=True, reason="it was continued by somebody else")

    def _created(self, slot: int, pooled: bool) -> Agent:
        while True:
            agent_id = f"{self.wish.spec.name}-{''.join(self._random.choices(_ID_ALPHABET, k=5))}"
            if agent_id not in self._agents and agent_id not in self._forgotten:
                break
        # Into the table at once: the next one must not get the same name.
        return self._put(Agent(id=agent_id, fleet=self.wish.spec.name, slot=slot, created_at=self._clock.time(), pooled=pooled))

    def _about_to_start(self, agent: Agent) -> Agent:
        """The intent, to be on disk before the process exists; its token finds the process should we not live to record it."""
        self._hurried.discard(agent.id)
        return self._put(
            replace(
                agent,
                state=move(agent.state, Move.START),
                token=secrets.token_hex(16),
                spec_hash=self.wish.spec.process_hash,
                replace=Replace.NO,
                rolled=agent.rolled or agent.replace is Replace.ROLLING or agent.spec_hash not in ("", self.wish.spec.process_hash),
                # Counted once however often it is tried: what was not started since its last intent has no time of start.
                restarts=agent.restarts + (agent.started_at is not None),
                started_at=None,
                started_clock=None,
                process=None,
                retry_deadline=None,
                start_deadline=None,
                said_ready=False,
                saving=Saving.NO,
                checkpoint="",
                note="starting",
            )
        )

    def _spawn(self, agent: Agent) -> None:
        try:
            if agent.id in self._claims or not (agent.pooled or agent.claimed):
                self._claim(agent, self._claims.get(agent.id, {}))
            process = self._lifecycle.spawn(agent, self.wish.spec)
        except StateDirectoryError as error:  # its claim could not be written
            self._could_not_start(agent, SpawnFailed(error.message))
            return
        except SpawnFailed as error:
            self._could_not_start(agent, error)
            return
        self._claims.pop(agent.id, None)
        now, spec = self._clock.monotonic(), self.wish.spec.readiness
        awaited = spec.notify or spec.probed
        started = self._put(
            replace(
                agent,
                process=process,
                started_at=self._clock.time(),
                started_clock=now,
                ready_deadline=None if awaited else now + spec.settle_seconds,
                start_deadline=now + spec.start_timeout_seconds if awaited and spec.start_timeout_seconds else None,
                note="",
            )
        )
        self._tell("agent.started", f"{agent.id} started (pid {process.pid})", started)
        self._watch(started)

    def _could_not_start(self, agent: Agent, error: SpawnFailed) -> None:
        """A wrong command counts as a failure like an exit; a machine that is short of something is only waited for."""
        now, spec = self._clock.monotonic(), self.wish.spec.restart
        if error.permanent:
            exit = Exit(at=self._clock.time())
            verdict = restarts.after_exit(spec, agent.failures, exit, uptime_seconds=0.0, now=now, jitter=self._random.random())
            self._apply(agent, replace(verdict, note=error.message), now)
        else:
            failures = (*agent.failures, now)
            delay = max(spec.backoff_seconds, restarts.backoff(spec, len(failures), self._random.random()))
            verdict = restarts.Verdict(state=AgentState.BACKOFF, retry_after_seconds=delay, failures=failures[-8:], note=error.message)
            self._apply(agent, verdict, now)
        self._tell("agent.failed", f"{agent.id}: {error.message}", agent)

    def _watch(self, agent: Agent) -> None:
        if agent.process is not None and not agent.leader_exit:
            process = agent.process
            self._lifecycle.watch(process, lambda exit: self._post(lambda: self._leader_ended(agent.id, process, exit)))

    def _leader_ended(self, agent_id: str, process: ProcessRef, exit: Exit) -> None:
        agent = self._agents.get(agent_id)
        if agent is not None and agent.process == process and not agent.leader_exit:
            self._put(replace(agent, leader_exit=exit, ready=False))
            self._ending.add(agent_id)

    def _collect_ended(self) -> None:
        """Judge agents whose leader has ended once nothing of their trees is left; end what is left first."""
        ending = [self._agents[agent_id] for agent_id in sorted(self._ending) if agent_id in self._agents]
        if not ending:
            return
        survivors = self._lifecycle.survivors(ending)
        gone = [agent for agent in ending if not survivors[agent.id]]
        for agent in gone:  # all of them first: what is written down of each takes longer
            if agent.process is not None:
                self._lifecycle.release(agent.process)
        for agent in gone:
            self._ending.discard(agent.id)
            self._gone(agent)
        for agent in ending:
            left = survivors[agent.id]
            if not left:
                continue
            for process in left:
                self._lifecycle.watch(process, lambda _, process=process: self._post(lambda: self._lifecycle.release(process)))  # type: ignore[misc]  # the default binds it
            if agent.state is not AgentState.DRAINING or agent.saving is not Saving.NO:
                deadline = self._clock.monotonic() + min(_LEFTOVER_SECONDS, self.wish.spec.graceful_drain.timeout_seconds)
                stopping = replace(agent, state=move(agent.state, Move.STOP), drain_deadline=deadline, ready_deadline=None)
                agent = replace(stopping, saving=Saving.NO)
            self._put(replace(agent, note=f"{agent.leader_exit or 'ended'}; ending what it left: {_named(left)}"))

    def _stop(self, agents: Sequence[Agent]) -> None:
        """The stop signal, once, and CONT behind it: a stopped process does not act on TERM until it is continued."""
        if agents:
            self._lifecycle.signal(agents, self.wish.spec.drain_signal_number, signal.SIGCONT)
            for agent in agents:
                self._put(replace(self._agents.get(agent.id, agent), stop_sent=True))

    def _gone(self, agent: Agent) -> None:
        """Nothing of the agent's tree is left."""
        now, wall = self._clock.monotonic(), self._clock.time()
        exit = agent.leader_exit or Exit(at=wall)
        if agent.failing:
            exit = replace(exit, failing=agent.failing)
        asked = agent.state is AgentState.DRAINING and agent.stop_sent and (agent.leaving or agent.replace is not Replace.NO)
        uptime = now - agent.started_clock if agent.started_clock is not None else 0.0
        gone = replace(
            agent,
            process=None,
            leader_exit=None,
            last_exit=exit,
            ready=False,
            ready_deadline=None,
            start_deadline=None,
            drain_deadline=None,
            draining_since=None,
            stale_deadline=None,
            resume_owed=False,
            stop_sent=False,
            saving=Saving.NO,
            failing="",
        )
        self._keeping.calm(agent.id)
        if agent.leaving or (agent.pooled and agent.stale_deadline is not None):
            # What dies in the pool did nothing wrong and was nobody: a fresh one takes its place.
            self._put(replace(gone, leaving=True, state=move(agent.state, Move.FINISH)))
            self._tell("agent.stopped", f"{agent.id} stopped ({exit})", agent)
        elif asked and (self.wish.mode is Mode.STOP or self.wish.paused):
            # Marked for replacement it is started by the next daemon, or when the pause is over, as what it was.
            stopped = replace(gone, state=move(agent.state, Move.FINISH), replace=Replace.ROLLING, started_at=None, failures=())
            ending = self.wish.mode is Mode.STOP
            self._put(replace(stopped, note="stopped with the daemon; it comes back with the next" if ending else "paused"))
            self._tell("agent.stopped", f"{agent.id} {'stopped with the daemon' if ending else 'is paused'} ({exit})", agent)
        elif asked:
            self._put(replace(gone, state=move(agent.state, Move.START), failures=()))
            self._tell("agent.stopped", f"{agent.id} stopped for its restart ({exit})", agent)
        else:
            verdict = self._judged(agent, exit, uptime, now)
            self._apply(gone, verdict, now)
            self._tell("agent.exited", f"{agent.id}: {exit}", agent)
            if verdict.state is AgentState.FAILED:
                self._tell_failure(agent, verdict.note)

    def _judged(self, agent: Agent, exit: Exit, uptime: float, now: float) -> restarts.Verdict:
        spec = self.wish.spec.restart
        if agent.blocked and agent.blocked_until is not None and (left := agent.blocked_until - self._clock.time()) > 0:
            return restarts.while_blocked(spec, agent.failures, exit, agent.blocked, left)
        jitter = self._random.random()
        return restarts.after_exit(spec, agent.failures, exit, uptime_seconds=uptime, now=now, jitter=jitter)

    def _apply(self, agent: Agent, verdict: restarts.Verdict, now: float) -> None:
        moves = {AgentState.BACKOFF: Move.RETRY_LATER, AgentState.FAILED: Move.GIVE_UP, AgentState.TERMINATED: Move.FINISH}
        retry = None if verdict.retry_after_seconds is None else now + verdict.retry_after_seconds
        state = move(agent.state, moves[verdict.state])
        self._put(replace(agent, state=state, failures=verdict.failures, retry_deadline=retry, note=verdict.note))

    def _tell_failure(self, agent: Agent, note: str) -> None:
        lines = list(self._last_output(agent))
        message = f"{agent.id} failed: {note}" + ("; last output: " + " | ".join(lines) if lines else "")
        self._tell("agent.failed", message, agent, last_output=lines)
        if lines:
            current = self._agents[agent.id]
            self._put(replace(current, note=f"{current.note}; last output: {lines[-1]}"))

    def _drain(self, agent: Agent, leaving: bool, reason: str) -> None:
        self._tell("agent.draining", f"{agent.id} is asked to stop: {reason}", agent)
        replaced = agent.replace if leaving or agent.replace is not Replace.NO else Replace.ROLLING
        stopping = self._stopping(agent, reason, leaving=leaving, replaced=replaced)
        hurried = self.wish.down and self.wish.down_now
        if agent.state is AgentState.STARTING and self.wish.spec.readiness.notify and not agent.said_ready and not hurried:
            self._not_yet[agent.id] = self._clock.monotonic() + _NOT_READY_YET_SECONDS
        self._put(stopping if agent.state is AgentState.DRAINING else self._to_be_saved(agent, stopping))

    def _to_be_saved(self, agent: Agent, stopping: Agent) -> Agent:
        """Its time to finish begins when it is asked to, which is when what it keeps has been saved."""
        saving = Saving.NO if self.wish.down and self.wish.down_now else self._keeping.saving_of(agent, self.wish.spec)
        if saving is Saving.NO:
            return stopping
        return replace(stopping, saving=saving, checkpoint=new_id(self._clock.time(), self._random), drain_deadline=None)

    def _stopping(self, agent: Agent, reason: str, *, leaving: bool, replaced: Replace) -> Agent:
        now = self._clock.monotonic()
        deadline = now + (0.0 if self.wish.down_now and self.wish.down else self.wish.spec.graceful_drain.timeout_seconds)
        if agent.state is AgentState.DRAINING:  # on its way already: it only learns that it will not come back, or must hurry
            deadline = min(deadline, agent.drain_deadline or deadline)
            if agent.saving is not Saving.NO:
                return replace(agent, note=reason, leaving=leaving, replace=replaced)
        return replace(
            agent,
            state=move(agent.state, Move.STOP),
            ready=False,
            ready_deadline=None,
            start_deadline=None,
            retry_deadline=None,
            drain_deadline=deadline,
            draining_since=now if agent.draining_since is None else agent.draining_since,
            note=reason,
            leaving=leaving,
            replace=replaced,
        )

    def _out_of_time(self, agent: Agent) -> list[Agent]:
        """Who is to be killed for it: the agent, or nobody where it may take all the time it wants."""
        again = self._clock.monotonic() + _KILL_AGAIN_SECONDS
        hurried = self.wish.down_now or agent.id in self._hurried
        # One that was stopped because it does not work is not trusted to end.
        waits = self.wish.spec.graceful_drain.on_timeout is OnTimeout.WAIT and agent.stop_sent and not hurried and not agent.failing
        if hurried or (agent.id in self._ending and not waits):
            return [self._put(replace(agent, drain_deadline=again))]
        note = f"{DrainTimeout.code} {DrainTimeout().message}; it {'goes on until it ends by itself' if waits else 'is killed'}"
        if agent.note != note:  # told once, killed as often as it takes
            self._tell("drain.timeout", f"{agent.id}: {note}", agent, code=DrainTimeout.code)
        put = self._put(replace(agent, drain_deadline=None if waits else again, note=note))
        return [] if waits else [put]

    def _hurry(self) -> None:
        """No more time for those that are on their way out already."""
        for agent in list(self._agents.values()):
            if agent.state is AgentState.DRAINING or agent.id in self._parting:
                self._hurry_one(agent)

    def _hurry_one(self, agent: Agent) -> None:
        self._keeping.hurry(agent.id)
        self._hurried.add(agent.id)
        self._not_yet.pop(agent.id, None)
        if agent.state is AgentState.DRAINING:
            self._put(replace(agent, saving=Saving.NO, drain_deadline=self._clock.monotonic()))

    def _drain_one(self, agent_id: str, answer: "asyncio.Future[Agent]", *, now: bool) -> None:
        agent = self._agents.get(agent_id)
        if answer.done():  # whoever asked has gone
            return
        if agent is None or agent.pooled:
            answer.set_exception(NotFound(f"fleet {self.wish.spec.name} has no agent {agent_id}"))
            return
        if not agent.leaving:
            if not self.wish.down:
                agent = self._shrink_wish_by(agent)
            if agent.process is None and agent.state is not AgentState.DRAINING:
                agent = self._put(replace(agent, state=move(agent.state, Move.FINISH), leaving=True, note="drained"))
            else:
                self._drain(agent, leaving=True, reason="drained")
        if now:
            self._hurry_one(self._agents[agent_id])
        answer.set_result(self._agents[agent_id])

    def _shrink_wish_by(self, agent: Agent) -> Agent:
        self._shrink_wish()
        size = self.wish.replicas
        for one in list(self._agents.values()):  # the newest number is the right one
            owed, shrunk = (size if one.wish_owed else 0), (size if one.wish_shrunk is not None else None)
            if (owed, shrunk) != (one.wish_owed, one.wish_shrunk):
                self._put(replace(one, wish_owed=owed, wish_shrunk=shrunk))
        return self._put(replace(self._agents[agent.id], wish_owed=0, wish_shrunk=size))

    # -- what agents keep

    def _begin_keeping(self) -> None:
        """Start what is owed to what agents keep. Only once their intent is on disk: nothing is taken away from one that may come back."""
        spec = self.wish.spec
        for agent in self._owed_their_keep():
            if agent.id in self._dirty:
                continue
            if agent.id in self._filling:
                self._beside(agent, self._keeping.fill(agent), self._filled_up)
            elif agent.id in self._parting:
                self._beside(agent, self._keeping.retire(agent, spec, agent.note), self._parted)
            else:
                ask = agent.saving is Saving.ASK and not agent.leader_exit
                taking = self._keeping.take(agent, spec, checkpoint_id=agent.checkpoint, reason=agent.note, ask=ask)
                self._beside(agent, taking, self._saved_before_stop)

    def _beside(self, agent: Agent, work: Coroutine[Any, Any, T], then: Callable[[Agent, T | None], None]) -> None:
        self._keeping.begin(agent.id, work, lambda result: self._post(lambda: then(agent, result)))

    def _save_beside(self, agent: Agent) -> None:
        """It wrote a checkpoint that nobody asked for."""
        reason, checkpoint_id = "told by the agent", new_id(self._clock.time(), self._random)
        taking = self._keeping.take(agent, self.wish.spec, checkpoint_id=checkpoint_id, reason=reason, ask=False)
        self._beside(agent, taking, self._saved_meanwhile)

    def _saved_meanwhile(self, agent: Agent, saved: Saved | None) -> None:
        if saved is None:
            log.warning("%s: its checkpoint was not saved: %s", agent.id, self._keeping.problems.get(agent.id))
            self._keeping.calm(agent.id)
        else:
            self._tell_saved(agent, saved)

    def _saved_before_stop(self, before: Agent, saved: Saved | None) -> None:
        agent = self._agents.get(before.id)
        if saved is not None:
            self._tell_saved(before, saved)
        if agent is None or agent.process != before.process or agent.saving is Saving.NO:
            self._keeping.calm(before.id)
            return  # it ended meanwhile, or had no more time
        if saved is None:
            self._told_of_trouble(before, "it is not stopped without one")
            return
        now = self._clock.monotonic()
        timeout, checkpoint = self.wish.spec.graceful_drain.timeout_seconds, agent.checkpoint if saved.checkpoint else ""
        self._put(replace(agent, saving=Saving.NO, checkpoint=checkpoint, drain_deadline=now + timeout, draining_since=now))

    def _part(self, agent: Agent) -> None:
        """It is gone for good: what it kept is saved for the last time and taken away, then it is forgotten."""
        wanted = self.wish.spec.graceful_drain.checkpoint_before_drain or bool(agent.checkpoint) or agent.pooled or not agent.token
        there = agent.checkpoint or self._keeping.is_busy(agent.id) or self._keeping.keeps_something(agent)
        if not (wanted and there):
            self._forget(agent)
            return
        self._parting.add(agent.id)
        self._filling.discard(agent.id)
        gone = replace(agent, state=move(agent.state, Move.FINISH), leaving=True)
        self._put(replace(gone, checkpoint=agent.checkpoint or new_id(self._clock.time(), self._random)))

    def _parted(self, before: Agent, saved: Saved | None) -> None:
        agent = self._agents.get(before.id)
        if agent is None:
            return
        if saved is None and agent.id not in self._hurried and not self.wish.down_now:
            self._told_of_trouble(agent, "what it kept stays where it is until there is one")
            return
        if saved is None:
            self._tell("checkpoint.failed", f"{agent.id}: no checkpoint of what it kept: {self._keeping.problems.get(agent.id)}", agent)
        elif agent.resume_token != before.resume_token:
            return  # it said so on its way out: once more
        elif saved.checkpoint or saved.problem:
            self._tell_saved(agent, saved)
        self._parting.discard(agent.id)
        self._forget(agent)

    def _about_to_fill(self, agent: Agent) -> None:
        self._filling.add(agent.id)
        self._put(replace(agent, state=move(agent.state, Move.START), retry_deadline=None, note="it is given what its checkpoint has"))

    def _filled_up(self, before: Agent, done: bool | None) -> None:
        self._filling.discard(before.id)
        agent, problem = self._agents.get(before.id), self._keeping.problems.get(before.id, "")
        self._keeping.calm(before.id)
        if agent is None or agent.process is not None or agent.leaving:
            return
        if done:
            self._filled.add(agent.id)
        else:
            self._could_not_start(agent, SpawnFailed(f"it cannot be restored: {problem}"))

    def _tell_saved(self, agent: Agent, saved: Saved) -> None:
        if saved.checkpoint is not None and saved.fresh:
            text = f"{agent.id}: checkpoint {saved.checkpoint.id} ({saved.checkpoint.reason})"
            self._tell("checkpoint.saved", text, agent, checkpoint=saved.checkpoint.id, bytes=saved.checkpoint.size)
        if saved.problem:
            self._tell("checkpoint.incomplete", f"{agent.id}: {saved.problem}", agent)

    def _told_of_trouble(self, agent: Agent, consequence: str) -> None:
        """In memory only: the disk may be the trouble. Once, for it is tried again and again."""
        if self._keeping.is_news(agent.id):
            log.error("%s: no checkpoint can be taken, so %s: %s", agent.id, consequence, self._keeping.problems[agent.id])
            self._on_change()

    def _forget(self, agent: Agent) -> None:
        self._agents.pop(agent.id, None)
        self._dirty.discard(agent.id)
        self._ending.discard(agent.id)
        self._claims.pop(agent.id, None)
        self._passed.pop(agent.id, None)
        self._parting.discard(agent.id)
        self._filling.discard(agent.id)
        self._filled.discard(agent.id)
        self._hurried.discard(agent.id)
        self._keeping.forget(agent.id)
        self._forgotten.add(agent.id)
        self._discarding.append(agent)

    def _mark_for_replacement(self, agent_ids: Sequence[str], how: Replace) -> None:
        for agent_id in agent_ids:
            agent = self._agents.get(agent_id)
            if agent is not None and not agent.leaving and agent.state is not AgentState.DRAINING:
                self._put(replace(agent, replace=how, failures=()))

    def _protect(self, agent_id: str, *, on: bool) -> None:
        agent = self._agents.get(agent_id)
        if agent is not None and not agent.leaving and agent.protected is not on:
            self._put(replace(agent, protected=on))
            self._tell("agent.protected", f"{agent_id} is {'protected' if on else 'protected no longer'}", agent)

    def _put(self, agent: Agent) -> Agent:
        self._agents[agent.id] = agent
        self._dirty.add(agent.id)
        return agent

    def _post(self, note: Callable[[], None]) -> None:
        self._inbox.append(note)
        self._wake.set()

    def _tell(self, kind: str, message: str, agent: Agent, **data: object) -> None:
        self._events.append(Event(at=self._clock.time(), kind=kind, fleet=agent.fleet, agent_id=agent.id, message=message, data=data))

    async def _flush(self) -> None:
        """Have every change so far on disk. Raises StateDirectoryError; what could not be written is tried again next time."""
        if not (self._dirty or self._forgotten or self._events or self._unsaved):
            return
        waiting, self._unsaved = self._unsaved, []
        dirty, forgotten, events = self._dirty, self._forgotten, self._events
        self._dirty, self._forgotten, self._events = set(), set(), []
        try:
            changed = [self._agents[agent_id] for agent_id in dirty if agent_id in self._agents]
            await self._state.save(changed, forget=forgotten, events=events)
        except BaseException as error:
            self._dirty |= dirty
            self._forgotten |= forgotten - self._agents.keys()
            self._events = events + self._events
            for saved in waiting:
                if not saved.done():
                    saved.set_exception(StateDirectoryError(str(error)))
            raise
        self._untold += events
        if waiting and not self._dirty:
            self._publish()  # first: who waited for the disk looks next at what is published
        for saved in waiting:
            if not saved.done():  # whoever waited may have gone
                saved.set_result(None)
        discarding, self._discarding = self._discarding, []
        for agent in discarding:
            self._lifecycle.discard(agent)

    def _publish(self) -> None:
        untold, self._untold = self._untold, []
        for event in untold:
            self._on_event(event)
        table = tuple(sorted(self._agents.values(), key=lambda agent: (agent.slot, agent.created_at)))
        if table != self.published:
            self.published = table
            self._on_change()


def _is_news(agent: Agent, message: Message) -> bool:
    """Whether the message can change anything about the agent."""
    return (
        (message.ready and not agent.said_ready)
        or (message.extension and not agent.aware)
        or message.resume not in (None, agent.resume_token)
        or message.checkpoint is not None
        or (message.blocked is not None and (message.blocked, message.blocked_until) != (agent.blocked, agent.blocked_until))
        or message.extend_timeout_seconds is not None
        or (message.stopping and agent.ready)
        or (message.recycle and agent.replace is Replace.NO)
        or message.watchdog == "trigger"
    )


def _leaderless(agent: Agent) -> bool:
    """Whether the leader has ended, or never was, and others of the tree may still live."""
    return agent.leader_exit is not None or (agent.process is None and agent.state is AgentState.DRAINING)


def _named(processes: Sequence[ProcessRef]) -> str:
    names = ", ".join(f"pid {process.pid}" for process in processes[:_NAMED_SURVIVORS])
    more = len(processes) - _NAMED_SURVIVORS
    return names + (f" and {more} more" if more > 0 else "")
