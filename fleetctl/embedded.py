"""One fleet inside a program: opens this machine's hands, adopts what still runs, makes the rounds, and leaves nothing behind.

The composition root of `FleetManager`, as `daemon/main.py` is the daemon's. It touches nothing that belongs to the program around it:
no signal, no child that is not an agent's, no limit, no umask.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fleetctl.core.orders import Wish
from fleetctl.core.recover import with_acquired
from fleetctl.daemon.hands import expire_checkpoints, local_fleet
from fleetctl.daemon.hearing import Hearing
from fleetctl.daemon.rounds import Rounds
from fleetctl.errors import FleetctlError, StateDirectoryError, UsageError
from fleetctl.fleet import Fleet, recovered
from fleetctl.host import procfs
from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.clock import SystemClock
from fleetctl.host.commands import end_leftovers
from fleetctl.host.metrics import LocalResourceManager
from fleetctl.host.paths import Paths
from fleetctl.host.private import PrivateDirectory, clear_abandoned
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.state import DirectoryLock, LocalStateManager
from fleetctl.models import Agent, Event, FleetSpec, ScalingDecision, Usage
from fleetctl.ports import Archive, Clock, Finder, LifecycleManager, ResourceManager, StateManager

log = logging.getLogger(__name__)

KEPT_DECISIONS, KEPT_ERRORS = 1000, 20
_TROUBLE_SECONDS = 5.0
_END_AGAIN_SECONDS = 0.02

# From what is stored of the fleet, if anything, to the spec to go on with.
SpecOf = Callable[[Mapping[str, Any] | None], FleetSpec]  # Any: JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Managers:
    """The specification's three, as a program gave them; with none of them this machine's are made."""

    lifecycle: LifecycleManager | None = None
    state: StateManager | None = None
    resources: ResourceManager | None = None

    @property
    def given(self) -> bool:
        return any(one is not None for one in (self.lifecycle, self.state, self.resources))


@dataclass(frozen=True, slots=True, kw_only=True)
class _LocalManagers(Managers):
    """This machine's, made here and so closed here."""

    lifecycle: LocalLifecycleManager
    state: LocalStateManager
    resources: LocalResourceManager


