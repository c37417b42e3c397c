"""What agents say of themselves on the notify socket: systemd's words, and X_FLEETCTL_* beyond them (the agent contract)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One datagram, understood. None or False: not said. `blocked` empty: the block is over; `blocked_until`: Unix time in seconds.

    `extension`: it had at least one X_FLEETCTL_* word, so the agent knows fleetctl.
    """

    ready: bool = False
    stopping: bool = False
    watchdog: Literal["ping", "trigger"] | None = None
    extend_timeout_seconds: float | None = None
    resume: str | None = None
    blocked: str | None = None
    blocked_until: float | None = None
    recycle: bool = False
    extension: bool = False
