"""What agents say of themselves on the notify socket: systemd's words, and X_FLEETCTL_* beyond them (the agent contract).

`parse` reads one datagram, whatever it holds; `merge` keeps what is worth remembering of an agent's messages, in memory only.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fleetctl.models import ProcessRef

MAX_BYTES = 4096
_PREFIX = "X_FLEETCTL_"
_MOST_THINGS = 10**9  # pending, in work, slots: far beyond what one process can hold
_LARGEST_COUNTER = 2**63 - 1
_LARGEST_NUMBER = 1e15  # gauges and costs stay exact, and sums of many of them finite
_LONGEST_EXTENSION_SECONDS = 86400.0
_LATEST_TIME = 1e11
_LONGEST_TEXT, _LONGEST_TOKEN = 200, 2048
_RELOADING = "reloading"
_MOST_METRICS = 64  # of one agent, by name: an agent that makes up names costs no more memory than that
_METRIC_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}", re.ASCII)
_INTEGER = re.compile(r"[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One datagram, understood. None or False: not said. `blocked` empty: the block is over; `blocked_until`: Unix time in seconds.

    `extension`: it had at least one X_FLEETCTL_* word, so the agent knows fleetctl. `errors`: lines that were not understood, or out of
    bounds; the others count. `tokens`: in and out, cumulative, as `cost` is, in US dollars.
    """

    ready: bool = False
    status: str | None = None
    reloading: bool = False
    stopping: bool = False
    watchdog: Literal["ping", "trigger"] | None = None
    extend_timeout_seconds: float | None = None
    barrier: bool = False
    pending: int | None = None
    active: int | None = None
    slots: int | None = None
    idle: bool | None = None
    progress: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None
    cost: float | None = None
    blocked: str | None = None
    blocked_until: float | None = None
    resume: str | None = None
    checkpoint: str | None = None
    recycle: bool = False
    extension: bool = False
    errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The picture that one process of an agent gave of itself so far; None: never said. Kept in memory only.

    `moved_at`: when it last showed that it gets on with its work, `heard_at`: when anything was heard; seconds of the boot's clock.
    """

    process: ProcessRef | None = None
    heard_at: float = 0.0
    status: str = ""
    pending: int | None = None
    active: int | None = None
    slots: int | None = None
    idle: bool = False
    progress: int | None = None
    moved_at: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None
    cost: float | None = None

    @property
    def works(self) -> bool | None:
        """Whether it has something to do, as far as it said; None where it said nothing of that."""
        if self.idle or (self.active is None and self.pending is None):
            return False if self.idle else None
        return bool(self.active or self.pending)

    @property
    def at_rest(self) -> bool:
        """Whether it said that it has nothing to do: that it is idle, or that nothing is in work and nothing waits."""
        return self.idle or (self.active == 0 and self.pending == 0)

    @property
    def occupancy(self) -> float | None:
        """The part of its slots that is in work, above 1 where it took more; None where it did not say both."""
        return self.active / self.slots if self.active is not None and self.slots else None


def parse(datagram: bytes) -> Message | str:
    """What the datagram says, or why all of it is dropped. Unknown words are passed over, as systemd does.

    Of two equal ones the last counts.
    """
    if len(datagram) > MAX_BYTES:
        return f"larger than {MAX_BYTES} bytes"
    try:
        text = datagram.removesuffix(b"\0").decode()  # C programs may send the end of their string along
    except UnicodeDecodeError:
        return "not UTF-8"
    if "\0" in text:
        return "a NUL inside"
    said: dict[str, Any] = {}  # Any: each word has a type of its own, which _WORDS knows
    metrics: dict[str, float] = {}
    errors, extension = 0, False
    for line in text.split("\n"):
        word, found, value = line.partition("=")
        extension = extension or (bool(found) and word.startswith(_PREFIX))
        if not found or word not in _WORDS:
            errors += bool(line) and not found
            continue
        name, read = _WORDS[word]
        try:
            understood = read(value)
        except ValueError:
            errors += 1
            continue
        if name == "metrics":
            metrics[understood[0]] = understood[1]
        else:
            said[name] = understood
    return Message(**said, metrics=metrics, extension=extension, errors=errors)


def merge(report: Report, message: Message, now: float) -> Report:
    """The picture after one more message. What a message does not say stays as it was; whoever works is not idle."""
    known = {name: new for name in _KEPT if (new := getattr(message, name)) is not None}
    if message.status is None and (message.reloading or (message.ready and report.status == _RELOADING)):
        known["status"] = _RELOADING if message.reloading else ""
    if message.idle is None and message.active:
        known["idle"] = False
    if any(new != getattr(report, name) for name in _SHOW_PROGRESS if (new := known.get(name)) is not None):
        known["moved_at"] = now
    if message.metrics:
        metrics = {**report.metrics, **message.metrics}
        known["metrics"] = dict(list(metrics.items())[:_MOST_METRICS])
    return replace(report, heard_at=now, **known)


_KEPT = ("status", "pending", "active", "slots", "idle", "progress", "tokens", "cost")
# What changes only where work is taken, done or paid for; a queue also grows while its reader hangs, and a heartbeat goes on.
_SHOW_PROGRESS = ("progress", "active", "tokens", "cost")


def _flag(value: str) -> bool:
    if value != "1":
        raise ValueError(value)
    return True


def _truth(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(value)
    return value == "1"


def _integer(most: int, least: int = 0) -> Callable[[str], int]:
    def read(value: str) -> int:
        # Checked before int(), which also takes "1_0", "+1", " 1" and the digits of every script.
        if not _INTEGER.fullmatch(value) or not least <= int(value) <= most:
            raise ValueError(value)
        return int(value)

    return read


def _number(most: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        if not _NUMBER.fullmatch(value) or float(value) > most:  # which leaves no sign, no NaN and no infinity
            raise ValueError(value)
        return float(value)

    return read


def _text(value: str) -> str:
    """One short line that is safe to show anywhere."""
    clean = " ".join("".join(char if char.isprintable() else " " for char in value).split())
    return clean if len(clean) <= _LONGEST_TEXT else f"{clean[: _LONGEST_TEXT - 1]}…"


def _opaque(value: str) -> str:
    """Kept as it is, or not at all: changed, it would name something else."""
    if not 0 < len(value) <= _LONGEST_TOKEN or not value.isprintable():
        raise ValueError(value)
    return value


def _watchdog(value: str) -> Literal["ping", "trigger"]:
    if value not in ("1", "trigger"):
        raise ValueError(value)
    return "trigger" if value == "trigger" else "ping"


def _extension_seconds(value: str) -> float:
    return min(_integer(2**64 - 1)(value) / 1e6, _LONGEST_EXTENSION_SECONDS)


def _metric(value: str) -> tuple[str, float]:
    name, _, number = value.partition("=")
    if not _METRIC_NAME.fullmatch(name):
        raise ValueError(value)
    return name, _number(_LARGEST_NUMBER)(number)


def _tokens(value: str) -> tuple[int, int]:
    taken, _, given = value.partition(",")
    read = _integer(_LARGEST_COUNTER)
    return read(taken), read(given)


# Word on the wire -> field of Message, and how its value is read; ValueError where it is out of bounds.
_WORDS: dict[str, tuple[str, Callable[[str], Any]]] = {  # Any: as in `parse`
    "READY": ("ready", _flag),
    "STATUS": ("status", _text),
    "RELOADING": ("reloading", _flag),
    "STOPPING": ("stopping", _flag),
    "WATCHDOG": ("watchdog", _watchdog),
    "EXTEND_TIMEOUT_USEC": ("extend_timeout_seconds", _extension_seconds),
    "BARRIER": ("barrier", _flag),
    f"{_PREFIX}PENDING": ("pending", _integer(_MOST_THINGS)),
    f"{_PREFIX}ACTIVE": ("active", _integer(_MOST_THINGS)),
    f"{_PREFIX}SLOTS": ("slots", _integer(_MOST_THINGS)),
    f"{_PREFIX}IDLE": ("idle", _truth),
    f"{_PREFIX}PROGRESS": ("progress", _integer(_LARGEST_COUNTER)),
    f"{_PREFIX}METRIC": ("metrics", _metric),
    f"{_PREFIX}TOKENS": ("tokens", _tokens),
    f"{_PREFIX}COST": ("cost", _number(_LARGEST_NUMBER)),
    f"{_PREFIX}BLOCKED": ("blocked", _text),
    f"{_PREFIX}UNTIL": ("blocked_until", _number(_LATEST_TIME)),
    f"{_PREFIX}RESUME": ("resume", _opaque),
    f"{_PREFIX}CHECKPOINT": ("checkpoint", _opaque),
    f"{_PREFIX}RECYCLE": ("recycle", _flag),
}
