"""FleetManager, the specification's library: one fleet inside an asyncio program, without a daemon and with the daemon's code.

It puts the specification's words on a `Fleet`; what that needs of the machine is `embedded`'s to bring.
"""

import asyncio
import os
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fleetctl import config as settings
from fleetctl.core.demand import Reading
from fleetctl.core.memory import Memory
from fleetctl.core.policy import Observation, policy_of
from fleetctl.core.scaling import evaluate
from fleetctl.embedded import Home, Managers
from fleetctl.errors import FleetctlError, ScaleDownFailed, ScaleUpFailed, UsageError, WarmPoolEmpty
from fleetctl.fleet import Fleet, check_replicas
from fleetctl.health import metrics_of, problems_of, replicas_of
from fleetctl.host.probes import check_probes
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import (
    Agent,
    AgentConfig,
    AgentState,
    Event,
    FleetSpec,
    ScalingDecision,
    ScalingMetrics,
    SpawnResult,
    WarmInstance,
)
from fleetctl.ports import Clock, LifecycleManager, ResourceManager, StateManager

T = TypeVar("T")

_MEASURED_SECONDS = 3.0
_MOST_NAMED = 3
_NOT_INITIALIZED = "the FleetManager is not initialized"
_INITIALIZE = "`await fleet.initialize()` first, or use `async with FleetManager(...) as fleet:`"


