"""FleetManager inside real programs, with real agents: what it leaves alone, what it leaves behind, and what the next program finds."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetctl import AgentConfig, FleetManager, LocalLifecycleManager, LocalResourceManager, LocalStateManager
from fleetctl.errors import ConfigError, DaemonRunning, KeptByProgram, StateDirectoryError
from fleetctl.host import procfs, sandbox
from fleetctl.host.process import _is_subreaper
from tests.helpers import wait_for
from tests.real.conftest import place
from tests.real.harness import ROOT, Place
from tests.servers import lacks

__all__ = ["place"]


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Others on this machine have private directories of programs too. Its path is short, for the sockets in it."""
    tmp_path_factory.getbasetemp()  # made when it is first asked for, and that is to be elsewhere
    folder = tempfile.mkdtemp(prefix="fl-")
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield
    shutil.rmtree(folder)


QUICK: dict[str, Any] = {"readiness": {"settle_seconds": 0.05}, "warm_pool": {"enabled": False}, "graceful_drain": {"timeout_seconds": 5}}
SLEEPER = AgentConfig(command=["sleep", "600"])


def run(story: Callable[[FleetManager], Awaitable[None]], **given: Any) -> None:
    async def told() -> None:
        async with FleetManager(**{"config": QUICK, **given}) as fleet:
            await story(fleet)

    asyncio.run(told())


def alive(pid: int | None) -> bool:
    found = procfs.stat(pid or 0)
    return found is not None and found.alive


# -- beside the program's own work


def test_the_programs_own_children_keep_their_exit_statuses() -> None:
    """Embedded it may reap nobody but agents: waitid for any child would take the status from whoever waits for it."""

    async def children() -> list[int]:
        processes = [await asyncio.create_subprocess_exec("/bin/sh", "-c", f"exit {number}") for number in range(40)]
        return [await process.wait() for process in processes]

    async def story(fleet: FleetManager) -> None:
        old = subprocess.Popen(["/bin/sh", "-c", "exit 41"])  # waited for much later
        forked = os.fork()
        if not forked:
            os._exit(42)
        statuses, *_ = await asyncio.gather(children(), churn(fleet))
        assert statuses == list(range(40))
        assert old.wait() == 41
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 42

    async def churn(fleet: FleetManager) -> None:
        # Each leaves an orphan behind, which is not ours to reap either.
        leaves_one = AgentConfig(command=["/bin/sh", "-c", "(sleep 600 &) & exec sleep 600"])
        for size in (3, 1, 3, 0):
            await (fleet.scale_up(size, leaves_one) if size == 3 else fleet.scale_down(size))

    run(story)


def test_nothing_of_the_program_is_changed() -> None:
    def seen() -> list[object]:
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        umask = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask"))
        return [handlers, umask, sys.getswitchinterval(), _is_subreaper(), os.getcwd(), dict(os.environ)]

    async def story() -> None:
        before = seen()
        async with FleetManager(config=QUICK) as fleet:
            await fleet.scale_up(1, SLEEPER)
            assert seen() == before
        assert seen() == before

    asyncio.run(story())


def test_agents_have_the_programs_umask_and_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def story(fleet: FleetManager) -> None:
        os.chdir("/")  # what counts is where it was made
        await fleet.scale_up(1, AgentConfig(command=["/bin/sh", "-c", "umask > told.new && mv told.new told; exec sleep 600"]))
        await wait_for(lambda: (tmp_path / "told").exists())
        assert (tmp_path / "told").read_text() == "0027\n"

    old = os.umask(0o027)
    try:
        run(story)
    finally:
        os.umask(old)


