"""`inspect`, `history` and `events`: one thing in full, and what happened so far."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fleetctl.cli.options import All, Fleets, Json, Place, StateDir, check_fleets, on_any_engine
from fleetctl.cli.terminal import emit, emit_json, emit_lines, say_offline, width
from fleetctl.engines.local import LocalEngine, local
from fleetctl.errors import DaemonUnreachable, NotFound, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetctl.cli.render import Line
    from fleetctl.daemon.wire import FleetDetail
    from fleetctl.engines.protocol import Engine

PLOT_SAMPLES, MOST_SAMPLES = 500, 10_000
PLOT_COLUMNS = 100

T = TypeVar("T", bound=Mapping[str, object])
FleetOption = Annotated[list[str] | None, typer.Option("--fleet", metavar="FLEET", help="The same", show_default=False)]


def inspect(
    name: Annotated[str, typer.Argument(metavar="FLEET|AGENT", help="What to show")],
    all_: All = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show all that is known about one agent, or about one fleet and the settings that it was given.

    Values of environment variables are never shown. JSON has every setting.

    \b
    Examples:
      fleetctl inspect web-k3x9q
      fleetctl inspect web
      fleetctl inspect web --all
    """
    from fleetctl.cli.render import agent_lines

    with LocalEngine(state_dir) as engine:
        client = engine.client
        if name in client.daemon()["fleets"]:
            fleet = client.fleet(name)
            if json:
                emit_json(fleet)
            else:
                emit_lines(_fleet_lines(fleet, all_=all_))
            return
        try:
            agent = client.agent(name)
        except (NotFound, UsageError):  # the latter: what can be no id
            raise NotFound(f"no such fleet or agent: {name}") from None
    if json:
        emit_json(agent)
    else:
        emit_lines(agent_lines(agent, width()))


def _fleet_lines(fleet: "FleetDetail", *, all_: bool) -> "list[Line]":
    from fleetctl.cli.render import flatten, rest_line, spec_lines
    from fleetctl.config import is_default, settings

    unsupported = {setting.key for setting in settings() if not setting.supported}
    rest = [] if all_ else [key for key, value in flatten(fleet["spec"]) if key not in unsupported and is_default(key, value)]
    hidden = unsupported.union(rest)
    return [*spec_lines(fleet, width(), lambda key, value: key not in hidden), *rest_line(len(rest))]


