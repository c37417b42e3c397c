"""Real processes: how they are started, what they get, how trees end, and how they are found again."""

import asyncio
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fleetctl.errors import SpawnFailed
from fleetctl.host import pidfd, procfs, tag
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, CheckpointsSpec, Exit, FleetSpec, Identity, ProcessRef
from tests.contracts.harness import Program, RealWorld, new_agent, with_process
from tests.helpers import wait_for, wait_until

SPEC = FleetSpec(name="demo", command=("sleep", "600"), cwd="/")
# A double fork with a session of its own: it leaves the leader's session, and its parent is gone.
DAEMONIZES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {goes_on_as}
    os._exit(0)
time.sleep(600)
"""
# Bounded: every one of 30 processes forks once, none lives in the first one's group.
BOMB = """
import os, time
for _ in range(30):
    if os.fork() == 0:
        os.setsid()
        os.fork()
        time.sleep(600)
        os._exit(0)  # not into the loop again: what a killed test left behind would fork without bound
print("READY", flush=True)
time.sleep(600)
"""


# A child with nothing of its agent's about it but its parent.
SHEDS_EVERYTHING = """
import subprocess, time
subprocess.Popen(["/bin/sleep", "600"], env={}, start_new_session=True)
print("READY", flush=True)
time.sleep(600)
"""


@pytest.fixture
def world(state_dir: str) -> RealWorld:
    return RealWorld(state_dir)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def ref_of(pid: int) -> ProcessRef:
    found = procfs.stat(pid)
    assert found is not None
    return ProcessRef(pid=pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())


def leader(agent: Agent) -> ProcessRef:
    assert agent.process is not None
    return agent.process


async def end(world: RealWorld, agent: Agent) -> Exit:
    exits: list[Exit] = []
    world.manager.watch(leader(agent), exits.append)
    await wait_for(lambda: exits)
    return exits[0]


# -- starts that fail


@pytest.mark.parametrize(
    ("command", "cwd", "message"),
    [
        ("/no/such/program", "/", "cannot start '/no/such/program': No such file or directory"),
        ("no-such-program", "/", "cannot start 'no-such-program': No such file or directory"),
        ("/usr", "/", "cannot start '/usr': Permission denied"),
        ("/etc/passwd", "/", "cannot start '/etc/passwd': Permission denied"),
        ("true", "/no/such/folder", "cannot enter the working directory /no/such/folder: No such file or directory"),
        ("true", "/etc/passwd", "cannot enter the working directory /etc/passwd: Not a directory"),
        ("tr\0ue", "/", "cannot start 'tr\\x00ue': embedded null byte"),
    ],
)
def test_a_wrong_command_is_named_and_is_no_passing_trouble(world: RealWorld, command: str, cwd: str, message: str) -> None:
    with pytest.raises(SpawnFailed) as raised:
        world.manager.spawn(new_agent(), replace(SPEC, command=(command,), cwd=cwd))
    assert raised.value.message == message
    assert raised.value.permanent


def test_a_start_that_failed_holds_no_lock_and_leaks_no_descriptor(world: RealWorld) -> None:
    agent = new_agent()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(SpawnFailed):
            world.manager.spawn(agent, replace(SPEC, command=("/no/such/program",)))
    assert len(os.listdir("/proc/self/fd")) == before

    async def story() -> None:
        world.spawn(agent, SPEC)

    world.run(story())


def test_a_log_that_cannot_be_opened_concerns_its_agent_only(world: RealWorld) -> None:
    agent = new_agent()
    os.makedirs(world.paths.agent_log(agent.fleet, agent.id), mode=0o700)
    with pytest.raises(SpawnFailed) as raised:
        world.manager.spawn(agent, SPEC)
    assert not raised.value.permanent
    assert agent.id in raised.value.message


def test_a_lack_of_descriptors_is_passing_and_leaves_some_to_look_after_what_runs(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        spare: list[socket.socket] = []
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, limits[1]))
        try:
            with pytest.raises(SpawnFailed) as raised:
                for _ in range(200):
                    spare.append(socket.socket())
                    world.spawn(new_agent(), SPEC)
            assert not raised.value.permanent
            assert world.manager.survivors([agent]) == {agent.id: (leader(agent),)}
            world.manager.signal([agent], signal.SIGTERM)
            assert (await end(world, agent)).signal == signal.SIGTERM
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for one in spare:
                one.close()

    world.run(story())


def test_no_descriptor_left_to_watch_with_is_not_taken_for_an_exit(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetctl.host.process._WATCH_RETRY_SECONDS", 0.01)
    real, refusals = os.pidfd_open, iter([OSError(errno.EMFILE, "Too many open files")] * 3)

    def refuse_at_first(pid: int, flags: int = 0) -> int:
        if (error := next(refusals, None)) is not None:
            raise error
        return real(pid, flags)

    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        monkeypatch.setattr(os, "pidfd_open", refuse_at_first)
        exits: list[Exit] = []
        world.manager.watch(leader(agent), exits.append)
        await wait_for(lambda: next(refusals, None) is None)
        assert exits == []
        os.kill(leader(agent).pid, signal.SIGTERM)
        await wait_for(lambda: exits)
        assert exits[0].signal == signal.SIGTERM

    world.run(story())


# -- what a process gets


def test_a_process_gets_a_clean_start(world: RealWorld) -> None:
    async def story() -> None:
        inherited, _other = os.pipe()
        os.set_inheritable(inherited, True)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            # The daemon raises its own limit after it made the manager; agents must not see that.
            resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0] - 1, limits[1]))
            agent = await world.start(Program.SLEEPS)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.close(inherited)
            os.close(_other)
        pid = leader(agent).pid
        log, lock = world.paths.agent_log("demo", agent.id), world.paths.agent_lock(agent.id)
        # It opens and closes its libraries first.
        await wait_for(lambda: sorted(procfs.open_files(pid)) == sorted({"/dev/null", log, lock}))
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null", log, log]
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == limits
        found = procfs.stat(pid)
        assert found is not None
        assert (found.sid, found.pgid) == (pid, pid)
        flags = next(line for line in Path(f"/proc/{pid}/fdinfo/1").read_text().splitlines() if line.startswith("flags:"))
        assert int(flags.split()[1], 8) & os.O_APPEND

    world.run(story())


def test_a_process_gets_what_is_allowed_and_asked_for_and_nothing_else(
    world: RealWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAEMONS_OWN_SECRET", "not for agents")
    monkeypatch.setenv("FLEETCTL_LAUNCH", "of another agent")
    monkeypatch.setenv("FROM_DAEMON", "s3cret")
    monkeypatch.setenv("LANG", "C.UTF-8")
    (tmp_path / "secret").write_text("from a file\n")
    (tmp_path / "env").write_text("# comment\n\nexport A='a b'\nB=\"b\"\nC=c=c\nOVER=low\n")
    spec = replace(
        SPEC,
        environment={"D": "d", "OVER": "high", "FLEETCTL_TOKEN": "forged"},
        env_file=str(tmp_path / "env"),
        secret_env={"S1": "env:FROM_DAEMON", "S2": f"file:{tmp_path}/secret"},
    )

    async def story() -> None:
        agent = world.spawn(new_agent(), spec)
        await wait_for(lambda: procfs.environ(leader(agent).pid))  # empty for a moment, while the kernel sets the program up
        environ = procfs.environ(leader(agent).pid)
        assert environ.keys().isdisjoint({"DAEMONS_OWN_SECRET", "FROM_DAEMON"})
        wanted = {"A": "a b", "B": "b", "C": "c=c", "D": "d", "OVER": "high", "S1": "s3cret", "S2": "from a file", "LANG": "C.UTF-8"}
        assert wanted.items() <= environ.items()
        assert {name: value for name, value in environ.items() if name.startswith("FLEETCTL_")} == {
            "FLEETCTL_STATE_DIR": world.paths.root,
            "FLEETCTL_CLAIM": world.paths.agent_claim(agent.id),
            "FLEETCTL_CHECKPOINT_DIR": world.paths.agent_checkpoint(agent.id),
            "FLEETCTL_TRUST": "standard",
            "FLEETCTL_FLEET": "demo",
            "FLEETCTL_AGENT_ID": agent.id,
            "FLEETCTL_SLOT": "3",
            "FLEETCTL_TOKEN": agent.token,
            "FLEETCTL_SPEC_HASH": "hash",
            "FLEETCTL_LAUNCH": "cold",
        }
        assert environ["STATE_DIRECTORY"] == world.paths.agent_state(agent.id)
        assert os.stat(environ["STATE_DIRECTORY"]).st_mode & 0o777 == 0o700
        assert environ["NOTIFY_SOCKET"] == world.paths.notify
        assert environ.keys().isdisjoint({"WATCHDOG_USEC", "WATCHDOG_PID"})

    world.run(story())


def test_a_watched_agent_is_told_how_often_to_say_so(world: RealWorld) -> None:
    async def story() -> None:
        agent = world.spawn(new_agent(), replace(SPEC, watchdog_seconds=2.5))
        await wait_for(lambda: procfs.environ(leader(agent).pid))
        environ = procfs.environ(leader(agent).pid)
        assert (environ["WATCHDOG_USEC"], "WATCHDOG_PID" in environ) == ("2500000", False)

    world.run(story())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_file": "/no/such/file"}, "env_file /no/such/file: No such file or directory"),
        ({"env_file": "/etc/hostname"}, "env_file /etc/hostname, line 1: not NAME=VALUE"),
        ({"secret_env": {"S": "env:NOT_SET_ANYWHERE"}}, "secret_env S: NOT_SET_ANYWHERE is not in the daemon's environment"),
        ({"secret_env": {"S": "file:/no/such/file"}}, "secret_env S: /no/such/file: No such file or directory"),
    ],
)
def test_a_secret_that_cannot_be_read_is_named_and_may_come(world: RealWorld, change: dict[str, object], message: str) -> None:
    with pytest.raises(SpawnFailed) as raised:
        world.manager.spawn(new_agent(), replace(SPEC, **change))  # type: ignore[arg-type]  # of fields by name
    assert raised.value.message == message
    assert not raised.value.permanent


def test_a_shell_command_goes_through_the_shell(world: RealWorld) -> None:
    async def story() -> None:
        agent = world.spawn(new_agent(), replace(SPEC, command=("echo $((40 + 2)); echo oops >&2; exit 4",), shell=True))
        assert (await end(world, agent)).code == 4
        assert world.output(agent) == "42\noops\n"

    world.run(story())


# -- whole trees


@pytest.mark.parametrize(
    ("goes_on_as", "leader_lives"),
    [
        pytest.param('print("READY", flush=True); time.sleep(600)', True, id="by its token"),
        pytest.param('print("READY", flush=True); time.sleep(600)', False, id="by its token, without a leader"),
        pytest.param('os.execve("/bin/sh", ["sh", "-c", "echo READY; exec sleep 600"], {})', False, id="by the lock it holds"),
    ],
)
def test_a_daemonized_grandchild_belongs_to_the_tree(world: RealWorld, goes_on_as: str, leader_lives: bool) -> None:
    async def story() -> None:
        agent = await world.start_command(sys.executable, "-c", DAEMONIZES.format(goes_on_as=goes_on_as))
        if not leader_lives:
            os.kill(leader(agent).pid, signal.SIGKILL)
            await end(world, agent)
        (grandchild,) = [one for one in world.manager.survivors([agent])[agent.id] if one != agent.process]
        assert os.getsid(grandchild.pid) != leader(agent).pid
        world.manager.signal([agent], signal.SIGTERM, signal.SIGCONT)
        await wait_for(lambda: not world.manager.survivors([agent])[agent.id])

    world.run(story())


def test_a_process_seen_while_it_is_set_up_is_recognized_later(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an exec the kernel shows an empty environment."""

    async def story() -> None:
        code = DAEMONIZES.format(goes_on_as='print("READY", flush=True); time.sleep(600)')
        agent = await world.start_command(sys.executable, "-c", code)
        with monkeypatch.context() as early:
            early.setattr(procfs, "environ", lambda pid: {})
            early.setattr(tag, "read", lambda pid: None)
            assert world.manager.survivors([agent])[agent.id] == (leader(agent),)
        assert len(world.manager.survivors([agent])[agent.id]) == 2

    world.run(story())


