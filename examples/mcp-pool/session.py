"""A session: acquires an MCP server for its folder, uses it, tells how long that took, and ends it."""

import asyncio
import sys
import time
from pathlib import Path

from mcp import Client as McpClient

from fleetctl.client import Client
from fleetctl.host.paths import choose_state_dir

FLEET = "mcp-pool"


async def use(url: str) -> list[str]:
    async with McpClient(url) as server:
        await server.call_tool("write_note", {"name": "plan.md", "text": "1. ask\n2. do\n"})
        found = await server.call_tool("read_note", {"name": "plan.md"})
        print(f"the note says {found.content[0].text!r}")  # type: ignore[union-attr]  # a tool that returns text
        return [tool.name for tool in (await server.list_tools()).tools]


def main(workspace: Path) -> None:
    with Client(choose_state_dir()) as fleetctl:
        began = time.perf_counter()
        got = fleetctl.acquire(FLEET, environment={"WORKSPACE": str(workspace)}, tools=["write_note", "read_note"])
        took = time.perf_counter() - began
        url = fleetctl.agent(got["agent_id"])["status_text"]
        how = "from the warm pool" if got["from_warm_pool"] else "by a cold start"
        print(f"{got['agent_id']} at {url}, {how} in {took * 1000:.1f} ms")
        try:
            print(f"its tools: {', '.join(asyncio.run(use(url)))}")
        finally:
            fleetctl.drain(got["agent_id"])


main(Path(sys.argv[1]).resolve())
