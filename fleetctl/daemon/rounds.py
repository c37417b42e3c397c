"""What is done by the clock: measure the agents, cut their logs, and whatever else its owner adds.

The same for the daemon's fleets and for the one of a program that embeds it. The work happens in one worker thread, so that a slow
disk delays no exit and no request.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from fleetctl.fleet import Fleet
from fleetctl.host import logfiles, rotation
from fleetctl.host.metrics import LocalResourceManager
from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.state import DirectoryLock
from fleetctl.models import Agent, HostUsage, LogSpec, ProcessRef, Usage
from fleetctl.ports import LifecycleManager, ResourceManager

log = logging.getLogger(__name__)
T = TypeVar("T")

METRICS_INTERVAL_SECONDS = 5.0
SOON_SECONDS = 1.0


class House(Protocol):
    """Whose fleets are looked after."""

    @property
    def fleets(self) -> Mapping[str, Fleet]: ...

    @property
    def lifecycle(self) -> LifecycleManager: ...

    def measured(self, usage: Mapping[str, Usage]) -> None:
        """Take what the agents were just seen to use, by agent id."""
        ...

    async def wait_change(self, timeout: float) -> None:
        """Return when anything about the agents changed, or after so many seconds."""
        ...

    def directory_lost(self) -> None:
        """The state directory was removed or replaced."""
        ...


class Rounds:
    """Create it in the running loop and `run` it as a task; `close` it behind that.

    Without `resources` nothing is measured, without `paths` there are no logs to cut. `more`: further work that never ends.
    """

    def __init__(
        self,
        house: House,
        resources: ResourceManager | None,
        *,
        paths: Paths | None = None,
        lock: DirectoryLock | None = None,
        more: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        self._house, self._resources, self._paths, self._lock = house, resources, paths, lock
        self._works = [*([self._measure] if resources else []), *([self._cut_logs] if paths else []), *more]
        self._rotator = rotation.Rotator(paths) if paths else None
        self._thread = ThreadPoolExecutor(1, "rounds")
        self._problems: set[str] = set()

    async def run(self) -> None:
        """Until cancelled. A round that breaks is reported and tried again: the agents are looked after without it."""
        async with asyncio.TaskGroup() as group:
            for work in self._works:
                group.create_task(self._again_and_again(work))

    def close(self, *, wait: bool = False) -> None:
        """Let go of the thread; with `wait`, return when it does nothing any more."""
        self._thread.shutdown(wait=wait)

    async def _again_and_again(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                log.exception("a round broke; the next one is in %g s", METRICS_INTERVAL_SECONDS)
                await asyncio.sleep(METRICS_INTERVAL_SECONDS)

    async def _measure(self) -> None:
        while True:
            if self._lock is not None and not self._lock.is_ours():
                self._house.directory_lost()
            leaders = self._leaders()
            suspended = {agent.id for fleet in self._house.fleets.values() for agent in fleet.warm_instances}
            usage, host = await self._sample(leaders)
            for fleet in self._house.fleets.values():
                waiting = [agent.id for agent in fleet.warm_instances if agent.id in suspended]
                woken = [agent_id for agent_id in waiting if (seen := usage.get(agent_id)) and not seen.frozen]
                if woken:
                    fleet.supervisor.woken(woken)
                fleet.observe(usage, host)
            self._house.measured(usage)
            await self._until_next_measurement(leaders, usage)

    async def _sample(self, leaders: Mapping[str, ProcessRef]) -> tuple[Mapping[str, Usage], HostUsage | None]:
        resources, lifecycle = self._resources, self._house.lifecycle
        assert resources is not None
        if not isinstance(resources, LocalResourceManager):
            return resources.sample(leaders), None  # a fake in fake time, say, where a thread never comes back in time
        usage = await self._in_thread(resources.sample, leaders)
        # Of the machine only where somebody needs it: psutil is loaded for it.
        host = await self._in_thread(resources.host_usage) if any(map(_autoscaled, self._house.fleets.values())) else None
        if isinstance(lifecycle, LocalLifecycleManager):
            lifecycle.remember(resources.trees)
        return usage, host

    @property
    def _interval_seconds(self) -> float:
        wanted = [fleet.spec.autoscaling.metrics_interval_seconds for fleet in self._house.fleets.values() if _autoscaled(fleet)]
        return min([METRICS_INTERVAL_SECONDS, *wanted])

    async def _until_next_measurement(self, leaders: Mapping[str, ProcessRef], usage: Mapping[str, Usage]) -> None:
        """The interval, or a second where an agent is new: a percentage takes two looks, and people watch what they just started."""
        if any(one.cpu_percent is None for one in usage.values()):
            await asyncio.sleep(min(SOON_SECONDS, self._interval_seconds))
            return
        clock = asyncio.get_running_loop().time
        due = clock() + self._interval_seconds
        while (left := due - clock()) > 0:
            await self._house.wait_change(left)
            if self._leaders().items() - leaders.items():
                await asyncio.sleep(min(SOON_SECONDS, max(0.0, due - clock())))
                return

    def _agents(self) -> list[Agent]:
        return [agent for fleet in self._house.fleets.values() for agent in fleet.agents]

    def _leaders(self) -> dict[str, ProcessRef]:
        return {agent.id: agent.process for agent in self._agents() if agent.process and not agent.leader_exit}

    async def _cut_logs(self) -> None:
        """Each log as often as it needs: one that fills up fast sooner than the others."""
        due: dict[str, float] = {}
        clock = asyncio.get_running_loop().time
        while True:
            now = clock()
            agents = self._agents()
            due = {agent.id: due.get(agent.id, now) for agent in agents}
            specs = {name: fleet.spec.logs for name, fleet in self._house.fleets.items()}
            waiting = [agent for agent in agents if due[agent.id] <= now]
            for agent_id, wait in (await self._in_thread(self._rotate, waiting, specs)).items():
                due[agent_id] = now + wait
            await self._in_thread(self._enforce, specs, {agent.id for agent in agents})
            await asyncio.sleep(min([rotation.LONGEST_WAIT_SECONDS, *(at - clock() for at in due.values())]))

    def _rotate(self, agents: Sequence[Agent], specs: Mapping[str, LogSpec]) -> dict[str, float]:
        assert self._rotator is not None
        waits = {}
        for agent in agents:
            checked = self._rotator.rotate(agent.fleet, agent.id, specs[agent.fleet])
            waits[agent.id] = checked.wait_seconds
            if checked.problem and checked.problem not in self._problems:
                log.warning("%s", checked.problem)
                self._problems.add(checked.problem)
        return waits

    def _enforce(self, specs: Mapping[str, LogSpec], alive: set[str]) -> None:
        assert self._rotator is not None
        assert self._paths is not None
        for name in logfiles.fleets(self._paths):  # those of fleets that are gone too, or they would stay for ever
            self._rotator.enforce_total(name, specs.get(name, LogSpec()), alive)

    async def _in_thread(self, work: Callable[..., T], *values: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)


def _autoscaled(fleet: Fleet) -> bool:
    return fleet.spec.autoscaling.enabled and not fleet.wish.down
