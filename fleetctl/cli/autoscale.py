"""`autoscale`: let the load decide how many agents there are, or not, and how that stands."""

from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.change import only_fleet
from fleetctl.cli.options import DryRun, Fleets, Json, StateDir
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.terminal import emit_json, emit_lines, width
from fleetctl.engines.local import LocalEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

Fleet = Annotated[str | None, typer.Argument(metavar="FLEET", help="Which fleet; may be left out if there is one", show_default=False)]

autoscale = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)


@autoscale.callback()
def overview(ctx: typer.Context, json: Json = False, state_dir: StateDir = None) -> None:
    """Let the load decide how many agents there are. Alone, the same as `autoscale status`.

    `fleetctl up` with a file sets it as the file says.

    \b
    Examples:
      fleetctl autoscale
      fleetctl autoscale on
      fleetctl autoscale off web
    """
    if ctx.invoked_subcommand is None:
        _show_status(state_dir, (), json=json)


@autoscale.command()
def on(
    fleet: Fleet = None,
    recommend: Annotated[bool, typer.Option("--recommend", help="Only tell what it would do, in `history`")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Have the number of agents follow the load, between min_replicas and max_replicas.

    \b
    Examples:
      fleetctl autoscale on
      fleetctl autoscale on web --recommend
    """
    _set(state_dir, fleet, enabled=True, mode="recommend" if recommend else "act", dry_run=dry_run, json=json)


@autoscale.command()
def off(fleet: Fleet = None, dry_run: DryRun = False, json: Json = False, state_dir: StateDir = None) -> None:
    """Leave the fleet as large as it is.

    \b
    Examples:
      fleetctl autoscale off
      fleetctl autoscale off web --dry-run
    """
    _set(state_dir, fleet, enabled=False, mode="act", dry_run=dry_run, json=json)


@autoscale.command()
def status(fleets: Fleets = None, json: Json = False, state_dir: StateDir = None) -> None:
    """Show what was decided last, and why; `fleetctl explain FLEET` shows how it came about.

    \b
    Examples:
      fleetctl autoscale status
      fleetctl autoscale status web --json
    """
    _show_status(state_dir, fleets or (), json=json)


def _set(state_dir: str | None, fleet: str | None, *, enabled: bool, mode: str, dry_run: bool, json: bool) -> None:
    with LocalEngine(state_dir) as engine:
        word = "on" if enabled else "off"
        name = fleet or only_fleet(engine.client.daemon()["fleets"], f"fleetctl autoscale {word} %s")
        outcome = Outcome(json=json, dry_run=dry_run)
        outcome.attempt(name, lambda: engine.client.set_autoscaling(name, enabled, mode, dry_run))
        outcome.finish()


def _show_status(state_dir: str | None, fleets: "Sequence[str]", *, json: bool) -> None:
    from fleetctl.cli.look import read_status

    with LocalEngine(state_dir) as engine:
        found = read_status(engine, fleets)
    if json:
        rows = [{"name": fleet["name"], "desired_replicas": fleet["desired_replicas"], **fleet["autoscaling"]} for fleet in found["fleets"]]
        emit_json({"schema": "fleetctl/autoscale/v1", "generated_at": found["generated_at"], "fleets": rows})
        return
    from fleetctl.cli.render import autoscale_lines

    emit_lines(autoscale_lines(found["fleets"], width()))
