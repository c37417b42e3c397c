"""`fleetctl.client.Client` in front of the real server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetctl.client import Client
from fleetctl.errors import ConfigError, DaemonUnreachable, NotFound, UsageError
from tests.daemon.serving import AGENT_ID, CHECKPOINT_ID, Serving, event, serving, short_folder, wait_until


@pytest.fixture
def server() -> Iterator[Serving]:
    with short_folder() as folder, serving(path=f"{folder}/run/control.sock") as found:
        yield found


@pytest.fixture
def client(server: Serving) -> Iterator[Client]:
    with Client(str(Path(server.path).parent.parent)) as found:
        yield found


CALLS: list[tuple[Callable[[Client], Any], str, tuple[Any, ...]]] = [
    (lambda client: client.status(), "status", ("status", None)),
    (lambda client: client.status("demo"), "status", ("status", "demo")),
    (lambda client: client.fleet("demo"), "fleet", ("fleet", "demo")),
    (lambda client: client.agent(AGENT_ID), "agent", ("agent", AGENT_ID)),
    (lambda client: client.apply("demo", {"name": "demo"}), "change", ("apply", "demo", {"name": "demo"}, True, False)),
    (lambda client: client.apply("demo", {}, replicas_given=False, dry_run=True), "change", ("apply", "demo", {}, False, True)),
    (lambda client: client.scale("demo", 0), "change", ("scale", "demo", 0, None, False)),
    (lambda client: client.scale("demo", delta=-1, dry_run=True), "change", ("scale", "demo", None, -1, True)),
    (lambda client: client.resize_warm_pool("demo", 3), "change", ("warm", "demo", 3, False)),
    (lambda client: client.resize_warm_pool("demo", 0, dry_run=True), "change", ("warm", "demo", 0, True)),
    (lambda client: client.checkpoints("demo"), "checkpoints", ("list_checkpoints", "demo", None)),
    (lambda client: client.checkpoint(CHECKPOINT_ID), "checkpoint", ("checkpoint", CHECKPOINT_ID)),
    (lambda client: client.create_checkpoint(AGENT_ID), "checkpointed", ("create_checkpoint", AGENT_ID, False)),
    (
        lambda client: client.restore_checkpoint(CHECKPOINT_ID, timeout_seconds=1),
        "restored",
        ("restore_checkpoint", CHECKPOINT_ID, 1, False),
    ),
    (
        lambda client: client.remove_checkpoint(CHECKPOINT_ID, dry_run=True),
        "checkpoint-removed",
        ("remove_checkpoint", CHECKPOINT_ID, True),
    ),
    (lambda client: client.drain(AGENT_ID, now=True), "drained", ("drain", AGENT_ID, True, False)),
    (lambda client: client.acquire("demo"), "acquired", ("acquire", "demo", {"environment": {}, "tools": []}, False, 30.0)),
    (
        lambda client: client.acquire("demo", environment={"A": "1"}, tools=("search",), require_warm=True, timeout_seconds=1),
        "acquired",
        ("acquire", "demo", {"environment": {"A": "1"}, "tools": ["search"]}, True, 1),
    ),
    (lambda client: client.restart("demo"), "change", ("restart", "demo", None, False, False)),
    (lambda client: client.restart("demo", (AGENT_ID,), all_at_once=True), "change", ("restart", "demo", [AGENT_ID], True, False)),
    (lambda client: client.down("demo"), "change", ("down", "demo", False, False)),
    (lambda client: client.down("demo", now=True, dry_run=True), "change", ("down", "demo", True, True)),
    (lambda client: client.history(), "history", ("history", None, 20)),
    (lambda client: client.history("demo", 7), "history", ("history", "demo", 7)),
    (lambda client: client.events(), "events", ("events", None, 100)),
    (lambda client: client.events("demo", 0), "events", ("events", "demo", 0)),
    (lambda client: client.daemon(), "daemon", ("daemon",)),
    (lambda client: client.shutdown("drain"), "shutdown", ("shutdown", "drain")),
]


@pytest.mark.parametrize(("call", "kind", "asked"), CALLS, ids=[str(asked) for _, _, asked in CALLS])
def test_each_method_asks_what_it_says(
    server: Serving, client: Client, call: Callable[[Client], Any], kind: str, asked: tuple[Any, ...]
) -> None:
    assert call(client)["schema"] == f"fleetctl/{kind}/v1"
    assert server.control.asked == [asked]


def test_the_document_lists_every_path(client: Client) -> None:
    assert "/v1/status" in client.openapi()["paths"]


def test_a_status_can_be_watched_while_the_client_asks_other_things(server: Serving, client: Client) -> None:
    with client.watch_status(0.05, "demo") as statuses:
        assert next(statuses)["fleets"][0]["name"] == "demo"
        assert client.daemon()["fleets"] == ["demo"]
        server.control.change("new")
        assert next(statuses)["fleets"][0]["notes"] == ["new"]
    wait_until(lambda: server.connections == 1)


def test_events_can_be_followed(server: Serving, client: Client) -> None:
    with client.follow_events("demo", limit=1) as events:
        assert next(events) == event(4)
        server.control.in_loop(lambda: server.control.happen(5))
        assert next(events) == event(5)
    wait_until(lambda: not server.control.followers)


def test_errors_of_the_daemon_are_raised(server: Serving, client: Client) -> None:
    with pytest.raises(NotFound):
        client.fleet("other")
    with pytest.raises(NotFound):
        client.watch_status(1, "other")
    with pytest.raises(UsageError):
        client.fleet("Not a name!")
    with pytest.raises(NotFound):
        client.fleet("../../etc")
    with pytest.raises(UsageError):
        client.scale("demo")
    with pytest.raises(UsageError):
        client.shutdown("now")
    server.control.fail = ConfigError("no")
    with pytest.raises(ConfigError):
        client.apply("demo", {})


def test_without_a_daemon_every_method_says_so(tmp_path: Path) -> None:
    client = Client(str(tmp_path))
    for call, _, _ in CALLS:
        with pytest.raises(DaemonUnreachable, match=str(tmp_path)):
            call(client)
    with pytest.raises(DaemonUnreachable):
        client.watch_status(1)
    assert list(tmp_path.iterdir()) == []  # and starts or makes nothing


def test_the_state_directory_comes_from_the_environment(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETCTL_STATE_DIR", str(Path(server.path).parent.parent))
    with Client() as client:
        assert client.daemon()["alive"] is True


def test_a_client_outlives_its_daemon(server: Serving, client: Client) -> None:
    assert client.daemon()["alive"] is True
    server.stop()
    with pytest.raises(DaemonUnreachable, match="does not run"):
        client.daemon()
