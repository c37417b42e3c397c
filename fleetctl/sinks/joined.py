"""All sinks of one daemon."""

import asyncio
import time
from typing import TYPE_CHECKING

from fleetctl.errors import ConfigError
from fleetctl.host.paths import Paths
from fleetctl.sinks import settings
from fleetctl.sinks.progress import Progress, load

if TYPE_CHECKING:
    from fleetctl.sinks.pump import Pump, ReadAfter


def settings_path(paths: Paths) -> str:
    return f"{paths.root}/{settings.FILE_NAME}"


def progress_path(paths: Paths, name: str) -> str:
    return f"{paths.root}/sinks/{name}.json"


def progress_of(paths: Paths, name: str) -> Progress:
    """How far the sink came, as it last wrote down."""
    return load(progress_path(paths, name))


class Sinks:
    """Create it in the running loop; `start`, `notify` of each event, `close` at the end."""

    def __init__(self, paths: Paths, read_after: "ReadAfter") -> None:
        self._paths, self._read_after = paths, read_after
        self.pumps: list[Pump] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> str:
        """Begin with what sinks.toml says; what is wrong with it, empty where nothing is. A bad file stops no daemon."""
        try:
            found = settings.read(settings_path(self._paths))
        except ConfigError as error:
            return f"no events are sent anywhere: {error.message}"
        if not found:
            return ""
        from fleetctl.sinks.pump import Pump  # with HTTP and TLS, which a daemon without sinks need not carry

        self.pumps = [
            Pump(one, self._read_after, progress_path(self._paths, one.name), source=self._paths.source, clock=time.time) for one in found
        ]
        self._tasks = [asyncio.create_task(pump.run(), name=f"sink {pump.settings.name}") for pump in self.pumps]
        return ""

    def notify(self) -> None:
        for pump in self.pumps:
            pump.notify()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pump in self.pumps:
            pump.close()
