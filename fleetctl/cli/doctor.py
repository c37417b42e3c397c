"""`doctor`: looks at everything fleetctl depends on, says what is wrong and what to do. Changes nothing, needs no daemon."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import typer

from fleetctl.cli.options import Json, StateDir
from fleetctl.cli.terminal import emit_json, emit_lines, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import EXIT_FAILED, DaemonUnreachable, FleetctlError

OK, WARN, FAIL = "ok", "warn", "fail"
_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}
_LITTLE_SPACE, _HARDLY_ANY_SPACE = 200 << 20, 4 << 20
_FEW_FILES, _FEW_PROCESSES = 1024, 512
_PR_GET_CHILD_SUBREAPER = 37
_AT_LEAST_PYTHON = (3, 11)
_EARLIEST_SANE_TIME = 1_735_689_600.0  # 2025-01-01: before this code was written


class Finding(NamedTuple):
    """One thing looked at. `advice`: what to do, empty where nothing needs doing."""

    check: str
    level: str
    message: str
    advice: str = ""


def doctor(json: Json = False, state_dir: StateDir = None) -> None:
    """Check this machine, the state directory and the daemon; exit status 1 when something is broken.

    \b
    Examples:
      fleetctl doctor
      fleetctl doctor --json
    """
    with LocalEngine(state_dir) as engine:
        findings = examine(engine)
    worst = next((level for level in (FAIL, WARN) if any(finding.level == level for finding in findings)), OK)
    if json:
        emit_json({"schema": "fleetctl/doctor/v1", "worst": worst, "findings": [finding._asdict() for finding in findings]})
    else:
        _show(findings)
    if worst == FAIL:
        raise typer.Exit(EXIT_FAILED)


def examine(engine: LocalEngine) -> list[Finding]:
    """Every finding; a check that breaks is a finding too."""
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check(engine)
        except (OSError, FleetctlError) as error:
            findings.append(Finding(check.__name__.strip("_").replace("_", " "), FAIL, f"could not be checked: {error}"))
    return findings


def _show(findings: list[Finding]) -> None:
    from fleetctl.cli.render import Line, clean, clip

    wide = max(len(finding.check) for finding in findings)
    lines: list[Line] = []
    for finding in findings:
        style = _STYLES[finding.level]
        lines.append(
            clip([(f"{finding.level:<4}", style), (f"  {finding.check:<{wide}}  ", "bold"), (clean(finding.message), "")], width())
        )
        if finding.advice:
            lines.append(clip([(" " * (wide + 8) + clean(finding.advice), "dim")], width()))
    emit_lines(lines)


def _python(engine: LocalEngine) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _AT_LEAST_PYTHON:
        yield Finding("python", FAIL, f"{version} is too old", "use Python 3.11 or later")
    else:
        yield Finding("python", OK, f"{version} at {sys.executable}")


def _kernel(engine: LocalEngine) -> Iterator[Finding]:
    release = os.uname().release
    try:
        fd = os.pidfd_open(os.getpid())
    except (AttributeError, OSError) as error:
        yield Finding(
            "pidfd", FAIL, f"{release}: pidfd_open does not work ({error})", "needs Linux 5.4 or later, and no seccomp filter against it"
        )
    else:
        try:
            os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            yield Finding("pidfd", OK, f"{release}: pidfd_open and waitid work")  # it knows the call; we are no child of ours
        except OSError as error:
            yield Finding("pidfd", FAIL, f"{release}: waitid on a pidfd does not work ({error})", "needs Linux 5.4 or later")
        finally:
            os.close(fd)
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version < (6, 15):
        yield Finding(
            "exit status", OK, f"{release}: the exit status of an agent that a later daemon adopted is unknown (known from 6.15 on)"
        )
    yield _subreaper()


def _subreaper() -> Finding:
    import ctypes

    value = ctypes.c_int()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0) == 0:
        return Finding("subreaper", OK, "processes that agents leave behind come to the daemon")
    return Finding("subreaper", WARN, "not possible here", "processes that agents leave behind are found by a scan instead")


def _state_directory(engine: LocalEngine) -> Iterator[Finding]:
    from fleetctl.host.paths import SOCKET_PATH_BYTES

    root, length = engine.paths.root, len(os.fsencode(engine.paths.socket))
    if length > SOCKET_PATH_BYTES:
        yield Finding(
            "socket path", FAIL, f"{engine.paths.socket}: {length} bytes, {SOCKET_PATH_BYTES} are possible", "choose a shorter --state-dir"
        )
    else:
        yield Finding("socket path", OK, f"{length} of {SOCKET_PATH_BYTES} bytes")
    try:
        found = os.stat(root)
    except FileNotFoundError:
        yield Finding("state directory", OK, f"{root} does not exist yet; the first `fleetctl up` makes it")
        return
    if found.st_uid != os.geteuid():
        yield Finding("state directory", FAIL, f"{root} belongs to uid {found.st_uid}, not to you", "choose another with --state-dir")
    elif not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("state directory", FAIL, f"{root} is not writable", f"chmod 700 {root}, or remount its file system for writing")
    elif open_to_others := _open_to_others(engine):
        yield Finding("state directory", WARN, f"open to others: {', '.join(open_to_others)}", f"chmod -R go= {root}")
    else:
        yield Finding("state directory", OK, f"{root}, yours alone")
    yield _space(root)


def _open_to_others(engine: LocalEngine) -> list[str]:
    paths = engine.paths
    return [
        path
        for path in (paths.root, paths.run, paths.socket, paths.database, paths.fleets, paths.logs, paths.daemon_log)
        if os.path.exists(path) and os.stat(path).st_mode & 0o077
    ]


def _space(root: str) -> Finding:
    from fleetctl.cli.render import size

    disk = os.statvfs(root)
    free = disk.f_bavail * disk.f_frsize
    if free < _HARDLY_ANY_SPACE or (disk.f_files and not disk.f_favail):
        return Finding("free space", FAIL, f"{size(free)}, {disk.f_favail} files", f"make room on the file system of {root}")
    return Finding("free space", WARN if free < _LITTLE_SPACE else OK, size(free), "make room soon" if free < _LITTLE_SPACE else "")


def _daemon(engine: LocalEngine) -> Iterator[Finding]:
    from fleetctl import __version__
    from fleetctl.client import Client

    holder = engine.lock_holder()
    try:
        with Client(engine.paths.root, timeout=3.0) as client:
            status = client.status()
    except FleetctlError as error:
        yield _no_answer(engine, holder, error)
        return
    daemon = status["daemon"]
    yield Finding("daemon", OK, f"pid {daemon['pid']}, answers")
    if daemon["version"] != __version__:
        advice = "restart it with `fleetctl daemon stop --keep` and `fleetctl daemon start`; agents run on"
        yield Finding("daemon version", WARN, f"the daemon is {daemon['version']}, this command is {__version__}", advice)
    if daemon["note"]:
        yield Finding("daemon note", WARN, daemon["note"])
    for fleet in status["fleets"]:
        failed = [agent["id"] for agent in fleet["agents"] if agent["state"] == "failed"]
        if failed:
            yield Finding("agents", WARN, f"failed: {', '.join(failed)}", f"`fleetctl logs {failed[0]}` and `fleetctl inspect {failed[0]}`")


def _no_answer(engine: LocalEngine, holder: int | None, error: FleetctlError) -> Finding:
    if engine.is_kept_by_program():
        return Finding("daemon", OK, f"none, and none can start: a program (pid {holder}) keeps the fleets here, with FleetManager")
    if holder is not None:
        who = f"pid {holder}" if holder else "unknown pid"
        advice = f"look at {engine.paths.daemon_log}; `kill -9` of it is safe: agents run on and the next daemon takes them back"
        return Finding("daemon", FAIL, f"a daemon ({who}) holds the state directory and does not answer: {error.message}", advice)
    if not isinstance(error, DaemonUnreachable):
        return Finding("daemon", FAIL, error.message)
    stale = "; a socket was left by one that died, the next start replaces it" if os.path.lexists(engine.paths.socket) else ""
    recorded = [fleet["name"] for fleet in engine.offline_status()["fleets"]]
    if recorded:
        return Finding("daemon", WARN, f"none runs, and nobody looks after {', '.join(recorded)}{stale}", "`fleetctl daemon start`")
    return Finding("daemon", OK, f"none runs, and there is nothing to look after{stale}")


def _records(engine: LocalEngine) -> Iterator[Finding]:
    root = engine.paths.root
    damaged = [name for name in os.listdir(root) if ".damaged-" in name] if os.path.isdir(root) else []
    if damaged:
        yield Finding(
            "database", WARN, f"a damaged one was set aside: {', '.join(sorted(damaged))}", "history before it is lost; remove it when read"
        )
    orphans = engine.find_orphans()
    if orphans:
        yield Finding(
            "orphans", WARN, f"no record claims {', '.join(agent.id for agent in orphans)}", "`fleetctl down --orphans` ends them"
        )
    else:
        yield Finding("orphans", OK, "none")


def _limits(engine: LocalEngine) -> Iterator[Finding]:
    import resource

    for name, kind, few in (
        ("open files", resource.RLIMIT_NOFILE, _FEW_FILES),
        ("processes", resource.RLIMIT_NPROC, _FEW_PROCESSES),
    ):
        hard = resource.getrlimit(kind)[1]
        text = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
        if hard != resource.RLIM_INFINITY and hard < few:
            yield Finding(name, WARN, f"at most {text}", f"raise the hard limit (ulimit -H) above {few} for a large fleet")
        else:
            yield Finding(name, OK, text)


def _groups(engine: LocalEngine) -> Iterator[Finding]:
    from fleetctl.engines import machine

    found = machine.groups(engine.paths.root)
    if not found.missing:
        kinds = " and ".join(found.kinds)
        yield Finding("control groups", OK, f"{kinds}: cpu_limit, memory_limit_mb and pids_limit are held by the kernel")
        return
    without = "cpu_limit is not held at all, the others by looking" if "cpu_limit" in found.missing else "held by looking now and then"
    advice = (
        "`fleetctl daemon install` makes a unit whose groups are the daemon's (Delegate=yes); in a container, mount /sys/fs/cgroup writable"
    )
    why = next(iter(found.missing.values()))
    yield Finding("control groups", WARN, f"none for {', '.join(found.missing)} ({without}): {why}", advice)


def _enclosure(engine: LocalEngine) -> Iterator[Finding]:
    from fleetctl.engines import machine

    found = machine.enclosure()
    if found.trouble:
        yield Finding("sandbox", WARN, f'fleets with trust_level = "untrusted" are refused: {found.trouble}', found.advice)
    else:
        held = f"own files, processes and network, {found.user}, a filter on system calls"
        yield Finding("sandbox", OK, f'trust_level = "untrusted" is held: {held}')
        if not found.hides_abstract_sockets:
            yield Finding("abstract sockets", OK, "with sandbox.network = true they stay in reach; Landlock of Linux 6.12 would hide them")
    yield _tracing()


def _tracing() -> Finding:
    """What keeps an agent from another's memory where both are the same user's: Yama, where it is there and not told otherwise."""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:
            scope = int(file.read())
    except (OSError, ValueError):
        scope = 0
    if scope or os.geteuid() == 0:
        restricted = f"restricted (ptrace_scope {scope})" if scope else "root's processes may look into all others"
        return Finding("ptrace", OK, f"{restricted}; an agent in a sandbox sees nobody's")
    return Finding(
        "ptrace",
        OK,
        'agents of one user may read each other\'s memory; trust_level = "untrusted" or kernel.yama.ptrace_scope = 1 ends that',
    )


def _clock(engine: LocalEngine) -> Iterator[Finding]:
    from time import time

    now = time()
    try:
        written = os.stat(engine.paths.database).st_mtime
    except OSError:
        written = 0.0
    if now < _EARLIEST_SANE_TIME:
        yield Finding("clock", WARN, "is set to a time long past", "set it; durations are right all the same, times in history are not")
    elif written > now + 60:
        yield Finding("clock", WARN, f"is {written - now:.0f} s behind the last record", "it was set back; times in history overlap")
    else:
        yield Finding("clock", OK, "plausible")


_CHECKS: tuple[Callable[[LocalEngine], Iterator[Finding]], ...] = (
    _python,
    _kernel,
    _state_directory,
    _daemon,
    _records,
    _limits,
    _groups,
    _enclosure,
    _clock,
)
