"""What a fleet has spent, in tokens and money, by what its agents say, and whether that is all it may."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from fleetctl.models import BudgetPeriod, BudgetSpec, ProcessRef

Json = dict[str, Any]  # Any: JSON values
T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens that agents took in and gave out, and US dollars."""

    taken: int = 0
    given: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.taken + self.given

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(taken=self.taken + other.taken, given=self.given + other.given, cost=self.cost + other.cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """`period`: since `began`, a Unix time; `ever`: since the fleet came up. `said`: totals of each agent's process, as it gave them."""

    began: float = 0.0
    period: Spent = Spent()
    ever: Spent = Spent()
    said: Mapping[str, tuple[ProcessRef, Spent]] = field(default_factory=dict)


def heard(spending: Spending, agent_id: str, process: ProcessRef | None, tokens: tuple[int, int] | None, cost: float | None) -> Spending:
    """With one more word of an agent's process; None of one that has ended, whose last word may come late.

    Totals begin at 0 with each process. One that falls has begun anew too.
    """
    known = spending.said.get(agent_id)
    if process is None:
        if known is None:
            return spending
        process = known[0]
    before = known[1] if known is not None and known[0] == process else Spent()
    now = before
    if tokens is not None:
        now = replace(now, taken=tokens[0], given=tokens[1])
    if cost is not None:
        now = replace(now, cost=cost)
    if known is not None and known == (process, now):
        return spending
    more = Spent(taken=_grown(before.taken, now.taken), given=_grown(before.given, now.given), cost=_grown(before.cost, now.cost))
    said = {**spending.said, agent_id: (process, now)}
    return replace(spending, period=spending.period + more, ever=spending.ever + more, said=said)


def _grown(before: T, now: T) -> T:
    return now - before if now >= before else now


def turned(spending: Spending, period: BudgetPeriod, wall: float) -> Spending:
    """With a new period begun, where it is time for that. A clock that is set back brings no new money."""
    began = beginning(period, wall)
    if began == spending.began:
        return spending
    return replace(spending, began=began, period=Spent() if began > spending.began else spending.period)


def beginning(period: BudgetPeriod, wall: float) -> float:
    """When the period began that is now, in UTC; 0 where there is only one."""
    now = datetime.fromtimestamp(wall, UTC)
    match period:
        case BudgetPeriod.HOUR:
            return now.replace(minute=0, second=0, microsecond=0).timestamp()
        case BudgetPeriod.DAY:
            return now.replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        case BudgetPeriod.MONTH:
            return now.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
        case BudgetPeriod.TOTAL:
            return 0.0


def ending(period: BudgetPeriod, wall: float) -> float | None:
    """When the next one begins."""
    if period is BudgetPeriod.TOTAL:
        return None
    longest = {BudgetPeriod.HOUR: timedelta(hours=1), BudgetPeriod.DAY: timedelta(days=1), BudgetPeriod.MONTH: timedelta(days=31)}[period]
    return beginning(period, beginning(period, wall) + longest.total_seconds())


def used_up(budget: BudgetSpec, spending: Spending) -> str:
    """What of the budget is used up; empty while nothing is."""
    span = "in all" if budget.period is BudgetPeriod.TOTAL else f"per {budget.period}"
    if budget.cost_usd is not None and spending.period.cost >= budget.cost_usd:
        return f"its budget of {budget.cost_usd:g} USD {span} is used up"
    if budget.tokens is not None and spending.period.tokens >= budget.tokens:
        return f"its budget of {budget.tokens:,} tokens {span} is used up"
    return ""


def to_json(spending: Spending) -> Json:
    said = {
        agent_id: [process.pid, process.start_ticks, process.boot_id, *_numbers(spent)]
        for agent_id, (process, spent) in spending.said.items()
    }
    return {"began": spending.began, "period": _numbers(spending.period), "ever": _numbers(spending.ever), "said": said}


def from_json(data: Mapping[str, Any]) -> Spending:
    """What `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    said = {
        str(agent_id): (ProcessRef(pid=int(pid), start_ticks=int(ticks), boot_id=str(boot)), _spent(rest))
        for agent_id, (pid, ticks, boot, *rest) in data["said"].items()
    }
    return Spending(began=float(data["began"]), period=_spent(data["period"]), ever=_spent(data["ever"]), said=said)


def _numbers(spent: Spent) -> list[float]:
    return [spent.taken, spent.given, spent.cost]


def _spent(numbers: Any) -> Spent:  # Any: JSON values
    taken, given, cost = numbers
    return Spent(taken=int(taken), given=int(given), cost=float(cost))
