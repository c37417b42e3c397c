"""A simulated fleet at work: replicas that take time to start, a pool of warm ones, slots that serve requests, and the queue before them.

Requests flow like a fluid, so a step costs the same whatever the load, and the result is exact for that fluid: every wait comes from
the times at which a request arrived and at which a slot took it, first come first served. Waits that chance causes within a step,
a few service times long, are not in it. Times are seconds since the start of the simulation.
"""

from collections import deque
from dataclasses import dataclass
from math import exp, inf, log

from fleetctl.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantSpec:
    """The fleet's properties. `cores`: of the host, None for plenty; `replica_cores`: what a replica uses with all its slots busy;
    `cpu_limit`: what it might use, which an agent with one thread never reaches.
    """

    service_seconds: float = 1.0
    slots: int = 1
    cold_seconds: float = 10.0
    warm_seconds: float = 0.1
    pool_size: int = 5
    refill_seconds: float = 10.0
    cores: float | None = None
    replica_cores: float = 1.0
    cpu_limit: float = 1.0

    def __post_init__(self) -> None:
        positive = ("service_seconds", "slots", "refill_seconds", "replica_cores", "cpu_limit")
        for name in (*positive, "cold_seconds", "warm_seconds", "pool_size", "cores"):
            value = getattr(self, name)
            if value is not None and not (0 < value <= 1e6 if name in (*positive, "cores") else 0 <= value <= 1e6):
                raise UsageError(f"{name.replace('_', ' ')} cannot be {value:g}")

    @property
    def host_slots(self) -> float:
        """Busy slots that the host's cores carry at full speed."""
        return inf if self.cores is None else self.cores * self.slots / self.replica_cores


@dataclass(frozen=True, slots=True)
class Waits:
    """So many requests that waited, their waits spread evenly between `first` and `last` seconds."""

    requests: float
    first: float
    last: float

    def over(self, seconds: float) -> float:
        """How many of them waited longer than this."""
        low, high = (self.first, self.last) if self.first < self.last else (self.last, self.first)
        if high <= seconds:
            return 0.0
        return self.requests if low >= seconds else self.requests * (high - seconds) / (high - low)


