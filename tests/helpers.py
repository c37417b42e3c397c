"""Waiting for conditions, for all tests."""

import asyncio
import time
from collections.abc import Callable

_LOOK_AGAIN_SECONDS = 0.005


def wait_until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Return when the condition holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(_LOOK_AGAIN_SECONDS)


async def wait_for(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """The same, inside an event loop that goes on running."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
