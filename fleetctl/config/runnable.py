"""Whether a fleet's command can be started here: looked at before anything is, so that a typo costs no crash loop."""

import os
import re
import stat
from collections.abc import Iterator

from fleetctl.config.checks import plain, shown
from fleetctl.errors import ConfigError
from fleetctl.models import FleetSpec


def check_runnable(spec: FleetSpec) -> None:
    """ConfigError for a program, a working directory or a file that is missing or that we may not use; all of them at once.

    A variable by reference ("env:") is looked up by the daemon, so it is not looked at here.
    """
    cwd_troubles = list(_cwd_troubles(spec.cwd))
    troubles = [*cwd_troubles, *_file_troubles(spec)]
    if not spec.shell and not (cwd_troubles and "/" in spec.command[0] and not os.path.isabs(spec.command[0])):
        troubles += _program_troubles(spec)
    if troubles:
        texts, hints = zip(*troubles, strict=True)
        raise ConfigError(f"fleet {spec.name}: " + "; ".join(texts), hint="; ".join(hint for hint in dict.fromkeys(hints) if hint))


# What is wrong, and what to try.
Trouble = tuple[str, str]


def _cwd_troubles(cwd: str) -> Iterator[Trouble]:
    reason = _reason(cwd)
    if reason:
        yield f"cwd {shown(cwd)}: {reason}", "create the directory, or set cwd to one that exists"
    elif not os.path.isdir(cwd):
        yield f"cwd {shown(cwd)}: not a directory", "set cwd to a directory"
    elif not os.access(cwd, os.X_OK):
        yield f"cwd {shown(cwd)}: permission denied", f"`chmod u+rx {plain(cwd)}`, or set cwd to another directory"


def _file_troubles(spec: FleetSpec) -> Iterator[Trouble]:
    files = {"env_file": spec.env_file} if spec.env_file else {}
    files |= {f"secret_env.{name}": where.removeprefix("file:") for name, where in spec.secret_env.items() if where.startswith("file:")}
    for key, path in files.items():
        reason = _reason(path)
        if not reason and os.path.isdir(path):
            reason = "is a directory"
        if not reason and not os.access(path, os.R_OK):
            reason = "permission denied"
        if reason:
            yield f"{key} {shown(path)}: {reason}", f"create the file, or correct {key}"


def _program_troubles(spec: FleetSpec) -> Iterator[Trouble]:
    program = spec.command[0]
    search = None if "/" in program else _search_path(spec)
    if "/" not in program and search is None:
        return  # the PATH comes from a file or a secret, which are read at the start of an agent
    candidates = [os.path.join(spec.cwd, folder, program) for folder in search or [""]]
    files = [path for path in candidates if os.path.isfile(path)]
    runnable = [path for path in files if os.access(path, os.X_OK)]
    if runnable:
        yield from _interpreter_troubles(program, runnable[0])
    elif files:
        hint = f"`chmod +x {plain(files[0])}`, or name its interpreter first"
        yield f"command {shown(program)}: {plain(files[0])} is not executable", hint
    elif search is None:
        reason = "is a directory, not a program" if os.path.isdir(candidates[0]) else _reason(candidates[0]) or "not a program"
        yield f"command {shown(program)}: {reason}", "give the path of a program"
    else:
        hint = "install it, give its full path, or set PATH in environment"
        yield f"command {shown(program)}: no such program on the PATH", hint


def _search_path(spec: FleetSpec) -> list[str] | None:
    """The folders in which an agent's program is looked for; None where only the start of an agent can tell."""
    if "PATH" in spec.secret_env:
        return None
    path = spec.environment.get("PATH")
    if path is None and spec.env_file and _sets_path(spec.env_file):
        return None
    return (os.environ.get("PATH", os.defpath) if path is None else path).split(":")


def _sets_path(env_file: str) -> bool:
    try:
        with open(env_file, encoding="utf-8", errors="replace") as file:
            return any(re.match(r"\s*(export\s+)?PATH\s*=", line) for line in file)
    except OSError:
        return False  # told by _file_troubles


def _interpreter_troubles(program: str, path: str) -> Iterator[Trouble]:
    """A script whose `#!` names nothing: the kernel says "no such file" and means the interpreter."""
    try:
        with open(path, "rb") as file:
            first = file.read(256).partition(b"\n")[0]
    except OSError:
        return  # executable and not readable is enough for a program
    words = first[2:].split() if first.startswith(b"#!") else []
    interpreter = os.fsdecode(words[0]) if words else ""
    if interpreter and _reason(interpreter):
        text = f"command {shown(program)}: its first line names {shown(interpreter)}, which is not there"
        yield text, "correct the #! line of the script"


def _reason(path: str) -> str:
    """Why there is nothing to see at `path`; empty if there is."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        return "does not exist" if isinstance(error, FileNotFoundError) else reason[:1].lower() + reason[1:]
    return "is a socket" if stat.S_ISSOCK(mode) else ""
