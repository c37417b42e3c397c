"""A small web application on the socket that fleetctl hands over, which ends without dropping a request.

`uvicorn app:app --fd 3` would do nearly the same. What it does not: when it is asked to stop it closes every connection on which no
request has been read yet, also one that it accepted a moment ago. So this one stops accepting first, and waits for those to be read.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
LISTEN_FDS_START = 3
LAST_LOOK_SECONDS = 0.3


async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
    """Say which agent answered, after a moment's work."""
    if scope["type"] != "http":
        return
    await asyncio.sleep(0.02)
    body = f"hello from agent {os.environ['FLEETCTL_SLOT']}, process {os.getpid()}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # What is in the socket's queue is for the other agents. Closing it here would drop what was accepted in this very moment.
        for sock in sockets or ():
            asyncio.get_running_loop().remove_reader(sock)
        await asyncio.sleep(LAST_LOOK_SECONDS)
        await super().shutdown(sockets)


if __name__ == "__main__":
    config = uvicorn.Config(app, loop="asyncio", lifespan="off", access_log=False)
    Server(config).run(sockets=[socket.socket(fileno=LISTEN_FDS_START)])
