"""Times as cron writes them: which minutes they name, also where the clock is changed, and what is no time."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from fleetctl.cron import parse

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("text", "moment", "named"),
    [
        ("30 8 * * 1-5", "2026-03-02 08:30", True),  # a Monday
        ("30 8 * * 1-5", "2026-03-01 08:30", False),
        ("30 8 * * mon-fri", "2026-03-06 08:30", True),
        ("*/15 0-6 * * *", "2026-03-01 06:45", True),
        ("*/15 0-6 * * *", "2026-03-01 06:46", False),
        ("0 0 1,15 * *", "2026-03-15 00:00", True),
        ("0 0 1 jan,jul *", "2026-07-01 00:00", True),
        ("0 0 13 * 5", "2026-03-13 00:00", True),  # either is enough, as in cron
        ("0 0 13 * 5", "2026-03-06 00:00", True),
        ("0 0 * * 7", "2026-03-01 00:00", True),
        ("5/20 * * * *", "2026-03-01 00:45", True),
    ],
)
def test_a_time_names_its_minutes(text: str, moment: str, named: bool) -> None:
    assert parse(text).names(datetime.fromisoformat(moment)) is named


def unix(text: str, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).timestamp()


def test_a_while_begins_with_its_minute_and_ends_after_its_length() -> None:
    cron = parse("0 8 * * *")
    assert not cron.within(unix("2026-03-02 07:59:59"), 3600, BERLIN)
    assert cron.within(unix("2026-03-02 08:00:00"), 3600, BERLIN)
    assert cron.within(unix("2026-03-02 08:59:59"), 3600, BERLIN)
    assert not cron.within(unix("2026-03-02 09:00:00"), 3600, BERLIN)


def test_what_the_spring_leaves_out_happens_when_it_is_over_and_what_autumn_repeats_happens_once() -> None:
    cron = parse("30 2 * * *")
    assert not cron.within(unix("2026-03-29 01:59:59"), 600, BERLIN)
    assert cron.within(unix("2026-03-29 03:00:00"), 600, BERLIN)
    assert cron.within(unix("2026-10-25 02:30:00", fold=0), 600, BERLIN)
    assert not cron.within(unix("2026-10-25 02:30:00", fold=1), 600, BERLIN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "* * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 8",
        "5-1 * * * *",
        "*/0 * * * *",
        "x * * * *",
        "0 0 31 2 *",
        "0 0 30 feb *",
        "* * * * * *",
        "-1 * * * *",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)
