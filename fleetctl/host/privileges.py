"""Starts programs that can never have more rights than they are born with: no setuid program and no file capability lifts them.

The kernel keeps that promise (no_new_privs) for each thread, hands it down over fork and exec, and never takes it back. So there is one
thread that has made it, and what shall have no more rights is started there: neither a wrapper nor a start of anything else is needed.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

_PR_SET_NO_NEW_PRIVS = 38

T = TypeVar("T")


def without_new(start: Callable[[], T]) -> T:
    """What `start` returns or raises; the processes that it starts, and all that come of them, are bound by that promise."""
    return _bound_thread().submit(start).result()


@cache
def _bound_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="no-new-privileges", initializer=_promise)


def _promise() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "no_new_privs")
