"""Gives each session an agent of its own: a warm one in milliseconds, and a new one where the pool is empty."""

import asyncio
import time

from fleetctl import AgentConfig, FleetManager, SpawnResult

# Your own program goes into command=["python3", "agent.py"]; without one this is the bundled demo agent.
AGENT = AgentConfig(tools=["search"])
CONFIG = {"max_replicas": 10, "warm_pool": {"size": 2}}


async def agent_for_a_session(fleet: FleetManager) -> SpawnResult:
    agent = await fleet.acquire_from_warm_pool(AGENT)
    if agent is None:
        (agent,) = await fleet.scale_up(fleet.get_health_status()["desired_replicas"] + 1)
    return agent


async def main() -> None:
    # With the template given here the pool fills up before anybody needs it.
    async with FleetManager(config=CONFIG, name="sessions", config_template=AGENT) as fleet:
        while fleet.get_warm_pool_stats()["current_size"] < 2:
            await asyncio.sleep(0.1)
        for number in range(1, 4):
            began = time.monotonic()
            agent = await agent_for_a_session(fleet)
            how = "warm" if agent.from_warm_pool else "cold"
            print(f"session {number}: {agent.agent_id} (process {agent.pid}), {how}, after {1000 * (time.monotonic() - began):.0f} ms")
        ended = await fleet.scale_down(1)
        print(f"ended, the oldest first: {', '.join(ended)}")
        stats = fleet.get_warm_pool_stats()
        print(f"the pool had what was asked for {stats['hits']} times of {stats['hits'] + stats['misses']}")


asyncio.run(main())
