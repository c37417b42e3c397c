"""`wait`: for scripts that go on when a fleet is as they need it."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json, Place, check_fleets, on_any_engine, positive_seconds
from fleetctl.cli.terminal import emit, emit_json
from fleetctl.errors import UsageError

if TYPE_CHECKING:
    from fleetctl.daemon.wire import FleetStatus

WAIT_SECONDS = 60.0


def condition(text: str) -> "Callable[[FleetStatus | None], bool]":
    """The predicate that --for names. UsageError for anything else."""
    from fleetctl.cli import waiting

    if text == "ready":
        return waiting.settled
    if text == "drained":
        return waiting.drained
    if found := re.fullmatch(r"count=(\d{1,9})", text):
        number = int(found[1])
        return lambda fleet: fleet is not None and fleet["ready_replicas"] == number
    raise UsageError(f"cannot wait for {text!r}", hint="--for ready, --for count=N or --for drained")


@on_any_engine
def wait(
    fleets: Annotated[list[str], typer.Argument(metavar="FLEET...", help="Which fleets")],
    condition_text: Annotated[str, typer.Option("--for", metavar="ready|count=N|drained", help="What to wait for")] = "ready",
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give up after this long (exit status 124); 0: never")
    ] = WAIT_SECONDS,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Wait until each of the fleets is ready, has exactly N ready agents, or has none left.

    \b
    Examples:
      fleetctl wait web api --for ready
      fleetctl wait web --for count=10 --timeout 120
      fleetctl wait web --for drained
    """
    from fleetctl.cli import waiting

    holds, limit = condition(condition_text), positive_seconds(timeout)
    with place.open() as engine:
        if condition_text != "drained":
            check_fleets(fleets, engine.fleet_names())
        watched = waiting.Watched(engine, fleets)
        status = watched.until(
            lambda status: all(holds(waiting.find(status, fleet)) for fleet in fleets), timeout=limit, what=f"not {condition_text}"
        )
        if json:
            emit_json({**status, "fleets": [one for one in status["fleets"] if one["name"] in fleets]})
        else:
            emit(waiting.summary(status, fleets) + "\n")
