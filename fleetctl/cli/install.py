"""`daemon install`: have systemd run the daemon, as the whole machine's service or as one of the user's own."""

import os
import sys
from typing import TYPE_CHECKING

from fleetctl.cli.terminal import emit, emit_json, say
from fleetctl.errors import ConfigError, FleetctlError, UsageError

if TYPE_CHECKING:
    from fleetctl.engines.local import LocalEngine

BOOTED = "/run/systemd/system"  # there where systemd runs the machine: sd_booted(3)
SYSTEM_UNITS = "/etc/systemd/system"


def install(engine: "LocalEngine", *, system: bool, name: str, force: bool, dry_run: bool, json: bool) -> None:
    """Write the unit, and have systemd enable and start it where it runs; else say what is to be done by hand."""
    import re

    if not re.fullmatch(r"[A-Za-z0-9:_.@-]{1,200}", name):
        raise UsageError(f"--name {name}: letters, digits and - _ . : @")
    user = _owner(engine.paths.root) if system else None
    made = _unit(engine, user)
    path = os.path.join(SYSTEM_UNITS if system else _user_units(), f"{name}.service")
    steps = [] if dry_run else [_written(path, made, force=force)]
    todo = _commands(name, user)
    running = engine.daemon_pid()
    done: list[str] = []
    if not dry_run and os.path.isdir(BOOTED):
        done, todo = _carried_out(todo, running)
    if json:
        emit_json(
            {"schema": "fleetctl/install/v1", "path": path, "dry_run": dry_run, "unit": made, "done": done, "next": [*map(_line, todo)]}
        )
    elif dry_run:
        emit(made)
        say(f"would write {path}")
    else:
        say("\n".join([*steps, *(f"ran {command}" for command in done)]))
    if json or not todo:
        return
    if not dry_run and not os.path.isdir(BOOTED):
        say("systemd does not run this machine; where it does:")
    elif not dry_run:
        say("next:")
    say("\n".join(f"  {_line(command)}" for command in todo if not dry_run))
    if running is not None and not dry_run:
        say(f"a daemon runs already (pid {running}); `fleetctl daemon stop --keep` before, and the new one takes its agents back")


def _unit(engine: "LocalEngine", user: str | None) -> str:
    import fleetctl
    from fleetctl.cli.systemd import Unit, text

    command = [os.path.abspath(sys.executable), "-m", "fleetctl", "--state-dir", engine.paths.root, "daemon", "--keep"]
    if bad := [word for word in (*command, os.environ.get("PATH", "")) if any(ord(char) < 32 for char in word)]:
        raise FleetctlError(f"{bad[0]!r} cannot be written into a unit", hint="it has control characters in it")
    root = os.path.dirname(os.path.dirname(os.path.abspath(fleetctl.__file__)))
    installed = os.path.basename(root) in ("site-packages", "dist-packages")
    return text(Unit(command=command, path=os.environ.get("PATH", os.defpath), user=user, python_path=None if installed else root))


def _owner(root: str) -> str:
    """Whose fleets these are: the state directory's owner, and before there is one the user who asks, sudo or not."""
    import pwd

    try:
        return pwd.getpwuid(os.stat(root).st_uid).pw_name
    except FileNotFoundError:
        return os.environ.get("SUDO_USER") or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ConfigError(f"{root} belongs to a user who has no name here", hint="choose another with --state-dir") from None


def _user_units() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "systemd", "user")


def _written(path: str, made: str, *, force: bool) -> str:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not force and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                if file.read() == made:
                    return f"{path} is up to date"
            raise ConfigError(f"{path} is there already, and is another unit", hint="--force writes over it, --name takes another name")
        with open(path, "w", encoding="utf-8") as file:
            file.write(made)
    except OSError as error:
        hint = "with sudo, or with --user" if isinstance(error, PermissionError) else None
        raise FleetctlError(f"{path}: {error.strerror}", hint=hint) from error
    return f"wrote {path}"


def _commands(name: str, user: str | None) -> list[list[str]]:
    scope = [] if user is not None else ["--user"]
    commands = [["systemctl", *scope, "daemon-reload"], ["systemctl", *scope, "enable", name], ["systemctl", *scope, "start", name]]
    # A user's own manager ends with the last session, and everything in it, unless it is to linger.
    return commands if user is not None else [*commands, ["loginctl", "enable-linger"]]


def _carried_out(commands: list[list[str]], running: int | None) -> tuple[list[str], list[list[str]]]:
    """What systemd did of it, and what is left. Where a daemon runs already the unit is not started beside it."""
    import subprocess

    done: list[str] = []
    for number, command in enumerate(commands):
        if running is not None and "start" in command:
            continue
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            say(f"{_line(command)}: {error}")
            return done, commands[number:]
        if ended.returncode:
            say(f"{_line(command)}: {ended.stderr.strip() or f'exit status {ended.returncode}'}")
            return done, commands[number:]
        done.append(_line(command))
    return done, [command for command in commands if running is not None and "start" in command]


def _line(command: list[str]) -> str:
    from shlex import join

    return join(command)
