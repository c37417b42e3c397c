"""Probes the agents of one fleet: who is asked, one task for each probe of each process, and whom to tell what came of it.

When to ask and what the answers amount to is `core/probing`'s to say; how to ask is the prober's. Suspended and draining agents are not
asked: the first cannot answer, the others need not.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fleetctl.core import probing
from fleetctl.core.probing import Pace, ProbeState
from fleetctl.models import Agent, AgentState, FleetSpec, LivenessSpec, Probe, ProbeOutcome, ProcessRef, ReadinessSpec
from fleetctl.ports import Clock, Prober

log = logging.getLogger(__name__)

Outcome = Callable[[str, ProcessRef, ProbeOutcome, str], None]


@dataclass(frozen=True, slots=True)
class _Round:
    """One probe of one process, over and over. Another probe or pace, or another stage of the agent's life, is another round."""

    agent_id: str
    process: ProcessRef
    starting: bool
    probe: Probe
    pace: Pace


class Probing:
    """Keeps a task for each probe that is due now and then. Create it in a running loop, `update` it, and `close` it at the end."""

    def __init__(self, prober: Prober, clock: Clock, on_outcome: Outcome, *, random_source: random.Random | None = None) -> None:
        self._prober, self._clock, self._on_outcome = prober, clock, on_outcome
        self._random = random_source or random.Random()
        self._tasks: dict[_Round, asyncio.Task[None]] = {}

    def update(self, spec: FleetSpec, agents: Iterable[Agent]) -> None:
        """Probe what these agents need to be probed with, and nothing else."""
        if not self._tasks and not spec.readiness.probed and not spec.liveness.probed:
            return
        wanted = {one: agent for agent in agents for one in _rounds(spec, agent)}
        for one in self._tasks.keys() - wanted.keys():
            self._tasks.pop(one).cancel()
        for one in wanted.keys() - self._tasks.keys():
            self._start(one, wanted[one], spec)

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, one: _Round, agent: Agent, spec: FleetSpec) -> None:
        now = self._clock.monotonic()
        if one.starting:
            state = probing.starting(one.pace, now)
        else:
            # Jitter, so that a fleet that became ready, or was adopted, at once is not asked at once for ever.
            wait = one.pace.interval_seconds * (1 - 0.2 * self._random.random())
            state = probing.running(one.pace, now, ready=agent.ready or one.pace.fatal, wait_seconds=wait)
        task = asyncio.create_task(self._run(one, state, agent, spec), name=f"probe {one.agent_id}")
        task.add_done_callback(_log_failure)
        self._tasks[one] = task

    async def _run(self, one: _Round, state: ProbeState, agent: Agent, spec: FleetSpec) -> None:
        while True:
            await asyncio.sleep(max(0.0, state.next_at - self._clock.monotonic()))
            trouble = await self._prober.check(one.probe, agent, spec, timeout_seconds=state.timeout_seconds)
            state, news = probing.after(one.pace, state, passed=trouble is None, now=self._clock.monotonic())
            if news is not None:
                self._on_outcome(one.agent_id, one.process, news, trouble or "")
            if one.starting and not state.starting:
                return  # it has passed; what follows begins when the agent is ready


def _rounds(spec: FleetSpec, agent: Agent) -> Iterator[_Round]:
    """The probes that this agent needs now."""
    if agent.process is None or agent.leader_exit:
        return
    if agent.state is AgentState.STARTING and spec.readiness.probed:
        yield _Round(agent.id, agent.process, True, spec.readiness.probe, _pace(spec.readiness))
    if agent.state is AgentState.RUNNING and not agent.pooled and not agent.resume_owed:
        if spec.readiness.probed:
            yield _Round(agent.id, agent.process, False, spec.readiness.probe, _pace(spec.readiness))
        if spec.liveness.probed:
            yield _Round(agent.id, agent.process, False, spec.liveness.probe, _pace(spec.liveness))


def _pace(spec: ReadinessSpec | LivenessSpec) -> Pace:
    return Pace(
        interval_seconds=spec.interval_seconds,
        timeout_seconds=spec.timeout_seconds,
        failure_threshold=spec.failure_threshold,
        fatal=isinstance(spec, LivenessSpec),
    )


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("%s broke", task.get_name(), exc_info=error)
