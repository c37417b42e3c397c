"""Processes held by descriptor: wait for the end, learn the exit status, send signals that cannot hit a stranger."""

import array
import errno
import fcntl
import logging
import os
import signal

from fleetctl.host import procfs
from fleetctl.models import Exit, Identity, ProcessRef

log = logging.getLogger(__name__)

# From linux/pidfd.h: the first version of struct pidfd_info; the mask comes first, exit_code behind cgroupid and eleven ids.
_PIDFD_INFO_BYTES = 64
_PIDFD_GET_INFO = 0xC000FF0B | _PIDFD_INFO_BYTES << 16
_PIDFD_INFO_EXIT = 1 << 3
_EXIT_CODE_OFFSET = 60
_SIGNAL_PROCESS_GROUP = 1 << 2  # Linux 6.9


def identify(process: ProcessRef) -> Identity:
    """Whether the recorded process is the one that has its pid now; a zombie is gone."""
    if process.boot_id != procfs.boot_id():
        return Identity.GONE
    found = procfs.stat(process.pid)
    if found is None:
        return Identity.UNVERIFIABLE if os.path.exists(f"/proc/{process.pid}") else Identity.GONE
    return Identity.MATCH if found.start_ticks == process.start_ticks and found.alive else Identity.GONE


def open_verified(process: ProcessRef) -> int | None:
    """A descriptor of exactly this process, or None where it is gone or cannot be verified; a zombie still counts.

    First the descriptor, then the comparison: after that the pid may be reused, the descriptor cannot. Raises OSError where we are out
    of descriptors: that says nothing about the process.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno in procfs.OUT_OF_MEANS:
            raise
        return None
    try:
        found = procfs.stat(process.pid)
    except OSError:
        os.close(fd)
        raise
    if found and found.start_ticks == process.start_ticks and process.boot_id == procfs.boot_id():
        return fd
    os.close(fd)
    return None


def send(process: ProcessRef, number: int, *, group: bool = False, held: int | None = None) -> bool:
    """Signal exactly this process, or the process group it leads; False where it is gone or cannot be verified.

    `held`: a descriptor of this very process, where the caller has one.
    """
    fd = open_verified(process) if held is None else held
    if fd is None:
        return False
    try:
        if group:
            _send_to_group(fd, process.pid, number)
        else:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # it became another user's; the others must not wait for it
        log.warning("no permission to signal pid %d", process.pid)
        return False
    finally:
        if held is None:
            os.close(fd)
    return True


def _send_to_group(fd: int, pgid: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(fd, number, None, _SIGNAL_PROCESS_GROUP)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        os.killpg(pgid, number)  # before Linux 6.9; the descriptor was verified, and holds the pid as long as it is not reaped


def exit_of(fd: int, process: ProcessRef, at: float) -> Exit | None:
    """How the process behind the descriptor ended; None while the kernel does not tell (yet). Reaps nothing."""
    try:
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        status = _status_of_stranger(fd, process)
        return None if status is None else _from_status(status, at)
    if result is None:
        return None
    return Exit(code=result.si_status, at=at) if result.si_code == os.CLD_EXITED else Exit(signal=result.si_status, at=at)


def _status_of_stranger(fd: int, process: ProcessRef) -> int | None:
    """Not our child: its zombie tells while init has not reaped it, and afterwards, from Linux 6.15, the descriptor does."""
    found = procfs.stat(process.pid)
    if found and found.start_ticks == process.start_ticks:
        return None if found.alive else found.wait_status
    info = array.array("B", bytes(_PIDFD_INFO_BYTES))
    info[0] = _PIDFD_INFO_EXIT
    try:
        fcntl.ioctl(fd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    if not info[0] & _PIDFD_INFO_EXIT:
        return None
    return int.from_bytes(info[_EXIT_CODE_OFFSET : _EXIT_CODE_OFFSET + 4].tobytes(), "little")


def _from_status(status: int, at: float) -> Exit:
    return Exit(signal=os.WTERMSIG(status), at=at) if os.WIFSIGNALED(status) else Exit(code=os.WEXITSTATUS(status), at=at)
