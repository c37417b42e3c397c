"""Process 1 of each sandbox, held by descriptor: it lives as long as its agent, and all that is in the sandbox dies with it."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

from fleetctl.host import sandbox
from fleetctl.models import ProcessRef


class Keepers:
    """By the agent's process. Where there is no descriptor for one to be had, its agent is treated like any other."""

    def __init__(self) -> None:
        self._held: dict[ProcessRef, tuple[int, int]] = {}

    def __contains__(self, process: object) -> bool:
        return process in self._held

    @property
    def pids(self) -> set[int]:
        return {pid for pid, _ in self._held.values()}

    def add(self, process: ProcessRef, pid: int) -> None:
        with contextlib.suppress(OSError):
            self._held[process] = pid, os.pidfd_open(pid)

    def adopt(self, process: ProcessRef) -> None:
        """Find the keeper of an agent that an earlier daemon started, if it has one."""
        if process not in self._held and (pid := sandbox.keeper_of(process.pid)) is not None:
            self.add(process, pid)

    def kill(self, process: ProcessRef) -> None:
        """The kernel kills all that is in the sandbox, and lets nothing new begin."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._held[process][1], signal.SIGKILL)

    def end(self, process: ProcessRef, then: Callable[[], None]) -> None:
        """The agent itself has ended, and was reaped, without which the keeper cannot go. `then` is called when nobody is left in there."""
        self.kill(process)
        _, fd = self._held[process]
        asyncio.get_running_loop().add_reader(fd, self._ended, process, then)

    def release(self, process: ProcessRef) -> None:
        if (held := self._held.pop(process, None)) is None:
            return
        _, fd = held
        with contextlib.suppress(RuntimeError):  # no loop any more
            asyncio.get_running_loop().remove_reader(fd)
        with contextlib.suppress(ChildProcessError):  # not our child, or reaped with the other orphans
            os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        os.close(fd)

    def _ended(self, process: ProcessRef, then: Callable[[], None]) -> None:
        self.release(process)
        then()