class Ledger:
    """`ports.StateManager` over another one, or over none at all; also remembers the last decisions and errors, in memory."""

    def __init__(self, inner: StateManager | None, decisions: Iterable[ScalingDecision] = ()) -> None:
        self._inner = inner
        self.decisions: deque[ScalingDecision] = deque(decisions, KEPT_DECISIONS)

    async def save(
        self,
        agents: Iterable[Agent] = (),
        *,
        forget: Iterable[str] = (),
        events: Iterable[Event] = (),
        history: Iterable[tuple[str, ScalingDecision]] = (),
    ) -> None:
        decided = list(history)
        if self._inner is not None:
            await self._inner.save(agents, forget=forget, events=events, history=decided)
        self.decisions.extend(decision for _, decision in decided)

    async def save_wish(self, spec: FleetSpec, *, down: bool) -> None:
        if self._inner is not None:
            await self._inner.save_wish(spec, down=down)

    async def forget_wish(self, name: str) -> None:
        if self._inner is not None:
            await self._inner.forget_wish(name)

    async def save_scaling(self, fleet: str, memory: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        if self._inner is not None:
            await self._inner.save_scaling(fleet, memory, samples)

    async def load_scaling(self, fleet: str) -> Mapping[str, Any] | None:
        return None if self._inner is None else await self._inner.load_scaling(fleet)

    async def save_spending(self, fleet: str, spending: Mapping[str, Any]) -> None:
        if self._inner is not None:
            await self._inner.save_spending(fleet, spending)

    async def load_spending(self, fleet: str) -> Mapping[str, Any] | None:
        return None if self._inner is None else await self._inner.load_spending(fleet)


class Home:
    """A fleet and all that it needs. `open` it in the running loop, and `close` it in the same; no fleet where nothing could start it."""

    def __init__(self, name: str, managers: Managers, clock: Clock | None) -> None:
        self.name = name
        self.clock = clock or SystemClock()
        self.fleets: dict[str, Fleet] = {}
        self.usage: Mapping[str, Usage] = {}
        self.ledger = Ledger(managers.state)
        self.errors: deque[Event] = deque(maxlen=KEPT_ERRORS)
        """The last events that carry an error's code, such as E2093 of a drain that took too long."""
        self.problem: str | None = None
        """Why the fleet is not looked after any more; for people."""
        self.measures = False
        self.loop = asyncio.get_running_loop()
        self._managers = managers
        self._checkpoints: LocalCheckpointStore | None = None
        self._changed = asyncio.Event()
        self._stack = AsyncExitStack()
        self._paths: Paths | None = None
        self._fresh = False  # a directory that did not exist before, so that no agent of it can be there

    @classmethod
    async def open(
        cls, name: str, spec_of: SpecOf, managers: Managers, *, state_dir: str | None = None, clock: Clock | None = None
    ) -> "Home":
        """Raises StateDirectoryError, ConfigError; DaemonRunning or KeptByProgram where that directory has a keeper."""
        home = cls(name, managers, clock)
        try:
            await home._open(spec_of, state_dir)
        except BaseException:
            await home._stack.aclose()
            raise
        return home

    async def close(self) -> None:
        """End every agent as `down` does, and let go of everything; a directory of our own goes too."""
        try:
            if self.fleet is not None:
                await self._end_all(self.fleet)
        finally:
            await self._stack.aclose()
            self.announce()

    async def _open(self, spec_of: SpecOf, state_dir: str | None) -> None:
        own = None if self._managers.given else self._local(state_dir)
        self._managers = own or self._managers
        lifecycle, state = self._managers.lifecycle, self._managers.state
        ours = {one.paths.root: one.paths for one in (lifecycle, state) if isinstance(one, LocalLifecycleManager | LocalStateManager)}
        lock = None
        for paths in ours.values():
            paths.prepare()
            lock = DirectoryLock(paths, program=True)
            self._stack.callback(lock.release)
        if own is not None:
            self._stack.callback(own.resources.close)
            self._stack.push_async_callback(own.state.close)
        # Of one directory only: where the two managers have different ones, the agents' logs are the lifecycle manager's.
        self._paths = lifecycle.paths if isinstance(lifecycle, LocalLifecycleManager) else None
        records, stored = await self._recall(state)
        spec = spec_of(stored)
        if lifecycle is None:
            return
        hearing = self._hear(lifecycle) if isinstance(lifecycle, LocalLifecycleManager) else None
        if isinstance(lifecycle, LocalLifecycleManager):
            self._checkpoints = store = LocalCheckpointStore(lifecycle)
            store.tidy()
            self._stack.callback(store.close)
        self.fleets[self.name] = fleet = await self._adopt(lifecycle, spec, records, wanted=stored is not None)
        self._stack.push_async_callback(fleet.close)
        if hearing is not None:
            hearing.listen()
        fleet.start().add_done_callback(self._fleet_ended)
        self.measures = self._managers.resources is not None
        more = [hearing.keep_open] if hearing is not None else []
        if self._checkpoints is not None:
            more.append(partial(expire_checkpoints, self._checkpoints, self.fleets))
        rounds = Rounds(self, self._managers.resources, paths=self._paths, lock=lock, more=more)
        if self._paths is not None:
            # Waited for: what its thread does must not meet a directory that is being removed.
            self._stack.push_async_callback(asyncio.to_thread, rounds.close, wait=True)
        else:
            self._stack.callback(rounds.close)
        making_rounds = asyncio.create_task(rounds.run(), name=f"rounds of {self.name}")
        self._stack.push_async_callback(_cancel, making_rounds)

    def _hear(self, lifecycle: LocalLifecycleManager) -> Hearing:
        """Open before the first agent that may say something, however fast it is."""
        end_leftovers(lifecycle.paths.root)
        hearing = Hearing(lifecycle, self.fleets)
        hearing.open()
        self._stack.callback(hearing.close)
        return hearing

    def _local(self, state_dir: str | None) -> "_LocalManagers":
        """This machine's hands, over the given directory or one of our own."""
        if state_dir is None:
            private = PrivateDirectory()
            self._stack.callback(private.remove)
            self._fresh = True
            clearing = asyncio.create_task(asyncio.to_thread(clear_abandoned))  # beside the rest: some of it takes its time
            self._stack.push_async_callback(_finished, clearing)
        root = private.root if state_dir is None else os.path.realpath(os.path.expanduser(state_dir))
        return _LocalManagers(lifecycle=LocalLifecycleManager(root), state=LocalStateManager(root), resources=LocalResourceManager())

    async def _recall(self, state: StateManager | None) -> tuple[list[Agent], Mapping[str, Any] | None]:
        """What an earlier program left on record of this fleet: its agents, and its stored spec unless it was taken down."""
        archive: object = state
        if state is None or not isinstance(archive, Archive):
            return [], None
        records = [agent for agent in await archive.open() if agent.fleet == self.name]
        rows = await archive.last("history", self.name, KEPT_DECISIONS)
        known = ScalingDecision.__dataclass_fields__
        decisions = [ScalingDecision(**{key: value for key, value in row.items() if key in known}) for row in rows]
        self.ledger = Ledger(state, decisions)
        wish = await archive.read_wish(self.name)
        return records, wish["spec"] if wish is not None and not wish["down"] else None

    async def _adopt(self, lifecycle: LifecycleManager, spec: FleetSpec, records: list[Agent], *, wanted: bool) -> Fleet:
        found = lifecycle.find() if isinstance(lifecycle, Finder) and not self._fresh else ()
        trees = [tree for tree in found if tree.fleet == self.name]
        agents = recovered(spec, records, trees, lifecycle=lifecycle, clock=self.clock, boot_id=procfs.boot_id())
        grown, agents = with_acquired(spec, agents) if wanted else (spec, agents)
        if wanted:  # its settings may be others than the stored ones
            await self.ledger.save_wish(grown, down=False)
        spending = await self.ledger.load_spending(self.name) if wanted else None
        wish = Wish(spec=grown, pool_alone=wanted)
        if isinstance(lifecycle, LocalLifecycleManager) and self._checkpoints is not None:
            if wanted and grown.sockets:
                lifecycle.sockets.restore(grown, [agent.process for agent in agents if agent.process])
            return local_fleet(
                wish,
                lifecycle=lifecycle,
                state=self.ledger,
                checkpoints=self._checkpoints,
                clock=self.clock,
                agents=agents,
                spending=spending,
                on_change=self.announce,
                on_event=self._tell,
            )
        return Fleet(
            wish,
            lifecycle_manager=lifecycle,
            state_manager=self.ledger,
            clock=self.clock,
            agents=agents,
            spending=spending,
            on_change=self.announce,
            on_event=self._tell,
        )

    @property
    def fleet(self) -> Fleet | None:
        return self.fleets.get(self.name)

    # -- what the rounds need

    @property
    def lifecycle(self) -> LifecycleManager:
        assert self._managers.lifecycle is not None  # without it there is no fleet, and nothing to look after
        return self._managers.lifecycle

    def measured(self, usage: Mapping[str, Usage]) -> None:
        self.usage = usage
        self.announce()

    async def wait_change(self, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.changed.wait()

    def directory_lost(self) -> None:
        self._give_up("the state directory was removed or replaced")

    # -- what happens

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of anything; take it before looking, and wait for it after that."""
        return self._changed

    def announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _tell(self, event: Event) -> None:
        level = logging.WARNING if "code" in event.data else logging.INFO
        log.log(level, "%s: %s", event.kind, event.message)
        if "code" in event.data:
            self.errors.append(event)

    def _fleet_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.critical("%s broke; its agents run on", task.get_name(), exc_info=error)
            self._give_up(f"its loop broke: {error!r}")

    def _give_up(self, problem: str) -> None:
        if self.problem is None:
            log.critical("%s: %s", self.name, problem)
            self.problem = problem
            self.announce()

    # -- the end

    async def _end_all(self, fleet: Fleet) -> None:
        """As `down` does it; where the disk or our own loop does not let it, by force."""
        if not self.problem:
            try:
                await fleet.take_down(now=False)
            except StateDirectoryError as error:
                log.error("%s: %s", self.name, error.message)
                fleet.supervisor.set_wish(replace(fleet.wish, down=True))
        troubled_at: float | None = None
        while not fleet.supervisor.empty:
            changed, now = self.changed, self.loop.time()
            stuck = self.problem or fleet.supervisor.trouble or next(iter(fleet.supervisor.unsaved.values()), None)
            troubled_at = None if not stuck else now if troubled_at is None else troubled_at
            if self.problem or (troubled_at is not None and now >= troubled_at + _TROUBLE_SECONDS):
                await self._end_by_force(fleet, str(stuck))
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(None if troubled_at is None else troubled_at + _TROUBLE_SECONDS - now):
                    await changed.wait()
        await fleet.close()
        if isinstance(self.lifecycle, LocalLifecycleManager):
            self.lifecycle.sockets.close(self.name)
        with suppress(StateDirectoryError):  # nothing of the fleet is left, whatever the disk says
            await self.ledger.forget_wish(self.name)

    async def _end_by_force(self, fleet: Fleet, why: str) -> None:
        log.error("%s: its agents are killed, because they cannot be stopped in order: %s", self.name, why)
        await fleet.close()
        agents = list(fleet.agents)
        while True:
            self.lifecycle.kill(agents)
            if not any(self.lifecycle.survivors(agents).values()):
                return
            await asyncio.sleep(_END_AGAIN_SECONDS)

    def check_loop(self) -> None:
        """Raise UsageError where this is not the event loop that the fleet lives in."""
        if asyncio.get_running_loop() is not self.loop:
            raise UsageError(
                f"fleet {self.name} lives in another event loop, which it was initialized in",
                hint="call all methods of a FleetManager within one asyncio.run",
            )

    def check(self) -> None:
        """Raise where the fleet is not looked after any more."""
        if self.problem is not None:
            raise FleetctlError(f"fleet {self.name} is not looked after any more: {self.problem}")


async def _finished(task: "asyncio.Task[None]") -> None:
    with suppress(Exception):  # it is nothing to this program
        await task


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
