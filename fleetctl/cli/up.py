"""`up`: from a file, a command line or nothing at all to a fleet whose agents are ready."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import DryRun, Json, NoWait, StateDir, positive_seconds
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.terminal import emit, emit_lines, say, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import ConfigError, DaemonUnreachable, NotFound, UsageError

if TYPE_CHECKING:
    from fleetctl.config import Loaded
    from fleetctl.daemon.wire import Change

UP_SECONDS = 60.0


def up(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- CMD...]", help="Program and arguments of an agent; default: what fleet.toml says", show_default=False),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("-n", "--replicas", metavar="N", help="Agents to keep running", show_default=False)
    ] = None,
    file: Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="Default: fleet.toml here", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="FLEET", help="The fleet's name", show_default=False)] = None,
    least: Annotated[int | None, typer.Option("--min", metavar="N", help="Fewest agents", show_default=False)] = None,
    most: Annotated[int | None, typer.Option("--max", metavar="N", help="Most agents", show_default=False)] = None,
    warm: Annotated[int | None, typer.Option("--warm", metavar="N", help="Suspended instances to keep ready", show_default=False)] = None,
    no_wait: NoWait = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting after this long (exit status 124); 0: never")
    ] = UP_SECONDS,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Make it so: start what fleet.toml asks for and wait until every agent is ready.

    Without a file and without a command the bundled demo agent is run. Starts the daemon where none runs. A fleet that is
    there already is changed to what is asked for; agents whose settings stay the same are not touched.

    \b
    Examples:
      fleetctl up --replicas 5
      fleetctl up -n 3 --name web -- python3 -m http.server 0
      fleetctl up --file deploy/fleet.toml --dry-run
      fleetctl up --warm 5
    """
    limit = positive_seconds(timeout)
    overrides = {"replicas": replicas, "name": name, "min_replicas": least, "max_replicas": most, "warm_pool.size": warm}
    loaded = _load(command or [], file, {key: value for key, value in overrides.items() if value is not None})
    with LocalEngine(state_dir) as engine:
        outcome = Outcome(json=json, dry_run=dry_run)
        try:
            old = {} if dry_run or no_wait else _outdated(engine, loaded)
            _apply(engine, outcome, loaded, dry_run=dry_run)
            words = ""
            if outcome.changes and not dry_run and not no_wait:
                from fleetctl.cli.waiting import wait_until_settled

                words = wait_until_settled(engine, outcome, limit, old)
        except KeyboardInterrupt:
            say("interrupted; the fleet goes on starting in the background: `fleetctl status` shows it, `fleetctl down` ends it")
            raise
        if words and not json:
            _show(outcome)
        outcome.finish()


def _load(command: Sequence[str], file: str | None, overrides: Mapping[str, object]) -> "list[Loaded]":
    """The fleets that are meant, checked as far as that goes without starting them."""
    from pathlib import Path

    from fleetctl import config

    if command and file is not None:
        raise UsageError("either a file or a command, not both", hint="put the command into the file, or leave --file out")
    here = Path(os.getcwd())
    found = None if command else config.find_file(file, here)
    if command:
        loaded = [config.load_command(command, here, overrides)]
    elif found:
        loaded = config.load_file(found, overrides)
    else:
        loaded = [config.load_demo(overrides)]
    problems = []
    for one in loaded:
        try:
            config.check_runnable(one.spec)
        except ConfigError as error:
            problems.append(error)
    if len(problems) > 1:
        raise ConfigError("\n".join(error.message for error in problems), hint=problems[0].hint)
    if problems:
        raise problems[0]
    return loaded


def _apply(engine: LocalEngine, outcome: Outcome, loaded: "Sequence[Loaded]", *, dry_run: bool) -> None:
    """Hand the specs to the daemon; a dry run without one tells what the specs alone tell."""
    from fleetctl import config

    if dry_run and engine.daemon_pid() is None:
        for one in loaded:
            outcome.attempt(one.spec.name, lambda: _planned(one))  # noqa: B023 - called at once
        return
    if not dry_run:
        started = engine.ensure_daemon()
        if started is not None:
            say(f"started the daemon (pid {started})")
    for one in loaded:
        spec, given = config.spec_to_json(one.spec), one.sources.get("replicas") != "default"
        outcome.attempt(one.spec.name, lambda: engine.client.apply(one.spec.name, spec, given, dry_run))  # noqa: B023 - called at once


def _outdated(engine: LocalEngine, loaded: "Sequence[Loaded]") -> dict[str, set[int]]:
    """By fleet the processes that do not match the spec that is about to be applied, and have to be replaced."""
    pids: dict[str, set[int]] = {}
    for one in loaded:
        try:
            fleet = engine.client.fleet(one.spec.name)
        except (DaemonUnreachable, NotFound):
            continue
        if fleet["spec_hash"] != one.spec.process_hash:
            pids[one.spec.name] = {agent["pid"] for agent in fleet["agents"] if agent["pid"] is not None}
    return pids


def _planned(one: "Loaded") -> "Change":
    spec = one.spec
    return {
        "schema": "fleetctl/change/v1",
        "fleet": spec.name,
        "changed": True,
        "created": True,
        "dry_run": True,
        "desired_replicas": spec.replicas,
        "actions": ["start the daemon", f"start {spec.replicas} x {' '.join(spec.command)}"],
        "message": f"{spec.name}: would be created with {spec.replicas} agents",
    }


def _show(outcome: Outcome) -> None:
    """The table at the end, and what to do next."""
    from fleetctl.cli.render import fleet_lines

    for number, fleet in enumerate(outcome.fleets):
        if number:
            emit("\n")
        emit_lines(fleet_lines(fleet, width()))
    say(
        "next: `fleetctl status` watches them, `fleetctl logs -f` shows their output, `fleetctl scale N` resizes, `fleetctl down` ends them"
    )
