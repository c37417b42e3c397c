"""Opens the file that an agent appends its output to by itself, and sets an old one aside. The format is `logfiles`' to know."""

import errno
import fcntl
import os
import signal
from contextlib import suppress

from fleetctl.host import logcut, logfiles
from fleetctl.host.paths import Paths
from fleetctl.models import LogSpec


def open_log(paths: Paths, fleet: str, agent_id: str, spec: LogSpec | None = None) -> int:
    """A descriptor for the stdout and stderr of a new instance of the agent. Raises StateDirectoryError; about 10 us.

    With `spec`, a file that is full already is set aside; needed where the file system cannot punch holes.
    """
    path = logfiles.log_path(paths, fleet, agent_id)
    try:
        fd = _open_append(path)
        found = logcut.stat_own(fd)
        sparse = found.st_size - found.st_blocks * 512 > 65536
        if sparse or (spec is not None and found.st_size >= spec.max_bytes):
            os.close(fd)
            with suppress(OSError):  # an improvement only, and a full disk must not keep an agent from starting
                _set_aside(path, spec)
            fd = _open_append(path)
    except OSError as error:
        raise logfiles.unusable(path, error) from error
    # O_NONBLOCK was for the open; an agent may be upset by it.
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def _open_append(path: str) -> int:
    try:
        return logfiles.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return logfiles.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _set_aside(path: str, spec: LogSpec | None) -> bool:
    """Let a new instance begin with a file of its own where the old one is mostly hole, or too large and cannot be cut.

    Without this the apparent size would grow for ever, up to limits of file systems and of RLIMIT_FSIZE. Only a rename, so nothing
    can be lost; not done while a process is left that writes (or reads) there.
    """
    if not logcut.CUTTING.acquire(blocking=False):
        return False  # a rotation is going on; the file does as it is
    try:
        fd = logcut.open_live(path)
        try:
            if _in_use(fd):
                return False
            parts = logfiles.parts(path)
            start, pending = logfiles.locate(fd, parts)
            size = os.fstat(fd).st_size
            if pending:
                logcut.punch(fd, 0, start)
            if start == 0 and (spec is None or size < spec.max_bytes):
                return False
            aside = logfiles.new_part(path, parts[-1].position_end if parts else 0, start, size, whole=True)
            os.rename(path, aside.path)
            if spec is not None:
                logcut.prune([*parts, aside], max(1, spec.keep))
            return True
        finally:
            os.close(fd)
    finally:
        logcut.CUTTING.release()


def _in_use(fd: int) -> bool:
    """Whether anybody else has the file open: the kernel grants a write lease only to the sole user of a file."""
    try:
        # Somebody who opens the file while the lease is held makes the kernel send us a signal: SIGIO, which ends a process, unless
        # another is chosen. SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)  # other errors: no leases here; what is set aside is not lost
    return False
