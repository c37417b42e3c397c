"""Whose process is it: told for every way in which a process can belong to an agent, and for strangers."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fleetctl.host import procfs
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent
from tests.contracts.harness import Program, RealWorld
from tests.helpers import wait_for

# Each says its pid. One in the leader's session; one in its own; one that is nobody's child; one that shows nothing of its agent.
CHILDREN = """
import os, subprocess, sys, time
def pid(name, number):
    print(name, number, flush=True)
pid("session", subprocess.Popen(["/bin/sleep", "600"]).pid)
pid("child", subprocess.Popen(["/bin/sleep", "600"], env={}, start_new_session=True).pid)
code = "import subprocess; print('orphan', subprocess.Popen(['/bin/sleep', '600'], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", code])
pid("copied", subprocess.Popen(["/bin/sleep", "600"], env={**os.environ, "FLEETCTL_TOKEN": "SIBLING"}, start_new_session=True).pid)
print("READY", flush=True)
time.sleep(600)
"""

CHILD = """
import subprocess, time
print("child", subprocess.Popen(["/bin/sleep", "600"], env={}, start_new_session=True).pid)
print("READY", flush=True)
time.sleep(600)
"""


@pytest.fixture
def world(state_dir: str) -> RealWorld:
    return RealWorld(state_dir)


def nobody() -> Sequence[Agent]:
    raise AssertionError("it was to be known without asking")


def pids(world: RealWorld, agent: Agent) -> dict[str, int]:
    lines = (line.split() for line in world.output(agent).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2}


def pid_of(agent: Agent) -> int:
    assert agent.process is not None
    return agent.process.pid


@pytest.mark.parametrize("adopted", [False, True])
def test_every_process_of_a_tree_is_its_agents(world: RealWorld, adopted: bool) -> None:
    async def story() -> None:
        sibling = await world.start(Program.SLEEPS)
        agent = await world.start_command(sys.executable, "-c", CHILDREN.replace("SIBLING", sibling.token))
        manager = LocalLifecycleManager(world.paths) if adopted else world.manager
        both = (sibling, agent)
        assert manager.owner(pid_of(agent), lambda: both) == agent.id
        assert manager.owner(pid_of(sibling), lambda: both) == sibling.id
        found = pids(world, agent)
        assert {name: manager.owner(pid, lambda: both) for name, pid in found.items()} == dict.fromkeys(
            ("session", "child", "orphan", "copied"), agent.id
        )
        assert all(manager.owner(pid, nobody) == agent.id for pid in found.values())  # asked a second time

    world.run(story())


def test_a_process_that_was_once_seen_in_a_tree_stays_there(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start_command(sys.executable, "-c", CHILD)
        pid = pids(world, agent)["child"]
        seen = procfs.stat(pid)
        assert seen is not None
        world.manager.remember({agent.id: frozenset({(pid, seen.start_ticks)})})
        world.manager.watch(agent.process, lambda exit: None)  # type: ignore[arg-type]  # it has one
        os.kill(pid_of(agent), signal.SIGKILL)
        await wait_for(lambda: (found := procfs.stat(pid)) is not None and found.ppid != pid_of(agent))
        assert world.manager.owner(pid, lambda: [agent]) == agent.id
        assert LocalLifecycleManager(world.paths).owner(pid, lambda: [agent]) is None  # by nothing else

    world.run(story())


def test_strangers_are_nobodys(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        environ = {"FLEETCTL_STATE_DIR": world.paths.root, "FLEETCTL_AGENT_ID": agent.id, "FLEETCTL_TOKEN": "made up"}
        with subprocess.Popen(["/bin/sleep", "600"], env=environ, start_new_session=True) as stranger:
            found = [world.manager.owner(pid, lambda: [agent]) for pid in (stranger.pid, os.getpid(), os.getppid(), 1, 0, 2**22)]
            stranger.kill()
        assert found == [None] * 6
        assert world.manager.owner(stranger.pid, lambda: [agent]) is None

    world.run(story())


def test_what_is_above_the_daemon_is_not_below_its_agents(world: RealWorld) -> None:
    """An agent may start the daemon; that does not make all other agents, and the daemon's own children, its children."""

    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        above = procfs.stat(os.getppid())
        assert above is not None
        manager = LocalLifecycleManager(world.paths)  # a second one, which ends nobody: what it is told here must not be killed
        manager.remember({agent.id: frozenset({(above.pid, above.start_ticks)})})
        child = await asyncio.create_subprocess_exec("/bin/sleep", "600", start_new_session=True)
        try:
            assert manager.owner(child.pid, lambda: [agent]) is None
            assert manager.owner(above.pid, lambda: [agent]) == agent.id
        finally:
            child.kill()
            await child.wait()

    world.run(story())


def test_a_pid_is_not_taken_for_the_process_that_had_it_before(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        assert world.manager.owner(pid_of(agent), lambda: [agent]) == agent.id
        real = procfs.stat

        def later(pid: int) -> procfs.Stat | None:
            found = real(pid)
            return found._replace(start_ticks=found.start_ticks + 1, ppid=1) if found and pid == pid_of(agent) else found

        with monkeypatch.context() as patched:
            patched.setattr(procfs, "stat", later)
            patched.setattr(procfs, "environ", lambda pid: {})
            assert world.manager.owner(pid_of(agent), lambda: [agent]) is None

    world.run(story())


def test_the_folder_of_the_socket_is_private(world: RealWorld) -> None:
    assert Path(world.paths.notify).parent.stat().st_mode & 0o777 == 0o700
