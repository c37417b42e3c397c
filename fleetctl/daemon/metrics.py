"""What Prometheus is told of the daemon and its fleets: read off when asked, and counted by events where a number has to last.

Names follow Prometheus' conventions: base units, `_total` for what only grows since the daemon started, `process_*` for the process.
"""

import asyncio
import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fleetctl import __version__
from fleetctl.daemon.exposition import Family, Histogram, Labels, counter, gauge, render
from fleetctl.fleet import Fleet
from fleetctl.models import AgentState, Event, Usage
from fleetctl.sinks.progress import Progress

# The pool answers in a few milliseconds, a cold start in seconds.
ACQUIRE_BOUNDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PROBE_SECONDS = 0.001
# Told as zero before they happen, so that a rate has a beginning.
_KINDS = ("agent.started", "agent.exited", "agent.failed", "agent.failing")


class Tally:
    """Counts what happens, from the events and acquisitions of all fleets; forgets fleets that are gone."""

    def __init__(self) -> None:
        self.events: Counter[tuple[str, str]] = Counter()
        self.restarts: Counter[str] = Counter()
        self.decisions: Counter[tuple[str, str, str]] = Counter()
        self.acquired: dict[tuple[str, bool], Histogram] = {}
        self._started: set[str] = set()

    def know(self, agent_ids: Iterable[str]) -> None:
        """These ran before: their next start is a restart."""
        self._started.update(agent_ids)

    def count(self, event: Event) -> None:
        self.events[event.fleet, event.kind] += 1
        if event.kind == "agent.started" and event.agent_id is not None:
            self.restarts[event.fleet] += event.agent_id in self._started
            self._started.add(event.agent_id)
        if event.kind == "fleet.scaled":
            self.decisions[event.fleet, str(event.data.get("action", "")), str(event.data.get("cause", ""))] += 1

    def acquisition(self, fleet: str, seconds: float, *, warm: bool) -> None:
        self.acquired.setdefault((fleet, warm), Histogram(ACQUIRE_BOUNDS)).observe(seconds)

    def keep(self, fleets: Iterable[str], agent_ids: Iterable[str]) -> None:
        """Forget all others, so that what is counted cannot grow for ever."""
        names = set(fleets)
        self._started &= set(agent_ids)
        self.events = Counter({key: number for key, number in self.events.items() if key[0] in names})
        self.restarts = Counter({name: number for name, number in self.restarts.items() if name in names})
        self.decisions = Counter({key: number for key, number in self.decisions.items() if key[0] in names})
        self.acquired = {key: histogram for key, histogram in self.acquired.items() if key[0] in names}


async def loop_lag_seconds() -> float:
    """How much later than asked for the event loop comes back: what everybody waits who wants something of the daemon."""
    clock = asyncio.get_running_loop().time
    before = clock()
    await asyncio.sleep(_PROBE_SECONDS)
    return max(0.0, clock() - before - _PROBE_SECONDS)


def tell(
    fleets: Mapping[str, Fleet],
    usage: Mapping[str, Usage],
    tally: Tally,
    *,
    uptime: float,
    lag: float,
    write_failures: int,
    followers: int,
    sinks: Mapping[str, Progress] | None = None,
) -> str:
    """Everything, as text."""
    known = sorted(fleets.values(), key=lambda fleet: fleet.spec.name)
    tally.keep(fleets, (agent.id for fleet in known for agent in fleet.agents))
    return render(
        [
            *_daemon(len(known), uptime, lag, write_failures, followers),
            *_process(),
            *_sizes(known),
            *_agents(known, usage),
            *_counted(known, tally),
            *_spending(known),
            *_warm_pool(known, tally),
            *_scaling(known, tally),
            *_sinks(sinks or {}),
        ]
    )


def _daemon(fleets: int, uptime: float, lag: float, write_failures: int, followers: int) -> Iterator[Family]:
    yield gauge("fleetctl_build_info", "Always 1; the version of the daemon is its label.", ({"version": __version__}, 1))
    yield gauge("fleetctl_daemon_uptime_seconds", "Since the daemon started.", ({}, uptime))
    yield gauge("fleetctl_daemon_loop_lag_seconds", "How late a timer of a millisecond fired when this was asked for.", ({}, lag))
    yield counter("fleetctl_daemon_write_failures_total", "Changes that could not be written to the state directory.", ({}, write_failures))
    yield gauge("fleetctl_daemon_event_followers", "Callers that follow the events.", ({}, followers))
    yield gauge("fleetctl_fleets", "Fleets that are looked after.", ({}, fleets))


