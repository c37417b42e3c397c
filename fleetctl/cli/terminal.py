"""Where words go: data to stdout, everything said about it to stderr; and what kind of thing is listening there. Cheap to import."""

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fleetctl.errors import DaemonUnreachable, FleetctlError

if TYPE_CHECKING:
    from fleetctl.cli.render import Line


class ReaderGone(Exception):
    """Whoever read stdout, `head` say, has closed it. Not an OSError, which would be taken for a fault of the work itself."""


class AlreadyInJson(Exception):
    """The error stands in the JSON object that was printed: its words are still to be said, and its exit status to be given."""

    def __init__(self, error: FleetctlError) -> None:
        super().__init__(error.message)
        self.error = error


def emit(text: str) -> None:
    """Data, to stdout, at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> Exception:
    return ReaderGone() if isinstance(error, BrokenPipeError) else FleetctlError(f"the output cannot be written: {error.strerror}")


def emit_bytes(data: bytes) -> None:
    """Data that need not be text, to stdout, at once."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        raise _unwritten(error) from error


def emit_json(value: Mapping[str, object]) -> None:
    """One object on one line."""
    from json import dumps

    emit(dumps(value) + "\n")


def emit_lines(lines: "Iterable[Line]") -> None:
    from fleetctl.cli import render

    emit(render.ansi(lines) if colours(sys.stdout.isatty()) else render.plain(lines))


def say(text: str) -> None:
    """Words, to stderr. That nobody listens is no reason to stop working."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def say_offline(error: DaemonUnreachable, source: str) -> None:
    """That no daemon answered, why unless that is plain, and what told the rest."""
    plain = error.message.startswith("The daemon does not run")
    say(f"{'the daemon does not run' if plain else error.message}; this is what {source}")


def harmless(text: str) -> str:
    """The text without control characters; costs nothing where there are none."""
    if text.isprintable():
        return text
    from fleetctl.cli.render import clean

    return clean(text)


def colours(terminal: bool) -> bool:
    """Whether to send colours: on a terminal that knows any, unless NO_COLOR is set to something."""
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def live(stream_is_terminal: bool) -> bool:
    """Whether a line can be written over: on a terminal that can move its cursor."""
    return stream_is_terminal and os.environ.get("TERM", "dumb") != "dumb"


def width() -> int | None:
    """Columns to fit a table to; None in a pipe, where whoever reads wants it whole."""
    if os.environ.get("COLUMNS", "").isdigit() and int(os.environ["COLUMNS"]) > 0:
        return int(os.environ["COLUMNS"])
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def height() -> int | None:
    """Lines that are seen at once, less one for the prompt; None in a pipe."""
    try:
        return max(0, os.get_terminal_size(sys.stdout.fileno()).lines - 1) or None
    except (OSError, ValueError):
        return None


class Progress:
    """One line on stderr that is written over while something is waited for; nothing at all in a pipe."""

    def __init__(self) -> None:
        self.shown = ""
        self.live = live(sys.stderr.isatty())

    def update(self, text: str) -> None:
        if not self.live or text == self.shown:
            return
        from fleetctl.cli.render import cut

        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:
            columns = 80
        self._write(f"\r\x1b[K{cut(harmless(text), columns - 1)}")
        self.shown = text

    def end(self) -> None:
        """Take the line away."""
        if self.shown:
            self._write("\r\x1b[K")
            self.shown = ""

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self.live = False
