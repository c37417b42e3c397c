"""The options that several commands share, each defined once."""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetctl.errors import NotFound, UsageError

if TYPE_CHECKING:
    from fleetctl.engines.protocol import Engine
    from fleetctl.models import FleetSpec

ENGINES = ("local", "kubernetes")


def _from_either_place(ctx: typer.Context, value: str | None) -> str | None:
    """The state directory given after the command, else the one given before it."""
    before: str | None = ctx.find_root().params.get("state_dir")
    return value or before


StateDir = Annotated[str | None, typer.Option("--state-dir", metavar="DIR", help="Where everything is kept", callback=_from_either_place)]
All = Annotated[bool, typer.Option("--all", help="Also settings that are as they are by default")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of words")]
Fleets = Annotated[list[str] | None, typer.Argument(metavar="FLEET...", help="Only these fleets", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once, without waiting for the effect")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting after this long (exit status 124)")]


EngineOption = Annotated[
    str | None, typer.Option("--engine", metavar="local|kubernetes", help="Where the fleets run [default: as fleet.toml here says]")
]
Context = Annotated[str | None, typer.Option("--context", metavar="NAME", help="With kubernetes: context of the kubeconfig")]
Namespace = Annotated[str | None, typer.Option("--namespace", metavar="NAME", help="With kubernetes: namespace")]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the fleets of a command are, as far as its words say so."""

    state_dir: str | None = None
    engine: str | None = None
    context: str | None = None
    namespace: str | None = None

    def settings(self) -> dict[str, object]:
        """The words as settings of a fleet."""
        given = {"engine": self.engine, "kubernetes.context": self.context, "kubernetes.namespace": self.namespace}
        return {key: value for key, value in given.items() if value is not None}

    def open(self) -> "Engine":
        """The engine that is meant: by the words, else FLEETCTL_ENGINE, else the fleet.toml of this folder, else this machine."""
        engine: str | None = self.engine or os.environ.get("FLEETCTL_ENGINE")
        table: dict[str, str] = {}
        if engine != "local" and self.state_dir is None:
            in_file, table = _in_file()
            engine = engine or in_file
        return self._open(engine or "local", self.context or table.get("context"), self.namespace or table.get("namespace"))

    def open_for(self, specs: "Sequence[FleetSpec]") -> "Engine":
        """The engine of these fleets, which must be the same for all."""
        places = {(str(spec.engine), spec.kubernetes.context, spec.kubernetes.namespace) for spec in specs}
        if len({engine for engine, _, _ in places}) > 1 or (len(places) > 1 and "kubernetes" in {engine for engine, _, _ in places}):
            raise UsageError(
                f"{', '.join(spec.name for spec in specs)} run in different places",
                hint="name those of one place, or say where with --engine, --context and --namespace",
            )
        return self._open(*places.pop())

    def _open(self, engine: str, context: str | None, namespace: str | None) -> "Engine":
        if engine == "kubernetes":
            from fleetctl.engines.kubernetes.engine import KubernetesEngine

            return KubernetesEngine(context, namespace)
        if engine != "local":
            raise UsageError(f"there is no engine {engine}", hint=f"there are {' and '.join(ENGINES)}")
        if self.context or self.namespace:
            raise UsageError("--context and --namespace are for a cluster", hint="add --engine kubernetes")
        from fleetctl.engines.local import LocalEngine

        return LocalEngine(self.state_dir)


def _in_file() -> tuple[str | None, dict[str, str]]:
    """Engine and [kubernetes] table of the fleet.toml here. Read as TOML only where it speaks of a cluster at all: every command looks."""
    try:
        with open("fleet.toml", "rb") as file:
            content = file.read(1 << 20)
    except OSError:
        return None, {}
    if b"kubernetes" not in content:
        return None, {}
    import tomllib

    try:
        tree = tomllib.loads(content.decode())
    except ValueError:
        return None, {}  # `up` and `config check` say what is wrong with it
    fleets = tree.get("fleet")
    found = [fleet for fleet in (fleets if isinstance(fleets, list) else [fleets]) if isinstance(fleet, dict)]
    tables = [fleet.get("kubernetes", tree.get("kubernetes")) for fleet in found]
    known = [table if isinstance(table, dict) else {} for table in tables]
    given = {key: _agreed(table.get(key) for table in known) for key in ("context", "namespace")}
    return _agreed(fleet.get("engine") for fleet in found), {key: value for key, value in given.items() if value}


def _agreed(values: Iterable[object]) -> str | None:
    """The one text that all say; None where they say several, or nothing."""
    different = set(map(str, filter(None, values)))
    return different.pop() if len(different) == 1 else None


def on_any_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that say where its fleets are, and them to it as `place`."""

    # Any: whatever the command takes.
    @wraps(command)
    def run(
        *args: Any,
        engine: str | None = None,
        context: str | None = None,
        namespace: str | None = None,
        state_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        command(*args, place=Place(state_dir, engine, context, namespace), **kwargs)

    own = {"engine": EngineOption, "context": Context, "namespace": Namespace, "state_dir": StateDir}
    given = inspect.signature(command).parameters
    kept = [parameter for name, parameter in given.items() if name != "place"]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint) for name, hint in own.items()]
    run.__signature__ = inspect.Signature([*kept, *added], return_annotation=None)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {name: hint for name, hint in command.__annotations__.items() if name != "place"} | own
    return run


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
