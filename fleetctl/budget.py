"""The budget of one fleet: keeps what its agents spend, by what they say, and says when that is all they may.

It changes nothing itself: the fleet, which tells it what was heard, pauses by what it says and has it saved.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fleetctl.core.budget import Spending, Spent, ending, from_json, heard, to_json, turned, used_up
from fleetctl.core.contract import Message
from fleetctl.models import BudgetSpec, ProcessRef
from fleetctl.ports import Clock

log = logging.getLogger(__name__)

Json = dict[str, Any]  # Any: JSON values


class Budget:
    """`stored`: what `to_save` said last before the daemon ended."""

    def __init__(self, clock: Clock, stored: Mapping[str, Any] | None = None) -> None:
        self._clock = clock
        self._spending = Spending()
        self._saved = self._spending
        if stored is not None:
            try:
                self._spending = self._saved = from_json(stored)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                log.warning("what a fleet has spent cannot be read (%r); it is counted anew", error)

    def hear(self, agent_id: str, process: ProcessRef | None, message: Message) -> bool:
        """Take in what an agent said; whether that was of tokens or money. `process` None: it has ended."""
        if message.tokens is None and message.cost is None:
            return False
        self._spending = heard(self._spending, agent_id, process, message.tokens, message.cost)
        return True

    def verdict(self, spec: BudgetSpec) -> str:
        """Why the fleet is to be paused now; empty where it is not."""
        self._spending = turned(self._spending, spec.period, self._clock.time())
        return used_up(spec, self._spending)

    def reset(self) -> None:
        """Count the period anew."""
        self._spending = replace(self._spending, period=Spent())

    def keep(self, agent_ids: Collection[str]) -> None:
        """Forget the totals of all other agents' processes; what they spent stays counted."""
        said = self._spending.said
        if not said.keys() <= set(agent_ids):
            self._spending = replace(self._spending, said={name: one for name, one in said.items() if name in agent_ids})

    @property
    def ever(self) -> Spent:
        return self._spending.ever

    @property
    def unsaved(self) -> bool:
        return self._spending is not self._saved

    def to_save(self) -> tuple[Json, Spending]:
        """As JSON, and what to tell `saved` when that is on disk."""
        return to_json(self._spending), self._spending

    def saved(self, spending: Spending) -> None:
        self._saved = spending

    def status(self, spec: BudgetSpec) -> Json:
        """How it stands, for people; times are Unix seconds."""
        spent = self._spending.period
        return {
            "period": str(spec.period),
            "tokens": spent.tokens,
            "tokens_in": spent.taken,
            "tokens_out": spent.given,
            "cost_usd": round(spent.cost, 6),
            "tokens_limit": spec.tokens,
            "cost_usd_limit": spec.cost_usd,
            "renewed_at": ending(spec.period, self._clock.time()),
        }
