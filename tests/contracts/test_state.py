"""What every `StateManager` must do, the fake as well as the real one; and what only a real disk can do to it."""

import asyncio
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleetctl.errors import StateDirectoryError
from fleetctl.host.paths import Paths
from fleetctl.host.state import LocalStateManager, read_agents, read_log, read_wishes
from fleetctl.host.writeback import CHECKPOINT_BYTES
from fleetctl.models import Agent, AgentState, Event, Exit, FleetSpec, ProcessRef, Replace, ScalingDecision
from fleetctl.testing import FakeStateManager
from tests.helpers import wait_for, wait_until

Story = Coroutine[Any, Any, None]  # Any: what a coroutine yields is the loop's affair

PLAIN = Agent(id="demo-a", fleet="demo", slot=0, created_at=1.5)
FULL = Agent(
    id="demo-b",
    fleet="demo",
    slot=1,
    state=AgentState.DRAINING,
    created_at=2.5,
    token="t",
    spec_hash="h",
    process=ProcessRef(pid=1, start_ticks=2, boot_id="b"),
    started_at=3.0,
    started_clock=4.0,
    ready_deadline=5.0,
    ready=True,
    leader_exit=Exit(signal=9, at=6.0),
    restarts=7,
    failures=(8.0, 9.0),
    retry_deadline=10.0,
    drain_deadline=11.0,
    stop_sent=True,
    leaving=True,
    replace=Replace.ROLLING,
    rolled=True,
    last_exit=Exit(code=3, at=12.0),
    note="größer than ASCII",
)
DECISION = ScalingDecision(action="scale_up", target_replicas=3, current_replicas=1, reason="asked", at=4.0)
SPEC = FleetSpec(name="demo", command=("sleep", "1"), environment={"A": "b"})


def event(number: int) -> Event:
    return Event(at=float(number), kind="test", fleet="demo", message=f"event {number}", data={"n": number})


class Fake:
    def __init__(self) -> None:
        self.state = FakeStateManager()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[FakeStateManager]:
        yield self.state

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        self.state.fails = lambda attempt: True
        yield
        self.state.fails = lambda attempt: False

    def agents(self) -> list[Agent]:
        return sorted(self.state.agents.values(), key=lambda agent: agent.id)

    def events(self) -> list[str]:
        return [one.message for one in self.state.events]

    def history(self) -> list[tuple[str, int]]:
        return [(fleet, one.target_replicas) for fleet, one in self.state.history]

    def samples(self) -> list[tuple[str, int]]:
        return [(fleet, one["replicas"]) for fleet, one in self.state.samples]

    def wishes(self) -> list[tuple[str, bool]]:
        return [(name, down) for name, (_, down) in self.state.wishes.items()]


class Real:
    def __init__(self, state_dir: str) -> None:
        self.paths = Paths(state_dir)
        self.paths.prepare()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[LocalStateManager]:
        state = LocalStateManager(self.paths)
        await state.open()
        try:
            yield state
        finally:
            await state.close()

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of this process may grow over the size that the database's log has now."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    def agents(self) -> list[Agent]:
        return read_agents(self.paths)

    def events(self) -> list[str]:
        return [one["message"] for one in read_log(self.paths, "events", "demo", 100)]

    def history(self) -> list[tuple[str, int]]:
        return [(one["fleet"], one["target_replicas"]) for one in read_log(self.paths, "history", None, 100)]

    def samples(self) -> list[tuple[str, int]]:
        return [(one["fleet"], one["replicas"]) for one in read_log(self.paths, "samples", None, 100)]

    def wishes(self) -> list[tuple[str, bool]]:
        return [(one["spec"]["name"], one["down"]) for one in read_wishes(self.paths)]


Place = Fake | Real


@pytest.fixture(params=["fake", "real"])
def place(request: pytest.FixtureRequest, state_dir: str) -> Place:
    return Fake() if request.param == "fake" else Real(state_dir)


@pytest.fixture
def real(state_dir: str) -> Real:
    return Real(state_dir)


def test_what_was_saved_is_read_as_it_was(place: Place) -> None:
    async def story() -> None:
        async with place.opened() as state:
            await state.save([FULL, PLAIN], events=[event(1), event(2)], history=[("demo", DECISION)])
            assert place.agents() == [PLAIN, FULL]
        assert place.agents() == [PLAIN, FULL]
        assert place.events() == ["event 1", "event 2"]
        assert place.history() == [("demo", 3)]

    asyncio.run(story())


