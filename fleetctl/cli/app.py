"""The entry of the command line: which command lives in which module, and the one place that prints errors and chooses the exit status.

Only the command that is called gets imported and built: the others would cost more than the work itself.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from fleetctl.cli.terminal import AlreadyInJson, ReaderGone, emit, emit_json, harmless, say
from fleetctl.errors import API_HINT, EXIT_FAILED, ConfigError, FleetctlError, UsageError

# In the order of the help. A name stands for the function, or the typer.Typer with commands of its own, in the module.
FAMILIES = {
    "up": ("up",),
    "change": ("down", "scale"),
    "look": ("status", "ps"),
    "logs": ("logs",),
    "restart": ("restart",),
    "warm": ("warm", "acquire"),
    "checkpoint": ("checkpoint", "drain"),
    "autoscale": ("autoscale",),
    "protect": ("protect",),
    "budget": ("budget",),
    "explain": ("explain",),
    "explore": ("inspect", "history", "events"),
    "wait": ("wait",),
    "top": ("top",),
    "metrics": ("metrics",),
    "sinks": ("sinks",),
    "simulate": ("simulate",),
    "probe": ("probe",),
    "daemon": ("daemon",),
    "config": ("config",),
    "importing": ("import",),
    "export": ("export",),
    "doctor": ("doctor",),
    "report": ("report",),
    "completion": ("completion", "__complete"),
}
MODULES = {command: module for module, commands in FAMILIES.items() for command in commands}
HIDDEN = {"__complete"}
# Where a command has a name that no function may have.
FUNCTIONS = {"__complete": "complete", "import": "import_file"}


_END = "`fleetctl down` takes fleets down, `fleetctl restart AGENT` replaces an agent, `fleetctl scale` changes how many there are"
# What other tools call it.
OTHER_WORDS = {
    **dict.fromkeys(("ls", "list"), "`fleetctl ps` lists agents, `fleetctl status` fleets"),
    **dict.fromkeys(("stop", "rm", "delete", "kill"), _END),
    **dict.fromkeys(("backup", "save", "snapshot"), "`fleetctl checkpoint create` saves what an agent keeps"),
    **dict.fromkeys(("start", "apply", "run", "create"), "`fleetctl up` starts fleets"),
    "monit": "`fleetctl top` shows the busiest agents, `fleetctl status` all of them",
    **dict.fromkeys(("tail", "log"), "`fleetctl logs -f` shows what agents write"),
    **dict.fromkeys(("describe", "show"), "`fleetctl inspect` shows all about a fleet or an agent"),
    "reload": "`fleetctl up` takes over a changed file, `fleetctl restart` replaces the processes",
    "version": "`fleetctl --version`",
    "help": "`fleetctl --help`, and `fleetctl COMMAND --help`",
    "init": "`fleetctl config init` writes a first fleet.toml",
    "validate": "`fleetctl config check` checks fleet.toml",
}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing on the way takes it for a failure of its own."""


class LazyGroup(TyperGroup):
    """All commands by name; imports and builds the one that is asked for."""

    # Any: typer's contexts and commands come from a private module that the types of these methods would have to name.
    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | TyperGroup | None:
        if cmd_name.startswith("-"):
            return None  # typer says which options there are
        if cmd_name not in MODULES:
            raise UsageError(f"no such command: {cmd_name}", hint=_nearest(cmd_name))
        found = getattr(import_module(f"fleetctl.cli.{MODULES[cmd_name]}"), FUNCTIONS.get(cmd_name, cmd_name))
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
            # A number such as -2 looks like an option; `scale` reads what it does not know itself.
            settings = {"ignore_unknown_options": True} if cmd_name in ("scale", "__complete") else {}
            found.command(cmd_name, hidden=cmd_name in HIDDEN, context_settings=settings)(function)
        command = get_command(found)
        assert isinstance(command, TyperCommand | TyperGroup)
        command.name = cmd_name
        return command


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    if word in OTHER_WORDS:
        return OTHER_WORDS[word]
    # In a few letters nearly every word is like another.
    near = get_close_matches(word, set(MODULES) - HIDDEN, n=1, cutoff=0.8 if len(word) < 4 else 0.6)
    return f"did you mean `fleetctl {near[0]}`?" if near else "`fleetctl --help` lists the commands"


