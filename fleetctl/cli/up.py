"""`up`: from a file, a command line or nothing at all to a fleet whose agents are ready."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetctl.cli.options import DryRun, Json, NoWait, Place, on_any_engine, positive_seconds
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.terminal import emit, emit_lines, say, width
from fleetctl.engines.local import LocalEngine
from fleetctl.engines.protocol import require
from fleetctl.errors import ConfigError, DaemonUnreachable, NotFound, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from fleetctl.config import Loaded
    from fleetctl.daemon.wire import Change
    from fleetctl.engines.protocol import Engine

UP_SECONDS = 60.0
SIZES = ("min_replicas", "max_replicas", "autoscaling", "warm_pool")
NEXT = "next: `fleetctl status` watches them, `fleetctl logs -f` shows their output, `fleetctl scale N` resizes, `fleetctl down` ends them"


@on_any_engine
def up(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FLEET...|-- CMD...]",
            help="Fleets of fleet.toml, default: all of them; or program and arguments of an agent",
            show_default=False,
        ),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("-n", "--replicas", metavar="N", help="Agents to keep running", show_default=False)
    ] = None,
    file: Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="Default: fleet.toml here", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="FLEET", help="The fleet's name", show_default=False)] = None,
    least: Annotated[
        int | None, typer.Option("--min", metavar="N", help="Fewest agents; with --max the load decides how many", show_default=False)
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", metavar="N", help="Most agents; with --min the load decides how many", show_default=False)
    ] = None,
    warm: Annotated[int | None, typer.Option("--warm", metavar="N", help="Suspended instances to keep ready", show_default=False)] = None,
    no_wait: NoWait = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting after this long (exit status 124); 0: never")
    ] = UP_SECONDS,
    dry_run: DryRun = False,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Make it so: start what fleet.toml asks for and wait until every agent is ready.

    Without a file and without a command the bundled demo agent is run. Starts the daemon where none runs. A fleet that is
    there already is changed to what is asked for; agents whose settings stay the same are not touched.

    \b
    Examples:
      fleetctl up --replicas 5
      fleetctl up -n 3 --name web -- python3 -u -m http.server 0
      fleetctl up api worker
      fleetctl up --file deploy/fleet.toml --dry-run
      fleetctl up --min 2 --max 10
      fleetctl up --warm 5
    """
    limit = positive_seconds(timeout)
    overrides = {"replicas": replicas, "name": name, "min_replicas": least, "max_replicas": most, "warm_pool.size": warm}
    given: dict[str, object] = {key: value for key, value in overrides.items() if value is not None}
    if least is not None and most is not None:
        given["autoscaling.enabled"] = True
    loaded, in_file = _load(command or [], file, given, place, dashes="--" in ctx.find_root().obj)
    with place.open_for([one.spec for one in loaded]) as engine:
        if not in_file:
            require(engine, "command", "a fleet of a command line")
            if isinstance(engine, LocalEngine):
                loaded = keeping(loaded, engine.stored_specs())
        outcome = Outcome(json=json, dry_run=dry_run)
        try:
            old = {} if dry_run or no_wait else {one.spec.name: engine.outdated(one.spec) for one in loaded}
            apply_all(engine, outcome, loaded, dry_run=dry_run)
            words = ""
            if outcome.changes and not dry_run and not no_wait:
                from fleetctl.cli.waiting import wait_until_settled

                words = wait_until_settled(engine, outcome, limit, old)
        except KeyboardInterrupt:
            say("interrupted; the fleet goes on starting in the background: `fleetctl status` shows it, `fleetctl down` ends it")
            raise
        if words and not json:
            _show(outcome)
            if place.engine == "kubernetes":
                say("with `--engine kubernetes` each, unless FLEETCTL_ENGINE or fleet.toml says it")
        if in_file and outcome.changes:
            tell_others(engine, in_file)
        outcome.finish()


def _load(
    command: Sequence[str], file: str | None, flags: Mapping[str, object], place: Place, *, dashes: bool
) -> "tuple[list[Loaded], list[str]]":
    """The fleets that are meant, checked as far as that goes without starting them; and the names of all fleets of the file, if any."""
    from pathlib import Path

    from fleetctl import config

    if command and dashes and file is not None:
        raise UsageError("either a file or a command, not both", hint="put the command into the file, or leave --file out")
    overrides = {**flags, **place.settings()}
    here = Path(os.getcwd())
    found = None if command and dashes else config.find_file(file, here)
    fleets = _of_file(found, command, overrides, certain=file is not None) if found else []
    in_file = [one.spec.name for one in fleets]
    hint = ""
    if not command and len(fleets) > 1 and (settings := flags.keys() - {"name", "autoscaling.enabled"}):
        raise UsageError(
            f"{', '.join(sorted(settings))}: for which fleet? {found and found.name} has {', '.join(in_file)}",
            hint=f"name it: `fleetctl up {in_file[0]} ...`",
        )
    if command and (file is not None or not set(command).isdisjoint(in_file)):
        if unknown := [word for word in command if word not in in_file]:
            raise NotFound(
                f"{found and found.name} has no fleet {', '.join(unknown)}", hint=f"it has {', '.join(in_file)}; a command goes behind `--`"
            )
        loaded = [one for one in fleets if one.spec.name in command]
    elif command:
        loaded = [config.load_command(command, here, overrides)]
        hint = f"; {found.name} has the fleets {', '.join(in_file)}" if found and in_file else ""
        in_file = []
    elif found:
        loaded = fleets
    else:
        loaded = [config.load_demo(overrides)]
        say("no fleet.toml here: running the bundled demo agent")
    _check_runnable(loaded, hint, of_file=bool(in_file))
    return loaded, in_file


