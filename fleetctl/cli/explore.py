"""`inspect`, `history` and `events`: one thing in full, and what happened so far."""

from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json, StateDir, check_fleets
from fleetctl.cli.terminal import emit_json, emit_lines, say_offline, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import DaemonUnreachable, NotFound, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

FleetOption = Annotated[str | None, typer.Option("--fleet", metavar="FLEET", help="Only this fleet", show_default=False)]


def inspect(
    name: Annotated[str, typer.Argument(metavar="FLEET|AGENT", help="What to show")],
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show all that is known about one agent or one fleet. Values of environment variables are never shown.

    \b
    Examples:
      fleetctl inspect web-k3x9q
      fleetctl inspect web --json
    """
    from fleetctl.cli.render import agent_lines, spec_lines

    with LocalEngine(state_dir) as engine:
        client = engine.client
        if name in client.daemon()["fleets"]:
            fleet = client.fleet(name)
            if json:
                emit_json(fleet)
            else:
                emit_lines(spec_lines(fleet, width()))
            return
        try:
            agent = client.agent(name)
        except (NotFound, UsageError):  # the latter: what can be no id
            raise NotFound(f"no such fleet or agent: {name}") from None
    if json:
        emit_json(agent)
    else:
        emit_lines(agent_lines(agent, width()))


def history(
    fleet: FleetOption = None,
    number: Annotated[int, typer.Option("-n", "--limit", metavar="N", help="The last N decisions")] = 20,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show decisions on the size of fleets, with their reasons, oldest first.

    \b
    Examples:
      fleetctl history
      fleetctl history -n 5 --fleet web --json
    """
    from fleetctl.cli.render import history_lines

    with LocalEngine(state_dir) as engine:
        limit = _limit(number)
        try:
            entries = engine.client.history(fleet, limit)["entries"]
        except DaemonUnreachable as error:
            say_offline(error, "the database tells")
            entries = engine.offline_history(fleet, limit)
        if not entries:
            _check_fleet(engine, fleet)
    if json:
        emit_json({"schema": "fleetctl/history/v1", "entries": entries})
    else:
        emit_lines(history_lines(entries, width()))


def events(
    fleet: FleetOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new ones as they happen")] = False,
    number: Annotated[int, typer.Option("-n", "--limit", metavar="N", help="The last N events")] = 100,
    json: Annotated[bool, typer.Option("--json", help="JSON: one object, or one a line with --follow")] = False,
    state_dir: StateDir = None,
) -> None:
    """Show what happened: starts, exits, restarts, changes, oldest first.

    \b
    Examples:
      fleetctl events -n 20
      fleetctl events -f --json
    """
    with LocalEngine(state_dir) as engine:
        limit = _limit(number)
        if follow:
            if fleet is not None and not engine.client.events(fleet, 1)["events"]:
                _check_fleet(engine, fleet)
            with engine.client.follow_events(fleet, limit) as stream:
                for event in stream:
                    _show(event, json=json)
            raise DaemonUnreachable("the daemon was stopped")
        try:
            found = engine.client.events(fleet, limit)["events"]
        except DaemonUnreachable as error:
            say_offline(error, "the database tells")
            found = engine.offline_events(fleet, limit)
        if not found:
            _check_fleet(engine, fleet)
    if json:
        emit_json({"schema": "fleetctl/events/v1", "events": found})
        return
    for event in found:
        _show(event, json=False)


def _check_fleet(engine: LocalEngine, fleet: str | None) -> None:
    """NotFound where nothing is known of the fleet; of one that was taken down something is."""
    if fleet is None:
        return
    try:
        there = engine.client.daemon()["fleets"]
    except DaemonUnreachable:
        there = [one["name"] for one in engine.offline_status()["fleets"]]
    check_fleets([fleet], there)


def _show(event: "Mapping[str, object]", *, json: bool) -> None:
    from fleetctl.cli.render import event_line

    if json:
        emit_json(event)
    else:
        emit_lines([event_line(event)])


def _limit(number: int) -> int:
    if number < 0:
        raise UsageError(f"-n {number}: 0 or more")
    return number
