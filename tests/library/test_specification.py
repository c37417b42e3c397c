"""The specification's code, as printed, on real processes: only its import lines are others."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fleetctl
from fleetctl import FleetManager, LocalLifecycleManager, LocalResourceManager, LocalStateManager
from tests.helpers import wait_for
from tests.library.blocks import Names, Rounds, blocks, run
from tests.real.conftest import place
from tests.real.harness import Place

__all__ = ["place"]

BLOCKS = blocks(Path(__file__).with_name("specification.md"))
USE_CASES = [title for title in BLOCKS if re.match(r"\d+\. ", title)]
BEST_PRACTICES = ["Stabilization Periods", "Warm Pool Sizing", "Resource Limits", "Checkpoint on Drain"]


@pytest.fixture
def managers(place: Place) -> Iterator[Names]:
    """The specification's three, under all names that its examples have for them."""
    resources = LocalResourceManager()
    lifecycle, state = LocalLifecycleManager(place.root), LocalStateManager(place.root)
    yield {
        "lifecycle_mgr": lifecycle,
        "state_mgr": state,
        "resource_mgr": resources,
        "lifecycle": lifecycle,
        "state": state,
        "resources": resources,
    }
    resources.close()
    asyncio.run(state.close())


def test_the_copy_has_all_examples() -> None:
    assert [int(title.partition(".")[0]) for title in USE_CASES] == list(range(1, 11))
    assert list(BLOCKS) == [*USE_CASES, "Execution Examples", *BEST_PRACTICES]


def test_the_ten_use_cases_run_as_printed(managers: Names, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    names = {**managers}
    said: dict[int, str] = {}

    async def use(number: int) -> str:
        await run(BLOCKS[USE_CASES[number - 1]], names)
        said[number] = capsys.readouterr().out
        return said[number]

    async def story() -> None:
        await use(1)
        fleet: FleetManager = names["fleet"]
        try:
            assert await use(2) == "Action: scale_up\nCurrent: 5\nTarget: 6\nReason: CPU utilization 85.0% > target 70%\n"
            spawned = re.findall(r"  - (fleet-[a-z0-9]{5}): running\n", await use(3))
            assert said[3].startswith("Spawned 10 new instances\n")
            assert set(spawned) == place.leaders().keys() - {one.agent_id for one in fleet.get_warm_pool_stats()["instances"]}
            assert len(spawned) == 10
            ended = re.findall(r"  - (\S+)\n", await use(4))
            assert said[4].startswith("Terminated 5 instances:\n")
            assert sorted(ended) == sorted(spawned[:5])
            assert not set(ended) & place.leaders().keys()
            assert await use(5) == "Autoscaling: enabled\nCurrent replicas: 5\nScale ups: 0\nScale downs: 0\n"
            await use(6)
            assert not fleet.get_autoscaling_status()["enabled"]
            await wait_for(lambda: fleet.get_warm_pool_stats()["current_size"] == 5, 20.0)
            assert re.fullmatch(
                r"Warm pool size: 5/5\nHit rate: 0\.0%\nGot warm instance: fleet-\S{5}\nFrom warm pool: True\n", await use(7)
            )
            assert re.fullmatch(r"Replicas: 6\nCPU: \d+\.\d%\nMemory: \d+\.\d%\nPending: 0\n", await use(8))
            assert re.findall(r"(\w+): (\d+) -> (\d+)\n  Reason: \S", await use(9)) == [
                ("scale_up", "0", "10"),
                ("scale_down", "10", "5"),
                ("scale_up", "5", "6"),
            ]
            assert re.fullmatch(
                r"Healthy: True\nReplicas: 6 \(min=2, max=50\)\nActive instances: 6\nAutoscaling: False\nWarm pool: \d/5\n", await use(10)
            )
        finally:
            await fleet.cleanup()

    asyncio.run(story())
    assert not place.processes()


def test_the_execution_example_runs_as_printed(managers: Names, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Rounds(3)
    names = {**managers, "asyncio": loop, "FleetManager": FleetManager, "config_template": fleetctl.AgentConfig()}
    asyncio.run(_to_the_end(lambda: run(BLOCKS["Execution Examples"], names), names))
    assert loop.left == 0
    rounds = re.findall(r"Replicas: 2\nCPU: (\d+\.\d)%\nScale ups: 0\nScale downs: 0\n", capsys.readouterr().out)
    assert len(rounds) == 3
    assert not place.processes()  # its last line cleans up


async def _to_the_end(story: Callable[[], Awaitable[None]], names: dict[str, Any]) -> None:
    try:
        await story()
    finally:
        if "fleet" in names:
            await names["fleet"].cleanup()


@pytest.mark.parametrize("title", BEST_PRACTICES)
def test_the_best_practices_are_valid_settings(title: str) -> None:
    asyncio.run(run(BLOCKS[title], {"FleetManager": FleetManager}))
