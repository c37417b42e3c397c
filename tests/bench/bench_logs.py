"""What rotation costs an agent that writes 200 MB: the same writer with and without a rotator beside it, in turn.

Run with `python -m tests.bench.bench_logs`. Target: at least 0.95 of the plain file's throughput.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fleetctl.host import logs, rotation
from fleetctl.host.paths import Paths
from fleetctl.models import LogSpec

BYTES, ROUNDS = 200_000_000, 9
# The second is far more often than a daemon looks; so even the fastest writer, done in 0.15 s, is cut while it writes.
CHECKS = {"checked as the rotator asks for": 60.0, "checked every 20 ms": 0.02}
WRITERS = {
    "blocks of 8 KiB": (
        "import sys, os\nblock = (b'x' * 127 + b'\\n') * 64\nwrite = os.write\n"
        "for _ in range(int(sys.argv[1]) // len(block)): write(1, block)"
    ),
    "a write a line of 128 bytes": (
        "import sys, os\nline = b'x' * 127 + b'\\n'\nwrite = os.write\nfor _ in range(int(sys.argv[1]) // len(line)): write(1, line)"
    ),
}


def write(paths: Paths, agent_id: str, code: str, longest_wait: float | None) -> tuple[float, int]:
    """Seconds that the writer took, and how often its log was cut meanwhile; None: no rotation."""
    fd = logs.open_log(paths, "bench", agent_id)
    rotator, done, cuts = rotation.Rotator(paths), threading.Event(), 0

    def rotate(longest_wait: float) -> None:
        nonlocal cuts
        wait = 0.0
        while not done.wait(min(wait, longest_wait)):
            wait, cut, problem = rotator.rotate("bench", agent_id, LogSpec())
            assert not problem, problem
            cuts += cut

    thread = threading.Thread(target=rotate, args=(longest_wait,))
    if longest_wait is not None:
        thread.start()
    began = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", code, str(BYTES)], stdout=fd, check=True)
    took = time.perf_counter() - began
    done.set()
    if longest_wait is not None:
        thread.join()
    os.close(fd)
    for file in Path(paths.agent_log("bench", agent_id)).parent.iterdir():
        file.unlink()
    return took, cuts


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        paths = Paths(str(Path(folder)))
        paths.prepare()
        for (name, code), (checks, longest_wait) in itertools.product(WRITERS.items(), CHECKS.items()):
            plain, rotated, cuts = [], [], []
            for number in range(ROUNDS):
                plain.append(write(paths, f"plain-{number}", code, None)[0])
                took, cut = write(paths, f"rotated-{number}", code, longest_wait)
                rotated.append(took)
                cuts.append(cut)
            pairs = [alone / beside for alone, beside in zip(plain, rotated, strict=True)]
            print(
                f"logs, {name}, {checks}: {BYTES / statistics.median(rotated) / 1e6:.0f} MB/s rotated ({statistics.median(cuts)} cuts), "
                f"{BYTES / statistics.median(plain) / 1e6:.0f} MB/s plain (floor), ratio {statistics.median(pairs):.3f} (target 0.95), "
                f"best against best {min(plain) / min(rotated):.3f}"
            )


if __name__ == "__main__":
    main()
