"""What every `ports.CheckpointStore` does: one on this machine's disk, one in memory."""

import asyncio
import os
import shutil
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from fleetctl.errors import FleetctlError, UnknownCheckpoint
from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, Checkpoint, CheckpointKind, CheckpointsSpec, FleetSpec, GracefulDrainSpec, Saved
from fleetctl.ports import CheckpointStore
from fleetctl.testing import FakeCheckpointStore, FakeClock, run_in_fake_time

T = TypeVar("T")
ONE, TWO = "20261125t004530-aaaaa", "20261125t004531-bbbbb"
AGENT = Agent(id="web-k3x9q", fleet="web", slot=0, created_at=0.0, token="t" * 32)


class World(Protocol):
    @property
    def store(self) -> CheckpointStore: ...

    def run(self, work: Coroutine[Any, Any, T]) -> T: ...  # Any: what a coroutine yields is the loop's affair
    def keep(self, **files: str) -> None:
        """Have the agent keep exactly these files."""
        ...

    def kept(self, agent_id: str) -> dict[str, str] | None:
        """What an agent keeps; None where it has no STATE_DIRECTORY."""
        ...

    def content(self, checkpoint_id: str) -> dict[str, str]: ...
    def spec(self, command: str) -> FleetSpec:
        """A fleet whose checkpoints are written by this script, or by what stands for it."""
        ...


class FakeWorld:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = FakeCheckpointStore(self.clock)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return run_in_fake_time(self.clock, work)

    def keep(self, **files: str) -> None:
        self.store.states[AGENT.id] = {name: text.encode() for name, text in files.items()}

    def kept(self, agent_id: str) -> dict[str, str] | None:
        found = self.store.states.get(agent_id)
        return None if found is None else {name: data.decode() for name, data in found.items()}

    def content(self, checkpoint_id: str) -> dict[str, str]:
        return {path: data.decode() for path, data in self.store.saved[checkpoint_id][1].items()}

    def spec(self, command: str) -> FleetSpec:
        self.store.command_error = "exit 3" if "exit 3" in command else ""
        return FleetSpec(name="web", command=("x",), checkpoints=CheckpointsSpec(command=("x",)))


class RealWorld:
    def __init__(self, state_dir: str) -> None:
        lifecycle = LocalLifecycleManager(state_dir)
        self.paths = lifecycle.paths
        self.paths.prepare()
        self.store = LocalCheckpointStore(lifecycle)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    def keep(self, **files: str) -> None:
        folder = Path(self.paths.agent_state(AGENT.id))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)

    def kept(self, agent_id: str) -> dict[str, str] | None:
        folder = Path(self.paths.agent_state(agent_id))
        return _read(folder) if folder.is_dir() else None

    def content(self, checkpoint_id: str) -> dict[str, str]:
        found = _read(Path(self.paths.checkpoints, AGENT.fleet, AGENT.id, checkpoint_id))
        del found["checkpoint.json"]
        return found

    def spec(self, command: str) -> FleetSpec:
        checkpoints = CheckpointsSpec(command=("sh", "-c", command))
        drain = GracefulDrainSpec(checkpoint_timeout_seconds=5.0)
        return FleetSpec(name="web", command=("x",), cwd="/", checkpoints=checkpoints, graceful_drain=drain)


def _read(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["fake", "real"])
def world(request: pytest.FixtureRequest, state_dir: str) -> Iterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    real = RealWorld(state_dir)
    yield real
    real.store.close()


def save(
    world: World, agent: Agent = AGENT, *, checkpoint_id: str = ONE, spec: CheckpointsSpec | None = None, commanded: bool = False
) -> Saved:
    wanted = world.store.save(agent, spec or CheckpointsSpec(), checkpoint_id=checkpoint_id, reason="a test", commanded=commanded)
    return world.run(wanted)


def saved(world: World, agent: Agent = AGENT, *, checkpoint_id: str = ONE) -> Checkpoint:
    found = save(world, agent, checkpoint_id=checkpoint_id)
    assert found.checkpoint is not None
    assert world.run(world.store.find(checkpoint_id)) == found.checkpoint
    return found.checkpoint


def with_token(token: str) -> Agent:
    return Agent(id=AGENT.id, fleet="web", slot=0, created_at=0.0, resume_token=token)


def test_an_agent_that_keeps_nothing_has_nothing_to_save(world: World) -> None:
    assert world.store.keeps_nothing(AGENT)
    assert save(world) == Saved(checkpoint=None)
    world.keep()
    assert world.store.keeps_nothing(AGENT)
    assert save(world) == Saved(checkpoint=None)
    assert list(world.run(world.store.checkpoints())) == []


def test_what_it_keeps_is_saved(world: World) -> None:
    world.keep(counter="7")
    assert not world.store.keeps_nothing(AGENT)
    checkpoint = saved(world)
    assert (checkpoint.id, checkpoint.fleet, checkpoint.agent_id, checkpoint.kind) == (ONE, "web", AGENT.id, CheckpointKind.FILES)
    assert world.content(ONE) == {"state/counter": "7"}


def test_a_token_is_saved_with_and_without_files(world: World) -> None:
    assert saved(world, with_token("t")).kind is CheckpointKind.TOKEN
    world.keep(counter="7")
    both = saved(world, with_token("u"), checkpoint_id=TWO)
    assert (both.kind, both.resume_token) == (CheckpointKind.FILES, "u")


