"""Tells the service manager that started the daemon how it is, in systemd's words: sd_notify(3), sd_watchdog_enabled(3).

Without one, NOTIFY_SOCKET not being set, every word goes nowhere.
"""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

_BEATS_PER_WATCHDOG = 2


class ServiceManager:
    """Who is told. `beat_seconds`: how often WATCHDOG=1 is expected; None where nobody watches."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        """Takes the variables out of the environment: they are about this process, and no child of it may speak for it."""
        variables = os.environ if environ is None else environ
        self._address = variables.pop("NOTIFY_SOCKET", "")
        microseconds, pid = variables.pop("WATCHDOG_USEC", ""), variables.pop("WATCHDOG_PID", "")
        watched = bool(self._address) and microseconds.isdigit() and int(microseconds) > 0 and pid in ("", str(os.getpid()))
        self.beat_seconds = int(microseconds) / 1e6 / _BEATS_PER_WATCHDOG if watched else None
        self.listens = bool(self._address)

    def tell(self, *words: str) -> None:
        """Send assignments such as READY=1, all in one message. A service manager that does not listen is no reason to stop working."""
        if not self._address:
            return
        # "@" stands for the NUL with which Linux's abstract addresses begin.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker:
            speaker.setblocking(False)
            speaker.sendto("\n".join(words).encode(), address)
