"""One fleet as a whole: its wish, its supervisor, its decisions about size. What it is told changes the wish, never the world."""

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fleetctl.autoscaler import Autoscaler, decision_of, is_recommending
from fleetctl.budget import Budget
from fleetctl.core import stuck, warmpool
from fleetctl.core.contract import Message, Report, merge
from fleetctl.core.limits import exceeded
from fleetctl.core.orders import Mode, Wish
from fleetctl.core.recover import recover
from fleetctl.errors import FleetctlError, NotFound, StateDirectoryError, TimedOut, UsageError, WarmPoolEmpty
from fleetctl.models import (
    Agent,
    AgentState,
    AutoscalingMode,
    Checkpoint,
    Event,
    FleetSpec,
    Found,
    HostUsage,
    Replace,
    Saved,
    ScalingDecision,
    SpawnResult,
    Usage,
)
from fleetctl.polling import Polling
from fleetctl.ports import CheckpointStore, Clock, LifecycleManager, MetricReader, Prober, StateManager
from fleetctl.probing import Probing
from fleetctl.supervisor import Supervisor

log = logging.getLogger(__name__)

_SAVE_AFTER_SECONDS = 0.1
_DISK_RETRY_SECONDS = 1.0
_REASONS = {
    "up": "asked for by up",
    "down": "the fleet is taken down",
    "manual": "asked for by scale",
    "acquire": "one more was acquired",
    "drain": "one was drained",
    "restore": "one was restored from a checkpoint",
    "autoscaling": "autoscaling begins at min_replicas",
}


