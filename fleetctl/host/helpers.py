"""Children of ours that are no agents, such as probes: who starts them waits for them, and nobody takes them for what an agent left."""

import contextlib
import threading
from collections.abc import Iterator

pids: set[int] = set()
"""Of those that run, and of those that ended and were not waited for yet."""
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Nobody else starts or reaps anything meanwhile: for starts in other threads than the agents', until the pid is in `pids`."""
    with _one_at_a_time:
        yield
