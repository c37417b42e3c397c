"""The autoscaler of one fleet: remembers what was measured, asks the rule at each measurement, and keeps what the rule has to remember.

It decides by `core/scaling.py` and changes nothing itself: the fleet, which asks it, carries out what it says.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fleetctl.core.contract import Report
from fleetctl.core.demand import Reading
from fleetctl.core.memory import Memory, carried_over, started
from fleetctl.core.observation import (
    Counts,
    Look,
    Polled,
    count,
    custom_readings,
    host_limits,
    is_idle,
    look,
    observe,
    readings,
    sample,
)
from fleetctl.core.orders import Wish
from fleetctl.core.policy import Policy, policy_of, scheduled
from fleetctl.core.scaling import Evaluation, evaluate
from fleetctl.models import Agent, AutoscalingMode, FleetSpec, HostUsage, ProcessRef, ScalingDecision, Usage
from fleetctl.ports import Clock

log = logging.getLogger(__name__)

Json = dict[str, Any]  # Any: JSON values


@dataclass(slots=True)
class _Watched:
    """One agent as it was measured: the looks of the last window, and since when it is ready."""

    process: ProcessRef | None
    looks: deque[Look] = field(default_factory=deque)
    ready_at: float | None = None


class Autoscaler:
    """Create it, then `restore` what `to_json` said before the daemon ended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._agents: dict[str, _Watched] = {}
        self._host: HostUsage | None = None
        self._polled: Mapping[str, Polled] = {}
        self._backlog: int | None = None
        self._connected = False
        self._taken = (0.0, 0.0)  # when the measurements before the last and the last were
        self._reports: Mapping[str, Report] = {}
        self._memory: Memory | None = None
        self._policy: tuple[FleetSpec, int, Policy] | None = None
        self._recommended: int | None = None
        self._measured = asyncio.Event()
        self._unsaved = False
        self._samples: list[Json] = []
        self._resting = "it waits for the first measurement"
        self.last: Evaluation | None = None
        """What the rule said last; None before it was asked, and while it rests."""
        self.scale_ups = self.scale_downs = 0

    def restore(self, stored: Mapping[str, Any] | None) -> None:
        """Remember what was written last; unless it started anew meanwhile."""
        if stored is None or self._unsaved:
            return
        try:
            clock, at = float(stored["clock"]), float(stored["at"])
            memory = Memory.from_json(stored["memory"]) if stored["memory"] is not None else None
            self.scale_ups, self.scale_downs = int(stored["scale_ups"]), int(stored["scale_downs"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            log.warning("what the autoscaler remembers cannot be read (%r); it starts anew", error)
            return
        if memory is not None:
            self._memory = carried_over(memory, clock, at, now=self._clock.monotonic(), wall=self._clock.time())

    def to_json(self) -> Json:
        return {
            "memory": self._memory.to_json() if self._memory else None,
            "clock": self._clock.monotonic(),
            "at": self._clock.time(),
            "scale_ups": self.scale_ups,
            "scale_downs": self.scale_downs,
        }

    def forget(self) -> None:
        """Start anew: what was before tells nothing about what is to come."""
        self._memory, self.last, self._recommended, self._unsaved = None, None, None, True
        self.scale_ups = self.scale_downs = 0
        self._resting = "it waits for the first measurement"

    def take(
        self,
        spec: FleetSpec,
        agents: Iterable[Agent],
        usage: Mapping[str, Usage],
        host: HostUsage | None,
        reports: Mapping[str, Report],
        *,
        polled: Mapping[str, Polled] | None = None,
        backlog: int | None = None,
        connected: bool = False,
    ) -> None:
        """Remember one measurement. `polled`: what sources outside of the agents said; `backlog`: connections that no agent has taken;
        `connected`: there are some, taken or not, or were since the last measurement.
        """
        now = self._clock.monotonic()
        first = not self._agents
        watched: dict[str, _Watched] = {}
        for agent in agents:
            if agent.process is None or agent.leaving or agent.pooled:
                continue
            one = self._agents.get(agent.id)
            if one is None or one.process != agent.process:
                one = _Watched(agent.process)
            if not agent.ready:
                one.ready_at = None
            elif one.ready_at is None:
                # At the first measurement of all they may have been ready for long: those that are new then are young.
                one.ready_at = agent.started_clock if first and agent.started_clock is not None else now
            if (seen := usage.get(agent.id)) is not None:
                self._add(one, seen, spec, now, host)
            watched[agent.id] = one
        self._agents, self._host, self._reports = watched, host, reports
        self._polled, self._backlog, self._connected = polled or {}, backlog, connected
        self._taken = self._taken[1], now
        self._measured.set()

    def called(self, backlog: int) -> None:
        """So many connections wait, and the fleet has nobody to take them: decide now."""
        self._backlog, self._connected = backlog, True
        self._measured.set()

    def _add(self, one: _Watched, seen: Usage, spec: FleetSpec, now: float, host: HostUsage | None) -> None:
        wanted = spec.autoscaling
        before = one.looks[-1].at if one.looks else now - wanted.metrics_interval_seconds
        if now <= before:
            return
        one.looks.append(look(seen, spec.resource_limits, at=now, seconds=now - before, host=host))
        while len(one.looks) > 1 and one.looks[0].at <= now - wanted.window_seconds:
            one.looks.popleft()

    async def wait_measured(self) -> None:
        """Return at the next measurement, at once where one came since the last return."""
        await self._measured.wait()
        self._measured.clear()

    def evaluate(self, wish: Wish, agents: Iterable[Agent]) -> Evaluation | None:
        """What to do now, by all that was measured; None while there is nothing to decide. If it `acts`, it has to be carried out."""
        if not wish.replicas and self._policy_of(wish.spec).min_replicas and not wish.wakes:
            # As in Kubernetes: none at all is a wish of its own, and not one to be overruled.
            self.last, self._resting = None, "it rests, because the fleet is scaled to 0"
            return None
        now, wall = self._clock.monotonic(), self._clock.time()
        policy = self._policy_of(wish.spec)
        if self._memory is None:
            self._memory = started(now, wish.replicas)
        counts = count(wish.replicas, agents, wall=wall)
        known = [(one, self._agents[one.id]) for one in counts.working if one.id in self._agents and self._agents[one.id].looks]
        metrics = wish.spec.autoscaling.metrics
        gauges = {name: metric.agents for name, metric in metrics.items() if metric.agents is not None}
        samples = [sample(seen.looks, self._reports.get(one.id), seen.ready_at, gauges) for one, seen in known]
        found = readings(policy, samples, now=now)
        if self._backlog is not None and wish.spec.autoscaling.target_pending is not None:
            # What waits in the sockets waits for all of them.
            inside = found["pending"].total if "pending" in found else 0.0
            found["pending"] = Reading(total=inside + self._backlog, at=now)
        working = max(0, wish.replicas - counts.blocked)
        found |= custom_readings(metrics, self._polled, found, working, now=now, window_seconds=policy.window_seconds)
        limits = host_limits(self._host, [seen.looks[-1] for _, seen in known])
        pending, idle = self._work(policy, counts, found) if policy.idle_seconds is not None else (0, False)
        seen = observe(wish.replicas, counts, found, now=now, wall=wall, host=limits, pending=pending, idle=idle)
        before = self._memory
        evaluation, self._memory = evaluate(policy, seen, before)
        self.last = evaluation
        self._unsaved = self._unsaved or self._memory != before
        if self._memory.tick_at != before.tick_at or evaluation.acts:
            self._samples.append(_recorded(evaluation, policy, counts.ready, wall))
        return evaluation

    def _work(self, policy: Policy, counts: Counts, found: Mapping[str, Reading]) -> tuple[int, bool]:
        """How many requests wait, and whether nobody has any work."""
        seen = {
            agent.id: (known.looks[-1] if (known := self._agents.get(agent.id)) and known.looks else None, self._reports.get(agent.id))
            for agent in counts.working
        }
        pending = self._backlog or 0
        return pending, is_idle(policy, counts, found, seen, connected=pending > 0 or self._connected, since=self._taken[0])

    def carried_out(self, evaluation: Evaluation) -> None:
        up = evaluation.decision.action == "scale_up"
        self.scale_ups, self.scale_downs = self.scale_ups + up, self.scale_downs + (not up)
        self._unsaved = True

    def recommends(self, evaluation: Evaluation) -> bool:
        """Whether the decision is to be told: it is not acted on, and says something else than the one told last."""
        decision = evaluation.decision
        told, self._recommended = self._recommended, decision.target_replicas
        return decision.action != "no_action" and told != decision.target_replicas

    def to_save(self) -> tuple[Json, list[Json]] | None:
        """What has to be on disk, with the samples that were not yet; None where nothing changed since."""
        if not self._unsaved and not self._samples:
            return None
        return self.to_json(), list(self._samples)

    def saved(self, samples: int) -> None:
        """What `to_save` said is on disk, with so many samples."""
        self._unsaved = False
        del self._samples[:samples]

    def status(self, wish: Wish) -> Json:
        """How it stands, for people: what was decided last and why, and when the next decision is."""
        spec, now = wish.spec, self._clock.monotonic()
        enabled, last = spec.autoscaling.enabled, self.last
        memory, interval = self._memory, spec.autoscaling_interval_seconds
        policy = self._policy_of(spec) if enabled else None
        tick = None if memory is None or memory.tick_at is None else max(0.0, memory.tick_at + interval - now)
        return {
            "enabled": enabled,
            "mode": str(spec.autoscaling.mode) if enabled else None,
            "current_replicas": wish.replicas,
            "min_replicas": policy.min_replicas if policy else spec.min_replicas,
            "max_replicas": policy.max_replicas if policy else spec.max_replicas,
            "scale_up_count": self.scale_ups,
            "scale_down_count": self.scale_downs,
            "next_decision_seconds": round(tick, 3) if enabled and last and tick is not None else None,
            "reason": None if not enabled else last.decision.reason if last else self._resting,
            "last_decision": last.to_json() if enabled and last else None,
        }

    def _policy_of(self, spec: FleetSpec) -> Policy:
        """The policy in force; looked up once a minute, for schedules begin and end with one."""
        minute = int(self._clock.time() // 60)
        if self._policy is None or self._policy[0] is not spec or self._policy[1] != minute:
            self._policy = spec, minute, policy_of(scheduled(spec, self._clock.time()))
        return self._policy[2]


def _recorded(evaluation: Evaluation, policy: Policy, ready: int, wall: float) -> Json:
    """What `history --plot` shows of one moment."""
    winner = next((one for one in evaluation.proposals if one.target.metric == evaluation.winner), None)
    return {
        "at": wall,
        "replicas": evaluation.decision.current_replicas,
        "target_replicas": evaluation.decision.target_replicas,
        "ready": ready,
        "min_replicas": policy.min_replicas,
        "max_replicas": policy.max_replicas,
        "metric": winner.target.metric if winner else None,
        "value": winner.value if winner else None,
        "load": winner.load if winner else None,
        "target": winner.target.target if winner else None,
    }


def decision_of(evaluation: Evaluation, *, recommended: bool = False) -> ScalingDecision:
    """The decision with how it came about, for the record."""
    told = evaluation.to_json()
    details = {name: told[name] for name in ("proposals", "winner", "wish", "urgent", "limits")}
    return replace(evaluation.decision, details={**details, "recommended": True} if recommended else details)


def is_recommending(spec: FleetSpec) -> bool:
    return spec.autoscaling.mode is AutoscalingMode.RECOMMEND
