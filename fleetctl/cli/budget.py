"""`budget`: what fleets have spent, by what their agents say, and may spend."""

from typing import Annotated, Any

import typer

from fleetctl.cli.options import DryRun, Fleets, Json, StateDir, check_fleets
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.render import Column, moment, table
from fleetctl.cli.terminal import emit_json, emit_lines, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import UsageError


def budget(
    fleets: Fleets = None,
    renew: Annotated[bool, typer.Option("--renew", help="Count from 0 again now; a fleet that is paused for it goes on")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show what fleets have spent in this period, in tokens and money, by what their agents say.

    `[fleet.budget]` in fleet.toml says how much they may; a fleet that has is paused until the next period, until it may spend more
    (`fleetctl up`), or until --renew.

    \b
    Examples:
      fleetctl budget
      fleetctl budget web --renew
    """
    with LocalEngine(state_dir) as engine:
        if renew:
            if not fleets:
                raise UsageError("--renew: of which fleet?", hint="name it, such as `fleetctl budget web --renew`")
            check_fleets(fleets, engine.fleet_names())
            outcome = Outcome(json=json, dry_run=dry_run)
            for name in fleets:
                outcome.attempt(name, lambda: engine.client.renew_budget(name, dry_run))  # noqa: B023 - called at once
            outcome.finish()
            return
        from fleetctl.cli.look import read_status

        found = read_status(engine, fleets or ())
    told = [{"name": one["name"], "paused": one.get("paused"), **one["budget"]} for one in found["fleets"] if "budget" in one]
    if json:
        emit_json({"schema": "fleetctl/budget/v1", "generated_at": found["generated_at"], "fleets": told})
    else:
        emit_lines(table(_COLUMNS, told, width()) if told else [[("no fleets; `fleetctl up` starts one", "dim")]])


def _of_limit(spent: str, limit: str | None) -> str:
    return spent if limit is None else f"{spent} of {limit}"


def _tokens(one: Any) -> str:  # Any, here and below: an object of the control API
    return _of_limit(f"{one['tokens']:,}", None if one["tokens_limit"] is None else f"{one['tokens_limit']:,}")


def _dollars(one: Any) -> str:
    limit = one["cost_usd_limit"]
    return _of_limit(f"{one['cost_usd']:.2f}", None if limit is None else f"{limit:.2f}")


_COLUMNS = (
    Column("FLEET", lambda one: one["name"], style=lambda one: "bold"),
    Column("PERIOD", lambda one: one["period"], drop=2),
    Column("TOKENS", _tokens, right=True),
    Column("USD", _dollars, right=True),
    Column("RENEWS", lambda one: moment(one["renewed_at"]) if one["renewed_at"] else "-", drop=3),
    Column("STATE", lambda one: f"paused: {one['paused']}" if one["paused"] else "-", least=6, shrink=True),
)