def test_tools_and_identity_reach_the_agent(tmp_path: Path) -> None:
    tells = """
import json, os, sys, time
with open(os.environ["FLEETCTL_CLAIM"]) as claim, open(sys.argv[1] + os.environ["FLEETCTL_SLOT"], "w") as told:
    told.write(json.dumps([dict(os.environ), os.getcwd(), json.load(claim)]))
time.sleep(600)
"""
    template = AgentConfig(
        command=[sys.executable, "-c", tells, str(tmp_path / "told")],
        environment={"ENV": "production"},
        tools=["Read", "Bash"],
        trust_level="trusted",
        cwd=str(tmp_path),
    )

    async def story(fleet: FleetManager) -> None:
        told = []
        for slot, result in enumerate(await fleet.scale_up(2, template)):
            path = tmp_path / f"told{slot}"
            await wait_for(lambda path=path: path.exists() and path.read_text().endswith("]"))  # type: ignore[misc]  # the default binds it
            environ, folder, claim = json.loads(path.read_text())
            assert (environ["FLEETCTL_AGENT_ID"], environ["FLEETCTL_FLEET"]) == (result.agent_id, "crew")
            assert (environ["ENV"], environ["FLEETCTL_TRUST"], folder) == ("production", "trusted", str(tmp_path))
            assert os.path.isdir(environ["STATE_DIRECTORY"])
            assert (claim["agent_id"], claim["tools"], claim["slot"]) == (result.agent_id, ["Read", "Bash"], slot)
            told.append(environ["FLEETCTL_AGENT_ID"])
        assert len(set(told)) == 2

    run(story, name="crew")


