"""Probes against real servers, some of which answer badly, and with real commands, some of which never end."""

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fleetctl.errors import ConfigError
from fleetctl.host import procfs
from fleetctl.host.commands import MARK, end_leftovers
from fleetctl.host.paths import Paths
from fleetctl.host.probes import LocalProber, check_probes
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, FleetSpec, Probe, ReadinessSpec
from tests.helpers import wait_for, wait_until

AGENT = Agent(id="demo-00001", fleet="demo", slot=3, created_at=0.0, token="token-of-the-agent")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def prober(state_dir: str) -> LocalProber:
    paths = Paths(state_dir)
    paths.prepare()
    return LocalProber(LocalLifecycleManager(paths))


def answering(data: bytes, *, close: bool = True) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        if close:
            writer.close()

    return handle


def ask(prober: LocalProber, handle: Handler, path: str = "/", timeout: float = 5.0) -> str | None:
    async def story() -> str | None:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            spec = FleetSpec(name="demo", command=("x",), port_base=port - AGENT.slot)
            return await prober.check(Probe(http=f"http://127.0.0.1:{{port}}{path}"), AGENT, spec, timeout_seconds=timeout)

    return asyncio.run(story())


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (OK, None),
        (b"HTTP/1.0 204 No Content\r\n\r\n", None),
        (b"HTTP/1.1 302 Found\r\nLocation: http://example.com/\r\n\r\n", None),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, None),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP status 404"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "HTTP status 503"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "answered something else than HTTP"),
        (b"HTTP/1.1 2xx OK\r\n\r\n", "answered something else than HTTP"),
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20, "answered without end"),
    ],
)
def test_an_http_probe_passes_on_2xx_and_3xx_only(prober: LocalProber, answer: bytes, verdict: str | None) -> None:
    assert ask(prober, answering(answer)) == verdict


def test_an_answer_without_end_is_not_read_to_its_end(prober: LocalProber) -> None:
    assert ask(prober, answering(b"x" * (1 << 22))) is not None
    assert ask(prober, answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1000, close=False)) is None


def test_a_server_that_hangs_has_failed_in_time(prober: LocalProber) -> None:
    assert ask(prober, answering(b"", close=False), timeout=0.05) == "no answer in 0.05 s"


def test_the_request_is_what_servers_expect(prober: LocalProber) -> None:
    seen = b""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        writer.close()

    assert ask(prober, handle, "/health?deep=1") is None
    request, *headers = seen.decode().split("\r\n")
    assert request == "GET /health?deep=1 HTTP/1.1"
    assert any(header.startswith("Host: 127.0.0.1:") for header in headers)


def test_a_unix_socket_is_asked_too(prober: LocalProber, state_dir: str) -> None:
    async def story() -> None:
        async with await asyncio.start_unix_server(answering(OK), f"{state_dir}/s"):
            spec = FleetSpec(name="demo", command=("x",))
            for probe in (Probe(http=f"unix:{state_dir}/s:/health"), Probe(tcp=f"unix:{state_dir}/s")):
                assert await prober.check(probe, AGENT, spec, timeout_seconds=5.0) is None
            assert await prober.check(Probe(tcp=f"unix:{state_dir}/none"), AGENT, spec, timeout_seconds=5.0) is not None

    asyncio.run(story())


