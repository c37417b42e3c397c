"""What an agent's whole process tree may use: control groups where this user may make some, of version 2 or 1, else less.

Each agent has a group of its own below ours, which the process joins before it becomes the agent's program. The groups outlive the daemon,
and are found again by their names. The daemon itself is never in one.
"""

import contextlib
import errno
import hashlib
import logging
import os
import resource
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fleetctl.errors import ConfigError
from fleetctl.host import priority
from fleetctl.models import Enforce, ResourceLimitsSpec

log = logging.getLogger(__name__)

PERIOD_US = 100_000
_LEAST_QUOTA_US = 1_000  # the kernel takes no less
_CONTROLLERS = ("cpu", "memory", "pids")
_LIMIT_OF = {"cpu": "cpu_limit", "memory": "memory_limit_mb", "pids": "pids_limit"}
_DAEMON_GROUP = "fleetctl-daemon"
_CAP_SYS_NICE, _CAP_SYS_RESOURCE = 23, 24


@dataclass(frozen=True, slots=True)
class Controller:
    """One controller of the kernel's, and the folder below which we may make groups that it controls."""

    name: str
    version: int
    folder: str


class LocalLimits:
    """The groups of the agents of one state directory. `mounts`: where the kernel's hierarchies are, other than in tests this machine's."""

    def __init__(self, root: str, *, mounts: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup") -> None:
        self._name = f"fleetctl-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        self._mounts, self._own = mounts, own
        self._why_not: dict[str, str] = {}
        self._niced: set[str] = set()

    @cached_property
    def controllers(self) -> Mapping[str, Controller]:
        """Those below which we may make groups, by name. Found out once, by making one."""
        mounts, own = _mounted(self._mounts), _own_groups(self._own)
        found: dict[str, Controller] = {}
        for name in _CONTROLLERS:
            tried = [self._second(name, mounts, own), self._first(name, mounts, own)]
            usable = next((one for one in tried if isinstance(one, Controller)), None)
            if usable is not None:
                found[name] = usable
            else:
                self._why_not[name] = "; ".join(one for one in tried if isinstance(one, str) and one) or "no such control group"
        return found

    def mechanisms(self, limits: ResourceLimitsSpec) -> dict[str, str]:
        """By what each limit that is given is held: "cgroup v2", "cgroup v1", "rlimit", "watch", or "" where nothing can hold it."""
        found: dict[str, str] = {}
        if limits.enforce is Enforce.OFF:
            return found
        for name, key in _LIMIT_OF.items():
            if getattr(limits, key) is not None:
                group = self.controllers.get(name)
                found[key] = f"cgroup v{group.version}" if group else "" if name == "cpu" else "watch"
        if limits.nofile is not None:
            found["nofile"] = "rlimit" if _may_have_files(limits.nofile) else ""
        if limits.nice is not None:
            found["nice"] = "priority" if _may_be_nice(limits.nice) else ""
        return found

    def check(self, limits: ResourceLimitsSpec) -> None:
        """Raise ConfigError where a limit has to be held, and nothing here can."""
        held = self.mechanisms(limits)
        for key, by in held.items():
            if not by and (limits.enforce is Enforce.REQUIRE or key in ("nofile", "nice")):
                raise ConfigError(f"resource_limits.{key} = {getattr(limits, key):g} cannot be held here: {self.why_not(key)}")

    def notes(self, limits: ResourceLimitsSpec) -> list[str]:
        """What is not held to, though it was asked for."""
        unheld = [key for key, by in self.mechanisms(limits).items() if not by]
        return [f"{key} = {getattr(limits, key):g} is not enforced here: {self.why_not(key)}" for key in unheld]

    def files(self, limits: ResourceLimitsSpec) -> tuple[int, int] | None:
        """Soft and hard limit of open files; None: nothing is asked for."""
        if limits.nofile is None or limits.enforce is Enforce.OFF or not _may_have_files(limits.nofile):
            return None
        return limits.nofile, limits.nofile

    def why_not(self, key: str) -> str:
        """Why a limit cannot be held here, or only by watching."""
        if key == "nice":
            return "a value below that of the daemon takes root, CAP_SYS_NICE or a higher RLIMIT_NICE"
        if key == "nofile":
            return f"this user may have at most {resource.getrlimit(resource.RLIMIT_NOFILE)[1]} open files"
        names = [name for name, limit in _LIMIT_OF.items() if limit == key and name not in self.controllers]
        return self._why_not.get(names[0], "") if names else ""

    def prepare(self, agent_id: str, limits: ResourceLimitsSpec) -> str:
        """Make the agent's groups anew; shell commands with which a process joins them. Raises OSError where that fails now."""
        lines = []
        for controller in self._wanted(limits):
            folder = self._folder(controller, agent_id)
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # an earlier process's, with what it counted
            self._make(controller, folder)
            _write_limits(controller, folder, limits)
            lines.append(f"echo 0 > {shlex.quote(folder)}/cgroup.procs || exit 126\n")
        if self.files(limits):
            lines.append(f"ulimit -n {limits.nofile} || exit 126\n")
        return "".join(lines)

    def apply(self, agent_id: str, limits: ResourceLimitsSpec, pids: Iterable[int]) -> None:
        """Hold a running agent's tree to these limits from now on, and to none that it had before, but for open files.

        What fails is logged.
        """
        pids = list(pids)
        for controller in self.controllers.values():
            folder = self._folder(controller, agent_id)
            wanted = controller in self._wanted(limits)
            if not wanted and not os.path.isdir(folder):
                continue
            try:
                self._make(controller, folder)
                _write_limits(controller, folder, limits)
                if wanted:
                    _move(folder, pids)
            except OSError as error:
                log.warning("%s: %s: %s", agent_id, _LIMIT_OF[controller.name], error)

    def prioritize(self, agent_id: str, limits: ResourceLimitsSpec, pids: Iterable[int]) -> None:
        """Give these processes of an agent the priority that it is to have, if any. Where we may not raise one, it stays as it is."""
        wanted = limits.nice if "nice" in self.mechanisms(limits) else None
        if wanted is None and agent_id not in self._niced:
            return
        self._niced.add(agent_id)
        for pid in pids:
            try:
                priority.set_nice(pid, priority.own() if wanted is None else wanted)
            except PermissionError:
                log.warning("%s: pid %d keeps its priority until it is restarted: raising it takes privilege", agent_id, pid)

    def ran_out_of_memory(self, agent_id: str) -> bool:
        """Whether the kernel killed a process of the agent because it wanted more than its group may have."""
        controller = self.controllers.get("memory")
        if controller is None:
            return False
        file = "memory.events" if controller.version == 2 else "memory.oom_control"
        return _counter(f"{self._folder(controller, agent_id)}/{file}", "oom_kill") > 0

    def agent_of(self, pid: int) -> str | None:
        """The agent in whose group a process is."""
        for path in _own_groups(f"/proc/{pid}/cgroup").values():
            parent, _, agent_id = path.rpartition("/")
            if parent.endswith(f"/{self._name}"):
                return agent_id
        return None

    def remove(self, agent_id: str) -> None:
        """Remove the agent's groups, where nothing of it is left in them."""
        self._niced.discard(agent_id)
        for controller in self.controllers.values() if "controllers" in self.__dict__ else ():
            folder = self._folder(controller, agent_id)
            with contextlib.suppress(OSError):
                os.rmdir(folder)
            with contextlib.suppress(OSError):  # others are in it, mostly
                os.rmdir(os.path.dirname(folder))

    def sweep(self) -> None:
        """Remove every group of ours in which nobody is, such as an agent's that ended while no daemon ran."""
        for folder in self._ours():
            for name in _folders(folder):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{folder}/{name}")
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _ours(self) -> list[str]:
        """Our folders that exist, without making any: whoever sets no limit shall see nothing of all this."""
        mounts, own = _mounted(self._mounts), _own_groups(self._own)
        bases = [_below(mount, own.get(names, "/")) for names, mount in mounts.items()]
        return [f"{base}/{self._name}" for base in bases if base and os.path.isdir(f"{base}/{self._name}")]

    def _wanted(self, limits: ResourceLimitsSpec) -> list[Controller]:
        """The controllers that the limits need; each version 2 group once, for they are all the same one."""
        asked = [name for name, key in _LIMIT_OF.items() if getattr(limits, key) is not None and limits.enforce is not Enforce.OFF]
        needed = [self.controllers[name] for name in asked if name in self.controllers]
        return [one for index, one in enumerate(needed) if one.version == 1 or all(other.version == 1 for other in needed[:index])]

    def _folder(self, controller: Controller, agent_id: str) -> str:
        return f"{controller.folder}/{self._name}/{agent_id}"

    def _make(self, controller: Controller, folder: str) -> None:
        parent = os.path.dirname(folder)
        os.makedirs(parent, mode=0o755, exist_ok=True)
        if controller.version == 2:
            _enable(parent, [one.name for one in self.controllers.values() if one.version == 2])
        os.makedirs(folder, mode=0o755, exist_ok=True)

    def _second(self, name: str, mounts: Mapping[str, "_Mount"], own: Mapping[str, str]) -> Controller | str:
        """In the unified hierarchy; why not, in words, where that cannot be."""
        mount = mounts.get("")
        base = mount and _below(mount, own.get("", "/"))
        if not base or name not in _words(f"{base}/cgroup.controllers"):
            return ""
        if not os.access(base, os.W_OK):
            return f"{base} is not ours to make groups in; a systemd unit with Delegate=yes would be"
        try:
            _enable(base, [name])
        except OSError as error:
            return f"{base}: {error.strerror}"
        return Controller(name, 2, base)

    def _first(self, name: str, mounts: Mapping[str, "_Mount"], own: Mapping[str, str]) -> Controller | str:
        names = next((names for names in mounts if name in names.split(",")), None)
        base = _below(mounts[names], own.get(names, "/")) if names else None
        if not base:
            return ""
        if not os.access(base, os.W_OK):
            return f"{base} is not ours to make groups in"
        return Controller(name, 1, base)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy: which of its groups is seen, and where."""

    root: str
    point: str


def _mounted(path: str) -> dict[str, _Mount]:
    """Hierarchies by the names of their controllers, as in "cpu,cpuacct"; version 2 under no name."""
    found: dict[str, _Mount] = {}
    for line in _lines(path):
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(), rest.split()
        if len(words) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        options = [one for one in kind[2].split(",") if one not in ("rw", "ro")]
        names = "" if kind[0] == "cgroup2" else ",".join(options)
        found.setdefault(names, _Mount(words[3], words[4]))
    return found


def _own_groups(path: str) -> dict[str, str]:
    """The group that a process is in, in each hierarchy, by the names of its controllers."""
    return {fields[1]: fields[2] for line in _lines(path) if len(fields := line.split(":", 2)) == 3}


def _below(mount: _Mount, group: str) -> str | None:
    """The folder of a group; None where it is not to be seen from here."""
    root = mount.root.rstrip("/")
    if group != root and not group.startswith(f"{root}/"):
        return None
    folder = (mount.point + group[len(root) :]).rstrip("/")
    return folder if os.path.isdir(folder) else None


def _enable(folder: str, names: Iterable[str]) -> None:
    """Have the groups below controlled. A group with processes of its own cannot: where they are all ours, we step aside."""
    missing = [name for name in names if name not in _words(f"{folder}/cgroup.subtree_control")]
    if not missing:
        return
    words = " ".join(f"+{name}" for name in missing)
    try:
        _write(f"{folder}/cgroup.subtree_control", words)
    except OSError as error:
        if error.errno != errno.EBUSY or _words(f"{folder}/cgroup.procs") != [str(os.getpid())]:
            raise
        os.makedirs(f"{folder}/{_DAEMON_GROUP}", exist_ok=True)
        _write(f"{folder}/{_DAEMON_GROUP}/cgroup.procs", str(os.getpid()))
        _write(f"{folder}/cgroup.subtree_control", words)


def _write_limits(controller: Controller, folder: str, limits: ResourceLimitsSpec) -> None:
    """What the group may use; of version 2 every limit, since it is one group for all."""
    if controller.version == 2:
        _write_second(folder, limits)
    elif controller.name == "cpu":
        _write_first_cpu(folder, limits.cpu_limit)
    elif controller.name == "memory":
        _write_first_memory(folder, limits.memory_limit_mb)
    else:
        _write(f"{folder}/pids.max", "max" if limits.pids_limit is None else str(limits.pids_limit))


def _write_second(folder: str, limits: ResourceLimitsSpec) -> None:
    quota = "max" if limits.cpu_limit is None else str(_quota(limits.cpu_limit))
    memory = "max" if limits.memory_limit_mb is None else str(_bytes(limits.memory_limit_mb))
    for name, text in (
        ("cpu.max", f"{quota} {PERIOD_US}"),
        # Without swap: a limit that is met by swapping slows the whole machine down instead of the agent.
        ("memory.swap.max", "max" if limits.memory_limit_mb is None else "0"),
        ("memory.max", memory),
        ("memory.oom.group", "0" if limits.memory_limit_mb is None else "1"),  # all of it or none: half an agent is no use
        ("pids.max", "max" if limits.pids_limit is None else str(limits.pids_limit)),
    ):
        if os.path.exists(f"{folder}/{name}"):
            _write(f"{folder}/{name}", text)


def _write_first_cpu(folder: str, cores: float | None) -> None:
    _write(f"{folder}/cpu.cfs_period_us", str(PERIOD_US))
    try:
        _write(f"{folder}/cpu.cfs_quota_us", "-1" if cores is None else str(_quota(cores)))
    except OSError as error:
        if error.errno != errno.EINVAL:  # more than the group above has: then that one's limit holds
            raise


def _write_first_memory(folder: str, mebibytes: float | None) -> None:
    """The second file counts swap too, and may never be below the first; not every kernel has it."""
    text = "-1" if mebibytes is None else str(_bytes(mebibytes))
    plain, with_swap = f"{folder}/memory.limit_in_bytes", f"{folder}/memory.memsw.limit_in_bytes"
    swap = [with_swap] if os.path.exists(with_swap) else []
    try:
        for file in (plain, *swap):
            _write(file, text)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        for file in (*swap, plain):
            _write(file, text)


def _move(folder: str, pids: Iterable[int]) -> None:
    """Put running processes into a group, and the children that they have meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _write(f"{folder}/cgroup.procs", str(pid))


def _quota(cores: float) -> int:
    return max(_LEAST_QUOTA_US, round(cores * PERIOD_US))


def _bytes(mebibytes: float) -> int:
    return max(1, round(mebibytes * (1 << 20)))


def _may_have_files(number: int) -> bool:
    return number <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] or _is_capable(_CAP_SYS_RESOURCE)


def _may_be_nice(value: int) -> bool:
    soft = resource.getrlimit(resource.RLIMIT_NICE)[0]
    least = -20 if soft == resource.RLIM_INFINITY or _is_capable(_CAP_SYS_NICE) else 20 - soft
    return value >= min(priority.own(), least)


def _is_capable(number: int) -> bool:
    for line in _lines("/proc/self/status"):
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _counter(path: str, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def _folders(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    return []


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _words(path: str) -> list[str]:
    return " ".join(_lines(path)).split()


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
