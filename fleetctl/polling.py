"""Reads the metrics of one fleet that are found outside of its agents, each in its own time: a slow or hanging one delays nothing."""

import asyncio
import contextlib
import threading
from collections.abc import Callable

from fleetctl.core.observation import Polled
from fleetctl.errors import FleetctlError
from fleetctl.models import FleetSpec, MetricSpec
from fleetctl.ports import Clock, MetricReader

# A reader has a time limit of its own; this is how long past it nobody waits for it any more.
_GRACE_SECONDS = 1.0


class Polling:
    """Keeps a task for each metric that has a source. Create it in a running loop, `update` it, and `close` it at the end."""

    def __init__(self, reader: MetricReader, clock: Clock) -> None:
        self._reader, self._clock = reader, clock
        self._tasks: dict[str, tuple[MetricSpec, asyncio.Task[None]]] = {}
        self.polled: dict[str, Polled] = {}

    def update(self, spec: FleetSpec) -> None:
        """Read what this spec names, while the load is to decide; and nothing else."""
        wanted = {name: one for name, one in spec.autoscaling.metrics.items() if one.polled} if spec.autoscaling.enabled else {}
        for name in [name for name, (known, _) in self._tasks.items() if wanted.get(name) != known]:
            self._tasks.pop(name)[1].cancel()
            self.polled.pop(name, None)
        for name in wanted.keys() - self._tasks.keys():
            task = asyncio.create_task(self._poll(name, wanted[name], spec), name=f"metric {name} of {spec.name}")
            self._tasks[name] = wanted[name], task

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, name: str, metric: MetricSpec, spec: FleetSpec) -> None:
        while True:
            began = self._clock.monotonic()
            done = _in_thread(lambda: self._reader.read(metric, spec))
            try:
                async with asyncio.timeout(metric.timeout_seconds + _GRACE_SECONDS):
                    value = await asyncio.shield(done)
                self.polled[name] = Polled(at=self._clock.monotonic(), value=value)
            except TimeoutError:
                self.polled[name] = Polled(at=self._clock.monotonic(), error=f"no answer in {metric.timeout_seconds:g} s")
                # One that hangs is asked again only when it is over: each try would cost a thread.
                with contextlib.suppress(Exception):
                    await asyncio.shield(done)
            except FleetctlError as error:
                self.polled[name] = Polled(at=self._clock.monotonic(), error=error.message)
            except Exception as error:  # a mistake of ours must not end the reading of this metric for ever
                self.polled[name] = Polled(at=self._clock.monotonic(), error=f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(max(0.1, began + metric.interval_seconds - self._clock.monotonic()))


def _in_thread(work: Callable[[], float]) -> "asyncio.Future[float]":
    """The result of the work in a thread of its own, which nothing waits for at the end: the daemon must not hang with a source."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[float] = loop.create_future()

    def settle(value: float | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        elif value is not None:
            result.set_result(value)

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants it any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True, name="metric").start()
    return result
