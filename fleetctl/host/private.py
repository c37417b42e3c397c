"""A state directory of one program alone: it goes with its program, and where that was killed, the next program clears it away."""

import atexit
import contextlib
import os
import shutil
import signal
import stat
import tempfile
import time

from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.state import was_kept_by_program
from fleetctl.models import Agent

_PREFIX = "fleetctl-"
_GRACE_SECONDS = 2.0
_LOOK_AGAIN_SECONDS = 0.02
_KILL_ROUNDS = 100


class PrivateDirectory:
    """Made at once. A program that ends without removing it ends its agents, which nobody would find again, and then it."""

    def __init__(self) -> None:
        self.root = os.path.realpath(tempfile.mkdtemp(prefix=_PREFIX))
        self._pid = os.getpid()
        atexit.register(self._leave)

    def remove(self) -> None:
        atexit.unregister(self._leave)
        shutil.rmtree(self.root, ignore_errors=True)

    def _leave(self) -> None:
        if os.getpid() == self._pid:  # not in a child that was forked from it
            clear(self.root)


def clear_abandoned() -> None:
    """Clear away what programs of this user's left behind that were killed."""
    folder = tempfile.gettempdir()
    for name in os.listdir(folder):
        root = os.path.realpath(f"{folder}/{name}")
        with contextlib.suppress(OSError):
            found = os.lstat(root) if name.startswith(_PREFIX) else None
            if found and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and was_kept_by_program(Paths(root)):
                clear(root)


def clear(root: str) -> None:
    """End all agents of a state directory that nobody keeps, after a moment to finish, and remove it."""
    lifecycle = LocalLifecycleManager(root)
    agents = _agents(lifecycle)
    lifecycle.signal(agents, signal.SIGTERM, signal.SIGCONT)
    deadline = time.monotonic() + _GRACE_SECONDS
    while agents and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_SECONDS)
        agents = _agents(lifecycle)
    for _ in range(_KILL_ROUNDS):
        if not agents:
            break
        lifecycle.kill(agents)
        time.sleep(_LOOK_AGAIN_SECONDS)
        agents = _agents(lifecycle)
    shutil.rmtree(root, ignore_errors=True)


def _agents(lifecycle: LocalLifecycleManager) -> list[Agent]:
    return [
        Agent(id=tree.agent_id, fleet=tree.fleet, slot=tree.slot, created_at=0.0, token=tree.token, process=tree.leader)
        for tree in lifecycle.find()
    ]