class Fleet:
    """Keeps one fleet; `start` runs its supervisor as a task of the running loop."""

    def __init__(
        self,
        wish: Wish,
        *,
        lifecycle_manager: LifecycleManager,
        state_manager: StateManager,
        clock: Clock,
        prober: Prober | None = None,
        metric_reader: MetricReader | None = None,
        checkpoint_store: CheckpointStore | None = None,
        agents: Iterable[Agent] = (),
        spending: Mapping[str, Any] | None = None,
        on_change: Callable[[], None] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
        last_output: Callable[[Agent], Sequence[str]] = lambda agent: (),
    ) -> None:
        self._lifecycle, self._state, self._clock = lifecycle_manager, state_manager, clock
        self._on_event, self._on_change = on_event, on_change
        self._changed = asyncio.Event()
        self.warm_misses = 0
        self._grown: list[ScalingDecision] = []  # by one more or one less, and not on disk yet
        self._saver: asyncio.Task[None] | None = None
        self._reports: dict[str, Report] = {}
        self._watch = stuck.Watch()
        self.budget = Budget(clock, spending)
        wish = replace(wish, paused=self.budget.verdict(wish.spec.budget))
        self._pauses: list[Event] = []  # of pauses and their ends, and not on disk yet
        self._spender: asyncio.Task[None] | None = None
        self._probing: Probing | None = None
        self.supervisor = Supervisor(
            wish,
            lifecycle=lifecycle_manager,
            state=state_manager,
            clock=clock,
            checkpoints=checkpoint_store,
            agents=agents,
            on_change=self._announce,
            on_event=on_event,
            last_output=last_output,
            idle=self._idle,
        )
        if prober is not None:
            self._probing = Probing(prober, clock, self.supervisor.probed)
        self._task: asyncio.Task[None] | None = None
        self.autoscaler = Autoscaler(clock)
        self._polling = Polling(metric_reader, clock) if metric_reader is not None else None
        self._autoscaling: asyncio.Task[None] | None = None
        # A change builds on the wish it finds: one at a time, or the disk and we keep different ones.
        self._changing = asyncio.Lock()
        self._storing = asyncio.Lock()

    @property
    def wish(self) -> Wish:
        return self.supervisor.wish

    @property
    def spec(self) -> FleetSpec:
        return self.wish.spec

    @property
    def agents(self) -> tuple[Agent, ...]:
        """The fleet's agents as last published, by slot."""
        return self.supervisor.published

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self.supervisor.run(), name=f"fleet {self.spec.name}")
        self._autoscaling = asyncio.create_task(self._autoscale(), name=f"autoscaler of {self.spec.name}")
        self._update_probing()
        self._wait_for_work()
        return self._task

    async def close(self) -> None:
        """Stop looking after the agents; touches none of them."""
        tasks = [task for task in (self._task, self._saver, self._spender, self._autoscaling) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._probing is not None:
            await self._probing.close()
        if self._polling is not None:
            await self._polling.close()
        self._lifecycle.on_connection(self.spec, None)
        if self.budget.unsaved and not self.wish.down:
            with suppress(StateDirectoryError):
                await self._store_spending()

    async def apply(self, spec: FleetSpec, *, pool_alone: bool = False, cause: str = "up") -> bool:
        """Make this the fleet's spec; processes it no longer matches are replaced one by one. Whether anything changed.

        `pool_alone`: hold the warm pool also where no replicas are wished for. `cause`: of a change of the size.
        """
        async with self._changing:
            spec = replace(spec, replicas=self.spared(spec.replicas, most=spec.max_replicas))
            changed = spec != self.spec or self.wish.down or pool_alone != self.wish.pool_alone
            if changed:
                await self._set(replace(self.wish, spec=spec, down=False, down_now=False, pool_alone=pool_alone), cause)
        return changed

    async def scale(self, replicas: int | None = None, *, delta: int = 0, cause: str = "manual") -> ScalingDecision | None:
        """Wish for so many agents, or so many more; None where that is the wish already. Raises UsageError outside the bounds."""
        async with self._changing:
            target = replicas if replicas is not None else max(0, self.wish.replicas + delta)
            check_replicas(self.spec, target)
            target = self.spared(target)
            if target == self.wish.replicas and not self.wish.down:
                return None
            return await self._set(replace(self.wish, spec=replace(self.spec, replicas=target), down=False, down_now=False), cause)

    def spared(self, replicas: int, *, most: int | None = None) -> int:
        """What a wish for so many comes to: not fewer than are protected, unless for none. `most`: max_replicas, where that changes too."""
        if not replicas or self.wish.down:
            return replicas
        return max(replicas, min(self.protected_replicas, self.wish.replicas, self.spec.max_replicas if most is None else most))

    @property
    def protected_replicas(self) -> int:
        return self.supervisor.protected

    async def protect(self, agent_id: str, *, on: bool = True) -> bool:
        """Spare this agent where the fleet shrinks, or no longer; whether that is new. Returns once it is on disk.

        Raises NotFound, UsageError for one that is on its way out, StateDirectoryError on a full disk.
        """
        async with self._changing:
            agent = self.find(agent_id)
            if agent.leaving and on:
                raise UsageError(f"{agent_id} is on its way out already")
            self.supervisor.protect(agent_id, on=on)
            await self.supervisor.wait_saved()
        return agent.protected is not on

    async def resize_warm_pool(self, size: int) -> None:
        """Hold so many warm instances; 0 holds none."""
        async with self._changing:
            pool = replace(self.spec.warm_pool, size=size, enabled=size > 0)
            await self._set(replace(self.wish, spec=replace(self.spec, warm_pool=pool)), "warm")

    def observe(self, usage: Mapping[str, Usage], host: HostUsage | None = None) -> None:
        """Take in one measurement of the agents, by their ids; the autoscaler decides by it, where it is on."""
        self._watch_limits(usage)
        self._watch_progress()
        self.budget.keep({agent.id for agent in self.agents} | self._reports.keys())
        self._heed_budget()
        if self.budget.unsaved:
            self._save_spending()
        if self._polling is not None:
            self._polling.update(self.spec)
        if self.spec.autoscaling.enabled:
            polled = self._polling.polled if self._polling is not None else {}
            connected = self.wish.wakes and bool(self.spec.sockets) and self._lifecycle.connected(self.spec)
            self.autoscaler.take(
                self.spec, self.agents, usage, host, self.reports, polled=polled, backlog=self.backlog(), connected=connected
            )
        self._wait_for_work()

    def _wait_for_work(self) -> None:
        """While there are no replicas, have the first connection wake the autoscaler; else agents take them, and nobody else looks."""
        if not self.spec.sockets:
            return
        if not self.wish.wakes or self.wish.replicas:
            self._lifecycle.on_connection(self.spec, None)
        else:
            self._lifecycle.on_connection(self.spec, self._called)

    def _called(self) -> None:
        waiting = self.backlog()
        self.autoscaler.called(1 if waiting is None else waiting)

    def _watch_limits(self, usage: Mapping[str, Usage]) -> None:
        """Have those stopped that use more than they may, where nothing else holds them to it."""
        watched = self._lifecycle.watched_limits(self.spec)
        if not watched:
            return
        for agent in self.agents:
            used = usage.get(agent.id)
            if used is not None and agent.process is not None and (reason := exceeded(self.spec.resource_limits, used, watched)):
                self.supervisor.exceeded(agent.id, agent.process, reason)

    def _watch_progress(self) -> None:
        """Have those replaced that hang on their work."""
        after = self.spec.stuck_after_seconds
        if after is None:
            return
        now, wall = self._clock.monotonic(), self._clock.time()
        self._watch, found = stuck.look(self._watch, self.agents, self.reports, after, now=now, wall=wall)
        for agent in self.agents:
            if agent.id in found and agent.process is not None:
                self.supervisor.hangs(agent.id, agent.process, found[agent.id])

    def _heed_budget(self) -> None:
        """Pause the fleet where its budget is used up, and let it go on where it is not any more."""
        reason, before = self.budget.verdict(self.spec.budget), self.wish.paused
        if reason == before:
            return
        self.supervisor.set_wish(replace(self.wish, paused=reason))
        if bool(reason) is not bool(before):
            name = self.spec.name
            kind, text = ("fleet.paused", f"{name} is paused: {reason}") if reason else ("fleet.resumed", f"{name} goes on")
            told = self.budget.status(self.spec.budget)
            self._pauses.append(Event(at=self._clock.time(), kind=kind, fleet=name, message=text, data=told))
        self._save_spending()
        self._announce()

    def _save_spending(self) -> None:
        """Behind the caller's back. What a crash loses of it the agents say again: their totals only grow."""
        if self._spender is None or self._spender.done():
            self._spender = asyncio.create_task(self._try_to_store_spending())

    async def _try_to_store_spending(self) -> None:
        while (self.budget.unsaved or self._pauses) and not self.wish.down:  # else what it spent is forgotten with it
            try:
                await self._store_spending()
            except StateDirectoryError as error:
                log.error("%s: %s", self.spec.name, error.message)
                await asyncio.sleep(_DISK_RETRY_SECONDS)

    async def _store_spending(self) -> None:
        told, (data, spending) = list(self._pauses), self.budget.to_save()
        await self._state.save_spending(self.spec.name, data)
        self.budget.saved(spending)
        if told:
            await self._state.save(events=told)
            del self._pauses[: len(told)]
        for event in told:
            self._on_event(event)

    async def renew_budget(self) -> None:
        """Count what is spent from 0 again, and go on where that was what the fleet is paused for. Returns once that is on disk."""
        self.budget.reset()
        await self._store_spending()
        self._heed_budget()
        if self._spender is not None:
            await asyncio.wait([self._spender])

    async def start_autoscaling(self, mode: AutoscalingMode = AutoscalingMode.ACT) -> None:
        """From now on let the load decide how many agents there are, or only tell what it would decide."""
        await self._set_autoscaling(enabled=True, mode=mode)

    async def stop_autoscaling(self) -> None:
        """Leave the fleet as large as it is."""
        await self._set_autoscaling(enabled=False, mode=self.spec.autoscaling.mode)

    def autoscaling_status(self) -> dict[str, Any]:
        """Whether it is on, what it decided last and why, and when it decides again."""
        return self.autoscaler.status(self.wish)

    async def _set_autoscaling(self, *, enabled: bool, mode: AutoscalingMode) -> None:
        async with self._changing:
            wanted = replace(self.spec.autoscaling, enabled=enabled, mode=mode)
            if wanted == self.spec.autoscaling:
                return
            await self._set(replace(self.wish, spec=replace(self.spec, autoscaling=wanted)), "manual")
        text = f"autoscaling is on ({mode})" if enabled else "autoscaling is off"
        event = Event(at=self._clock.time(), kind="fleet.autoscaling", fleet=self.spec.name, message=f"{self.spec.name}: {text}")
        await self._state.save(events=[event])
        self._on_event(event)

    async def _autoscale(self) -> None:
        """Decide at each measurement; a disk that is full or a mistake of ours leaves the fleet as large as it is."""
        loaded = False
        while True:
            await self.autoscaler.wait_measured()
            try:
                if not loaded:
                    self.autoscaler.restore(await self._state.load_scaling(self.spec.name))
                    loaded = True
                await self._decide()
            except StateDirectoryError as error:
                log.error("%s: %s", self.spec.name, error.message)
            except Exception:
                log.exception("%s: the autoscaler broke; it tries again at the next measurement", self.spec.name)

    async def _decide(self) -> None:
        async with self._changing:
            wish = self.wish
            if not wish.spec.autoscaling.enabled or wish.down or not wish.starts:
                return
            evaluation = self.autoscaler.evaluate(wish, self.agents)
            if evaluation is not None and evaluation.acts:
                spec = replace(wish.spec, replicas=evaluation.decision.target_replicas)
                await self._set(replace(wish, spec=spec), "autoscaler", decision_of(evaluation))
                self.autoscaler.carried_out(evaluation)
            elif evaluation is not None and is_recommending(wish.spec) and self.autoscaler.recommends(evaluation):
                await self._record([decision_of(evaluation, recommended=True)])
        if (unsaved := self.autoscaler.to_save()) is not None:
            memory, samples = unsaved
            await self._state.save_scaling(wish.spec.name, memory, samples)
            self.autoscaler.saved(len(samples))
        self._on_change()

    async def take_down(self, *, now: bool) -> None:
        """Wish that nothing of the fleet remain; with `now`, without time for the agents to finish."""
        async with self._changing:
            await self._set(replace(self.wish, down=True, down_now=now or self.wish.down_now), "down")

    async def acquire(self, claim: Mapping[str, object], *, require_warm: bool, timeout_seconds: float) -> SpawnResult:
        """One more agent, at once from the warm pool, else by a cold start; the wish grows by it.

        `claim` reaches it through its claim file. Raises WarmPoolEmpty with `require_warm`, UsageError where the fleet is as large as
        it may be, StateDirectoryError on a full disk, TimedOut where the cold start is not ready in time (it goes on).
        """
        agent = await self._one_more(lambda: self.supervisor.acquire(claim, cold=not require_warm), "acquire")
        if agent is None or not agent.from_warm_pool:
            self.warm_misses += 1
        if agent is None:
            raise WarmPoolEmpty(self._why_no_instance())
        if not agent.from_warm_pool:
            agent = await self._wait_ready(agent.id, timeout_seconds)
        return _spawned(agent)

    async def restore(self, checkpoint: Checkpoint, *, timeout_seconds: float) -> SpawnResult:
        """One more agent, which goes on from this checkpoint; the wish grows by it. Raises as `acquire` does."""
        agent = await self._one_more(lambda: self.supervisor.restore(checkpoint), "restore")
        assert agent is not None, "a new one can always be had"
        return _spawned(await self._wait_ready(agent.id, timeout_seconds))

    async def _one_more(self, ask: Callable[[], "asyncio.Future[Agent | None]"], cause: str) -> Agent | None:
        """Have one more agent come, and write down that the fleet grew, whatever becomes of that agent."""
        async with self._changing:
            before = self.wish.replicas
            check_replicas(self.spec, before + 1)
            try:
                return await ask()
            finally:
                if self.wish.replicas > before:
                    self._save_changed_wish(before, cause)

    async def drain(self, agent_id: str, *, now: bool) -> Agent:
        """Have this very agent leave for good, with a checkpoint of what it keeps; the wish shrinks by it.

        Returns once that is on disk. `now`: without a checkpoint, and without time to finish. Raises NotFound, UsageError where the
        fleet would be smaller than it may be, StateDirectoryError on a full disk.
        """
        async with self._changing:
            before, known = self.wish.replicas, self.find(agent_id)
            if not known.leaving and not self.wish.down:
                check_replicas(self.spec, max(0, before - 1))
            agent = await self.supervisor.drain(agent_id, now=now)
            if self.wish.replicas < before:
                self._save_changed_wish(before, "drain")
            await self.supervisor.wait_saved()
        return agent

    async def checkpoint(self, agent_id: str, reason: str) -> Saved:
        """Save what an agent keeps while it goes on. Raises NotFound, StateDirectoryError on a full disk, FleetctlError."""
        try:
            return await self.supervisor.checkpoint(self.find(agent_id), reason)
        except OSError as error:  # no descriptor is left, say
            raise FleetctlError(f"no checkpoint of {agent_id} could be taken: {error}") from error

    def find(self, agent_id: str) -> Agent:
        """The replica. Raises NotFound; UsageError for an instance of the warm pool, which is nobody yet."""
        for agent in self.agents:
            if agent.id == agent_id and agent.pooled:
                raise UsageError(f"{agent_id} waits in the warm pool", hint="`fleetctl warm resize` changes how many do")
            if agent.id == agent_id:
                return agent
        raise NotFound(f"fleet {self.spec.name} has no agent {agent_id}")

    def _why_no_instance(self) -> str:
        name = self.spec.name
        if not self.warm_instances:
            return f"the warm pool of fleet {name} has no instance to hand out"
        return f"the warm pool of fleet {name} has no instance that would learn of these variables: what runs there reads no claim"

    @property
    def unrecorded(self) -> Sequence[ScalingDecision]:
        """Decisions that are in force and not in the history yet, but in a moment."""
        return tuple(self._grown)

    def _save_changed_wish(self, before: int, cause: str) -> None:
        """Behind the caller's back: that the agent counts, or does not any more, is on disk already, with the agent."""
        self._grown.append(self._decision(before, self.wish.replicas, cause))
        if self._saver is None or self._saver.done():
            self._saver = asyncio.create_task(self._store_grown())

    async def _store_grown(self) -> None:
        """A little later, so that many acquisitions in a row are one write, and none waits for that of the last."""
        while self._grown:
            await asyncio.sleep(_SAVE_AFTER_SECONDS)
            try:
                async with self._storing:
                    spec, decisions = self.spec, list(self._grown)
                    if not self.wish.down:  # else its end is on disk
                        await self._state.save_wish(spec, down=False)
                    await self._record(decisions)
                    del self._grown[: len(decisions)]
                self.supervisor.wish_saved(spec.replicas)
            except StateDirectoryError as error:
                log.error("%s: %s", spec.name, error.message)
                await asyncio.sleep(_DISK_RETRY_SECONDS)

    async def _wait_ready(self, agent_id: str, timeout_seconds: float) -> Agent:
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    changed = self._changed
                    agent = next((agent for agent in self.agents if agent.id == agent_id), None)
                    if agent is not None and agent.ready:
                        return agent
                    if agent is not None and (agent.leaving or agent.state is AgentState.FAILED):
                        raise FleetctlError(f"the new agent {agent_id} does not become ready: {agent.note}")
                    await changed.wait()
        except TimeoutError:
            raise TimedOut(f"the new agent {agent_id} is not ready after {timeout_seconds:g} s; it goes on starting") from None

    def hear(self, agent_id: str, message: Message) -> None:
        """Take in what an agent said of itself; the picture of its work is kept, in memory, for as long as its process lives."""
        process = self.supervisor.process_of(agent_id)
        if self.budget.hear(agent_id, process, message):
            self._heed_budget()
        if process is None:
            if message.resume is not None:  # the last thing it said: where to go on from
                self.supervisor.notified(agent_id, message)
            return
        before = self._reports.get(agent_id)
        if before is None or before.process != process:
            before, self._reports = Report(process=process), dict(self.reports)
        self._reports[agent_id] = merge(before, message, self._clock.monotonic())
        self.supervisor.notified(agent_id, message)

    @property
    def reports(self) -> Mapping[str, Report]:
        """What the processes that run said of their work, by agent id; without those that never said anything."""
        return {agent_id: report for agent_id, report in self._reports.items() if report.process == self.supervisor.process_of(agent_id)}

    def _idle(self) -> frozenset[str]:
        """Those whose processes said that they have nothing to do: they are the first to go where the fleet shrinks."""
        return frozenset(agent_id for agent_id, report in self.reports.items() if report.at_rest)

    def restart(self, agent_ids: Sequence[str] | None, *, all_at_once: bool) -> list[str]:
        """Replace the processes of these agents, or of all; the ids concerned. Raises NotFound."""
        known = [agent.id for agent in self.agents if not agent.leaving]
        for agent_id in agent_ids or ():
            if agent_id not in known:
                raise NotFound(f"fleet {self.spec.name} has no agent {agent_id}")
        chosen = list(agent_ids) if agent_ids is not None else known
        self.supervisor.replace_processes(chosen, Replace.AT_ONCE if all_at_once else Replace.ROLLING)
        return chosen

    def stop_with_daemon(self) -> None:
        """Have the agents stop for now; the wish stays, and they come back with the next daemon."""
        self.supervisor.set_wish(replace(self.wish, mode=Mode.STOP))

    def backlog(self) -> int | None:
        """How many connections wait in the fleet's listening sockets; None where it has none, or nobody can tell."""
        return self._lifecycle.backlog(self.spec) if self.spec.sockets else None

    @property
    def ready_replicas(self) -> int:
        return sum(agent.ready and not agent.leaving and not agent.pooled for agent in self.agents)

    @property
    def warm_instances(self) -> tuple[Agent, ...]:
        """The suspended instances of the pool."""
        return tuple(agent for agent in self.agents if agent.pooled and agent.state is AgentState.SUSPENDED and not agent.leaving)

    def warm_pool_stats(self) -> dict[str, object]:
        """Sizes and how often the pool had what was asked for, in percent; None before anything was asked for."""
        hits, misses = self.supervisor.warm_hits, self.warm_misses
        return {
            "enabled": self.spec.warm_pool.enabled,
            "current_size": len(self.warm_instances),
            "target_size": warmpool.wished_size(self.wish),
            "hits": hits,
            "misses": misses,
            "hit_rate_percent": round(100.0 * hits / (hits + misses), 1) if hits + misses else None,
        }

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._update_probing()
        self._on_change()

    def _update_probing(self) -> None:
        if self._probing is not None:
            self._probing.update(self.spec, self.agents)

    async def _set(self, wish: Wish, cause: str, decided: ScalingDecision | None = None) -> ScalingDecision | None:
        before, limits = self.wish.replicas, self.spec.resource_limits
        if wish.spec.autoscaling.enabled and not self.spec.autoscaling.enabled:
            self.autoscaler.forget()
        async with self._storing:
            await self._state.save_wish(wish.spec, down=wish.down)
            # Now, for it would be in force after a restart whatever becomes of its record below; and the daemon may be ending since.
            self.supervisor.set_wish(replace(wish, mode=self.wish.mode, paused=self.wish.paused))
            self._heed_budget()
            self._update_probing()
            self._wait_for_work()
            if limits != self.spec.resource_limits:
                self._lifecycle.limit([agent for agent in self.agents if agent.process], self.spec)
            if self._grown or any(agent.wish_owed or agent.wish_shrunk is not None for agent in self.agents):
                # What was acquired before counts no longer beyond this wish, not even after a kill.
                self.supervisor.wish_saved(sys.maxsize)
                await self.supervisor.wait_saved()
        if wish.replicas == before:
            return None
        await asyncio.sleep(0)  # the supervisor first: agents wait for what it writes, and for the record only who asked
        if decided is None:
            return await self.record_size(before, cause)
        await self._record([decided])
        return decided

    async def record_size(self, before: int, cause: str) -> ScalingDecision:
        """Write down that the wished size is what it is now, and was `before`."""
        decision = self._decision(before, self.wish.replicas, cause)
        await self._record([decision])
        return decision

    def _decision(self, before: int, after: int, cause: str) -> ScalingDecision:
        action = "scale_up" if after > before else "scale_down"
        return ScalingDecision(
            action=action, target_replicas=after, current_replicas=before, reason=_REASONS[cause], at=self._clock.time(), cause=cause
        )

    async def _record(self, decisions: Sequence[ScalingDecision]) -> None:
        name = self.spec.name
        events = [
            Event(
                at=one.at,
                kind="fleet.recommended" if one.details.get("recommended") else "fleet.scaled",
                fleet=name,
                message=f"{name}: {one.current_replicas} -> {one.target_replicas}, {one.reason}",
                data={"action": one.action, "cause": one.cause, "from": one.current_replicas, "to": one.target_replicas},
            )
            for one in decisions
        ]
        await self._state.save(events=events, history=[(name, one) for one in decisions])
        for event in events:
            self._on_event(event)


def recovered(
    spec: FleetSpec, records: Sequence[Agent], trees: Sequence[Found], *, lifecycle: LifecycleManager, clock: Clock, boot_id: str
) -> tuple[Agent, ...]:
    """The fleet's table to go on with after its last keeper died: these records, and these process trees that were found alive."""
    identities = {agent.id: lifecycle.identify(agent.process) for agent in records if agent.process}
    recovery = recover(
        records,
        trees,
        identities,
        boot_id=boot_id,
        now=clock.monotonic(),
        wall=clock.time(),
        drain_seconds=spec.graceful_drain.timeout_seconds,
    )
    for word, ids in (("adopted", recovery.adopted), ("ended meanwhile", recovery.ended), ("left over", recovery.strays)):
        if ids:
            log.info("%s: %s: %s", spec.name, word, ", ".join(ids))
    return recovery.agents


def _spawned(agent: Agent) -> SpawnResult:
    pid = agent.process.pid if agent.process else None
    return SpawnResult(agent_id=agent.id, state=agent.state, from_warm_pool=agent.from_warm_pool, pid=pid)


def check_replicas(spec: FleetSpec, replicas: int) -> None:
    """Raise UsageError for a size outside the fleet's bounds; none at all is always possible."""
    if replicas < 0:
        raise UsageError(f"{replicas} replicas: the number of agents cannot be negative", hint="0 keeps the fleet and runs none of it")
    if replicas > spec.max_replicas:
        raise UsageError(
            f"{replicas} replicas are more than max_replicas of fleet {spec.name} ({spec.max_replicas})",
            hint=f"ask for at most {spec.max_replicas}, or raise max_replicas in fleet.toml and run `fleetctl up`",
        )
    if 0 < replicas < spec.min_replicas:
        raise UsageError(
            f"{replicas} replicas are fewer than min_replicas of fleet {spec.name} ({spec.min_replicas})",
            hint="lower min_replicas in fleet.toml, or ask for 0 to run none",
        )
