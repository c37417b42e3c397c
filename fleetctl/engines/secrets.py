"""Every value on this machine that fleets were given as a variable or a secret, so that a report can leave them out.

Reads what the user can read anyway; keeps nothing.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from fleetctl.errors import FleetctlError
from fleetctl.host.environment import TOKEN, is_inherited
from fleetctl.host.paths import Paths
from fleetctl.host.state import read_agents, read_wishes

_LONGEST_FILE = 1 << 20
# Says nothing of anybody, and would take words out of every line.
_HARMLESS = {"true", "false", "none", "null", "production", "development", "staging", "debug", "info", "warning", "error", "localhost"}
_OURS = "FLEETCTL_"


def secret_values(paths: Paths, pids: Iterable[int] = ()) -> set[str]:
    """Values of variables and secrets: of what is wished for, of claims, and of these processes (agents, and the daemon)."""
    found: set[str] = set()
    for wish in read_wishes(paths):
        found |= set(_of_wish(wish.get("spec") or {}))
    with suppress(FleetctlError, OSError):
        found |= {agent.token for agent in read_agents(paths)}
    found |= set(_of_claims(paths))
    for pid in pids:
        found |= set(_of_process(pid))
    found |= {value for name, value in os.environ.items() if _is_own(name)}
    return {value for value in found if value and value.lower() not in _HARMLESS}


def recorded_specs(paths: Paths) -> list[tuple[str, Mapping[str, Any]]]:  # Any: the settings of fleet.toml
    """Each fleet's name and settings as they are on disk, values of variables included."""
    return [(str(wish["name"]), wish["spec"]) for wish in read_wishes(paths)]


def _of_wish(spec: Mapping[str, object]) -> Iterator[str]:
    yield from _values(spec.get("environment"))
    for reference in _values(spec.get("secret_env")):
        kind, _, where = reference.partition(":")
        if kind == "env":
            yield os.environ.get(where, "")
        else:
            yield from _contents(where)
    if isinstance(file := spec.get("env_file"), str):
        for content in _contents(file):
            for line in content.splitlines():
                yield line.partition("=")[2].strip().strip("\"'")


def _values(table: object) -> list[str]:
    return [str(value) for value in table.values()] if isinstance(table, dict) else []


def _contents(path: str) -> Iterator[str]:
    with suppress(OSError, ValueError), open(path, encoding="utf-8", errors="replace") as file:
        yield file.read(_LONGEST_FILE).strip()


def _of_claims(paths: Paths) -> Iterator[str]:
    try:
        names = os.listdir(paths.claims)
    except OSError:
        return
    for name in names:
        with suppress(OSError, ValueError), open(f"{paths.claims}/{name}", encoding="utf-8") as file:
            claim = json.load(file)
            yield from _values(claim.get("environment") if isinstance(claim, dict) else None)


def _of_process(pid: int) -> Iterator[str]:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for pair in file.read(_LONGEST_FILE).split(b"\0"):
            name, _, value = pair.decode(errors="replace").partition("=")
            if _is_own(name):
                yield value


def _is_own(name: str) -> bool:
    """Whether a variable may hold something of the user's: not what every process has, nor our own, but for the token."""
    return name == TOKEN or not (is_inherited(name) or name.startswith(_OURS) or name in _EVERYWHERE)


_EVERYWHERE = {
    *("PWD", "OLDPWD", "SHLVL", "TERM", "_", "HOSTNAME", "COLUMNS", "LINES", "EDITOR", "PAGER", "VIRTUAL_ENV", "PYTHONPATH"),
    *("STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "PORT", "COLORTERM"),
    *("DISPLAY", "XDG_SESSION_TYPE", "XDG_SESSION_CLASS", "XDG_DATA_DIRS", "XDG_CONFIG_HOME", "MAIL", "LS_COLORS", "NO_COLOR", "CI"),
}