def test_saving_again_replaces_and_forgetting_removes(place: Place) -> None:
    async def story() -> None:
        async with place.opened() as state:
            await state.save([PLAIN, FULL])
            changed = replace(PLAIN, restarts=5)
            await state.save([changed], forget=[FULL.id, "never-known"])
            assert place.agents() == [changed]

    asyncio.run(story())


def test_a_write_that_fails_changes_nothing_and_the_next_one_works(place: Place) -> None:
    async def story() -> None:
        async with place.opened() as state:
            await state.save([PLAIN], events=[event(1)])
            with place.full_disk():
                for _ in range(3):
                    with pytest.raises(StateDirectoryError):
                        await state.save([FULL], forget=[PLAIN.id], events=[event(2)])
                with pytest.raises(StateDirectoryError):
                    await state.save_wish(SPEC, down=False)
            assert (place.agents(), place.events(), place.wishes()) == ([PLAIN], ["event 1"], [])
            await state.save([FULL], forget=[PLAIN.id], events=[event(3)])
            assert (place.agents(), place.events()) == ([FULL], ["event 1", "event 3"])

    asyncio.run(story())


def test_wishes_are_kept_apart_and_forgotten(place: Place) -> None:
    async def story() -> None:
        async with place.opened() as state:
            await state.save_wish(SPEC, down=False)
            await state.save_wish(replace(SPEC, name="other"), down=False)
            await state.save_wish(SPEC, down=True)
            assert sorted(place.wishes()) == [("demo", True), ("other", False)]
            await state.forget_wish("other")
            await state.forget_wish("other")
            assert place.wishes() == [("demo", True)]

    asyncio.run(story())


def test_what_an_autoscaler_remembers_is_kept_by_fleet_and_goes_with_it(place: Place) -> None:
    async def story() -> None:
        async with place.opened() as state:
            assert await state.load_scaling("demo") is None
            await state.save_scaling("demo", {"memory": {"wishes": [[1.5, 2]]}}, [{"at": 1.0, "replicas": 2}])
            await state.save_scaling("other", {"memory": None})
            await state.save_scaling("demo", {"memory": {"wishes": [[2.5, 3]]}}, [{"at": 2.0, "replicas": 3}])
            with place.full_disk(), pytest.raises(StateDirectoryError):
                await state.save_scaling("demo", {"memory": None}, [{"at": 3.0, "replicas": 4}])
        async with place.opened() as state:
            assert await state.load_scaling("demo") == {"memory": {"wishes": [[2.5, 3]]}}
            assert place.samples() == [("demo", 2), ("demo", 3)]
            await state.save_wish(SPEC, down=False)
            await state.forget_wish("demo")
            assert await state.load_scaling("demo") is None
            assert await state.load_scaling("other") == {"memory": None}

    asyncio.run(story())


def test_what_a_fleet_has_spent_is_kept_and_goes_with_it(place: Place) -> None:
    async def story() -> None:
        async with place.opened() as state:
            assert await state.load_spending("demo") is None
            await state.save_spending("demo", {"began": 1.0})
            await state.save_spending("other", {"began": 2.0})
            with place.full_disk(), pytest.raises(StateDirectoryError):
                await state.save_spending("demo", {"began": 3.0})
        async with place.opened() as state:
            assert await state.load_spending("demo") == {"began": 1.0}
            await state.save_wish(SPEC, down=False)
            await state.forget_wish("demo")
            assert await state.load_spending("demo") is None
            assert await state.load_spending("other") == {"began": 2.0}

    asyncio.run(story())


# -- the real one


async def opened_agents(paths: Paths) -> tuple[list[Agent], str | None]:
    state = LocalStateManager(paths)
    try:
        return await state.open(), state.trouble
    finally:
        await state.close()


def files(paths: Paths) -> set[str]:
    return {name for name in os.listdir(paths.root) if name.startswith("fleetctl.db")}


def test_nothing_in_the_state_directory_is_for_others_to_read(real: Real) -> None:
    async def story() -> None:
        async with real.opened() as state:
            await state.save([PLAIN])
            await state.save_wish(SPEC, down=False)
            for folder, _, names in os.walk(real.paths.root):
                assert os.stat(folder).st_mode & 0o777 == 0o700
                assert {os.stat(f"{folder}/{name}").st_mode & 0o777 for name in names} <= {0o600}

    asyncio.run(story())


def test_the_environment_of_a_fleet_is_not_in_the_database(real: Real) -> None:
    async def story() -> None:
        async with real.opened() as state:
            await state.save_wish(replace(SPEC, environment={"A": "s3cret"}), down=False)
            await state.save([FULL], events=[event(1)], history=[("demo", DECISION)])
        assert all(b"s3cret" not in Path(real.paths.root, name).read_bytes() for name in files(real.paths))

    asyncio.run(story())


