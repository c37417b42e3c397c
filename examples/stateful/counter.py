"""An agent that numbers its work 1, 2, 3 ... and hands out each number once, whatever happens to it in between.

What it hands out goes to ledger/NAME; how far it is stands in its STATE_DIRECTORY. NAME is the agent that began: whoever is restored from
a checkpoint goes on in its name.
"""

import fcntl
import json
import os
import sys
import time
from pathlib import Path

from fleetctl import agent

UNIT_SECONDS = float(os.environ.get("UNIT_SECONDS", "0.5"))


def load(path: Path) -> tuple[str, int]:
    """The name under which it counts, and the last number that it knows to be handed out."""
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:  # it has never run
        return agent.agent_id() or "nobody", 0
    return state["name"], state["count"]


def save(path: Path, name: str, count: int) -> None:
    """In one step: after a crash the old one or the new one is there, and never half of it."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump({"name": name, "count": count}, file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def hand_out(ledger: int, number: int) -> None:
    os.write(ledger, f"{number}\n".encode())
    os.fsync(ledger)


def last_number(ledger: int) -> int:
    """The last one handed out; what a power failure cut off in the middle was not, and is taken away."""
    size = os.fstat(ledger).st_size
    tail = os.pread(ledger, 64, max(0, size - 64))
    whole = tail[: tail.rfind(b"\n") + 1]
    os.ftruncate(ledger, size - len(tail) + len(whole))
    return int(whole.split()[-1]) if whole else 0


def main() -> int:
    path = Path(agent.state_directory() or ".") / "state.json"
    name, count = load(path)
    Path("ledger").mkdir(exist_ok=True)
    ledger = os.open(f"ledger/{name}", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another agent counts as {name}: was a checkpoint restored twice?", file=sys.stderr)
        return 78  # bad configuration: not started again
    # It may have died between handing out a number and writing that down: then that number is not handed out again.
    count = max(count, last_number(ledger))
    save(path, name, count)
    print(f"{agent.agent_id()} counts as {name}, from {count} on ({agent.launch()} start)", flush=True)
    agent.busy(active=0, slots=1)
    agent.ready(f"{name}: {count}")
    while not agent.stop_asked():
        with agent.work():
            time.sleep(UNIT_SECONDS)  # the work
            hand_out(ledger, count + 1)
            count += 1
            save(path, name, count)
        agent.progress(count)
        agent.status(f"{name}: {count}")
        agent.watchdog()
    return 0


sys.exit(main())
