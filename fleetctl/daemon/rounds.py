"""What the daemon does by the clock: measure the agents, cut their logs, let go of fleets that are gone.

The work happens in one worker thread, so that a slow disk delays no exit and no request.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fleetctl.daemon.control import Control
from fleetctl.errors import StateDirectoryError
from fleetctl.host import logfiles, rotation
from fleetctl.host.metrics import LocalResourceManager
from fleetctl.host.state import DirectoryLock
from fleetctl.models import Agent, LogSpec, ProcessRef, Usage

log = logging.getLogger(__name__)
T = TypeVar("T")

METRICS_INTERVAL_SECONDS = 5.0
SOON_SECONDS = 1.0
DISK_RETRY_SECONDS = 1.0


class Rounds:
    """Create it in the running loop and `run` it as a task."""

    def __init__(self, control: Control, lock: DirectoryLock) -> None:
        self._control, self._lock = control, lock
        self._resources = LocalResourceManager()
        self._rotator = rotation.Rotator(control.paths)
        self._thread = ThreadPoolExecutor(1, "rounds")
        self._problems: set[str] = set()

    async def run(self) -> None:
        """Until cancelled. A round that breaks is reported and tried again: the agents are looked after without it."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._measure, self._cut_logs, self._let_go):
                    group.create_task(self._again_and_again(work))
        finally:
            self._thread.shutdown(wait=False)
            self._resources.close()

    async def _again_and_again(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                log.exception("a round broke; the next one is in %g s", METRICS_INTERVAL_SECONDS)
                await asyncio.sleep(METRICS_INTERVAL_SECONDS)

    async def _measure(self) -> None:
        while True:
            if not self._lock.is_ours():
                log.critical(
                    "the state directory was removed or replaced; the daemon ends before a second one fights with it, the agents run on"
                )
                self._control.shutdown("keep")
            leaders = self._leaders()
            suspended = self._control.warm_instances()
            usage = await self._in_thread(self._resources.sample, leaders)
            self._control.lifecycle.remember(self._resources.trees)
            self._control.measured(usage, suspended)
            await self._until_next_measurement(leaders, usage)

    async def _until_next_measurement(self, leaders: Mapping[str, ProcessRef], usage: Mapping[str, Usage]) -> None:
        """The interval, or a second where an agent is new: a percentage takes two looks, and people watch what they just started."""
        if any(one.cpu_percent is None for one in usage.values()):
            await asyncio.sleep(SOON_SECONDS)
            return
        clock = asyncio.get_running_loop().time
        due = clock() + METRICS_INTERVAL_SECONDS
        while (left := due - clock()) > 0:
            await self._control.wait_change(left)
            if self._leaders().items() - leaders.items():
                await asyncio.sleep(min(SOON_SECONDS, max(0.0, due - clock())))
                return

    def _leaders(self) -> dict[str, ProcessRef]:
        return {agent.id: agent.process for agent in self._control.agents() if agent.process and not agent.leader_exit}

    async def _cut_logs(self) -> None:
        """Each log as often as it needs: one that fills up fast sooner than the others."""
        due: dict[str, float] = {}
        clock = asyncio.get_running_loop().time
        while True:
            now = clock()
            agents = self._control.agents()
            due = {agent.id: due.get(agent.id, now) for agent in agents}
            specs = {name: fleet.spec.logs for name, fleet in self._control.fleets.items()}
            waiting = [agent for agent in agents if due[agent.id] <= now]
            for agent_id, wait in (await self._in_thread(self._rotate, waiting, specs)).items():
                due[agent_id] = now + wait
            await self._in_thread(self._enforce, specs, {agent.id for agent in agents})
            await asyncio.sleep(min([rotation.LONGEST_WAIT_SECONDS, *(at - clock() for at in due.values())]))

    def _rotate(self, agents: Sequence[Agent], specs: Mapping[str, LogSpec]) -> dict[str, float]:
        waits = {}
        for agent in agents:
            checked = self._rotator.rotate(agent.fleet, agent.id, specs[agent.fleet])
            waits[agent.id] = checked.wait_seconds
            if checked.problem and checked.problem not in self._problems:
                log.warning("%s", checked.problem)
                self._problems.add(checked.problem)
        return waits

    def _enforce(self, specs: Mapping[str, LogSpec], alive: set[str]) -> None:
        for name in logfiles.fleets(self._control.paths):  # those of fleets that are gone too, or they would stay for ever
            self._rotator.enforce_total(name, specs.get(name, LogSpec()), alive)

    async def _let_go(self) -> None:
        while True:
            await self._control.downed.wait()
            self._control.downed.clear()
            try:
                await self._control.remove_downed()
            except StateDirectoryError as error:
                log.error("%s", error)
                await asyncio.sleep(DISK_RETRY_SECONDS)
                self._control.downed.set()

    async def _in_thread(self, work: Callable[..., T], *values: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)
