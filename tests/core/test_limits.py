"""When an agent that only a look holds to its limits has to go."""

import pytest

from fleetctl.core.limits import exceeded
from fleetctl.models import ResourceLimitsSpec, Usage

LIMITS = ResourceLimitsSpec(cpu_limit=0.5, memory_limit_mb=100, pids_limit=10)
BOTH = ("memory_limit_mb", "pids_limit")


@pytest.mark.parametrize(
    ("mebibytes", "processes", "watched", "reason"),
    [
        (100, 10, BOTH, None),
        (101, 10, BOTH, "it uses 101 MiB, more than memory_limit_mb = 100"),
        (100, 11, BOTH, "it has 11 processes, more than pids_limit = 10"),
        (101, 11, (), None),
        (101, 11, ("pids_limit",), "it has 11 processes, more than pids_limit = 10"),
    ],
)
def test_what_is_watched_and_exceeded_is_told(mebibytes: int, processes: int, watched: tuple[str, ...], reason: str | None) -> None:
    usage = Usage(cpu_percent=400.0, memory_bytes=mebibytes << 20, processes=processes)
    assert exceeded(LIMITS, usage, watched) == reason


def test_without_a_limit_nothing_is_exceeded() -> None:
    assert exceeded(ResourceLimitsSpec(), Usage(cpu_percent=None, memory_bytes=1 << 50, processes=10**6), BOTH) is None