def test_agents_that_are_not_trusted_are_in_a_sandbox_and_leave_nothing() -> None:
    if trouble := sandbox.rehearse():
        lacks(f"no sandbox can be made here: {trouble}")

    async def story(fleet: FleetManager) -> None:
        (result,) = await fleet.scale_up(1, AgentConfig(command=["sleep", "600"], trust_level="untrusted"))
        assert os.readlink(f"/proc/{result.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
        keeper = sandbox.keeper_of(result.pid or 0)
        assert alive(keeper)
        await fleet.scale_down(0)
        assert not alive(result.pid)
        assert not alive(keeper)

    run(story, config={**QUICK, "sandbox": {"network": True}, "min_replicas": 0})


def test_what_agents_say_of_themselves_is_heard() -> None:
    says = """
import os, socket, time
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1\\nX_FLEETCTL_PENDING=3", os.environ["NOTIFY_SOCKET"])
time.sleep(600)
"""

    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(2, AgentConfig(command=[sys.executable, "-c", says]))
        assert (await fleet.get_fleet_metrics()).pending_requests == 6

    run(story, config={**QUICK, "readiness": {"notify": True}})


def test_a_socket_of_the_fleet_is_held_by_the_program_and_let_go_of_with_it() -> None:
    serves = """
import os, socket
listener = socket.socket(fileno=3)
while True:
    with listener.accept()[0] as caller:
        caller.sendall(os.environ["FLEETCTL_AGENT_ID"].encode())
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def answer() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        said = (await reader.read()).decode()
        writer.close()
        return said

    async def story(fleet: FleetManager) -> None:
        old = {result.agent_id for result in await fleet.scale_up(1, AgentConfig(command=[sys.executable, "-c", serves]))}
        assert await answer() in old
        new = {result.agent_id for result in await fleet.scale_up(2)}
        assert {await answer() for _ in range(3)} <= old | new
        await fleet.scale_down(0)
        waiting = asyncio.create_task(answer())  # nobody is there, and the connection is not refused
        while (await fleet.get_fleet_metrics()).pending_requests != 1:
            await asyncio.sleep(0.005)
        (last,) = await fleet.scale_up(1)
        assert await waiting == last.agent_id

    run(story, config={**QUICK, "sockets": {"http": f"127.0.0.1:{port}"}})
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_program_that_is_not_there_is_told_before_anything_is_started(place: Place) -> None:
    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1, SLEEPER)
        before = place.leaders()
        for wrong in (AgentConfig(command=["no-such-program"]), AgentConfig(command=["sleep", "1"], cwd="/no/such/folder")):
            with pytest.raises(ConfigError, match=r"no-such-program|/no/such/folder"):
                await fleet.scale_up(2, wrong)
        assert place.leaders() == before
        assert len(await fleet.scale_up(2)) == 1  # of the kind it was

    run(story, state_dir=place.root)


def test_load_and_memory_of_real_agents_are_measured() -> None:
    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1, AgentConfig(command=["/bin/sh", "-c", "while :; do :; done"], resource_limits={"memory_limit_mb": 64}))
        found = await fleet.get_fleet_metrics()
        assert found.avg_cpu_utilization > 20.0
        assert 0.0 < found.avg_memory_utilization < 100.0

    run(story)


def test_the_three_managers_can_be_given_by_folder(place: Place) -> None:
    async def story() -> None:
        fleet, resources = FleetManager(config=QUICK), LocalResourceManager()
        state = LocalStateManager(place.root)
        await fleet.initialize(LocalLifecycleManager(place.root), state, resources)
        assert len(await fleet.scale_up(1, SLEEPER)) == 1
        assert len(place.leaders()) == 1
        await fleet.cleanup()
        assert not place.processes()
        assert len(await state.last("history", "fleet", 10)) == 2  # they are whose they were, and still open
        await state.close()
        resources.close()

    asyncio.run(story())


# -- what is left


def folders_of_ours() -> set[str]:
    """Private directories of programs."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("fleetctl-")}


def test_cleanup_leaves_nothing_behind() -> None:
    pids: list[int | None] = []
    before, descriptors = folders_of_ours(), len(os.listdir("/proc/self/fd"))

    async def story(fleet: FleetManager) -> None:
        pids.extend(result.pid for result in await fleet.scale_up(2, AgentConfig(command=["/bin/sh", "-c", "sleep 600 & sleep 600"])))
        assert len(folders_of_ours() - before) == 1

    run(story, config={**QUICK, "warm_pool": {"size": 1}})
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    assert folders_of_ours() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_directory_that_is_given_is_kept_with_its_history(place: Place) -> None:
    async def first(fleet: FleetManager) -> None:
        await fleet.scale_up(2, SLEEPER)

    async def second(fleet: FleetManager) -> None:
        assert fleet.get_health_status()["current_replicas"] == 0  # the first one cleaned up
        assert [(one.current_replicas, one.target_replicas) for one in await fleet.get_scaling_history()] == [(0, 2), (2, 0)]

    run(first, state_dir=place.root)
    assert not place.processes()
    run(second, state_dir=place.root)


def test_what_an_agent_keeps_is_saved_before_it_is_drained(place: Place) -> None:
    async def story(fleet: FleetManager) -> None:
        keeps = 'echo 42 > "$STATE_DIRECTORY/count"; exec sleep 600'
        (one,) = await fleet.scale_up(1, AgentConfig(command=["/bin/sh", "-c", keeps]))
        await wait_for(lambda: list(Path(place.root).glob("agents/*/count")))
        assert await fleet.scale_down(0) == [one.agent_id]
        (saved,) = Path(place.root).glob(f"checkpoints/fleet/{one.agent_id}/*")
        assert json.loads((saved / "checkpoint.json").read_text())["agent"] == one.agent_id
        (kept,) = saved.rglob("count")
        assert kept.read_text() == "42\n"

    run(story, state_dir=place.root)


def test_a_directory_has_one_keeper(place: Place) -> None:
    async def story(fleet: FleetManager) -> None:
        await fleet.scale_up(1, SLEEPER)
        other = FleetManager(config=QUICK, state_dir=place.root)
        with pytest.raises(KeptByProgram, match=rf"a program \(pid {os.getpid()}\) keeps the fleets of {place.root}"):
            await other.initialize()
        assert other.get_health_status()["problems"] == ["the FleetManager is not initialized"]
        up = await asyncio.to_thread(place.run, "up", "--name", "other", "--", "sleep", "600", check=False)
        assert up.returncode == 1
        assert f"a program (pid {os.getpid()}) keeps the fleets" in up.stderr
        doctor = await asyncio.to_thread(place.run, "doctor")
        assert f"a program (pid {os.getpid()}) keeps the fleets here" in doctor.stdout
        assert len(place.leaders()) == 1

    run(story, state_dir=place.root)
    place.start()  # and a daemon may have it afterwards
    with pytest.raises(DaemonRunning):
        asyncio.run(FleetManager(config=QUICK, state_dir=place.root).initialize())


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def story() -> None:
        with pytest.raises(StateDirectoryError, match="file"):
            await FleetManager(state_dir=tmp_path / "file").initialize()

    asyncio.run(story())


def test_a_directory_that_is_removed_is_noticed_and_cleanup_ends_the_agents(place: Place, tmp_path: Path) -> None:
    pids: list[int | None] = []

    async def story(fleet: FleetManager) -> None:
        pids.extend(result.pid for result in await fleet.scale_up(1, SLEEPER))
        os.rename(place.root, tmp_path / "moved")
        await wait_for(lambda: any("removed or replaced" in problem for problem in fleet.get_health_status()["problems"]))

    run(story, state_dir=place.root)
    os.rename(tmp_path / "moved", place.root)
    assert len(pids) == 1
    assert not any(alive(pid) for pid in pids)


PROGRAM = """
import asyncio, json, os, signal, sys
from fleetctl import AgentConfig, FleetManager
config = {"readiness": {"settle_seconds": 0.05}, "warm_pool": {"size": 1}}
async def main():
    fleet = FleetManager(config=config, state_dir=sys.argv[1] if len(sys.argv) > 1 else None)
    await fleet.initialize()
    await fleet.scale_up(2, AgentConfig(command=["sleep", "600"], tools=["Read"]))
    while fleet.get_warm_pool_stats()["current_size"] < 1:
        await asyncio.sleep(0.01)
    END
asyncio.run(main())
"""


def test_a_program_killed_with_9_leaves_agents_that_the_next_one_adopts(place: Place) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM.replace("END", "os.kill(os.getpid(), signal.SIGKILL)"), place.root], check=False)
    assert ended.returncode == -signal.SIGKILL
    before = place.leaders()
    assert len(before) == 3

    async def story(fleet: FleetManager) -> None:
        health = fleet.get_health_status()
        assert (health["current_replicas"], health["active_instances"], health["warm_pool"]["current_size"]) == (2, 2, 1)
        assert place.leaders() == before
        result = await fleet.acquire_from_warm_pool(AgentConfig(command=["sleep", "600"], tools=["Read"], cwd=os.getcwd()))
        assert result is not None
        assert before[result.agent_id] == result.pid
        assert len(await fleet.scale_down(1)) == 2

    run(story, state_dir=place.root, config={**QUICK, "warm_pool": {"size": 1}})
    assert not place.processes()