@on_any_engine
def history(
    names: Fleets = None,
    fleet: FleetOption = None,
    number: Annotated[int, typer.Option("-n", "--limit", metavar="N", help="The last N decisions; with --plot, moments")] = 20,
    plot: Annotated[bool, typer.Option("--plot", help="Load, agents and decisions over time, of autoscaled fleets")] = False,
    svg: Annotated[str | None, typer.Option("--svg", metavar="FILE", help="The same of one fleet as a picture", show_default=False)] = None,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Show decisions on the size of fleets, with their reasons, oldest first.

    \b
    Examples:
      fleetctl history
      fleetctl history web -n 5 --json
      fleetctl history web --plot
      fleetctl history web --svg web.svg
    """
    from fleetctl.cli.render import history_lines

    fleets, limit = [*(names or []), *(fleet or [])], _limit(number)
    with place.open() as engine:
        if plot or svg is not None:
            _plot(local(engine), fleets, PLOT_SAMPLES if limit == 20 else limit, svg)
            return
        try:
            entries, silent = _of_fleets(fleets, limit, lambda fleet: engine.history(fleet, limit))
        except DaemonUnreachable as error:
            say_offline(error, "the database tells")
            entries, silent = _of_fleets(fleets, limit, lambda fleet: local(engine).offline_history(fleet, limit))
        _check_silent(engine, silent)
    if json:
        emit_json({"schema": "fleetctl/history/v1", "entries": entries})
    else:
        emit_lines(history_lines(entries, width()))


@on_any_engine
def events(
    names: Fleets = None,
    fleet: FleetOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new ones as they happen")] = False,
    number: Annotated[int, typer.Option("-n", "--limit", metavar="N", help="The last N events")] = 100,
    json: Annotated[bool, typer.Option("--json", help="JSON: one object, or one a line with --follow")] = False,
    *,
    place: Place,
) -> None:
    """Show what happened: starts, exits, restarts, changes, oldest first. In JSON each is a CloudEvent, with the id it has in every sink.

    \b
    Examples:
      fleetctl events web -n 20
      fleetctl events -f --json
    """
    fleets, limit = [*(names or []), *(fleet or [])], _limit(number)
    with place.open() as engine:
        if follow:
            _check_silent(engine, _of_fleets(fleets, 1, lambda fleet: engine.events(fleet, 1))[1])
            with engine.follow_events(fleets[0] if len(fleets) == 1 else None, limit) as stream:
                for event in stream:
                    if not fleets or event["fleet"] in fleets:
                        _show(event, engine.source, json=json)
            raise DaemonUnreachable("the daemon was stopped")
        try:
            found, silent = _of_fleets(fleets, limit, lambda fleet: engine.events(fleet, limit))
        except DaemonUnreachable as error:
            say_offline(error, "the database tells")
            found, silent = _of_fleets(fleets, limit, lambda fleet: local(engine).offline_events(fleet, limit))
        _check_silent(engine, silent)
        if json:
            from fleetctl.sinks.envelope import cloud_event

            emit_json({"schema": "fleetctl/cloudevents/v1", "events": [cloud_event(event, engine.source) for event in found]})
            return
    for event in found:
        _show(event, "", json=False)


def _plot(engine: LocalEngine, fleets: Sequence[str], limit: int, picture: str | None) -> None:
    """Charts of these fleets, or of all that have samples; or one fleet's picture into a file."""
    from fleetctl.cli import plot
    from fleetctl.cli.change import only_fleet

    try:
        there = engine.client.daemon()["fleets"]
    except DaemonUnreachable:
        there = [one["name"] for one in engine.offline_status()["fleets"]]
    check_fleets(fleets, there)
    chosen = list(fleets) or there
    if picture is not None:
        chosen = [only_fleet(chosen, f"fleetctl history %s --svg {picture}")]
    found = {name: samples for name in chosen if len(samples := engine.samples(name, min(limit, MOST_SAMPLES))) > 1}
    if not found:
        raise NotFound("nothing was recorded yet", hint="`fleetctl autoscale on` lets the load decide, and records it")
    for number, (name, samples) in enumerate(found.items()):
        try:
            decisions = engine.history(name, MOST_SAMPLES)
        except DaemonUnreachable:
            decisions = engine.offline_history(name, MOST_SAMPLES)
        if picture is not None:
            try:
                with open(picture, "w", encoding="utf-8") as file:
                    file.write(plot.svg(name, samples, decisions))
            except OSError as error:
                raise UsageError(f"cannot write {picture}: {error.strerror}") from error
            return
        emit("\n" * (number > 0) + "\n".join(plot.chart_lines(name, samples, decisions, width() or PLOT_COLUMNS)) + "\n")


def _of_fleets(names: Sequence[str], limit: int, read: "Callable[[str | None], list[T]]") -> "tuple[list[T], list[str]]":
    """The last so many rows of these fleets, or of all, in the order of their times; and the names that have none."""
    if not names:
        return read(None), []
    found = {name: read(name) for name in dict.fromkeys(names)}
    rows = sorted((row for each in found.values() for row in each), key=lambda row: str(row["at"]))
    return rows[-limit:] if limit else [], [name for name, each in found.items() if not each]


def _check_silent(engine: "Engine", names: Sequence[str]) -> None:
    """NotFound where nothing is known of a fleet; of one that was taken down there would be something."""
    if not names:
        return
    try:
        there = engine.fleet_names()
    except DaemonUnreachable:
        there = [fleet["name"] for fleet in local(engine).offline_status()["fleets"]]
    check_fleets(names, there)


def _show(event: "Mapping[str, object]", source: str, *, json: bool) -> None:
    if json:
        from fleetctl.sinks.envelope import cloud_event

        emit_json(cloud_event(event, source))
    else:
        from fleetctl.cli.render import event_line

        emit_lines([event_line(event)])


def _limit(number: int) -> int:
    if not 0 <= number <= MOST_SAMPLES:
        raise UsageError(f"-n {number}: from 0 to {MOST_SAMPLES}")
    return number
