"""What is made of the agents' messages: each word, its bounds, and whatever bytes may come."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetctl.core.contract import MAX_BYTES, Message, Report, merge, parse
from fleetctl.models import ProcessRef

X = "X_FLEETCTL_"


def read(text: str) -> Message:
    message = parse(text.encode())
    assert isinstance(message, Message)
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", {}),
        ("\n\n", {}),
        ("READY=1", {"ready": True}),
        ("READY=1\nSTATUS=Serving 3 users\n", {"ready": True, "status": "Serving 3 users"}),
        ("READY=1\0", {"ready": True}),
        ("STATUS=", {"status": ""}),
        ("STATUS=a=b", {"status": "a=b"}),
        ("STATUS=one\nSTATUS=two", {"status": "two"}),
        ("RELOADING=1\nMONOTONIC_USEC=5", {"reloading": True}),
        ("STOPPING=1", {"stopping": True}),
        ("WATCHDOG=1", {"watchdog": "ping"}),
        ("WATCHDOG=trigger", {"watchdog": "trigger"}),
        ("EXTEND_TIMEOUT_USEC=1500000", {"extend_timeout_seconds": 1.5}),
        (f"EXTEND_TIMEOUT_USEC={2**64 - 1}", {"extend_timeout_seconds": 86400.0}),
        ("BARRIER=1", {"barrier": True}),
        ("FDSTORE=1\nWATCHDOG_USEC=3\nsomething=else\n=\n", {}),
        (f"{X}PENDING=3\n{X}ACTIVE=0\n{X}SLOTS=4", {"pending": 3, "active": 0, "slots": 4}),
        (f"{X}IDLE=1", {"idle": True}),
        (f"{X}IDLE=0", {"idle": False}),
        (f"{X}PROGRESS={2**63 - 1}", {"progress": 2**63 - 1}),
        (f"{X}METRIC=queue.depth=12.5\n{X}METRIC=x=1e3", {"metrics": {"queue.depth": 12.5, "x": 1000.0}}),
        (f"{X}TOKENS=1200,34", {"tokens": (1200, 34)}),
        (f"{X}COST=0.25", {"cost": 0.25}),
        (f"{X}BLOCKED=rate limit\n{X}UNTIL=1790000000.5", {"blocked": "rate limit", "blocked_until": 1790000000.5}),
        (f"{X}BLOCKED=", {"blocked": ""}),
        (f"{X}RESUME=sess-01HV=", {"resume": "sess-01HV="}),
        (f"{X}CHECKPOINT=/var/ckpt 1", {"checkpoint": "/var/ckpt 1"}),
        (f"{X}RECYCLE=1", {"recycle": True}),
        (f"{X}OF_A_LATER_VERSION=1", {}),
    ],
)
def test_each_word_is_understood(text: str, said: dict[str, Any]) -> None:  # Any: fields of many types
    assert read(text) == Message(**said, extension=X in text)


@pytest.mark.parametrize(
    "line",
    [
        *(f"{X}{word}=-1" for word in ("PENDING", "ACTIVE", "SLOTS", "PROGRESS")),
        *(f"{X}PENDING={value}" for value in ("1.5", "", "nan", "1_0", "+1", " 1", "\u0663")),  # the last is a digit, in Arabic
        *(f"{X}{word}={10**9 + 1}" for word in ("PENDING", "ACTIVE", "SLOTS")),
        f"{X}PROGRESS={2**63}",
        f"{X}PROGRESS={'9' * 4000}",
        *(f"{X}COST={value}" for value in ("nan", "inf", "-0.1", "1e300", "1e16", "$1", "", "1,5", "0x10")),
        *(f"{X}METRIC={value}" for value in ("a", "a=", "=1", "a=nan", "a=-1", "a b=1", "a=1=2", f"{'a' * 65}=1", "é=1")),
        *(f"{X}TOKENS={value}" for value in ("1", "1,", ",1", "1,2,3", "-1,2", "1, 2")),
        *(f"{X}UNTIL={value}" for value in ("soon", "-1", "nan", "1e12")),
        *(f"{X}IDLE={value}" for value in ("", "2", "yes")),
        *(f"{X}RESUME={value}" for value in ("", "a\x1bb", "a\u202eb", "a" * 2049)),
        f"{X}CHECKPOINT=",
        f"{X}RECYCLE=0",
        "READY=0",
        "STOPPING=yes",
        "WATCHDOG=0",
        "EXTEND_TIMEOUT_USEC=-5",
        f"EXTEND_TIMEOUT_USEC={2**64}",
        "no assignment",
    ],
)  # fmt: skip
def test_a_line_out_of_bounds_is_counted_and_the_others_stand(line: str) -> None:
    assert read(f"STATUS=before\n{line}\nREADY=1") == Message(status="before", ready=True, errors=1, extension=line.startswith(X))


@pytest.mark.parametrize(
    ("datagram", "why"),
    [
        (b"READY=1\nSTATUS=" + b"x" * MAX_BYTES, "larger than 4096 bytes"),
        (b"READY=1\nSTATUS=\xff", "not UTF-8"),
        (b"READY=1\nSTATUS=\xed\xa0\x80", "not UTF-8"),  # half of a surrogate pair
        (b"STATUS=a\0b\nREADY=1", "a NUL inside"),
        (b"READY=1\0\0", "a NUL inside"),
    ],
)
def test_a_broken_datagram_is_dropped_as_a_whole(datagram: bytes, why: str) -> None:
    assert parse(datagram) == why


def test_a_datagram_of_the_largest_size_is_read() -> None:
    assert read("READY=1\nSTATUS=".ljust(MAX_BYTES, "x")).ready


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("a\tb\r\x07c", "a b c"),
        ("pay\u202etxt.exe", "pay txt.exe"),
        ("  much   space  ", "much space"),
        ("Größe 5 µm 😀", "Größe 5 µm 😀"),
        ("x" * 300, "x" * 199 + "…"),
    ],
)
def test_text_becomes_one_short_line_without_control_characters(sent: str, shown: str) -> None:
    assert read(f"STATUS={sent}").status == shown
    assert read(f"{X}BLOCKED={sent}").blocked == shown


_WORDS = st.sampled_from(
    [f"{X}{word}" for word in ("PENDING", "ACTIVE", "SLOTS", "IDLE", "PROGRESS", "METRIC", "TOKENS", "COST", "BLOCKED", "UNTIL", "RESUME")]
    + ["READY", "STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC", "BARRIER"]
)
_VALUES = st.one_of(st.text(), st.integers().map(str), st.floats().map(str), st.floats().map(lambda number: f"m={number}"))
_DATAGRAMS = st.one_of(
    st.binary(max_size=MAX_BYTES + 10),
    st.lists(st.tuples(_WORDS, _VALUES)).map(lambda lines: "\n".join(f"{word}={value}" for word, value in lines).encode(errors="replace")),
)


@settings(max_examples=500)
@given(st.lists(_DATAGRAMS, max_size=5))
def test_whatever_comes_is_understood_within_bounds_or_refused(datagrams: list[bytes]) -> None:
    report = Report()
    for datagram in datagrams:
        message = parse(datagram)
        if isinstance(message, str):
            continue
        report = merge(report, message, 1.0)
        numbers = [
            message.pending,
            message.active,
            message.slots,
            message.progress,
            message.cost,
            message.blocked_until,
            *(message.tokens or ()),
        ]
        assert all(0 <= number <= 2**63 for number in (*numbers, *message.metrics.values()) if number is not None)
        assert all(text.isprintable() and len(text) <= 2048 for text in (message.status, message.blocked, message.resume) if text)
    assert len(report.metrics) <= 64


def test_a_report_keeps_what_a_message_does_not_say() -> None:
    process = ProcessRef(pid=1, start_ticks=2, boot_id="b")
    report = Report(process=process)
    for now, text in enumerate(
        [f"{X}ACTIVE=1\n{X}SLOTS=2", f"STATUS=busy\n{X}PENDING=3", f"{X}METRIC=a=1", f"{X}METRIC=b=2\n{X}METRIC=a=3"]
    ):
        report = merge(report, read(text), float(now))
    assert report == Report(
        process=process, heard_at=3.0, moved_at=0.0, status="busy", pending=3, active=1, slots=2, metrics={"a": 3.0, "b": 2.0}
    )
    assert report.occupancy == 0.5


@pytest.mark.parametrize(
    ("active", "slots", "occupancy"), [(None, None, None), (1, None, None), (None, 2, None), (3, 0, None), (0, 4, 0.0), (6, 4, 1.5)]
)
def test_occupancy_needs_both_numbers(active: int | None, slots: int | None, occupancy: float | None) -> None:
    assert Report(active=active, slots=slots).occupancy == occupancy


def test_progress_is_dated_by_its_last_change() -> None:
    report = merge(Report(), read(f"{X}PROGRESS=5"), 10.0)
    same = merge(report, read(f"{X}PROGRESS=5\nSTATUS=still"), 20.0)
    assert (same.progress, same.moved_at, same.heard_at) == (5, 10.0, 20.0)
    assert merge(same, read(f"{X}PROGRESS=1"), 30.0).moved_at == 30.0  # a counter that starts anew has moved


def test_an_agent_that_reloads_shows_it_until_it_is_ready_again() -> None:
    told = []
    report = Report()
    for number, text in enumerate(
        ["STATUS=serves", "RELOADING=1", f"{X}ACTIVE=1", "READY=1", "RELOADING=1\nSTATUS=reads users", "READY=1"]
    ):
        report = merge(report, read(text), float(number))
        told.append(report.status)
    assert told == ["serves", "reloading", "reloading", "", "reads users", "reads users"]


def test_work_is_remembered_that_is_over_when_somebody_looks() -> None:
    report = merge(Report(), read(f"{X}ACTIVE=0\nSTATUS=waits"), 1.0)
    assert report.works is False
    report = merge(report, read(f"{X}ACTIVE=1"), 2.0)
    assert (report.works, report.moved_at) == (True, 2.0)
    report = merge(report, read(f"{X}ACTIVE=0"), 3.0)
    report = merge(report, read("STATUS=waits again"), 4.0)
    assert (report.works, report.moved_at) == (False, 3.0)
    assert merge(Report(), read("STATUS=x"), 1.0).works is None
    assert merge(Report(), read(f"{X}PENDING=1"), 1.0).works


def test_whoever_takes_up_work_is_idle_no_more() -> None:
    idle = merge(Report(), read(f"{X}IDLE=1\n{X}ACTIVE=0"), 0.0)
    assert idle.idle
    assert merge(idle, read("STATUS=waiting"), 1.0).idle
    assert not merge(idle, read(f"{X}ACTIVE=1"), 1.0).idle
    assert not merge(idle, read(f"{X}IDLE=0"), 1.0).idle


def test_an_agent_that_makes_up_names_fills_no_memory() -> None:
    report = Report()
    for number in range(500):
        report = merge(report, read(f"{X}METRIC=m{number}=1"), 0.0)
    assert len(report.metrics) == 64
    assert merge(report, read(f"{X}METRIC=m0=2"), 0.0).metrics["m0"] == 2.0
