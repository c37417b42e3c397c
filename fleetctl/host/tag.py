"""A mark that every process of an agent has from birth, hands down to its children, and loses only on purpose.

It is the soft limit on the time that a process of a real-time class may run without a pause (RLIMIT_RTTIME). Limits are inherited over
fork and exec, and unlike a session, an environment, descriptors and parents, which a daemon sheds as a matter of course, nobody sets
this one. The values used here are as good as none: the least of them is 146,000 years in microseconds, and the kernel looks at it for
processes of a real-time class only. The hard limit stays as it is, so that an agent may set whatever it likes; then it has lost the mark.
"""

import contextlib
import hashlib
import resource
import sys
from collections.abc import Iterator
from functools import lru_cache

from fleetctl.host import helpers

_RLIMIT_RTTIME = 15  # on every architecture; Python has no name for it
_BASE, _BITS = 1 << 62, 48


@lru_cache(maxsize=4096)
def of(token: str) -> int:
    """The mark of the agent's process with this token. Everybody may read limits, so it must not give the token away."""
    return _BASE | int.from_bytes(hashlib.sha256(token.encode()).digest()[: _BITS // 8], "big")


@contextlib.contextmanager
def worn(token: str) -> Iterator[None]:
    """What this process starts meanwhile is born with the mark; another thread starts something inside `helpers.starting`."""
    with helpers.starting():
        before = resource.getrlimit(_RLIMIT_RTTIME)
        if not _possible(before):
            yield
            return
        resource.setrlimit(_RLIMIT_RTTIME, (of(token), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(_RLIMIT_RTTIME, before)


def give(pid: int, token: str) -> None:
    """Mark a process that was just started, where others start things too and might wear it; what it forks before is born without."""
    with contextlib.suppress(OSError):
        limits = resource.prlimit(pid, _RLIMIT_RTTIME)
        if _possible(limits):
            resource.prlimit(pid, _RLIMIT_RTTIME, (of(token), limits[1]))


def read(pid: int) -> int | None:
    """The mark of a process; None for one that has none, or of which we may not know: another user's could have made itself one."""
    try:
        soft = resource.prlimit(pid, _RLIMIT_RTTIME)[0]
    except OSError:
        return None
    return soft if soft >> _BITS == _BASE >> _BITS else None


def shed() -> None:
    """Lose the mark: a daemon that an agent started is nobody's, and neither are its agents that agent's."""
    soft, hard = resource.getrlimit(_RLIMIT_RTTIME)
    if soft >> _BITS == _BASE >> _BITS:
        resource.setrlimit(_RLIMIT_RTTIME, (hard, hard))


def _possible(limits: tuple[int, int]) -> bool:
    """Whether the mark can be worn and laid down again: 64 bits, and nobody chose a limit, or marked us already."""
    return sys.maxsize > 1 << 32 and limits == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
