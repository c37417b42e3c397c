"""One fleet as a whole: its wish, its supervisor, its decisions about size. What it is told changes the wish, never the world."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fleetctl.core.reconcile import Mode, Wish
from fleetctl.errors import NotFound, UsageError
from fleetctl.models import Agent, AgentState, Event, FleetSpec, Replace, ScalingDecision
from fleetctl.ports import Clock, LifecycleManager, StateManager
from fleetctl.supervisor import Supervisor

log = logging.getLogger(__name__)


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
        self._on_event = on_event
        self.supervisor = Supervisor(
            wish,
            lifecycle=lifecycle_manager,
            state=state_manager,
            clock=clock,
            agents=agents,
            on_change=on_change,
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
                await self._set(replace(self.wish, spec=spec, down=False, down_now=False), self.wish.replicas, "up")
            return changed

    async def scale(self, replicas: int, cause: str = "manual") -> ScalingDecision | None:
        """Wish for so many agents; None where that is the wish already. Raises UsageError outside the fleet's bounds."""
        async with self._changing:
            check_replicas(self.spec, replicas)
            if replicas == self.wish.replicas and not self.wish.down:
                return None
            before = self.wish.replicas
            return await self._set(
                replace(self.wish, spec=replace(self.spec, replicas=replicas), down=False, down_now=False), before, cause
            )

    async def take_down(self, *, now: bool) -> None:
        """Wish that nothing of the fleet remain; with `now`, without time for the agents to finish."""
        async with self._changing:
            await self._set(replace(self.wish, down=True, down_now=now or self.wish.down_now), self.wish.replicas, "down")

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
        return sum(agent.ready and not agent.leaving for agent in self.agents)

    @property
    def settled(self) -> bool:
        """Whether the fleet is as wished: every agent ready (or completed), nobody leaving."""
        done = [agent for agent in self.agents if agent.ready or agent.state is AgentState.TERMINATED]
        return len(self.agents) == len(done) == self.wish.replicas

    async def _set(self, wish: Wish, before: int, cause: str) -> ScalingDecision | None:
        await self._state.save_wish(wish.spec, down=wish.down)
        # Now, for it would be in force after a restart whatever becomes of its record below; and the daemon may be ending since.
        self.supervisor.set_wish(replace(wish, mode=self.wish.mode))
        return await self.record_size(before, cause) if wish.replicas != before else None

    async def record_size(self, before: int, cause: str) -> ScalingDecision:
        """Write down that the wished size is what it is now, and was `before`."""
        name, replicas = self.spec.name, self.wish.replicas
        decision = ScalingDecision(
            action="scale_up" if replicas > before else "scale_down",
            target_replicas=replicas,
            current_replicas=before,
            reason={"up": "asked for by up", "down": "the fleet is taken down"}.get(cause, "asked for by scale"),
            at=self._clock.time(),
            cause=cause,
        )
        message = f"{name}: {before} -> {replicas}, {decision.reason}"
        event = Event(at=decision.at, kind="fleet.scaled", fleet=name, message=message)
        await self._state.save(events=[event], history=[(name, decision)])
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
