"""`sinks`: where events are sent, how far each place has come, and whether one takes them."""

from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json, StateDir
from fleetctl.cli.terminal import emit, emit_json, emit_lines, say, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import FleetctlError, NotFound

if TYPE_CHECKING:
    from fleetctl.sinks.progress import Progress
    from fleetctl.sinks.settings import SinkSettings

sinks = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)


@sinks.callback()
def show(ctx: typer.Context, json: Json = False, state_dir: StateDir = None) -> None:
    """Show where events are sent, and how far each place has come. `sinks.toml` in the state directory says what goes where.

    \b
    Examples:
      fleetctl sinks
      fleetctl sinks check
      fleetctl sinks test audit
    """
    if ctx.invoked_subcommand is not None:
        return
    from fleetctl.sinks.joined import progress_of

    engine, found = _settings(state_dir)
    rows = [(one, progress_of(engine.paths, one.name)) for one in found]
    if json:
        emit_json({"schema": "fleetctl/sinks/v1", "sinks": [_view(one, progress) for one, progress in rows]})
        return
    from fleetctl.cli.render import Column, table

    columns = (
        Column("SINK", lambda row: row[0].name),
        Column("TYPE", lambda row: row[0].type, drop=3),
        Column("DELIVERED", lambda row: row[1].delivered, right=True, drop=2),
        Column("WAITING", lambda row: row[1].waiting, right=True),
        Column("TO", lambda row: row[0].target, drop=1, least=10, shrink=True),
        Column("TROUBLE", lambda row: row[1].trouble or "-", least=10, shrink=True),
    )
    emit_lines(table(columns, rows, width()) if rows else [[(line, "")] for line in _first(engine).splitlines()])


@sinks.command()
def check(json: Json = False, state_dir: StateDir = None) -> None:
    """Check sinks.toml without sending anything; exit status 6 and every problem when it is not valid.

    \b
    Example:
      fleetctl sinks check
    """
    engine, found = _settings(state_dir)
    names = [one.name for one in found]
    if json:
        emit_json({"schema": "fleetctl/sinks-check/v1", "file": _where(engine), "valid": True, "sinks": names})
    else:
        emit(f"{_where(engine)} is valid: {', '.join(names)}\n" if names else _first(engine))


@sinks.command("test")
def send(
    name: Annotated[str, typer.Argument(metavar="SINK", help="Which one; as `fleetctl sinks` shows it")],
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Send one event to a sink now, from here, and say whether it was taken.

    \b
    Example:
      fleetctl sinks test audit
    """
    from time import time

    from fleetctl.models import Event, to_json
    from fleetctl.sinks.envelope import cloud_event
    from fleetctl.sinks.places import Trouble, place_of

    engine, found = _settings(state_dir)
    chosen = next((one for one in found if one.name == name), None)
    if chosen is None:
        raise NotFound(f"no sink {name}", hint=f"sinks here: {', '.join(one.name for one in found) or 'none'}")
    event = {**to_json(Event(at=time(), kind="sink.test", fleet="", message="fleetctl sinks test")), "fleet": None}
    try:
        place = place_of(chosen)
        place.deliver([cloud_event(event, engine.source)])
        place.close()
    except Trouble as trouble:
        raise FleetctlError(f"sink {name} did not take it: {trouble}") from trouble
    if json:
        emit_json({"schema": "fleetctl/sinks-test/v1", "sink": name, "taken": True})
    else:
        say(f"{name} took an event of type fleetctl.sink.test: {chosen.target}")


def _settings(state_dir: str | None) -> "tuple[LocalEngine, list[SinkSettings]]":
    from fleetctl.sinks.settings import read

    engine = LocalEngine(state_dir)
    return engine, read(_where(engine))


def _where(engine: LocalEngine) -> str:
    from fleetctl.sinks.joined import settings_path

    return settings_path(engine.paths)


def _first(engine: LocalEngine) -> str:
    """What to do where there is no sink: a smallest file, to be copied."""
    return f"""no sinks. To have every event in a file, write into {_where(engine)}

[[sink]]
type = "file"
path = "{engine.paths.root}/events.jsonl"

then `fleetctl sinks check`, and `fleetctl daemon stop --keep` and `fleetctl daemon start`, which reads it
"""


def _view(one: "SinkSettings", progress: "Progress") -> dict[str, object]:
    return {
        "name": one.name,
        "type": one.type,
        "target": one.target,
        "kinds": list(one.kinds),
        "fleets": list(one.fleets),
        "position": progress.position,
        "delivered": progress.delivered,
        "failures": progress.failures,
        "waiting": progress.waiting,
        "trouble": progress.trouble or None,
    }