class Plant:
    """The fleet's state between two steps; `resize` and `advance` change it."""

    def __init__(self, spec: PlantSpec, replicas: int, window_seconds: float = 15.0) -> None:
        self.spec, self.window_seconds = spec, window_seconds
        self.now = 0.0
        self.ready = replicas
        self.starting: list[tuple[float, int]] = []
        self.fresh: list[tuple[float, int]] = []
        self.pool = float(spec.pool_size)
        self.inside = 0.0  # requests in work or waiting
        self.unwaited = 0.0
        self.waits: list[Waits] = []
        self.busy_seconds = 0.0  # slots at full speed, over time
        self.occupied_seconds = 0.0  # slots with a request in them, over time: more, where the host is short of cores
        self._queue: deque[tuple[float, float, float]] = deque()  # requests waiting, and from when to when they arrived
        self._serving = min(replicas * spec.slots, spec.host_slots)

    @property
    def replicas(self) -> int:
        return self.ready + sum([count for _, count in self.starting]) if self.starting else self.ready

    @property
    def pending(self) -> float:
        """Requests that wait for a slot."""
        return max(0.0, self.inside - self.ready * self.spec.slots)

    @property
    def settled(self) -> int:
        """Replicas that have been ready for a whole window."""
        if not self.fresh:
            return self.ready
        self.fresh = [one for one in self.fresh if one[0] > self.now - self.window_seconds]
        return max(0, self.ready - sum([count for _, count in self.fresh]))

    def resize(self, replicas: int) -> None:
        """Start replicas, warm ones first, or remove some: those that are not ready yet, then others, which finish what they have."""
        more = replicas - self.replicas
        if more > 0:
            warm = min(more, int(self.pool))
            self.pool -= warm
            cold = more - warm
            self.starting += [(self.now + wait, count) for wait, count in self._delays(warm, cold) if count]
            self.starting.sort()
        while more < 0 and self.starting:
            at, count = self.starting.pop()
            if count + more > 0:
                self.starting.append((at, count + more))
            more = min(0, more + count)
        if more < 0:
            self._set_ready(self.ready + more)

    def advance(self, until: float, requests: float) -> None:
        """Let time pass, with so many requests arriving evenly."""
        rate = requests / (until - self.now)
        while self.starting and self.starting[0][0] <= until:
            at, count = self.starting.pop(0)
            self._flow(max(at, self.now), rate)
            self.fresh.append((self.now, count))
            self._set_ready(self.ready + count)
        self._flow(until, rate)

    def finish(self) -> None:
        """Account for those who still wait when the simulation ends: served at today's speed, or never."""
        waiting = sum(requests for requests, _, _ in self._queue)
        if waiting:
            speed = self._serving / self.spec.service_seconds
            self._serve(waiting, self.now, self.now + waiting / speed if speed else self.now + 1e9)

    def _delays(self, warm: int, cold: int) -> tuple[tuple[float, int], ...]:
        return (self.spec.warm_seconds, warm), (self.spec.cold_seconds, cold)

    def _set_ready(self, ready: int) -> None:
        before, self.ready = self._serving, ready
        self._serving = serving = min(ready * self.spec.slots, self.spec.host_slots)
        if serving > before:
            if self._queue:
                self._serve(serving - before, self.now, self.now)
        elif before > 0:
            # What the removed replicas had in work they finish; those who wait stay in the queue.
            self.inside -= min(self.inside, before) * (1 - serving / before)

    def _flow(self, until: float, rate: float) -> None:
        """Requests arrive and are served until then, with the same replicas all the time."""
        left = until - self.now
        spec = self.spec
        if self.pool < spec.pool_size and left > 0:
            self.pool = min(float(spec.pool_size), self.pool + left / spec.refill_seconds)
        while left > 0:
            full = self.inside > self._serving or (self.inside == self._serving and rate > self._serving / spec.service_seconds)
            passed = self._flow_full(left, rate) if full else self._flow_free(left, rate)
            left -= passed
            self.now += passed
        self.now = until

    def _flow_full(self, left: float, rate: float) -> float:
        """All slots are busy: requests queue. Ends when the queue is empty; the seconds that passed."""
        serving, before = self._serving, self.inside
        speed = serving / self.spec.service_seconds
        surplus = before - serving
        if surplus > (speed - rate) * left:
            passed, self.inside = left, before + (rate - speed) * left
        else:
            passed, self.inside = surplus / (speed - rate), serving
        if rate > 0:
            self._queue.append((rate * passed, self.now, self.now + passed))
        if speed > 0:
            self._serve(speed * passed, self.now, self.now + passed)
        if self.inside <= serving:
            self._queue.clear()
        self.busy_seconds += serving * passed
        self.occupied_seconds += min((before + self.inside) / 2, self.ready * self.spec.slots) * passed
        return passed

    def _flow_free(self, left: float, rate: float) -> float:
        """Slots are free: nobody waits. Ends when all are busy; the seconds that passed."""
        service, before = self.spec.service_seconds, self.inside
        rest = rate * service  # where the number in work tends to
        passed = left
        if rest > self._serving > before:
            passed = min(left, service * log((rest - before) / (rest - self._serving)))
        decay = exp(-passed / service)
        self.inside = rest + (before - rest) * decay
        if passed < left:
            self.inside = self._serving
        self.unwaited += rate * passed
        busy = rest * passed + (before - rest) * service * (1 - decay)
        self.busy_seconds += busy
        self.occupied_seconds += busy
        return passed

    def _serve(self, requests: float, begin: float, end: float) -> None:
        """Take requests out of the queue, evenly between these times, and note how long they waited."""
        queue, pace = self._queue, (end - begin) / requests
        while requests > 1e-12 and queue:
            count, first, last = queue.popleft()
            taken = min(count, requests)
            arrived = first + (last - first) * taken / count
            if taken < count:
                queue.appendleft((count - taken, arrived, last))
            served = begin + pace * taken
            self.waits.append(Waits(taken, max(0.0, begin - first), max(0.0, served - arrived)))
            begin, requests = served, requests - taken
