"""Agents on a socket that the daemon holds: not one request is lost, whatever becomes of the agents or the daemon."""

import json
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.real.harness import Json, Place, eventually, spec

# Answers with its agent's id after a moment, and when it is asked to stop finishes what it accepted: also what it has not read yet.
AGENT = """
import asyncio, os, signal, socket, sys
async def main():
    busy = set()
    async def serve(reader, writer):
        task = asyncio.current_task()
        busy.add(task)
        try:
            request = await reader.readline()
            if request.startswith(b"GET /slow"):
                await asyncio.sleep(0.5)
            writer.write(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n" + os.environ["FLEETCTL_AGENT_ID"].encode())
            await writer.drain()
        finally:
            writer.close()
            busy.discard(task)
    assert os.environ["LISTEN_PID"] == str(os.getpid()), os.environ
    listening = socket.socket(fileno=int(sys.argv[1]))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(serve, sock=listening)
    await stop.wait()
    # Not close: asyncio drops what it accepted a moment before that.
    asyncio.get_running_loop().remove_reader(listening)
    await asyncio.sleep(0.05)
    while busy:
        await asyncio.wait(busy)
asyncio.run(main())
"""
COMMAND = (sys.executable, "-I", "-S", "-c", AGENT, "{fd}")


def ask(address: tuple[str, int] | str, path: str = "/") -> str:
    """What an agent says; anything but a whole answer is an error."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(20)
        client.connect(address)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while data := client.recv(4096):
            answer += data
    head, found, body = answer.decode().partition("\r\n\r\n")
    if not found or not head.startswith("HTTP/1.1 200"):
        raise ConnectionError(f"no answer but {answer!r}")
    return body


class Load:
    """Requests without a pause, from several sides, and what became of them."""

    def __init__(self, address: tuple[str, int] | str) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._address = address
        self._end = threading.Event()

    def _ask(self) -> None:
        while not self._end.is_set():
            try:
                self.answers[ask(self._address)] += 1
            except OSError as error:
                self.failures.append(repr(error))

    @contextmanager
    def running(self, sides: int = 6) -> Iterator["Load"]:
        threads = [threading.Thread(target=self._ask) for _ in range(sides)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._end.set()
            for thread in threads:
                thread.join()


def sockets(place: Place, fleet: str = "web") -> dict[str, Json]:
    (found,) = place.client.status(fleet)["fleets"]
    return {one["name"]: dict(one) for one in found["sockets"]}


def address(place: Place, fleet: str = "web", name: str = "http") -> tuple[str, int]:
    host, _, port = sockets(place, fleet)[name]["address"].rpartition(":")
    return host, int(port)


def web(replicas: int, **settings: object) -> Json:
    return {**spec("web", COMMAND, replicas), "sockets": {"http": "127.0.0.1:0"}, **settings}


def test_no_request_is_lost_over_restarts_scaling_and_the_death_of_the_daemon(place: Place) -> None:
    place.start()
    place.client.apply("web", web(3))
    eventually(lambda: place.settled("web", 3), "three agents are ready")
    with Load(address(place)).running() as load:
        before = place.leaders()
        place.client.restart("web")
        eventually(lambda: place.settled("web", 3) and not set(before.values()) & set(place.leaders().values()), "all are replaced")
        place.client.scale("web", replicas=1)
        eventually(lambda: place.settled("web", 1), "one is left")
        (kept,) = place.leaders().values()
        place.kill()
        place.start()
        eventually(lambda: place.settled("web", 1), "it is adopted")
        assert list(place.leaders().values()) == [kept]
        assert not place.client.status("web")["fleets"][0]["notes"]
        place.client.scale("web", replicas=3)
        eventually(lambda: place.settled("web", 3), "there are three again")
        place.client.restart("web", all_at_once=True)
        eventually(lambda: place.settled("web", 3) and kept not in place.leaders().values(), "all are replaced at once")
        asked = load.answers.total()
        eventually(lambda: load.answers.total() > asked + 50, "the last ones answer")
    assert not load.failures


def test_what_waits_while_an_agent_stands_still_and_is_killed_is_answered_by_the_next(place: Place) -> None:
    place.start()
    place.client.apply("web", web(1))
    eventually(lambda: place.settled("web", 1), "it is ready")
    where = address(place)
    ((agent_id, pid),) = place.leaders().items()
    os.kill(pid, signal.SIGSTOP)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(where))) for _ in range(20)]
    for thread in threads:
        thread.start()
    eventually(lambda: sockets(place)["http"]["backlog"] == 20, "all wait")
    shown = place.run("status", "web").stdout
    assert f"listens on {where[0]}:{where[1]} (http, 20 waiting)" in shown
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert answers == [agent_id] * 20
    assert place.leaders()[agent_id] != pid


def test_an_agent_is_not_suspended_with_a_request_in_its_hands(place: Place) -> None:
    place.start()
    pool = {"enabled": True, "size": 1, "refresh_interval_seconds": 3600.0}
    place.client.apply("web", web(1, warm_pool=pool, readiness={"settle_seconds": 0.3}))
    eventually(lambda: any(agent["pooled"] and agent["pid"] for agent in place.agents()), "one starts for the pool")
    (replica,), (pooled,) = ([agent for agent in place.agents() if agent["pooled"] is wanted] for wanted in (False, True))
    # The replica stands still, so that whoever is on its way into the pool is all that can answer.
    os.kill(replica["pid"], signal.SIGSTOP)
    assert ask(address(place), "/slow") == pooled["id"]
    eventually(lambda: [agent["state"] for agent in place.agents() if agent["pooled"]] == ["suspended"], "it is suspended when it is idle")
    os.kill(replica["pid"], signal.SIGCONT)


def test_a_changed_socket_is_bound_before_the_agents_are_replaced_and_the_old_one_ends_with_them(place: Place, tmp_path: Path) -> None:
    place.start()
    place.client.apply("web", web(2))
    eventually(lambda: place.settled("web", 2), "two agents are ready")
    old, before = address(place), place.leaders()
    path = f"{place.root}/web.sock"
    changed = web(2, sockets={"http": f"unix:{path}"})
    place.client.apply("web", changed)
    assert ask(path) in before
    eventually(lambda: place.settled("web", 2) and not set(before.values()) & set(place.leaders().values()), "both are replaced")
    with pytest.raises(ConnectionRefusedError):
        ask(old)
    place.kill()
    place.start()
    eventually(lambda: place.settled("web", 2), "they are adopted")
    assert sockets(place)["http"] == {"name": "http", "address": f"unix:{path}", "backlog": 0}
    assert ask(path) in before
    place.run("down", "web")
    assert not os.path.exists(path)


def test_what_cannot_be_bound_changes_nothing(place: Place) -> None:
    place.start()
    place.client.apply("web", web(1))
    eventually(lambda: place.settled("web", 1), "it is ready")
    where = address(place)
    file = Path(place.root, "fleet.toml")
    file.write_text(f'[fleet]\nname = "other"\ncommand = ["sleep", "600"]\nsockets = {{ api = "{where[0]}:{where[1]}" }}\n')
    for words in (("up", "--file", str(file)), ("up", "--file", str(file), "--dry-run")):
        refused = place.run(*words, check=False)
        assert refused.returncode == 6
        assert f"sockets.api: {where[0]}:{where[1]} is taken by fleet web" in refused.stderr
    assert [fleet["name"] for fleet in place.client.status()["fleets"]] == ["web"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        refused = place.run("up", "--json", "--file", str(_with_socket(file, taken)), check=False)
        assert refused.returncode == 6
        assert f"127.0.0.1:{taken} is taken" in json.loads(refused.stdout or refused.stderr)["error"]["message"]
    assert place.settled("web", 1)
    assert ask(where) in place.leaders()


def _with_socket(file: Path, port: int) -> Path:
    file.write_text(f'[fleet]\nname = "web"\ncommand = ["sleep", "600"]\nsockets = {{ http = "127.0.0.1:{port}" }}\n')
    return file


def test_uvicorn_serves_on_the_descriptor_it_is_told(place: Place) -> None:
    Path(place.root, "app.py").write_text(
        "async def app(scope, receive, send):\n"
        "    if scope['type'] == 'http':\n"
        "        headers = [(b'connection', b'close'), (b'content-length', b'12')]\n"
        "        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})\n"
        "        await send({'type': 'http.response.body', 'body': b'from uvicorn'})\n"
    )
    command = (sys.executable, "-m", "uvicorn", "app:app", "--fd", "{fd}", "--lifespan", "off")
    readiness = {"http": "http://127.0.0.1:{port}/", "interval_seconds": 0.2}
    place.start()
    place.client.apply("web", web(1, command=list(command), cwd=place.root, readiness=readiness))
    eventually(lambda: place.settled("web", 1), "it is ready")
    assert ask(address(place)) == "from uvicorn"
