"""What the daemon does by the clock: measure the agents, cut their logs, let go of fleets that are gone.

The work happens in one worker thread, so that a slow disk delays no exit and no request.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fleetctl.daemon.control import Control
from fleetctl.errors import StateDirectoryError
from fleetctl.host import logs
from fleetctl.host.metrics import LocalResourceManager
from fleetctl.models import Agent, LogSpec

log = logging.getLogger(__name__)
T = TypeVar("T")

METRICS_INTERVAL_SECONDS = 5.0
DISK_RETRY_SECONDS = 1.0


class Rounds:
    """Create it in the running loop and `run` it as a task."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._resources = LocalResourceManager()
        self._rotator = logs.Rotator(control.paths)
        self._thread = ThreadPoolExecutor(1, "rounds")
        self._problems: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._measure())
                group.create_task(self._cut_logs())
                group.create_task(self._let_go())
        finally:
            self._thread.shutdown(wait=False)

    async def _measure(self) -> None:
        while True:
            leaders = {agent.id: agent.process for agent in self._control.agents() if agent.process and not agent.leader_exit}
            self._control.measured(await self._in_thread(self._resources.sample, leaders))
            await asyncio.sleep(METRICS_INTERVAL_SECONDS)

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
            await asyncio.sleep(min([logs.LONGEST_WAIT_SECONDS, *(at - clock() for at in due.values())]))

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
        for name, spec in specs.items():
            self._rotator.enforce_total(name, spec, alive)

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
