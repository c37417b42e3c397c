"""A fleet in this machine's hands: the same for the daemon's and for the one of a program that embeds it."""

from collections.abc import Callable, Iterable

from fleetctl.core.orders import Wish
from fleetctl.fleet import Fleet
from fleetctl.host import logread
from fleetctl.host.probes import LocalProber
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.sources import LocalMetricReader
from fleetctl.models import Agent, Event
from fleetctl.ports import Clock, StateManager


def local_fleet(
    wish: Wish,
    *,
    lifecycle: LocalLifecycleManager,
    state: StateManager,
    clock: Clock,
    agents: Iterable[Agent],
    on_change: Callable[[], None],
    on_event: Callable[[Event], None],
) -> Fleet:
    return Fleet(
        wish,
        lifecycle_manager=lifecycle,
        state_manager=state,
        clock=clock,
        prober=LocalProber(lifecycle),
        metric_reader=LocalMetricReader(),
        agents=agents,
        on_change=on_change,
        on_event=on_event,
        last_output=lambda agent: logread.last_lines(lifecycle.paths, agent.fleet, agent.id),
    )
