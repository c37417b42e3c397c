"""The moves an agent can make: all of them, and no other."""

from itertools import product

import pytest

from fleetctl.core.lifecycle import TRANSITIONS, Move, move
from fleetctl.models import AgentState

S = AgentState
LIVE = (S.STARTING, S.RUNNING, S.SUSPENDED, S.DRAINING)
REST = (S.BACKOFF, S.FAILED, S.TERMINATED)

# One line a move: from which states, to which.
POSSIBLE = {
    Move.START: ((*LIVE, *REST), S.STARTING),
    Move.BECOME_READY: ((S.STARTING,), S.RUNNING),
    Move.SUSPEND: ((S.RUNNING,), S.SUSPENDED),
    Move.RESUME: ((S.SUSPENDED,), S.RUNNING),
    Move.STOP: (LIVE, S.DRAINING),
    Move.RETRY_LATER: (LIVE, S.BACKOFF),
    Move.GIVE_UP: (LIVE, S.FAILED),
    Move.FINISH: ((*LIVE, *REST), S.TERMINATED),
}


@pytest.mark.parametrize(("state", "event"), list(product(AgentState, Move)))
def test_every_move_is_either_in_the_table_or_impossible(state: AgentState, event: Move) -> None:
    states, target = POSSIBLE[event]
    if state in states:
        assert move(state, event) is target
    else:
        with pytest.raises(KeyError):
            move(state, event)


def test_the_table_holds_nothing_else() -> None:
    assert len(TRANSITIONS) == sum(len(states) for states, _ in POSSIBLE.values())
