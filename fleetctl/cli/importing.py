"""`import`: a Procfile, a supervisord.conf or a PM2 file as a fleet.toml, with what has no place there and why."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json
from fleetctl.cli.terminal import emit, emit_json, harmless, say
from fleetctl.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from fleetctl.importing.draft import Imported

_LONGEST_FILE = 4 << 20
_FORMATS = ("procfile", "supervisord", "pm2")


def import_file(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Procfile, supervisord.conf, ecosystem.config.js or .json; - reads stdin")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Write there; default: print", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there")] = False,
    kind: Annotated[
        str | None, typer.Option("--format", metavar="|".join(_FORMATS), help="Where neither name nor content tells", show_default=False)
    ] = None,
    environment: Annotated[
        str, typer.Option("--env", metavar="NAME", help="With PM2: take env_NAME too, as `pm2 start --env NAME`", show_default=False)
    ] = "",
    json: Json = False,
) -> None:
    """Make a fleet.toml of another tool's file, and say what is carried over, and what is not and why.

    Nothing in the file is run, and nothing is started.

    \b
    Examples:
      fleetctl import Procfile
      fleetctl import /etc/supervisor/supervisord.conf --output fleet.toml
      pm2 jlist | fleetctl import - > fleet.toml
    """
    from fleetctl.importing.draft import to_toml

    if kind is not None and kind not in _FORMATS:
        raise UsageError(f"--format {kind}: there are {', '.join(_FORMATS)}")
    text = _read(file)
    target = Path(output) if output else None
    folder = _seen_from((target.parent if target else Path()), Path(file).parent if file != "-" else Path())
    imported = _imported(file, text, kind or _kind(file, text), folder, environment)
    made = to_toml(imported, "-" if file == "-" else Path(file).name)
    _load(made, target.parent if target else Path())
    if target:
        _write(target, made, force=force)
    elif not json:
        emit(made)
    if json:
        emit_json(_view(file, output, imported, made))
    _report(imported, output)


def _read(file: str) -> str:
    try:
        if file == "-":
            content = sys.stdin.buffer.read(_LONGEST_FILE + 1)
        else:
            with open(file, "rb") as source:
                content = source.read(_LONGEST_FILE + 1)
        if len(content) > _LONGEST_FILE:
            raise ConfigError(f"{harmless(file)}: longer than {_LONGEST_FILE >> 20} MiB, so surely no file of that kind")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{harmless(file)}: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{harmless(file)}: {getattr(error, 'strerror', None) or error}") from error


def _seen_from(here: Path, folder: Path) -> str:
    return os.path.relpath(os.path.abspath(folder), os.path.abspath(here))


def _kind(file: str, text: str) -> str:
    """Of which tool the file is: by its name, else by how it begins."""
    import re

    name = os.path.basename(file).lower()
    if name.endswith((".yml", ".yaml")):
        hint = "PM2 takes JSON too; `pm2 jlist | fleetctl import -` takes over what runs"
        raise ConfigError(f"{harmless(file)}: YAML is not read", hint=hint)
    if name.startswith("procfile"):
        return "procfile"
    if name.endswith((".json", ".js", ".cjs", ".mjs", ".pm2")):
        return "pm2"
    if re.search(r"^\[(program:|supervisord\]|include\])", text, re.MULTILINE) or name.endswith((".conf", ".ini")):
        return "supervisord"
    if re.match(r"\s*(\[|\{|module\.exports)", text):
        return "pm2"
    if all(re.match(r"\s*(#|$|[A-Za-z0-9_-]+:\s*\S)", line) for line in text.splitlines()) and text.strip():
        return "procfile"
    raise ConfigError(f"{harmless(file)}: of which tool is this?", hint=f"say it with --format: {', '.join(_FORMATS)}")


def _imported(file: str, text: str, kind: str, folder: str, environment: str) -> "Imported":
    source = "stdin" if file == "-" else file
    if environment and kind != "pm2":
        raise UsageError("--env is for PM2's files")
    if kind == "procfile":
        from fleetctl.importing import procfile

        return procfile.read(text, source, folder=folder, has_env_file=file != "-" and (Path(file).parent / ".env").is_file())
    if kind == "pm2":
        from fleetctl.importing import pm2

        return pm2.read(text, source, folder=folder, cores=len(os.sched_getaffinity(0)), environment=environment)
    from fleetctl.importing import supervisord

    here = os.path.abspath(Path(file).parent if file != "-" else Path())
    return supervisord.read(_with_included(text, source, here), here=here, host=os.uname().nodename)


def _with_included(text: str, source: str, here: str) -> list[tuple[str, str]]:
    """The file and those that its [include] names, as supervisord takes them: one level deep, sorted."""
    import glob

    from fleetctl.importing import supervisord

    files = [(source, text)]
    for pattern in supervisord.includes(text, source):
        found = sorted(glob.glob(os.path.join(here, pattern.replace("%(here)s", here))))
        if not found:
            say(f"no file is {harmless(pattern)}, which {harmless(source)} includes")
        files += [(path, _read(path)) for path in found]
    return files


def _load(made: str, folder: Path) -> None:
    """Read what was made as `up` will; say now which program or folder is not there."""
    import tomllib

    from fleetctl.config import check_runnable, spec_from_json

    for values in tomllib.loads(made)["fleet"]:
        path = os.path.abspath(folder / values.get("cwd", "."))
        spec = spec_from_json({**values, "cwd": path, **({"env_file": str(folder / values["env_file"])} if "env_file" in values else {})})
        try:
            check_runnable(spec)
        except ConfigError as error:
            say(f"look at this first: {error.message}")


def _write(target: Path, made: str, *, force: bool) -> None:
    try:
        with open(target, "w" if force else "x", encoding="utf-8") as file:
            file.write(made)
    except FileExistsError:
        raise ConfigError(f"{target} is there already", hint="--force writes over it; without --output it is printed") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target}: {getattr(error, 'strerror', None) or error}") from error


def _view(file: str, output: str | None, imported: "Imported", made: str) -> dict[str, object]:
    def remarks(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        return [{"what": what, "why": why} for what, why in pairs]

    fleets = [
        {"name": draft.name, "from": draft.origin, "carried": draft.sources, "not_carried": remarks(draft.left)}
        for draft in imported.fleets
    ]
    return {
        "schema": "fleetctl/import/v1",
        "source": file,
        "output": output,
        "fleets": fleets,
        "not_carried": remarks(imported.around),
        "toml": made,
    }


def _report(imported: "Imported", output: str | None) -> None:
    for draft in imported.fleets:
        carried = ", ".join(key for key in draft.settings)
        say(f"{draft.name}: carried over from {harmless(draft.origin)}: {carried}")
        for what, why in draft.left:
            say(f"{draft.name}: not carried over: {harmless(what)}: {why}")
    for what, why in imported.around:
        say(f"not carried over: {harmless(what)}: {why}")
    check = "fleetctl config check" + (f" {output}" if output and Path(output) != Path("fleet.toml") else "")
    say(f"wrote {output}; next: `{check}`" if output else f"next: keep it as fleet.toml, then `{check}`")
