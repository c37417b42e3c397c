"""The live table of `status`: redrawn when something changed, at most as often as asked, no larger than the terminal. Needs rich."""

import contextlib
import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
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
QUIT_KEYS = b"qQ\x1b"


def show_status(
    engine: "Engine", fleets: Sequence[str], seconds: float, console: Console | None = None, *, draw: "Draw | None" = None
) -> None:
    """Watch these fleets, or all, until interrupted or told by a key; `draw` shows them, else `frame`.

    Raises DaemonUnreachable when the daemon ends, NotFound for an unknown name.
    """
    check_fleets(fleets, engine.fleet_names() if fleets else ())
    only = fleets[0] if len(fleets) == 1 else None
    screen = console or Console(highlight=False)
    shown: list[render.Line] = []
    quitting = threading.Event()
    try:
        with (
            keys(quitting),
            engine.watch_status(seconds, only) as stream,
            Live(console=screen, auto_refresh=False, vertical_overflow="crop") as live,
        ):
            for status in stream:
                if fleets:
                    status["fleets"] = [fleet for fleet in status["fleets"] if fleet["name"] in fleets]
                lines = (draw or frame)(status, screen.width, screen.height)
                if lines != shown:
                    live.update(as_text(lines), refresh=True)
                    shown = lines
    except KeyboardInterrupt:
        if not quitting.is_set():
            raise
        return
    raise DaemonUnreachable("the daemon was stopped")


@contextlib.contextmanager
def keys(quitting: threading.Event) -> Iterator[None]:
    """Take what is typed meanwhile, so that it neither breaks the table nor is left for the shell; q and Esc interrupt, and say so."""
    terminal = sys.stdin.fileno()
    if not sys.stdin.isatty() or os.tcgetpgrp(terminal) != os.getpgrp():  # a job in the background must not touch the terminal
        yield
        return
    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[3] &= ~(termios.ICANON | termios.ECHO)  # Ctrl-C and Ctrl-Z stay what they are
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while typed := os.read(terminal, 64):
                if any(key in QUIT_KEYS for key in re.sub(rb"\x1b[\[O][0-?]*[ -/]*[@-~]", b"", typed)):  # an arrow begins with Esc too
                    quitting.set()
                    os.kill(os.getpid(), signal.SIGINT)
                    return

    # A thread, because the main one waits for the daemon; it ends with us.
    threading.Thread(target=listen, name="keys", daemon=True).start()
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def frame(status: "Status", width: int, height: int) -> list[render.Line]:
    """What the terminal shows: the fleets, as far as there is room, and a line on the daemon."""
    daemon = status["daemon"]
    # An engine elsewhere has no daemon; its name stands for it.
    who = daemon["state_dir"] if daemon["pid"] is None else f"daemon pid {daemon['pid']}, up {render.duration(daemon['uptime_seconds'])}"
    foot = f"{who}; q or Ctrl-C ends this view"
    words = render.failure_words(status["fleets"])
    hint = render.wrapped(words, width, "yellow") if words else []
    body = render.status_lines(status, width, max(3, height - FOOT_LINES - len(hint) - 1))
    note: list[render.Line] = [[(render.cut(render.clean(daemon["note"]), width), "yellow")]] if daemon["note"] else []
    return [*body, *hint, *note, [("", "")], [(render.cut(foot, width), "dim")]]


def as_text(lines: list[render.Line]) -> Group:
    """Text objects, in which rich reads no markup: what agents say stays as they said it."""
    return Group(*(Text.assemble(*line, no_wrap=True, overflow="crop") for line in lines))
