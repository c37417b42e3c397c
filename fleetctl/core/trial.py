"""What was seen of a command that was tried out, and what follows from it: whether it may be suspended, and which settings fit it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fleetctl.models import Exit, FleetSpec, Probe

_WARM_SIZE = 3
_LEAST_DRAIN_SECONDS, _LEAST_START_SECONDS, _LEAST_SETTLE_SECONDS = 5.0, 10.0, 0.5


class Verdict(StrEnum):
    """Whether a program may be suspended. UNSURE: nothing spoke against it, but what was tried does not prove it."""

    YES = "yes"
    NO = "no"
    UNSURE = "unsure"


class ReadyBy(StrEnum):
    """How it was known to be ready."""

    NOTIFY = "notify"
    HTTP = "http"
    TCP = "tcp"
    EXEC = "exec"
    QUIET = "quiet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """`probe`: what to ask it with: the user's own, or found where it listens; `listens`: where that is; `processes`: of it."""

    seconds: float
    by: ReadyBy
    probe: Probe | None = None
    listens: tuple[str, ...] = ()
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """One suspension. `lost`: processes that were gone afterwards; `trouble`: why it did not answer."""

    seconds: float
    stopped: bool
    alive: bool = True
    lost: int = 0
    answer_seconds: float | None = None
    trouble: str = ""

    @property
    def harmless(self) -> bool:
        return self.stopped and self.alive and not self.lost and not self.trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """How it was asked to end. `signal`: the one that worked, None where only killing did; `ignored`: those that did not."""

    signal: str | None
    seconds: float
    ignored: tuple[str, ...] = ()
    exit: Exit | None = None

    @property
    def clean(self) -> bool:
        """Whether it ended by itself, as asked: with exit 0, or by the very signal."""
        ended = self.exit
        if self.signal is None or ended is None:
            return False
        return ended.code == 0 or str(ended) == f"killed by SIG{self.signal}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """All that was seen. None, or empty: it did not come to that."""

    spec: FleetSpec
    ready: Readiness | None = None
    pauses: tuple[Pause, ...] = ()
    stop: Stop | None = None
    restarted: Readiness | None = None
    stop_while_suspended: Stop | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    warm_pool: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    settings: tuple[tuple[str, object], ...]
    """Dotted keys of fleet.toml and JSON values, in order."""


def advise(trial: Trial) -> Advice:
    against = tuple(_against(trial))
    doubts = tuple(_doubts(trial))
    verdict = Verdict.NO if against else Verdict.UNSURE if doubts else Verdict.YES
    settings = tuple(_settings(trial, warm=verdict is Verdict.YES))
    return Advice(warm_pool=verdict, reasons=against or doubts, notes=tuple(_notes(trial)), settings=settings)


def _against(trial: Trial) -> Iterator[str]:
    """Why it must not be suspended."""
    if trial.ready is None:
        yield "it never became ready"
        return
    for pause in trial.pauses:
        for_so_long = f"after {pause.seconds:g} s"
        if not pause.stopped:
            yield "it could not be stopped where it stood"
        elif not pause.alive:
            yield f"it ended {for_so_long} of standing still"
        elif pause.lost:
            yield f"{_counted(pause.lost, 'process')} of it {'was' if pause.lost == 1 else 'were'} gone {for_so_long}"
        elif pause.trouble:
            yield f"it did not answer any more {for_so_long}: {pause.trouble}"
    stop = trial.stop_while_suspended
    if stop is not None and stop.signal is None and trial.stop is not None and trial.stop.signal is not None:
        yield "a suspended one does not end as asked when it goes on, and has to be killed"


def _doubts(trial: Trial) -> Iterator[str]:
    """Why one cannot be sure yet."""
    if not trial.pauses:
        yield "it was not suspended"
    if trial.stop is not None and trial.restarted is None:
        yield "it did not become ready a second time"
    longest = max((pause.seconds for pause in trial.pauses), default=0.0)
    if trial.ready is not None and trial.ready.processes > 1 and longest < 60:
        yield (
            f"it has {trial.ready.processes} processes, and a master may take its workers for dead after a longer stop"
            f" (gunicorn: 30 s) than the {longest:g} s that were tried: try --suspend 60"
        )
    if trial.ready is not None and trial.ready.probe is None:
        yield "nothing is known to ask it, so only that it lives was seen: give --http, --tcp or --exec"


def _notes(trial: Trial) -> Iterator[str]:
    spec, ready = trial.spec, trial.ready
    if ready is not None and ready.listens and not spec.sockets and spec.port_base is None and not _unix_only(ready.listens):
        yield (
            f"it listens on {', '.join(ready.listens)}, which two agents cannot both: let it take {{port}} or PORT with port_base, "
            "or a socket of [fleet.sockets]"
        )
    if trial.stop is not None and trial.stop.signal is None:
        yield f"it ended by none of {', '.join(trial.stop.ignored)}: every stop will take the whole drain time and a kill"
    elif trial.stop is not None and trial.stop.ignored:
        yield f"{', '.join(trial.stop.ignored)} did not end it, {trial.stop.signal} did"
    elif trial.stop is not None and not trial.stop.clean:
        yield f"it ended with {trial.stop.exit} when it was asked to stop"
    if trial.stop is not None and trial.restarted is None and trial.ready is not None:
        yield "started again it did not become ready: look at what it left behind, such as a pid file or a port in use"


def _settings(trial: Trial, *, warm: bool) -> Iterator[tuple[str, object]]:
    spec, ready, stop = trial.spec, trial.ready, trial.stop
    if stop is not None and stop.signal not in (None, spec.stop_signal.removeprefix("SIG")):
        yield "stop_signal", stop.signal
    if ready is not None:
        yield from _readiness(ready)
    if ready is not None and ready.by is not ReadyBy.QUIET:
        slowest = max(ready.seconds, trial.restarted.seconds if trial.restarted else 0.0)
        yield "readiness.start_timeout_seconds", _rounded(max(_LEAST_START_SECONDS, 4 * slowest))
    stops = [one for one in (stop, trial.stop_while_suspended) if one is not None and one.signal is not None]
    if stops:
        yield "graceful_drain.timeout_seconds", _rounded(max(_LEAST_DRAIN_SECONDS, *(4 * one.seconds for one in stops)))
    if warm:
        yield "warm_pool.size", _WARM_SIZE


def _readiness(ready: Readiness) -> Iterator[tuple[str, object]]:
    if ready.by is ReadyBy.NOTIFY:
        yield "readiness.notify", True
    elif ready.probe is not None:
        if ready.probe.http:
            yield "readiness.http", ready.probe.http
        if ready.probe.tcp:
            yield "readiness.tcp", ready.probe.tcp
        if ready.probe.exec:
            yield "readiness.exec", list(ready.probe.exec)
    else:
        yield "readiness.settle_seconds", max(_LEAST_SETTLE_SECONDS, math.ceil(ready.seconds * 15) / 10)


def _rounded(seconds: float) -> float:
    """Up, to a number that people would write."""
    step = 5.0 if seconds <= 60 else 30.0
    return math.ceil(seconds / step) * step


def _unix_only(listens: Sequence[str]) -> bool:
    return all(address.startswith("unix:") for address in listens)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'es' * (number != 1)}"
