"""An MCP server for one session: notes in the folder that its claim names, and only the tools that its claim allows."""

import asyncio
import socket
from pathlib import Path

import uvicorn
from mcp.server import MCPServer

from fleetctl import agent

server = MCPServer("notes", instructions="Keeps the notes of one session.")
folder = Path()


@server.tool()
def write_note(name: str, text: str) -> str:
    """Write a note."""
    path = folder / Path(name).name
    path.write_text(text)
    return f"written to {path}"


@server.tool()
def read_note(name: str) -> str:
    """Read a note."""
    return (folder / Path(name).name).read_text()


@server.tool()
def list_notes() -> list[str]:
    """The names of all notes."""
    return sorted(path.name for path in folder.iterdir())


def claimed(claim: agent.Claim) -> None:
    """From now on it is somebody's, or, where it was not acquired, anybody's."""
    global folder
    folder = Path(claim.environment.get("WORKSPACE") or agent.state_directory() or ".")
    folder.mkdir(parents=True, exist_ok=True)
    if claim.tools:
        for tool in {"write_note", "read_note", "list_notes"} - set(claim.tools):
            server.remove_tool(tool)


class Server(uvicorn.Server):
    """Says where it listens as soon as it does: that is its status, which `fleetctl inspect` shows."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()
        agent.ready(f"http://{host}:{port}/mcp")


async def main() -> None:
    agent.on_claim(claimed)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(server.streamable_http_app(), log_level="warning")
        await Server(config).serve([listener])


asyncio.run(main())
