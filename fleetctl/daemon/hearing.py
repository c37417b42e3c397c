"""Joins the notify socket to the fleets: whose word it is, what it means, which fleet it concerns.

The same for the daemon's fleets and for the one of a program that embeds it.
"""

import asyncio
import logging
from collections.abc import Mapping

from fleetctl.core.contract import parse
from fleetctl.errors import StateDirectoryError
from fleetctl.fleet import Fleet
from fleetctl.host.notify import NotifySocket
from fleetctl.host.process import LocalLifecycleManager

log = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0


class Hearing:
    """Create it in the running loop; `open` it before the first agent starts, `listen` when all fleets are known, `close` it at the end.

    `fleets`: by name, as they are at any moment. `keep_open` is a task beside that.
    """

    def __init__(self, lifecycle: LocalLifecycleManager, fleets: Mapping[str, Fleet]) -> None:
        self._lifecycle, self._fleets = lifecycle, fleets
        self._socket = NotifySocket(lifecycle.paths.notify, self._owner_of, self.notified, inside=lifecycle.paths.notify_inside)

    def open(self) -> None:
        """What agents say from now on waits. Raises StateDirectoryError."""
        self._socket.open()

    def listen(self) -> None:
        self._socket.listen()

    def close(self) -> None:
        self._socket.close()

    async def keep_open(self) -> None:
        """Make the socket anew whenever somebody removed it, as a tidy person may with `run/`; never returns."""
        trouble = ""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self._socket.forget({agent.id for fleet in self._fleets.values() for agent in fleet.agents})
            try:
                self._socket.ensure()
                trouble = ""
            except StateDirectoryError as error:  # told once, tried again until it heals
                if error.message != trouble:
                    log.error("%s", error.message)
                trouble = error.message

    def notified(self, agent_id: str, data: bytes) -> None:
        """Take in what an agent sent, whatever it is."""
        message = parse(data)
        if isinstance(message, str):
            self._socket.drop(agent_id, message)
            return
        if message.errors:
            self._socket.drop(agent_id, "with a line that is not understood")
        fleet = self._fleets.get(agent_id.rpartition("-")[0])
        if fleet is not None:
            fleet.hear(agent_id, message)

    def dropped(self, agent_id: str) -> dict[str, int]:
        """How many of the agent's messages were dropped, in whole or in part, by reason."""
        return self._socket.dropped(agent_id)

    @property
    def strangers(self) -> int:
        """Messages of processes that belong to no agent."""
        return self._socket.strangers

    def _owner_of(self, pid: int) -> str | None:
        return self._lifecycle.owner(pid, lambda: (agent for fleet in self._fleets.values() for agent in fleet.agents))
