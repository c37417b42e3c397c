"""What agents keep, looked after beside the loop of their fleet: saved before they stop, saved and taken away when they leave, and given
to those that are restored.

Knows no states of agents. What comes of its work is told from the event loop; what did not work is tried again every few seconds.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from fleetctl.errors import FleetctlError
from fleetctl.models import Agent, Checkpoint, FleetSpec, Saved, Saving, signal_number
from fleetctl.ports import CheckpointStore, Clock, LifecycleManager

T = TypeVar("T")

RETRY_SECONDS = 5.0
_SPONTANEOUS_SECONDS = 1.0
_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"


def new_id(now: float, source: random.Random) -> str:
    """The id of a checkpoint; they sort by time. `now`: Unix time in seconds."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%dt%H%M%S}-{''.join(source.choices(_LETTERS, k=5))}"


class Keeping:
    """One fleet's. `store` None: nothing is ever saved."""

    def __init__(self, store: CheckpointStore | None, lifecycle: LifecycleManager, clock: Clock) -> None:
        self._store, self._lifecycle, self._clock = store, lifecycle, clock
        self._tasks: dict[str, asyncio.Task[Any]] = {}  # by agent, one at a time; Any: each of its own kind
        self._turns: dict[str, asyncio.Lock] = {}
        self._answers: dict[str, asyncio.Event] = {}  # of agents that were asked for a checkpoint
        self._retries: dict[str, float] = {}
        self._spontaneous: dict[str, float] = {}
        self._news: set[str] = set()
        self.problems: dict[str, str] = {}
        """By agent, why what it keeps cannot be saved now."""

    def saving_of(self, agent: Agent, spec: FleetSpec) -> Saving:
        """What is to be saved before this agent is asked to stop. One of the warm pool was nobody yet."""
        if self._store is None or not spec.graceful_drain.checkpoint_before_drain or agent.pooled or agent.process is None:
            return Saving.NO
        if agent.ready and (spec.graceful_drain.checkpoint_signal or spec.checkpoints.command):
            return Saving.ASK
        return Saving.COPY if self.keeps_something(agent) else Saving.NO

    def keeps_something(self, agent: Agent) -> bool:
        return self._store is not None and (bool(agent.resume_token) or not self._store.keeps_nothing(agent))

    # -- work beside the loop

    def begin(self, agent_id: str, work: Coroutine[Any, Any, T], done: Callable[[T | None], None]) -> None:
        """Do this for the agent. `done` is told what came of it, None where it did not work; `problems` and `due` then know."""
        task = self._tasks[agent_id] = asyncio.ensure_future(work)
        task.add_done_callback(lambda task: None if task.cancelled() else done(self._outcome(agent_id, task)))

    def _outcome(self, agent_id: str, task: "asyncio.Task[T]") -> T | None:
        del self._tasks[agent_id]
        error = task.exception()
        if error is None:
            self.calm(agent_id)
            return task.result()
        if not isinstance(error, FleetctlError | OSError):
            raise error
        problem = error.message if isinstance(error, FleetctlError) else str(error)
        if self.problems.get(agent_id) != problem:
            self._news.add(agent_id)
        self.problems[agent_id] = problem
        self._retries[agent_id] = self._clock.monotonic() + RETRY_SECONDS
        return None

    def is_busy(self, agent_id: str) -> bool:
        return agent_id in self._tasks

    def is_news(self, agent_id: str) -> bool:
        """Whether its problem is another than when this was asked last."""
        news = agent_id in self._news
        self._news.discard(agent_id)
        return news

    def due(self, agent_id: str) -> bool:
        """Whether work for this agent may begin now."""
        return agent_id not in self._tasks and self._retries.get(agent_id, 0.0) <= self._clock.monotonic()

    def calm(self, agent_id: str) -> None:
        """Nothing is to be tried again for this agent."""
        self._retries.pop(agent_id, None)
        self.problems.pop(agent_id, None)
        self._news.discard(agent_id)

    def hurry(self, agent_id: str) -> None:
        """Try again at once."""
        self._retries.pop(agent_id, None)

    def forget(self, agent_id: str) -> None:
        self.calm(agent_id)
        self._turns.pop(agent_id, None)
        self._spontaneous.pop(agent_id, None)

    def retry_at(self, agent_id: str) -> float | None:
        """When to try again, in seconds of the boot's clock; None where nothing failed, or work is under way."""
        return None if agent_id in self._tasks else self._retries.get(agent_id)

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    # -- the work

    async def take(self, agent: Agent, spec: FleetSpec, *, checkpoint_id: str, reason: str, ask: bool) -> Saved:
        """Save what it keeps; `ask`: have it, or the command for it, write that first. Raises FleetctlError, OSError."""
        store, commanded = self._there(), False
        async with self._turn(agent.id):
            if ask and spec.graceful_drain.checkpoint_signal:
                await self._ask(agent, spec, spec.graceful_drain.checkpoint_signal)
            if ask and spec.checkpoints.command:
                await store.prepare(agent)
                await store.command(agent, spec)
                commanded = True
            return await store.save(agent, spec.checkpoints, checkpoint_id=checkpoint_id, reason=reason, commanded=commanded)

    async def retire(self, agent: Agent, spec: FleetSpec, reason: str) -> Saved:
        """Save what it kept to the end, and take that away once it is saved; only that of one that never did any work."""
        store, never_started = self._there(), not agent.token
        async with self._turn(agent.id):
            if agent.pooled or never_started:
                await store.clear(agent)
                return Saved(checkpoint=None)
            saved = await store.save(agent, spec.checkpoints, checkpoint_id=agent.checkpoint, reason=reason)
            if saved.complete:
                await store.clear(agent)
            return saved

    async def fill(self, agent: Agent) -> bool:
        """Give it what its checkpoint has. Raises FleetctlError."""
        async with self._turn(agent.id):
            await self._there().fill(agent)
        return True

    async def find(self, checkpoint_id: str) -> Checkpoint:
        return await self._there().find(checkpoint_id)

    async def _ask(self, agent: Agent, spec: FleetSpec, name: str) -> None:
        """Wait until it says that it has written one. One that never says so has had its time."""
        await self._there().prepare(agent)
        told = self._answers[agent.id] = asyncio.Event()
        try:
            self._lifecycle.signal([agent], signal_number(name))
            async with asyncio.timeout(spec.graceful_drain.checkpoint_timeout_seconds):
                await told.wait()
        except TimeoutError:
            return
        finally:
            del self._answers[agent.id]

    def told(self, agent_id: str) -> bool:
        """The agent says that it has written a checkpoint. Whether that is one nobody asked for, and worth to be saved now."""
        waiting = self._answers.get(agent_id)
        if waiting is not None:
            waiting.set()
            return False
        now = self._clock.monotonic()
        if self._store is None or not self.due(agent_id) or now < self._spontaneous.get(agent_id, 0.0):
            return False
        self._spontaneous[agent_id] = now + _SPONTANEOUS_SECONDS
        return True

    def _there(self) -> CheckpointStore:
        if self._store is None:
            raise FleetctlError("nothing keeps checkpoints here")
        return self._store

    @asynccontextmanager
    async def _turn(self, agent_id: str) -> AsyncIterator[None]:
        """One agent's checkpoints are taken one after the other."""
        async with self._turns.setdefault(agent_id, asyncio.Lock()):
            yield
