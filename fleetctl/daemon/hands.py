"""A fleet in this machine's hands: the same for the daemon's and for the one of a program that embeds it."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fleetctl.core.orders import Wish
from fleetctl.errors import StateDirectoryError
from fleetctl.fleet import Fleet
from fleetctl.host import logread
from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.probes import LocalProber
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.sources import LocalMetricReader
from fleetctl.models import Agent, Event
from fleetctl.ports import Clock, StateManager

log = logging.getLogger(__name__)

_EXPIRE_SECONDS = 600.0


def local_fleet(
    wish: Wish,
    *,
    lifecycle: LocalLifecycleManager,
    state: StateManager,
    checkpoints: LocalCheckpointStore,
    clock: Clock,
    agents: Iterable[Agent],
    spending: Mapping[str, Any] | None = None,
    on_change: Callable[[], None],
    on_event: Callable[[Event], None],
) -> Fleet:
    return Fleet(
        wish,
        lifecycle_manager=lifecycle,
        state_manager=state,
        clock=clock,
        prober=LocalProber(lifecycle),
        checkpoint_store=checkpoints,
        metric_reader=LocalMetricReader(),
        agents=agents,
        spending=spending,
        on_change=on_change,
        on_event=on_event,
        last_output=lambda agent: logread.last_lines(lifecycle.paths, agent.fleet, agent.id),
    )


async def expire_checkpoints(store: LocalCheckpointStore, fleets: Mapping[str, Fleet]) -> None:
    """Remove checkpoints that need not be kept any longer, now and then; for ever."""
    while True:
        try:
            await store.expire({name: fleet.spec.checkpoints for name, fleet in fleets.items()})
        except StateDirectoryError as error:
            log.warning("old checkpoints cannot be removed: %s", error.message)
        await asyncio.sleep(_EXPIRE_SECONDS)
