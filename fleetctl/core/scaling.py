"""How many replicas a fleet should have: `evaluate(policy, observation, memory)`, one pure function with time as an input.

The daemon's tick, `FleetManager.evaluate_scaling`, `explain` and `simulate` all call it, so what is simulated is what runs.
What each metric asks for comes from `core/demand.py`; here the proposals become one wish, and the wish a move or a reason to wait.

The caller applies a decision whose `acts` is true before it asks again. A number of replicas that differs from the last decision's
was changed by somebody else, and counts as a change like our own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import floor, inf, isfinite
from typing import Any

from fleetctl.core.demand import Proposal, Target, propose
from fleetctl.core.memory import Growth, Memory, not_after
from fleetctl.core.policy import Host, Observation, Policy, Rate
from fleetctl.models import FallbackBehavior, ScalingDecision, to_json

HOST_OVERCOMMIT = 1.25
PRESSURE_PERCENT = 10.0
FUTILE_SECONDS = 600.0
# A growth so soon after a shrink, in down windows, means that the shrink was a mistake. Longer saves more reversals, and costs more
# replica-hours on loads that come and go.
REGRET_WINDOWS = 1
AT_ZERO = "at zero, waiting for a request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What held a move back or made it smaller; `seconds_left` where time alone lifts it."""

    kind: str
    text: str
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A decision and how it came about. `wish`: what the metrics ask for within bounds and host; `acts`: the decision is to be applied."""

    decision: ScalingDecision
    proposals: tuple[Proposal, ...]
    winner: str | None
    wish: int
    urgent: bool
    limits: tuple[Limit, ...]
    acts: bool

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        return {
            **to_json(self.decision),
            "proposals": [proposal.to_json() for proposal in self.proposals],
            "winner": self.winner,
            "wish": self.wish,
            "urgent": self.urgent,
            "limits": [to_json(limit) for limit in self.limits],
            "acts": self.acts,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What is wished for on the way to a decision, why, and what has cut it down so far."""

    replicas: int
    reason: str
    winner: str | None = None
    urgent: bool = False
    limits: tuple[Limit, ...] = ()

    def cut(self, replicas: int, kind: str, text: str) -> "_Wish":
        return replace(self, replicas=replicas, limits=(*self.limits, Limit(kind=kind, text=text)))


def evaluate(policy: Policy, seen: Observation, memory: Memory) -> tuple[Evaluation, Memory]:
    """Decide on the size of a fleet now; the decision with its explanation, and what to remember for the next time."""
    memory = _notice(policy, seen, memory)
    if (bound := _outside(policy, seen)) is not None:
        return _decide(policy, seen, memory, bound, (), bound.replicas, ())
    tick = _is_tick(policy, seen, memory)
    working = max(0, seen.replicas - seen.blocked)
    max_age = 2 * policy.window_seconds
    proposals = tuple(
        propose(one, seen.readings.get(one.metric), working, now=seen.now, max_age_seconds=max_age) for one in _measurable(policy, seen)
    )
    if tick:
        memory = _at_tick(policy, seen, memory, proposals)
    if memory.futile:
        proposals = tuple(_without_futile(proposal, working, memory) for proposal in proposals)
    wish = _guarded(policy, seen, _clipped(policy, seen, memory, _combined(policy, seen, memory, proposals)))
    last_wish, memory = memory.last_wish, _remember(policy, seen, memory, wish.replicas, tick)
    if wish.replicas > seen.replicas:
        target, limits = _growth(policy, seen, memory, wish, last_wish if tick else seen.replicas)
    elif wish.replicas < seen.replicas:
        target, limits = _shrinkage(policy, seen, memory, wish, tick)
    else:
        target, limits = seen.replicas, ()
    return _decide(policy, seen, memory, wish, proposals, target, limits)


def _notice(policy: Policy, seen: Observation, memory: Memory) -> Memory:
    """Take in what happened since the last time: a size that somebody else set, a clock that was set back, work or none."""
    now, moved = seen.now, memory.replicas is not None and memory.replicas != seen.replicas
    if moved and memory.replicas is not None:
        delta = seen.replicas - memory.replicas
        memory = replace(
            memory, changed_at=now, grown_at=now if delta > 0 else memory.grown_at, moves=(*memory.moves, (now, delta)), growths=()
        )
    if memory.replicas != seen.replicas:
        memory = replace(memory, replicas=seen.replicas)
    if memory.tick_at is not None and memory.tick_at > now:
        memory = not_after(memory, now)
    # Whoever sets another size gets the whole time without work anew.
    resting = seen.idle and not moved
    if policy.idle_seconds is not None and resting != (memory.idle_since is not None):
        memory = replace(memory, idle_since=now if resting else None)
    return memory


