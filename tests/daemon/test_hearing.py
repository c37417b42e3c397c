"""From the notify socket to the fleet an agent belongs to: what is understood, what is counted, and that the socket comes back."""

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable

import pytest

from fleetctl.core.orders import Wish
from fleetctl.daemon import hearing
from fleetctl.daemon.hearing import Hearing
from fleetctl.fleet import Fleet
from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import FleetSpec, ReadinessSpec
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager
from tests.helpers import wait_for

SPEC = FleetSpec(name="demo", command=("agent",), replicas=1, readiness=ReadinessSpec(notify=True))


@pytest.fixture
def paths(state_dir: str) -> Paths:
    paths = Paths(state_dir)
    paths.prepare()
    return paths


def run(paths: Paths, story: Callable[[Hearing, Fleet], Awaitable[None]]) -> None:
    async def told() -> None:
        clock = FakeClock()
        machine = FakeMachine(clock)
        fleet = Fleet(Wish(spec=SPEC), lifecycle_manager=FakeLifecycleManager(machine), state_manager=FakeStateManager(), clock=clock)
        fleet.start()
        heard = Hearing(LocalLifecycleManager(paths), {"demo": fleet})
        heard.open()
        heard.listen()
        await wait_for(lambda: fleet.agents)
        try:
            await story(heard, fleet)
        finally:
            heard.close()
            await fleet.close()

    asyncio.run(told())


def test_what_is_understood_reaches_the_fleet_and_what_is_not_is_counted(paths: Paths) -> None:
    async def story(heard: Hearing, fleet: Fleet) -> None:
        agent_id = fleet.agents[0].id
        for data in (b"\xff", b"x" * 5000, b"READY=0\nSTATUS=half", b"STATUS=whole", b""):
            heard.notified(agent_id, data)
        assert heard.dropped(agent_id) == {"not UTF-8": 1, "larger than 4096 bytes": 1, "with a line that is not understood": 1}
        assert fleet.reports[agent_id].status == "whole"
        assert not fleet.agents[0].ready
        heard.notified(agent_id, b"READY=1")
        await wait_for(lambda: fleet.agents[0].ready)

    run(paths, story)


@pytest.mark.parametrize("agent_id", ["other-abcde", "demo-zzzzz", "", "-", "demo"])
def test_who_belongs_to_no_fleet_is_not_heard(paths: Paths, agent_id: str) -> None:
    async def story(heard: Hearing, fleet: Fleet) -> None:
        heard.notified(agent_id, b"READY=1\nSTATUS=x")
        assert fleet.reports == {}

    run(paths, story)


def test_the_socket_comes_back_and_counts_of_agents_that_are_gone_go(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hearing, "_CHECK_SECONDS", 0.01)
    caplog.set_level(logging.ERROR)

    async def story(heard: Hearing, fleet: Fleet) -> None:
        heard.notified("demo-zzzzz", b"\xff")
        heard.notified(fleet.agents[0].id, b"\xff")
        keeping = asyncio.create_task(heard.keep_open())
        await wait_for(lambda: not heard.dropped("demo-zzzzz"))
        assert heard.dropped(fleet.agents[0].id) == {"not UTF-8": 1}
        shutil.rmtree(paths.run)
        await wait_for(lambda: os.path.exists(paths.notify))
        shutil.rmtree(paths.run)
        open(paths.run, "w").close()
        await wait_for(lambda: caplog.messages)
        os.unlink(paths.run)
        await wait_for(lambda: os.path.exists(paths.notify))
        assert len(caplog.messages) == 1
        keeping.cancel()

    run(paths, story)
