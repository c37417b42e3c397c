"""What the scaling rule has to know of the past, as plain values that can be written down: windows and cooldowns outlive the daemon."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from fleetctl.models import to_json

# The time of day is set now and then; a jump beyond this means another boot.
_CLOCKS_AGREE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A growth that has yet to prove that it lowers the metric that asked for it."""

    metric: str
    before: int
    after: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the rule has to know of the past; `to_json` and `from_json` carry it over the daemon's death.

    `wishes`: of the down window, each larger than all that follow, so the first is the largest. `last_wish`: of the last tick; `peak`:
    a larger one since. `moves`: changes of the last periods of the rates. `futile`: metrics without a vote for growth, and since when.
    `shrunk_at`: the last shrink that no growth has followed yet; `regretted`: the one before was a mistake.
    """

    tick_at: float | None = None
    grown_at: float | None = None
    changed_at: float | None = None
    replicas: int | None = None
    last_wish: int | None = None
    shrunk_at: float | None = None
    regretted: bool = False
    peak: int = 0
    wishes: tuple[tuple[float, int], ...] = ()
    moves: tuple[tuple[float, int], ...] = ()
    failed_ticks: int = 0
    growths: tuple[Growth, ...] = ()
    futile: tuple[tuple[str, float], ...] = ()
    idle_since: float | None = None

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        pairs = {name: [list(pair) for pair in getattr(self, name)] for name in ("wishes", "moves", "futile")}
        data: dict[str, Any] = to_json(self)
        return {**data, **pairs, "growths": [to_json(growth) for growth in self.growths]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Memory":
        """The memory that `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            tick_at=_time(data["tick_at"]),
            grown_at=_time(data["grown_at"]),
            changed_at=_time(data["changed_at"]),
            idle_since=_time(data["idle_since"]),
            shrunk_at=_time(data["shrunk_at"]),
            replicas=_count(data["replicas"]),
            last_wish=_count(data["last_wish"]),
            regretted=bool(data["regretted"]),
            peak=int(data["peak"]),
            failed_ticks=int(data["failed_ticks"]),
            wishes=tuple((_finite(at), int(wish)) for at, wish in data["wishes"]),
            moves=tuple((_finite(at), int(delta)) for at, delta in data["moves"]),
            futile=tuple((str(metric), _finite(at)) for metric, at in data["futile"]),
            growths=tuple(
                Growth(metric=str(one["metric"]), before=int(one["before"]), after=int(one["after"]), value=_finite(one["value"]))
                for one in data["growths"]
            ),
        )


def started(now: float, replicas: int) -> Memory:
    """The memory of a fleet whose size was set just now: its first shrink waits for a whole window."""
    return Memory(replicas=replicas, changed_at=now, wishes=((now, replicas),))


def _finite(value: Any) -> float:  # Any: JSON values
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"not a time: {value}")
    return number


def _time(value: Any) -> float | None:  # Any: JSON values
    return None if value is None else _finite(value)


def _count(value: Any) -> int | None:  # Any: JSON values
    return None if value is None else int(value)


def not_after(memory: Memory, now: float) -> Memory:
    """The memory with what would lie in the future moved to now, or a cooldown could last as long as the clock was set back."""
    return _with_times(memory, lambda at: min(at, now))


def carried_over(memory: Memory, clock: float, at: float, *, now: float, wall: float) -> Memory:
    """The memory that was written at this time of its clock and of the day, for use now, perhaps after a reboot that set the clock to 0.

    By the time of day where the two disagree: over a reboot nothing else tells how long the machine was off.
    """
    away = max(0.0, wall - at)
    shift = now - away - clock
    agree = now - clock >= 0 and abs(shift) < _CLOCKS_AGREE_SECONDS
    return not_after(memory if agree else _with_times(memory, lambda at: at + shift), now)


def _with_times(memory: Memory, change: Callable[[float], float]) -> Memory:
    def maybe(at: float | None) -> float | None:
        return None if at is None else change(at)

    return replace(
        memory,
        tick_at=maybe(memory.tick_at),
        grown_at=maybe(memory.grown_at),
        changed_at=maybe(memory.changed_at),
        idle_since=maybe(memory.idle_since),
        shrunk_at=maybe(memory.shrunk_at),
        wishes=tuple((change(at), wish) for at, wish in memory.wishes),
        moves=tuple((change(at), delta) for at, delta in memory.moves),
        futile=tuple((metric, change(at)) for metric, at in memory.futile),
    )
