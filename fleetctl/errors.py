"""Every error a user can meet: its code, the exit status of the command, one sentence, and what to try next.

The docstring of a class is its default message. Standard library only; cheap to import.
"""

from collections.abc import Mapping

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_DESIRED, EXIT_NO_DAEMON, EXIT_NOT_FOUND, EXIT_CONFIG, EXIT_TIMEOUT = 1, 2, 3, 4, 5, 6, 124
API_HINT = "/openapi.json describes every request"
"""The daemon's hint on a request that is off; the command line, which made the request of somebody's words, has a better one."""


class FleetctlError(Exception):
    """The operation failed."""

    code = "E2000"
    exit_status = EXIT_FAILED
    http_status = 500
    hint = ""

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").partition("\n")[0])
        if hint is not None:
            self.hint = hint

    @property
    def message(self) -> str:
        return str(self.args[0])

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "hint": self.hint, "exit_status": self.exit_status}


class UsageError(FleetctlError):
    """The command's words are off."""

    code, exit_status, http_status = "E2001", EXIT_USAGE, 400


class ConfigError(FleetctlError):
    """The configuration is invalid."""

    code, exit_status, http_status = "E2002", EXIT_CONFIG, 422


class NotFound(FleetctlError):
    """No such fleet or agent."""

    code, exit_status, http_status = "E2003", EXIT_NOT_FOUND, 404
    hint = "`fleetctl ps -a` lists what there is"


class DaemonUnreachable(FleetctlError):
    """The daemon does not run."""

    code, exit_status, http_status = "E2004", EXIT_NO_DAEMON, 503
    hint = "start it with `fleetctl daemon start` or `fleetctl up`"


class DaemonRunning(FleetctlError):
    """Another daemon holds this state directory."""

    code, http_status = "E2005", 409
    hint = "`fleetctl daemon status` shows it"


class StateDirectoryError(FleetctlError):
    """The state directory cannot be used."""

    code, http_status = "E2006", 507
    hint = "choose another with --state-dir or FLEETCTL_STATE_DIR"


class SpawnFailed(FleetctlError):
    """The agent's process could not be started."""

    code = "E2007"

    def __init__(self, message: str | None = None, *, hint: str | None = None, permanent: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.permanent = permanent


class NotStopped(FleetctlError):
    """Some processes are still alive."""

    code = "E2008"


class TimedOut(FleetctlError):
    """The time ran out."""

    code, exit_status, http_status = "E2009", EXIT_TIMEOUT, 504


class WarmPoolEmpty(FleetctlError):
    """The warm pool has no instance to hand out."""

    code, http_status = "E2010", 409
    hint = "leave out --require-warm to start a new agent instead; `fleetctl warm status` shows the pool"


class Busy(FleetctlError):
    """The daemon serves as many streams as it can."""

    code, http_status = "E2011", 503
    hint = "end some of the commands that watch or follow"


class UnknownCheckpoint(FleetctlError):
    """No such checkpoint."""

    code, exit_status, http_status = "E2012", EXIT_NOT_FOUND, 404
    hint = "`fleetctl checkpoint list` lists what there is"


class CheckpointDamaged(FleetctlError):
    """The checkpoint is not what was saved."""

    code, http_status = "E2013", 409
    hint = "use another: `fleetctl checkpoint list` lists what there is"


class Unsupported(FleetctlError):
    """The engine cannot do this."""

    code, exit_status, http_status = "E2020", EXIT_USAGE, 400


class ClusterUnreachable(FleetctlError):
    """The cluster cannot be reached."""

    code, exit_status, http_status = "E2021", EXIT_NO_DAEMON, 503
    hint = "`kubectl cluster-info` asks it too; --context chooses another cluster"


class ClusterRefused(FleetctlError):
    """The cluster refused it."""

    code, http_status = "E2022", 403


class ClusterConflict(FleetctlError):
    """Part of what would be changed in the cluster belongs to somebody else."""

    code, http_status = "E2023", 409


class KeptByProgram(FleetctlError):
    """A program keeps the fleets of this state directory."""

    code, http_status = "E2014", 409
    hint = "it alone changes them, with FleetManager: end it first, or use another state directory"


class ScaleUpFailed(FleetctlError):
    """Scale up failed (lifecycle manager not available)."""

    code = "E2090"


class ScaleDownFailed(FleetctlError):
    """Scale down failed (lifecycle manager not available)."""

    code = "E2091"


class DrainTimeout(FleetctlError):
    """Graceful drain timeout exceeded."""

    code = "E2093"


def from_json(data: Mapping[str, object]) -> FleetctlError:
    """The error that `to_json` described, on the other side of the control socket."""
    classes = {cls.code: cls for cls in FleetctlError.__subclasses__()}
    return classes.get(str(data.get("code")), FleetctlError)(str(data.get("message")), hint=str(data.get("hint", "")))
