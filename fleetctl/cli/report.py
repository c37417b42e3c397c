"""`report`: one text about everything, to be attached to an issue, without anybody's secrets in it."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from fleetctl.cli.options import StateDir
from fleetctl.cli.terminal import emit, say
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import ConfigError, DaemonUnreachable, FleetctlError

_EVENTS, _DECISIONS, _LOG_LINES, _LOG_BYTES = 100, 50, 100, 64 << 10
_PACKAGES = ("typer", "rich", "psutil", "pydantic", "starlette", "uvicorn", "h11", "platformdirs", "tomli-w")


def report(
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write there, never over a file; default: print", show_default=False),
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Collect what somebody needs to help you: versions, doctor, status, settings, events, history, the daemon's log.

    Values of variables, secrets and tokens are taken out, and what looks like one. Read it before you send it all the same: what your
    agents wrote last may be in it.

    \b
    Examples:
      fleetctl report
      fleetctl report --output report.md
    """
    with LocalEngine(state_dir) as engine:
        text = collect(engine)
    if output is None:
        emit(text)
        return
    try:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{output} is there already", hint="give another name; without --output it is printed") from None
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror}") from error
    say(f"wrote {output}; read it before you send it")


def collect(engine: LocalEngine) -> str:
    """The report. A part that cannot be had says why, and the others are there."""
    from fleetctl.cli.redact import redact
    from fleetctl.engines.secrets import secret_values

    parts = "".join(f"## {title}\n\n```\n{_part(make, engine)}```\n\n" for title, make in _PARTS)
    pids = [agent["pid"] for fleet in _status(engine)["fleets"] for agent in fleet["agents"] if agent["pid"]]
    daemon = engine.lock_holder()
    known = secret_values(engine.paths, [*pids, *([daemon] if daemon else [])])
    home = os.path.expanduser("~")
    text = redact(parts, known)
    return "# fleetctl report\n\n" + (text.replace(home + "/", "~/") if home.count("/") > 1 else text)


def _part(make: Callable[[LocalEngine], Iterator[str]], engine: LocalEngine) -> str:
    lines: list[str] = []
    try:
        lines += make(engine)
    except Exception as error:  # a report about something broken must come whatever is broken
        lines.append(f"could not be had: {type(error).__name__}: {error}")
    from fleetctl.cli.render import clean

    # What ends the block in Markdown must not stand in it.
    return "".join(clean(line).rstrip().replace("```", "'''") + "\n" for line in lines or ["nothing"])


def _status(engine: LocalEngine) -> Mapping[str, Any]:  # Any: a status as the daemon sends it
    try:
        return engine.client.status()
    except FleetctlError:
        return engine.offline_status()


def _versions(engine: LocalEngine) -> Iterator[str]:
    from importlib import metadata
    from platform import freedesktop_os_release

    from fleetctl import __version__

    yield f"fleetctl {__version__}, Python {sys.version.split()[0]} at {sys.executable}"
    try:
        system = freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = "unknown distribution"
    kernel = os.uname()
    yield f"{system}, {kernel.sysname} {kernel.release} {kernel.machine}"
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {pages * page >> 20} MiB of memory, uid {os.geteuid()}"
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    yield ", ".join(found)
    yield f"state directory {engine.paths.root}"


def _doctor(engine: LocalEngine) -> Iterator[str]:
    from fleetctl.cli.doctor import examine

    for finding in examine(engine):
        yield f"{finding.level:<4}  {finding.check}: {finding.message}"
        if finding.advice:
            yield f"      {finding.advice}"


def _shown_status(engine: LocalEngine) -> Iterator[str]:
    from fleetctl.cli.render import plain, status_lines

    status = _status(engine)
    daemon = status["daemon"]
    where = f"pid {daemon['pid']}" if daemon["alive"] else "does not run"
    yield f"daemon {where}, version {daemon['version']}" + (f", note: {daemon['note']}" if daemon["note"] else "")
    yield from plain(status_lines(status, None)).splitlines()


def _settings(engine: LocalEngine) -> Iterator[str]:
    """As the daemon tells them, which hides the values of variables; while none runs, as they are on disk, hidden here."""
    from fleetctl.cli.render import flatten, toml_value

    for number, (name, spec) in enumerate(_specs(engine)):
        if number:
            yield ""
        yield f"[{name}]"
        shown = {**spec, "environment": dict.fromkeys(spec.get("environment") or {}, "***")}
        for key, value in flatten(shown):
            yield f"{key} = {toml_value(value)}"


def _specs(engine: LocalEngine) -> list[tuple[str, Mapping[str, Any]]]:  # Any: the settings of fleet.toml
    from fleetctl.engines.secrets import recorded_specs

    try:
        return [(name, engine.client.fleet(name)["spec"]) for name in engine.client.daemon()["fleets"]]
    except DaemonUnreachable:
        return recorded_specs(engine.paths)


def _events(engine: LocalEngine) -> Iterator[str]:
    from fleetctl.cli.render import event_line, plain

    try:
        events: Sequence[Mapping[str, Any]] = engine.client.events(None, _EVENTS)["events"]  # Any: JSON values
    except DaemonUnreachable:
        events = engine.offline_events(None, _EVENTS)
    yield from plain(map(event_line, events)).splitlines()


def _history(engine: LocalEngine) -> Iterator[str]:
    from fleetctl.cli.render import history_lines, plain

    try:
        entries: Sequence[Mapping[str, Any]] = engine.client.history(None, _DECISIONS)["entries"]  # Any: JSON values
    except DaemonUnreachable:
        entries = engine.offline_history(None, _DECISIONS)
    yield from plain(history_lines(entries, None)).splitlines()


def _log(engine: LocalEngine) -> Iterator[str]:
    with open(engine.paths.daemon_log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        yield from file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]


def _metrics(engine: LocalEngine) -> Iterator[str]:
    yield from (line for line in engine.client.metrics().splitlines() if not line.startswith("#"))


_PARTS: tuple[tuple[str, Callable[[LocalEngine], Iterator[str]]], ...] = (
    ("Versions", _versions),
    ("Doctor", _doctor),
    ("Status", _shown_status),
    ("Settings", _settings),
    ("Events", _events),
    ("History", _history),
    ("The daemon's log", _log),
    ("Metrics", _metrics),
)