def damage_with_noise(path: str) -> None:
    noise = random.Random(1)
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        for start in range(0, size, 512):
            file.seek(start + 100 * (start > 0))
            file.write(noise.randbytes(256))


def truncate(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2 + 100)


def overwrite_pages(path: str) -> None:
    """The header stays as it is, what it describes does not."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(random.Random(2).randbytes(size - 4096))


@pytest.mark.parametrize("damage", [damage_with_noise, truncate, overwrite_pages])
def test_a_damaged_database_is_set_aside_with_a_message(real: Real, damage: Callable[[str], None]) -> None:
    async def story() -> None:
        async with real.opened() as state:
            for number in range(50):
                await state.save([replace(FULL, id=f"demo-{number}", note="x" * 500)], events=[event(number)])
        damage(real.paths.database)
        agents, trouble = await opened_agents(real.paths)
        assert agents == []
        assert trouble is not None
        assert "set aside as" in trouble
        (aside,) = [name for name in files(real.paths) if ".damaged-" in name and not name.endswith(("-wal", "-shm"))]
        assert aside in trouble
        async with real.opened() as state:
            assert state.trouble is None
            await state.save([PLAIN])
        assert real.agents() == [PLAIN]

    asyncio.run(story())


def test_an_empty_file_is_an_empty_database(real: Real) -> None:
    Path(real.paths.database).touch()
    assert asyncio.run(opened_agents(real.paths)) == ([], None)


def test_a_folder_in_the_place_of_the_database_is_named(real: Real) -> None:
    os.mkdir(real.paths.database)
    with pytest.raises(StateDirectoryError, match=r"fleetctl\.db: Is a directory"):
        asyncio.run(opened_agents(real.paths))


def test_records_known_in_memory_survive_the_damage_of_a_database_in_use(real: Real) -> None:
    async def story() -> None:
        async with real.opened() as state:
            await state.save([PLAIN, FULL])
            spoil(real)
            changed = replace(PLAIN, restarts=9)
            await state.save([changed], events=[event(1)])
            assert state.trouble is not None
            assert real.agents() == [changed, FULL]
            assert real.events() == ["event 1"]

    asyncio.run(story())


@pytest.mark.parametrize("replacement", [None, b"something else"], ids=["removed", "replaced"])
def test_a_database_that_somebody_removed_is_written_anew(real: Real, replacement: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetctl.host.state._CHECK_SECONDS", 0.01)

    async def story() -> None:
        async with real.opened() as state:
            await state.save([PLAIN, FULL])
            keeping = asyncio.create_task(state.keep_there())
            os.unlink(real.paths.database)
            if replacement is not None:
                Path(real.paths.database).write_bytes(replacement)
            await wait_for(lambda: state.trouble)
            await state.save(events=[event(1)])
            assert real.agents() == [PLAIN, FULL]
            assert real.events() == ["event 1"]
            keeping.cancel()

    asyncio.run(story())
    aside = [path for path in Path(real.paths.root).glob("*.damaged-*") if not path.name.endswith(("-wal", "-shm"))]
    assert [path.read_bytes() for path in aside] == ([] if replacement is None else [replacement])


SPOILER = """
import random, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("DELETE FROM history")
db.execute("INSERT INTO events VALUES (NULL, 0, '', '')")
db.commit()
assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
with open(sys.argv[1], "r+b") as file:
    size = file.seek(0, 2)
    file.seek(4096)
    file.write(random.Random(2).randbytes(size - 4096))
"""


def spoil(place: Real) -> None:
    """From another process, as a bad disk would: all pages but the first, so that the open connection meets it at its next write."""
    subprocess.run([sys.executable, "-c", SPOILER, place.paths.database], check=True)


def test_after_damage_on_a_full_disk_records_known_in_memory_are_written_when_there_is_room(real: Real) -> None:
    async def story() -> None:
        async with real.opened() as state:
            await state.save([PLAIN, FULL])
            spoil(real)
            with real.full_disk():
                for _ in range(3):
                    with pytest.raises(StateDirectoryError):
                        await state.save([replace(PLAIN, restarts=9)])
            await state.save(events=[event(1)])
            assert real.agents() == [PLAIN, FULL]
            assert real.events() == ["event 1"]

    asyncio.run(story())


WRITER = """
import asyncio, sys
from fleetctl.host.paths import Paths
from fleetctl.host.state import LocalStateManager
from fleetctl.models import Agent, Event
async def main():
    state = LocalStateManager(Paths(sys.argv[1]))
    await state.open()
    number = 0
    while True:
        pair = [Agent(id=f"demo-{name}", fleet="demo", slot=0, created_at=0.0, restarts=number, note="x" * 300) for name in "ab"]
        event = Event(at=0.0, kind="k", fleet="demo", message=str(number))
        await state.save(pair, events=[event])
        print(number, flush=True)
        number += 1