def _sinks(sinks: Mapping[str, Progress]) -> Iterator[Family]:
    waiting = (({"sink": name}, one.waiting) for name, one in sinks.items())
    yield gauge("fleetctl_sink_waiting_events", "Events that are still to be sent.", *waiting)
    delivered = (({"sink": name}, one.delivered) for name, one in sinks.items())
    yield counter("fleetctl_sink_delivered_total", "Events that the sink took, since it was first set up.", *delivered)
    failures = (({"sink": name}, one.failures) for name, one in sinks.items())
    yield counter("fleetctl_sink_failures_total", "Tries that failed, since the sink was first set up.", *failures)
    troubled = (({"sink": name}, bool(one.trouble)) for name, one in sinks.items())
    yield gauge("fleetctl_sink_trouble", "1 while the sink takes nothing.", *troubled)


def _process() -> Iterator[Family]:
    """As every Prometheus client names them."""
    with suppress(OSError, ValueError):
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/stat", encoding="ascii") as file:
            booted = next((int(line.split()[1]) for line in file if line.startswith("btime")), 0)
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        cpu = (int(fields[11]) + int(fields[12])) / tick
        yield counter("process_cpu_seconds_total", "CPU time of the daemon itself, user and system.", ({}, cpu))
        yield gauge("process_start_time_seconds", "When the daemon started, in Unix time.", ({}, booted + int(fields[19]) / tick))
        yield gauge("process_resident_memory_bytes", "Resident memory of the daemon itself.", ({}, int(fields[21]) * page))
        yield gauge("process_virtual_memory_bytes", "Virtual memory of the daemon itself.", ({}, int(fields[20])))
        yield gauge("process_threads", "Threads of the daemon.", ({}, int(fields[17])))
    with suppress(OSError):
        # One of them is the listing's own.
        yield gauge("process_open_fds", "Open descriptors of the daemon.", ({}, len(os.listdir("/proc/self/fd")) - 1))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield gauge("process_max_fds", "Most descriptors the daemon may have.", ({}, soft if soft != resource.RLIM_INFINITY else None))


def _of(fleet: Fleet) -> Labels:
    return {"fleet": fleet.spec.name}


def _sizes(fleets: Sequence[Fleet]) -> Iterator[Family]:
    yield gauge("fleetctl_fleet_desired_replicas", "Agents wished for.", *((_of(one), one.wish.replicas) for one in fleets))
    yield gauge("fleetctl_fleet_ready_replicas", "Agents that are ready.", *((_of(one), one.ready_replicas) for one in fleets))
    yield gauge("fleetctl_fleet_min_replicas", "Fewest agents.", *((_of(one), one.spec.min_replicas) for one in fleets))
    yield gauge("fleetctl_fleet_max_replicas", "Most agents.", *((_of(one), one.spec.max_replicas) for one in fleets))
    paused = ((_of(one), bool(one.wish.paused)) for one in fleets)
    yield gauge("fleetctl_fleet_paused", "1 while none of the fleet runs, because its budget is used up.", *paused)
    troubled = ((_of(one), bool(one.supervisor.trouble)) for one in fleets)
    yield gauge("fleetctl_fleet_trouble", "1 while nothing of the fleet can be changed, because of a full disk, say.", *troubled)


def _agents(fleets: Sequence[Fleet], usage: Mapping[str, Usage]) -> Iterator[Family]:
    states = (
        ({**_of(one), "state": str(state)}, sum(agent.state is state for agent in one.agents)) for one in fleets for state in AgentState
    )
    yield gauge("fleetctl_fleet_agents", "Agents by state, those of the warm pool included.", *states)
    used = {one.spec.name: [usage[agent.id] for agent in one.agents if agent.id in usage and agent.process] for one in fleets}
    cores = ((_of(one), sum(seen.cpu_percent or 0.0 for seen in used[one.spec.name]) / 100) for one in fleets)
    yield gauge("fleetctl_fleet_cpu_cores", "Cores that the fleet's process trees keep busy.", *cores)
    memory = ((_of(one), sum(seen.memory_bytes for seen in used[one.spec.name])) for one in fleets)
    yield gauge("fleetctl_fleet_memory_bytes", "Resident memory of the fleet's process trees, summed.", *memory)
    processes = ((_of(one), sum(seen.processes for seen in used[one.spec.name])) for one in fleets)
    yield gauge("fleetctl_fleet_processes", "Processes in the fleet's trees.", *processes)
    for word, help in (("active", "in work"), ("slots", "the agents can take at a time"), ("pending", "waiting")):
        said = ((_of(one), _sum(getattr(report, word) for report in one.reports.values())) for one in fleets)
        yield gauge(f"fleetctl_fleet_{word}_requests", f"Requests {help}, as the agents that report it say.", *said)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _counted(fleets: Sequence[Fleet], tally: Tally) -> Iterator[Family]:
    names = [one.spec.name for one in fleets]
    restarts = (({"fleet": name}, tally.restarts[name]) for name in names)
    yield counter("fleetctl_fleet_restarts_total", "Starts of agents that had run before.", *restarts)
    kinds = sorted({*tally.events, *((name, kind) for name in names for kind in _KINDS)})
    events = (({"fleet": name, "kind": kind}, tally.events[name, kind]) for name, kind in kinds)
    yield counter("fleetctl_events_total", "What happened, by the kind that `fleetctl events` shows.", *events)


