"""What agents of a cluster write: read once, or followed over restarts of their containers. The kubelet keeps it, not we."""

from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import time

from fleetctl.engines.kubernetes import names
from fleetctl.engines.kubernetes.api import Api, ApiError, Query, Stream, path_of
from fleetctl.engines.kubernetes.times import rfc3339
from fleetctl.errors import FleetctlError

AGAIN_SECONDS = 1.0
LAST_LINES = 10


def tail(api: Api, pod: str, lines: int | None, since: float | None) -> Iterator[bytes]:
    """The last lines, those since a Unix time; none where the container has not started yet."""
    try:
        raw = api.text(_path(api, pod), _query(lines, since))
    except ApiError as error:
        if error.status in (400, 404):  # not started, or gone with its node
            return iter(())
        raise
    return iter(raw.removesuffix(b"\n").split(b"\n") if raw else ())


def last_lines(api: Api, pod: str) -> list[str]:
    """Of a container that ended and is to be started again: what the one before wrote. Harmless to show."""
    found: list[bytes] = []
    for before in (False, True):
        with suppress(FleetctlError):
            raw = api.text(_path(api, pod), {**_query(LAST_LINES, None), "previous": before or None})
            found = raw.removesuffix(b"\n").split(b"\n") if raw.strip() else found
        if found:
            break
    return ["".join(char if char.isprintable() else " " for char in line.decode(errors="replace")) for line in found]


def _path(api: Api, pod: str) -> str:
    return path_of("v1", "Pod", api.target.namespace, pod) + "/log"


def _query(lines: int | None, since: float | None) -> dict[str, str | int | bool | None]:
    return {"container": names.CONTAINER, "tailLines": lines, "sinceTime": None if since is None else rfc3339(since)}


class Follower:
    """Follows one agent in a thread of its own. Lines carry the kubelet's times, by which none is shown twice after a break."""

    def __init__(self, api: Api, pod: str, lines: int | None, since: float | None) -> None:
        self._api, self._pod = api, pod
        self._lines: SimpleQueue[bytes] = SimpleQueue()
        self._ended = Event()
        self._stream: Stream | None = None
        self._last = ""
        self._failure: FleetctlError | None = None
        self._thread = Thread(target=self._run, args=(_query(lines, since),), daemon=True, name=f"logs of {pod}")
        self._thread.start()

    def read(self) -> list[bytes]:
        """Lines since the last call. Raises what ended the following, once all that came before is read."""
        found: list[bytes] = []
        with suppress(Empty):
            while True:
                found.append(self._lines.get_nowait())
        if not found and self._failure is not None:
            raise self._failure
        return found

    def close(self) -> None:
        self._ended.set()
        if self._stream is not None:
            self._stream.close()

    def _run(self, query: Query) -> None:
        begun = time()
        while not self._ended.is_set():
            try:
                self._stream = self._api.stream(_path(self._api, self._pod), {**query, "follow": True, "timestamps": True})
                for line in self._stream:
                    self._take(line)
                self._stream.close()
            except ApiError as error:
                if error.status == 404:
                    return  # the agent is gone, and with it whatever it would have said
                if error.status != 400:  # 400: not started yet
                    self._failure = error
                    return
            except FleetctlError as error:
                if not self._last:  # else it worked before, and will again
                    self._failure = error
                    return
            # After a break: only what is newer. Seconds are all that the server looks at, so some lines come again.
            query = {"container": names.CONTAINER, "sinceTime": self._last or rfc3339(begun)}
            self._ended.wait(AGAIN_SECONDS)

    def _take(self, line: bytes) -> None:
        """ "2026-01-31T12:00:00.123456789Z text" """
        at, _, text = line.rstrip(b"\n").partition(b" ")
        moment = at.decode("ascii", errors="replace")
        if self._last and _order(moment) <= _order(self._last):
            return
        self._last = moment
        self._lines.put(text)


def _order(moment: str) -> tuple[str, str]:
    """Times of unlike length, in order: the kubelet leaves zeros at the end out."""
    whole, _, rest = moment.removesuffix("Z").partition(".")
    return whole, rest.ljust(9, "0")
