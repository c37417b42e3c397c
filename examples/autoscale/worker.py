"""Takes jobs, which are files in a folder, one after the other: `burn` computes for so long, `wait` waits, as for a remote service."""

import os
import signal
import sys
import time
from types import FrameType

LOOK_SECONDS = 0.05
stopping = False


def stop(number: int, frame: FrameType | None) -> None:
    """Finish the job in hand, then end."""
    global stopping
    stopping = True


def take(folder: str, taken: str) -> bool:
    """Whether one was left: a rename is done by one worker only, whoever else tries."""
    for name in sorted(os.listdir(folder))[:20]:
        try:
            os.rename(f"{folder}/{name}", taken)
            return True
        except FileNotFoundError:
            continue
    return False


def work(kind: str, seconds: float) -> None:
    if kind == "wait":
        time.sleep(seconds)
        return
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def main() -> None:
    folder, kind, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    signal.signal(signal.SIGTERM, stop)
    os.makedirs(folder, exist_ok=True)
    taken = os.path.join(os.environ["STATE_DIRECTORY"], "job")
    while not stopping:
        if take(folder, taken):
            work(kind, seconds)
            os.unlink(taken)
        else:
            time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
