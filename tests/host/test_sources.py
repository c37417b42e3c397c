"""Metrics from where users keep them: commands, files, HTTP, Redis, Python functions; and sources that hang, lie or are not there."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fleetctl.errors import FleetctlError
from fleetctl.host.sources import LocalMetricReader
from fleetctl.models import FleetSpec, MetricSpec

METRICS = """# HELP requests Requests
requests{queue="a",path="/x y"} 3
requests{queue="b"} 4.5 1700000000
waiting 7
broken NaNish
"""


@contextmanager
def serving(*answers: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers one connection after the other with these bytes, whatever it is asked; empty: never."""
    asked: list[bytes] = []
    silent = []  # connections that stay open
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                connection, _ = server.accept()
                asked.append(connection.recv(65536))
                if not answer:
                    silent.append(connection)
                    continue
                with suppress(OSError):  # who has read enough hangs up
                    connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], asked
    for connection in silent:
        connection.close()


def http(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\n\r\n{body}".encode()


def read(folder: Path, **source: Any) -> float:
    spec = FleetSpec(name="demo", command=("agent",), cwd=str(folder), environment={"DEPTH": "17"})
    return LocalMetricReader().read(MetricSpec(target=1.0, **{"timeout_seconds": 5.0, **source}), spec)


def test_a_command_prints_the_number_in_the_fleet_s_folder_and_environment(tmp_path: Path) -> None:
    (tmp_path / "depth").write_text("42\n")
    assert read(tmp_path, command=("cat", "depth")) == 42
    assert read(tmp_path, command=("sh", "-c", "echo counting; echo $DEPTH")) == 17


def test_a_file_holds_the_number(tmp_path: Path) -> None:
    (tmp_path / "depth").write_text(" 1.5e3 \n")
    assert read(tmp_path, file="depth") == 1500
    assert read(tmp_path, file=str(tmp_path / "depth")) == 1500


def test_a_python_function_is_called(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text("def depth():\n    return 3\n")
    assert read(tmp_path, python="load:depth") == 3


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ("12", None, 12.0),
        ('{"queue": [{"length": 5}]}', "queue.0.length", 5.0),
        ('{"queue": "6"}', "queue", 6.0),
        (METRICS, "requests", 7.5),
        (METRICS, 'requests{queue="b"}', 4.5),
        (METRICS, "waiting", 7.0),
    ],
)
def test_an_endpoint_says_it_as_json_or_for_prometheus(tmp_path: Path, body: str, field: str | None, value: float) -> None:
    with serving(http(body)) as (port, asked):
        assert read(tmp_path, http=f"http://127.0.0.1:{port}/metrics?a=1", field=field) == value
    assert asked[0].startswith(b"GET /metrics?a=1 HTTP/1.0\r\n")


def test_redis_is_asked_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(b"+OK\r\n:9\r\n", b"$2\r\n31\r\n") as (port, asked):
        assert read(tmp_path, redis="LLEN jobs", redis_url=f"redis://127.0.0.1:{port}/2") == 9
        monkeypatch.setenv("WHERE_REDIS_IS", f"redis://127.0.0.1:{port}")
        assert read(tmp_path, redis="GET depth", redis_url="env:WHERE_REDIS_IS") == 31
    assert asked == [
        b"*2\r\n$6\r\nSELECT\r\n$1\r\n2\r\n*2\r\n$4\r\nLLEN\r\n$4\r\njobs\r\n",
        b"*2\r\n$3\r\nGET\r\n$5\r\ndepth\r\n",
    ]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"command": ("true",)}, "is no number"),
        ({"command": ("sh", "-c", "echo nan")}, "is no number"),
        ({"command": ("false",)}, "false ended with 1"),
        ({"command": ("no-such-program",)}, "No such file"),
        ({"file": "missing"}, "No such file"),
        ({"file": "pipe"}, "is no file"),
        ({"python": "os:no_such_function"}, "ended with 1"),
        ({"http": "http://127.0.0.1:1/"}, "refused"),
        ({"http": "http://192.0.2.1/"}, "not this machine"),
        ({"redis": "LLEN jobs", "redis_url": "redis://192.0.2.1"}, "not this machine"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, source: dict[str, Any], why: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FleetctlError, match=why):
        read(tmp_path, **source)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (http("{}"), "has no depth"),
        (http('{"depth": true}'), "is no number"),
        (http('{"depth": NaN}'), "is no number"),
        (http("other 1\n"), "has no depth"),
        (http("", "503 Busy"), "status 503"),
        (b"nonsense", "not HTTP"),
        (http("x" * (2 << 20)), "longer than"),
    ],
)
def test_an_endpoint_that_answers_nonsense_is_told(tmp_path: Path, answer: bytes, why: str) -> None:
    with serving(answer) as (port, _), pytest.raises(FleetctlError, match=why):
        read(tmp_path, http=f"http://127.0.0.1:{port}/", field="depth")


@pytest.mark.parametrize(("answer", "why"), [(b"-WRONGTYPE no list\r\n", "WRONGTYPE"), (b"$-1\r\n", "no such value"), (b":1", "closed")])
def test_redis_that_says_no_is_told(tmp_path: Path, answer: bytes, why: str) -> None:
    with serving(answer) as (port, _), pytest.raises(FleetctlError, match=why):
        read(tmp_path, redis="LLEN jobs", redis_url=f"redis://127.0.0.1:{port}")


def test_what_hangs_is_given_up_and_its_processes_are_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(FleetctlError, match=r"no answer in 0\.2 s"):
        read(tmp_path, command=("sh", "-c", "sleep 600 & echo $$ > pid; wait"), timeout_seconds=0.2)
    with serving(b"") as (port, _), pytest.raises(FleetctlError, match="no answer"):
        read(tmp_path, http=f"http://127.0.0.1:{port}/", timeout_seconds=0.2)
    assert time.monotonic() - began < 10
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}/exe")


def test_a_command_of_the_daemon_keeps_its_exit_status(tmp_path: Path) -> None:
    """It runs in a thread, while the loop reaps whatever ends. In a process of its own, because it reaps all its children."""
    story = f"""
import asyncio, signal
from fleetctl.errors import FleetctlError
from fleetctl.host.process import LocalLifecycleManager, become_subreaper
from fleetctl.host.sources import LocalMetricReader
from fleetctl.models import FleetSpec, MetricSpec

async def main():
    become_subreaper()
    manager = LocalLifecycleManager({str(tmp_path)!r}, owns_all_children=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, manager.reap_orphans)
    metric, spec = MetricSpec(command=("sh", "-c", "echo 5; exit 3")), FleetSpec(name="demo", command=("x",), cwd="/")
    for _ in range(20):
        try:
            raise AssertionError(await asyncio.to_thread(LocalMetricReader().read, metric, spec))
        except FleetctlError as error:
            assert error.message == "sh ended with 3", error.message

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", story], check=True, timeout=30, cwd=Path(__file__).parents[2])
