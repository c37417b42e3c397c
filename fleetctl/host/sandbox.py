"""The sandbox of agents that are not trusted: what they see of this machine, and the start of one in it. `enclose` makes it.

Made of the kernel's namespaces (files, processes, network, IPC, users) and a filter on system calls. It has to be there whole: where this
machine cannot make it, nothing is started. Not by bubblewrap, because that leaves a process between us and the agent: a stop signal
ends that one, and so all in it, and the agent's exit status is lost.
"""

import contextlib
import ctypes
import errno
import marshal
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from fleetctl.errors import ConfigError, SpawnFailed
from fleetctl.host import locks, procfs, seccomp
from fleetctl.host.environment import CLAIM
from fleetctl.host.launch import launch
from fleetctl.host.paths import Paths
from fleetctl.models import Agent, FleetSpec, TrustLevel

NOBODY = 65534
"""Who such agents are where we are root: root without any capability could still read what is root's alone, and write to /proc/sys."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix", "/gnu")
"""What is to be seen, and no more than seen, besides the fleet's own folders."""
SCRATCH = "512m"
_NEVER_SHOWN = ("/", "/tmp", "/var/tmp")  # as working directories they are there, but what the machine has in them is not
_LONGEST_SECONDS = 10
_TRANSIENT = (errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE)
_SYS_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION, _SCOPES_SINCE = 444, 1, 6
_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "enclose.py")
_ADVICE = "`fleetctl doctor` says what is missing"

# What an administrator may have set that keeps users from namespaces, and to what.
_SWITCHES = {
    "kernel/apparmor_restrict_unprivileged_userns": "1",
    "kernel/unprivileged_userns_clone": "0",
    "user/max_user_namespaces": "0",
    "user/max_mnt_namespaces": "0",
    "user/max_pid_namespaces": "0",
}

Mounts = list[tuple[str, str, str]]


class Started(NamedTuple):
    """`keeper`: process 1 of the sandbox, which ends with it."""

    pid: int
    keeper: int


