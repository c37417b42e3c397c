"""`probe`: whether a command can be suspended, how it is known to be ready, what ends it; tried out, with the settings that follow."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json
from fleetctl.cli.render import Line, clean, command_line
from fleetctl.cli.terminal import emit_json, emit_lines
from fleetctl.errors import UsageError

if TYPE_CHECKING:
    from fleetctl.core.trial import Advice, Trial
    from fleetctl.models import FleetSpec
    from fleetctl.trial import Step

_LONGEST_PAUSE_SECONDS = 3600.0
_NAME_WIDTH = 22
_VERDICTS = {
    "yes": ("a warm pool is safe", "green"),
    "no": ("no warm pool", "red"),
    "unsure": ("a warm pool may be safe", "yellow"),
}


def probe(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FLEET|-- CMD...]", help="A fleet of fleet.toml, or program and arguments", show_default=False),
    ] = None,
    http: Annotated[str | None, typer.Option("--http", metavar="URL", help="It is ready when this answers", show_default=False)] = None,
    tcp: Annotated[
        str | None, typer.Option("--tcp", metavar="ADDRESS", help="It is ready when this takes connections", show_default=False)
    ] = None,
    file: Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="Default: fleet.toml here", show_default=False)] = None,
    suspend: Annotated[
        list[float] | None,
        typer.Option("--suspend", metavar="SECONDS", help="Suspend it for so long; may be repeated [default: 2, 10]", show_default=False),
    ] = None,
    ready_timeout: Annotated[float, typer.Option("--ready-timeout", metavar="SECONDS", help="It has to be ready by then")] = 60.0,
    stop_timeout: Annotated[float, typer.Option("--stop-timeout", metavar="SECONDS", help="It has to end so soon when asked to")] = 10.0,
    json: Json = False,
) -> None:
    """Run a command through start, suspension, stop and restart, and say what is safe and which settings fit it.

    It is run for real, once more beside whatever runs already; nothing of it is left. Without a probe it is looked for at the
    ports it listens on. Exit status 1: it never became ready.

    \b
    Examples:
      fleetctl probe -- python3 -m http.server 8000
      fleetctl probe --suspend 60 -- gunicorn -b 127.0.0.1:8000 app:app
      fleetctl probe web
    """
    from fleetctl import trial
    from fleetctl.core.trial import advise

    pauses = suspend if suspend else [2.0, 10.0]
    if not all(0 < seconds <= _LONGEST_PAUSE_SECONDS for seconds in pauses):
        raise UsageError(f"--suspend takes seconds above 0, at most {_LONGEST_PAUSE_SECONDS:g}")
    if ready_timeout <= 0 or stop_timeout <= 0:
        raise UsageError("--ready-timeout and --stop-timeout take seconds above 0")
    overrides = {key: value for key, value in (("readiness.http", http), ("readiness.tcp", tcp)) if value is not None}
    spec = _spec(command or [], file, overrides, dashes="--" in ctx.find_root().obj)
    steps: list[Step] = []

    def tell(step: "Step") -> None:
        steps.append(step)
        if not json:
            emit_lines([_step_line(step)])

    if not json:
        emit_lines([[(f"trying {clean(command_line(spec.command))}", "bold")]])
    plan = trial.Plan(pauses=tuple(pauses), ready_timeout_seconds=ready_timeout, stop_timeout_seconds=stop_timeout)
    seen = trial.run(spec, plan, tell)
    advice = advise(seen)
    if json:
        emit_json(_report(spec, seen, advice, steps))
    else:
        emit_lines(_advice_lines(advice, ready=seen.ready is not None))
    if seen.ready is None:
        raise typer.Exit(1)


def _spec(words: list[str], file: str | None, overrides: dict[str, str], *, dashes: bool) -> "FleetSpec":
    """The fleet that is meant: of a command line behind `--`, else of the file."""
    from fleetctl import config

    here = Path(os.getcwd())
    if words and dashes:
        loaded = config.load_command(words, here, overrides)
    else:
        found = config.find_file(file, here)
        if found is None:
            raise UsageError("there is no fleet.toml here, and no command was given", hint="`fleetctl probe -- CMD` tries a command")
        fleets = config.load_file(found, overrides)
        named = [one for one in fleets if one.spec.name in words] if words else fleets
        if len(named) != 1 or len(words) > 1:
            known = [one.spec.name for one in fleets]
            raise UsageError(
                f"which fleet? {found.name} has {', '.join(known)}", hint=f"`fleetctl probe {known[0]}`; a command goes behind `--`"
            )
        (loaded,) = named
    config.check_runnable(loaded.spec)
    return loaded.spec


def _step_line(step: "Step") -> Line:
    mark = ("ok  ", "green") if step.ok else ("no  ", "red")
    return [(f"{step.name:<{_NAME_WIDTH}}", ""), mark, (clean(step.text), "")]


def _advice_lines(advice: "Advice", *, ready: bool) -> list[Line]:
    text, style = _VERDICTS[advice.warm_pool]
    lines: list[Line] = [[("", "")], [(text, f"bold {style}"), ("" if not advice.reasons else f": {clean('; '.join(advice.reasons))}", "")]]
    lines += [[(f"note: {clean(note)}", "yellow")] for note in advice.notes]
    if ready:
        lines += [[("", "")], [("for fleet.toml:", "bold")], *([(line, "")] for line in toml(advice))]
    return lines


def toml(advice: "Advice") -> list[str]:
    """The settings as lines of a fleet.toml."""
    import json

    lines: list[str] = []
    table = ""
    for key, value in advice.settings:
        section, _, leaf = f"fleet.{key}".rpartition(".")
        if section != table:
            lines += [*([""] if lines else []), f"[{section}]"]
            table = section
        lines.append(f"{leaf} = {json.dumps(value)}")
    return lines


def _report(spec: "FleetSpec", seen: "Trial", advice: "Advice", steps: "list[Step]") -> dict[str, object]:
    return {
        "schema": "fleetctl/probe/v1",
        "command": list(spec.command),
        "ready": seen.ready is not None,
        "steps": [{"name": step.name, "ok": step.ok, "seconds": step.seconds, "text": step.text} for step in steps],
        "warm_pool": str(advice.warm_pool),
        "reasons": list(advice.reasons),
        "notes": list(advice.notes),
        "settings": dict(advice.settings),
        "toml": "\n".join(toml(advice)) + "\n" if advice.settings else "",
    }
