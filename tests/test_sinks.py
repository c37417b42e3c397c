"""Events to other places: what may be set, the envelope, each place for real, and a pump that loses and reorders nothing."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fleetctl.errors import ConfigError
from fleetctl.sinks import settings
from fleetctl.sinks.envelope import cloud_event, loss
from fleetctl.sinks.places import FilePlace, Trouble, Webhook, place_of, secret_of, signature
from fleetctl.sinks.progress import Progress, load, save
from fleetctl.sinks.pump import Pump
from fleetctl.sinks.settings import SinkSettings
from tests.helpers import wait_for

Json = Mapping[str, Any]  # Any: JSON values


def an_event(number: int = 1, kind: str = "agent.started", fleet: str = "web") -> dict[str, Any]:
    more = {"fleet": fleet, "agent_id": f"{fleet}-aaaaa", "message": f"number {number}", "data": {"n": number}}
    return {"id": f"e{number}", "at": 1_700_000_000.25, "kind": kind, **more}


# -- settings


def written(text: str, folder: Path) -> list[SinkSettings]:
    (folder / "sinks.toml").write_text(text)
    return settings.read(str(folder / "sinks.toml"))


def test_sinks_are_read_with_their_defaults(tmp_path: Path) -> None:
    text = """
[[sink]]
type = "file"
path = "/var/log/events.jsonl"
[[sink]]
name = "hook"
type = "webhook"
url = "https://user:pw@example.org:8443/in?x=1"
secret = "env:HOOK"
kinds = ["agent.*", "fleet.scaled"]
fleets = ["web"]
[[sink]]
name = "stream"
type = "redis"
url = "env:REDIS_URL"
"""
    one, two, three = written(text, tmp_path)
    assert (one.name, one.target) == ("file", "/var/log/events.jsonl")
    assert two.target == "https://example.org:8443/in"
    assert (three.target, three.stream, three.max_length) == ("env:REDIS_URL", "fleetctl:events", 100_000)
    assert [two.wants(an_event(kind=kind)) for kind in ("agent.started", "fleet.scaled", "fleet.other")] == [True, True, False]
    assert [two.wants(an_event(fleet=fleet)) for fleet in ("web", "api")] == [True, False]


def test_no_file_means_no_sinks(tmp_path: Path) -> None:
    assert settings.read(str(tmp_path / "sinks.toml")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[sink]]\n", "type = None"),
        ('[[sink]]\ntype = "kafka"', "there are file, webhook, redis"),
        ('[[sink]]\ntype = "file"', "path is missing"),
        ('[[sink]]\ntype = "file"\npath = "x"', "must be absolute"),
        ('[[sink]]\ntype = "file"\npath = "/x"\nurl = "y"', "url: no such setting"),
        ('[[sink]]\ntype = "file"\npath = 3', "must be text"),
        ('[[sink]]\ntype = "file"\npath = "/x"\nname = "A B"', "lower-case"),
        ('[[sink]]\ntype = "file"\npath = "/x"\nkinds = "agent.*"', "list of patterns"),
        ('[[sink]]\ntype = "webhook"\nurl = "ftp://x"', "http:// or https://"),
        ('[[sink]]\ntype = "webhook"\nurl = "http://"', "name a host"),
        ('[[sink]]\ntype = "webhook"\nurl = "http://[x"', "name a host"),
        ('[[sink]]\ntype = "webhook"\nurl = "http://x"\nsecret = "hunter2"', "does not belong here"),
        ('[[sink]]\ntype = "webhook"\nurl = "http://x"\ntimeout_seconds = 0', "above 0"),
        ('[[sink]]\ntype = "redis"\nurl = "redis://x"\nmax_length = true', "whole number"),
        ('[[sink]]\ntype = "file"\npath = "/x"\n[[sink]]\ntype = "file"\npath = "/y"', "name of its own"),
        ('[sink]\ntype = "file"', "[[sink]]"),
        ("sinks = 1", "there is only [[sink]]"),
        ("= 1", "not valid TOML"),
    ],
)
def test_mistakes_are_told(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        written(text, tmp_path)
    assert said in caught.value.message
    assert "hunter2" not in caught.value.message


# -- the envelope


def test_an_event_becomes_a_cloud_event() -> None:
    made = cloud_event(an_event(3), "//host/state")
    assert made == {
        "specversion": "1.0",
        "id": "e3",
        "source": "//host/state",
        "type": "fleetctl.agent.started",
        "subject": "web-aaaaa",
        "time": "2023-11-14T22:13:20.250Z",
        "datacontenttype": "application/json",
        "data": {"fleet": "web", "agent_id": "web-aaaaa", "message": "number 3", "n": 3},
    }


def test_a_loss_is_an_event_too() -> None:
    made = cloud_event(loss(3, 9, 5.0), "s")
    assert (made["type"], made["data"]["first"], made["data"]["last"]) == ("fleetctl.sink.lost", 3, 9)
    assert "7 events" in made["data"]["message"]


# -- places


def events(*numbers: int) -> list[Json]:
    return [cloud_event(an_event(number), "s") for number in numbers]


def numbers(lines: Sequence[str]) -> list[int]:
    return [json.loads(line)["data"]["n"] for line in lines]


def test_a_file_gets_a_line_for_each_event_and_may_be_rotated(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    place = FilePlace(str(path))
    place.deliver(events(1, 2))
    path.rename(tmp_path / "old")
    place.deliver(events(3))
    assert numbers((tmp_path / "old").read_text().splitlines()) == [1, 2]
    assert numbers(path.read_text().splitlines()) == [3]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/at/all", "/tmp"])
def test_a_file_that_cannot_be_written_is_trouble(path: str) -> None:
    with pytest.raises(Trouble, match=path):
        FilePlace(path).deliver(events(1))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(Trouble):
        FilePlace(str(tmp_path / "link")).deliver(events(1))
    assert not (tmp_path / "target").exists()


class Receiver:
    """A web server that answers as it is told, one status a request, 200 where nothing is said."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[tuple[Mapping[str, str], bytes]] = []


