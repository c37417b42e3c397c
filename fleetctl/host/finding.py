"""Whose a process is, told in one pass over /proc for any number of agents; and what still lives after a crash, whoever recorded it.

A tree is: the leader's session, whatever carries the agent's token in its environment (a double-forked grandchild that left the
session) or its mark (`tag`), whatever was once seen among its descendants, whatever still holds the agent's lock, and the descendants
of all these. Signals nobody.
"""

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from fleetctl.host import environment, locks, procfs, tag
from fleetctl.host.paths import Paths
from fleetctl.models import AGENT_ID_PATTERN, NAME_PATTERN, Agent, Found, ProcessRef

_REMEMBERED_OWNERS, _MOST_ANCESTORS = 16384, 64


class Finder:
    """For the agents of one state directory. Remembers who was seen in which tree."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.leaders: dict[ProcessRef, str] = {}
        """The agent of each leader that we started, and have not let go of."""
        self._tokens: dict[tuple[int, int], str] = {}
        self._members: dict[str, frozenset[tuple[int, int]]] = {}
        self._owners: dict[tuple[int, int], str] = {}

    def remember(self, trees: Mapping[str, frozenset[tuple[int, int]]]) -> None:
        """Who was seen in which agent's tree, as (pid, start ticks): it stays there, whatever it makes of its session and environment."""
        for agent_id, members in trees.items():
            self._members[agent_id] = self._members.get(agent_id, frozenset()) | members

    def forget(self, agent_id: str) -> None:
        self._members.pop(agent_id, None)

    def owner(self, pid: int, agents: Callable[[], Iterable[Agent]]) -> str | None:
        """The agent to whose tree a process belongs; None for a stranger. Raises OSError where we are out of descriptors.

        A process that was asked for before costs one read of its /proc/PID/stat. `agents`: all there are, asked for only where needed;
        those started a moment ago may be missing.
        """
        found = procfs.stat(pid)
        if found is None:
            return None
        key = (found.pid, found.start_ticks)
        if key not in self._owners:
            owner = self._find_owner(found, list(agents()))
            if owner is None:
                return None
            if len(self._owners) >= _REMEMBERED_OWNERS:
                self._owners.clear()
            self._owners[key] = owner
        return self._owners[key]

    def _find_owner(self, stat: procfs.Stat, agents: Sequence[Agent]) -> str | None:
        """Descent tells first, and from the process upwards: a token can be copied by a sibling, a parent cannot be chosen."""
        leaders = {agent.process: agent.id for agent in agents if agent.process}
        at: procfs.Stat | None = stat
        for _ in range(_MOST_ANCESTORS):
            if at is None or at.pid == os.getpid():  # an agent may have started us: what is above us is of no agent of ours
                break
            session = at if at.pid == at.sid else procfs.stat(at.sid)
            leader = reference(session) if session else None
            known = leader and (self.leaders.get(leader) or leaders.get(leader))
            member = known or next((key for key, members in self._members.items() if (at.pid, at.start_ticks) in members), None)
            if member:
                return member
            parent = procfs.stat(at.ppid)
            at = parent if parent and parent.start_ticks <= at.start_ticks else None  # younger than its child: its pid was reused
        token = self._token(stat)
        return next((agent.id for agent in agents if token and agent.token == token), None)

    def find(self) -> list[Found]:
        """Every live tree on this machine that belongs to this state directory, by its token or, where it lost that, by its lock.

        What others write into an environment proves nothing: only our own user's processes count, and of others' those that have the
        very token that the agent's lock file names.
        """
        tokens = {agent_id: record.get("token") for agent_id, record in locks.records(self.paths).items()}
        trees: dict[str, Found] = {}
        for stat in sorted(procfs.snapshot().values(), key=lambda stat: stat.start_ticks):
            if not stat.alive or stat.pid == os.getpid():
                continue
            environ = procfs.environ(stat.pid)
            if environ.get(environment.STATE_DIR) != self.paths.root or (found := _found(environ, stat)) is None:
                continue
            if procfs.owner(stat.pid) != os.geteuid() and tokens.get(found.agent_id) != found.token:
                continue
            known = trees.get(found.token)
            if known is None or (known.leader is None and found.leader is not None):
                trees[found.token] = found
        by_lock = self._found_by_lock({tree.agent_id for tree in trees.values()})
        return [*trees.values(), *by_lock, *self._found_by_tag({*trees, *(tree.token for tree in by_lock)})]

    def _found_by_tag(self, explained: Collection[str]) -> list[Found]:
        """Trees of which only that is left which shed session, environment and descriptors: its mark tells of it."""
        records = {tag.of(str(record.get("token"))): (agent_id, record) for agent_id, record in locks.records(self.paths).items()}
        found: dict[str, Found] = {}
        for stat in sorted(procfs.snapshot().values(), key=lambda stat: stat.start_ticks):
            mark = tag.read(stat.pid) if stat.alive and stat.sid and stat.pid != os.getpid() else None
            tree = _found(_as_environment(*records[mark]), stat) if mark is not None and mark in records else None
            if tree and tree.token not in explained:
                found.setdefault(tree.token, replace(tree, leader=None))  # it is not what was started
        return list(found.values())

    def _found_by_lock(self, explained: Collection[str]) -> list[Found]:
        """Trees whose processes wrote over their environment, as servers do that show a title: a held lock tells of them."""
        records = {
            agent_id: record
            for agent_id, record in locks.records(self.paths).items()
            if agent_id not in explained and locks.is_held(self.paths, agent_id)
        }
        if not records:
            return []
        stats = sorted(procfs.snapshot().values(), key=lambda stat: stat.start_ticks)
        files = {stat.pid: procfs.open_files(stat.pid) for stat in stats if stat.alive and stat.pid != os.getpid()}
        found = []
        for agent_id, record in records.items():
            holders = [stat for stat in stats if self.paths.agent_lock(agent_id) in files.get(stat.pid, ())]
            leader = next((stat for stat in holders if stat.sid == stat.pid), None)
            if holders and (tree := _found(_as_environment(agent_id, record), leader or holders[0])) is not None:
                found.append(tree)
        return found

    def trees(self, agents: Sequence[Agent], stats: Mapping[int, procfs.Stat] | None = None) -> dict[str, list[procfs.Stat]]:
        """The live processes of each agent's tree, by agent id."""
        if not agents:
            return {}
        stats = procfs.snapshot() if stats is None else stats
        sessions = {agent.process.pid: agent.id for agent in agents if agent.process and self._is_its_session(agent, stats)}
        tokens = {agent.token: agent.id for agent in agents if agent.token}
        members = {member: agent.id for agent in agents for member in self._members.get(agent.id, ())}
        marks = {tag.of(agent.token): agent.id for agent in agents if agent.token}
        owner: dict[int, str] = {}
        for pid, stat in stats.items():
            if not stat.alive or pid == os.getpid():
                continue
            found = sessions.get(stat.sid) or members.get((pid, stat.start_ticks)) or tokens.get(self._token(stat))
            if found is None and stat.sid and (mark := tag.read(pid)):  # kernel threads have session 0
                found = marks.get(mark)
            if found:
                owner[pid] = found
        for pid in stats:
            _inherit(pid, stats, owner)
        trees: dict[str, list[procfs.Stat]] = {agent.id: [] for agent in agents}
        for pid, agent_id in owner.items():
            if stats[pid].alive:
                trees[agent_id].append(stats[pid])
        for agent in agents:
            if not trees[agent.id] and locks.is_held(self.paths, agent.id):
                trees[agent.id] = self._holders(agent, stats)
        self.remember({agent_id: frozenset((stat.pid, stat.start_ticks) for stat in tree) for agent_id, tree in trees.items()})
        for agent in agents:
            self._members[agent.id] = frozenset(member for member in self._members[agent.id] if member[0] in stats)
        self._tokens = {key: token for key, token in self._tokens.items() if key[0] in stats}
        return trees

    def _is_its_session(self, agent: Agent, stats: Mapping[int, procfs.Stat]) -> bool:
        """A session id outlives its leader, but once the leader is reaped and the session empty, it may be reused.

        Without its leader the session must hold a process with the agent's token: a session that exists keeps its id from reuse.
        """
        process = agent.process
        if process is None or process.boot_id != procfs.boot_id():
            return False
        leader = stats.get(process.pid)
        if leader is not None:
            return leader.start_ticks == process.start_ticks
        return any(stat.sid == process.pid and self._token(stat) == agent.token != "" for stat in stats.values())

    def _token(self, stat: procfs.Stat) -> str:
        key = (stat.pid, stat.start_ticks)
        if key not in self._tokens:
            environ = procfs.environ(stat.pid)
            ours = environ.get(environment.STATE_DIR) == self.paths.root
            token = environ.get(environment.TOKEN, "") if ours else ""
            if not environ and stat.sid != 0:
                return token  # in the middle of an exec there is no environment yet: look again; kernel threads (session 0) have none
            self._tokens[key] = token
        return self._tokens[key]

    def _holders(self, agent: Agent, stats: Mapping[int, procfs.Stat]) -> list[procfs.Stat]:
        """Who holds the lock, by looking through all open files: dear, and only done when the lock says that somebody does."""
        path = self.paths.agent_lock(agent.id)
        me = os.getpid()
        return [stat for pid, stat in stats.items() if pid != me and stat.alive and path in procfs.open_files(pid)]


