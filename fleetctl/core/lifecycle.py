"""The moves an agent can make. Every change of state passes through `move`."""

from enum import Enum, auto

from fleetctl.models import AgentState as S


class Move(Enum):
    START = auto()
    BECOME_READY = auto()
    STOP = auto()
    RETRY_LATER = auto()
    GIVE_UP = auto()
    FINISH = auto()
    SUSPEND = auto()
    RESUME = auto()


_LIVE = (S.STARTING, S.RUNNING, S.SUSPENDED, S.DRAINING)
_AT_REST = (S.BACKOFF, S.FAILED, S.TERMINATED)

TRANSITIONS: dict[tuple[S, Move], S] = {
    (S.STARTING, Move.BECOME_READY): S.RUNNING,
    (S.RUNNING, Move.SUSPEND): S.SUSPENDED,
    (S.SUSPENDED, Move.RESUME): S.RUNNING,
    **{(state, Move.STOP): S.DRAINING for state in _LIVE},
    **{(state, Move.RETRY_LATER): S.BACKOFF for state in _LIVE},
    **{(state, Move.GIVE_UP): S.FAILED for state in _LIVE},
    **{(state, Move.FINISH): S.TERMINATED for state in (*_LIVE, *_AT_REST)},
    # A process that was ended to be replaced starts over from wherever it was.
    **{(state, Move.START): S.STARTING for state in (*_LIVE, *_AT_REST)},
}


def move(state: S, event: Move) -> S:
    """The state after the event. Raises KeyError for a move that cannot happen."""
    return TRANSITIONS[state, event]