def _print_version(wanted: bool) -> None:
    if wanted:
        from fleetctl import __version__

        emit(f"fleetctl {__version__}\n")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: fleetctl up --replicas 5, then fleetctl status, fleetctl scale 10, fleetctl down.",
)


@app.callback()
def root(
    ctx: typer.Context,
    state_dir: Annotated[
        str | None, typer.Option("--state-dir", metavar="DIR", help="Where everything is kept (default: FLEETCTL_STATE_DIR, else per user)")
    ] = None,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop")] = False,
) -> None:
    """Keeps fleets of agent processes running on this machine."""
    if ctx.invoked_subcommand is None:
        emit(ctx.get_help() + "\n")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status, having said on stderr what went wrong."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    as_json = _wants_json(words)
    try:
        status = get_command(app).main(args=words, prog_name="fleetctl", standalone_mode=False, obj=words)
        sys.stdout.flush()
    except (ReaderGone, BrokenPipeError):
        _forget_stdout()
        return 0  # whoever reads, `head` say, has seen enough: no failure of ours
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except AlreadyInJson as known:
        return _fail(known.error, as_json=False)
    except FleetctlError as error:
        if error.hint == API_HINT:
            error.hint = f"`fleetctl {next((word for word in words if word in MODULES), '')} --help` explains"
        return _fail(error, as_json=as_json)
    except typer.TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "fleetctl")
        return _fail(UsageError(error.format_message(), hint=f"`{path} --help` explains"), as_json=as_json)
    except typer.Abort:
        return _fail(FleetctlError("cancelled"), as_json=as_json)
    except Exception as error:
        return _internal_error(error, as_json=as_json)
    return _code(status)


def _code(status: object) -> int:
    return status if isinstance(status, int) else 0


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json is among fleetctl's own words; known also where these cannot be understood."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in own


def _fail(error: FleetctlError, *, as_json: bool) -> int:
    first, *more = error.message.splitlines() or [""]
    hint = [f"hint: {harmless(error.hint)}"] if error.hint else []
    _complain("\n".join([f"error: {harmless(first)}", *(f"  {harmless(line)}" for line in more), *hint]))
    if as_json:
        _tell_in_json(error)
    return error.exit_status


def _tell_in_json(error: FleetctlError) -> None:
    problems: dict[str, object] = {}
    if isinstance(error, ConfigError):
        first, *more = error.message.splitlines() or [""]
        problems["problems"] = [line.strip() for line in (more if more and first.endswith(":") else [first, *more])]
    # Where stdout is gone or full, which may be what went wrong, the words and the exit status tell it.
    with contextlib.suppress(ReaderGone, FleetctlError):
        emit_json({"schema": "fleetctl/error/v1", "error": {**error.to_json(), **problems}})


def _internal_error(error: Exception, *, as_json: bool) -> int:
    if os.environ.get("FLEETCTL_DEBUG"):
        import traceback

        _complain(traceback.format_exc().rstrip())
    _complain(
        f"internal error: {type(error).__name__}: {error}\n"
        "hint: this is a fault of fleetctl; please report it, with what FLEETCTL_DEBUG=1 and the same command print"
    )
    if as_json:
        _tell_in_json(FleetctlError(f"internal error: {type(error).__name__}: {error}"))
    return EXIT_FAILED


def _complain(text: str) -> None:
    """Behind what was said on stdout so far."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_stdout()
    say(text)


def _forget_stdout() -> None:
    """Send what is still buffered nowhere, so that the last flush does not complain."""
    with contextlib.suppress(OSError, ValueError):  # stdout may be closed, or no file at all
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _open_closed_streams() -> None:
    """Stand in for standard streams that the caller closed, so that no file of ours gets their numbers; and let no locale break words."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main() -> None:
    """The program `fleetctl`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    _open_closed_streams()
    status = run()
    if "asyncio" in sys.modules:
        sys.exit(status)  # the daemon: an orderly end of the interpreter, whatever it costs
    # Taking the interpreter down costs as much as starting it did; the system does it for nothing.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)
