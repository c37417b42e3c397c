"""One sink at work: read on from where it came to, deliver, remember; after a failure wait, longer each time, and try again."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fleetctl.sinks.envelope import Json, cloud_event, loss
from fleetctl.sinks.places import Place, Trouble, place_of
from fleetctl.sinks.progress import load, save
from fleetctl.sinks.settings import SinkSettings

log = logging.getLogger(__name__)

BATCH = 100
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0

Rows = Sequence[tuple[int, Mapping[str, Any]]]  # Any: JSON values
ReadAfter = Callable[[int, int], Awaitable[tuple[int, Rows]]]
"""(after this number, so many) -> the number of the last event there is, and the rows."""


class Pump:
    """Create it in the running loop, `run` it as a task, `notify` it of news, `close` it behind the task."""

    def __init__(
        self,
        settings: SinkSettings,
        read_after: ReadAfter,
        path: str,
        *,
        source: str,
        clock: Callable[[], float],
        make: Callable[[SinkSettings], Place] = place_of,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        self.settings = settings
        self.progress = load(path)
        self._read_after, self._path, self._source, self._clock, self._make = read_after, path, source, clock, make
        self._first_wait_seconds = first_wait_seconds
        self._place: Place | None = None
        self._news = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, f"sink {settings.name}")  # of its own: a place that hangs holds up no other

    def notify(self) -> None:
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        wait = 0.0
        while True:
            self._news.clear()
            try:
                more = await self._step()
            except Exception as error:  # whatever is wrong with a sink must not take the daemon along
                wait = min(max(self._first_wait_seconds, wait * 2), LONGEST_WAIT_SECONDS)
                await self._failed(str(error) if isinstance(error, Trouble) else f"{type(error).__name__}: {error}")
                await asyncio.sleep(wait)
                continue
            wait = 0.0
            if self.progress.trouble:
                log.info("sink %s goes on", self.settings.name)
                self.progress.trouble = ""
                await self._save()
            if not more:
                await self._news.wait()

    async def _step(self) -> bool:
        """Deliver the next events; whether there may be more."""
        progress = self.progress
        last, rows = await self._read_after(-1 if progress.position is None else progress.position, BATCH)
        if progress.position is None:
            progress.position = last  # a new sink hears of what happens from now on
            await self._save()
            return False
        if progress.position > last:  # the database was begun anew
            progress.position = 0
            return True
        progress.waiting = last - progress.position
        if not rows:
            return False
        lost = [(rows[0][0] - 1, loss(progress.position + 1, rows[0][0] - 1, self._clock()))] if rows[0][0] > progress.position + 1 else []
        wanted = [(number, row) for number, row in (*lost, *rows) if self.settings.wants(row) or row["kind"] == "sink.lost"]
        try:
            if wanted:
                await self._in_thread(self._deliver, [cloud_event(row, self._source) for _, row in wanted])
        except Trouble as trouble:
            if trouble.taken:
                self._done(wanted[trouble.taken - 1][0], trouble.taken, last)
                await self._save()
            raise
        self._done(rows[-1][0], len(wanted), last)
        await self._save()
        return True

    def _done(self, position: int, delivered: int, last: int) -> None:
        self.progress.position = position
        self.progress.delivered += delivered
        self.progress.waiting = last - position

    def _deliver(self, events: Sequence[Json]) -> None:
        if self._place is None:
            self._place = self._make(self.settings)
        self._place.deliver(events)

    async def _failed(self, trouble: str) -> None:
        self.progress.failures += 1
        if trouble != self.progress.trouble:
            log.warning("sink %s: %s; its events wait", self.settings.name, trouble)
        self.progress.trouble = trouble
        with contextlib.suppress(OSError):
            await self._save()

    async def _save(self) -> None:
        await self._in_thread(save, self._path, self.progress)

    async def _in_thread(self, work: Callable[..., None], *values: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)

    def close(self, *, wait: bool = False) -> None:
        """Let go of the place and of the thread; with `wait`, return when it does nothing any more, however long a place hangs."""
        if self._place is not None:
            self._place.close()
        self._thread.shutdown(wait=wait, cancel_futures=True)
