"""What the daemon says to the service manager that started it."""

import os
import socket
from pathlib import Path

import pytest

from fleetctl.host.servicemanager import ServiceManager


@pytest.mark.parametrize(
    ("given", "beat"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, None),
        ({"NOTIFY_SOCKET": "/x"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000"}, 15.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_it_beats_twice_as_often_as_asked_and_takes_the_variables_away(given: dict[str, str], beat: float | None) -> None:
    environ = {**given, "PATH": "/bin"}
    assert ServiceManager(environ).beat_seconds == beat
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("abstract", [False, True])
def test_all_words_come_in_one_message(abstract: bool, tmp_path: Path) -> None:
    name = f"@fleetctl-test-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        ServiceManager({"NOTIFY_SOCKET": name}).tell("READY=1", "STATUS=well")
        assert listener.recv(100) == b"READY=1\nSTATUS=well"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "x" * 300, "/tmp"])
def test_that_nobody_listens_is_no_trouble(address: str) -> None:
    ServiceManager({"NOTIFY_SOCKET": address}).tell("READY=1")