def _measurable(policy: Policy, seen: Observation) -> Iterable[Target]:
    """The metrics that can be known: without any replica only those that are found outside of them."""
    if seen.replicas:
        return policy.targets
    return (one for one in policy.targets if (found := seen.readings.get(one.metric)) is not None and found.replicas is None)


def _outside(policy: Policy, seen: Observation) -> _Wish | None:
    """The bound to return to, where the fleet is outside its bounds."""
    if seen.replicas > policy.max_replicas:
        return _Wish(replicas=policy.max_replicas, reason=f"{seen.replicas} replicas are more than max_replicas {policy.max_replicas}")
    lowest = _lowest(policy, seen)
    if seen.replicas < lowest:
        reason = f"{seen.replicas} replicas are fewer than min_replicas {policy.min_replicas}"
        if not policy.min_replicas:
            pending = "1 request is" if seen.pending == 1 else f"{seen.pending} requests are"
            reason = f"{pending} pending and no replica is there"
        return _Wish(replicas=lowest, reason=reason)
    return None


def _lowest(policy: Policy, seen: Observation) -> int:
    """The fewest replicas; a fleet at zero stays there until a request comes."""
    if policy.min_replicas or seen.replicas:
        return policy.min_replicas
    return min(1, seen.pending, policy.max_replicas)


def _is_tick(policy: Policy, seen: Observation, memory: Memory) -> bool:
    """Whether a whole interval has passed, give or take half a sample: samples do not come on the dot."""
    if seen.tick or memory.tick_at is None:
        return True
    interval = policy.autoscaling_interval_seconds
    return seen.now >= memory.tick_at + interval - min(interval, policy.metrics_interval_seconds) / 2


def _at_tick(policy: Policy, seen: Observation, memory: Memory, proposals: Sequence[Proposal]) -> Memory:
    """Count failures, and judge growths that had time to work."""
    failed = memory.failed_ticks + 1 if proposals and all(proposal.error for proposal in proposals) else 0
    if failed != memory.failed_ticks:
        memory = replace(memory, failed_ticks=failed)
    return _judge(seen, memory, proposals) if memory.growths or memory.futile else memory


def _judge(seen: Observation, memory: Memory, proposals: Sequence[Proposal]) -> Memory:
    """The futility check: a metric that growth does not lower, such as memory that leaks, must not drive the fleet to its maximum."""
    values = {proposal.target.metric: proposal for proposal in proposals if not proposal.error}
    futile = {metric: at for metric, at in memory.futile if not _redeemed(values.get(metric), seen.now - at)}
    waiting = []
    for growth in memory.growths:
        found = values.get(growth.metric)
        if found is None or found.gaps or seen.starting:
            waiting.append(growth)
        elif _was_futile(growth, found):
            futile[growth.metric] = seen.now
    return replace(memory, growths=tuple(waiting), futile=tuple(futile.items()))


def _redeemed(proposal: Proposal | None, seconds: float) -> bool:
    return seconds >= FUTILE_SECONDS or (proposal is not None and proposal.value < proposal.target.target)


def _was_futile(growth: Growth, now: Proposal) -> bool:
    predicted_fall = growth.value * (1 - growth.before / growth.after)
    return now.value > now.target.target and growth.value - now.value < predicted_fall / 3


def _without_futile(proposal: Proposal, working: int, memory: Memory) -> Proposal:
    if proposal.wish <= working or not any(metric == proposal.target.metric for metric, _ in memory.futile):
        return proposal
    return replace(proposal, wish=working, futile=True)


