"""A load trace: how many requests arrived when. Reads the two-column CSV `seconds,requests`, and cuts it into steps of the same length.

Each line says when a bin begins and how many requests arrived in it; a bin lasts until the next one, the last as long as the one before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fleetctl.errors import UsageError

MOST_ROWS = 5_000_000
MOST_SECONDS = 400 * 86400.0
MOST_REQUESTS = 1e12
ONLY_BIN_SECONDS = 60.0
FORMAT = "a trace has lines such as `30,132`: the second a bin begins, the requests in it"


@dataclass(frozen=True, slots=True)
class Bin:
    begin: float
    end: float
    requests: float


def parse(lines: Iterable[str], name: str) -> list[Bin]:
    """The bins of a trace, from second 0. Raises UsageError that names the line and what is wrong there."""
    starts: list[float] = []
    counts: list[float] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (not starts and _is_header(line)):
            continue
        if len(starts) >= MOST_ROWS:
            raise _bad(name, number, f"more than {MOST_ROWS:,} rows")
        begin, requests = _row(line, name, number)
        if starts and begin <= starts[-1]:
            raise _bad(name, number, f"second {begin:g} comes after second {starts[-1]:g}: the times must grow from line to line")
        if starts and begin - starts[0] > MOST_SECONDS:
            raise _bad(name, number, f"second {begin:g} is more than {MOST_SECONDS / 86400:g} days after the first line")
        starts.append(begin)
        counts.append(requests)
    if not starts:
        raise UsageError(f"{name}: no rows in it", hint=FORMAT)
    return _bins(starts, counts)


def steps(bins: Sequence[Bin], seconds: float, factor: float = 1.0, chance: Iterator[float] | None = None) -> list[float]:
    """Requests in each step of this length. They arrive evenly within a bin, or at chance: from numbers in [0, 1), pairs for each step.

    With chance a bin keeps its number of requests; what varies is where in it they fall.
    """
    counts = _even(bins, seconds, factor)
    return counts if chance is None else _scattered(bins, counts, seconds, chance)


def _even(bins: Sequence[Bin], seconds: float, factor: float) -> list[float]:
    counts = [0.0] * max(1, round(bins[-1].end / seconds + 0.499999))
    for one in bins:
        rate, at = factor * one.requests / (one.end - one.begin), one.begin
        step = int(at / seconds)
        while at < one.end - 1e-9 and step < len(counts):
            upto = min(one.end, (step + 1) * seconds)
            counts[step] += rate * (upto - at)
            at, step = upto, step + 1
    return counts


def _scattered(bins: Sequence[Bin], counts: list[float], seconds: float, chance: Iterator[float]) -> list[float]:
    """Deal the requests of the steps within each bin anew, with the spread of requests that know nothing of each other."""
    scattered, begin = list(counts), 0
    for one in bins:
        end = min(len(counts), max(begin, int(one.end / seconds + 1e-9)))
        part = counts[begin:end]
        if len(part) > 1 and sum(part) > 0:
            rough = [max(0.0, count + count**0.5 * _normal(chance)) for count in part]
            total = sum(rough)
            scattered[begin:end] = [count * sum(part) / total for count in rough] if total else part
        begin = end
    return scattered


def _normal(chance: Iterator[float]) -> float:
    """About normal: the sum of twelve numbers, evenly from [0, 1), has a variance of one."""
    return sum(next(chance) for _ in range(12)) - 6.0


def _bins(starts: Sequence[float], counts: Sequence[float]) -> list[Bin]:
    last = starts[-1] - starts[-2] if len(starts) > 1 else ONLY_BIN_SECONDS
    edges = [start - starts[0] for start in starts] + [starts[-1] - starts[0] + last]
    return [Bin(begin, end, count) for begin, end, count in zip(edges, edges[1:], counts, strict=False)]


def _is_header(line: str) -> bool:
    """A first line of words, none of them a number."""
    cells = [cell.strip().strip('"') for cell in line.lstrip("\ufeff").split(",")]
    return len(cells) == 2 and all(cell[:1].isalpha() and _number(cell) is None for cell in cells)


def _row(line: str, name: str, number: int) -> tuple[float, float]:
    cells = [cell.strip().strip('"') for cell in line.lstrip("\ufeff").split(",")]
    if len(cells) != 2:
        raise _bad(name, number, f"{len(cells)} column{'s' * (len(cells) != 1)} instead of the two `seconds,requests`: {_shown(line)}")
    begin, requests = (_number(cell) for cell in cells)
    if begin is None or requests is None:
        raise _bad(name, number, f"{_shown(cells[0] if begin is None else cells[1])} is not a number")
    if not -1e15 < begin < 1e15:
        raise _bad(name, number, f"{_shown(cells[0])} is no time in seconds")
    if requests < 0:
        raise _bad(name, number, f"{_shown(cells[1])} requests: a count cannot be negative")
    if not requests <= MOST_REQUESTS:
        raise _bad(name, number, f"{_shown(cells[1])} requests are more than {MOST_REQUESTS:g}")
    return begin, requests


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if value != value or "_" in text else value


def _shown(text: str) -> str:
    """What stands there, short and without control characters."""
    clean = "".join(char if char.isprintable() else "?" for char in text.strip())
    return repr(clean if len(clean) <= 40 else f"{clean[:37]}...")


def _bad(name: str, number: int, what: str) -> UsageError:
    return UsageError(
        f"{name} line {number}: {what}", hint="a trace has lines such as `30,132`: the second a bin begins, the requests in it"
    )
