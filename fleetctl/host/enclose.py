"""A program of its own, `python -I -S enclose.py PLAN COMMAND...`: makes a sandbox, and starts the command in it as a child of our parent.

Three processes take part. This one makes the namespaces, and ends. The *keeper* is process 1 of the sandbox: it mounts what is to be seen,
then only lives, and with it the sandbox; what loses its parent in there comes to it. The *agent* becomes the command. As process 1 it
would ignore every signal that it does not handle, TERM first; and as a child of a process in between, its exit status would reach nobody.
So it is born with CLONE_PARENT: a child of the same parent as we, leader of a session of its own, and nobody between it and a signal.

Knows of fleetctl only the plan that `sandbox` makes. Imports little, neither typing nor signal: every start waits for it.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import sys

TYPE_CHECKING = False  # not from typing, whose import would be a third of ours; type checkers know the name
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Plan = dict[str, Any]  # Any: see sandbox._plan

_CLONE_PARENT, _CLONE_NEWNS, _CLONE_NEWUSER = 0x8000, 0x20000, 0x10000000
_CLONE_NEWCGROUP, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_MOUNT_SETATTR = 442  # the same everywhere
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_RESTRICT_SELF, _SCOPE_ABSTRACT_SOCKETS = 444, 446, 1
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SIGKILL, _SIGPIPE, _SIGCHLD, _SIGXFSZ, _SIG_DFL, _SIG_IGN = 9, 13, 17, 25, 0, 1
_ENOENT = 2
_AF_INET, _SOCK_DGRAM, _SIOCSIFFLAGS, _IFF_UP = 2, 2, 0x8914, 1
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}

_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A step that the kernel refused: `errno`, and what it was."""

    def __init__(self, errno: int, step: str) -> None:
        super().__init__(errno, step)
        self.errno, self.step = errno, step


def main() -> None:
    plan: Plan = marshal.loads(bytes.fromhex(sys.argv[1]))
    report: int = plan["report"]
    os.set_inheritable(report, False)  # so that its end tells that everything went well
    try:
        _unshare(plan)
        keeper = _start_keeper(plan)
        command = sys.argv[2:]
        agent = _start_agent(plan, command) if command else _rehearse(plan)
        os.write(report, b"started %d %d\n" % (agent, keeper))
    except Failed as error:
        _tell(report, error)
    except OSError as error:
        _tell(report, Failed(error.errno or 0, "a process for it"))


def _tell(report: int, error: Failed) -> None:
    os.write(report, f"failed {error.errno} {error.step}\n".encode(errors="surrogateescape"))


def _unshare(plan: Plan) -> None:
    uid, gid = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWCGROUP
    flags |= (0 if plan["network"] else _CLONE_NEWNET) | (_CLONE_NEWUSER if uid else 0)
    _call(_libc.unshare(flags), "unshare: new namespaces")
    if uid:  # the only user there is in there is this one
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            _write(f"/proc/self/{name}", text)


def _start_keeper(plan: Plan) -> int:
    """Its pid, once it has mounted everything."""
    ready, told = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        try:
            os.close(ready)
            os.umask(0o022)
            _mount_all(plan)
            if not plan["network"]:
                _loopback_up()
            os.write(told, b"mounted")
        except Failed as error:
            _tell(plan["report"], error)
            os._exit(1)
        except OSError as error:
            _tell(plan["report"], Failed(error.errno or 0, f"the sandbox's files: {error.filename or 'mount'}"))
            os._exit(1)
        _keep(plan)
    os.close(told)
    mounted = os.read(ready, 16)
    os.close(ready)
    if not mounted:
        os.waitpid(keeper, 0)
        sys.exit(1)  # it said why
    return keeper


def _keep(plan: Plan) -> NoReturn:
    """Live, as little as possible. Orphans of the sandbox are reaped by the kernel, because SIGCHLD is ignored."""
    _on_signal(_SIGCHLD, _SIG_IGN)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, 1 << 16)
    ours = {name: value for name, value in _environ().items() if name.startswith(b"FLEETCTL_")}  # whose it is
    _give_up_root(plan)
    try:
        os.execve("/bin/sleep", ["sleep", "infinity"], ours)
    except OSError:
        while True:
            _libc.pause()


def _start_agent(plan: Plan, command: list[str]) -> int:
    agent: int = _libc.syscall(plan["clone"], _CLONE_PARENT | _SIGCHLD, 0, 0, 0, 0)
    _call(agent, "clone")
    if agent == 0:
        try:
            os.setsid()
            _become(plan, command)
        except Failed as error:
            _tell(plan["report"], error)
        except OSError as error:
            _tell(plan["report"], Failed(error.errno or 0, "exec"))
        os._exit(127)
    return agent


def _become(plan: Plan, command: list[str]) -> NoReturn:
    try:
        os.chdir(plan["cwd"])
    except OSError as error:
        raise Failed(error.errno or 0, "cwd") from error
    environ = _environ()
    if b"LISTEN_FDS" in environ:
        environ[b"LISTEN_PID"] = b"%d" % os.getpid()
    _give_up_root(plan)
    for number in (_SIGPIPE, _SIGXFSZ):  # Python ignores them, and programs do not expect that
        _on_signal(number, _SIG_DFL)
    _bind(plan)
    _execute(command, environ)


def _execute(command: list[str], environ: dict[bytes, bytes]) -> NoReturn:
    """As execvpe does, whose imports are out of sight now. Where several tries fail, a program that is there but may not be run is told."""
    program = os.fsencode(command[0])
    folders = [b""] if b"/" in program else environ.get(b"PATH", os.fsencode(os.defpath)).split(b":")
    trouble: OSError = FileNotFoundError(_ENOENT, "")
    for folder in folders:
        try:
            os.execve(os.path.join(folder, program), command, environ)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            trouble = error
    raise trouble


