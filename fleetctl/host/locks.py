"""The lock that each agent inherits: held as long as any of its processes keeps it open, and in its file who they are."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator

from fleetctl.errors import SpawnFailed
from fleetctl.host.paths import Paths
from fleetctl.models import Agent


@contextlib.contextmanager
def opened(path: str, how: int = 0) -> Iterator[int]:
    """A descriptor of a file of ours, made with `how` O_CREAT together with its folder."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | how
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if not how & os.O_CREAT:
            raise
        make_folder(os.path.dirname(path))  # somebody cleared run/
        fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def make_folder(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        os.makedirs(path, mode=0o700, exist_ok=True)


def take(lock: int, agent: Agent) -> None:
    """Hold the agent's lock, and write into it who holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SpawnFailed(f"{agent.id}: an earlier process of this agent still holds its lock") from error
    launch = "warm" if agent.pooled else "cold"
    record = {"token": agent.token, "fleet": agent.fleet, "slot": agent.slot, "spec_hash": agent.spec_hash, "launch": launch}
    with contextlib.suppress(OSError):  # a full disk: then only the environment tells
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(record).encode(), 0)


def is_held(paths: Paths, agent_id: str) -> bool:
    """Whether any process still has the lock that the agent inherited: proof of life that no reuse of pids can fake."""
    try:
        with opened(paths.agent_lock(agent_id)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def records(paths: Paths) -> dict[str, dict[str, object]]:
    """What is written in the agents' lock files, by agent id: who the processes are that hold them."""
    found = {}
    for name in names(paths.locks):
        agent_id = name.removesuffix(".lock")
        with contextlib.suppress(OSError, ValueError, UnicodeDecodeError):
            with opened(f"{paths.locks}/{name}") as lock:
                record = json.loads(os.pread(lock, 4096, 0) or b"{}")
            if isinstance(record, dict):
                found[agent_id] = record
    return found


def names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