def reference(stat: procfs.Stat) -> ProcessRef:
    return ProcessRef(pid=stat.pid, start_ticks=stat.start_ticks, boot_id=procfs.boot_id())


def _inherit(pid: int, stats: Mapping[int, procfs.Stat], owner: dict[int, str]) -> None:
    """Give a process, and those between, to the agent that the nearest ancestor belongs to."""
    path: list[int] = []
    while pid in stats and pid not in owner:
        if pid == os.getpid():
            return  # everything descends from us: an agent may even have started us
        path.append(pid)
        pid = stats[pid].ppid
        if pid in path:
            return
    if pid in owner:
        owner.update(dict.fromkeys(path, owner[pid]))


def _as_environment(agent_id: str, record: Mapping[str, object]) -> dict[str, str]:
    """A lock's record in the words of an agent's environment, so that both are read in one way."""
    fleet = record.get("fleet") or agent_id.rpartition("-")[0]
    return {
        environment.AGENT_ID: agent_id,
        environment.FLEET: str(fleet),
        environment.SLOT: str(record.get("slot", 0)),
        environment.TOKEN: str(record.get("token") or f"lock-of-{agent_id}"),
        environment.SPEC_HASH: str(record.get("spec_hash", "")),
        environment.LAUNCH: str(record.get("launch", "")),
    }


def _found(environ: Mapping[str, str], stat: procfs.Stat) -> Found | None:
    """The tree that this environment tells of; None where it was not written by us."""
    agent_id, fleet, slot = (environ.get(name, "") for name in (environment.AGENT_ID, environment.FLEET, environment.SLOT))
    sound = re.fullmatch(NAME_PATTERN, fleet) and re.fullmatch(AGENT_ID_PATTERN, agent_id) and re.fullmatch("[0-9]{1,6}", slot)
    if not sound or not environ.get(environment.TOKEN) or agent_id.rpartition("-")[0] != fleet:
        return None
    return Found(
        agent_id=agent_id,
        fleet=fleet,
        slot=int(slot),
        token=environ[environment.TOKEN],
        spec_hash=environ.get(environment.SPEC_HASH, ""),
        leader=reference(stat) if stat.sid == stat.pid else None,
        started_at=procfs.boot_time() + stat.start_ticks / procfs.TICKS_PER_SECOND,
        # The kernel counts from the boot with sleep, our deadlines without.
        started_clock=stat.start_ticks / procfs.TICKS_PER_SECOND - (time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()),
        suspended=stat.state == "T" and environ.get(environment.LAUNCH) == "warm",
    )
