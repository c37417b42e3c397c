"""What follows from what was seen of a command that was tried out."""

from dataclasses import replace

import pytest

from fleetctl.core.trial import Advice, Pause, Readiness, ReadyBy, Stop, Trial, Verdict, advise
from fleetctl.models import Exit, FleetSpec, Probe

SPEC = FleetSpec(name="web", command=("x",))
READY = Readiness(seconds=0.4, by=ReadyBy.HTTP, probe=Probe(http="http://127.0.0.1:1/"), listens=("unix:/s",))
PAUSE = Pause(seconds=10.0, stopped=True, answer_seconds=0.002)
STOP = Stop(signal="TERM", seconds=0.1, exit=Exit(code=0))
GOOD = Trial(spec=SPEC, ready=READY, pauses=(PAUSE,), stop=STOP, restarted=READY, stop_while_suspended=STOP)


def settings(trial: Trial) -> dict[str, object]:
    return dict(advise(trial).settings)


def test_what_goes_well_may_be_suspended() -> None:
    assert advise(GOOD) == Advice(
        warm_pool=Verdict.YES,
        reasons=(),
        notes=(),
        settings=(
            ("readiness.http", "http://127.0.0.1:1/"),
            ("readiness.start_timeout_seconds", 10.0),
            ("graceful_drain.timeout_seconds", 5.0),
            ("warm_pool.size", 3),
        ),
    )


@pytest.mark.parametrize(
    ("pause", "reason"),
    [
        (replace(PAUSE, stopped=False), "it could not be stopped where it stood"),
        (replace(PAUSE, alive=False), "it ended after 10 s of standing still"),
        (replace(PAUSE, lost=1), "1 process of it was gone after 10 s"),
        (replace(PAUSE, lost=4), "4 processes of it were gone after 10 s"),
        (replace(PAUSE, trouble="no answer in 5 s"), "it did not answer any more after 10 s: no answer in 5 s"),
    ],
)
def test_what_suffers_from_standing_still_is_not_suspended(pause: Pause, reason: str) -> None:
    advice = advise(replace(GOOD, pauses=(replace(PAUSE, seconds=2.0), pause)))
    assert advice.warm_pool is Verdict.NO
    assert advice.reasons == (reason,)
    assert "warm_pool.size" not in dict(advice.settings)


def test_what_has_to_be_killed_only_when_it_was_suspended_is_not_suspended() -> None:
    killed = Stop(signal=None, seconds=10.0, ignored=("TERM",))
    assert advise(replace(GOOD, stop_while_suspended=killed)).warm_pool is Verdict.NO
    assert advise(replace(GOOD, stop=killed, stop_while_suspended=killed)).warm_pool is Verdict.YES


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"pauses": ()}, "it was not suspended"),
        ({"restarted": None}, "it did not become ready a second time"),
        ({"ready": replace(READY, processes=5)}, "it has 5 processes, and a master may take its workers for dead"),
        ({"ready": replace(READY, by=ReadyBy.QUIET, probe=None)}, "nothing is known to ask it"),
    ],
)
def test_what_was_not_shown_is_a_doubt(changes: dict[str, object], doubt: str) -> None:
    advice = advise(replace(GOOD, **changes))  # type: ignore[arg-type]  # of fields by name
    assert advice.warm_pool is Verdict.UNSURE
    assert advice.reasons[0].startswith(doubt)
    assert "warm_pool.size" not in dict(advice.settings)


def test_a_master_that_stood_still_for_a_minute_is_no_doubt() -> None:
    master = replace(GOOD, ready=replace(READY, processes=5), pauses=(replace(PAUSE, seconds=60.0),))
    assert advise(master).warm_pool is Verdict.YES


def test_what_never_became_ready_has_no_settings() -> None:
    advice = advise(Trial(spec=SPEC))
    assert (advice.warm_pool, advice.reasons, advice.settings) == (Verdict.NO, ("it never became ready",), ())


@pytest.mark.parametrize(
    ("ready", "expected"),
    [
        (replace(READY, by=ReadyBy.NOTIFY), {"readiness.notify": True}),
        (replace(READY, by=ReadyBy.TCP, probe=Probe(tcp="unix:/s")), {"readiness.tcp": "unix:/s"}),
        (replace(READY, by=ReadyBy.EXEC, probe=Probe(exec=("a", "b"))), {"readiness.exec": ["a", "b"]}),
    ],
)
def test_readiness_is_set_as_it_was_seen(ready: Readiness, expected: dict[str, object]) -> None:
    found = settings(replace(GOOD, ready=ready))
    assert {key: value for key, value in found.items() if key.startswith("readiness.")} == {
        **expected,
        "readiness.start_timeout_seconds": 10.0,
    }


@pytest.mark.parametrize(("seconds", "settle"), [(0.0, 0.5), (0.4, 0.6), (3.0, 4.5)])
def test_without_a_probe_it_gets_time_to_settle(seconds: float, settle: float) -> None:
    quiet = Readiness(seconds=seconds, by=ReadyBy.QUIET)
    assert settings(replace(GOOD, ready=quiet))["readiness.settle_seconds"] == settle


@pytest.mark.parametrize(("seconds", "timeout"), [(0.1, 10.0), (2.6, 15.0), (20.0, 90.0)])
def test_a_slow_start_gets_four_times_as_long(seconds: float, timeout: float) -> None:
    assert settings(replace(GOOD, restarted=replace(READY, seconds=seconds)))["readiness.start_timeout_seconds"] == timeout


@pytest.mark.parametrize(
    ("stop", "found", "note"),
    [
        (replace(STOP, exit=Exit(signal=15)), {"graceful_drain.timeout_seconds": 5.0}, None),
        (replace(STOP, seconds=4.0), {"graceful_drain.timeout_seconds": 20.0}, None),
        (replace(STOP, exit=Exit(code=1)), {"graceful_drain.timeout_seconds": 5.0}, "it ended with exit 1 when it was asked to stop"),
        (
            replace(STOP, signal="INT", ignored=("TERM",), exit=Exit(signal=2)),
            {"stop_signal": "INT", "graceful_drain.timeout_seconds": 5.0},
            "TERM did not end it, INT did",
        ),
        (Stop(signal=None, seconds=9.0, ignored=("TERM", "INT")), {}, "it ended by none of TERM, INT: every stop will take"),
    ],
)
def test_what_ends_it_becomes_the_stop_signal(stop: Stop, found: dict[str, object], note: str | None) -> None:
    advice = advise(replace(GOOD, stop=stop, stop_while_suspended=None))
    assert {key: value for key, value in advice.settings if key.split(".")[0] in ("stop_signal", "graceful_drain")} == found
    assert [one for one in advice.notes if note is None or not one.startswith(note)] == []
    assert len(advice.notes) == (note is not None)


def test_a_fixed_port_is_told_unless_the_fleet_has_a_way_out() -> None:
    fixed = replace(GOOD, ready=replace(READY, listens=("127.0.0.1:8000",)))
    assert advise(fixed).notes[0].startswith("it listens on 127.0.0.1:8000, which two agents cannot both")
    assert not advise(replace(fixed, spec=replace(SPEC, port_base=8000))).notes
    assert not advise(replace(fixed, spec=replace(SPEC, sockets={"http": "127.0.0.1:8000"}))).notes
