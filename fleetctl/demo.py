"""The bundled demo agent, `python -m fleetctl.demo`: small units of work, a line of log now and then, a clean stop.

It counts its units and, where fleetctl gives it a STATE_DIRECTORY, goes on counting after a restart; it tells fleetctl when it is ready
and what it does. Standard library only; nothing that costs start-up time or memory, because people start hundreds of these.
"""

import os
import signal
import sys
import time
import zlib
from contextlib import suppress

from fleetctl import agent

UNIT_SECONDS = 1.0
BURST_SECONDS = 0.015  # of CPU in each unit: about 1.5 % of one core
UNITS_PER_LINE = 5
STOPPERS = frozenset({signal.SIGTERM, signal.SIGINT})
BLOCK = bytes(range(256)) * 256


def main() -> int:
    # Blocked signals wait for sigtimedwait below: a stop neither interrupts a unit of work nor gets lost between two waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPERS)
    count = load_counter()
    say(f"started, process {os.getpid()}" + (f", going on from {count} units" if count else ""))
    agent.busy(active=0, slots=1)
    agent.ready(f"{count} units done")
    stopper = None
    while stopper is None:
        started = time.monotonic()
        with agent.work():
            digest = work(count)
            count += 1
            save_counter(count)
        if count % UNITS_PER_LINE == 0:
            say(f"{count} units done, last digest {digest:08x}")
            agent.progress(count)
            agent.status(f"{count} units done")
        stopper = wait_for_stop(started + UNIT_SECONDS - time.monotonic())
    agent.stopping()
    save_counter(count)
    say(f"{stopper.name} received, stopped cleanly after {count} units")
    return 0


def wait_for_stop(seconds: float) -> signal.Signals | None:
    """The signal that asked to stop, or None after so long."""
    found = signal.sigtimedwait(STOPPERS, max(0.0, seconds))
    # CPython returns a siginfo nobody has filled in where the time ran out while the process was stopped, as in a warm pool.
    return next((stopper for stopper in STOPPERS if found is not None and found.si_signo == stopper), None)


def work(seed: int) -> int:
    """One unit: checksums over a block for a fixed amount of CPU time, so that it is as modest on any machine."""
    digest, end = seed, time.process_time() + BURST_SECONDS
    while time.process_time() < end:
        digest = zlib.crc32(BLOCK, digest)
    return digest


def load_counter() -> int:
    """Where an earlier run of this agent left off; 0 for a fresh start or a counter that is not a number."""
    folder = os.environ.get("STATE_DIRECTORY")
    if folder:
        with suppress(OSError, ValueError), open(f"{folder}/counter", encoding="ascii") as file:
            return max(0, int(file.read(32)))
    return 0


def save_counter(count: int) -> None:
    """Replace the counter in one step. A full disk costs the record of some units, not the agent's life."""
    folder = os.environ.get("STATE_DIRECTORY")
    if not folder:
        return
    with suppress(OSError):
        with open(f"{folder}/counter.new", "w", encoding="ascii") as file:
            file.write(f"{count}\n")
        os.replace(f"{folder}/counter.new", f"{folder}/counter")


def say(text: str) -> None:
    """One line of log, in one write, so that lines stay whole; a full disk loses the line and no more."""
    who = os.environ.get("FLEETCTL_AGENT_ID", f"demo {os.getpid()}")
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {who}: {text}\n"
    with suppress(OSError):
        os.write(1, line.encode())


if __name__ == "__main__":
    sys.exit(main())
