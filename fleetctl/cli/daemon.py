"""`daemon`: the process that looks after the fleets, in the foreground or in the background."""

import sys
from typing import Annotated

import typer

from fleetctl.cli.options import DryRun, Json, StateDir, Timeout, positive_seconds
from fleetctl.cli.terminal import emit, emit_json, say
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import EXIT_NOT_DESIRED, DaemonUnreachable, UsageError

daemon = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)


@daemon.callback()
def foreground(
    ctx: typer.Context,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
    hold: Annotated[bool, typer.Option("--hold", hidden=True)] = False,
    keep: Annotated[bool, typer.Option("--keep", help="SIGTERM and Ctrl-C leave the agents running for the next daemon")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            metavar="N",
            min=0,
            max=65535,
            envvar="FLEETCTL_METRICS_PORT",
            help="Tell Prometheus on this port of 127.0.0.1 too; 0: any",
            show_default=False,
        ),
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Run the daemon in the foreground, for service managers and containers; SIGTERM and Ctrl-C stop its agents first.

    Started by systemd with Type=notify it says when it is ready, and that it lives; `daemon install` writes such a unit.

    \b
    Examples:
      fleetctl daemon
      fleetctl daemon start
      fleetctl daemon stop --keep
    """
    if ctx.invoked_subcommand is not None:
        return
    from fleetctl.daemon.main import run

    raise typer.Exit(run(LocalEngine(state_dir).paths.root, background=background, hold=hold, keep=keep, metrics_port=metrics_port))


@daemon.command()
def start(json: Json = False, state_dir: StateDir = None) -> None:
    """Start the daemon in the background, unless one runs already.

    \b
    Example:
      fleetctl daemon start
    """
    with LocalEngine(state_dir) as engine:
        started = engine.ensure_daemon()
        info = engine.client.daemon()
    if json:
        emit_json({**info, "started": started is not None})
    elif started is None:
        emit(f"the daemon runs already (pid {info['pid']})\n")
    else:
        emit(f"started the daemon (pid {started})\n")


@daemon.command()
def install(
    user: Annotated[bool, typer.Option("--user", help="As your own service; the default, but for root")] = False,
    system: Annotated[bool, typer.Option("--system", help="As the machine's service; the default for root")] = False,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Of the unit; one for each state directory")] = "fleetctl",
    force: Annotated[bool, typer.Option("--force", help="Write over another unit of that name")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Have systemd run the daemon at boot, and agents survive a restart of its unit.

    Writes the unit, enables and starts it; where systemd does not run, says what is to be done by hand.

    \b
    Examples:
      fleetctl daemon install --dry-run
      fleetctl daemon install --user
      sudo fleetctl --state-dir /var/lib/fleetctl daemon install --system
    """
    import os

    from fleetctl.cli import install as installing

    if user and system:
        raise UsageError("either --user or --system")
    with LocalEngine(state_dir) as engine:
        installing.install(engine, system=system or (not user and os.geteuid() == 0), name=name, force=force, dry_run=dry_run, json=json)


@daemon.command()
def stop(
    keep: Annotated[bool, typer.Option("--keep", help="Let the agents run on; the next daemon takes them back")] = False,
    drain: Annotated[bool, typer.Option("--drain", help="Stop the agents first; they come back with the next daemon")] = False,
    timeout: Timeout = None,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Stop the daemon. Asks what is to become of the agents, if there are any and nothing says so.

    \b
    Examples:
      fleetctl daemon stop --keep
      fleetctl daemon stop --drain
    """
    from fleetctl.cli.render import count

    limit = positive_seconds(timeout)
    if keep and drain:
        raise UsageError("either --keep or --drain")
    with LocalEngine(state_dir) as engine:
        try:
            agents = [agent["id"] for fleet in engine.client.status()["fleets"] for agent in fleet["agents"] if agent["pid"]]
            mode = "drain" if drain else "keep" if keep or not agents else _ask(len(agents))
            from fleetctl.cli.waiting import Troubles

            pid = engine.stop_daemon(mode, limit, Troubles().tell)
        except DaemonUnreachable:
            if json:
                emit_json({"schema": "fleetctl/shutdown/v1", "mode": None, "pid": None, "agents": []})
            else:
                say("no daemon runs")
            return
    if json:
        emit_json({"schema": "fleetctl/shutdown/v1", "mode": mode, "pid": pid, "agents": agents})
        return
    one = len(agents) == 1
    ended, kept = ("has stopped", "runs on") if one else ("have stopped", "run on")
    fate = f"; its {count(len(agents), 'agent')} {ended if mode == 'drain' else kept}" if agents else ""
    emit(f"the daemon (pid {pid}) has ended{fate}\n")


def _ask(agents: int) -> str:
    from fleetctl.cli.render import count

    running = f"{count(agents, 'agent')} {'runs' if agents == 1 else 'run'}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(running, hint="say what is to become of them: `fleetctl daemon stop --keep` or `fleetctl daemon stop --drain`")
    them = "it" if agents == 1 else "them"
    try:
        print(f"{running}. Keep {them} running, or drain (stop) {them}? [keep/drain] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        say("")  # the terminal's cursor stands behind the question
        raise
    if not answer:
        say("")
        raise typer.Abort
    word = answer.strip().lower()
    for mode in ("keep", "drain"):
        if word and mode.startswith(word):
            return mode
    raise UsageError(f"{word!r} is neither keep nor drain; nothing was done")


@daemon.command()
def status(
    check: Annotated[bool, typer.Option("--check", help="Exit status 3 when no daemon runs")] = False,
    pid: Annotated[bool, typer.Option("--pid", help="Print only the pid of the daemon, and nothing where none runs")] = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show whether a daemon runs, and what it looks after.

    \b
    Examples:
      fleetctl daemon status
      fleetctl daemon status --check --json
      kill -9 $(fleetctl daemon status --pid)
    """
    from fleetctl.cli.render import duration

    with LocalEngine(state_dir) as engine:
        try:
            info = engine.client.daemon()
        except DaemonUnreachable:
            if json:
                emit_json({"schema": "fleetctl/daemon/v1", "alive": False, "pid": None, "state_dir": engine.paths.root, "fleets": []})
            elif not pid:
                emit(f"no daemon runs for {engine.paths.root}\n")
                say("`fleetctl daemon start` or `fleetctl up` starts one")
            if check:
                raise typer.Exit(EXIT_NOT_DESIRED) from None
            return
    if json:
        emit_json(info)
    elif pid:
        emit(f"{info['pid']}\n")
    else:
        emit(
            f"the daemon runs (pid {info['pid']}, up {duration(info['uptime_seconds'])})\n"
            f"state directory: {info['state_dir']}\n"
            f"fleets: {', '.join(info['fleets']) or 'none'}\n"
        )
