"""Starts agents' processes, watches them end, signals and kills whole process trees, and finds them again after a crash.

Which processes are an agent's is for `finding` to say. Every signal goes through a descriptor whose process was verified. Runs on
the event loop's thread.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import json
import logging
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from fleetctl.addresses import filled
from fleetctl.errors import ConfigError, SpawnFailed, StateDirectoryError
from fleetctl.host import environment, helpers, locks, logs, pidfd, privileges, procfs, sandbox, sockets, tag
from fleetctl.host.finding import Finder, reference
from fleetctl.host.keepers import Keepers
from fleetctl.host.launch import TELL_PID, launch
from fleetctl.host.limits import LocalLimits
from fleetctl.host.paths import Paths
from fleetctl.host.spares import Spares
from fleetctl.models import AGENT_ID_PATTERN, Agent, Exit, FleetSpec, Found, Identity, ProcessRef, TrustLevel

log = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_TRANSIENT = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ETXTBSY)
_STATUS_TRIES, _STATUS_RETRY_SECONDS = 20, 0.01
_KILL_ROUNDS = 20
_WATCH_RETRY_SECONDS = 1.0
_ACKNOWLEDGE_TRIES, _ACKNOWLEDGE_SECONDS = 200, 0.002
_SERVING_TRIES, _SERVING_SECONDS = 250, 0.04
_LIMIT_ROUNDS = 2


def become_subreaper() -> None:
    """Orphans of our descendants become our children, so a double fork hides nothing from us."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _is_subreaper() -> bool:
    answer = ctypes.c_int()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return bool(answer.value)