class Sandbox:
    """For the agents of one state directory."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self._works = False

    def trouble(self) -> str:
        """Why no sandbox can be made here; empty where one can. Found out by making one, once it works never again."""
        if not self._works:
            trouble = rehearse()
            self._works = not trouble
            return trouble
        return ""

    def check(self, spec: FleetSpec) -> None:
        """Raise ConfigError where the fleet's agents cannot be enclosed as it says."""
        if spec.trust_level is not TrustLevel.UNTRUSTED:
            return
        if trouble := self.trouble():
            raise ConfigError(f'trust_level = "untrusted" cannot be held here, so nothing is started: {trouble}', hint=_ADVICE)
        home, cwd = os.path.realpath(os.path.expanduser("~")), os.path.realpath(spec.cwd)
        if cwd != "/" and f"{home}/".startswith(f"{cwd}/"):
            raise ConfigError(f"cwd: in a sandbox the agents would see all of {cwd}", hint="give them a folder of their own")
        for key in ("read_only_paths", "read_write_paths"):
            for path in getattr(spec.sandbox, key):
                if not os.path.exists(path):
                    raise ConfigError(f"sandbox.{key}: {path} does not exist")
                if os.path.realpath(path) == "/":
                    raise ConfigError(f"sandbox.{key}: {path} is the whole machine", hint="name the folders that the agents need")
                if f"{os.path.realpath(path)}/".startswith(f"{self.paths.root}/"):
                    raise ConfigError(f"sandbox.{key}: {path} is in fleetctl's own state directory", hint="keep it elsewhere")
        for path in spec.sandbox.read_write_paths:
            if os.geteuid() == 0 and not _may_write(os.stat(path), NOBODY):
                raise ConfigError(
                    f"sandbox.read_write_paths: {path} cannot be written to by the agents, which run as user {NOBODY}",
                    hint=f"chown {NOBODY}:{NOBODY} {path}",
                )

    def environment(self, agent: Agent, spec: FleetSpec) -> dict[str, str]:
        """What is different in an agent's environment where it is in there."""
        home = {} if "HOME" in spec.environment else {"HOME": self.paths.agent_state(agent.id)}
        told = {"NOTIFY_SOCKET": self.paths.notify_inside, CLAIM: self.paths.claim_inside(agent.id)}
        return {"TMPDIR": "/tmp", "XDG_RUNTIME_DIR": "/tmp", **home, **told}

    def start(
        self,
        agent: Agent,
        spec: FleetSpec,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        umask: int,
        output: int,
        descriptors: Sequence[int],
        prepare: str,
    ) -> Started:
        """Start the agent in a sandbox, as our child. Raises OSError as `launch` does, and SpawnFailed where there can be no sandbox."""
        self._prepare(agent, spec)
        read, write = os.pipe()
        try:
            plan = _plan(3 + len(descriptors), self._mounts(agent, spec), cwd=os.path.realpath(spec.cwd), network=spec.sandbox.network)
            program = [*_python(), plan, *argv]
            ours = launch(
                program, cwd=spec.cwd, environ=environ, umask=umask, output=output, descriptors=[*descriptors, write], prepare=prepare
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        try:
            return _awaited(ours, read, argv[0], spec.cwd)
        except OSError as error:
            if error.filename != spec.cwd and _is_there(argv[0], environ):
                error.strerror = f"{error.strerror} in the sandbox; name its folder, or its interpreter's, in sandbox.read_only_paths"
            raise

    def _prepare(self, agent: Agent, spec: FleetSpec) -> None:
        paths, inside = self.paths, self.paths.claim_inside(agent.id)
        folders = [paths.agent_state(agent.id), paths.agent_checkpoint(agent.id), os.path.dirname(inside)]
        for folder in folders:
            locks.make_folder(folder)
        share_claim(paths, agent.id)
        if os.geteuid() == 0:
            restored = [f"{paths.checkpoints}/{agent.fleet}/{agent.restore}"] if agent.restore else []
            for folder in (*folders, *restored):
                _give_away(folder)

    def _mounts(self, agent: Agent, spec: FleetSpec) -> Mounts:
        """In the order in which they are made: what lies deeper later."""
        paths, wanted = self.paths, spec.sandbox
        made: dict[str, tuple[str, str, str]] = {one[1]: one for one in _system()}
        folder = [spec.cwd] if os.path.realpath(spec.cwd) not in _NEVER_SHOWN else []
        for kind, names in (("read", [*folder, *wanted.read_only_paths]), ("write", wanted.read_write_paths)):
            made |= {path: (kind, path, path) for path in map(os.path.realpath, names)}
        for path in wanted.inaccessible_paths:
            if os.path.exists(path):
                made[os.path.realpath(path)] = ("hide" if os.path.isdir(path) else "mask", os.path.realpath(path), "")
        if wanted.network and (resolver := os.path.realpath("/etc/resolv.conf")) != "/etc/resolv.conf":
            made.setdefault(os.path.dirname(resolver), ("read", os.path.dirname(resolver), os.path.dirname(resolver)))
        made[paths.root] = ("hide", paths.root, "")
        own = [("write", paths.agent_state(agent.id)), ("write", paths.agent_checkpoint(agent.id))]
        own += [("read", os.path.dirname(paths.notify_inside)), ("read", os.path.dirname(paths.claim_inside(agent.id)))]
        own += [("read", f"{paths.checkpoints}/{agent.fleet}/{agent.restore}")] if agent.restore else []
        made |= {path: (kind, path, path) for kind, path in own if os.path.isdir(path)}
        return sorted(made.values(), key=lambda one: one[1].count("/"))


def held(spec: FleetSpec) -> list[str]:
    """What holds an agent of this fleet to its trust level, in words."""
    if spec.trust_level is TrustLevel.TRUSTED:
        return []
    if spec.trust_level is TrustLevel.STANDARD:
        return ["no new privileges"]
    network = "no network"
    if spec.sandbox.network:
        network = "the machine's network" + ("" if hides_abstract_sockets() else " with its abstract sockets")
    return ["no new privileges", "files of its own view", "processes of its own view", network, user(), "a filter on system calls"]


def user() -> str:
    """Who an agent is in there, in words."""
    return f"user {NOBODY}" if os.geteuid() == 0 else "a user namespace"


@cache
def hides_abstract_sockets() -> bool:
    """Whether sockets that are in the network only, and in no file system, are kept from agents with a network: Landlock's, Linux 6.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION) >= _SCOPES_SINCE)


def rehearse() -> str:
    """Why no sandbox can be made on this machine; empty where all of one was made, and taken down."""
    if seccomp.machine() is None:
        return f"the filter on system calls is not written for {os.uname().machine}"
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        program = [*_python(), _plan(write, _system(), cwd="/", network=False)]
        null = subprocess.DEVNULL
        ours = subprocess.Popen(program, stdin=null, stdout=null, stderr=null, pass_fds=(write,), start_new_session=True)
        ours.returncode = 0  # waited for below
    finally:
        os.close(write)
    try:
        keeper = _awaited(ours.pid, read, "", "").keeper
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)
    except SpawnFailed as error:
        return error.message.removeprefix("no sandbox: ")
    return ""


def advice(trouble: str) -> str:
    """What to do where there is this trouble."""
    if seccomp.machine() is None:
        return "use a machine with an x86-64 or an ARM64 processor"
    if "mount_setattr" in trouble:
        return "needs Linux 5.12 or later"
    for name, closed in _SWITCHES.items():
        if _read(f"/proc/sys/{name}") == closed and (os.geteuid() or not name.startswith("kernel")):
            return f"an administrator has switched it off: {name.replace('/', '.')} = {closed}"
    return "in a container, it has to be allowed to make namespaces; elsewhere a seccomp filter or a security module forbids it"


def keeper_of(pid: int) -> int | None:
    """Process 1 of the sandbox that the process is in; None where it is in none. Looks at every process where it is."""
    space = _process_space(pid)
    if space is None or space == _process_space(os.getpid()):
        return None
    for other in procfs.pids():
        if _process_space(other) == space and _pid_inside(other) == 1:
            return other
    return None


def share_claim(paths: Paths, agent_id: str) -> None:
    """Let an agent in a sandbox see its claim as it is now: it is replaced as a file, and what is mounted is a folder."""
    inside = paths.claim_inside(agent_id)
    if not os.path.isdir(os.path.dirname(inside)):
        return
    staged = f"{inside}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staged)
    with contextlib.suppress(FileNotFoundError):  # no claim yet
        os.link(paths.agent_claim(agent_id), staged)
        if os.geteuid() == 0:
            os.chown(staged, NOBODY, NOBODY)
        os.replace(staged, inside)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staged)  # both were the same file, and then a rename does nothing


def unshare_claim(paths: Paths, agent_id: str) -> None:
    """Remove what `share_claim` made."""
    inside = paths.claim_inside(agent_id)
    if os.path.isdir(os.path.dirname(inside)):
        with contextlib.suppress(OSError):
            os.unlink(paths.agent_claim(agent_id))  # the same file: it is to be no other agent's
        with contextlib.suppress(OSError):
            os.unlink(inside)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(inside))


def _python() -> list[str]:
    return [sys.executable, "-I", "-S", _PROGRAM]


def _plan(report: int, mounts: Mounts, *, cwd: str, network: bool) -> str:
    machine = seccomp.machine()
    if machine is None:
        raise SpawnFailed(f"no sandbox: the filter on system calls is not written for {os.uname().machine}", permanent=True, hint=_ADVICE)
    clone, pivot_root = seccomp.numbers(machine)
    plan: dict[str, Any] = {  # Any: what marshal takes
        "report": report,
        "mounts": mounts,
        "cwd": cwd,
        "network": network,
        "uid": NOBODY if os.geteuid() == 0 else None,
        "filter": seccomp.program(machine),
        "clone": clone,
        "pivot_root": pivot_root,
    }
    return marshal.dumps(plan).hex()


def _system() -> Mounts:
    def one(path: str) -> Iterator[tuple[str, str, str]]:
        if os.path.islink(path):
            yield "link", path, os.readlink(path)
        elif os.path.isdir(path):
            yield "read", path, path

    scratch: Mounts = [("scratch", "/tmp", SCRATCH), ("link", "/var/tmp", "/tmp")]
    return [found for path in SYSTEM for found in one(path)] + scratch


def _awaited(launcher: int, report: int, program: str, cwd: str) -> Started:
    """Whom it started. It has ended then, and where it failed nothing of it is left."""
    try:
        lines = _read_report(report)
        if lines is None:
            raise SpawnFailed(f"no sandbox: it was not ready after {_LONGEST_SECONDS} s")
        return _judged(lines, program, cwd)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher, signal.SIGKILL)  # the keeper is of its group; it itself is not reaped yet, so nobody else can be
        raise
    finally:
        os.waitpid(launcher, 0)


def _read_report(fd: int) -> list[str] | None:
    """All that the launcher tells, until the agent's program has begun; None where that takes too long, as on a file system that hangs."""
    deadline, parts = time.monotonic() + _LONGEST_SECONDS, list[bytes]()
    with open(fd, "rb", buffering=0) as file:
        while select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = file.read(4096)
            if not part:
                return b"".join(parts).decode(errors="surrogateescape").splitlines()
            parts.append(part)
    return None


def _judged(report: Sequence[str], program: str, cwd: str) -> Started:
    """What the launcher told: whom it started, or the error that says why not."""
    words = [line.split(" ", 2) for line in report]
    failed = next((one for one in words if one[0] == "failed"), None)
    started = next((Started(int(one[1]), int(one[2])) for one in words if one[0] == "started"), None)
    if started is not None and failed is None:
        return started
    if started is not None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(started.pid, 0)
    number, step = (int(failed[1]), failed[2]) if failed else (0, "it ended too early")
    if step in ("exec", "cwd"):
        raise OSError(number, os.strerror(number), program if step == "exec" else cwd)
    text = f"no sandbox: {step}{f': {os.strerror(number)}' if number else ''}"
    raise SpawnFailed(text, permanent=number not in _TRANSIENT, hint=_ADVICE)


def _is_there(program: str, environ: Mapping[str, str]) -> bool:
    """Whether there is such a program outside of the sandbox."""
    folders = [""] if "/" in program else environ.get("PATH", os.defpath).split(os.pathsep)
    return any(os.path.exists(os.path.join(folder, program)) for folder in folders)


def _give_away(folder: str) -> None:
    """Make a tree nobody's. Nobody else writes to it now, and no link in it is followed."""
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)
    for _, folders, files, here in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            os.chown(name, NOBODY, NOBODY, dir_fd=here, follow_symlinks=False)


def _may_write(found: os.stat_result, uid: int) -> bool:
    bit = stat.S_IWUSR if found.st_uid == uid else stat.S_IWGRP if found.st_gid == uid else stat.S_IWOTH
    return bool(found.st_mode & bit)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _process_space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _pid_inside(pid: int) -> int | None:
    """As what the process knows itself."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[-1]) for line in file if line.startswith("NSpid:")), None)
    except OSError:
        return None
