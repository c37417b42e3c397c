"""One fleet as a whole: its wish, its supervisor, its decisions about size. What it is told changes the wish, never the world."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from fleetctl.core import warmpool
from fleetctl.core.orders import Mode, Wish
from fleetctl.errors import NotFound, TimedOut, UsageError, WarmPoolEmpty
from fleetctl.models import Agent, AgentState, Event, FleetSpec, Replace, ScalingDecision, SpawnResult
from fleetctl.ports import Clock, LifecycleManager, StateManager
from fleetctl.supervisor import Supervisor

log = logging.getLogger(__name__)

_RESUME_SECONDS = 5.0
_REASONS = {
    "up": "asked for by up",
    "down": "the fleet is taken down",
    "manual": "asked for by scale",
    "acquire": "one more was acquired, and the warm pool was empty",
}


class FleetManager:
    """Keeps one fleet; `start` runs its supervisor as a task of the running loop."""

    def __init__(
        self,
        wish: Wish,
        *,
        lifecycle_manager: LifecycleManager,
        state_manager: StateManager,
        clock: Clock,
        agents: Iterable[Agent] = (),
        on_change: Callable[[], None] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
        last_output: Callable[[Agent], Sequence[str]] = lambda agent: (),
    ) -> None:
        self._state, self._clock = state_manager, clock
        self._on_event, self._on_change = on_event, on_change
        self._changed = asyncio.Event()
        self._saving: set[asyncio.Task[None]] = set()
        self.warm_misses = 0
        self.supervisor = Supervisor(
            wish,
            lifecycle=lifecycle_manager,
            state=state_manager,
            clock=clock,
            agents=agents,
            on_change=self._announce,
            on_event=on_event,
            last_output=last_output,
        )
        self._task: asyncio.Task[None] | None = None
        # A change builds on the wish it finds: one at a time, or the disk and we keep different ones.
        self._changing = asyncio.Lock()

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
        return self._task

    async def close(self) -> None:
        """Stop looking after the agents; touches none of them."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def apply(self, spec: FleetSpec) -> bool:
        """Make this the fleet's spec; processes it no longer matches are replaced one by one. Whether anything changed."""
        async with self._changing:
            changed = spec != self.spec or self.wish.down
            if changed:
                await self._set(replace(self.wish, spec=spec, down=False, down_now=False), "up")
        return changed

    async def scale(self, replicas: int | None = None, *, delta: int = 0, cause: str = "manual") -> ScalingDecision | None:
        """Wish for so many agents, or so many more; None where that is the wish already. Raises UsageError outside the bounds."""
        async with self._changing:
            target = replicas if replicas is not None else max(0, self.wish.replicas + delta)
            check_replicas(self.spec, target)
            if target == self.wish.replicas and not self.wish.down:
                return None
            return await self._set(replace(self.wish, spec=replace(self.spec, replicas=target), down=False, down_now=False), cause)

    async def resize_warm_pool(self, size: int) -> None:
        """Hold so many warm instances; 0 holds none."""
        async with self._changing:
            pool = replace(self.spec.warm_pool, size=size, enabled=size > 0)
            await self._set(replace(self.wish, spec=replace(self.spec, warm_pool=pool)), "warm")

    async def take_down(self, *, now: bool) -> None:
        """Wish that nothing of the fleet remain; with `now`, without time for the agents to finish."""
        async with self._changing:
            await self._set(replace(self.wish, down=True, down_now=now or self.wish.down_now), "down")

    async def acquire(self, claim: Mapping[str, object], *, require_warm: bool, timeout_seconds: float) -> SpawnResult:
        """One more agent, at once from the warm pool, else by a cold start; the wish grows by it.

        `claim` reaches a warm instance through its claim file. Raises WarmPoolEmpty with `require_warm`, UsageError where the fleet is
        as large as it may be, TimedOut where the cold start is not ready in time (it goes on).
        """
        async with self._changing:
            check_replicas(self.spec, self.wish.replicas + 1)
            agent = await self._acquire_warm(claim)
        if agent is not None:
            self._save_grown_wish()
            return SpawnResult(agent_id=agent.id, state=agent.state, from_warm_pool=True, pid=agent.process.pid if agent.process else None)
        self.warm_misses += 1
        if require_warm:
            raise WarmPoolEmpty()
        known = {agent.id for agent in self.agents}
        await self.scale(delta=1, cause="acquire")
        agent = await self._wait_for_new(known, timeout_seconds)
        return SpawnResult(agent_id=agent.id, state=agent.state, from_warm_pool=False, pid=agent.process.pid if agent.process else None)

    async def _acquire_warm(self, claim: Mapping[str, object]) -> Agent | None:
        try:
            return await asyncio.wait_for(self.supervisor.acquire(claim), _RESUME_SECONDS)
        except TimeoutError:  # it died on the way out
            return None

    def _save_grown_wish(self) -> None:
        """Behind the caller's back: that the agent counts is on disk already, with the agent."""

        async def save() -> None:
            async with self._changing:
                await self._state.save_wish(self.spec, down=self.wish.down)
                self.supervisor.wish_saved()

        task = asyncio.create_task(save())
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _wait_for_new(self, known: Collection[str], timeout_seconds: float) -> Agent:
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    changed = self._changed
                    for agent in self.agents:
                        if agent.id not in known and agent.ready and not agent.pooled:
                            return agent
                    await changed.wait()
        except TimeoutError:
            raise TimedOut(f"the new agent of {self.spec.name} is not ready after {timeout_seconds:g} s; it goes on starting") from None

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
        self._on_change()

    async def _set(self, wish: Wish, cause: str) -> ScalingDecision | None:
        before = self.wish.replicas
        await self._state.save_wish(wish.spec, down=wish.down)
        # Now, for it would be in force after a restart whatever becomes of its record below; and the daemon may be ending since.
        self.supervisor.set_wish(replace(wish, mode=self.wish.mode))
        decision = None
        if wish.replicas != before:
            action = "scale_up" if wish.replicas > before else "scale_down"
            decision = ScalingDecision(
                action=action,
                target_replicas=wish.replicas,
                current_replicas=before,
                reason=_REASONS[cause],
                at=self._clock.time(),
                cause=cause,
            )
            event = Event(
                at=decision.at,
                kind="fleet.scaled",
                fleet=wish.spec.name,
                message=f"{wish.spec.name}: {before} -> {wish.replicas}, {decision.reason}",
            )
            await self._state.save(events=[event], history=[(wish.spec.name, decision)])
            self._on_event(event)
        return decision


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
