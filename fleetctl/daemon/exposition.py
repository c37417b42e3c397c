"""Prometheus' text format, and the one kind of metric that has to be kept: a histogram.

No library: everything else that is told is a number the daemon holds anyway and reads off when it is asked, which leaves these lines of
formatting. `prometheus_client` would add a registry beside our own state, a thread, and a third to the daemon's start.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A metric with its samples: what each adds to the name, its labels and its value."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[tuple[str, Labels, float]]


def gauge(name: str, help: str, *samples: tuple[Labels, float | None]) -> Family:
    return _plain(name, "gauge", help, samples)


def counter(name: str, help: str, *samples: tuple[Labels, float | None]) -> Family:
    return _plain(name, "counter", help, samples)


def _plain(name: str, kind: Literal["counter", "gauge"], help: str, samples: Iterable[tuple[Labels, float | None]]) -> Family:
    """A value that is None is not known, and so no sample."""
    return Family(name=name, kind=kind, help=help, samples=[("", labels, value) for labels, value in samples if value is not None])


@dataclass(slots=True)
class Histogram:
    """How often something took how long. `bounds`: the upper ends of the buckets, in seconds, ascending."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self, labels: Labels) -> list[tuple[str, Labels, float]]:
        """Cumulative, as the format wants it."""
        reached, told = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            reached += count
            told.append(("_bucket", {**labels, "le": _number(bound)}, float(reached)))
        return [*told, ("_sum", labels, self.total), ("_count", labels, float(reached))]


def render(families: Iterable[Family]) -> str:
    """The text; a family without samples says nothing."""
    return "".join(_text(family) for family in families if family.samples)


def _text(family: Family) -> str:
    help = family.help.replace("\\", r"\\").replace("\n", r"\n")
    head = f"# HELP {family.name} {help}\n# TYPE {family.name} {family.kind}\n"
    return head + "".join(f"{family.name}{suffix}{_labels(labels)} {_number(value)}\n" for suffix, labels, value in family.samples)


def _labels(labels: Labels) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    # Half a character, as undecodable file names have it, cannot be sent.
    sound = value.encode("utf-8", "replace").decode()
    return sound.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