def _combined(policy: Policy, seen: Observation, memory: Memory, proposals: Sequence[Proposal]) -> _Wish:
    """The largest proposal; blocked replicas, which are no capacity, come on top."""
    if not proposals:
        return _Wish(replicas=0, reason=_at_zero(policy))
    failed = [one for one in proposals if one.error and not (one.target.optional and one.target.metric not in seen.readings)]
    winner = None
    for one in proposals:
        if not one.error and (winner is None or _strength(one) > _strength(winner)):
            winner = one
    if winner is None:
        return _fallen_back(policy, seen, memory, failed or proposals)
    working = seen.replicas - seen.blocked
    wish = _Wish(
        replicas=winner.wish + (seen.blocked if working > 0 else 0),
        reason=winner.reason if seen.replicas else _at_zero(policy, winner),
        winner=winner.target.metric,
        urgent=winner.wish > working and (not working or any(one.urgent and not one.futile for one in proposals)),
    )
    if winner.futile:
        wish = wish.cut(wish.replicas, "futile", f"growth has not lowered {winner.target.label}")
    if failed and wish.replicas < seen.replicas:
        return wish.cut(seen.replicas, "hold", failed[0].reason)
    return wish


def _at_zero(policy: Policy, winner: Proposal | None = None) -> str:
    if winner is not None and winner.wish:
        return f"{winner.target.label} is {winner.load:g} and no replica is there"
    return AT_ZERO if policy.idle_seconds is not None else "no replica is there"


def _strength(proposal: Proposal) -> tuple[int, float]:
    return proposal.wish, proposal.value / proposal.target.target


def _fallen_back(policy: Policy, seen: Observation, memory: Memory, failed: Sequence[Proposal]) -> _Wish:
    """Without any metric: hold, and after enough ticks what the policy says."""
    reason = "; ".join(one.reason for one in failed)
    rule = policy.fallback
    if memory.failed_ticks < policy.failure_threshold or rule.behavior is FallbackBehavior.CURRENT:
        return _Wish(replicas=seen.replicas, reason=reason, limits=(Limit(kind="hold", text="no metric is available"),))
    wanted = {
        FallbackBehavior.STATIC: rule.replicas,
        FallbackBehavior.CURRENT_IF_HIGHER: max(seen.replicas, rule.replicas),
        FallbackBehavior.CURRENT_IF_LOWER: min(seen.replicas, rule.replicas),
    }[rule.behavior]
    return _Wish(replicas=wanted, reason=f"{reason}; fallback {rule.behavior.value} {rule.replicas}")


def _clipped(policy: Policy, seen: Observation, memory: Memory, wish: _Wish) -> _Wish:
    """Within the bounds; to zero only after a long time without work."""
    if wish.replicas > policy.max_replicas:
        return wish.cut(policy.max_replicas, "bound", f"max_replicas is {policy.max_replicas}")
    lowest = max(policy.min_replicas, seen.protected)
    if policy.idle_seconds is not None and memory.idle_since is not None and seen.replicas and not lowest:
        left = _left(memory.idle_since, policy.idle_seconds, seen.now)
        if left <= 0:  # whatever the metrics say: agents that do nothing use memory, and a little of the CPU
            return _Wish(replicas=0, reason=f"no work for {policy.idle_seconds:g} s")
        text = f"none is kept after {policy.idle_seconds:g} s without work"
        wish = replace(wish, limits=(*wish.limits, Limit(kind="idle", text=text, seconds_left=left)))
    if not lowest and seen.replicas:
        lowest = min(1, policy.max_replicas)
        if wish.replicas < lowest and policy.idle_seconds is not None:
            return replace(wish, replicas=lowest)  # what it waits for is said above
    if wish.replicas < lowest:
        text = f"{lowest} agents are protected" if lowest > policy.min_replicas and seen.protected else f"the minimum is {lowest}"
        return wish.cut(lowest, "bound", text)
    return wish


def _guarded(policy: Policy, seen: Observation, wish: _Wish) -> _Wish:
    """Growth only as far as the host carries it and the agents stay up; never a reason to shrink."""
    if wish.replicas <= seen.replicas:
        return wish
    if seen.crash_looping:
        return wish.cut(seen.replicas, "crash-loop", "agents crash over and over: more of them would crash too")
    if seen.host is None:
        return wish
    for most, text in _host_limits(seen.host, seen.replicas):
        if wish.replicas > max(most, seen.replicas):
            wish = wish.cut(max(most, seen.replicas), "host", text)
    return wish