class FleetManager:
    """A fleet of agents: scaled by hand or by load, with a warm pool, drained before it shrinks.

        async with FleetManager(config={"min_replicas": 2, "warm_pool": {"size": 3}}) as fleet:
            for result in await fleet.scale_up(4, AgentConfig(command=["python3", "agent.py"])):
                print(result.agent_id, result.state)

    `config`: the settings of `fleet.toml` as a nested dictionary, with the specification's defaults, so that there is a warm pool of
    five unless it says otherwise. `state_dir`: where the fleet, its history and its agents' state are kept, and found again by the next
    program that names it; without one they end with this program. `config_template`: of the agents, where it is known already.

    All methods are to be called in one event loop. A fleet is of one kind: a template that differs from the last one replaces the
    agents that run, one by one. Cancelling a method that changes the fleet ends the waiting, and not the change.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "fleet",
        state_dir: "str | os.PathLike[str] | None" = None,
        config_template: AgentConfig | None = None,
    ) -> None:
        """Raises ConfigError for settings that make no fleet, all at once."""
        self._config = {} if config is None else config
        self._name, self._template = name, config_template
        self._state_dir = None if state_dir is None else os.fspath(state_dir)
        self._cwd = Path.cwd()  # now: an agent's directory does not change with the program's
        self._checked: tuple[AgentConfig | None, FleetSpec] | None = None  # the last template, and what came of it
        self._spec = self._spec_of(config_template)
        self._home: Home | None = None
        self._opening = False
        self._closing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # Any: whatever they return
        self._changing = asyncio.Lock()
        self._grown, self._shrunk = _Told(), _Told()

    # -- coming and going

    async def initialize(
        self,
        lifecycle_manager: LifecycleManager | None = None,
        state_manager: StateManager | None = None,
        resource_manager: ResourceManager | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        """Begin, with these three managers, or with this machine's where none is given; agents of an earlier program are adopted.

        Raises DaemonRunning or KeptByProgram where somebody else keeps the fleets of `state_dir`, StateDirectoryError.
        """
        if self._home is not None or self._opening:
            raise UsageError("the FleetManager is initialized already", hint="make another FleetManager for another fleet")
        managers = Managers(lifecycle=lifecycle_manager, state=state_manager, resources=resource_manager)
        self._opening = True
        try:
            home = await Home.open(self._name, self._restored, managers, state_dir=self._state_dir, clock=clock)
        finally:
            self._opening = False
        self._home, self._changing = home, asyncio.Lock()
        self._grown, self._shrunk = _Told(), _Told()
        if home.fleet is not None and self._template is not None:
            try:
                await self._use(home.fleet, self._template, home.fleet.wish.replicas)
            except BaseException:
                await self.cleanup()
                raise

    async def cleanup(self) -> None:
        """End all agents, the warm pool's too, each with its time to finish, and leave nothing behind. Twice is as good as once."""
        if self._closing is None and self._home is not None:
            self._home.check_loop()
            self._closing = asyncio.create_task(self._close(self._home), name=f"cleanup of {self._name}")
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _close(self, home: Home) -> None:
        try:
            await home.close()
        finally:
            self._home = self._closing = None

    async def __aenter__(self) -> "FleetManager":
        await self.initialize()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.cleanup()

    # -- size

    async def evaluate_scaling(self, metrics: ScalingMetrics) -> ScalingDecision:
        """What the autoscaler would do with a fleet that is as these metrics say; nothing is done.

        It waits, as the autoscaler does, for some time after the last change of this fleet's size.
        """
        replicas = metrics.current_replicas
        if replicas < 0 or metrics.pending_requests < 0:
            raise UsageError(f"{metrics}: neither replicas nor pending requests can be fewer than none")
        changes = [one for one in self._decisions if not one.details.get("recommended")]
        changed_at = max((one.at for one in changes), default=None)
        grown_at = max((one.at for one in changes if one.action == "scale_up"), default=None)
        now = self._home.clock.time() if self._home else datetime.now(UTC).timestamp()
        seen = Observation(
            now=now,
            replicas=replicas,
            readings={
                "cpu": Reading(total=metrics.avg_cpu_utilization * replicas, replicas=replicas, at=now),
                "memory": Reading(total=metrics.avg_memory_utilization * replicas, replicas=replicas, at=now),
                "pending": Reading(total=float(metrics.pending_requests), at=now),
            },
            pending=metrics.pending_requests,
            at=now,
            tick=True,
        )
        memory = Memory(replicas=replicas, changed_at=changed_at, grown_at=grown_at)
        evaluation, _ = evaluate(policy_of(self._spec_now), seen, memory)
        return evaluation.decision

    async def scale_up(self, target_replicas: int, config_template: AgentConfig | None = None) -> list[SpawnResult]:
        """Grow to so many agents, out of the warm pool first; the new ones, once they are ready. None where there are as many already.

        Raises ScaleUpFailed (E2090) without a lifecycle manager, and where new agents fail; those are tried again and again until
        `scale_down` gives up on them. ConfigError for a template that makes no agent, UsageError for more than `max_replicas`.
        """
        home, fleet = self._working(ScaleUpFailed)
        with self._grown.waiting(_replicas(fleet)):
            wanted = await self._undisturbed(self._grow(fleet, target_replicas, config_template))
            return [_result(agent) for agent in await self._wait_grown(home, fleet, wanted)] if wanted else []

    async def _grow(self, fleet: Fleet, target: int, template: AgentConfig | None) -> int:
        """How many more are wished for from now on."""
        async with self._changing:
            before = fleet.wish.replicas
            _check_size(fleet.spec, target)
            if template is not None or not fleet.wish.pool_alone:
                await self._use(fleet, template, max(target, before))
            elif target > before:
                await fleet.scale(target)
            return max(0, target - before)

    async def _wait_grown(self, home: Home, fleet: Fleet, wanted: int) -> list[Agent]:
        served: set[str] = set()
        while True:
            changed = home.changed
            home.check()
            if fleet.wish.down:
                raise ScaleUpFailed(f"fleet {self._name} is being taken down, so it does not grow")
            staying = _replicas(fleet)
            # Somebody else's are those that were acquired.
            new = [agent for agent in staying if agent.id not in self._grown.told and not agent.claimed]
            served.update(agent.id for agent in new if agent.ready and not agent.resume_owed)
            ready = [agent for agent in new if agent.id in served]
            failed = [agent for agent in new if agent.id not in served and agent.state in (AgentState.FAILED, AgentState.TERMINATED)]
            if len(ready) >= wanted:
                return self._grown.take(sorted(ready, key=_warm_first)[:wanted])
            if len(staying) == fleet.wish.replicas and len(ready) + len(failed) == len(new):
                self._grown.take(new)
                if failed:
                    raise ScaleUpFailed(_told_failures(failed, len(ready), wanted), hint=_FAILED_HINT)
                return sorted(ready, key=_warm_first)  # it was told to be smaller meanwhile
            await changed.wait()

    async def scale_down(self, target_replicas: int) -> list[str]:
        """Shrink to so many agents, the oldest first, each with its time to finish; the ids of those that ended, once they are gone.

        One that does not finish in time is killed: that is E2093, in the log and in `get_health_status()["errors"]`. Raises
        ScaleDownFailed (E2091) without a lifecycle manager, UsageError for fewer than `min_replicas`; none at all is always possible.
        """
        home, fleet = self._working(ScaleDownFailed)
        with self._shrunk.waiting():
            before, wanted = await self._undisturbed(self._shrink(fleet, target_replicas))
            gone = await self._wait_shrunk(home, fleet, before, wanted) if wanted else []
            return [agent.id for agent in self._shrunk.take(gone)]

    async def _shrink(self, fleet: Fleet, target: int) -> tuple[list[Agent], int]:
        """Who may go, the oldest first, and how many fewer are wished for from now on."""
        async with self._changing:
            before = sorted(_replicas(fleet), key=lambda agent: (agent.created_at, agent.slot))
            replicas = fleet.wish.replicas
            _check_size(fleet.spec, target)
            if target < replicas:
                await fleet.scale(target)
            return before, max(0, replicas - target)

    async def _wait_shrunk(self, home: Home, fleet: Fleet, before: list[Agent], wanted: int) -> list[Agent]:
        while True:
            changed = home.changed
            home.check()
            there, staying = {agent.id for agent in fleet.agents}, {agent.id for agent in _replicas(fleet)}
            gone = [agent for agent in before if agent.id not in there and agent.id not in self._shrunk.told]
            still_leaving = any(agent.id in there and agent.id not in staying for agent in before)
            # Fewer than that where it was told to be larger meanwhile, or not all of them were there yet.
            if len(gone) >= wanted or (len(staying) == fleet.wish.replicas and not still_leaving):
                return gone[:wanted]
            await changed.wait()

    async def get_scaling_history(self, limit: int = 10) -> list[ScalingDecision]:
        """The last decisions about the fleet's size, by hand and by the autoscaler, the newest last."""
        if limit < 0:
            raise UsageError(f"limit {limit}: cannot be negative")
        return sorted(self._decisions, key=lambda decision: decision.at)[-limit:] if limit else []

    # -- autoscaling

    async def start_autoscaling(self, config_template: AgentConfig | None = None) -> None:
        """From now on let the load decide how many agents there are, `min_replicas` at least."""
        _, fleet = self._working(ScaleUpFailed)
        await self._undisturbed(self._start_autoscaling(fleet, config_template))

    async def _start_autoscaling(self, fleet: Fleet, template: AgentConfig | None) -> None:
        async with self._changing:
            least = max(fleet.wish.replicas, fleet.spec.min_replicas)
            if template is not None or not fleet.wish.pool_alone:
                await self._use(fleet, template, least, cause="autoscaling")
            elif least > fleet.wish.replicas:
                await fleet.scale(least, cause="autoscaling")
            await fleet.start_autoscaling(fleet.spec.autoscaling.mode)

    async def stop_autoscaling(self) -> None:
        """Leave the fleet as large as it is."""
        fleet = self._home.fleet if self._home else None
        if fleet is not None:
            await self._undisturbed(fleet.stop_autoscaling())

    def get_autoscaling_status(self) -> dict[str, Any]:
        """Whether it is on, the number of replicas, how often it grew and shrank the fleet, and what it decided last and why."""
        fleet = self._home.fleet if self._home else None
        status: dict[str, Any] = {"enabled": False, "mode": None, "scale_up_count": 0, "scale_down_count": 0}
        if fleet is not None:
            status = fleet.autoscaling_status()
        spec = self._spec_now
        return {
            **status,
            "current_replicas": len(_replicas(fleet)),
            "desired_replicas": fleet.wish.replicas if fleet else 0,
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "target_cpu_utilization": spec.target_cpu_utilization,
        }

    async def get_fleet_metrics(self) -> ScalingMetrics:
        """Size and load now. It takes two looks to tell a CPU utilization, so after a growth this waits a moment for the second.

        A utilization is in percent of the agents' `resource_limits`; without them, of one core and of the machine's memory. NaN where
        nothing was measured, as without a resource manager.
        """
        home, fleet = self._home, self._home.fleet if self._home else None
        if home is None or fleet is None:
            return ScalingMetrics(0, 0, 0.0, 0.0, 0)
        home.check_loop()
        deadline = home.loop.time() + _MEASURED_SECONDS
        while home.measures and not self._measured(home, fleet) and (left := deadline - home.loop.time()) > 0:
            await home.wait_change(left)
        return metrics_of(fleet, home.usage)

    def _measured(self, home: Home, fleet: Fleet) -> bool:
        running = [agent.id for agent in _replicas(fleet) if agent.process and not agent.leader_exit]
        return all(agent_id in home.usage and home.usage[agent_id].cpu_percent is not None for agent_id in running)

    # -- the warm pool

    async def acquire_from_warm_pool(self, config_template: AgentConfig | None = None) -> SpawnResult | None:
        """The oldest warm instance, as one more replica; None where there is none to hand out, and then `scale_up` starts one.

        It learns the template's environment and tools from its claim file. One that cannot learn them so, because it does not read it,
        or that another program would have to run for, is none to hand out. Raises UsageError where there are `max_replicas` already.
        """
        _, fleet = self._working(ScaleUpFailed)
        if not fleet.wish.pool_alone:  # the first that tells what the agents are: from now on there is a pool
            await self._undisturbed(self._fill(fleet, config_template))
        claim: dict[str, object] = {}
        if config_template is not None:
            spec, asked = fleet.spec, self._spec_of(config_template, fleet.spec)
            if replace(asked, environment=spec.environment, tools=spec.tools) != spec:
                fleet.warm_misses += 1
                return None
            claim = {"environment": dict(asked.environment), "tools": list(asked.tools), "template": config_template.agent_id}
        try:
            return await fleet.acquire(claim, require_warm=True, timeout_seconds=0.0)
        except WarmPoolEmpty:
            return None

    async def _fill(self, fleet: Fleet, template: AgentConfig | None) -> None:
        async with self._changing:
            if not fleet.wish.pool_alone:
                await self._use(fleet, template, fleet.wish.replicas)

    def get_warm_pool_stats(self) -> dict[str, Any]:
        """Sizes, and how often the pool had what was asked for, in percent; `instances`: who waits in it, the oldest first."""
        fleet = self._home.fleet if self._home else None
        pool = self._spec_now.warm_pool
        size = pool.size if pool.enabled else 0
        stats: dict[str, Any] = {"enabled": pool.enabled, "current_size": 0, "hits": 0, "misses": 0, "hit_rate_percent": None}
        waiting: list[Agent] = []
        if fleet is not None:
            stats = fleet.warm_pool_stats()
            waiting = sorted(fleet.warm_instances, key=lambda agent: (agent.started_clock or 0.0, agent.slot))
        return {
            **stats,
            "target_size": size,  # also before the first template, when there is nothing yet that could be started
            "hit_rate_percent": stats["hit_rate_percent"] or 0.0,
            "instances": [WarmInstance(one.id, datetime.fromtimestamp(one.created_at, UTC), one.state) for one in waiting],
        }

    # -- health

    def get_health_status(self) -> dict[str, Any]:
        """Whether all is as it should be, and in `problems` what is not; sizes, autoscaling, warm pool, and the last `errors`."""
        home, fleet = self._home, self._home.fleet if self._home else None
        spec, replicas = self._spec_now, _replicas(fleet)
        problems = list(_problems(home, fleet))
        errors = [{"code": one.data["code"], "at": one.at, "agent_id": one.agent_id, "message": one.message} for one in _errors(home)]
        return {
            "healthy": not problems,
            "problems": problems,
            "current_replicas": len(replicas),
            "desired_replicas": fleet.wish.replicas if fleet else 0,
            "ready_replicas": fleet.ready_replicas if fleet else 0,
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "active_instances": sum(agent.process is not None and not agent.leader_exit for agent in replicas),
            "autoscaling": {key: self.get_autoscaling_status()[key] for key in ("enabled", "mode", "scale_up_count", "scale_down_count")},
            "warm_pool": {key: self.get_warm_pool_stats()[key] for key in ("enabled", "current_size", "target_size", "hit_rate_percent")},
            "errors": errors,
        }

    # -- the fleet behind it

    @property
    def _spec_now(self) -> FleetSpec:
        fleet = self._home.fleet if self._home else None
        return fleet.spec if fleet is not None else self._spec

    @property
    def _decisions(self) -> list[ScalingDecision]:
        home, fleet = self._home, self._home.fleet if self._home else None
        return [*(home.ledger.decisions if home else ()), *(fleet.unrecorded if fleet else ())]

    def _working(self, error: type[FleetctlError]) -> tuple[Home, Fleet]:
        """The fleet; the error where there is none, because nobody could start or end an agent of it."""
        if self._home is None or self._closing is not None:
            raise error(f"{error()} {_NOT_INITIALIZED}", hint=_INITIALIZE)
        self._home.check_loop()
        self._home.check()
        if self._home.fleet is None:
            raise error(hint="give `initialize` a lifecycle_manager, or none of the three managers to have this machine's")
        return self._home, self._home.fleet

    def _restored(self, stored: Mapping[str, Any] | None) -> FleetSpec:
        return settings.load_library(self._config, None, name=self._name, cwd=self._cwd, stored=stored)

    def _spec_of(self, template: AgentConfig | None, now: FleetSpec | None = None) -> FleetSpec:
        """The fleet with agents of this template; `now`: as it is, so of this size and state of autoscaling."""
        if self._checked is None or self._checked[0] != template:
            spec = settings.load_library(self._config, template, name=self._name, cwd=self._cwd)
            self._checked = deepcopy(template), spec  # a copy: its owner may change what is in it
        spec = self._checked[1]
        return spec if now is None else replace(spec, replicas=now.replicas, autoscaling=now.autoscaling)

    async def _use(self, fleet: Fleet, template: AgentConfig | None, replicas: int, *, cause: str = "manual") -> None:
        """Have so many agents of this template, the last one or the demo agent, and a warm pool of them.

        Raises ConfigError where it cannot be started here.
        """
        template = template or self._template or AgentConfig()
        spec = replace(self._spec_of(template, fleet.spec), replicas=replicas)
        lifecycle = self._home.lifecycle if self._home is not None else None
        with ExitStack() as stack:
            if isinstance(lifecycle, LocalLifecycleManager):
                await asyncio.to_thread(settings.check_runnable, spec)
                check_probes(spec)
                lifecycle.check(spec)
                stack.enter_context(lifecycle.sockets.changing(spec, [agent.process for agent in fleet.agents if agent.process]))
            await fleet.apply(spec, pool_alone=True, cause=cause)
        self._template = template

    async def _undisturbed(self, change: Coroutine[Any, Any, T]) -> T:  # Any: what a coroutine yields is the loop's affair
        """Carry a change out to its end, also where whoever asked for it is cancelled meanwhile."""
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


