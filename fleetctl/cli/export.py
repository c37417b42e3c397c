"""`export`: the fleets of fleet.toml in the words of other engines."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json
from fleetctl.cli.terminal import emit, emit_json, harmless, say
from fleetctl.errors import ConfigError, FleetctlError, NotFound

if TYPE_CHECKING:
    from fleetctl.engines.kubernetes.names import Object
    from fleetctl.engines.kubernetes.notes import Note
    from fleetctl.models import FleetSpec

export = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)
HEAD = "# Written by `fleetctl export kubernetes`.\n"
Exported = tuple["FleetSpec", "list[Object]", "list[Note]"]


@export.callback()
def choose(ctx: typer.Context) -> None:
    """Print fleets for other engines.

    \b
    Example:
      fleetctl export kubernetes
    """
    if ctx.invoked_subcommand is None:
        emit(ctx.get_help() + "\n")


@export.command()
def kubernetes(
    fleets: Annotated[
        list[str] | None, typer.Argument(metavar="FLEET...", help="Only these fleets of the file; default: all", show_default=False)
    ] = None,
    file: Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="Default: fleet.toml here", show_default=False)] = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "-o", "--output-dir", metavar="DIR", help="Write a file for each object, and kustomization.yaml, there", show_default=False
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="Container image that holds the command", show_default=False)
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="NAME", help="Namespace of the objects", show_default=False)
    ] = None,
    sandboxes: Annotated[
        str | None,
        typer.Option(
            "--agent-sandbox", metavar="VERSION", help="Warm pools for the agent-sandbox API, such as v1beta1", show_default=False
        ),
    ] = None,
    role: Annotated[bool, typer.Option("--role", help="Also the Role that `--engine kubernetes` needs")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are not ours")] = False,
    json: Json = False,
) -> None:
    """Print what `up --engine kubernetes` would apply, as YAML. What does not map to a cluster is named on stderr and in comments.

    \b
    Examples:
      fleetctl export kubernetes | kubectl apply --server-side -f -
      fleetctl export kubernetes --output-dir deploy --image registry.example.com/worker:1.0
      fleetctl export kubernetes --json
    """
    exported = [
        _export(spec, sandboxes) for spec in _specs(fleets or [], file, {"kubernetes.image": image, "kubernetes.namespace": namespace})
    ]
    extra = _role(exported, namespace) if role else []
    _check_names([one for _, objects, _ in exported for one in objects])
    if not json:
        for spec, _, notes in exported:
            for note in notes:
                say(harmless(f"note: {spec.name}: {note}"))
    files = _write(folder, exported, extra, force=force) if folder else []
    if json:
        told = [{"name": spec.name, "objects": objects, "notes": _told(notes)} for spec, objects, notes in exported]
        emit_json({"schema": "fleetctl/export/v1", "engine": "kubernetes", "fleets": told, "extra": extra, "files": files})
    elif folder:
        say(f"wrote {len(files)} files to {folder}; next: `kubectl apply --server-side -k {folder}`")
    else:
        emit(_stream(exported, extra))


def _specs(names: Sequence[str], file: str | None, overrides: dict[str, str | None]) -> "list[FleetSpec]":
    from fleetctl.config import find_file, load_file

    path = find_file(file, Path.cwd())
    if path is None:
        raise ConfigError("there is no fleet.toml here", hint="`fleetctl config init` writes one")
    specs = [one.spec for one in load_file(path, overrides)]
    there = [spec.name for spec in specs]
    if unknown := [name for name in names if name not in there]:
        raise NotFound(f"{path.name} has no fleet {', '.join(unknown)}", hint=f"it has {', '.join(there)}")
    return [spec for spec in specs if not names or spec.name in names]


def _export(spec: "FleetSpec", sandboxes: str | None) -> Exported:
    from fleetctl.engines.kubernetes import manifests
    from fleetctl.engines.kubernetes.notes import notes

    return spec, manifests.objects(spec, sandbox_version=sandboxes), notes(spec)


def _role(exported: Sequence[Exported], namespace: str | None) -> "list[Object]":
    from fleetctl.engines.kubernetes import rbac

    return [rbac.role(namespace or next((spec.kubernetes.namespace for spec, _, _ in exported), None))]


def _check_names(objects: "Sequence[Object]") -> None:
    """Fleets such as web, with a warm pool, and web-standby would write over each other's objects."""
    seen = set()
    for one in objects:
        key = (one["kind"], one["metadata"]["name"])
        if key in seen:
            raise ConfigError(f"two fleets would have the same {key[0]} {key[1]}", hint="give one of them another name")
        seen.add(key)


def _told(notes: "Sequence[Note]") -> list[dict[str, str]]:
    return [{"setting": note.setting, "text": note.text} for note in notes]


def _stream(exported: Sequence[Exported], extra: "Sequence[Object]") -> str:
    """All of it as one YAML stream; what does not map stands as comments before the fleet's objects."""
    from fleetctl.engines.kubernetes.yaml import dump

    parts = [HEAD]
    for spec, objects, notes in exported:
        parts += [f"# {harmless(f'{spec.name}: {note}')}\n" for note in notes]
        parts += [f"---\n{dump(one)}" for one in objects]
    return "".join([*parts, *(f"---\n{dump(one)}" for one in extra)])


def _write(folder: str, exported: Sequence[Exported], extra: "Sequence[Object]", *, force: bool) -> list[str]:
    """Write each object into a file of its own; the files' paths. Nothing is written where a file is there that we did not write."""
    from fleetctl.engines.kubernetes import manifests
    from fleetctl.engines.kubernetes.yaml import dump

    texts: dict[str, str] = {}
    for spec, objects, notes in exported:
        said = "".join(f"# {harmless(f'{spec.name}: {note}')}\n" for note in notes)
        for one in objects:
            texts[manifests.file_name(one)] = HEAD + (said if one["kind"] == "Deployment" else "") + dump(one)
    texts |= {manifests.file_name(one): HEAD + dump(one) for one in extra}
    texts["kustomization.yaml"] = HEAD + dump(manifests.kustomization(list(texts)))
    paths = {os.path.join(folder, name): text for name, text in texts.items()}
    try:
        os.makedirs(folder, exist_ok=True)
        if foreign := [path for path in paths if not force and os.path.lexists(path) and not _is_ours(path)]:
            raise FleetctlError(f"{foreign[0]} is there and was not written by this command", hint="choose another folder, or give --force")
        for path, text in paths.items():
            with open(path, "w", encoding="utf-8") as target:
                target.write(text)
    except OSError as error:
        raise FleetctlError(f"{error.filename or folder}: {error.strerror}") from error
    return list(paths)


def _is_ours(path: str) -> bool:
    with open(path, encoding="utf-8", errors="replace") as found:
        return found.read(len(HEAD)) == HEAD
