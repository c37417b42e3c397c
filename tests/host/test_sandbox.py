"""Trust levels for real: what agents may at each, every way out of the sandbox that we know tried, and a normal life in there."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fleetctl.errors import ConfigError, SpawnFailed
from fleetctl.host import procfs, sandbox, tag
from fleetctl.host.notify import NotifySocket
from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, Exit, FleetSpec, SandboxSpec, TrustLevel
from tests.contracts.harness import new_agent, with_process
from tests.helpers import wait_for, wait_until
from tests.servers import lacks

PYTHON = tuple(dict.fromkeys((sys.prefix, sys.base_prefix)))
ENCLOSED = FleetSpec(name="demo", command=("true",), cwd="/", trust_level=TrustLevel.UNTRUSTED, sandbox=SandboxSpec(read_only_paths=PYTHON))
OPEN = replace(ENCLOSED, trust_level=TrustLevel.TRUSTED, sandbox=SandboxSpec())
STANDARD = replace(OPEN, trust_level=TrustLevel.STANDARD)


class World:
    """A state directory with a control socket, a database, somebody else's agent in its own sandbox, and a server on loopback."""

    def __init__(self, root: str) -> None:
        self.paths = Paths(root)
        self.paths.prepare()
        self.manager = LocalLifecycleManager(self.paths)
        self.agents: list[Agent] = []
        Path(self.paths.database).write_text("the database")
        self.outside = Path(os.path.dirname(root), "outside")
        self.outside.write_text("a file of the user's")
        self.control = socket.socket(socket.AF_UNIX)
        self.control.bind(self.paths.socket)
        self.control.listen()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0fleetctl-test-{os.getpid()}")
        self.abstract.listen()
        self.victim: Agent | None = None

    def close(self) -> None:
        for one in (self.control, self.server, self.abstract):
            one.close()

    async def start(self, spec: FleetSpec, *, agent: Agent | None = None) -> Agent:
        agent = agent or replace(new_agent(), id=f"demo-{len(self.agents):05d}", token=f"secret-of-{len(self.agents)}")
        started = with_process(agent, self.manager.spawn(agent, spec))
        self.agents.append(started)
        return started

    async def end_of(self, agent: Agent, manager: LocalLifecycleManager | None = None) -> Exit:
        exits: list[Exit] = []
        assert agent.process
        (manager or self.manager).watch(agent.process, exits.append)
        await wait_for(lambda: exits)
        (manager or self.manager).release(agent.process)
        return exits[0]

    async def kill(self, agent: Agent) -> None:
        self.manager.kill([agent])
        await self.end_of(agent)

    def output(self, agent: Agent) -> str:
        return Path(self.paths.agent_log(agent.fleet, agent.id)).read_text()

    def python(self, spec: FleetSpec, code: str) -> FleetSpec:
        victim = self.victim.process.pid if self.victim and self.victim.process else 0
        told = {"VICTIM": victim, "OUTSIDE": self.outside, "PORT": self.server.getsockname()[1], "ABSTRACT": f"fleetctl-test-{os.getpid()}"}
        environment = {name: str(value) for name, value in told.items()} | {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        return replace(spec, command=(sys.executable, "-c", PRELUDE + code), environment=environment)


PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, time
from os import environ
state, outside, victim = environ["FLEETCTL_STATE_DIR"], environ["OUTSIDE"], int(environ["VICTIM"])
libc = ctypes.CDLL(None, use_errno=True)
def call(answer):
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def gone(condition):
    if not condition:
        raise PermissionError("it is not there")
"""

# Each is an attempt that raises OSError where it is refused.
ATTEMPTS = {
    "write to the system": "open('/etc/fleetctl-test', 'w')",
    "write to programs": "open('/usr/bin/fleetctl-test', 'w')",
    "write to the root": "open('/fleetctl-test', 'w')",
    "change its program's folder": "open(sys.prefix + '/fleetctl-test', 'w')",
    "set the kernel": "open('/proc/sys/kernel/core_pattern', 'w')",
    "trigger the kernel": "open('/proc/sysrq-trigger', 'w')",
    "become root": "os.setuid(0) if os.getuid() else os.setgroups([1])",
    "keep a group": "os.setgroups([0])",
    "mount": "call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "mount, as this machine's call": "call(libc.syscall(428, -100, b'/', 1))",
    "unmount what hides": "call(libc.umount2(state.encode(), 2))",
    "remount for writing": "call(libc.mount(None, b'/etc', None, 32 | 4096, None))",
    "change the root": "os.chroot('/tmp')",
    "new namespaces": "call(libc.unshare(0x10000000))",
    "others' namespaces": "call(libc.setns(os.open('/proc/1/ns/mnt', os.O_RDONLY), 0))",
    "a device": "os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
    "trace process 1": "call(libc.ptrace(16, 1, 0, 0))",
    "read process 1": "open('/proc/1/mem', 'rb').read(1) and call(libc.ptrace(16, 1, 0, 0))",
    "kernel messages": "call(libc.klogctl(3, ctypes.create_string_buffer(9), 9))",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "the host's name": "call(libc.sethostname(b'x', 1))",
    "a socket to the hypervisor": "socket.socket(getattr(socket, 'AF_VSOCK', 40), socket.SOCK_STREAM)",
    "raw packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "crypto sockets": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "keys of the kernel": "call(libc.syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 1, 0, 0))",
    "io_uring": "call(libc.syscall(425, 8, ctypes.create_string_buffer(120)))",
    "a setuid program": "gone(not any('NoNewPrivs:\\t1' in line for line in open('/proc/self/status')))",
    "capabilities": "gone([line for line in open('/proc/self/status') if line.startswith('CapEff') and int(line.split()[1], 16)])",
}
# Those that anybody can do outside, so that it is the sandbox that refuses them. As `trusted` each succeeds, which is tried too.
ANYBODY_CAN = {
    "read a user's file": "open(outside)",
    "read the database": "open(state + '/fleetctl.db')",
    "speak to the daemon": "socket.socket(socket.AF_UNIX).connect(state + '/run/control.sock')",
    "see others' directories": "gone([one for one in os.listdir(state + '/agents') if not one.startswith(environ['FLEETCTL_AGENT_ID'])])",
    "see locks": "os.listdir(state + '/run/locks')",
    "see logs": "os.listdir(state + '/logs')",
    "see others' processes": """
def line(pid):
    try:
        return open(f'/proc/{pid}/cmdline').read()
    except OSError:
        return ''
gone([pid for pid in os.listdir('/proc') if pid.isdigit() and 'I am' + ' the victim' in line(pid)])""",
    "see others' secrets": """
def secrets(pid):
    try:
        return open(f'/proc/{pid}/environ').read()
    except OSError:
        return ''
gone([pid for pid in os.listdir('/proc') if pid.isdigit() and 'FLEETCTL_TOKEN=secret-of-0' in secrets(pid)])""",
    "find another by its number": "os.kill(victim, 0)",
    "limit another": "import resource; resource.prlimit(victim, resource.RLIMIT_CPU)",
    "connect to this machine": "socket.create_connection(('127.0.0.1', int(environ['PORT'])))",
    "connect to an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0' + environ['ABSTRACT'])",
}


@pytest.fixture
def world(state_dir: str) -> Iterator[World]:
    if trouble := sandbox.rehearse():
        lacks(f"no sandbox can be made here: {trouble}")
    here = World(state_dir)
    yield here
    here.close()


async def attempted(world: World, spec: FleetSpec, ways: Mapping[str, str]) -> dict[str, str]:
    """What came of each, in one agent, in a process of its own: "refused" or "done", else its error."""
    code = f"""
for way, code in {dict(ways)!r}.items():
    if os.fork() == 0:
        try:
            exec(code)
            print(f"{{way}}: done", flush=True)
        except OSError:
            print(f"{{way}}: refused", flush=True)
        except BaseException as error:
            print(f"{{way}}: {{error!r}}", flush=True)
        os._exit(0)
    os.wait()
"""
    agent = await world.start(world.python(spec, code))
    await world.end_of(agent)
    lines = (line.partition(": ") for line in world.output(agent).splitlines())
    return {way: outcome for way, _, outcome in lines}


async def victim_in(world: World, spec: FleetSpec) -> Agent:
    world.victim = await world.start(world.python(spec, "print('READY', flush=True)\ntime.sleep(600)  # I am the victim"))
    await wait_for(lambda: world.victim and "READY" in world.output(world.victim))
    return world.victim


def test_no_way_leads_out_of_the_sandbox(world: World) -> None:
    async def story() -> None:
        victim = await victim_in(world, ENCLOSED)
        try:
            ways = {**ATTEMPTS, **ANYBODY_CAN}
            assert await attempted(world, ENCLOSED, ways) == dict.fromkeys(ways, "refused")
            # All that it may signal is ended. Its own keeper is spared by the kernel, and nobody else is there.
            await attempted(world, ENCLOSED, {"end all": "os.kill(-1, 9)"})
            assert procfs.stat(victim.process.pid if victim.process else 0)
        finally:
            await world.kill(victim)

    asyncio.run(story())


def test_what_the_sandbox_refuses_is_possible_without_it(world: World) -> None:
    async def story() -> None:
        victim = await victim_in(world, OPEN)
        try:
            assert await attempted(world, OPEN, ANYBODY_CAN) == dict.fromkeys(ANYBODY_CAN, "done")
        finally:
            await world.kill(victim)

    asyncio.run(story())


@pytest.mark.parametrize(("spec", "promised"), [(OPEN, "0"), (STANDARD, "1"), (ENCLOSED, "1")])
def test_only_trusted_agents_may_gain_rights(world: World, spec: FleetSpec, promised: str) -> None:
    async def story() -> None:
        code = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('NoNewPrivs')))"
        agent = await world.start(world.python(spec, code))
        await world.end_of(agent)
        assert world.output(agent).strip() == promised

    asyncio.run(story())


def test_paths_are_shown_as_the_settings_say(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        for name in ("seen", "mine", "seen/hidden"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("text")
        (tmp_path / "seen/masked").write_text("text")
        if os.geteuid() == 0:
            os.chown(tmp_path / "mine", sandbox.NOBODY, sandbox.NOBODY)
        shown = SandboxSpec(
            read_only_paths=(*PYTHON, str(tmp_path / "seen")),
            read_write_paths=(str(tmp_path / "mine"),),
            inaccessible_paths=(str(tmp_path / "seen/hidden"), str(tmp_path / "seen/masked")),
        )
        spec = replace(ENCLOSED, sandbox=shown)
        world.manager.check(spec)
        code = f"""
import pathlib
here = pathlib.Path({str(tmp_path)!r})
print([(here / "seen/file").read_text(), (here / "seen/masked").read_text(), os.listdir(here / "seen/hidden"), sorted(os.listdir(here))])
print(os.access(here / "seen", os.W_OK), open(environ["STATE_DIRECTORY"] + "/kept", "w").write("x"), open("/tmp/scratch", "w").write("x"))
print(environ["HOME"] == environ["STATE_DIRECTORY"], environ["FLEETCTL_TRUST"], (here / "mine/new").write_text("written"))"""
        agent = await world.start(world.python(spec, code))
        assert str(await world.end_of(agent)) == "exit 0", world.output(agent)
        assert world.output(agent).splitlines() == [
            "['text', '', [], ['mine', 'seen']]",
            "False 1 1",
            "True untrusted 7",
        ]
        assert (tmp_path / "mine/new").read_text() == "written"
        assert Path(world.paths.agent_state(agent.id), "kept").exists()
        assert not os.path.exists("/tmp/scratch")

    asyncio.run(story())


def test_with_a_network_it_reaches_this_machine_and_nothing_else_is_different(world: World) -> None:
    async def story() -> None:
        spec = replace(ENCLOSED, sandbox=SandboxSpec(read_only_paths=PYTHON, network=True))
        ways = {way: ANYBODY_CAN[way] for way in ("connect to this machine", "read the database", "see others' processes")}
        if sandbox.hides_abstract_sockets():
            ways["connect to an abstract socket"] = ANYBODY_CAN["connect to an abstract socket"]
        assert await attempted(world, spec, ways) == {**dict.fromkeys(ways, "refused"), "connect to this machine": "done"}

    asyncio.run(story())


# -- a normal life


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("sys.exit(75)", Exit(code=75)),
        ("os.kill(os.getpid(), signal.SIGKILL)", Exit(signal=signal.SIGKILL)),
        # A child that outlives it goes with the sandbox, sessions and descriptors shed or not.
        ("subprocess.Popen(['/bin/sleep', '600'], env={}, start_new_session=True)", Exit(code=0)),
    ],
)
def test_its_exit_is_told_as_it_was_and_nothing_is_left(world: World, code: str, ended: Exit) -> None:
    async def story() -> None:
        agent = await world.start(world.python(ENCLOSED, code))
        assert agent.process
        assert replace(await world.end_of(agent), at=0.0) == ended
        assert world.manager.survivors([agent]) == {agent.id: ()}
        assert not any(tag.read(pid) == tag.of(agent.token) for pid in procfs.pids())

    asyncio.run(story())


def test_it_is_asked_to_stop_itself_and_finishes(world: World) -> None:
    async def story() -> None:
        code = """
def finish(*_):
    print("finished", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, finish)
subprocess.Popen(["/bin/sleep", "600"])
print("READY", flush=True)
while True:
    time.sleep(60)"""
        agent = await world.start(world.python(ENCLOSED, code))
        await wait_for(lambda: "READY" in world.output(agent))
        assert await world.manager.suspend([agent]) == {agent.id}
        world.manager.signal([agent], signal.SIGTERM)
        assert await world.manager.resume([agent]) == {agent.id}
        assert (await world.end_of(agent)).code == 3
        assert "finished" in world.output(agent)

    asyncio.run(story())


def test_a_program_without_handlers_ends_by_the_stop_signal(world: World) -> None:
    async def story() -> None:
        agent = await world.start(replace(ENCLOSED, command=("sleep", "600")))
        world.manager.signal([agent], signal.SIGTERM)
        assert (await world.end_of(agent)).signal == signal.SIGTERM

    asyncio.run(story())


def test_another_daemon_finds_it_and_ends_all_of_it(world: World) -> None:
    async def story() -> None:
        agent = await world.start(world.python(ENCLOSED, "subprocess.Popen(['/bin/sleep', '600'])\nprint('READY')\ntime.sleep(600)"))
        await wait_for(lambda: len(world.manager.survivors([agent])[agent.id]) == 3)  # it, its child, and the sandbox's process 1
        other = LocalLifecycleManager(world.paths)
        (found,) = other.find()
        assert (found.agent_id, found.token, found.leader) == (agent.id, agent.token, agent.process)
        other.signal([agent], signal.SIGKILL)
        assert (await world.end_of(agent, other)).signal == signal.SIGKILL
        assert other.survivors([agent]) == {agent.id: ()}

    asyncio.run(story())


def test_what_it_says_is_heard_as_its_own_and_it_sees_its_claims(world: World) -> None:
    heard: list[tuple[str, bytes]] = []

    async def story() -> None:
        def ear() -> NotifySocket:
            made = NotifySocket(
                world.paths.notify,
                lambda pid: world.manager.owner(pid, lambda: world.agents),
                lambda agent_id, data: heard.append((agent_id, data)),
                inside=world.paths.notify_inside,
            )
            made.open()
            made.listen()
            return made

        first = ear()
        code = """
import json
for _ in range(2):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(json.load(open(environ["FLEETCTL_CLAIM"]))["word"].encode(), environ["NOTIFY_SOCKET"])
    signal.sigwait([signal.SIGUSR1])"""
        agent = replace(new_agent(), id="demo-claim", token="secret-of-claim")
        world.manager.claim(agent, {"environment": {}, "word": "one"})
        spec = world.python(ENCLOSED, "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])" + code)
        agent = await world.start(spec, agent=agent)
        await wait_for(lambda: heard == [(agent.id, b"one")])
        first.close()
        second = ear()  # another daemon's: a new socket, at the same place
        world.manager.claim(agent, {"environment": {}, "word": "two"})
        world.manager.signal([agent], signal.SIGUSR1)
        await wait_for(lambda: heard[1:] == [(agent.id, b"two")])
        second.close()
        await world.kill(agent)

    asyncio.run(story())


def test_it_serves_a_socket_that_it_was_handed_without_a_network(world: World) -> None:
    async def story() -> None:
        spec = replace(ENCLOSED, sockets={"http": "127.0.0.1:0"})
        code = """
taken = socket.socket(fileno=3).accept()[0]
taken.sendall(str(environ["LISTEN_PID"] == str(os.getpid())).encode())"""
        agent = await world.start(world.python(spec, code))
        (address,) = world.manager.sockets.addresses(spec).values()
        with socket.create_connection(("127.0.0.1", address.port or 0)) as client:
            assert await asyncio.to_thread(client.recv, 16) == b"True"
        await world.end_of(agent)
        world.manager.sockets.close("demo")

    asyncio.run(story())


# -- starts that fail

ELSEWHERE = " in the sandbox; name its folder, or its interpreter's, in sandbox.read_only_paths"


@pytest.mark.parametrize(
    ("command", "cwd", "message"),
    [
        (("no-such-program",), "/", "cannot start 'no-such-program': No such file or directory"),
        (("/etc/passwd",), "/", f"cannot start '/etc/passwd': Permission denied{ELSEWHERE}"),
        (("/proc/self/cwd/start",), "/", "cannot start '/proc/self/cwd/start': No such file or directory"),
        (("true",), "/no/such/folder", "cannot enter the working directory /no/such/folder: No such file or directory"),
    ],
)
def test_a_wrong_command_is_named_as_without_a_sandbox(world: World, command: tuple[str, ...], cwd: str, message: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpawnFailed) as raised:
        world.manager.spawn(new_agent(), replace(ENCLOSED, command=command, cwd=cwd))
    assert raised.value.message == message
    assert raised.value.permanent
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sandbox": SandboxSpec(read_only_paths=("/no/such",))}, "sandbox.read_only_paths: /no/such does not exist"),
        ({"sandbox": SandboxSpec(read_write_paths=("/",))}, "sandbox.read_write_paths: / is the whole machine"),
        ({"cwd": os.path.expanduser("~")}, "cwd: in a sandbox the agents would see all of"),
    ],
)
def test_a_sandbox_that_would_be_none_is_refused(world: World, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        world.manager.check(replace(ENCLOSED, **changed))  # type: ignore[arg-type]  # from the table


def test_the_state_directory_cannot_be_shown(world: World) -> None:
    with pytest.raises(ConfigError, match="is in fleetctl's own state directory"):
        world.manager.check(replace(ENCLOSED, sandbox=SandboxSpec(read_only_paths=(world.paths.database,))))


def test_where_no_sandbox_can_be_made_nothing_is_started(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths(state_dir)
    paths.prepare()
    manager = LocalLifecycleManager(paths)
    monkeypatch.setattr("fleetctl.host.seccomp.machine", lambda: None)
    with pytest.raises(ConfigError, match="cannot be held here, so nothing is started: the filter on system calls is not written for"):
        manager.check(ENCLOSED)
    with pytest.raises(SpawnFailed, match=r"^no sandbox: "):
        manager.spawn(new_agent(), ENCLOSED)


def test_a_rehearsal_leaves_nobody_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("FLEETCTL_REHEARSAL", mark)
    for _ in range(3):
        sandbox.rehearse()
    wait_until(lambda: not any(procfs.environ(pid).get("FLEETCTL_REHEARSAL") == mark for pid in procfs.pids() if pid != os.getpid()))


def test_a_machine_without_namespaces_is_told_as_one(state_dir: str) -> None:
    code = "from fleetctl.host import sandbox; print(sandbox.rehearse())"
    limited = f"ulimit -u unlimited; echo 0 > /proc/sys/user/max_mnt_namespaces && exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "/bin/sh", "-c", limited],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode:
        lacks(f"a namespace cannot be limited here: {done.stderr.strip()}")
    assert done.stdout.startswith("unshare: new namespaces: "), done.stdout + done.stderr