def _host_limits(host: Host, replicas: int) -> Iterable[tuple[int, str]]:
    if _positive(host.cores) and _positive(host.cores_per_busy_agent):
        cores = host.cores or 0.0
        most = floor(min(HOST_OVERCOMMIT * cores / (host.cores_per_busy_agent or inf), 1e9))
        yield most, f"{cores:g} cores carry {most} agents that use {host.cores_per_busy_agent:.2f} each"
    if _positive(host.memory_per_agent) and host.available_memory is not None and isfinite(host.available_memory):
        free = max(0.0, host.available_memory - host.reserved_memory)
        room = floor(min(free / (host.memory_per_agent or inf), 1e9))
        yield replicas + room, f"free memory has room for {room} more agents"
    if host.pressure_percent is not None and host.pressure_percent > PRESSURE_PERCENT:
        yield replicas, f"the machine is short of memory: tasks stalled {host.pressure_percent:.0f}% of the last 10 s"


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < inf


def _remember(policy: Policy, seen: Observation, memory: Memory, wish: int, tick: bool) -> Memory:
    """Put the wish into the down window: at a tick the largest since the last one, else only what is larger."""
    if not tick:
        return memory if wish <= max(memory.peak, memory.last_wish or 0) else replace(memory, peak=wish)
    last_wish, wish, oldest = wish, max(wish, memory.peak), seen.now - _down_window(policy, memory)
    longest = max((rate.period_seconds for rate in (*policy.up_rates, *policy.down_rates)), default=0.0)
    return replace(
        memory,
        tick_at=seen.now,
        last_wish=last_wish,
        peak=0,
        wishes=(*(one for one in memory.wishes if one[1] > wish and one[0] > oldest), (seen.now, wish)),
        moves=tuple(move for move in memory.moves if move[0] > seen.now - longest),
    )


def _down_window(policy: Policy, memory: Memory) -> float:
    """Calm needed before shrinking: twice as long where the last shrink was regretted, which a load that comes and goes makes cheaper."""
    return policy.scale_down_stabilization_seconds * (2 if memory.regretted else 1)


def _growth(policy: Policy, seen: Observation, memory: Memory, wish: _Wish, last_wish: int | None) -> tuple[int, tuple[Limit, ...]]:
    """How far to grow now: urgent growth at any sample; other growth some time after the last, as far as two ticks in a row agree.

    `last_wish`: of the tick before, or the present size between two ticks; None where there was no tick before.
    """
    wanted = wish.replicas
    if not wish.urgent:
        left = _left(memory.grown_at, policy.scale_up_stabilization_seconds, seen.now)
        if left > 0:
            text = f"the fleet grew less than {policy.scale_up_stabilization_seconds:g} s ago"
            return seen.replicas, (Limit(kind="cooldown", text=text, seconds_left=left),)
        wanted = wanted if last_wish is None else min(wanted, last_wish)
        if wanted <= seen.replicas:
            return seen.replicas, (_until_tick(policy, seen, memory),)
    if not policy.up_rates:
        return wanted, ()
    sizes = [rate.most(_size_before(rate, seen, memory)) for rate in policy.up_rates]
    # No rate keeps a fleet at zero for ever: percent of nothing is nothing.
    most = max(min(sizes) if policy.strictest_rate else max(sizes), seen.replicas, 1)
    if wanted <= most:
        return wanted, ()
    return most, (_rate_limit(policy.up_rates, seen, memory, f"at most {most} now"),)


def _until_tick(policy: Policy, seen: Observation, memory: Memory) -> Limit:
    left = _left(memory.tick_at, policy.autoscaling_interval_seconds, seen.now)
    return Limit(kind="tick", text="the next tick decides", seconds_left=max(0.0, left))


def _shrinkage(policy: Policy, seen: Observation, memory: Memory, wish: _Wish, tick: bool) -> tuple[int, tuple[Limit, ...]]:
    """How far to shrink now: to the largest wish of the window, as fast as the rates allow, and never while one is starting."""
    # Zero is wished for only after a calm of its own, which no tick has to confirm.
    held = None if not wish.replicas else _unrest(policy, seen, memory) if tick else _until_tick(policy, seen, memory)
    if held is None and seen.starting:
        held = Limit(kind="starting", text=f"{seen.starting} replicas are still starting")
    if held is not None:
        return seen.replicas, (held,)
    target, limits = max(memory.wishes[0][1], wish.replicas) if wish.replicas else 0, []
    if policy.down_rates:
        sizes = [rate.least(_size_before(rate, seen, memory)) for rate in policy.down_rates]
        least = min(max(sizes) if policy.strictest_rate else min(sizes), seen.replicas)
        if target < least:
            target = least
            limits.append(_rate_limit(policy.down_rates, seen, memory, f"at least {least} now"))
    removable = max(0, seen.replicas - policy.min_available - seen.unavailable) if policy.min_available else seen.replicas
    if target < seen.replicas - removable:
        target = seen.replicas - removable
        limits.append(Limit(kind="budget", text=f"min_available is {policy.min_available}, {seen.unavailable} are unavailable"))
    return target, tuple(limits)


