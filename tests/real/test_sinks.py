"""A daemon sends its events on: to a file, and to a real Redis that is away for a while, over the death of the daemon too."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from tests.real.harness import Place, eventually, spec
from tests.servers import require


@contextmanager
def a_redis(folder: Path) -> Iterator["redis.Redis"]:
    """A server that keeps everything on disk, on a socket of its own."""
    program, path = require("redis-server"), f"{folder}/redis.sock"
    words = ["--port", "0", "--unixsocket", path, "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    server = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=path)

    def answers() -> bool:
        with suppress(redis.RedisError):
            return bool(client.ping())
        return False

    try:
        eventually(answers, "redis answers")
        yield client
    finally:
        client.close()
        server.terminate()
        server.wait()


def entries(client: "redis.Redis") -> list[Any]:  # Any: JSON values
    found: Any = client.xrange("fleetctl:events")
    return [json.loads(fields[b"event"]) for _, fields in found]


def test_events_reach_a_file_and_a_redis_that_was_away(place: Place) -> None:
    folder = Path(place.root)
    target = folder / "events.jsonl"
    (folder / "sinks.toml").write_text(
        f'[[sink]]\ntype = "file"\npath = "{target}"\n[[sink]]\ntype = "redis"\nurl = "unix://{place.root}/redis.sock"\n'
    )
    place.start()
    eventually(lambda: all(one["position"] is not None for one in place.json("sinks")["sinks"]), "both know where to begin")
    with a_redis(folder) as client:
        place.client.apply("web", spec("web", ["sleep", "600"], 1))
        eventually(lambda: [one["type"] for one in entries(client)].count("fleetctl.agent.ready") == 1, "the first events are there")
    place.client.scale("web", replicas=3)  # while redis is away
    eventually(lambda: place.settled("web", 3), "three agents are ready")
    eventually(lambda: place.json("sinks")["sinks"][1]["trouble"], "the trouble is shown")
    place.kill()
    place.start()
    place.client.scale("web", replicas=1)
    eventually(lambda: place.settled("web", 1), "one agent is left")
    with a_redis(folder) as client:
        happened = place.client.events(limit=1000)["events"]
        eventually(lambda: len(entries(client)) >= len(happened), "what happened meanwhile arrives", 20)
        sent = entries(client)
    assert [one["data"]["message"] for one in sent] == [one["message"] for one in happened]
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [one["id"] for one in lines] == [one["id"] for one in sent]
    assert len({one["id"] for one in sent}) == len(sent)
    assert json.loads(place.run("events", "--json", "-n", "1000").stdout)["events"] == sent
    assert 'fleetctl_sink_delivered_total{sink="redis"}' in place.run("metrics").stdout


def test_a_bad_file_stops_no_daemon_and_is_told(place: Place) -> None:
    Path(place.root, "sinks.toml").write_text("[[sink]]\n")
    place.start()
    note = place.client.daemon()["note"]
    assert note is not None
    assert "no events are sent anywhere" in note
