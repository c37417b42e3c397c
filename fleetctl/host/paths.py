"""Where everything lives under the state directory. Computes names and makes folders; opens nothing. Cheap to import."""

import os

from fleetctl.errors import StateDirectoryError

SOCKET_PATH_BYTES = 107  # sun_path of Linux holds 108 with its final NUL


def choose_state_dir(given: str | None = None) -> str:
    """The state directory in force: the one given, else FLEETCTL_STATE_DIR, else the platform's place for a user's state."""
    chosen = given or os.environ.get("FLEETCTL_STATE_DIR")
    if not chosen:
        from platformdirs import user_state_dir  # here, because the two ways above need not pay for the import

        chosen = user_state_dir("fleetctl", appauthor=False)
    return os.path.realpath(os.path.expanduser(chosen))


def file_identity(path: str) -> tuple[int, int] | None:
    """Which file this is, to tell whether another took its place; None where there is none. A link is not followed."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Paths:
    """The layout of one state directory."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.lock = f"{root}/daemon.lock"
        self.database = f"{root}/fleetctl.db"
        self.run = f"{root}/run"
        self.socket = f"{root}/run/control.sock"
        self.notify = f"{root}/run/notify.sock"
        self.notify_inside = f"{root}/run/in/notify"
        self.locks = f"{root}/run/locks"
        self.claims = f"{root}/run/claims"
        self.fleets = f"{root}/fleets"
        self.logs = f"{root}/logs"
        self.agents = f"{root}/agents"
        self.checkpoints = f"{root}/checkpoints"
        self.daemon_log = f"{root}/daemon.log"

    def agent_lock(self, agent_id: str) -> str:
        return f"{self.locks}/{agent_id}.lock"

    def agent_claim(self, agent_id: str) -> str:
        return f"{self.claims}/{agent_id}.json"

    def claim_inside(self, agent_id: str) -> str:
        """The claim where an agent in a sandbox sees it: alone in a folder."""
        return f"{self.claims}/{agent_id}.d/claim.json"

    def agent_log(self, fleet: str, agent_id: str) -> str:
        return f"{self.logs}/{fleet}/{agent_id}.log"

    def agent_state(self, agent_id: str) -> str:
        return f"{self.agents}/{agent_id}"

    def agent_checkpoint(self, agent_id: str) -> str:
        """Where the agent, or a command for it, writes what is to be saved beside its state."""
        return f"{self.agents}/{agent_id}.checkpoint"

    def sockets(self, fleet: str) -> str:
        """Where the fleet's listening sockets are, for those whose port the kernel chose."""
        return f"{self.fleets}/{fleet}.sockets"

    def wish(self, fleet: str) -> str:
        return f"{self.fleets}/{fleet}.json"

    @property
    def source(self) -> str:
        """Which daemon speaks: the `source` of its CloudEvents."""
        from urllib.parse import quote  # here, for few need it

        return f"//{os.uname().nodename}{quote(self.root)}"

    def prepare(self) -> None:
        """Make the folders, all 0700. Raises StateDirectoryError: not ours, not writable, full, or too long for a socket."""
        length = len(os.fsencode(self.socket))
        if length > SOCKET_PATH_BYTES:
            raise StateDirectoryError(
                f"{self.root}: too long for a control socket ({length} bytes with run/control.sock; {SOCKET_PATH_BYTES} are possible)"
            )
        try:
            for folder in (self.root, self.run, self.locks, self.claims, self.fleets, self.logs, self.agents):
                os.makedirs(folder, mode=0o700, exist_ok=True)
                found = os.stat(folder)
                if found.st_uid != os.geteuid():
                    raise StateDirectoryError(f"{folder} belongs to another user (uid {found.st_uid}, not {os.geteuid()})")
                if found.st_mode & 0o077:
                    os.chmod(folder, 0o700)
        except OSError as error:
            raise StateDirectoryError(f"{error.filename or self.root}: {error.strerror}") from error
