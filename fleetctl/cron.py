"""Times that recur, as cron writes them: `30 8 * * 1-5`. Reads five fields, and says whether such a time was within the last while.

Of local time: what a change of clocks leaves out happens when it is over, and what it repeats happens once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

LONGEST_SECONDS = 86400.0
_DAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}
_MONTHS = {name: number + 1 for number, name in enumerate(re.findall("...", "janfebmaraprmayjunjulaugsepoctnovdec"))}
_LAST_DAY = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True, slots=True)
class Cron:
    """The minutes, hours, days, months and week days (0 is Sunday) that it names; `either_day`: one of both kinds of day is enough."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    week_days: frozenset[int]
    either_day: bool

    def names(self, moment: datetime) -> bool:
        """Whether it names this minute."""
        if moment.minute not in self.minutes or moment.hour not in self.hours or moment.month not in self.months:
            return False
        in_days, in_week = moment.day in self.days, moment.isoweekday() % 7 in self.week_days
        return in_days or in_week if self.either_day else in_days and in_week

    def within(self, wall: float, seconds: float, zone: tzinfo) -> bool:
        """Whether a time that it names was in the last so many seconds before `wall`, a Unix time."""
        minute = int(wall // 60) * 60
        while minute > wall - seconds:
            if self._begins(minute, zone):
                return True
            minute -= 60
        return False

    def _begins(self, minute: int, zone: tzinfo) -> bool:
        local = datetime.fromtimestamp(minute, UTC).astimezone(zone)
        if local.fold:  # the clock was set back: this hour was there before
            return False
        if self.names(local):
            return True
        before = datetime.fromtimestamp(minute - 60, UTC).astimezone(zone)
        left_out = (local.replace(tzinfo=None) - before.replace(tzinfo=None)) // timedelta(minutes=1) - 1
        return any(self.names(local - timedelta(minutes=back)) for back in range(1, min(left_out, 180) + 1))


def parse(text: str) -> Cron:
    """Raises ValueError, which says what is wrong."""
    fields = text.split()
    if len(fields) != 5:
        raise ValueError('must be five fields: minute, hour, day, month, day of the week, like "30 8 * * 1-5"')
    minutes, hours, days = _field(fields[0], 0, 59, {}), _field(fields[1], 0, 23, {}), _field(fields[2], 1, 31, {})
    months, week_days = _field(fields[3], 1, 12, _MONTHS), frozenset(day % 7 for day in _field(fields[4], 0, 7, _DAYS))
    either = fields[2] != "*" and fields[4] != "*"
    if not either and not any(day <= _LAST_DAY[month - 1] for day in days for month in months):
        raise ValueError("names a day that no month has")
    return Cron(minutes, hours, days, months, week_days, either)


def _field(text: str, low: int, high: int, names: Mapping[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        matched = re.fullmatch(r"(\*|(\w+)(?:-(\w+))?)(?:/(\d{1,2}))?", part, re.ASCII)
        if not matched:
            raise ValueError(f"{part[:20]!r} is no part of a time")
        every, first, last, step = matched.groups()
        begin = low if every == "*" else _number(first, names)
        end = high if every == "*" or (step and last is None) else _number(last if last is not None else first, names)
        if not low <= begin <= end <= high or step == "0" or step == "00":
            raise ValueError(f"{part[:20]!r} is not within {low} to {high}")
        found.update(range(begin, end + 1, int(step or 1)))
    return frozenset(found)


def _number(text: str, names: Mapping[str, int]) -> int:
    if text in names:
        return names[text]
    if not text.isdecimal() or len(text) > 2:
        raise ValueError(f"{text[:20]!r} is no part of a time")
    return int(text)
