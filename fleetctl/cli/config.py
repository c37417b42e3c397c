"""`config`: write, check and show fleet.toml."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import All, DryRun, Json, Place, on_any_engine
from fleetctl.cli.terminal import emit, emit_json, emit_lines, say, width
from fleetctl.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fleetctl.config import Loaded

config = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)
File = Annotated[str | None, typer.Argument(metavar="FILE", help="Default: fleet.toml here", show_default=False)]
FileOption = Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="The same, as `up` takes it", show_default=False)]


@config.callback()
def choose(ctx: typer.Context) -> None:
    """Write, check and show fleet.toml.

    \b
    Examples:
      fleetctl config init
      fleetctl config check
    """
    if ctx.invoked_subcommand is None:
        emit(ctx.get_help() + "\n")


@config.command()
def init(
    file: File = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="FLEET", help="The fleet's name; default: that of the folder", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write a first fleet.toml, with every setting explained.

    \b
    Examples:
      fleetctl config init
      fleetctl config init --name web --dry-run
    """
    import re

    from fleetctl.config import starter
    from fleetctl.models import NAME_PATTERN

    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"--name {name}: lower-case letters, digits and dashes, at most 40 of them")
    folder = re.sub(r"[^a-z0-9]+", "-", Path.cwd().name.lower()).strip("-")[:40].strip("-")
    text = starter(name or folder or "demo")
    if dry_run:
        emit(text)
        return
    path = Path(file or "fleet.toml")
    try:
        with open(path, "w" if force else "x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint="--force writes over it; `fleetctl config check` checks it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    say(f"wrote {path}; next: `fleetctl up`")


@config.command()
def check(file: File = None, option: FileOption = None, json: Json = False) -> None:
    """Check a file without starting anything; exit status 6 and every problem when it is not valid.

    \b
    Examples:
      fleetctl config check
      fleetctl config check deploy/fleet.toml
    """
    from fleetctl.config import check_runnable

    path, loaded = _load(_given(file, option))
    for one in loaded:
        if one.spec.engine == "kubernetes":
            from fleetctl.engines.kubernetes.manifests import objects

            objects(one.spec)
        else:
            check_runnable(one.spec)
    names = [one.spec.name for one in loaded]
    if json:
        emit_json({"schema": "fleetctl/config-check/v1", "file": str(path), "valid": True, "fleets": names})
    else:
        emit(f"{path} is valid: {', '.join(names)}\n")


@config.command()
def show(file: File = None, option: FileOption = None, all_: All = False, json: Json = False) -> None:
    """Show the settings that somebody gave, with their values and where these came from. Values of environment variables are hidden.

    JSON has every setting.

    \b
    Examples:
      fleetctl config show
      fleetctl config show --all
    """
    from fleetctl.cli.render import Column, flatten, rest_line, table, toml_value
    from fleetctl.config import settings, spec_to_json

    path, loaded = _load(_given(file, option))
    described = []
    for one in loaded:
        values = spec_to_json(one.spec)
        values["environment"] = dict.fromkeys(values["environment"], "***")
        described.append((values, one.sources))
    if json:
        fleets = [{"name": values["name"], "settings": values, "sources": dict(sources)} for values, sources in described]
        emit_json({"schema": "fleetctl/config/v1", "file": str(path), "fleets": fleets})
        return
    columns = (
        Column("SETTING", lambda row: row[0]),
        Column("VALUE", lambda row: toml_value(row[1]), least=5, shrink=True),
        Column("FROM", lambda row: row[2], drop=1),
    )
    unsupported = {setting.key for setting in settings() if not setting.supported}
    for number, (values, sources) in enumerate(described):
        if number:
            emit("\n")
        rows = [(key, value, _source(sources, key)) for key, value in flatten(values) if key not in unsupported]
        shown = [row for row in rows if all_ or row[2] != "default"]
        emit_lines([[(f"# {values['name']}", "dim")], *table(columns, shown, width()), *rest_line(len(rows) - len(shown))])


def _source(sources: "dict[str, str] | object", key: str) -> str:
    """Where the setting came from; entries of a table, such as environment.PATH, come from where the table did."""
    assert hasattr(sources, "get")
    return str(sources.get(key) or sources.get(key.partition(".")[0]) or "default")


@config.command()
@on_any_engine
def diff(file: File = None, option: FileOption = None, json: Json = False, *, place: Place) -> None:
    """Show what `up` would change: settings live, or by rollout, with new processes. Values of environment variables are hidden.

    \b
    Examples:
      fleetctl config diff
      fleetctl config diff deploy/fleet.toml --json
    """
    from fleetctl.cli.outcome import Outcome
    from fleetctl.cli.up import apply_all, tell_others

    _, loaded = _load(_given(file, option), place.settings())
    with place.open_for([one.spec for one in loaded]) as engine:
        outcome = Outcome(json=json, dry_run=True)
        apply_all(engine, outcome, loaded, dry_run=True)
        tell_others(engine, [one.spec.name for one in loaded])
        outcome.finish()


@config.command()
def schema() -> None:
    """Print the JSON Schema of fleet.toml, for editors.

    \b
    Example:
      fleetctl config schema > fleet.schema.json
    """
    import json

    from fleetctl.config import schema as json_schema

    emit(json.dumps(json_schema(), indent=2) + "\n")


def _given(file: str | None, option: str | None) -> str | None:
    if file is not None and option is not None:
        raise UsageError("one file: either FILE or --file FILE")
    return option if file is None else file


def _load(file: str | None, overrides: "Mapping[str, object] | None" = None) -> "tuple[Path, list[Loaded]]":
    from fleetctl.config import find_file, load_file

    path = find_file(file, Path.cwd())
    if path is None:
        raise ConfigError("there is no fleet.toml here", hint="`fleetctl config init` writes one")
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path, load_file(path, overrides)
