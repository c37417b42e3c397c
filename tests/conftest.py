"""What all tests share: a short state directory, and the proof that no agent outlives the tests."""

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator

import pytest

from fleetctl.host import procfs
from fleetctl.host.environment import TOKEN
from tests.helpers import wait_until

# Agents inherit LC_* from the daemon, so this reaches every agent of these tests, and none of somebody else's.
_MARK = "LC_FLEETCTL_TEST_SESSION"


def pytest_configure() -> None:
    """A job in the background of a shell ignores Ctrl-C, and so would every command that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_agent_is_left() -> Iterator[None]:
    mark = os.environ[_MARK] = uuid.uuid4().hex

    def left() -> list[int]:
        marked = ((stat.pid, procfs.environ(stat.pid)) for stat in procfs.snapshot().values() if stat.alive)
        return [pid for pid, environ in marked if environ.get(_MARK) == mark and TOKEN in environ]

    yield
    del os.environ[_MARK]
    try:
        wait_until(lambda: not left())
    except AssertionError:
        raise AssertionError(f"agents outlived the tests: pids {left()}") from None


@pytest.fixture
def state_dir() -> Iterator[str]:
    """A path short enough for a socket in it; nothing is there yet."""
    folder = tempfile.mkdtemp(prefix="fleet-")
    yield f"{os.path.realpath(folder)}/s"
    shutil.rmtree(folder)
