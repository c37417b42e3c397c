"""Runs commands as agents are run, beside them: probes, and those that write a checkpoint. Waits for them, and leaves nothing of them.

They are no part of the agent's tree: they have its environment, but not its token.
"""

import asyncio
import contextlib
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial

from fleetctl.host import environment, finding, pidfd, privileges, procfs
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, Exit, FleetSpec, ProcessRef, TrustLevel

MARK = "FLEETCTL_HELPER"
"""Marks whatever such a command starts; what is left of it is found by this and ended."""

_KILL_ROUNDS = 20
_REAP_MILLISECONDS = 100


async def run(
    command: Sequence[str], agent: Agent, spec: FleetSpec, lifecycle: LocalLifecycleManager, *, output: int = subprocess.DEVNULL
) -> Exit:
    """Wait for its end; cancelled, it is ended with all that it started. Raises OSError where it cannot be started, SpawnFailed."""
    mark = secrets.token_hex(8)
    environ = lifecycle.environment_of(agent, spec) | {MARK: mark}
    del environ[environment.TOKEN]
    # A session of its own, so that it can be ended as a whole and no key pressed in some terminal reaches it.
    start = partial(
        subprocess.Popen,
        command,
        cwd=spec.cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        umask=lifecycle.umask,
    )
    child = start() if spec.trust_level is TrustLevel.TRUSTED else privileges.without_new(start)
    child.returncode = 0  # reaped below: keeps Popen from ever waiting for it
    with lifecycle.helper(child.pid):
        ended: Exit | None = None
        process = _ref(child.pid)
        try:
            ended = await _end_of(process)
        finally:
            # Also what it left running, however it ended.
            _end(process, mark, lifecycle, whole=ended is None)
    return ended


def end_leftovers(state_root: str) -> None:
    """Kill what a daemon that was killed itself had running of these: nobody waits for that any more."""
    for pid in procfs.pids():
        environ = procfs.environ(pid)
        if MARK in environ and environ.get(environment.STATE_DIR) == state_root and procfs.owner(pid) == os.geteuid():
            with contextlib.suppress(OSError):
                pidfd.send(_ref(pid), signal.SIGKILL)


def _end(process: ProcessRef, mark: str, lifecycle: LocalLifecycleManager, *, whole: bool) -> None:
    pidfd.send(process, signal.SIGKILL, group=True)
    if whole or _left_something(process, mark, lifecycle):  # in a child that left its group
        for _ in range(_KILL_ROUNDS):
            left = list(_marked(mark))
            for one in left:
                pidfd.send(one, signal.SIGKILL)
            if not left:
                break
    _reap(process.pid)


def _left_something(process: ProcessRef, mark: str, lifecycle: LocalLifecycleManager) -> bool:
    """Whether a command that ended may have left processes outside its group, told without a look at every process of the machine.

    They, or what stands above them, became our children when it ended. What is ending just now may leave some of its own. Where orphans
    do not come to us, nobody can tell, and a look at everything after each probe would cost too much.
    """
    for pid in lifecycle.orphans() or ():
        found = procfs.stat(pid)
        if found is None or not found.alive or found.pgid == process.pid or procfs.environ(pid).get(MARK) == mark:
            return True
    return False


def _ref(pid: int) -> ProcessRef:
    found = procfs.stat(pid)
    if found is None:
        raise ProcessLookupError(f"no process {pid}")
    return finding.reference(found)


def _reap(pid: int) -> None:
    """A child that was killed is gone in a moment; one that hangs in the kernel must not keep us, and is reaped as an orphan."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        poll = select.poll()  # not select: the descriptor may be beyond 1023
        poll.register(fd, select.POLLIN)
        poll.poll(_REAP_MILLISECONDS)
        os.close(fd)
        os.waitpid(pid, os.WNOHANG)


def _marked(mark: str) -> Iterator[ProcessRef]:
    for stat in procfs.snapshot().values():
        if stat.alive and procfs.environ(stat.pid).get(MARK) == mark:
            yield finding.reference(stat)


async def _end_of(process: ProcessRef) -> Exit:
    """Wait for our child to end; it stays to be reaped."""
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(process.pid)
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _settle, ended)
    try:
        await ended
        return pidfd.exit_of(fd, process, time.time()) or Exit(at=time.time())
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