def _spending(fleets: Sequence[Fleet]) -> Iterator[Family]:
    told = ("Tokens that the agents say they took in or gave out, since the fleet came up.", "US dollars that they say they spent.")
    tokens = [({**_of(one), "direction": way}, number) for one in fleets for way, number in _ways(one)]
    yield counter("fleetctl_fleet_tokens_total", told[0], *tokens)
    yield counter("fleetctl_fleet_cost_usd_total", told[1], *((_of(one), one.budget.ever.cost) for one in fleets))
    spent = [(_of(one), one.budget.status(one.spec.budget)) for one in fleets]
    ratios = [
        ({**labels, "of": what}, seen[what] / seen[f"{what}_limit"])
        for labels, seen in spent
        for what in ("tokens", "cost_usd")
        if seen[f"{what}_limit"] is not None
    ]
    yield gauge("fleetctl_fleet_budget_used_ratio", "Part of the budget of this period that is used up.", *ratios)


def _ways(fleet: Fleet) -> tuple[tuple[str, int], ...]:
    return ("in", fleet.budget.ever.taken), ("out", fleet.budget.ever.given)


def _warm_pool(fleets: Sequence[Fleet], tally: Tally) -> Iterator[Family]:
    pools: list[tuple[Labels, dict[str, Any]]] = [(_of(one), one.warm_pool_stats()) for one in fleets]  # Any: numbers, or None
    pools = [(labels, pool) for labels, pool in pools if pool["enabled"] or pool["hits"] or pool["misses"]]
    for key, help in (("current_size", "Suspended instances that are ready."), ("target_size", "Suspended instances wished for.")):
        name = f"fleetctl_warm_pool_{key.removeprefix('current_')}"
        yield gauge(name, help, *((labels, pool[key]) for labels, pool in pools))
    for key, help in (("hits", "An instance was asked for and there."), ("misses", "One was asked for, and the pool had none.")):
        yield counter(f"fleetctl_warm_pool_{key}_total", help, *((labels, pool[key]) for labels, pool in pools))
    samples = [
        sample
        for (fleet, warm), histogram in sorted(tally.acquired.items())
        for sample in histogram.samples({"fleet": fleet, "start": "warm" if warm else "cold"})
    ]
    help = "How long `acquire` took: from the warm pool, or with a cold start until the agent was ready."
    yield Family(name="fleetctl_acquire_duration_seconds", kind="histogram", help=help, samples=samples)


def _scaling(fleets: Sequence[Fleet], tally: Tally) -> Iterator[Family]:
    decisions = (
        ({"fleet": fleet, "action": action, "cause": cause}, number) for (fleet, action, cause), number in sorted(tally.decisions.items())
    )
    yield counter("fleetctl_scaling_decisions_total", "Changes of the size wished for, by who asked for them.", *decisions)
    enabled = ((_of(one), one.spec.autoscaling.enabled) for one in fleets)
    yield gauge("fleetctl_autoscaling_enabled", "1 where the load decides how many agents there are.", *enabled)
    last = [(_of(one), decided) for one in fleets if (decided := one.autoscaling_status()["last_decision"])]
    target = ((labels, decided["target_replicas"]) for labels, decided in last)
    yield gauge("fleetctl_autoscaling_target_replicas", "The size that the last decision came to.", *target)
    wish = ((labels, decided["wish"]) for labels, decided in last)
    yield gauge("fleetctl_autoscaling_wanted_replicas", "The size that the load asked for, before it was limited.", *wish)
    limits = (({**labels, "limit": kind}, 1) for labels, decided in last for kind in sorted({limit["kind"] for limit in decided["limits"]}))
    yield gauge("fleetctl_autoscaling_limited", "1 for each thing that held the last decision back.", *limits)
    proposals = [({**labels, "metric": one["metric"]}, one) for labels, decided in last for one in decided["proposals"]]
    values = ((labels, one["value"]) for labels, one in proposals)
    yield gauge("fleetctl_autoscaling_metric_value", "What the last decision was made by.", *values)
    targets = ((labels, one["target"]) for labels, one in proposals)
    yield gauge("fleetctl_autoscaling_metric_target", "What scaling aims at.", *targets)
