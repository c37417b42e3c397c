"""Being woken by what happens in the cluster, in threads that do nothing else."""

import json
from collections.abc import Sequence
from threading import Event, Thread
from typing import Any

from fleetctl.engines.kubernetes import names
from fleetctl.engines.kubernetes.api import Api, Stream
from fleetctl.errors import FleetctlError

AGAIN_SECONDS = 1.0


class Alarm:
    """Rings when something of ours changes. A watch that breaks is begun anew; that rings too, as something may have been missed."""

    def __init__(self, api: Api, paths: Sequence[str]) -> None:
        self._api = api
        self._ring, self._closed = Event(), Event()
        self._streams: dict[str, Stream] = {}
        self._threads = [Thread(target=self._watch, args=(path,), daemon=True, name=f"watch {path}") for path in paths]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> None:
        """Until it rings, at most so long."""
        self._ring.wait(seconds)
        self._ring.clear()

    def rest(self, seconds: float) -> None:
        """So long, whatever rings."""
        if seconds > 0:
            self._closed.wait(seconds)

    def close(self) -> None:
        self._closed.set()
        for stream in list(self._streams.values()):
            stream.close()

    def _watch(self, path: str) -> None:
        while not self._closed.is_set():
            try:
                stream = self._streams[path] = self._api.watch(path, labels=names.ours())
                for _ in stream:
                    self._ring.set()
                stream.close()
            except FleetctlError:
                pass  # whoever asks for the status meets the same error, and can tell it
            self._ring.set()
            self._closed.wait(AGAIN_SECONDS)


def parsed(line: bytes) -> dict[str, Any]:  # Any: an event of a watch
    """One line of a watch; empty where it was cut off."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
