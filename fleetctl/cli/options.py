"""The options that several commands share, each defined once."""

from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from fleetctl.errors import NotFound


def _from_either_place(ctx: typer.Context, value: str | None) -> str | None:
    """The state directory given after the command, else the one given before it."""
    before: str | None = ctx.find_root().params.get("state_dir")
    return value or before


StateDir = Annotated[str | None, typer.Option("--state-dir", metavar="DIR", help="Where everything is kept", callback=_from_either_place)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of words")]
Fleets = Annotated[list[str] | None, typer.Argument(metavar="FLEET...", help="Only these fleets", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once, without waiting for the effect")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting after this long (exit status 124)")]


def check_fleets(names: Iterable[str], there: Sequence[str]) -> None:
    """NotFound, with all unknown names, before anything is done for the others."""
    if unknown := [name for name in dict.fromkeys(names) if name not in there]:
        hint = f"fleets here: {', '.join(there)}" if there else "there are no fleets; `fleetctl up` starts one"
        raise NotFound(f"no such fleet{'s' * (len(unknown) > 1)}: {', '.join(unknown)}", hint=hint)


def positive_seconds(value: float | None) -> float | None:
    """A timeout as given; 0 and None mean no limit."""
    if value is not None and not 0 <= value <= 1e9:
        raise typer.BadParameter("seconds, 0 or more; 0 means no limit")
    return value or None