def test_a_tcp_probe_wants_a_listener(prober: LocalProber) -> None:
    async def story() -> None:
        server = await asyncio.start_server(answering(OK), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        spec = FleetSpec(name="demo", command=("x",))
        probe = Probe(tcp=f"localhost:{port}")
        assert await prober.check(probe, AGENT, spec, timeout_seconds=5.0) is None
        server.close()
        await server.wait_closed()
        assert await prober.check(probe, AGENT, spec, timeout_seconds=5.0) is not None

    asyncio.run(story())


def run_command(prober: LocalProber, *command: str, cwd: str = "/", timeout: float = 10.0) -> str | None:
    spec = FleetSpec(name="demo", command=("x",), cwd=cwd, environment={"COLOUR": "blue"}, port_base=8000)
    return asyncio.run(prober.check(Probe(exec=command), AGENT, spec, timeout_seconds=timeout))


def test_a_command_passes_with_exit_0(prober: LocalProber) -> None:
    assert run_command(prober, "true") is None
    assert run_command(prober, "sh", "-c", "exit 7") == "exit 7"
    assert run_command(prober, "sh", "-c", "kill -9 $$") == "killed by SIGKILL"
    assert run_command(prober, "/no/such/program") == "cannot run '/no/such/program': No such file or directory"


def test_a_command_runs_as_the_agent_does_and_is_none(prober: LocalProber, tmp_path: Path) -> None:
    script = (
        f"test $PWD = {tmp_path} && test $COLOUR = blue && test $FLEETCTL_AGENT_ID = {AGENT.id} && test -z $FLEETCTL_TOKEN"
        " && test $1 = 8003-3"
    )
    assert run_command(prober, "sh", "-c", script, "sh", "{port}-{slot}", cwd=str(tmp_path)) is None


def test_a_command_that_hangs_has_failed_in_time(prober: LocalProber) -> None:
    assert run_command(prober, "sleep", "600", timeout=0.1) == "no answer in 0.1 s"


def test_a_command_that_is_given_up_is_ended_with_all_it_started(prober: LocalProber, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    file.touch()
    hidden = f"setsid sh -c 'echo $$ >> {file}; sleep 600' & sleep 600 & echo $! $$ >> {file}; wait"
    spec = FleetSpec(name="demo", command=("x",), cwd="/")

    async def story() -> None:
        probe = asyncio.create_task(prober.check(Probe(exec=("sh", "-c", hidden)), AGENT, spec, timeout_seconds=60.0))
        await wait_for(lambda: len(file.read_text().split()) == 3)
        probe.cancel()
        await asyncio.wait([probe])

    asyncio.run(story())
    pids = [int(pid) for pid in file.read_text().split()]
    wait_until(lambda: not any((stat := procfs.stat(pid)) and stat.alive for pid in pids))
    assert (procfs.children() or set()).isdisjoint(pids)


def test_what_a_command_leaves_in_its_group_ends_with_it(prober: LocalProber, tmp_path: Path) -> None:
    assert run_command(prober, "sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid") is None
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not ((stat := procfs.stat(pid)) and stat.alive))


def test_a_running_probe_is_no_remainder_of_an_agent_and_is_not_reaped_by_others(state_dir: str) -> None:
    """In a process of its own, because it takes the orphans of its descendants."""
    story = f"""
import asyncio
from fleetctl.host.commands import MARK, end_leftovers
from fleetctl.host.paths import Paths
from fleetctl.host.probes import LocalProber
from fleetctl.host.process import LocalLifecycleManager, become_subreaper
from fleetctl.models import Agent, FleetSpec, Probe
from dataclasses import replace
from tests.helpers import wait_for
from tests.host.test_probes import AGENT

async def main():
    become_subreaper()
    paths = Paths({state_dir!r})
    paths.prepare()
    manager = LocalLifecycleManager(paths, owns_all_children=True)
    asyncio.get_running_loop().add_signal_handler(17, manager.reap_orphans)
    manager.reap_orphans()
    spec = FleetSpec(name="demo", command=("true",), cwd="/")
    command = ("sh", "-c", "until test -e {state_dir}/go; do sleep 0.01; done; exit 9")
    probe = asyncio.create_task(LocalProber(manager).check(Probe(exec=command), AGENT, spec, timeout_seconds=60.0))
    await asyncio.sleep(0)
    agent = replace(AGENT, process=manager.spawn(AGENT, spec))
    exits = []
    manager.watch(agent.process, exits.append)
    await wait_for(lambda: exits)
    manager.finder.trees = None  # a look at every process is not needed while the probe runs
    assert manager.survivors([agent]) == {{agent.id: ()}}
    assert not probe.done()
    open("{state_dir}/go", "w").close()
    manager.release(agent.process)
    assert await probe == "exit 9"

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", story], check=True, timeout=30, cwd=Path(__file__).parents[2])


def test_what_a_command_leaves_outside_its_group_ends_with_it(state_dir: str) -> None:
    """In a process of its own, because it takes the orphans of its descendants. Its agent's own orphan is left alone."""
    story = f"""
import asyncio
import secrets
from fleetctl.host import procfs
from fleetctl.host.paths import Paths
from fleetctl.host.probes import LocalProber
from fleetctl.host.process import LocalLifecycleManager, become_subreaper
from fleetctl.models import FleetSpec, Probe
from dataclasses import replace
from tests.helpers import wait_for
from tests.host.test_probes import AGENT

def left(name):
    pid = int(open("{state_dir}/" + name).read())
    return (stat := procfs.stat(pid)) is not None and stat.alive

async def main():
    become_subreaper()
    paths = Paths({state_dir!r})
    paths.prepare()
    manager = LocalLifecycleManager(paths, owns_all_children=True)
    daemonize = "setsid sh -c 'echo $$ > {state_dir}/NAME; setsid sleep 600 & echo $! > {state_dir}/NAME.below; exec sleep 600' & "
    wait = "until test -s {state_dir}/NAME.below; do sleep 0.01; done"
    spec = FleetSpec(name="demo", command=("sh", "-c", (daemonize + wait + "; exec sleep 600").replace("NAME", "agent")), cwd="/")
    agent = replace(AGENT, token=secrets.token_hex(8))
    agent = replace(agent, process=manager.spawn(agent, spec))
    try:
        probe = Probe(exec=("sh", "-c", (daemonize + wait).replace("NAME", "probe")))
        assert await LocalProber(manager).check(probe, agent, spec, timeout_seconds=60.0) is None
        await wait_for(lambda: not left("probe") and not left("probe.below"))
        await wait_for(lambda: len(manager.survivors([agent])[agent.id]) == 3)
        assert left("agent") and left("agent.below")
    finally:
        manager.kill([agent])

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", story], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_what_a_killed_daemon_had_running_is_ended_by_the_next(state_dir: str) -> None:
    environ = {"PATH": os.environ["PATH"], MARK: secrets.token_hex(8)}
    ours = subprocess.Popen(["sleep", "600"], env={**environ, "FLEETCTL_STATE_DIR": state_dir}, start_new_session=True)
    other = subprocess.Popen(["sleep", "600"], env={**environ, "FLEETCTL_STATE_DIR": f"{state_dir}2"}, start_new_session=True)
    try:
        wait_until(lambda: all(MARK in procfs.environ(child.pid) for child in (ours, other)))
        end_leftovers(state_dir)
        assert ours.wait(timeout=5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]"])
def test_other_machines_are_never_asked(prober: LocalProber, host: str) -> None:
    spec = FleetSpec(name="demo", command=("x",), readiness=ReadinessSpec(http=f"http://{host}:80/"))
    with pytest.raises(ConfigError, match=r"readiness\.http: .* is no address of this machine"):
        check_probes(spec)
    answer = asyncio.run(prober.check(spec.readiness.probe, AGENT, spec, timeout_seconds=5.0))
    assert answer is not None
    assert "is no address of this machine" in answer