def _rehearse(plan: Plan) -> int:
    """All of it but the command."""
    _give_up_root(plan)
    _bind(plan)
    return 0


def _bind(plan: Plan) -> None:
    """No rights but those there are, and no calls of the kernel but those that programs need."""
    _call(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl: no_new_privs")
    _leave_abstract_sockets()
    program = ctypes.create_string_buffer(plan["filter"], len(plan["filter"]))
    packed = (len(plan["filter"]) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(program).to_bytes(8, sys.byteorder)
    _call(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, packed, 0, 0), "prctl: seccomp filter")


def _leave_abstract_sockets() -> None:
    """Those of whoever is outside are in no file system, only in the network. Where Landlock is too old for this, they stay: see `held`."""
    attributes = bytes(16) + _SCOPE_ABSTRACT_SOCKETS.to_bytes(8, sys.byteorder)
    rules = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules >= 0:
        _call(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
        os.close(rules)


def _give_up_root(plan: Plan) -> None:
    if plan["uid"] is not None:
        try:
            os.setgroups([])
            os.setresgid(*[plan["uid"]] * 3)
            os.setresuid(*[plan["uid"]] * 3)
        except OSError as error:
            raise Failed(error.errno or 0, f"become user {plan['uid']}") from error


def _environ() -> dict[bytes, bytes]:
    """As it was given to us: Python may have added to its own."""
    with open("/proc/self/environ", "rb") as file:
        pairs = (item.partition(b"=") for item in file.read().split(b"\0") if b"=" in item)
        return {name: value for name, _, value in pairs}


# -- what is to be seen


def _mount_all(plan: Plan) -> None:
    """A root of our own, on which there is what the plan names and nothing else."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _call(_libc.syscall(plan["pivot_root"], b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755")
    closed = ["/new"]
    for kind, path, source in plan["mounts"]:
        at = "/new" + path
        if kind == "link":
            _make_folder(os.path.dirname(at))
            os.symlink(source, at)
        elif kind == "hide":
            _make_folder(at)
            _mount("tmpfs", at, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=0755,size=64k")
            closed.append(at)
        elif kind == "scratch":
            _make_folder(at)
            _mount("tmpfs", at, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={source}")
        elif kind == "mask":
            _mount("/old/dev/null", at, "", _MS_BIND)
        else:
            _show(f"/old{source}", at, writable=kind == "write")
    _devices(closed)
    _make_folder("/new/proc")
    _mount("proc", "/new/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    for folder in closed:
        _set_attributes(folder, _ATTR_RDONLY | _ATTR_NOSUID, recursive=False)
    _call(_libc.umount2(b"/old", _MNT_DETACH), "umount: the old root")
    os.chdir("/new")
    _call(_libc.syscall(plan["pivot_root"], b".", b"."), "pivot_root: the new root")
    _call(_libc.umount2(b".", _MNT_DETACH), "umount: the first root")
    os.chdir("/")


def _devices(closed: list[str]) -> None:
    _make_folder("/new/dev")
    _mount("tmpfs", "/new/dev", "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=0755,size=64k")
    closed.append("/new/dev")
    for name in _DEVICES:
        if os.path.exists(f"/old/dev/{name}"):
            os.close(os.open(f"/new/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
            _mount(f"/old/dev/{name}", f"/new/dev/{name}", "", _MS_BIND)
    for name, target in _LINKS.items():
        os.symlink(target, f"/new/dev/{name}")
    for name, kind, options in (("pts", "devpts", "newinstance,ptmxmode=0666,mode=620"), ("shm", "tmpfs", "mode=1777,size=64m")):
        os.mkdir(f"/new/dev/{name}")
        _mount(kind, f"/new/dev/{name}", kind, _MS_NOSUID | _MS_NOEXEC, options)


def _show(source: str, at: str, *, writable: bool) -> None:
    if os.path.isdir(source):
        _make_folder(at)
    else:
        _make_folder(os.path.dirname(at))
        if not os.path.exists(at):
            os.close(os.open(at, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, at, "", _MS_BIND | _MS_REC)
    _set_attributes(at, _ATTR_NOSUID | _ATTR_NODEV | (0 if writable else _ATTR_RDONLY), recursive=True)


def _make_folder(path: str) -> None:
    os.makedirs(path, mode=0o755, exist_ok=True)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    answer = _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode() or None)
    _call(answer, f"mount {target.removeprefix('/new') or '/'}")


def _set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    packed = attributes.to_bytes(8, sys.byteorder) + bytes(24)
    answer = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE if recursive else 0, packed, ctypes.c_size_t(len(packed))
    )
    _call(answer, f"mount_setattr {path.removeprefix('/new') or '/'}")


def _loopback_up() -> None:
    """A network of its own has nothing but this, and that is down at first."""
    fd = _call(_libc.socket(_AF_INET, _SOCK_DGRAM, 0), "socket")
    request = ctypes.create_string_buffer(b"lo".ljust(16, b"\0") + _IFF_UP.to_bytes(2, sys.byteorder) + bytes(22), 40)
    _call(_libc.ioctl(fd, ctypes.c_ulong(_SIOCSIFFLAGS), request), "ioctl: loopback")
    os.close(fd)


def _on_signal(number: int, action: int) -> None:
    _libc.signal(number, ctypes.c_void_p(action))


def _write(path: str, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise Failed(error.errno or 0, f"write {path}") from error


def _call(answer: int, step: str) -> int:
    if answer < 0:
        raise Failed(ctypes.get_errno(), step)
    return answer


if __name__ == "__main__":
    main()
