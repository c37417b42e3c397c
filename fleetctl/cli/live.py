"""The live table of `status`: redrawn when something changed, at most as often as asked, no larger than the terminal. Needs rich."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fleetctl.cli import render
from fleetctl.cli.options import check_fleets
from fleetctl.errors import DaemonUnreachable

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Status
    from fleetctl.engines.protocol import Engine

    Draw = Callable[[Status, int, int], list[render.Line]]
    """A status, the terminal's width and height -> what it shows."""

FOOT_LINES = 2


def show_status(
    engine: "Engine", fleets: Sequence[str], seconds: float, console: Console | None = None, *, draw: "Draw | None" = None
) -> None:
    """Watch these fleets, or all, until interrupted; `draw` shows them, else `frame`.

    Raises DaemonUnreachable when the daemon ends, NotFound for an unknown name.
    """
    check_fleets(fleets, engine.fleet_names() if fleets else ())
    only = fleets[0] if len(fleets) == 1 else None
    screen = console or Console(highlight=False)
    shown: list[render.Line] = []
    with engine.watch_status(seconds, only) as stream, Live(console=screen, auto_refresh=False, vertical_overflow="crop") as live:
        for status in stream:
            if fleets:
                status["fleets"] = [fleet for fleet in status["fleets"] if fleet["name"] in fleets]
            lines = (draw or frame)(status, screen.width, screen.height)
            if lines != shown:
                live.update(as_text(lines), refresh=True)
                shown = lines
    raise DaemonUnreachable("the daemon was stopped")


def frame(status: "Status", width: int, height: int) -> list[render.Line]:
    """What the terminal shows: the fleets, as far as there is room, and a line on the daemon."""
    daemon = status["daemon"]
    # An engine elsewhere has no daemon; its name stands for it.
    who = daemon["state_dir"] if daemon["pid"] is None else f"daemon pid {daemon['pid']}, up {render.duration(daemon['uptime_seconds'])}"
    foot = f"{who}; Ctrl-C ends this view"
    body = render.status_lines(status, width, max(3, height - FOOT_LINES - 1))
    note: list[render.Line] = [[(render.cut(render.clean(daemon["note"]), width), "yellow")]] if daemon["note"] else []
    return [*body, *note, [("", "")], [(render.cut(foot, width), "dim")]]


def as_text(lines: list[render.Line]) -> Group:
    """Text objects, in which rich reads no markup: what agents say stays as they said it."""
    return Group(*(Text.assemble(*line, no_wrap=True, overflow="crop") for line in lines))
