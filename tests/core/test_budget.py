"""What a fleet has spent, and when that is all it may."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetctl.core.budget import Spending, Spent, beginning, ending, from_json, heard, to_json, turned, used_up
from fleetctl.models import BudgetPeriod, BudgetSpec, ProcessRef

P = BudgetPeriod
ONE, TWO = (ProcessRef(pid=pid, start_ticks=7, boot_id="b") for pid in (1, 2))


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_totals_are_counted_once_and_begin_at_0_with_each_process() -> None:
    spending = Spending()
    for process, tokens, cost in [
        (ONE, (10, 1), None),
        (ONE, (10, 1), 0.5),
        (ONE, (15, 2), None),
        (TWO, (3, 0), 0.25),
        (None, (4, 0), None),  # its last word, heard after its end
        (TWO, (1, 0), None),  # begun anew in the same process
    ]:
        spending = heard(spending, "a", process, tokens, cost)
    assert spending.period == spending.ever == Spent(taken=15 + 4 + 1, given=2, cost=0.75)
    assert heard(spending, "nobody", None, (9, 9), 9.0) is spending
    assert heard(spending, "a", TWO, (1, 0), None) is spending


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 1000)), max_size=50))
def test_whatever_order_agents_speak_in_their_growth_adds_up(words: list[tuple[str, int, int]]) -> None:
    spending, totals = Spending(), dict[tuple[str, int], int]()
    for agent_id, life, more in words:
        if any(other > life for name, other in totals if name == agent_id):
            continue  # no process speaks after its successor
        totals[agent_id, life] = totals.get((agent_id, life), 0) + more
        process = ProcessRef(pid=life + 1, start_ticks=0, boot_id="b")
        spending = from_json(to_json(heard(spending, agent_id, process, (totals[agent_id, life], 0), None)))
    assert spending.ever.taken == sum(totals.values())


@pytest.mark.parametrize(
    ("period", "now", "begins", "ends"),
    [
        (P.HOUR, "2026-01-31T23:59:59.9", "2026-01-31T23:00", "2026-02-01T00:00"),
        (P.DAY, "2026-01-31T23:59:59.9", "2026-01-31", "2026-02-01"),
        (P.DAY, "2026-02-01", "2026-02-01", "2026-02-02"),
        (P.MONTH, "2026-01-31T23:59", "2026-01-01", "2026-02-01"),
        (P.MONTH, "2028-02-29T12:00", "2028-02-01", "2028-03-01"),
        (P.MONTH, "2026-12-31T12:00", "2026-12-01", "2027-01-01"),
        (P.TOTAL, "2026-12-31T12:00", "1970-01-01", None),
    ],
)
def test_periods_are_those_of_the_calendar(period: BudgetPeriod, now: str, begins: str, ends: str | None) -> None:
    assert beginning(period, at(now)) == at(begins)
    assert ending(period, at(now)) == (None if ends is None else at(ends))


def test_a_new_period_begins_at_0_and_a_clock_that_is_set_back_brings_nothing() -> None:
    day = turned(Spending(), P.DAY, at("2026-01-10T12:00"))
    day = heard(day, "a", ONE, (10, 0), None)
    assert turned(day, P.DAY, at("2026-01-10T23:59")) is day
    assert turned(day, P.DAY, at("2026-01-11")).period == Spent()
    back = turned(day, P.DAY, at("2016-01-10"))
    assert back.period == day.period
    more = heard(turned(day, P.DAY, at("2026-01-11")), "a", ONE, (12, 0), None)
    assert (more.period.taken, more.ever.taken) == (2, 12)


@pytest.mark.parametrize(
    ("budget", "spent", "reason"),
    [
        (BudgetSpec(), Spent(taken=10**12, cost=1e9), ""),
        (BudgetSpec(tokens=100), Spent(taken=60, given=39), ""),
        (BudgetSpec(tokens=1000), Spent(taken=600, given=400), "its budget of 1,000 tokens per day is used up"),
        (BudgetSpec(cost_usd=2.5), Spent(cost=2.49), ""),
        (BudgetSpec(cost_usd=2.5, tokens=1, period=P.TOTAL), Spent(taken=1, cost=2.5), "its budget of 2.5 USD in all is used up"),
    ],
)
def test_a_budget_is_used_up_when_all_of_it_is_spent(budget: BudgetSpec, spent: Spent, reason: str) -> None:
    assert used_up(budget, Spending(period=spent)) == reason