@contextmanager
def receiving() -> Iterator[tuple[Receiver, str]]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = receiver.statuses.pop(0) if receiver.statuses else 200
            if status == 200:
                receiver.got.append((dict(self.headers), body))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield receiver, f"http://127.0.0.1:{server.server_port}/in"
    finally:
        server.shutdown()
        server.server_close()


def test_a_webhook_is_signed_so_that_the_receiver_can_check_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "whsec_c2VjcmV0")
    with receiving() as (receiver, url):
        place = Webhook(SinkSettings(name="hook", type="webhook", url=url, secret="env:HOOK"))
        place.deliver(events(1, 2))
        place.close()
    assert [json.loads(body)["data"]["n"] for _, body in receiver.got] == [1, 2]
    headers, body = receiver.got[0]
    assert headers["Content-Type"].startswith("application/cloudevents+json")
    event = json.loads(body)
    assert headers["webhook-id"] == event["id"]
    assert headers["webhook-signature"] == signature(event, headers["webhook-timestamp"], body, "secret")


@pytest.mark.parametrize(
    ("statuses", "taken", "got"),
    [
        ([500], 0, []),
        ([200, 503], 1, [1]),
        ([302], 0, []),
        ([401], 0, []),
        ([429], 0, []),
        ([400], None, [2, 3]),
        ([200, 422], None, [1, 3]),
    ],
    ids=str,
)
def test_what_a_webhook_does_not_take_is_sent_again_unless_it_is_bad_for_ever(
    statuses: list[int], taken: int | None, got: list[int]
) -> None:
    with receiving() as (receiver, url):
        receiver.statuses = statuses
        place = Webhook(SinkSettings(name="hook", type="webhook", url=url))
        if taken is None:
            place.deliver(events(1, 2, 3))
        else:
            with pytest.raises(Trouble) as caught:
                place.deliver(events(1, 2, 3))
            assert caught.value.taken == taken
        place.close()
    assert [json.loads(body)["data"]["n"] for _, body in receiver.got] == got


def test_a_webhook_that_is_away_is_trouble() -> None:
    with receiving() as (_, url):
        pass
    with pytest.raises(Trouble, match="refused"):
        Webhook(SinkSettings(name="hook", type="webhook", url=url)).deliver(events(1))


def test_a_secret_that_is_not_there_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    for reference in ("env:NOT_SET", f"file:{tmp_path}/none"):
        with pytest.raises(Trouble):
            secret_of(reference)
    (tmp_path / "key").write_text("k\n")
    assert secret_of(f"file:{tmp_path}/key") == "k"


# -- the pump


