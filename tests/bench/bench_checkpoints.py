"""What it costs to save what agents keep: one that leaves, a hundred that stop, and much at once, beside the same by hand.

`python -m tests.bench drain checkpoint`. Times mean something on a quiet machine only; ratios are of the same run. That no work is
lost or done twice over 1,000 drains: FLEETCTL_DRAINS=1000 pytest tests/real/test_checkpoints.py.
"""

import asyncio
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, CheckpointsSpec
from tests.bench.bench_daemon import SLEEP, daemon
from tests.bench.figures import Figure
from tests.real.harness import Place, eventually, spec

DRAINS, AGENTS = 30, 100
LARGE_BYTES = 256 * 1024 * 1024
KEEPS = ["sh", "-c", 'echo 7 > "$STATE_DIRECTORY/counter"; exec sleep 1000000']


def gone(place: Place, agent_id: str) -> bool:
    return agent_id not in {agent["id"] for agent in place.agents()}


def bench_drain() -> list[Figure]:
    """One agent with one small file: asked to leave -> gone, with a checkpoint before and after; and a hundred of them at once."""
    with daemon() as place:
        place.client.apply("bench", spec("bench", KEEPS, DRAINS, max_replicas=AGENTS))
        eventually(lambda: place.settled("bench", DRAINS), "the fleet is ready", 60)
        seconds = [timed(lambda agent_id=agent_id: drain(place, agent_id)) for agent_id in list(place.leaders())]  # type: ignore[misc]  # the default binds it
        saved = stopped(place, KEEPS)
        nothing = stopped(place, SLEEP)
    return [
        Figure(name="drain of one agent, p50", value=statistics.median(seconds) * 1e3, unit="ms", target=150),
        Figure(name=f"stop of {AGENTS} with checkpoints, nothing kept", value=saved, unit="s", target=25, floor=nothing),
    ]


def drain(place: Place, agent_id: str) -> None:
    place.client.drain(agent_id)
    while not gone(place, agent_id):
        time.sleep(0.002)


def stopped(place: Place, command: list[str]) -> float:
    place.client.apply("bench", spec("bench", command, AGENTS, max_replicas=AGENTS, readiness={"settle_seconds": 0.5}))
    eventually(lambda: place.settled("bench", AGENTS), "the fleet is ready", 120)
    began = time.perf_counter()
    place.client.scale("bench", 0)
    while place.agents():
        time.sleep(0.002)
    return time.perf_counter() - began


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def much() -> Iterator[tuple[LocalLifecycleManager, Agent, Path]]:
    """A state directory of an agent that keeps one large file."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        lifecycle = LocalLifecycleManager(folder)
        lifecycle.paths.prepare()
        agent = Agent(id="bench-aaaaa", fleet="bench", slot=0, created_at=0.0)
        state = Path(lifecycle.paths.agent_state(agent.id))
        state.mkdir()
        with open(state / "data", "wb") as file:
            for _ in range(LARGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        os.sync()
        yield lifecycle, agent, state / "data"


def bench_checkpoint() -> list[Figure]:
    """A checkpoint of 256 MiB, beside a copy, its checksum and fsync by hand."""
    with much() as (lifecycle, agent, data):
        store = LocalCheckpointStore(lifecycle)

        def by_hand() -> None:
            copy = data.with_name("copy")
            shutil.copyfile(data, copy)
            with open(copy, "rb") as file:
                hashlib.file_digest(file, "sha256")
                os.fsync(file.fileno())
            copy.unlink()

        floor = min(timed(by_hand) for _ in range(3))
        ids = [f"20261125t00000{number}-aaaaa" for number in range(3)]

        def save(checkpoint_id: str) -> None:
            asyncio.run(store.save(agent, CheckpointsSpec(keep=1), checkpoint_id=checkpoint_id, reason="bench"))

        seconds = min(timed(lambda one=one: save(one)) for one in ids)  # type: ignore[misc]  # the default binds it
        again = timed(lambda: save(ids[-1]))
        store.close()
    return [
        Figure(name="checkpoint of 256 MiB, copy and sum by hand", value=seconds, unit="s", target=1.5, floor=floor),
        Figure(name="the same where nothing changed", value=again, unit="s", target=1.5, floor=floor),
    ]


BENCHMARKS: dict[str, Callable[[], list[Figure]]] = {"drain": bench_drain, "checkpoint": bench_checkpoint}