def test_one_signal_reaches_each_process_of_the_tree_once(world: RealWorld) -> None:
    counts = "c=0; trap 'c=$((c+1)); echo got $c' USR1; echo READY; while :; do sleep 0.05; done"

    async def story() -> None:
        agent = await world.start_command("/bin/sh", "-c", f'({counts}) & setsid sh -c "{counts.replace("$", chr(92) + "$")}" & {counts}')
        await wait_for(lambda: world.output(agent).count("READY") == 3)
        world.manager.signal([agent], signal.SIGUSR1)
        await wait_for(lambda: world.output(agent).count("got 1") == 3)
        world.manager.signal([agent], signal.SIGUSR1)
        await wait_for(lambda: world.output(agent).count("got 2") == 3)
        assert "got 3" not in world.output(agent)

    world.run(story())


def test_killing_leaves_nothing_of_a_fork_bomb(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start_command(sys.executable, "-c", BOMB)
        await wait_for(lambda: len(world.manager.survivors([agent])[agent.id]) == 61)
        world.manager.kill([agent])
        await wait_for(lambda: not world.manager.survivors([agent])[agent.id])

    world.run(story())


def test_who_was_seen_in_the_tree_stays_in_it_without_session_token_lock_and_parent(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start_command(sys.executable, "-c", SHEDS_EVERYTHING)
        await wait_for(lambda: len(world.manager.survivors([agent])[agent.id]) == 2)
        os.kill(leader(agent).pid, signal.SIGKILL)
        await end(world, agent)
        assert len(world.manager.survivors([agent])[agent.id]) == 1
        world.manager.kill([agent])
        await wait_for(lambda: not world.manager.survivors([agent])[agent.id])

    world.run(story())


def test_a_zombie_is_no_survivor_and_release_reaps_it(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start(Program.EXITS_3)
        await end(world, agent)
        zombie = procfs.stat(leader(agent).pid)
        assert zombie is not None
        assert zombie.state == "Z"
        assert world.manager.identify(leader(agent)) is Identity.GONE
        assert world.manager.survivors([agent])[agent.id] == ()
        world.manager.release(leader(agent))
        assert procfs.stat(leader(agent).pid) is None

    world.run(story())


def test_watching_leaks_no_descriptor(world: RealWorld) -> None:
    async def story() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            agent = await world.start(Program.EXITS_3)
            await end(world, agent)
            world.manager.release(leader(agent))
        assert len(os.listdir("/proc/self/fd")) == before

    world.run(story())


def test_a_strangers_session_under_a_reused_number_is_left_alone(world: RealWorld) -> None:
    """Our leader has long been reaped; another took its number for its session, and left something in it when it ended."""

    async def story() -> None:
        other = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!"], start_new_session=True, stdout=subprocess.PIPE)
        assert other.stdout is not None
        stranger = ref_of(int(other.stdout.readline()))
        other.wait()
        other.stdout.close()
        try:
            agent = with_process(new_agent(), ProcessRef(pid=other.pid, start_ticks=1, boot_id=procfs.boot_id()))
            assert world.manager.survivors([agent])[agent.id] == ()
            world.manager.signal([agent], signal.SIGTERM)
            world.manager.kill([agent])
            assert pidfd.identify(stranger) is Identity.MATCH
        finally:
            assert pidfd.send(stranger, signal.SIGKILL)

    world.run(story())


# -- found again


def test_a_process_without_our_token_is_never_found(world: RealWorld, stranger: subprocess.Popen[bytes], tmp_path: Path) -> None:
    elsewhere = {**os.environ, "FLEETCTL_STATE_DIR": str(tmp_path), "FLEETCTL_TOKEN": "t", "FLEETCTL_AGENT_ID": "demo-a"}
    other = subprocess.Popen(["sleep", "600"], env=elsewhere, start_new_session=True)
    try:
        assert world.manager.find() == []
    finally:
        other.kill()
        other.wait()


def test_what_is_found_started_before_now_by_the_clock_deadlines_are_told_in(world: RealWorld) -> None:
    async def story() -> None:
        before = asyncio.get_running_loop().time()
        agent = await world.start(Program.SLEEPS)
        (tree,) = world.manager.find()
        assert tree.leader == agent.process
        assert before - 0.1 <= tree.started_clock <= asyncio.get_running_loop().time()

    world.run(story())


def test_a_machine_that_slept_does_not_move_starts_into_the_future(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts sleep into start times, the clock of the deadlines does not."""

    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        (awake,) = world.manager.find()
        real = time.clock_gettime
        monkeypatch.setattr(time, "clock_gettime", lambda clock: real(clock) + 5000.0 * (clock == time.CLOCK_BOOTTIME))
        (slept,) = world.manager.find()
        assert slept.leader == awake.leader == agent.process
        assert slept.started_clock == pytest.approx(awake.started_clock - 5000.0, abs=0.1)

    world.run(story())


@pytest.mark.parametrize(("stop", "expected"), [("exit 7", (7, None)), ("kill -USR1 $$", (None, signal.SIGUSR1))])
def test_the_exit_of_an_adopted_process_is_told_truly(world: RealWorld, tmp_path: Path, stop: str, expected: tuple[object, ...]) -> None:
    """Started by another daemon that is gone: not our child, and reaped by somebody else."""
    go = tmp_path / "go"
    code = f"echo $$; while [ ! -e {go} ]; do sleep 0.01; done; {stop}"

    async def story() -> None:
        starter = subprocess.Popen(["sh", "-c", 'setsid sh -c "$0" &', code], stdout=subprocess.PIPE)
        assert starter.stdout is not None
        process = ref_of(int(starter.stdout.readline()))
        starter.wait()
        starter.stdout.close()
        exits: list[Exit] = []
        world.manager.watch(process, exits.append)
        go.touch()
        await wait_for(lambda: exits)
        world.manager.release(process)
        if exits[0].code is None and exits[0].signal is None:
            pytest.skip("the kernel tells the exit status of strangers from Linux 6.15 on")
        assert (exits[0].code, exits[0].signal) == expected

    world.run(story())


def test_another_manager_takes_over_what_one_left(world: RealWorld) -> None:
    async def story() -> None:
        agent = await world.start(Program.SLEEPS)
        successor = LocalLifecycleManager(world.paths)
        exits: list[Exit] = []
        successor.watch(leader(agent), exits.append)
        successor.signal([agent], signal.SIGTERM, signal.SIGCONT)
        await wait_for(lambda: exits)
        assert exits[0].signal == signal.SIGTERM
        successor.release(leader(agent))

    world.run(story())


def test_discarding_removes_the_lock_and_keeps_what_the_agent_saved(world: RealWorld) -> None:
    async def story() -> None:
        kept, empty = await world.start(Program.EXITS_3), await world.start(Program.EXITS_3)
        Path(world.paths.agent_state(kept.id), "saved").write_text("work")
        for agent in (kept, empty):
            await end(world, agent)
            world.manager.release(leader(agent))
            world.manager.discard(agent)
        await wait_for(lambda: not os.path.exists(world.paths.agent_state(empty.id)))
        for agent in (kept, empty):
            assert not os.path.exists(world.paths.agent_lock(agent.id))
            assert "READY" in world.output(agent)
        assert os.path.exists(f"{world.paths.agent_state(kept.id)}/saved")

    world.run(story())


def test_agents_outlive_the_one_who_started_them(state_dir: str) -> None:
    """Its session and its descriptors are its own: kill -9 of the starter changes nothing for it, stopped or not."""
    starter = """
import os, signal, sys
from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, FleetSpec
paths = Paths(sys.argv[1])
paths.prepare()
manager = LocalLifecycleManager(paths)
agent = Agent(id="demo-aaaaa", fleet="demo", slot=0, created_at=0.0, token="t-lives-on")
process = manager.spawn(agent, FleetSpec(name="demo", command=("sleep", "600"), cwd="/"))
os.kill(process.pid, signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", starter, state_dir], check=False)
    world = RealWorld(state_dir)
    (tree,) = world.manager.find()
    assert tree.leader is not None
    process = tree.leader
    try:
        found = procfs.stat(process.pid)
        assert found is not None
        assert found.state == "T"
    finally:
        assert pidfd.send(process, signal.SIGKILL)
        wait_until(lambda: pidfd.identify(process) is Identity.GONE)


def test_a_restored_agent_is_started_by_the_command_for_that_with_its_token_and_folder(world: RealWorld) -> None:
    command = ("sh", "-c", "echo READY $0 $1 {other}", "{token}", "{checkpoint}")
    spec = FleetSpec(name="demo", command=("false",), cwd="/", checkpoints=CheckpointsSpec(restore_command=command))

    async def story() -> None:
        fresh = replace(new_agent(), restore="demo-aaaaa/20261125t004530-ab3de", resume_token="a b; $HOME")
        agent = world.spawn(fresh, spec)
        folder = f"{world.paths.checkpoints}/demo/demo-aaaaa/20261125t004530-ab3de"
        await wait_for(lambda: world.output(agent) == f"READY a b; $HOME {folder} {{other}}\n")

    world.run(story())


def test_a_restored_agent_finds_in_its_environment_what_it_is_restored_from(world: RealWorld) -> None:
    async def story() -> None:
        fresh = replace(new_agent(), restore="demo-aaaaa/20261125t004530-ab3de")
        agent = world.spawn(fresh, FleetSpec(name="demo", command=("sleep", "600"), cwd="/"))
        await wait_for(lambda: procfs.environ(leader(agent).pid))
        environ = procfs.environ(leader(agent).pid)
        assert environ["FLEETCTL_LAUNCH"] == "restore"
        assert environ["FLEETCTL_RESTORE"] == f"{world.paths.checkpoints}/demo/demo-aaaaa/20261125t004530-ab3de"

    world.run(story())