asyncio.run(main())
"""


def test_a_writer_killed_at_any_moment_leaves_the_last_answer_whole(real: Real) -> None:
    chance = random.Random(3)
    for _ in range(5):
        output = Path(real.paths.root, "told")
        with output.open("w") as told:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, real.paths.root], stdout=told)
        wanted = chance.randrange(1, 60)
        wait_until(lambda output=output, wanted=wanted: output.read_text().count("\n") >= wanted)  # type: ignore[misc]  # the defaults bind them
        writer.kill()
        writer.wait()
        said = int(output.read_text().split("\n")[-2])
        agents, trouble = asyncio.run(opened_agents(real.paths))
        assert trouble is None
        assert len({agent.restarts for agent in agents}) == 1
        assert agents[0].restarts in (said, said + 1)
        assert real.events()[-1] == str(agents[0].restarts)


def test_what_was_saved_leaves_the_log_for_the_database_beside_the_writer(real: Real) -> None:
    """Else the log of a busy daemon grows without end."""
    log, most = f"{real.paths.database}-wal", 0

    async def story() -> None:
        nonlocal most
        async with real.opened() as state:
            for number in range(200):
                await state.save([replace(FULL, id=f"demo-{one}", note=f"{number} " + "x" * 2000) for one in range(60)])
                most = max(most, os.path.getsize(log))
            await state.save([PLAIN])
            async with asyncio.timeout(10):
                while os.path.getsize(log) > CHECKPOINT_BYTES:  # cut at the first change after all of it has left
                    await state.save([PLAIN], events=[event(1)])
                    await asyncio.sleep(0.01)
        assert PLAIN in real.agents()
        assert len(real.agents()) == 61

    asyncio.run(story())
    assert most > CHECKPOINT_BYTES  # or the test shows nothing


def test_a_disk_without_room_heals(tmp_path: Path) -> None:
    """A real one: the error is told, nothing is lost, and freeing room is enough."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        real = Real(str(tmp_path / "s"))

        async def story() -> None:
            async with real.opened() as state:
                await state.save([PLAIN])
                (tmp_path / "ballast").write_bytes(b"x" * 64 * 1024)
                with pytest.raises(StateDirectoryError, match=r"full|disk I/O"):
                    for number in range(200):
                        await state.save([replace(FULL, id=f"demo-{number}", note="x" * 2000)])
                with pytest.raises(StateDirectoryError, match="No space left") as refused:
                    await state.save_wish(replace(SPEC, command=("x" * 200_000,)), down=False)
                assert "free some space" in (refused.value.hint or "")
                assert os.listdir(real.paths.fleets) == []
                (tmp_path / "ballast").unlink()
                await state.save([FULL])
                assert {PLAIN, FULL} <= set(real.agents())

        asyncio.run(story())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_record_that_cannot_be_read_costs_only_itself(real: Real) -> None:
    async def story() -> None:
        async with real.opened() as state:
            await state.save([PLAIN, FULL])
        with sqlite3.connect(real.paths.database) as db:
            db.execute("UPDATE agents SET data = ? WHERE id = ?", (json.dumps({"id": "demo-b"}), "demo-b"))
        db.close()
        assert await opened_agents(real.paths) == ([PLAIN], None)
        assert real.agents() == [PLAIN]

    asyncio.run(story())


@pytest.mark.parametrize("content", ["", "{", '["no", "wish"]', '{"spec": 3}', '{"down": false}'])
def test_a_wish_that_cannot_be_read_costs_only_itself(real: Real, content: str) -> None:
    async def story() -> None:
        async with real.opened() as state:
            await state.save_wish(SPEC, down=False)
        Path(real.paths.fleets, "other.json").write_text(content)
        assert real.wishes() == [("demo", False)]

    asyncio.run(story())


def test_old_events_go(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetctl.host.state.KEPT_EVENTS", 20)
    monkeypatch.setattr("fleetctl.host.state._PRUNE_EVERY", 10)

    async def story() -> Sequence[str]:
        async with real.opened() as state:
            for number in range(100):
                await state.save(events=[event(number)])
        return real.events()

    left = asyncio.run(story())
    assert left[-1] == "event 99"
    assert 20 <= len(left) <= 30
