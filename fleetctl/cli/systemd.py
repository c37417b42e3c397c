"""The unit with which systemd runs the daemon, as text. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

WATCHDOG_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What differs from one installation to another. `user`: of a system unit; None makes it one of a user's own manager."""

    command: Sequence[str]
    path: str
    user: str | None = None
    python_path: str | None = None


def text(unit: Unit) -> str:
    """The unit file."""
    system = unit.user is not None
    variables = [f"PATH={unit.path}", *([f"PYTHONPATH={unit.python_path}"] if unit.python_path else [])]
    return "\n".join(
        [
            "# Written by `fleetctl daemon install`.",
            "[Unit]",
            "Description=fleetctl, which keeps fleets of agents running",
            *(["After=network.target"] if system else []),
            "",
            "[Service]",
            "# It says itself when it is ready, and every few seconds that it lives.",
            "Type=notify",
            "NotifyAccess=main",
            f"WatchdogSec={WATCHDOG_SECONDS}",
            *([f"User={_escaped(str(unit.user))}"] if system else []),
            "# Programs that agents name without a path are looked for here, as when this was installed.",
            *(f"Environment={_quoted(variable)}" for variable in variables),
            f"ExecStart={' '.join(_quoted(word, command=True) for word in unit.command)}",
            "Restart=always",
            "RestartSec=1",
            "TimeoutStartSec=120",
            "TimeoutStopSec=60",
            "# Only the daemon is stopped with the unit: its agents run on, and the next daemon takes them back.",
            "KillMode=process",
            "# An agent that is killed for want of memory is the daemon's business, and no end of the unit.",
            "OOMPolicy=continue",
            "# The daemon makes groups of its own below this one, for the limits of agents.",
            "Delegate=yes",
            "TasksMax=infinity",
            "",
            "[Install]",
            f"WantedBy={'multi-user' if system else 'default'}.target",
            "",
        ]
    )


def _quoted(word: str, *, command: bool = False) -> str:
    """A word as systemd.syntax(7) reads it back; in a command line a dollar sign would be a variable."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"')
    if command:
        escaped = escaped.replace("$", "$$")
    plain = escaped == word and word and not any(char.isspace() or char in "';" for char in word)
    return escaped if plain else f'"{escaped}"'


def _escaped(word: str) -> str:
    return word.replace("%", "%%")
