"""A small agent: counts units of work and stops cleanly on SIGTERM; with `--healthy` it tells whether the one beside it still counts.

The same file runs as a process of this machine and in a container: what it has to know it finds in its environment.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

STATE = Path(os.environ.get("STATE_DIRECTORY", ".")) / "count"
WHO = os.environ.get("FLEETCTL_AGENT_ID", "agent")
STUCK_SECONDS = 10.0


def healthy() -> bool:
    return STATE.exists() and time.time() - STATE.stat().st_mtime < STUCK_SECONDS


def main() -> None:
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    count = int(STATE.read_text() or 0) if STATE.exists() else 0
    print(f"{WHO}: going on from {count}", flush=True)
    while not stopping.wait(1.0):
        count += 1
        STATE.write_text(str(count))
        print(f"{WHO}: {count}", flush=True)
    print(f"{WHO}: stopped cleanly at {count}", flush=True)


if __name__ == "__main__":
    if "--healthy" in sys.argv:
        sys.exit(not healthy())
    main()