def keeping(loaded: "Sequence[Loaded]", stored: "Mapping[str, Mapping[str, Any]]") -> "list[Loaded]":
    """Fleets of a command line, with what an earlier `up` or another command made of how many agents there are and may be.

    A file says all of a fleet; a flag says one thing, and whoever asks for a warm pool has not asked for the end of autoscaling.
    """
    from dataclasses import replace

    from fleetctl.config import spec_from_json

    kept = []
    for one in loaded:
        if one.spec.name in stored:
            known = spec_from_json(stored[one.spec.name])
            said = {key.partition(".")[0] for key, source in one.sources.items() if source != "default"}
            one = replace(one, spec=replace(one.spec, **{part: getattr(known, part) for part in SIZES if part not in said}))
        kept.append(one)
    return kept


def _of_file(path: "Path", command: Sequence[str], overrides: Mapping[str, object], *, certain: bool) -> "list[Loaded]":
    """The fleets of the file; none where it is wrong and the words are a command, which has no need of it."""
    from shutil import which

    from fleetctl import config

    try:
        return config.load_file(path, overrides)
    except ConfigError:
        if command and not certain and which(command[0]):
            return []
        raise


def _check_runnable(loaded: "Sequence[Loaded]", hint: str, *, of_file: bool) -> None:
    from fleetctl import config

    problems = []
    for one in loaded:
        try:
            if one.spec.engine == "local":
                config.check_runnable(one.spec)
            elif of_file:  # else it is refused altogether, with a better word
                from fleetctl.engines.kubernetes.manifests import objects

                objects(one.spec)
        except ConfigError as error:
            problems.append(error)
    if len(problems) > 1:
        raise ConfigError("\n".join(error.message for error in problems), hint=problems[0].hint)
    if problems:
        raise ConfigError(problems[0].message, hint=problems[0].hint + hint) from problems[0]


def tell_others(engine: "Engine", in_file: Sequence[str]) -> None:
    """Name the fleets that run and are not in the file: nothing ends them because of that."""
    try:
        others = [name for name in engine.fleet_names() if name not in in_file]
    except DaemonUnreachable:
        return
    if others:
        say(f"also running: {', '.join(others)}; `fleetctl down {' '.join(others)}` ends {'it' if len(others) == 1 else 'them'}")


def apply_all(engine: "Engine", outcome: Outcome, loaded: "Sequence[Loaded]", *, dry_run: bool) -> None:
    """Hand the specs to the daemon; a dry run without one tells what the specs and the stored ones tell."""
    if dry_run and isinstance(engine, LocalEngine) and not engine.alive():
        stored = engine.stored_specs()
        for one in loaded:
            outcome.attempt(one.spec.name, lambda: _planned(one, stored.get(one.spec.name)))  # noqa: B023 - called at once
        return
    if not dry_run and (started := engine.prepare()):
        say(started)
    for one in loaded:
        given = one.sources.get("replicas") != "default"
        outcome.attempt(one.spec.name, lambda: engine.apply(one.spec, replicas_given=given, dry_run=dry_run))  # noqa: B023 - called at once


def _planned(one: "Loaded", stored: "Mapping[str, Any] | None") -> "Change":
    """`stored`: the fleet as the daemon that is started would find it."""
    from dataclasses import replace

    from fleetctl.cli.render import command_line, count
    from fleetctl.config import differences, spec_from_json
    from fleetctl.models import to_json

    spec = one.spec
    change: Change = {
        "schema": "fleetctl/change/v1",
        "fleet": spec.name,
        "changed": True,
        "created": stored is None,
        "dry_run": True,
        "desired_replicas": spec.replicas,
        "actions": ["start the daemon", f"start {spec.replicas} x {command_line(spec.command)}"],
        "message": f"{spec.name}: would be created with {count(spec.replicas, 'agent')}",
    }
    if stored is None:
        return change
    known = spec_from_json(stored)
    wanted = spec if one.sources.get("replicas") != "default" else replace(spec, replicas=known.replicas)
    change["differences"] = [to_json(found) for found in differences(known, wanted)]
    change["message"] = f"{spec.name}: would be brought back" + (" and changed" if change["differences"] else "")
    return {**change, "desired_replicas": wanted.replicas, "actions": ["start the daemon"]}


def _show(outcome: Outcome) -> None:
    """The table at the end, and what to do next."""
    from fleetctl.cli.render import fleet_lines, plain, wrapped

    for number, fleet in enumerate(outcome.fleets):
        if number:
            emit("\n")
        emit_lines(fleet_lines(fleet, width()))
    say(plain(wrapped(NEXT, width())).rstrip())
