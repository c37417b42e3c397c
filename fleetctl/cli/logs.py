"""`logs`: what agents wrote, read from the files themselves, so that it works with a dead daemon too."""

import heapq
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Place, on_any_engine
from fleetctl.cli.terminal import emit_bytes, say
from fleetctl.errors import UsageError

if TYPE_CHECKING:
    from fleetctl.engines.protocol import Engine

Source = tuple[str, str]  # fleet, agent id
POLL_SECONDS = 0.15
RESCAN_SECONDS = 1.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_TIMESTAMP = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?")


def parse_since(text: str, now: float) -> float:
    """A Unix time from "90", "5m", "1h30m" (that long ago) or an RFC 3339 time. UsageError for anything else."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return now - float(text)
    if re.fullmatch(r"(\d{1,6}[smhdw])+", text):
        return now - sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))
    from datetime import UTC, datetime

    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--since {text}: no time", hint="such as 30s, 5m, 1h30m, 2d or 2026-01-31T12:00:00Z") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def merged(outputs: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[tuple[str, bytes]]:
    """The lines of several agents as one stream, by the time they begin with; lines without one stay behind the line before them."""

    def stamped(order: int, agent_id: str, lines: Iterable[bytes]) -> Iterator[tuple[bytes, int, str, bytes]]:
        last = b""
        for line in lines:
            found = _TIMESTAMP.match(line)
            # A clock that was set back must not unsort one agent's own lines.
            last = max(last, found[0].replace(b" ", b"T").replace(b",", b".")) if found else last
            yield last, order, agent_id, line

    streams = [stamped(order, agent_id, lines) for order, (agent_id, lines) in enumerate(outputs)]
    for _, _, agent_id, line in heapq.merge(*streams, key=lambda item: item[:2]):
        yield agent_id, line


@on_any_engine
def logs(
    names: Annotated[list[str] | None, typer.Argument(metavar="FLEET|AGENT...", help="Default: all fleets", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("-a", "--all", help="Of fleets also agents that have ended")] = False,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new lines as they are written")] = False,
    number: Annotated[
        int | None,
        typer.Option(
            "-n", "--lines", "--tail", metavar="N", help="Last N lines of each agent [default: 100; with --since all]", show_default=False
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Only what is newer: 30s, 5m, 1h30m, or an RFC 3339 time", show_default=False),
    ] = None,
    *,
    place: Place,
) -> None:
    """Show what agents wrote to stdout and stderr; of several agents with the agent's id before each line.

    Of a fleet these are the agents there are now; an agent that is named is shown also when it has ended. A pipe gets the bytes as
    they were written; on a terminal control characters are left out.

    \b
    Examples:
      fleetctl logs -f
      fleetctl logs web-k3x9q -n 20
      fleetctl logs web --since 5m
    """
    from time import time

    if number is not None and number < 0:
        raise UsageError(f"-n {number}: 0 or more")
    after = None if since is None else parse_since(since, time())
    lines = 100 if number is None and since is None else number
    with place.open() as engine:
        sources, left_out = engine.log_sources(names or [], ended=all_)
        show = Printer(sources, always=not names or len(names) > 1 or names[0] in {fleet for fleet, _ in sources})
        hint = _left_out(names or [], left_out) if left_out and not sources else _silence(since)
        if follow:
            _follow(engine, names or [], sources, show, lines, after, ended=all_, hint=hint)
        else:
            show.all(merged((agent_id, engine.tail(fleet, agent_id, lines, after)) for fleet, agent_id in sources))
            if lines != 0 and not show.count:
                say(hint)


def _left_out(names: Sequence[str], number: int) -> str:
    whose = "1 agent that has ended" if number == 1 else f"{number} agents that have ended"
    return f"no agents now; there are logs of {whose}: `{' '.join(['fleetctl logs -a', *names])}`"


def _silence(since: str | None) -> str:
    if since is not None:
        return f"nothing was written since {since}"
    return 'nothing was written yet; many programs hold output back: try `python3 -u`, or PYTHONUNBUFFERED = "1" in environment'


class Printer:
    """Writes lines, with the agent's id before each where several agents may have their say."""

    def __init__(self, sources: Sequence[Source], *, always: bool) -> None:
        self.prefixed = always or len(sources) > 1
        self.wide = max((len(agent_id) for _, agent_id in sources), default=0)
        self.safe = sys.stdout.isatty()
        self.count = 0

    def all(self, lines: Iterable[tuple[str, bytes]]) -> None:
        block: list[bytes] = []
        for agent_id, line in lines:
            block.append(self._line(agent_id, line))
            self.count += 1
            if len(block) == 256:
                emit_bytes(b"".join(block))
                block.clear()
        emit_bytes(b"".join(block))

    def _line(self, agent_id: str, line: bytes) -> bytes:
        if self.safe:
            from fleetctl.cli.render import clean

            line = "    ".join(map(clean, line.decode(errors="replace").split("\t"))).encode()
        return f"{agent_id:<{self.wide}} | ".encode() + line + b"\n" if self.prefixed else line + b"\n"


def _follow(
    engine: "Engine",
    names: Sequence[str],
    sources: Sequence[Source],
    show: Printer,
    lines: int | None,
    since: float | None,
    *,
    ended: bool,
    hint: str,
) -> None:
    """Until interrupted. Agents that begin to write meanwhile are followed from their first line on."""
    from time import monotonic, sleep

    followers = {source: engine.follower(*source, lines, since) for source in sources}
    show.all(merged((agent_id, follower.read()) for (_, agent_id), follower in followers.items()))
    if lines != 0 and not show.count:
        say(hint)
    rescan = monotonic() + RESCAN_SECONDS
    try:
        while True:
            found = [(agent_id, line) for (_, agent_id), follower in followers.items() for line in follower.read()]
            show.all(found)
            if monotonic() >= rescan:
                rescan = monotonic() + RESCAN_SECONDS
                for source in engine.log_sources(names, ended=ended)[0]:
                    if source not in followers:
                        followers[source] = engine.follower(*source, None, None)
                        show.wide = max(show.wide, len(source[1]))
            if not found:
                sleep(POLL_SECONDS)
    finally:
        for follower in followers.values():
            follower.close()
