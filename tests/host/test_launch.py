"""Agents with listening sockets are started by another way than plain ones; what they find, and what is told of failures, is the same."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fleetctl.errors import SpawnFailed
from fleetctl.models import Agent, FleetSpec
from tests.contracts.harness import RealWorld, new_agent
from tests.helpers import wait_for

PLAIN = FleetSpec(name="demo", command=("true",), cwd="/")
LISTENING = replace(PLAIN, sockets={"http": "127.0.0.1:0", "admin": "127.0.0.1:0"})

# What a process finds: its descriptors, its environment and where it is.
TELL = """
import json, os, resource, signal, socket
fds = {}
for name in os.listdir("/proc/self/fd"):
    try: fds[name] = os.readlink(f"/proc/self/fd/{name}")
    except OSError: pass
os.umask(umask := os.umask(0))
ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
print(json.dumps({"fds": fds, "environ": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid(), "sid": os.getsid(0), "umask": umask,
    "pgid": os.getpgid(0), "blocked": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)}), flush=True)
print("READY", flush=True)
import time; time.sleep(600)
"""


@pytest.fixture
def world(state_dir: str) -> Iterator[RealWorld]:
    world = RealWorld(state_dir)
    yield world
    world.manager.sockets.close("demo")


def told(world: RealWorld, spec: FleetSpec) -> tuple[Agent, dict[str, object]]:
    """What a process of this spec finds."""
    found: list[tuple[Agent, dict[str, object]]] = []

    async def story() -> None:
        agent = world.spawn(new_agent(), replace(spec, command=(sys.executable, "-I", "-S", "-c", TELL, *spec.command)))
        await wait_for(lambda: "READY" in world.output(agent))
        found.append((agent, json.loads(world.output(agent).splitlines()[0])))

    world.run(story())
    return found[0]


def test_an_agent_with_sockets_finds_what_another_finds_and_them(world: RealWorld) -> None:
    leaked, other = os.pipe()
    os.set_inheritable(leaked, True)  # as whoever started the daemon may have left one
    try:
        _, plain = told(world, PLAIN)
        agent, listening = told(world, LISTENING)
    finally:
        os.close(leaked)
        os.close(other)
    fds = listening["fds"]
    assert isinstance(fds, dict)
    assert agent.process is not None
    assert listening["pid"] == listening["sid"] == listening["pgid"] == agent.process.pid
    inodes = [f"socket:[{os.fstat(held.socket.fileno()).st_ino}]" for held in world.manager.sockets.held(LISTENING)]
    log, lock = world.paths.agent_log("demo", agent.id), world.paths.agent_lock(agent.id)
    own = {name: path for name, path in fds.items() if not path.startswith("/proc/")}  # what the folder was read with
    assert own == {"0": "/dev/null", "1": log, "2": log, "3": inodes[0], "4": inodes[1], "5": lock}
    for key in ("cwd", "umask", "blocked", "nofile"):
        assert listening[key] == plain[key]
    environ = listening["environ"]
    assert isinstance(environ, dict)
    assert {name: environ[name] for name in environ if name.startswith("LISTEN_")} == {
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "http:admin",
        "LISTEN_PID": str(agent.process.pid),
    }
    assert isinstance(plain["environ"], dict)
    assert set(environ) - set(plain["environ"]) <= {"LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "PWD"}


def test_the_command_is_told_its_descriptors_and_ports_and_keeps_other_braces(world: RealWorld) -> None:
    agent = new_agent()
    spec = replace(LISTENING, command=("x", "{fd} {fd:admin} {port:http} {slot} {} {other}", "{port}"))
    world.manager.sockets.listen(spec)
    ports = world.manager.sockets.ports(spec)
    words = world.manager.command(agent, spec)
    assert words == ("x", f"3 4 {ports['http']} {{slot}} {{}} {{other}}", str(ports["http"]))
    own = replace(spec, port_base=8000)
    assert world.manager.command(agent, own)[2] == "8003"
    assert world.manager.command(agent, replace(PLAIN, command=("x", "{fd} {port}"))) == ("x", "{fd} {port}")
    _, found = told(world, replace(PLAIN, port_base=8000))
    assert isinstance(found["environ"], dict)
    assert found["environ"]["PORT"] == "8003"


def test_a_shell_command_gets_them_too(world: RealWorld) -> None:
    async def story() -> None:
        agent = world.spawn(
            new_agent(), replace(LISTENING, shell=True, command=("echo {fd} $LISTEN_FDS $$ $LISTEN_PID READY; exec sleep 600",))
        )
        await wait_for(lambda: "READY" in world.output(agent))
        assert agent.process is not None
        assert world.output(agent) == f"3 2 {agent.process.pid} {agent.process.pid} READY\n"

    world.run(story())


def failure(world: RealWorld, spec: FleetSpec) -> tuple[str, bool]:
    with pytest.raises(SpawnFailed) as refused:
        world.manager.spawn(new_agent(), spec)
    return refused.value.message, refused.value.permanent


@pytest.mark.parametrize("command", ["/no/such/program", "no-such-program", "/etc/passwd", "/", "./here"])
@pytest.mark.parametrize("cwd", ["/", "/no/such/folder", "/etc/passwd"])
def test_what_cannot_be_started_says_the_same_in_both_ways(world: RealWorld, command: str, cwd: str) -> None:
    plain = failure(world, replace(PLAIN, command=(command,), cwd=cwd))
    assert failure(world, replace(LISTENING, command=(command,), cwd=cwd)) == plain


def test_a_program_of_the_path_in_the_fleets_environment_is_found(world: RealWorld, tmp_path: Path) -> None:
    (tmp_path / "greet").write_text("#!/bin/sh\necho READY; exec sleep 600\n")
    (tmp_path / "greet").chmod(0o755)

    async def story() -> None:
        spec = replace(LISTENING, command=("greet",), environment={"PATH": f"{tmp_path}:/usr/bin:/bin"})
        agent = world.spawn(new_agent(), spec)
        await wait_for(lambda: "READY" in world.output(agent))

    world.run(story())


def test_a_socket_that_cannot_be_had_is_tried_again_later(world: RealWorld) -> None:
    taken = replace(PLAIN, sockets={"http": f"unix:{__file__}"})
    message, permanent = failure(world, taken)
    assert "exists already" in message
    assert not permanent
