"""`top`: agents by what they use, live on a terminal. An agent's use is that of its whole process tree."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetctl.cli.options import Fleets, Json, StateDir, check_fleets
from fleetctl.cli.terminal import emit_json, emit_lines, height, live, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import UsageError

if TYPE_CHECKING:
    from fleetctl.cli.render import Line

Row = Mapping[str, Any]  # Any: an agent as the daemon sends it, and its fleet's name
_KEYS = {"cpu": "cpu_percent", "memory": "memory_bytes", "restarts": "restarts", "uptime": "uptime_seconds"}
_LIVE_SECONDS = 1.0


def top(
    fleets: Fleets = None,
    sort: Annotated[str, typer.Option("--sort", metavar="|".join(_KEYS), help="The most of what comes first")] = "cpu",
    number: Annotated[int, typer.Option("-n", "--limit", metavar="N", help="At most so many agents; 0: as many as fit")] = 0,
    once: Annotated[bool, typer.Option("--once", help="Print the table once, also on a terminal")] = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show agents by CPU, the busiest first: live on a terminal, once in a pipe. 100% is one core.

    Each line counts everything that the agent started; the daemon measures every few seconds.

    \b
    Examples:
      fleetctl top
      fleetctl top web --sort memory
      fleetctl top --once -n 5
    """
    if sort not in _KEYS:
        raise UsageError(f"--sort {sort}: there are {', '.join(_KEYS)}")
    if number < 0:
        raise UsageError(f"-n {number}: a number of agents, or 0 for as many as fit")
    names = fleets or []

    def draw(status: Mapping[str, Any], columns: int, lines: int) -> "list[Line]":  # Any: a status as the daemon sends it
        return [*top_lines(ranked(status, names, sort), columns, _least(number, lines - 4)), [("", "")], _foot(sort, columns)]

    with LocalEngine(state_dir) as engine:
        if not (once or json) and live(sys.stdout.isatty()):
            from fleetctl.cli.live import show_status

            show_status(engine, names, _LIVE_SECONDS, draw=draw)
            return
        status = engine.client.status()
    check_fleets(names, [fleet["name"] for fleet in status["fleets"]])
    rows = ranked(status, names, sort)
    if json:
        shown = rows[:number] if number else rows
        emit_json({"schema": "fleetctl/top/v1", "generated_at": status["generated_at"], "sort": sort, "agents": shown})
    else:
        room = height()
        emit_lines(top_lines(rows, width(), _least(number, None if room is None else room - 2)))


def _least(number: int, room: int | None) -> int | None:
    """How many agents to show: as asked, and no more than there is room for."""
    return min((limit for limit in (number or None, None if room is None else max(1, room)) if limit is not None), default=None)


def ranked(status: Mapping[str, Any], names: Sequence[str], sort: str) -> list[Row]:  # Any: a status as the daemon sends it
    """The agents that run, of these fleets or all, the greediest first; what is not measured yet comes last."""
    rows: list[Row] = [
        {"fleet": fleet["name"], **agent}
        for fleet in status["fleets"]
        if not names or fleet["name"] in names
        for agent in fleet["agents"]
        if agent["pid"] is not None or agent["state"] in ("backoff", "failed")
    ]
    key = _KEYS[sort]
    return sorted(rows, key=lambda row: (row[key] is None, -(row[key] or 0), row["id"]))


def top_lines(rows: Sequence[Row], columns: int | None, most: int | None) -> "list[Line]":
    """The sums, then a line for each of the first `most` agents."""
    from fleetctl.cli import render

    cpu = [row["cpu_percent"] for row in rows if row["cpu_percent"] is not None]
    memory = [row["memory_bytes"] for row in rows if row["memory_bytes"] is not None]
    sums = f"{render.count(len(rows), 'agent')}, {sum(cpu) / 100:.2f} cores busy, {render.size(sum(memory))} of memory"
    lines = [render.clip([(sums, "bold")], columns)]
    if not rows:
        return [*lines, [("no agents run", "dim")]]
    shown = rows if most is None else rows[:most]
    lines += render.table(_columns(), shown, columns)
    if len(rows) > len(shown):
        lines.append([(render.cut(f"... {render.count(len(rows) - len(shown), 'more agent')}", columns or 80), "dim")])
    return lines


def _columns() -> "list[Any]":  # Any: render.Column; render is not imported before it is needed
    from fleetctl.cli import render

    return [
        render.Column("AGENT", lambda row: row["id"], least=8),
        render.Column("FLEET", lambda row: row["fleet"], drop=6),
        render.Column("CPU", lambda row: render.percent(row["cpu_percent"]), right=True, least=7),
        render.Column("MEMORY", lambda row: render.size(row["memory_bytes"]), right=True, least=6),
        render.Column("STATE", lambda row: row["state"], drop=2, least=9, style=render.state_style),
        render.Column("PID", lambda row: render.or_dash(row["pid"]), right=True, drop=4, least=7),
        render.Column("UPTIME", lambda row: render.duration(row["uptime_seconds"]), right=True, drop=3, least=6),
        render.Column("RESTARTS", lambda row: row["restarts"], right=True, drop=5),
        render.Column("NOTE", render.note_text, drop=1, least=12, shrink=True, reword=render.telling_first),
    ]


def _foot(sort: str, columns: int) -> "Line":
    from fleetctl.cli.render import cut

    return [(cut(f"by {sort}, whole process trees; q or Ctrl-C ends this view", columns), "dim")]
