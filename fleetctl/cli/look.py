"""`status` and `ps`: what there is, now."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetctl.cli.options import Fleets, Json, Place, check_fleets, on_any_engine
from fleetctl.cli.terminal import emit, emit_json, emit_lines, height, live, say, say_offline, width
from fleetctl.engines.local import local
from fleetctl.errors import EXIT_NOT_DESIRED, DaemonUnreachable

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Status
    from fleetctl.engines.protocol import Engine

LIVE_SECONDS = 0.5


@on_any_engine
def status(
    fleets: Fleets = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once, also on a terminal, as far as it fits")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit status 3 unless everything is as desired")] = False,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Show fleets and their agents: live on a terminal, once in a pipe.

    \b
    Examples:
      fleetctl status
      fleetctl status web --once
      fleetctl status --check --json
    """
    with place.open() as engine:
        if not (once or check or json) and live(sys.stdout.isatty()) and engine.alive():
            from fleetctl.cli.live import show_status

            show_status(engine, fleets or [], LIVE_SECONDS)
            return
        found = read_status(engine, fleets or [])
        if json:
            emit_json(found)
        else:
            from fleetctl.cli.render import status_lines

            emit_lines(status_lines(found, width(), height()))
            _say_failures(found)
    if check and not as_desired(found):
        raise typer.Exit(EXIT_NOT_DESIRED)


def read_status(engine: "Engine", names: Sequence[str] = ()) -> "Status":
    """The daemon's word on these fleets, or all, else that of the state directory, saying so. NotFound for a name that is no fleet's."""
    try:
        found = engine.status()
    except DaemonUnreachable as error:
        say_offline(error, "the records and the processes tell")
        found = local(engine).offline_status()
    if names:
        check_fleets(names, [fleet["name"] for fleet in found["fleets"]])
        found["fleets"] = [fleet for fleet in found["fleets"] if fleet["name"] in names]
    return found


def _say_failures(status: "Status") -> None:
    from fleetctl.cli.render import failure_words, plain, wrapped

    if words := failure_words(status["fleets"]):
        say(plain(wrapped(words, width())).rstrip())


def as_desired(status: "Status") -> bool:
    from fleetctl.cli.waiting import settled

    return status["daemon"]["alive"] and all(map(settled, status["fleets"]))


@on_any_engine
def ps(
    fleets: Fleets = None,
    all_: Annotated[bool, typer.Option("-a", "--all", help="Also agents that have ended")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the ids")] = False,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """List agents, one a line; as JSON always all of them. Works with a dead daemon too.

    \b
    Examples:
      fleetctl ps
      fleetctl ps web -q
      fleetctl ps --all --json
    """
    with place.open() as engine:
        found = read_status(engine, fleets or [])
    agents: list[dict[str, Any]] = [  # Any: as the daemon sent them, and the fleet's name
        {"fleet": fleet["name"], **agent}
        for fleet in found["fleets"]
        for agent in fleet["agents"]
        if all_ or json or agent["state"] != "terminated"
    ]
    if json:
        emit_json({"schema": "fleetctl/ps/v1", "generated_at": found["generated_at"], "daemon": found["daemon"], "agents": agents})
    elif quiet:
        emit("".join(f"{agent['id']}\n" for agent in agents))
    else:
        from fleetctl.cli.render import ps_lines

        emit_lines(ps_lines(agents, width()))
        _say_failures(found)
    hidden = sum(len(fleet["agents"]) for fleet in found["fleets"]) - len(agents)
    if not agents and not (quiet or json):
        say("no agents")
    if hidden and not (quiet or json):
        say(f"{hidden} more ended; `fleetctl ps -a` shows them" if agents else f"{hidden} ended; `fleetctl ps -a` shows them")