@pytest.mark.parametrize("end", ["return", "sys.exit(3)", "raise RuntimeError('no cleanup')"])
def test_a_program_that_ends_without_cleanup_leaves_nothing_either(end: str) -> None:
    before = folders_of_ours()
    told = "print(json.dumps([*(agent.process.pid for agent in fleet._home.fleet.agents)]), flush=True); "
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("END", told + end)], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    pids = json.loads(done.stdout)
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)
    assert folders_of_ours() == before


def test_what_a_killed_program_left_in_a_directory_of_its_own_is_cleared_away_by_the_next() -> None:
    before = folders_of_ours()
    told = (
        "print(json.dumps([*(agent.process.pid for agent in fleet._home.fleet.agents)]), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", PROGRAM.replace("END", told)], capture_output=True, text=True, timeout=60, check=False)
    pids = json.loads(done.stdout)
    (left,) = folders_of_ours() - before
    assert all(alive(pid) for pid in pids)

    async def story(fleet: FleetManager) -> None:
        (mine,) = folders_of_ours() - before - {left}
        await wait_for(lambda: left not in folders_of_ours())
        assert not any(alive(pid) for pid in pids)
        assert mine in folders_of_ours()
        assert len(await fleet.scale_up(1, SLEEPER)) == 1

    run(story)


# -- importing


def test_importing_the_package_costs_nothing_and_its_names_are_there() -> None:
    code = """
import sys, fleetctl
loaded = {name for name in sys.modules if name.startswith("fleetctl.")} | ({"asyncio", "pydantic", "typing"} & sys.modules.keys())
assert not loaded, loaded
from fleetctl import *
names = {name: getattr(fleetctl, name) for name in fleetctl.__all__}
assert FleetManager is names["FleetManager"] and FleetManager.__module__ == "fleetctl.manager"
assert not hasattr(fleetctl, "NoSuchName")
"""
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}" + code], check=True)