_FAILED_HINT = "they are tried again and again; `scale_down` gives up on them"


def _replicas(fleet: Fleet | None) -> list[Agent]:
    return replicas_of(fleet) if fleet is not None else []


class _Told:
    """Which agents were told of already, for as long as somebody waits: of several who do at once each is told of others."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self._waiting = 0

    @contextmanager
    def waiting(self, present: Iterable[Agent] = ()) -> Iterator[None]:
        """`present`: those that are not news to whoever waits."""
        if not self._waiting:
            self.told = {agent.id for agent in present}
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def take(self, agents: list[Agent]) -> list[Agent]:
        self.told.update(agent.id for agent in agents)
        return agents


def _result(agent: Agent) -> SpawnResult:
    pid = agent.process.pid if agent.process else None
    return SpawnResult(agent_id=agent.id, state=agent.state, from_warm_pool=agent.from_warm_pool, pid=pid)


def _warm_first(agent: Agent) -> tuple[bool, int]:
    return not agent.from_warm_pool, agent.slot


def _told_failures(failed: list[Agent], ready: int, wanted: int) -> str:
    named = "; ".join(f"{agent.id}: {agent.note or agent.last_exit}" for agent in failed[:_MOST_NAMED])
    more = f"; and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
    return f"{ready} of {wanted} new agents are ready; {named}{more}"


def _check_size(spec: FleetSpec, replicas: int) -> None:
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise UsageError(f"target_replicas {replicas!r}: must be a whole number")
    try:
        check_replicas(spec, replicas)
    except UsageError as error:
        bound = "max_replicas" if replicas > spec.max_replicas else "min_replicas"
        raise UsageError(error.message, hint=f"the bound is {bound} of the FleetManager's config; 0 is always possible") from None


def _errors(home: Home | None) -> Iterable[Event]:
    return home.errors if home is not None else ()


def _problems(home: Home | None, fleet: Fleet | None) -> Iterator[str]:
    if home is None:
        yield _NOT_INITIALIZED
        return
    if fleet is None:
        yield "there is no lifecycle manager, so nothing can be started"
        return
    if home.problem is not None:
        yield home.problem
    yield from problems_of(fleet)
