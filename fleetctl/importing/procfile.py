"""Procfile, as foreman, honcho and Heroku read it: one process type a line, `NAME: COMMAND`, each of which becomes a fleet."""

import re
from collections.abc import Iterator

from fleetctl.errors import ConfigError
from fleetctl.importing.commands import split_line
from fleetctl.importing.draft import Draft, Imported, fleet_name, settle, supports, under

_LINE = re.compile(r"([A-Za-z0-9_-]+):\s*(.+)")
_FIRST_PORT, _PORTS_APART = 5000, 100


def read(text: str, source: str, *, folder: str = ".", has_env_file: bool = False) -> Imported:
    """The fleets of a Procfile. `folder`: where it is, seen from where fleet.toml will be; `has_env_file`: a .env is beside it.

    ConfigError names the line that is wrong.
    """
    drafts: list[Draft] = []
    around = [
        ("variables of your shell", "agents get PATH, HOME, locale and the like only; name others in environment, env_file or secret_env")
    ]
    for number, name, command in _types(text, source):
        if name == "release":
            around.append((f"release (line {number})", "runs once at each deployment and ends, so it is nothing to keep running"))
            continue
        draft = Draft(name=fleet_name(name, [known.name for known in drafts]), origin=f"{name}, line {number}")
        if folder != ".":
            draft.carry("cwd", folder, "where the Procfile is")
        if has_env_file:
            draft.carry("env_file", under(folder, ".env"), ".env")
        _add_command(draft, command)
        _add_port(draft, command, _FIRST_PORT + _PORTS_APART * len(drafts))
        drafts.append(settle(draft))
    if not drafts:
        raise ConfigError(f"{source}: no process type in it", hint="a line of a Procfile is NAME: COMMAND")
    return Imported(fleets=drafts, around=around)


def _types(text: str, source: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise ConfigError(f"{source}:{number}: not a line of a Procfile, which is NAME: COMMAND")
        yield number, found[1], found[2]


def _add_command(draft: Draft, command: str) -> None:
    words = split_line(command)
    draft.carry("command", command if words is None else words, "")
    if words is None:
        draft.carry("shell", True, "the command needs one")


def _add_port(draft: Draft, command: str, port: int) -> None:
    if supports("port_base"):
        draft.carry("port_base", port, "PORT, counted as foreman does")
    elif re.search(r"\$\{?PORT\b", command):
        draft.leave("PORT", f'foreman gives {port}, and one more to each further process; write PORT = "{port}" into environment')
