"""What an agent finds in its environment: an allow-list of the daemon's, the fleet's own, secrets by reference, and FLEETCTL_*.

Secrets are read here at each start and go nowhere but into the child.
"""

import json
import os
from collections.abc import Mapping

from fleetctl.errors import SpawnFailed
from fleetctl.models import Agent, FleetSpec

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)
STATE_DIR, FLEET, AGENT_ID, SLOT, TOKEN, SPEC_HASH, LAUNCH, CLAIM, TRUST = (
    "FLEETCTL_STATE_DIR",
    "FLEETCTL_FLEET",
    "FLEETCTL_AGENT_ID",
    "FLEETCTL_SLOT",
    "FLEETCTL_TOKEN",
    "FLEETCTL_SPEC_HASH",
    "FLEETCTL_LAUNCH",
    "FLEETCTL_CLAIM",
    "FLEETCTL_TRUST",
)
CHECKPOINT_DIR, RESTORE = "FLEETCTL_CHECKPOINT_DIR", "FLEETCTL_RESTORE"


OWN = (FLEET, AGENT_ID, SLOT, TOKEN, SPEC_HASH, LAUNCH, CLAIM, TRUST, CHECKPOINT_DIR, RESTORE, "STATE_DIRECTORY")
"""What makes an agent an agent, and is to be found in no other process's environment."""


def is_inherited(name: str) -> bool:
    """Whether a variable of ours is one that agents get too."""
    return name in INHERITED or name.startswith("LC_")


def inherited() -> dict[str, str]:
    """What agents get of our own environment."""
    return {name: value for name, value in os.environ.items() if is_inherited(name)}


def build(
    agent: Agent, spec: FleetSpec, *, state_root: str, state_directory: str, claim_path: str, notify_socket: str | None = None
) -> dict[str, str]:
    """The complete environment of one agent, but for LISTEN_PID, which only the agent's process itself can know.

    Raises SpawnFailed for a secret or an `env_file` that cannot be read.
    """
    return (
        inherited()
        | secrets(spec)
        | dict(spec.environment)
        | claimed(claim_path)
        | (_notify(spec, notify_socket) if notify_socket else {})
        | _listening(agent, spec)
        | {
            "STATE_DIRECTORY": state_directory,
            CHECKPOINT_DIR: f"{state_directory}.checkpoint",
            **({RESTORE: f"{state_root}/checkpoints/{agent.fleet}/{agent.restore}"} if agent.restore else {}),
            STATE_DIR: state_root,
            FLEET: agent.fleet,
            AGENT_ID: agent.id,
            SLOT: str(agent.slot),
            TOKEN: agent.token,
            SPEC_HASH: agent.spec_hash,
            LAUNCH: "restore" if agent.restore else "warm" if agent.pooled else "cold",
            CLAIM: claim_path,
            TRUST: str(spec.trust_level),
        }
    )


def _listening(agent: Agent, spec: FleetSpec) -> dict[str, str]:
    """The port of the agent's own, and systemd's words for sockets that are handed over: sd_listen_fds(3)."""
    names = {"LISTEN_FDS": str(len(spec.sockets)), "LISTEN_FDNAMES": ":".join(spec.sockets)} if spec.sockets else {}
    return names if spec.port_base is None else {**names, "PORT": str(spec.port_base + agent.slot)}


def _notify(spec: FleetSpec, notify_socket: str) -> dict[str, str]:
    """systemd's words for where to say how one is, and how often at least.

    WATCHDOG_PID, which would keep the children of an agent from pinging for it, is left out: it is the agent's pid, which is not known
    before the program runs. Without it every process that finds WATCHDOG_USEC is meant, says sd_watchdog_enabled(3).
    """
    watchdog = {} if spec.watchdog_seconds is None else {"WATCHDOG_USEC": str(round(spec.watchdog_seconds * 1e6))}
    return {"NOTIFY_SOCKET": notify_socket, **watchdog}


def claimed(path: str) -> dict[str, str]:
    """The variables of the agent's claim, if it has one: so a cold start knows them from the beginning, and so does a restart."""
    try:
        with open(path, encoding="utf-8") as file:
            variables = json.load(file)["environment"]
        return {str(name): str(value) for name, value in variables.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that the agent wrote over
        return {}


def secrets(spec: FleetSpec) -> dict[str, str]:
    """What the spec takes by reference, read now. Raises SpawnFailed for what cannot be read."""
    named = {name: _secret(name, reference) for name, reference in spec.secret_env.items()}
    return {**(_env_file(spec.env_file) if spec.env_file else {}), **named}


def _env_file(path: str) -> Mapping[str, str]:
    """NAME=VALUE lines; `#` starts a comment line, `export ` and quotes around a value are taken off."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise SpawnFailed(f"env_file {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    pairs = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        name, found, value = line.removeprefix("export ").partition("=")
        if not found or not name.strip() or "\0" in line:
            raise SpawnFailed(f"env_file {path}, line {number}: not NAME=VALUE")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        pairs[name.strip()] = value
    return pairs


def _secret(name: str, reference: str) -> str:
    kind, _, place = reference.partition(":")
    if kind == "env":
        if place not in os.environ:
            raise SpawnFailed(
                f"secret_env {name}: {place} is not in the daemon's environment",
                hint=f"start the daemon with it: `fleetctl daemon stop --keep`, `{place}=... fleetctl daemon start`; or use file:PATH",
            )
        return os.environ[place]
    try:
        with open(os.path.expanduser(place), encoding="utf-8") as file:
            return file.read().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpawnFailed(f"secret_env {name}: {place}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
