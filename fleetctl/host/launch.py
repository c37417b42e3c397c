"""Starts a process that finds descriptors where it looks for them, its own pid in its environment, and itself in its control groups.

That is what subprocess cannot do.

A shell stands between: it knows its pid, which stays when it becomes the program. What Popen would have told, that the program or its
directory is not there, is looked for before.
"""

import errno
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence

_SHELL = "/bin/sh"
_OUT_OF_THE_WAY = 64

TELL_PID = "LISTEN_PID=$$\nexport LISTEN_PID\n"
"""For `prepare`: what sd_listen_fds(3) compares with the pid of whoever asks."""

# $1: the directory; what follows: the program. Of the shell nothing stays but its pid.
_SCRIPT = 'cd -P "$1" || exit 126\nunset OLDPWD\nshift\nexec "$@"\n'


def launch(
    argv: Sequence[str],
    *,
    cwd: str,
    environ: Mapping[str, str],
    umask: int,
    output: int,
    descriptors: Sequence[int],
    prepare: str = "",
) -> int:
    """The pid of a process in a session of its own. `descriptors` are its 3, 4 and so on; it has no other. Raises OSError as Popen does.

    `prepare`: shell commands that it carries out on itself before it becomes the program; where they fail it ends with 126.
    """
    cwd = os.path.abspath(cwd)
    check_program(argv[0], cwd, environ)
    script = (f"umask {umask:o}\n" if umask >= 0 else "") + prepare + _SCRIPT
    # Above all the numbers that are written to, so that none is overwritten before it is copied.
    lowest = max(_OUT_OF_THE_WAY, 3 + len(descriptors))
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in (output, *descriptors)]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions: list[tuple[int, int] | tuple[int, int, int]] = [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()]
        actions += [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, moved[0], 1), (os.POSIX_SPAWN_DUP2, moved[0], 2)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, 3 + index) for index, fd in enumerate(moved[1:])]
        return os.posix_spawn(
            _SHELL,
            [_SHELL, "-c", script, _SHELL, cwd, *argv],
            environ,
            file_actions=actions,
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them, and programs do not expect that
        )
    finally:
        for fd in (null, *moved):
            os.close(fd)


def check_program(program: str, cwd: str, environ: Mapping[str, str]) -> None:
    """Raise the OSError that its execution in that directory would: of what is found out beforehand, errno and the name."""
    if not os.path.isdir(cwd):
        raise _error(errno.ENOTDIR if os.path.exists(cwd) else errno.ENOENT, cwd)
    if not os.access(cwd, os.X_OK):
        raise _error(errno.EACCES, cwd)
    folders = [""] if "/" in program else environ.get("PATH", os.defpath).split(os.pathsep)
    candidates = [os.path.join(cwd, folder, program) for folder in folders]
    if any(os.path.isfile(path) and os.access(path, os.X_OK) for path in candidates):
        return
    raise _error(errno.EACCES if any(map(os.path.exists, candidates)) else errno.ENOENT, program)


def _error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)


def _inheritable() -> list[int]:
    """Descriptors that somebody left open for our children, beyond the first three: whoever started us may have."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the one that the folder was read with
    return found
