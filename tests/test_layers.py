"""Who may import whom. The table is the picture of the house: a line that changes here changes the architecture."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fleetctl"

NOUNS = {"models", "errors", "ports", "addresses", "formula", "cron"}
NOTHING: set[str] = set()

# Part -> the parts of fleetctl it may import, itself aside. The longest name that fits a module is its part.
MAY_IMPORT = {
    "models": NOTHING,
    "errors": NOTHING,
    "ports": NOUNS,
    "addresses": NOTHING,
    "formula": NOTHING,
    "cron": NOTHING,
    "core": NOUNS,
    "host": NOUNS,  # never core: hands do not decide
    "config": NOUNS,
    "importing": NOUNS | {"config"},  # other tools' files, as text
    "keeping": NOUNS,
    "supervisor": NOUNS | {"core", "keeping"},
    "probing": NOUNS | {"core"},
    "autoscaler": NOUNS | {"core"},
    "budget": NOUNS | {"core"},
    "polling": NOUNS | {"core"},
    "fleet": NOUNS | {"core", "supervisor", "probing", "autoscaler", "budget", "polling", "config"},
    "daemon": NOUNS | {"", "core", "host", "sinks", "config", "fleet", "health", "daemon.wire"},  # only here do rules meet real hands
    "daemon.rounds": NOUNS | {"host", "fleet"},  # the daemon's, and those of a program that embeds a fleet
    "daemon.hearing": NOUNS | {"core", "host", "fleet"},  # the same
    "daemon.hands": NOUNS | {"core", "host", "fleet"},  # the same
    # And here, in a program without a daemon.
    "embedded": NOUNS | {"core", "host", "fleet", "daemon.rounds", "daemon.hearing", "daemon.hands"},
    "health": NOUNS | {"core", "fleet"},
    "manager": NOUNS | {"core", "config", "host", "fleet", "health", "embedded"},
    "daemon.wire": NOUNS,  # both sides of the socket: cheap to import
    "client": NOUNS | {"host.paths", "daemon.wire"},
    "engines": NOUNS | {"", "host", "daemon.wire", "client"},
    "sinks": NOUNS | {"host", "config", "fleet"},
    "cli": NOUNS | {"", "config", "importing", "sinks", "engines", "host.paths", "client", "daemon.wire"},
    "trial": NOUNS | {"core", "host"},
    "cli.probe": NOUNS | {"", "cli", "config", "core", "trial"},  # runs one process itself, without a daemon
    "cli.simulate": NOUNS | {"cli", "core"},  # runs the rules on a made-up fleet: no daemon to ask
    "cli.daemon": NOUNS | {"cli", "engines", "daemon.main"},  # `fleetctl daemon` is the one command that becomes the daemon
    "testing": NOUNS,
    "demo": {"agent"},
    "agent": NOTHING,  # what an agent imports must not drag the daemon in
    "__main__": {"cli", "errors"},
    "": {"manager", "models", "host"},  # fleetctl/__init__.py: the library's names, when they are first used
}
ONLY_STANDARD_LIBRARY = (
    "models",
    "errors",
    "ports",
    "addresses",
    "core",
    "testing",
    "agent",
    "demo",
    "keeping",
    "supervisor",
    "probing",
    "autoscaler",
    "polling",
    "formula",
    "cron",
    "fleet",
    "daemon.wire",
    "client",
)
IMPURE = {"os", "time", "random", "asyncio", "logging", "pathlib"}


def modules() -> list[str]:
    """Names below fleetctl: "core.reconcile", "cli" for cli/__init__.py, "" for the package itself."""
    names = (path.relative_to(ROOT).with_suffix("").parts for path in sorted(ROOT.rglob("*.py")))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything the module imports, at the top or anywhere inside."""
    path = ROOT.joinpath(*module.split(".")) if module else ROOT
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def part_of(module: str) -> str:
    return max((part for part in MAY_IMPORT if inside(module, part)), key=len)


def allowed(module: str, imported: str) -> bool:
    """Whether `imported`, a name below fleetctl as an import statement has it, is in reach of `module`."""
    own = part_of(module)
    if own and inside(imported, own):
        return True
    if any(part and inside(imported, part) for part in MAY_IMPORT[own]):
        return True
    # `from fleetctl import __version__`: a public name of the package itself
    return "" in MAY_IMPORT[own] and imported.partition(".")[0] not in {known.partition(".")[0] for known in modules() if known}


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_table(module: str) -> None:
    names = [(line, name.removeprefix("fleetctl").lstrip(".")) for line, name in imports(module) if inside(name, "fleetctl")]
    wrong = [f"line {line} imports {name or 'fleetctl'}" for line, name in names if name and not allowed(module, name)]
    wrong += [f"line {line} imports fleetctl" for line, name in names if not name and "" not in MAY_IMPORT[part_of(module)]]
    assert not wrong


@pytest.mark.parametrize("module", [name for name in modules() if part_of(name) in ONLY_STANDARD_LIBRARY])
def test_the_inner_parts_need_the_standard_library_only(module: str) -> None:
    roots = {name.partition(".")[0] for _, name in imports(module)}
    assert roots <= sys.stdlib_module_names | {"fleetctl"}


@pytest.mark.parametrize("module", [name for name in modules() if inside(name, "core")])
def test_rules_are_pure(module: str) -> None:
    assert not IMPURE & {name.partition(".")[0] for _, name in imports(module)}


def test_the_daemon_itself_is_imported_by_its_command_alone() -> None:
    users = {module for module in modules() for _, name in imports(module) if inside(name, "fleetctl.daemon.main")}
    assert users == {"cli.daemon"}


def test_each_part_of_the_table_is_needed() -> None:
    planned: set[str] = set()
    known = set(modules())
    assert {part for part in MAY_IMPORT if not any(inside(module, part) for module in known) and part not in known} <= planned


def test_the_table_forbids() -> None:
    assert not allowed("core.reconcile", "host.process")
    assert not allowed("host.process", "core.reconcile")
    assert not allowed("cli.up", "daemon.main.run")
    assert not allowed("fleet", "host")
    assert allowed("cli.up", "engines.local.LocalEngine")