class Log:
    """The events table: numbered from 1, cut at the front."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Json]] = []
        self.last = 0

    def add(self, count: int = 1, kind: str = "agent.started") -> None:
        for _ in range(count):
            self.last += 1
            self.rows.append((self.last, an_event(self.last, kind)))

    async def read(self, after: int, limit: int) -> tuple[int, list[tuple[int, Json]]]:
        return self.last, [row for row in self.rows if row[0] > after][:limit]


class Moody:
    """A place that takes events or does not, by a seed; keeps what it took."""

    def __init__(self, seed: int, failing: float) -> None:
        self.random, self.failing = random.Random(seed), failing
        self.took: list[Json] = []

    def deliver(self, given: Sequence[Json]) -> None:
        if self.random.random() < self.failing:
            taken = self.random.randint(0, len(given) - 1)
            self.took += given[:taken]
            raise Trouble("not now", taken)
        self.took += given

    def close(self) -> None:
        pass


def a_pump(log: Log, place: Moody, folder: Path, **changes: Any) -> Pump:
    given = SinkSettings(name="x", type="file", path="/x", **changes)
    return Pump(given, log.read, str(folder / "x.json"), source="s", clock=lambda: 1.0, make=lambda _: place, first_wait_seconds=0.0001)


@contextmanager
def running(pump: Pump) -> Iterator[None]:
    task = asyncio.get_running_loop().create_task(pump.run())
    try:
        yield
    finally:
        task.cancel()
        pump.close(wait=True)  # as when the process is gone


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_doubled_or_reordered_whatever_fails_and_however_often_it_restarts(seed: int, tmp_path: Path) -> None:
    async def story() -> None:
        log, place, luck = Log(), Moody(seed, 0.4), random.Random(seed)
        save(str(tmp_path / "x.json"), Progress(position=0))
        for _ in range(4):
            pump = a_pump(log, place, tmp_path)
            with running(pump):
                for _ in range(5):
                    log.add(luck.randint(0, 150))
                    pump.notify()
                    await asyncio.sleep(0)
                await wait_for(lambda: load(str(tmp_path / "x.json")).position == log.last)
        assert [event["data"]["n"] for event in place.took] == list(range(1, log.last + 1))
        assert load(str(tmp_path / "x.json")).delivered == log.last

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(4))
def test_a_sink_that_is_killed_at_any_moment_sends_some_twice_and_loses_none(seed: int, tmp_path: Path) -> None:
    async def story() -> None:
        log, place, luck = Log(), Moody(seed, 0.2), random.Random(seed)
        save(str(tmp_path / "x.json"), Progress(position=0))
        for _ in range(10):
            log.add(luck.randint(1, 300))
            with running(a_pump(log, place, tmp_path)):
                for _ in range(luck.randint(0, 40)):
                    await asyncio.sleep(0)
        with running(a_pump(log, place, tmp_path)):
            await wait_for(lambda: load(str(tmp_path / "x.json")).position == log.last)
        assert list(dict.fromkeys(event["data"]["n"] for event in place.took)) == list(range(1, log.last + 1))

    asyncio.run(story())


def test_a_new_sink_hears_only_of_what_happens_from_now_on(tmp_path: Path) -> None:
    async def story() -> None:
        log, place = Log(), Moody(0, 0.0)
        log.add(5)
        pump = a_pump(log, place, tmp_path)
        with running(pump):
            await wait_for(lambda: pump.progress.position == 5)
            log.add(2)
            pump.notify()
            await wait_for(lambda: len(place.took) == 2)
        assert [event["data"]["n"] for event in place.took] == [6, 7]

    asyncio.run(story())


def test_what_was_gone_before_it_could_be_sent_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        log, place = Log(), Moody(0, 0.0)
        save(str(tmp_path / "x.json"), Progress(position=2))
        log.add(10)
        del log.rows[:6]  # 1 to 6 are kept no longer
        with running(a_pump(log, place, tmp_path, kinds=("nothing",))):
            await wait_for(lambda: place.took)
        (told,) = place.took
        assert (told["type"], told["data"]["first"], told["data"]["last"]) == ("fleetctl.sink.lost", 3, 6)

    asyncio.run(story())


def test_a_database_that_was_begun_anew_is_sent_from_its_beginning(tmp_path: Path) -> None:
    async def story() -> None:
        log, place = Log(), Moody(0, 0.0)
        save(str(tmp_path / "x.json"), Progress(position=500))
        log.add(3)
        with running(a_pump(log, place, tmp_path)):
            await wait_for(lambda: len(place.took) == 3)

    asyncio.run(story())


def test_only_what_is_wanted_is_sent_and_the_rest_is_done_with(tmp_path: Path) -> None:
    async def story() -> None:
        log, place = Log(), Moody(0, 0.0)
        save(str(tmp_path / "x.json"), Progress(position=0))
        log.add(2, "agent.started")
        log.add(2, "fleet.scaled")
        pump = a_pump(log, place, tmp_path, kinds=("fleet.*",))
        with running(pump):
            await wait_for(lambda: pump.progress.position == 4)
        assert [event["type"] for event in place.took] == ["fleetctl.fleet.scaled"] * 2

    asyncio.run(story())


def test_trouble_is_remembered_until_it_goes(tmp_path: Path) -> None:
    async def story() -> None:
        log, place = Log(), Moody(0, 1.0)
        save(str(tmp_path / "x.json"), Progress(position=0))
        log.add(1)
        pump = a_pump(log, place, tmp_path)
        with running(pump):
            await wait_for(lambda: load(str(tmp_path / "x.json")).trouble == "not now")
            place.failing = 0.0
            await wait_for(lambda: load(str(tmp_path / "x.json")).trouble == "" and pump.progress.position == 1)
        assert pump.progress.failures >= 1

    asyncio.run(story())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"position": 1}', "\0"])
def test_a_damaged_memory_means_a_fresh_start(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    assert load(str(tmp_path / "x.json")) == Progress()


def test_the_place_follows_from_the_type() -> None:
    assert isinstance(place_of(SinkSettings(name="f", type="file", path="/x")), FilePlace)
    assert isinstance(place_of(SinkSettings(name="w", type="webhook", url="http://x")), Webhook)
