"""Control groups: of both versions on paper, and those of this machine where it lets us make some."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fleetctl.errors import ConfigError, SpawnFailed
from fleetctl.host.limits import LocalLimits
from fleetctl.models import Agent, Enforce, Exit, FleetSpec, ResourceLimitsSpec
from tests.contracts.harness import RealWorld, new_agent
from tests.helpers import wait_for

ALL = ResourceLimitsSpec(cpu_limit=0.5, memory_limit_mb=64, pids_limit=20)
FIRST = {"cpu": "cpu.cfs_quota_us cpu.cfs_period_us", "memory": "memory.limit_in_bytes memory.memsw.limit_in_bytes", "pids": "pids.max"}
SECOND = "cpu.max memory.max memory.swap.max memory.oom.group pids.max"


class Machine:
    """Hierarchies as files. The kernel makes the files in a new group; here `make` does, before it is written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts: list[str] = []
        self.own: list[str] = []

    def first(self, name: str, *, own: str = "/", root: str = "/") -> Path:
        point = self.folder / name
        (point / own.removeprefix(root).strip("/")).mkdir(parents=True)
        self.mounts.append(f"31 23 0:28 {root} {point} rw,relatime - cgroup cgroup rw,{name}")
        self.own.append(f"1:{name}:{own}")
        return point / own.removeprefix(root).strip("/")

    def second(self, controllers: str, *, own: str = "/a.service", procs: str = "") -> Path:
        point = self.folder / "unified"
        base = point / own.strip("/")
        base.mkdir(parents=True)
        for name, text in (("cgroup.controllers", controllers), ("cgroup.subtree_control", ""), ("cgroup.procs", procs)):
            (base / name).write_text(text)
        self.mounts.append(f"41 31 0:38 / {point} rw - cgroup2 cgroup2 rw")
        self.own.append(f"0::{own}")
        return base

    def limits(self) -> LocalLimits:
        (self.folder / "mounts").write_text("\n".join(self.mounts))
        (self.folder / "own").write_text("\n".join(self.own))
        return LocalLimits("/state", mounts=str(self.folder / "mounts"), own=str(self.folder / "own"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def group(base: Path, files: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Have the files appear in groups that are made below `base`; reads one of the agent's."""
    make = os.makedirs

    def made(path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        make(path, mode, exist_ok)
        if str(path).startswith(str(base)):
            for name in [*files.split(), "cgroup.procs", "cgroup.subtree_control"]:
                Path(path, name).touch()

    monkeypatch.setattr(os, "makedirs", made)
    return lambda name: next(base.glob(f"fleetctl-*/web-00001/{name}")).read_text()


def test_groups_of_version_1_are_one_for_each_controller(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = {name: machine.first(name, own="/docker/x", root="/docker") for name in FIRST}
    limits = machine.limits()
    assert limits.mechanisms(ALL) == dict.fromkeys(("cpu_limit", "memory_limit_mb", "pids_limit"), "cgroup v1")
    read = {name: group(bases[name], " ".join(FIRST.values()), monkeypatch) for name in FIRST}
    joins = limits.prepare("web-00001", ALL)
    assert [line.split("/fleetctl-")[0] for line in joins.splitlines()] == [f"echo 0 > {bases[name]}" for name in FIRST]
    assert read["cpu"]("cpu.cfs_quota_us") == "50000"
    assert read["memory"]("memory.limit_in_bytes") == read["memory"]("memory.memsw.limit_in_bytes") == str(64 << 20)
    assert read["pids"]("pids.max") == "20"


def test_the_group_of_version_2_is_one_for_all(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    base = machine.second("cpuset cpu io memory pids")
    limits = machine.limits()
    assert limits.mechanisms(ALL) == dict.fromkeys(("cpu_limit", "memory_limit_mb", "pids_limit"), "cgroup v2")
    read = group(base, SECOND, monkeypatch)
    joins = limits.prepare("web-00001", replace(ALL, pids_limit=None))
    assert len(joins.splitlines()) == 1
    assert [read(name) for name in SECOND.split()] == ["50000 100000", str(64 << 20), "0", "1", "max"]


def test_version_2_is_taken_before_version_1_for_what_it_controls(machine: Machine) -> None:
    machine.first("memory")
    machine.second("memory")
    machine.first("cpu")
    assert machine.limits().mechanisms(ALL) == {"cpu_limit": "cgroup v1", "memory_limit_mb": "cgroup v2", "pids_limit": "watch"}


def test_where_no_group_may_be_made_memory_is_watched_and_cpu_is_not_pretended(machine: Machine) -> None:
    limits = machine.limits()
    assert limits.mechanisms(ALL) == {"cpu_limit": "", "memory_limit_mb": "watch", "pids_limit": "watch"}
    assert limits.prepare("web-00001", ALL) == ""
    assert limits.notes(ALL) == ["cpu_limit = 0.5 is not enforced here: no such control group"]
    limits.check(ALL)
    with pytest.raises(ConfigError, match=r"resource_limits\.cpu_limit = 0\.5 cannot be held here"):
        limits.check(replace(ALL, enforce=Enforce.REQUIRE))
    off = replace(ALL, enforce=Enforce.OFF)
    assert (limits.mechanisms(off), limits.notes(off)) == ({}, [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_group_that_is_not_ours_says_what_would_be(machine: Machine) -> None:
    machine.second("cpu memory pids").chmod(0o555)
    limits = machine.limits()
    assert not limits.controllers
    assert "Delegate=yes" in limits.why_not("cpu_limit")


def test_more_files_than_possible_are_refused(machine: Machine) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = machine.limits()
    assert limits.prepare("web-00001", ResourceLimitsSpec(nofile=64)) == "ulimit -n 64 || exit 126\n"
    if "".join(limits.mechanisms(ResourceLimitsSpec(nofile=hard + 1)).values()):
        pytest.skip("this user may raise its limits")
    with pytest.raises(ConfigError, match="may have at most"):
        limits.check(ResourceLimitsSpec(nofile=hard + 1))


@pytest.mark.parametrize(
    ("wanted", "soft", "privileged", "possible"),
    [(0, 0, False, True), (19, 0, False, True), (-1, 0, False, False), (-1, 20, False, False), (-1, 21, False, True), (-20, 0, True, True)],
)
def test_who_comes_first_has_to_be_allowed_to(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, wanted: int, soft: int, privileged: bool, possible: bool
) -> None:
    monkeypatch.setattr("fleetctl.host.limits._is_capable", lambda number: privileged)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    monkeypatch.setattr("fleetctl.host.priority.own", lambda: 0)
    limits, asked = machine.limits(), ResourceLimitsSpec(nice=wanted)
    assert limits.mechanisms(asked) == {"nice": "priority" if possible else ""}
    if not possible:
        with pytest.raises(ConfigError, match=r"resource_limits\.nice = -1 cannot be held here: a value below that of the daemon"):
            limits.check(asked)


# -- on this machine

HELD = LocalLimits("/nowhere").mechanisms(ALL)
needs_groups = pytest.mark.skipif(not all(by.startswith("cgroup") for by in HELD.values()), reason="no control group may be made here")


@pytest.fixture
def world(state_dir: str) -> Iterator[RealWorld]:
    world = RealWorld(state_dir)
    yield world
    world.manager.limits.sweep()
    assert not groups(world)


def groups(world: RealWorld) -> list[str]:
    """The agents whose groups there are."""
    limits = world.manager.limits
    return [name for folder in limits._ours() for name in os.listdir(folder) if os.path.isdir(f"{folder}/{name}")]


def spec(program: str, **limits: float) -> FleetSpec:
    command = (sys.executable, "-I", "-S", "-c", program)
    return FleetSpec(name="demo", command=command, cwd="/", resource_limits=ResourceLimitsSpec(**limits))  # type: ignore[arg-type]  # of fields by name


async def end_of(world: RealWorld, agent: Agent) -> Exit:
    exits: list[Exit] = []
    assert agent.process is not None
    world.manager.watch(agent.process, exits.append)
    await wait_for(lambda: exits)
    return exits[0]


IN_GROUPS = "print(open('/proc/self/cgroup').read(), 'READY', flush=True); import time; time.sleep(600)"


@needs_groups
def test_a_process_is_in_its_groups_before_its_program_runs_and_the_daemon_never(world: RealWorld) -> None:
    async def story() -> None:
        agent = world.spawn(new_agent(), spec(IN_GROUPS, cpu_limit=0.5, memory_limit_mb=64, pids_limit=20, nofile=64))
        await wait_for(lambda: "READY" in world.output(agent))
        assert agent.process is not None
        assert f"/{agent.id}\n" in world.output(agent)
        assert world.manager.limits.agent_of(agent.process.pid) == agent.id
        assert world.manager.limits.agent_of(os.getpid()) is None
        assert resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE) == (64, 64)
        world.manager.limits.sweep()  # touches none that is in use
        assert set(groups(world)) == {agent.id}
        world.manager.kill([agent])
        await end_of(world, agent)
        world.manager.release(agent.process)
        assert not groups(world)

    world.run(story())


@needs_groups
def test_an_agent_killed_for_memory_is_told_as_that(world: RealWorld) -> None:
    async def story() -> None:
        hog = world.spawn(new_agent(), spec("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_limit_mb=32))
        ended = await end_of(world, hog)
        assert (ended.signal, ended.out_of_memory) == (9, True)
        assert str(ended) == "killed by SIGKILL, out of memory"
        killed = world.spawn(new_agent(), spec("import os; os.kill(os.getpid(), 9)", memory_limit_mb=32))
        assert not (await end_of(world, killed)).out_of_memory

    world.run(story())


@needs_groups
def test_an_agent_has_no_more_processes_than_it_may(world: RealWorld) -> None:
    program = (
        "import subprocess\nfound = []\n"
        "try:\n    while len(found) < 50: found.append(subprocess.Popen(['sleep', '600']))\n"
        "except OSError: print(len(found), 'READY', flush=True)\nimport time; time.sleep(600)"
    )

    async def story() -> None:
        agent = world.spawn(new_agent(), spec(program, pids_limit=10))
        await wait_for(lambda: "READY" in world.output(agent))
        assert world.output(agent) == "9 READY\n"

    world.run(story())


@needs_groups
def test_limits_are_changed_while_an_agent_runs(world: RealWorld) -> None:
    async def story() -> None:
        agent = world.spawn(new_agent(), spec("import subprocess; subprocess.Popen(['sleep', '600']); " + IN_GROUPS))
        await wait_for(lambda: "READY" in world.output(agent))
        assert agent.process is not None
        world.manager.limit([agent], spec("", memory_limit_mb=64, pids_limit=20))
        members = [process.pid for process in world.manager.survivors([agent])[agent.id]]
        assert len(members) == 2
        assert [world.manager.limits.agent_of(pid) for pid in members] == [agent.id] * 2
        folder = next(iter(world.manager.limits._ours()))
        assert os.path.isdir(folder)
        world.manager.limit([agent], spec("", memory_limit_mb=128))
        memory = world.manager.limits.controllers["memory"]
        file = "memory.max" if memory.version == 2 else "memory.limit_in_bytes"
        path = Path(world.manager.limits._folder(memory, agent.id), file)
        assert path.read_text().strip() == str(128 << 20)
        world.manager.limit([agent], spec(""))
        assert path.read_text().strip() in ("max", str((1 << 63) - (1 << 63) % os.sysconf("SC_PAGE_SIZE") - os.sysconf("SC_PAGE_SIZE")))

    world.run(story())


@needs_groups
def test_what_an_earlier_daemon_limited_is_known_by_its_group(world: RealWorld) -> None:
    async def story() -> None:
        program = "import time; time.sleep(0.2)\nx = []\nwhile True: x.append(bytearray(1 << 20))"
        agent = world.spawn(new_agent(), spec(program, memory_limit_mb=32))
        next_world = RealWorld(world.paths.root)
        assert agent.process is not None
        await wait_for(lambda: next_world.manager.limits.agent_of(agent.process.pid) == agent.id)  # type: ignore[union-attr]  # asserted
        assert (await end_of(next_world, agent)).out_of_memory
        next_world.manager.release(agent.process)

    world.run(story())


def test_a_group_that_cannot_be_made_now_holds_up_this_agent_only(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise PermissionError(13, "Permission denied", "/sys/fs/cgroup/cpu/x")

    monkeypatch.setattr(world.manager.limits, "prepare", fail)
    with pytest.raises(SpawnFailed, match="/sys/fs/cgroup/cpu/x: Permission denied"):
        world.manager.spawn(new_agent(), spec("", cpu_limit=1))


THREADS = """
import subprocess, threading, time
subprocess.Popen(["sleep", "600"])
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("READY", flush=True)
time.sleep(600)
"""


def test_an_agent_has_its_priority_from_its_start_and_a_new_one_in_all_its_threads_and_children(world: RealWorld) -> None:
    async def story() -> None:
        low = spec(THREADS, nice=5)
        agent = world.spawn(new_agent(), low)
        assert agent.process is not None
        assert os.getpriority(os.PRIO_PROCESS, agent.process.pid) == 5
        await wait_for(lambda: "READY" in world.output(agent))
        world.manager.limit([agent], replace(low, resource_limits=ResourceLimitsSpec(nice=9)))
        tree = [ref.pid for ref in world.manager.survivors([agent])[agent.id]]
        threads = [int(thread) for pid in tree for thread in os.listdir(f"/proc/{pid}/task")]
        assert (len(tree), len(threads)) == (2, 3)
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {9}
        world.manager.kill([agent])
        await end_of(world, agent)

    world.run(story())
