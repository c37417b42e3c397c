"""The client's half of the control socket, against the real server and against servers that misbehave in one exact way."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from fleetctl.daemon import wire
from fleetctl.daemon.server import Limits
from fleetctl.daemon.wire import Connection, Stream, quoted, with_query
from fleetctl.errors import Busy, ConfigError, DaemonUnreachable, FleetctlError, NotFound, StateDirectoryError, TimedOut, UsageError
from tests.daemon.serving import event, serving, short_folder, wait_until

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'
Script = Callable[[socket.socket], None]


def read_request(caller: socket.socket) -> bytes:
    """A whole request without a body, or what came before the caller closed."""
    received = b""
    while b"\r\n\r\n" not in received and (data := caller.recv(65536)):
        received += data
    return received


def saying(*parts: bytes) -> Script:
    """Reads one request, says these parts in separate packets, closes."""

    def script(caller: socket.socket) -> None:
        read_request(caller)
        for part in parts:
            caller.sendall(part)

    return script


@contextmanager
def scripted(*scripts: Script) -> Iterator[str]:
    """A server that treats its first caller by the first script, the second by the second, and then listens no more."""
    with short_folder() as folder, closing(socket.socket(socket.AF_UNIX)) as listener:
        path = f"{folder}/s.sock"
        listener.bind(path)
        listener.listen(10)

        def run() -> None:
            for script in scripts:
                caller = listener.accept()[0]
                with closing(caller):
                    caller.settimeout(20)
                    script(caller)
            listener.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield path
        thread.join(10)
        assert not thread.is_alive(), "the script did not get to its end"


def test_one_connection_is_kept_for_many_requests() -> None:
    with serving() as server, closing(Connection(server.path)) as connection:
        for _ in range(5):
            assert connection.request("GET", "/v1/daemon")["alive"] is True
        assert server.connections == 1
        connection.close()
        wait_until(lambda: server.connections == 0)
        assert connection.request("GET", "/v1/daemon")["alive"] is True


def test_the_daemons_errors_come_back_as_what_they_were() -> None:
    with serving() as server, closing(Connection(server.path)) as connection:
        with pytest.raises(NotFound, match="no fleet other"):
            connection.request("GET", "/v1/fleets/other")
        with pytest.raises(UsageError):
            connection.request("GET", "/v1/fleets/Other")
        server.control.fail = ConfigError("line 3", hint="try yes")
        with pytest.raises(ConfigError) as caught:
            connection.request("PUT", "/v1/fleets/demo", {"spec": {}})
        assert (caught.value.message, caught.value.hint) == ("line 3", "try yes")
        assert server.connections == 1


def test_a_refusal_is_read_although_the_request_could_not_be_sent() -> None:
    with serving() as server, closing(Connection(server.path)) as connection:
        with pytest.raises(UsageError, match="larger than 1048576 bytes"):
            connection.request("PUT", "/v1/fleets/demo", {"spec": {"x": "y" * 20_000_000}})
        assert connection.request("GET", "/v1/daemon")["alive"] is True


def test_a_large_answer_arrives_whole() -> None:
    with serving() as server, closing(Connection(server.path)) as connection:
        server.control.change("x" * 5_000_000)
        assert connection.request("GET", "/v1/status")["fleets"][0]["notes"] == ["x" * 5_000_000]


def test_threads_may_share_a_connection() -> None:
    with serving() as server, closing(Connection(server.path)) as connection:
        answers: list[str] = []

        def ask(name: str) -> None:
            for _ in range(30):
                try:
                    connection.request("GET", f"/v1/agents/{name}-aaaaa")
                except NotFound as error:
                    answers.append(error.message)

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(answers) == sorted([f"There is no agent {name}-aaaaa" for name in "abcd"] * 30)
        assert server.connections == 1


def test_a_forked_child_does_not_speak_on_its_parents_connection() -> None:
    with serving() as server, closing(Connection(server.path)) as connection:
        connection.request("GET", "/v1/daemon")
        connection._pid = os.getpid() + 1  # as a child sees it
        connection.request("GET", "/v1/daemon")
        assert connection._pid == os.getpid()


# ---- nobody there, or nobody who answers ----


def test_a_missing_socket_a_stale_one_and_a_forbidden_one_are_told_apart() -> None:
    with short_folder() as folder:
        path = f"{folder}/s.sock"
        with pytest.raises(DaemonUnreachable, match=f"there is no {path}"):
            Connection(path).request("GET", "/")
        with closing(socket.socket(socket.AF_UNIX)) as dead:
            dead.bind(path)
        with pytest.raises(DaemonUnreachable, match=f"nothing listens at {path}"):
            Connection(path).request("GET", "/")
        with pytest.raises(DaemonUnreachable, match="nothing listens"):
            Stream[Any](path, "/")
        with pytest.raises(DaemonUnreachable, match="Not a directory"):
            Connection("/dev/null/s.sock").request("GET", "/")
        with pytest.raises(StateDirectoryError, match="too long"):
            Connection(folder + "/" + "x" * 200).request("GET", "/")


def test_a_silent_server_is_given_up_in_time() -> None:
    def say_nothing(caller: socket.socket) -> None:
        read_request(caller)
        caller.recv(1)  # returns when the client gives up

    with scripted(say_nothing) as path, closing(Connection(path, timeout=0.2)) as connection:
        began = time.monotonic()
        with pytest.raises(TimedOut, match=r"0\.2 seconds"):
            connection.request("GET", "/")
        assert time.monotonic() - began < 2


def test_a_dripping_answer_does_not_stretch_the_timeout() -> None:
    def drip(caller: socket.socket) -> None:
        read_request(caller)
        try:
            for byte in OK * 100:
                caller.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            return

    with scripted(drip) as path, closing(Connection(path, timeout=0.3)) as connection:
        began = time.monotonic()
        with pytest.raises(TimedOut):
            connection.request("GET", "/")
        assert time.monotonic() - began < 2


def test_a_full_queue_of_connections_is_waited_for_and_given_up_in_time() -> None:
    with short_folder() as folder, closing(socket.socket(socket.AF_UNIX)) as listener, closing(socket.socket(socket.AF_UNIX)) as first:
        path = f"{folder}/s.sock"
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(TimedOut):
            Connection(path, timeout=0.1).request("GET", "/")

        def serve() -> None:
            listener.accept()[0].close()
            caller = listener.accept()[0]
            read_request(caller)
            caller.sendall(OK)
            caller.close()

        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(Connection(path, timeout=10).request("GET", "/")))
        asking.start()
        serve()
        asking.join(10)
        assert answers == [{"a": 1}]


# ---- stale connections ----


def twice(caller: socket.socket) -> None:
    """Answers one request, reads a second one whole, and closes without an answer."""
    read_request(caller)
    caller.sendall(OK)
    assert read_request(caller)


def test_a_read_is_repeated_on_a_new_connection_when_the_kept_one_breaks() -> None:
    with scripted(twice, saying(OK)) as path, closing(Connection(path)) as connection:
        assert connection.request("GET", "/") == {"a": 1}
        assert connection.request("GET", "/") == {"a": 1}


def test_a_change_that_was_read_whole_is_never_repeated() -> None:
    with scripted(twice) as path, closing(Connection(path)) as connection:
        connection.request("GET", "/")
        with pytest.raises(DaemonUnreachable, match="not known"):
            connection.request("DELETE", "/")


def test_a_change_is_sent_on_a_new_connection_when_the_kept_one_was_closed_before() -> None:
    closed = threading.Event()

    def answer_and_close(caller: socket.socket) -> None:
        saying(OK)(caller)
        caller.close()
        closed.set()

    requests: list[bytes] = []

    def note(caller: socket.socket) -> None:
        requests.append(read_request(caller))
        caller.sendall(OK)

    with scripted(answer_and_close, note) as path, closing(Connection(path)) as connection:
        connection.request("GET", "/")
        assert closed.wait(10)
        assert connection.request("DELETE", "/x") == {"a": 1}
    assert len(requests) == 1
    assert requests[0].startswith(b"DELETE /x HTTP/1.1\r\n")


def test_a_change_is_repeated_when_the_server_closed_with_it_unread() -> None:
    def close_unread(caller: socket.socket) -> None:
        saying(OK)(caller)
        while not caller.recv(1, socket.MSG_PEEK):  # the request has come, and nobody reads it
            pass

    with scripted(close_unread, saying(OK)) as path, closing(Connection(path)) as connection:
        connection.request("GET", "/")
        assert connection.request("DELETE", "/") == {"a": 1}


def test_a_fresh_connection_that_breaks_is_not_tried_again() -> None:
    with (
        scripted(saying()) as path,
        closing(Connection(path)) as connection,
        pytest.raises(DaemonUnreachable, match="closed the connection"),
    ):
        connection.request("GET", "/")


def test_half_an_answer_is_never_given_to_the_next_request() -> None:
    def stall(caller: socket.socket) -> None:
        read_request(caller)
        caller.sendall(OK[:-4])
        caller.recv(1)

    with scripted(stall, saying(OK)) as path, closing(Connection(path, timeout=0.2)) as connection:
        with pytest.raises(TimedOut):
            connection.request("GET", "/")
        assert connection.request("GET", "/", timeout=10) == {"a": 1}


# ---- answers of all kinds ----


@pytest.mark.parametrize(
    "parts",
    [
        [OK],
        [bytes([byte]) for byte in OK],
        [b"HTTP/1.1 100 Continue\r\n\r\n", OK],
        [b'HTTP/1.0 200 OK\r\n\r\n{"a":', b" 1}"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\n", b'{"a\r\n5\r\n": 1}\r\n0\r\nTrailer: x\r\n\r\n'],
    ],
    ids=["plain", "byte by byte", "after a 100", "until the end", "chunked"],
)
def test_answers_are_read_however_they_are_framed(parts: list[bytes]) -> None:
    with scripted(saying(*parts)) as path, closing(Connection(path)) as connection:
        assert connection.request("GET", "/") == {"a": 1}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-x\r\n\r\n", "cannot be read"),
        (b"HTTP/1.1 abc\r\n\r\n", "cannot be read"),
        (b"\r\n\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\n" + b"a" * 100_000, "cannot be read"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000, "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{a}", "is not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n" + b"[" * 90000, "is not JSON"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n{}", "answered HTTP 502"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n[]", "answered HTTP 502"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}", "closed the connection"),
    ],
)
def test_answers_that_make_no_sense_are_explained(answer: bytes, words: str) -> None:
    def say(caller: socket.socket) -> None:
        try:
            saying(answer)(caller)
        except OSError:  # the client has heard enough
            return

    with scripted(say) as path, closing(Connection(path)) as connection, pytest.raises(FleetctlError, match=words):
        connection.request("GET", "/")


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_ANSWER_BYTES", 1024 * 1024)

    def flood(caller: socket.socket) -> None:
        read_request(caller)
        try:
            caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                caller.sendall(b"x" * 65536)
        except OSError:
            return

    with scripted(flood, flood) as path, closing(Connection(path)) as connection:
        with pytest.raises(FleetctlError, match="larger than 1 MiB"):
            connection.request("GET", "/")
        with Stream[Any](path, "/") as stream, pytest.raises(FleetctlError, match="does not end"):
            next(stream)


# ---- streams ----


def test_lines_arrive_while_the_stream_goes_on() -> None:
    with serving() as server, Stream[Any](server.path, "/v1/events?follow=1&limit=2", silence=10) as stream:
        assert next(stream) == event(3)
        assert next(stream) == event(4)
        for number in range(10, 15):
            server.control.in_loop(partial(server.control.happen, number))
            assert next(stream) == event(number)


def test_lines_are_found_however_they_are_cut() -> None:
    parts = [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b'9\r\n{"a": 1}\n\r\n',
        b'4\r\n{"a"\r\n',
        b'9\r\n: 2}\n{"a"\r\n',
        b"5\r\n: 3}\n\r\n0\r\n\r\n",
    ]
    with scripted(saying(*parts)) as path, Stream[Any](path, "/") as stream:
        assert list(stream) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_stream_that_breaks_is_not_taken_for_one_that_ended() -> None:
    with scripted(saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n")) as path, Stream[Any](path, "/") as stream:
        assert next(stream) == {}
        with pytest.raises(DaemonUnreachable):
            next(stream)
        assert list(stream) == []


def test_a_stream_that_falls_silent_is_given_up() -> None:
    with serving() as server, Stream[Any](server.path, "/v1/events?follow=1&limit=1", silence=0.2) as stream:
        next(stream)
        with pytest.raises(TimedOut):
            next(stream)


def test_a_stream_to_a_refusal_raises_at_once() -> None:
    with serving(Limits(streams=0)) as server:
        with pytest.raises(Busy, match="as many streams as it can"):
            Stream[Any](server.path, "/v1/status?watch=1")
        with pytest.raises(NotFound):
            Stream[Any](server.path, "/v1/status?watch=1&fleet=other")
        wait_until(lambda: server.connections == 0)


def test_another_thread_can_close_a_stream_that_waits() -> None:
    with serving() as server:
        stream = Stream[Any](server.path, "/v1/events?follow=1&limit=1")
        next(stream)
        thread = threading.Thread(target=list, args=(stream,))
        thread.start()
        wait_until(lambda: stream._reading)
        stream.close()
        thread.join(10)
        assert not thread.is_alive()
        wait_until(lambda: server.connections == 0)
        wait_until(lambda: not server.control.followers)


def test_a_signal_handler_can_close_a_stream_that_waits() -> None:
    with serving() as server:
        stream = Stream[Any](server.path, "/v1/events?follow=1&limit=1")
        next(stream)
        old = signal.signal(signal.SIGUSR1, lambda *_: stream.close())

        def signal_once_it_waits() -> None:
            wait_until(lambda: stream._reading)
            os.kill(os.getpid(), signal.SIGUSR1)

        try:
            killer = threading.Thread(target=signal_once_it_waits)
            killer.start()
            assert list(stream) == []
            killer.join(10)
        finally:
            signal.signal(signal.SIGUSR1, old)
        wait_until(lambda: server.connections == 0)


def test_streams_leave_no_descriptor_open() -> None:
    with serving() as server:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with Stream[Any](server.path, "/v1/events?follow=1&limit=1") as stream:
                next(stream)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


# ---- small things ----


def test_names_are_quoted() -> None:
    assert quoted("a/b ?&=%\u00e9~") == "a%2Fb%20%3F%26%3D%25%C3%A9~"
    assert quoted("\udcff") == "%FF"
    assert with_query("/p", a=None, b=True, c=0.5, d="x y", e=0, f=False) == "/p?b=1&c=0.5&d=x%20y&e=0&f=0"
    assert with_query("/p", a=None) == "/p"


def test_importing_the_client_stays_cheap() -> None:
    heavy = "asyncio socket ssl http.client urllib.parse threading email pydantic psutil rich sqlite3 dataclasses inspect fleetctl.models"
    code = f"import sys, fleetctl.client; print([name for name in {heavy.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
