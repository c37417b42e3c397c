"""Size, load and problems of a fleet, as the library and `status` tell them."""

import asyncio
from dataclasses import replace
from typing import Any

from fleetctl.core.contract import Message
from fleetctl.core.orders import Wish
from fleetctl.daemon.views import health_view
from fleetctl.fleet import Fleet
from fleetctl.health import problems_of
from fleetctl.models import FleetSpec, ResourceLimitsSpec, RestartSpec, Usage
from fleetctl.testing import FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled

SPEC = FleetSpec(
    name="demo",
    command=("agent",),
    replicas=2,
    min_replicas=2,
    resource_limits=ResourceLimitsSpec(cpu_limit=2.0, memory_limit_mb=4),
    restart=RestartSpec(crash_loop_failures=2, backoff_seconds=1.0),
)
MIB = 1 << 20


def test_a_fleet_tells_its_load_and_what_is_wrong() -> None:
    machine = FakeMachine()

    async def story() -> None:
        lifecycle = FakeLifecycleManager(machine)
        fleet = Fleet(Wish(spec=SPEC), lifecycle_manager=lifecycle, state_manager=FakeStateManager(), clock=machine.clock)
        fleet.start()
        await settled()
        assert list(problems_of(fleet)) == ["0 of the 2 replicas that there have to be are ready"]
        nothing: dict[str, Any] = {"avg_cpu_utilization": None, "avg_memory_utilization": None, "pending_requests": 0}
        assert health_view(fleet, {})["metrics"] == {"current_replicas": 2, **nothing}
        await asyncio.sleep(1.0)
        first, second = (agent.id for agent in fleet.agents)
        fleet.hear(first, Message(pending=3, extension=True))
        lifecycle.backlogs["demo"] = 7  # of no socket of this fleet's
        usage = {
            first: Usage(cpu_percent=150.0, memory_bytes=MIB, processes=1),
            second: Usage(cpu_percent=10.0, demand_percent=50.0, hottest_percent=20.0, memory_bytes=3 * MIB, processes=1),
            "gone-12345": Usage(cpu_percent=900.0, memory_bytes=900 * MIB, processes=1),
        }
        assert health_view(fleet, usage) == {
            "healthy": True,
            "problems": [],
            "metrics": {"current_replicas": 2, "avg_cpu_utilization": 50.0, "avg_memory_utilization": 50.0, "pending_requests": 3},
        }
        for _ in range(2):
            machine.end(machine.leader(first), code=3)
            await asyncio.sleep(0.5)
        crashed, missing = problems_of(fleet)
        assert crashed.startswith(f"{first}: ")
        assert "exit 3" in crashed
        assert missing == "1 of the 2 replicas that there have to be are ready"
        await fleet.scale(0)
        await asyncio.sleep(1.0)
        none = {"current_replicas": 0, "avg_cpu_utilization": 0.0, "avg_memory_utilization": 0.0, "pending_requests": 0}
        assert health_view(fleet, usage) == {"healthy": True, "problems": [], "metrics": none}
        await fleet.close()

    run_in_fake_time(machine.clock, story())


def test_only_the_first_of_many_problems_are_named() -> None:
    machine = FakeMachine()

    async def story() -> None:
        spec = replace(SPEC, replicas=6, min_replicas=1)
        fleet = Fleet(
            Wish(spec=spec), lifecycle_manager=FakeLifecycleManager(machine), state_manager=FakeStateManager(), clock=machine.clock
        )
        fleet.start()
        await asyncio.sleep(1.0)
        for agent in 2 * fleet.agents[1:]:  # the first time they are started again at once
            machine.end(machine.leader(agent.id), code=3)
            await settled()
        problems = list(problems_of(fleet))
        assert len(problems) == 4
        assert problems[-1] == "2 more agents do not run"
        await fleet.close()

    run_in_fake_time(machine.clock, story())