class LocalLifecycleManager:
    """`ports.LifecycleManager` on this machine, for the agents of one state directory. Linux 5.4 or later.

    `umask` is the agents', which need not be ours; -1: it is. `owns_all_children`: every child of this process is an agent's, so
    that whatever ends may be reaped. That is true of the daemon only: a program that we are embedded in has children of its own, and
    waits for them itself.
    """

    def __init__(self, state_dir: Paths | str, *, umask: int = -1, owns_all_children: bool = False) -> None:
        self.paths = state_dir if isinstance(state_dir, Paths) else Paths(os.path.realpath(state_dir))
        self.umask, self._owns_all_children = umask, owns_all_children
        self._pidfds: dict[ProcessRef, int] = {}
        self._watched: set[ProcessRef] = set()
        self._ended: set[ProcessRef] = set()
        self.finder = Finder(self.paths)
        if owns_all_children:
            tag.shed()
        self._orphans_come_to_us = owns_all_children and _is_subreaper()
        self._suspended: dict[str, list[procfs.Stat]] = {}
        self._discarded: list[str] = []
        self._spares = Spares(self.paths.run)
        self._awaited: dict[str, list[int]] = {}  # descriptors at which a connection is waited for, by fleet
        self._reaping = False
        self._file_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.sockets = sockets.ListeningSockets(self.paths, umask=umask)
        self.limits = LocalLimits(self.paths.root)
        self._limited: dict[ProcessRef, str] = {}  # the agent in whose control group it is
        self.sandbox = sandbox.Sandbox(self.paths)
        self._keepers = Keepers()

    def spawn(self, agent: Agent, spec: FleetSpec) -> ProcessRef:
        try:
            locks.make_folder(self.paths.agent_state(agent.id))
            environ = self.environment_of(agent, spec)
            with contextlib.ExitStack() as stack:
                self._spares.take(self.paths.agent_lock(agent.id))
                lock = stack.enter_context(locks.opened(self.paths.agent_lock(agent.id), os.O_CREAT))
                locks.take(lock, agent)
                output = logs.open_log(self.paths, agent.fleet, agent.id, spec.logs)
                stack.callback(os.close, output)
                if self._owns_all_children:
                    stack.enter_context(tag.worn(agent.token))
                joins = self.limits.prepare(agent.id, spec.resource_limits)
                pid, keeper = self._execute(agent, spec, environ, output, lock, joins)
        except OSError as error:
            raise SpawnFailed(_why_not(error, spec), permanent=error.errno not in _TRANSIENT) from error
        except ConfigError as error:  # a socket that cannot be had now
            raise SpawnFailed(error.message, hint=error.hint) from error
        except StateDirectoryError as error:  # its log: concerns this agent, and must not hold up the others
            raise SpawnFailed(error.message) from error
        except ValueError as error:  # a NUL in an argument or a variable
            raise SpawnFailed(f"cannot start {spec.command[0]!r}: {error}", permanent=True) from error
        if not self._owns_all_children:  # somebody else may start something in another thread, and must not wear it
            tag.give(pid, agent.token)
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self.limits.files(spec.resource_limits) or self._file_limit)
        self.limits.prioritize(agent.id, spec.resource_limits, [pid])
        found = None
        with contextlib.suppress(OSError):
            found = procfs.stat(pid)
        if found is None:  # out of descriptors at this very moment: a process we cannot tell apart later must not live
            for one in (pid, keeper):
                if one is not None:
                    os.kill(one, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise SpawnFailed(f"{agent.id}: its process could not be identified right after its start, and was ended")
        process = ProcessRef(pid=pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())
        self.finder.leaders[process] = agent.id
        if joins:
            self._limited[process] = agent.id
        if keeper is not None:
            self._keepers.add(process, keeper)
        with contextlib.suppress(OSError):  # else it is opened, and then verified, when it is needed
            self._pidfds[process] = os.pidfd_open(pid)
        return process

    def _execute(
        self, agent: Agent, spec: FleetSpec, environ: Mapping[str, str], output: int, lock: int, joins: str
    ) -> tuple[int, int | None]:
        """The pid of the agent's process, which first does what `joins` says, to itself; and of its sandbox's keeper, if it has one.

        Raises OSError and ValueError, and ConfigError for a socket that cannot be had.
        """
        held = self.sockets.held(spec)
        command = self.command(agent, spec)
        argv = ("/bin/sh", "-c", command[0]) if spec.shell and not _restores(agent, spec) else command
        descriptors = [*(one.socket.fileno() for one in held), lock]
        if spec.trust_level is TrustLevel.UNTRUSTED:
            return self.sandbox.start(agent, spec, argv, environ, umask=self.umask, output=output, descriptors=descriptors, prepare=joins)
        if spec.trust_level is TrustLevel.TRUSTED:
            return self._open(argv, spec, environ, output, descriptors, joins, listens=bool(held)), None
        start = partial(self._open, argv, spec, environ, output, descriptors, joins, listens=bool(held))
        return privileges.without_new(start), None

    def _open(
        self,
        argv: Sequence[str],
        spec: FleetSpec,
        environ: Mapping[str, str],
        output: int,
        descriptors: Sequence[int],
        joins: str,
        *,
        listens: bool,
    ) -> int:
        """The pid of a process that is in no sandbox."""
        # No pipe: the agent's output outlives us. No preexec_fn: it would cost vfork, and is unsafe beside threads.
        # A session of its own, not only a group: a stopped agent in an orphaned group would be hung up when we die.
        if listens or joins:
            prepare = joins + (TELL_PID if listens else "")
            return launch(argv, cwd=spec.cwd, environ=environ, umask=self.umask, output=output, descriptors=descriptors, prepare=prepare)
        child = subprocess.Popen(
            argv,
            cwd=spec.cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=self.umask,
            pass_fds=descriptors,
        )
        child.returncode = 0  # we reap by pidfd: keeps Popen from ever waiting for it
        return child.pid

    def command(self, agent: Agent, spec: FleetSpec) -> tuple[str, ...]:
        """What the agent executes, or where it is restored the command for that, with {token} and {checkpoint}.

        Where it has a port or sockets, {port} and {fd} are filled in; other braces are nobody's business.
        """
        restores = _restores(agent, spec)
        if spec.port_base is None and not spec.sockets and not restores:
            return spec.command
        values = {name: value for name, value in self.values(agent, spec).items() if name != "slot"}
        if restores:
            values |= {"token": agent.resume_token, "checkpoint": f"{self.paths.checkpoints}/{agent.fleet}/{agent.restore}"}
        return tuple(filled(word, values) for word in (spec.checkpoints.restore_command if restores else spec.command))

    def values(self, agent: Agent, spec: FleetSpec) -> dict[str, str]:
        """What stands for {slot}, {port} and {fd} in this agent's probes and command; a port of its own before that of a socket."""
        own = {} if spec.port_base is None else {"port": str(spec.port_base + agent.slot)}
        return {**sockets.values(self.sockets.addresses(spec)), **own, "slot": str(agent.slot)}

    def limit(self, agents: Sequence[Agent], spec: FleetSpec) -> None:
        for _ in range(_LIMIT_ROUNDS):  # what was born in the first is found in the next
            for agent_id, tree in self.finder.trees(agents).items():
                self.limits.apply(agent_id, spec.resource_limits, [stat.pid for stat in tree])
                self.limits.prioritize(agent_id, spec.resource_limits, [stat.pid for stat in tree])
        for agent in agents:
            if agent.process:
                self._limited[agent.process] = agent.id

    def watched_limits(self, spec: FleetSpec) -> frozenset[str]:
        return frozenset(key for key, by in self.limits.mechanisms(spec.resource_limits).items() if by == "watch")

    def backlog(self, spec: FleetSpec) -> int | None:
        """How many connections wait in the fleet's sockets; None where it has none, or the kernel does not tell."""
        known = [waiting for waiting in self.sockets.backlogs(spec).values() if waiting is not None]
        return sum(known) if known else None

    def connected(self, spec: FleetSpec) -> bool:
        return self.sockets.connected(spec.name)

    def on_connection(self, spec: FleetSpec, call: Callable[[], None] | None) -> None:
        loop = asyncio.get_running_loop()
        for fd in self._awaited.pop(spec.name, ()):
            loop.remove_reader(fd)
        if call is None:
            return
        with contextlib.suppress(ConfigError):  # one that cannot be had again after a crash, which `trouble` tells
            self._awaited[spec.name] = [held.socket.fileno() for held in self.sockets.held(spec)]
        for fd in self._awaited.get(spec.name, ()):
            loop.add_reader(fd, self._has_connection, spec, call)

    def _has_connection(self, spec: FleetSpec, call: Callable[[], None]) -> None:
        """Nobody may take the connection for a while: until then the loop would not sleep."""
        self.on_connection(spec, None)
        call()

    def environment_of(self, agent: Agent, spec: FleetSpec) -> dict[str, str]:
        """What the agent finds in it. Raises SpawnFailed."""
        enclosed = spec.trust_level is TrustLevel.UNTRUSTED
        return environment.build(
            agent,
            spec,
            state_root=self.paths.root,
            state_directory=self.paths.agent_state(agent.id),
            claim_path=self.paths.agent_claim(agent.id),
            notify_socket=self.paths.notify,
        ) | (self.sandbox.environment(agent, spec) if enclosed else {})

    def check(self, spec: FleetSpec) -> None:
        """Raise ConfigError where a secret or the `env_file` cannot be read, as an agent's start would find out, or a limit or the trust
        level not be held.
        """
        self.limits.check(spec.resource_limits)
        self.sandbox.check(spec)
        try:
            environment.secrets(spec)
        except SpawnFailed as error:
            raise ConfigError(error.message, hint=error.hint) from error

    def watch(self, process: ProcessRef, on_exit: Callable[[Exit], None]) -> None:
        if process in self._watched:
            return
        loop = asyncio.get_running_loop()
        try:
            fd = self._pidfds.get(process) or pidfd.open_verified(process)
        except OSError as error:  # out of descriptors; nothing is known of it until there is one again
            log.warning("pid %d cannot be watched yet: %s", process.pid, error.strerror)
            loop.call_later(_WATCH_RETRY_SECONDS, self.watch, process, on_exit)
            return
        if fd is None:
            loop.call_soon(on_exit, Exit(at=time.time()))
            return
        self._pidfds[process] = fd
        self._watched.add(process)
        if process not in self.finder.leaders and (agent_id := self.limits.agent_of(process.pid)):
            self._limited[process] = agent_id
        if process not in self.finder.leaders:
            self._keepers.adopt(process)
        loop.add_reader(fd, self._has_ended, process, on_exit, time.time, 0)

    def _has_ended(self, process: ProcessRef, on_exit: Callable[[Exit], None], clock: Callable[[], float], tries: int) -> None:
        loop = asyncio.get_running_loop()
        fd = self._pidfds.get(process)
        if fd is None:
            return
        loop.remove_reader(fd)
        self._ended.add(process)
        ended = pidfd.exit_of(fd, process, clock())
        if ended is None and tries < _STATUS_TRIES:
            # Between its end and its reaping by init the kernel may not tell yet.
            loop.call_later(_STATUS_RETRY_SECONDS, self._has_ended, process, on_exit, clock, tries + 1)
            return
        told = partial(on_exit, self._with_cause(process, ended or Exit(at=clock())))
        if process not in self._keepers:
            told()
            return
        with contextlib.suppress(ChildProcessError):  # adopted: not ours to reap
            os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        self._keepers.end(process, told)

    def _with_cause(self, process: ProcessRef, ended: Exit) -> Exit:
        """What the kernel counted where it killed for want of memory; one that ended well did so in spite of it."""
        agent_id = self._limited.get(process)
        if ended.code == 0 or agent_id is None or not self.limits.ran_out_of_memory(agent_id):
            return ended
        return dataclasses.replace(ended, out_of_memory=True)

    def release(self, process: ProcessRef) -> None:
        fd = self._pidfds.pop(process, None)
        if agent_id := self._limited.pop(process, None):
            self.limits.remove(agent_id)
        self.finder.leaders.pop(process, None)
        self._keepers.release(process)
        if fd is not None:
            with contextlib.suppress(ChildProcessError):  # adopted: not ours to reap
                os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
            with contextlib.suppress(RuntimeError):  # no loop any more
                if process not in self._ended:
                    asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._watched.discard(process)
        self._ended.discard(process)
        if self._owns_all_children and not self._reaping:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_soon(self.reap_orphans)  # once for many that end together
                self._reaping = True

    @contextlib.contextmanager
    def helper(self, pid: int) -> Iterator[None]:
        """While this lasts, a child is the caller's: no orphan to be reaped, and nothing that an agent may have left.

        To be entered before the event loop runs again.
        """
        helpers.pids.add(pid)
        try:
            yield
        finally:
            helpers.pids.discard(pid)

    def reap_orphans(self) -> None:
        """Reap what was re-parented to us and ended; stops at the first of our leaders, which is reaped by `release`.

        Only for who owns all its children: of any other it would take the exit status away from whoever waits for it.
        """
        self._reaping = False
        spared: set[int] | None = None  # most often there is nobody to compare with them
        with helpers.starting():
            while (ended := _ended_child()) is not None:
                if spared is None:
                    spared = {process.pid for process in self._pidfds.keys() | self.finder.leaders.keys()} | helpers.pids
                if ended in spared:
                    return
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(ended, os.WNOHANG)

    def identify(self, process: ProcessRef) -> Identity:
        return pidfd.identify(process)

    def survivors(self, agents: Sequence[Agent]) -> Mapping[str, tuple[ProcessRef, ...]]:
        if self._left_nothing(agents):
            return {agent.id: () for agent in agents}
        return {key: tuple(reference(stat) for stat in tree) for key, tree in self.finder.trees(agents).items()}

    def _left_nothing(self, agents: Sequence[Agent]) -> bool:
        """Whether surely nothing is left of these trees, told without a look at every process of the machine; False where unsure.

        In a tree that we started, whoever outlives its parent becomes our child, itself or with its nearest ancestor alive. So once
        the leaders have ended and every other child of ours is a leader too, the trees are empty. The list of our children is exact:
        only this thread reaps them, so none leaves it while it is read.
        """
        if any(agent.process not in self.finder.leaders or not self._is_over(agent.process) for agent in agents):
            return False
        return self._has_no_orphans()

    def _is_over(self, process: ProcessRef) -> bool:
        return process not in self._keepers and (process in self._ended or _found_alive(process) is None)

    def _has_no_orphans(self) -> bool:
        """Whether every child of ours is a leader that we started: surely, or False."""
        orphans = self.orphans()
        return orphans is not None and not any((found := procfs.stat(pid)) and found.alive for pid in orphans)

    def orphans(self) -> set[int] | None:
        """Children of ours, ended ones included, that nobody looks after; None where nobody can tell."""
        children = procfs.children() if self._orphans_come_to_us else None
        known = {process.pid for process in self.finder.leaders} | helpers.pids | self._keepers.pids
        return None if children is None else children - known

    def _loners(self, agents: Sequence[Agent]) -> dict[str, ProcessRef]:
        """The agents whose trees are surely their leader and nobody else, by the same reasoning: it has no child, and we no orphan.

        In this order: what loses its parent in between is an orphan by then.
        """
        leaders = {
            agent.id: agent.process
            for agent in agents
            # In a sandbox an orphan goes to its keeper, and not to us.
            if agent.process in self.finder.leaders and agent.process in self._pidfds and agent.process not in self._keepers
        }
        found = {agent_id: leader for agent_id, leader in leaders.items() if leader and procfs.children(leader.pid) == set()}
        return found if found and self._has_no_orphans() else {}

    def signal(self, agents: Sequence[Agent], *numbers: int) -> None:
        loners = self._loners(agents)
        others = [agent for agent in agents if agent.id not in loners]
        trees = self.finder.trees(others)
        for number in numbers:
            for leader in loners.values():
                pidfd.send(leader, number, group=True, held=self._pidfds[leader])
            for agent in others:
                # The leader's group in one call, so that no child is born between two signals.
                head = next((stat for stat in trees[agent.id] if agent.process and stat.pid == agent.process.pid), None)
                grouped = head is not None and self._send(head, number, group=True)
                for stat in trees[agent.id]:
                    if not (grouped and head and stat.pgid == head.pid):
                        self._send(stat, number)

    async def suspend(self, agents: Sequence[Agent]) -> frozenset[str]:
        stopped = await self._stop(agents)
        serving = await self._serving(agents, stopped)
        for _ in range(_SERVING_TRIES):
            if not serving:
                break
            # Somebody waits for its answer: it is let finish, and stopped at another moment.
            self.signal(serving, signal.SIGCONT)
            await asyncio.sleep(_SERVING_SECONDS)
            again = await self._stop(serving)
            stopped = stopped - {agent.id for agent in serving} | again
            serving = await self._serving(serving, again)
        if serving:
            self.signal(serving, signal.SIGCONT)
            stopped -= {agent.id for agent in serving}
            for agent in serving:
                self._suspended.pop(agent.id, None)
        # Somebody will wait for their claims, and to make a file takes longer than to write and rename it.
        await asyncio.to_thread(_make_files, [f"{self.paths.agent_claim(agent_id)}.tmp" for agent_id in stopped])
        return stopped

    async def _serving(self, agents: Sequence[Agent], stopped: Collection[str]) -> list[Agent]:
        """Those that were stopped with a connection in their hands that they had accepted on a socket of the fleet."""
        found = []
        for agent in agents:
            if agent.id not in stopped or not self.sockets.has(agent.fleet):
                continue
            pids = [stat.pid for stat in self._suspended[agent.id]]
            if await asyncio.to_thread(self.sockets.serving, agent.fleet, pids):
                found.append(agent)
        return found

    async def _stop(self, agents: Sequence[Agent]) -> frozenset[str]:
        for agent in agents:  # most trees are one group, which stops as one; it needs no look at all processes
            if agent.process:
                pidfd.send(agent.process, signal.SIGSTOP, group=True, held=self._pidfds.get(agent.process))
        waiting, stopped = list(agents), set()
        for _ in range(_ACKNOWLEDGE_TRIES):
            # Looked for after the stop: what was forked just before it is of the tree too.
            loners = self._loners(waiting)
            trees = {agent_id: [found] if (found := _found_alive(leader)) else [] for agent_id, leader in loners.items()}
            if others := [agent for agent in waiting if agent.id not in loners]:  # in a thread, because it takes milliseconds
                trees |= self.finder.trees(others, await asyncio.to_thread(procfs.snapshot))
            for agent_id, tree in trees.items():
                awake = [stat for stat in tree if stat.state != "T"]
                for stat in awake:
                    self._send(stat, signal.SIGSTOP)
                if tree and not awake:
                    self._suspended[agent_id] = tree
                    stopped.add(agent_id)
            waiting = [agent for agent in waiting if trees[agent.id] and agent.id not in stopped]
            if not waiting:
                break
            await asyncio.sleep(_ACKNOWLEDGE_SECONDS)
        return frozenset(stopped)

    async def resume(self, agents: Sequence[Agent]) -> frozenset[str]:
        # What was stopped is remembered: a look at all processes would take longer than all the rest.
        unknown = [agent for agent in agents if agent.id not in self._suspended]
        trees = {agent.id: self._suspended.pop(agent.id) for agent in agents if agent.id in self._suspended} | self.finder.trees(unknown)
        for agent in agents:
            leader = agent.process
            for stat in sorted(trees[agent.id], key=lambda stat: leader is not None and stat.pid == leader.pid):
                self._send(stat, signal.SIGCONT)
        resumed: set[str] = set()
        for tries in range(_ACKNOWLEDGE_TRIES):
            seen = {agent_id: _states(trees[agent_id]) for agent_id in trees.keys() - resumed}
            resumed |= {agent_id for agent_id, states in seen.items() if states and "T" not in states}
            if not any(states and "T" in states for states in seen.values()):
                break
            await asyncio.sleep(_ACKNOWLEDGE_SECONDS * (tries > 0))
        return frozenset(resumed)

    def claim(self, agent: Agent, claim: Mapping[str, object], *, keep: bool = False) -> None:
        path = self.paths.agent_claim(agent.id)
        if keep and os.path.exists(path):
            return
        try:
            self._spares.take(f"{path}.tmp")
            with locks.opened(f"{path}.tmp", os.O_CREAT | os.O_TRUNC) as fd, open(fd, "wb", closefd=False) as file:
                file.write(json.dumps(claim).encode())
            os.replace(f"{path}.tmp", path)
            sandbox.share_claim(self.paths, agent.id)
        except OSError as error:
            raise StateDirectoryError(f"{path}: {error.strerror}") from error

    def kill(self, agents: Sequence[Agent]) -> None:
        for agent in agents:
            if agent.process is not None and agent.process in self._keepers:
                self._keepers.kill(agent.process)
        agents = [agent for agent in agents if agent.process not in self._keepers]
        for _ in range(_KILL_ROUNDS):
            trees = self.finder.trees(agents)
            if not any(trees.values()):
                return
            for stat in (stat for tree in trees.values() for stat in tree):
                # Where it leads a group, the whole group in one call: faster than it can fork.
                self._send(stat, signal.SIGKILL, group=stat.pgid == stat.pid)

    def remember(self, trees: Mapping[str, frozenset[tuple[int, int]]]) -> None:
        """Who was seen in which agent's tree, as (pid, start ticks)."""
        self.finder.remember(trees)

    def owner(self, pid: int, agents: Callable[[], Iterable[Agent]]) -> str | None:
        """The agent to whose tree a process belongs; None for a stranger. See `Finder.owner`."""
        return self.finder.owner(pid, agents)

    def find(self) -> list[Found]:
        """Every live tree on this machine that belongs to this state directory."""
        self.limits.sweep()  # whoever looks for what an earlier daemon left also puts away what is left of those that ended
        return self.finder.find()

    def _send(self, stat: procfs.Stat, number: int, *, group: bool = False) -> bool:
        process = reference(stat)
        return pidfd.send(process, number, group=group, held=self._pidfds.get(process))

    def discard(self, agent: Agent) -> None:
        self.finder.forget(agent.id)
        self._suspended.pop(agent.id, None)
        self._discarded.append(agent.id)
        if len(self._discarded) == 1:
            asyncio.get_running_loop().call_soon(self._remove_discarded)

    def _remove_discarded(self) -> None:
        """In a thread: on some file systems it takes longer than to end the processes."""
        agent_ids, self._discarded = self._discarded, []
        asyncio.get_running_loop().run_in_executor(None, self._remove_files, agent_ids)

    def _remove_files(self, agent_ids: Iterable[str]) -> None:
        for agent_id in agent_ids:
            claim = self.paths.agent_claim(agent_id)
            sandbox.unshare_claim(self.paths, agent_id)
            for path in (self.paths.agent_lock(agent_id), claim, f"{claim}.tmp"):
                self._spares.put(path)
            for folder in (self.paths.agent_state(agent_id), self.paths.agent_checkpoint(agent_id)):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # only when the agent left nothing in it

    def tidy(self, known: Collection[str]) -> None:
        """Remove what was made for agents that are not among the known, and was not removed because the daemon was killed."""
        named = {name.removesuffix(".lock") for name in locks.names(self.paths.locks)}
        named |= {name.removesuffix(".tmp").removesuffix(".json").removesuffix(".d") for name in locks.names(self.paths.claims)}
        named |= {name.removesuffix(".checkpoint") for name in locks.names(self.paths.agents)}
        gone = [name for name in named - set(known) if re.fullmatch(AGENT_ID_PATTERN, name)]
        self._remove_files([agent_id for agent_id in gone if not locks.is_held(self.paths, agent_id)])
        self._spares.remove_all()


def _restores(agent: Agent, spec: FleetSpec) -> bool:
    """Whether it is started by the command that restores."""
    return bool(agent.restore and spec.checkpoints.restore_command)


def _make_files(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # whoever writes it will say
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def _states(tree: Sequence[procfs.Stat]) -> set[str]:
    """The states of those of these processes that still live."""
    now = (procfs.stat(stat.pid) for stat in tree)
    return {found.state for stat, found in zip(tree, now, strict=True) if found and found.alive and found.start_ticks == stat.start_ticks}


def _ended_child() -> int | None:
    """The pid of a child of ours that ended and was not reaped yet."""
    try:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if result is None else result.si_pid


def _found_alive(process: ProcessRef) -> procfs.Stat | None:
    found = procfs.stat(process.pid)
    return found if found is not None and found.alive and found.start_ticks == process.start_ticks else None


def _why_not(error: OSError, spec: FleetSpec) -> str:
    what = spec.command[0]
    if error.filename == spec.cwd and spec.cwd != what:
        return f"cannot enter the working directory {spec.cwd}: {error.strerror}"
    if error.filename not in (None, what):
        return f"{error.filename}: {error.strerror}"
    return f"cannot start {what!r}: {error.strerror}"