def test_saving_again_under_the_same_id_makes_it_the_new_one(world: World) -> None:
    world.keep(counter="7", job="half done")
    saved(world)
    world.keep(counter="8")
    saved(world)
    assert world.content(ONE) == {"state/counter": "8"}
    assert len(world.run(world.store.checkpoints("web", AGENT.id))) == 1


def test_saving_the_same_again_changes_nothing(world: World) -> None:
    world.keep(counter="7")
    assert saved(world) == saved(world)


def test_a_new_token_is_saved_over_the_old_one(world: World) -> None:
    world.keep(counter="7")
    saved(world, with_token("t"))
    assert saved(world, with_token("u")).resume_token == "u"


def test_who_did_away_with_everything_has_no_checkpoint_any_more(world: World) -> None:
    world.keep(job="to do")
    saved(world)
    world.keep()
    assert save(world) == Saved(checkpoint=None)
    with pytest.raises(UnknownCheckpoint):
        world.run(world.store.find(ONE))


def test_what_was_cleared_stays_in_its_checkpoint(world: World) -> None:
    world.keep(job="to do")
    before = saved(world)
    world.run(world.store.clear(AGENT))
    assert world.kept(AGENT.id) is None
    assert world.store.keeps_nothing(AGENT)
    assert saved(world) == before
    world.run(world.store.clear(AGENT))


def test_what_is_too_large_stays_where_it_is(world: World) -> None:
    world.keep(model="x" * 100)
    found = save(world, spec=CheckpointsSpec(max_bytes=99))
    assert (found.checkpoint, found.complete) == (None, False)
    assert "stays where it is" in found.problem


def test_the_oldest_go_first(world: World) -> None:
    world.keep(counter="7")
    ids = [f"20261125t0045{number:02}-aaaaa" for number in range(4)]
    for checkpoint_id in ids:
        save(world, checkpoint_id=checkpoint_id, spec=CheckpointsSpec(keep=2, keep_seconds=1e9))
    assert [one.id for one in world.run(world.store.checkpoints("web"))] == ids[-2:]
    assert list(world.run(world.store.checkpoints("other"))) == []


def test_a_fresh_agent_gets_what_was_saved_once(world: World) -> None:
    world.keep(counter="7")
    saved(world)
    fresh = Agent(id="web-fresh", fleet="web", slot=1, created_at=0.0, restore=f"{AGENT.id}/{ONE}")
    world.run(world.store.fill(fresh))
    assert world.kept("web-fresh") == {"counter": "7"}
    world.keep(counter="8")
    saved(world)
    world.run(world.store.fill(fresh))
    assert world.kept("web-fresh") == {"counter": "7"}


def test_nobody_gets_what_is_not_there(world: World) -> None:
    with pytest.raises(UnknownCheckpoint):
        world.run(world.store.fill(Agent(id="web-fresh", fleet="web", slot=1, created_at=0.0, restore=f"{AGENT.id}/{ONE}")))
    assert world.kept("web-fresh") is None


def test_what_was_removed_is_unknown(world: World) -> None:
    world.keep(counter="7")
    saved(world)
    world.run(world.store.remove(ONE))
    with pytest.raises(UnknownCheckpoint):
        world.run(world.store.remove(ONE))


def test_what_a_command_wrote_is_the_checkpoint_until_the_state_is_added(world: World) -> None:
    world.keep(db="torn")
    world.run(world.store.prepare(AGENT))
    world.run(world.store.command(AGENT, world.spec('printf "by the command" > "$FLEETCTL_CHECKPOINT_DIR/dump"')))
    commanded = save(world, commanded=True)
    assert commanded.checkpoint is not None
    assert (commanded.checkpoint.kind, commanded.complete) == (CheckpointKind.COMMAND, False)
    assert world.content(ONE) == {"written/dump": "by the command"}
    assert saved(world).kind is CheckpointKind.COMMAND
    assert world.content(ONE) == {"written/dump": "by the command", "state/db": "torn"}


def test_a_command_that_fails_is_named(world: World) -> None:
    with pytest.raises(FleetctlError, match=r"checkpoints\.command: exit 3"):
        world.run(world.store.command(AGENT, world.spec("exit 3")))


def test_the_command_of_the_real_one_runs_as_the_agent_is(state_dir: str) -> None:
    real = RealWorld(state_dir)
    real.keep(counter="7")
    real.run(real.store.prepare(AGENT))
    real.run(real.store.command(AGENT, real.spec('env > "$FLEETCTL_CHECKPOINT_DIR/env"; pwd >> "$FLEETCTL_CHECKPOINT_DIR/env"')))
    lines = Path(real.paths.agent_checkpoint(AGENT.id), "env").read_text().splitlines()
    assert f"STATE_DIRECTORY={real.paths.agent_state(AGENT.id)}" in lines
    assert "FLEETCTL_AGENT_ID=web-k3x9q" in lines
    assert lines[-1] == "/"
    assert not [line for line in lines if line.startswith("FLEETCTL_TOKEN=")]
    real.store.close()


def test_a_command_that_takes_too_long_is_ended_and_says_what_it_said(state_dir: str) -> None:
    real = RealWorld(state_dir)
    spec = real.spec("echo no room for it; sleep 600")
    spec = FleetSpec(
        name="web", command=("x",), cwd="/", checkpoints=spec.checkpoints, graceful_drain=GracefulDrainSpec(checkpoint_timeout_seconds=0.3)
    )
    real.run(real.store.prepare(AGENT))
    with pytest.raises(FleetctlError, match=r"not done after 0\.3 s: no room for it"):
        real.run(real.store.command(AGENT, spec))
    assert os.path.isdir(real.paths.agent_checkpoint(AGENT.id))
    real.store.close()
