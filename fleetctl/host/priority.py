"""How large a share of a busy CPU processes get."""

import contextlib
import os


def own() -> int:
    """Our own nice value, which what we start has until it is given another."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def set_nice(pid: int, value: int) -> None:
    """Give a process, in all its threads, this nice value; what it starts from then on has it too. Raises PermissionError.

    The kernel may weigh sessions against each other first, and only then the processes of one (autogroup, sched(7)). A session that its
    leader's pid names gets the value too.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread), value)
        if os.getsid(pid) == pid:
            _set_session_nice(pid, value)


def _set_session_nice(leader: int, value: int) -> None:
    """Not every kernel has it, and it takes no more than a few changes a second of who is not root: then the processes' value has to do."""
    with contextlib.suppress(OSError), open(f"/proc/{leader}/autogroup", "w", encoding="ascii") as file:
        file.write(str(value))