def _unrest(policy: Policy, seen: Observation, memory: Memory) -> Limit | None:
    """What speaks against shrinking: a change not long ago, or a wish as large as the fleet."""
    now, window = seen.now, _down_window(policy, memory)
    left = _left(memory.changed_at, window, now)
    if left > 0:
        return Limit(kind="cooldown", text=f"the fleet changed less than {window:g} s ago", seconds_left=left)
    largest = memory.wishes[0][1]
    if largest < seen.replicas:
        return None
    left = _left(max(at for at, one in memory.wishes if one >= seen.replicas), window, now)
    return Limit(kind="window", text=f"{largest} were needed within the last {window:g} s", seconds_left=left)


def _size_before(rate: Rate, seen: Observation, memory: Memory) -> int:
    """The fleet's size at the start of the rate's period."""
    since = seen.now - rate.period_seconds
    return max(0, seen.replicas - sum(delta for at, delta in memory.moves if at > since))


def _rate_limit(rates: Sequence[Rate], seen: Observation, memory: Memory, text: str) -> Limit:
    ends = [at + rate.period_seconds - seen.now for rate in rates for at, _ in memory.moves if at > seen.now - rate.period_seconds]
    return Limit(kind="rate", text=f"rate: {text}", seconds_left=min(ends, default=min(rate.period_seconds for rate in rates)))


def _left(since: float | None, seconds: float, now: float) -> float:
    return 0.0 if since is None else since + seconds - now


def _decide(
    policy: Policy,
    seen: Observation,
    memory: Memory,
    wish: _Wish,
    proposals: tuple[Proposal, ...],
    target: int,
    limits: tuple[Limit, ...],
) -> tuple[Evaluation, Memory]:
    """Put the decision into words, and remember it if it is going to be applied."""
    current = seen.replicas
    limits = (*wish.limits, *limits)
    reason = wish.reason
    if target == current and limits:
        reason = f"{reason}; held: {_words(limits[-1])}"
    decision = ScalingDecision(
        action="no_action" if target == current else "scale_up" if target > current else "scale_down",
        target_replicas=target,
        current_replicas=current,
        reason=reason,
        at=seen.at,
        cause="autoscaler",
    )
    acts = target != current and not policy.recommend
    evaluation = Evaluation(
        decision=decision,
        proposals=proposals,
        winner=wish.winner,
        wish=wish.replicas,
        urgent=wish.urgent,
        limits=limits,
        acts=acts,
    )
    return evaluation, _after_move(policy, seen, memory, proposals, target) if acts else memory


def _words(limit: Limit) -> str:
    return limit.text if limit.seconds_left is None else f"{limit.text} ({max(0.0, limit.seconds_left):.0f} s left)"


def _after_move(policy: Policy, seen: Observation, memory: Memory, proposals: Sequence[Proposal], target: int) -> Memory:
    delta, working = target - seen.replicas, seen.replicas - seen.blocked
    growths = tuple(
        Growth(metric=one.target.metric, before=working, after=working + delta, value=one.value)
        for one in proposals
        if one.target.checks_futility and not one.error and one.wish > working > 0 and delta > 0
    )
    shrunk_at, regretted = memory.shrunk_at, memory.regretted
    if delta > 0 and shrunk_at is not None:
        regretted = seen.now - shrunk_at < REGRET_WINDOWS * _down_window(policy, memory)
        shrunk_at = None
    elif delta < 0:
        shrunk_at = seen.now
    return replace(
        memory,
        shrunk_at=shrunk_at,
        regretted=regretted,
        replicas=target,
        changed_at=seen.now,
        grown_at=seen.now if delta > 0 else memory.grown_at,
        moves=(*memory.moves, (seen.now, delta)),
        growths=growths,
    )
