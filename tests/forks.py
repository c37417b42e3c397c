"""`fleetctl` in processes of its own, without the third of a second of CPU that Python needs to import it: forked from one that has.

Each is as it would be had it been executed: its own arguments, environment, folder and streams, a session where asked, and the way a Python
program ends. Only its command line in /proc is not its own. Tests of what is imported, and all daemons that commands start, do without.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import fleetctl.cli

_MOST_BYTES = 1 << 20


class Forked:
    """What tests need of a `subprocess.Popen`, for a child of the process that forks."""

    def __init__(self, words: Sequence[str], report: int) -> None:
        self.args = list(words)
        self.returncode: int | None = None
        self._report = os.fdopen(report, "rb", buffering=0)
        self.pid = int(self._report.readline())

    def poll(self) -> int | None:
        return self._reported(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._reported(None if timeout is None else timeout * 1000)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reported(self, milliseconds: float | None) -> int | None:
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._report)
            if waiting.poll(milliseconds):
                self.returncode = os.waitstatus_to_exitcode(int(self._report.readline()))
                self._report.close()
        return self.returncode


def start(
    words: Sequence[str],
    *,
    cwd: str,
    environ: Mapping[str, str],
    streams: tuple[int, int, int],
    ready: int | None = None,
    session: bool,
    times: Mapping[str, float] | None = None,
) -> Forked:
    """Start `fleetctl` with these words and streams.

    `ready`: a descriptor that it gets too, and finds in FLEETCTL_READY_FD. `times`: constants of fleetctl's, with their modules, that
    are other than they are, so that no test waits for what comes every five seconds.
    """
    reader, writer = os.pipe()
    asked = {"words": list(words), "cwd": cwd, "environ": dict(environ), "session": session, "times": dict(times or {})}
    socket.send_fds(_parent(), [json.dumps(asked).encode()], [writer, *streams, *([] if ready is None else [ready])])
    os.close(writer)
    return Forked(words, reader)


def run(
    words: Sequence[str], *, cwd: str, environ: Mapping[str, str], stdin: str = "", timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run `fleetctl` with these words to its end."""
    files = [os.fdopen(os.memfd_create(name), "w+", encoding="utf-8") for name in ("stdin", "stdout", "stderr")]
    files[0].write(stdin)
    files[0].seek(0)
    streams = (files[0].fileno(), files[1].fileno(), files[2].fileno())
    process = start(words, cwd=cwd, environ=environ, streams=streams, session=False)
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    out, err = (_read(file) for file in files[1:])
    files[0].close()
    return subprocess.CompletedProcess(["fleetctl", *words], status, out, err)


def _read(file: io.TextIOWrapper) -> str:
    with file:
        file.seek(0)
        return file.read()


@cache
def _parent() -> socket.socket:
    """The connection to the process that forks; it ends when we do."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with theirs:
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
    return ours


# -- the process that forks


def serve(connection: socket.socket) -> None:
    """Fork for each request, and report how each child ends; returns in every child, which is then what was asked for."""
    children: dict[int, tuple[int, int]] = {}  # pidfd -> pid, and where to report
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    while True:
        for descriptor, _ in waiting.poll():
            if descriptor in children:
                waiting.unregister(descriptor)
                pid, report = children.pop(descriptor)
                _report(report, os.waitpid(pid, 0)[1])
                os.close(report)
                os.close(descriptor)
                continue
            message, (*received,), _, _ = socket.recv_fds(connection, _MOST_BYTES, 5)
            if not message:
                os._exit(0)
            report, *given = received
            if (pid := os.fork()) == 0:
                for held in (connection.detach(), report, *children, *(other for _, other in children.values())):
                    os.close(held)
                _become(json.loads(message), given)
                return
            _report(report, pid)
            for one in given:
                os.close(one)
            child = os.pidfd_open(pid)
            children[child] = pid, report
            waiting.register(child, select.POLLIN)


def _report(to: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(to, b"%d\n" % number)


def _become(asked: dict[str, Any], given: list[int]) -> None:  # Any: JSON values
    if asked["session"]:
        os.setsid()
    for number, stream in enumerate(given[:3]):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environ"])
    for ready in given[3:]:
        os.set_inheritable(ready, True)
        os.environ["FLEETCTL_READY_FD"] = str(ready)
    for name, seconds in asked["times"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(sys.modules[module], constant)
        setattr(sys.modules[module], constant, seconds)
    os.chdir(asked["cwd"])
    sys.path[0] = os.getcwd()
    sys.argv[1:] = asked["words"]
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    from fleetctl.__main__ import main

    for module in pkgutil.iter_modules(fleetctl.cli.__path__, "fleetctl.cli."):
        importlib.import_module(module.name)
    importlib.import_module("fleetctl.daemon.main")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of one who ends the tests: it is told by the connection's end
    gc.freeze()  # else each child's first collection would touch, and so copy, all of it
    serve(socket.socket(fileno=int(sys.argv[1])))
    main()
