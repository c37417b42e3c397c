"""The control socket under friends, fools and enemies. All sockets, requests and processes are real."""

import asyncio
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from fleetctl.daemon import api, guard
from fleetctl.daemon.server import ControlServer, Limits, bind
from fleetctl.daemon.wire import Connection, Stream
from fleetctl.errors import ConfigError, DaemonRunning, NotFound, StateDirectoryError
from tests.daemon.serving import AGENT_ID, CHECKPOINT_ID, FakeControl, Serving, event, read_to_end, serving, short_folder, wait_until

GET_DAEMON = b"GET /v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n"
# One working request of each operation.
REQUESTS: Mapping[tuple[str, str], tuple[str, Any]] = {
    ("GET", "/v1/status"): ("/v1/status?fleet=demo", None),
    ("GET", "/v1/fleets/{fleet}"): ("/v1/fleets/demo", None),
    ("PUT", "/v1/fleets/{fleet}"): ("/v1/fleets/demo", {"spec": {"name": "demo"}, "replicas_given": False, "dry_run": True}),
    ("DELETE", "/v1/fleets/{fleet}"): ("/v1/fleets/demo?now=1&dry_run=0", None),
    ("POST", "/v1/fleets/{fleet}/scale"): ("/v1/fleets/demo/scale", {"delta": -2}),
    ("POST", "/v1/fleets/{fleet}/warm"): ("/v1/fleets/demo/warm", {"size": 3}),
    ("GET", "/v1/fleets/{fleet}/autoscaling"): ("/v1/fleets/demo/autoscaling", None),
    ("POST", "/v1/fleets/{fleet}/autoscaling"): ("/v1/fleets/demo/autoscaling", {"enabled": True, "mode": "recommend"}),
    ("POST", "/v1/fleets/{fleet}/budget"): ("/v1/fleets/demo/budget", {}),
    ("POST", "/v1/fleets/{fleet}/acquire"): (
        "/v1/fleets/demo/acquire",
        {"claim": {"environment": {"TASK": "7"}}, "require_warm": True, "timeout_seconds": 2.5},
    ),
    ("POST", "/v1/fleets/{fleet}/restart"): ("/v1/fleets/demo/restart", {"agents": [AGENT_ID], "all_at_once": True}),
    ("GET", "/v1/agents/{agent}"): (f"/v1/agents/{AGENT_ID}", None),
    ("POST", "/v1/agents/{agent}/drain"): (f"/v1/agents/{AGENT_ID}/drain", {"now": True}),
    ("POST", "/v1/agents/{agent}/protect"): (f"/v1/agents/{AGENT_ID}/protect", {"protected": False}),
    ("POST", "/v1/agents/{agent}/checkpoint"): (f"/v1/agents/{AGENT_ID}/checkpoint", {}),
    ("GET", "/v1/checkpoints"): (f"/v1/checkpoints?fleet=demo&agent={AGENT_ID}", None),
    ("GET", "/v1/checkpoints/{checkpoint}"): (f"/v1/checkpoints/{CHECKPOINT_ID}", None),
    ("DELETE", "/v1/checkpoints/{checkpoint}"): (f"/v1/checkpoints/{CHECKPOINT_ID}?dry_run=1", None),
    ("POST", "/v1/checkpoints/{checkpoint}/restore"): (f"/v1/checkpoints/{CHECKPOINT_ID}/restore", {"timeout_seconds": 2.5}),
    ("GET", "/v1/history"): ("/v1/history?fleet=&limit=3", None),
    ("GET", "/v1/samples"): ("/v1/samples?fleet=demo&limit=3", None),
    ("GET", "/v1/events"): ("/v1/events?limit=3", None),
    ("GET", "/v1/daemon"): ("/v1/daemon", None),
    ("GET", "/metrics"): ("/metrics", None),
    ("POST", "/v1/shutdown"): ("/v1/shutdown", {"mode": "keep"}),
    ("GET", "/openapi.json"): ("/openapi.json", None),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Serving]:
    """One server for the tests that neither change it nor measure it."""
    with serving() as found:
        yield found
        assert found.complaints == []


# ---- the document and the answers ----


def conforms(value: Any, schema: Mapping[str, Any], components: Mapping[str, Any], where: str = "answer") -> None:
    """Fails unless the value has the documented shape, and no undocumented keys."""
    types: Mapping[str, Any] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    if "$ref" in schema:
        return conforms(value, components[schema["$ref"].rpartition("/")[2]], components, where)
    if "anyOf" in schema:
        fits = 0
        for one in schema["anyOf"]:
            with suppress(AssertionError):
                conforms(value, one, components, where)
                fits += 1
        assert fits, f"{where}: {value!r} fits none of {schema['anyOf']}"
        return None
    if "const" in schema or "enum" in schema:
        assert value in schema.get("enum", [schema.get("const")]), where
        return None
    assert isinstance(value, types[schema["type"]]), f"{where}: {value!r} is not {schema['type']}"
    if "properties" in schema:
        assert set(schema["required"]) <= set(value) <= set(schema["properties"]), where
        for name, rule in schema["properties"].items():
            if name not in value:
                continue
            conforms(value[name], rule, components, f"{where}.{name}")
    for item in value if schema["type"] == "array" else []:
        conforms(item, schema["items"], components, f"{where}[]")
    return None


def test_every_operation_is_documented_and_exercised_here(shared: Serving) -> None:
    document = json.loads(shared.ask("GET", "/openapi.json").body)
    assert document["openapi"].startswith("3.1")
    documented = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert documented == {(operation.method, operation.path) for operation in api.OPERATIONS} == set(REQUESTS)
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_answers_have_the_documented_shape(shared: Serving, method: str, path: str) -> None:
    document = json.loads(shared.ask("GET", "/openapi.json").body)
    operation = document["paths"][path][method.lower()]
    target, body = REQUESTS[method, path]
    answered = shared.ask(method, target, None if body is None else json.dumps(body).encode())
    assert answered.status == 200, answered.body
    media, described = next(iter(operation["responses"]["200"]["content"].items()))
    assert answered.headers["content-type"] == media
    value = json.loads(answered.body) if media == "application/json" else answered.body.decode()
    conforms(value, described["schema"], document["components"]["schemas"])
    used = set(re.findall(r"{(\w+)}", path)) | {pair.partition("=")[0] for pair in target.partition("?")[2].split("&") if pair}
    assert used <= {parameter["name"] for parameter in operation["parameters"]}
    if body is not None:
        assert set(body) <= set(operation["requestBody"]["content"]["application/json"]["schema"]["properties"])


def test_stream_lines_and_errors_have_the_documented_shape(shared: Serving) -> None:
    document = api.openapi()
    components = document["components"]["schemas"]
    for path, target in (("/v1/status", "/v1/status?watch=0.05"), ("/v1/events", "/v1/events?follow=1")):
        content = document["paths"][path]["get"]["responses"]["200"]["content"]
        with Stream[dict[str, Any]](shared.path, target) as stream:
            conforms(next(stream), content["application/x-ndjson"]["schema"], components)
    error = json.loads(shared.ask("GET", "/nothing").body)
    conforms(error, {"$ref": "#/components/schemas/ErrorReply"}, components)


def test_requests_reach_the_control_with_values_and_defaults() -> None:
    with serving() as server:
        for (method, _), (target, body) in REQUESTS.items():
            assert server.ask(method, target, None if body is None else json.dumps(body).encode()).status == 200
        assert server.ask("POST", "/v1/fleets/demo/restart", b"{}").status == 200
        assert server.ask("POST", "/v1/fleets/demo/acquire", b"{}").status == 200
        assert server.ask("PUT", "/v1/fleets/demo", b'{"spec": {}}').status == 200
        assert server.control.asked == [
            ("status", "demo"),
            ("fleet", "demo"),
            ("apply", "demo", {"name": "demo"}, False, True),
            ("down", "demo", True, False),
            ("scale", "demo", None, -2, False),
            ("warm", "demo", 3, False),
            ("autoscaling", "demo"),
            ("set_autoscaling", "demo", True, "recommend", False),
            ("renew_budget", "demo", False),
            ("acquire", "demo", {"environment": {"TASK": "7"}, "tools": []}, True, 2.5),
            ("restart", "demo", [AGENT_ID], True, False),
            ("agent", AGENT_ID),
            ("drain", AGENT_ID, True, False),
            ("protect", AGENT_ID, False, False),
            ("create_checkpoint", AGENT_ID, False),
            ("list_checkpoints", "demo", AGENT_ID),
            ("checkpoint", CHECKPOINT_ID),
            ("remove_checkpoint", CHECKPOINT_ID, True),
            ("restore_checkpoint", CHECKPOINT_ID, 2.5, False),
            ("history", None, 3),
            ("samples", "demo", 3),
            ("events", None, 3),
            ("daemon",),
            ("shutdown", "keep"),
            ("restart", "demo", None, False, False),
            ("acquire", "demo", {"environment": {}, "tools": []}, False, 30),
            ("apply", "demo", {}, True, False),
        ]


KEEPING = ("create_checkpoint", "restore_checkpoint", "remove_checkpoint", "drain", "protect")
CHANGES = ("apply", "scale", "warm", "set_autoscaling", "renew_budget", "acquire", "restart", "down", "shutdown", *KEEPING)


def changes(server: Serving) -> int:
    """How often the control was asked to change something."""
    return len([asked for asked in server.control.asked if asked[0] in CHANGES])


BAD_REQUESTS: list[tuple[str, str, bytes | None, int]] = [
    ("GET", "/", None, 404),
    ("GET", "/v1/status/", None, 404),
    ("GET", "/v1/fleets/", None, 404),
    ("GET", "/v1/fleets/a%2Fb", None, 404),
    ("GET", "/v1/fleets/other", None, 404),
    ("GET", "/v1/agents/demo-aaaaa", None, 404),
    ("GET", "/v1/status?fleet=other", None, 404),
    ("GET", "/v1/status?fleet=other&watch=1", None, 404),
    ("GET", "/v1/events?fleet=other&follow=1", None, 404),
    ("POST", "/v1/status", b"{}", 405),
    ("HEAD", "/v1/status", None, 405),
    ("PATCH", "/v1/fleets/demo", b"{}", 405),
    ("OPTIONS", "/v1/fleets/demo", None, 405),
    ("GET", "/v1/fleets/Demo", None, 400),
    ("GET", "/v1/fleets/demo%0A", None, 400),
    ("GET", "/v1/fleets/..", None, 400),
    ("GET", "/v1/fleets/-", None, 400),
    ("GET", "/v1/fleets/%FF", None, 400),
    ("GET", "/v1/fleets/" + "a" * 41, None, 400),
    ("GET", "/v1/agents/demo", None, 400),
    ("GET", "/v1/agents/demo-k3x9q%0A", None, 400),
    ("GET", "/v1/status?fleet=A", None, 400),
    ("GET", "/v1/status?flet=demo", None, 400),
    ("GET", "/v1/status?fleet=demo&fleet=demo", None, 400),
    ("GET", "/v1/status?fleet=%FF", None, 400),
    ("GET", "/v1/status?" + "&".join(["fleet=demo"] * 50), None, 400),
    ("GET", "/v1/status?watch=0.01", None, 400),
    ("GET", "/v1/status?watch=61", None, 400),
    ("GET", "/v1/status?watch=nan", None, 400),
    ("GET", "/v1/status?watch=1e1", None, 400),
    ("GET", "/v1/daemon?x=1", None, 400),
    ("GET", "/v1/history?limit=0", None, 400),
    ("GET", "/v1/history?limit=-1", None, 400),
    ("GET", "/v1/history?limit=1.5", None, 400),
    ("GET", "/v1/history?limit=10001", None, 400),
    ("GET", "/v1/history?limit=" + "9" * 5000, None, 400),
    ("GET", "/v1/history?limit=1_0", None, 400),
    ("GET", "/v1/events?follow=2", None, 400),
    ("DELETE", "/v1/fleets/demo?now=yes", None, 400),
    ("POST", "/v1/fleets/demo/warm", b"{}", 400),
    ("POST", "/v1/fleets/demo/warm", b'{"size": -1}', 400),
    ("POST", "/v1/fleets/demo/warm", b'{"size": 1001}', 400),
    ("POST", "/v1/fleets/demo/warm", b'{"size": null}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": []}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": {"token": "x"}}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": {"environment": {"A": 1}}}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": {"environment": {"A=B": "1"}}}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": {"environment": {"": "1"}}}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": {"environment": {"A": "' + b"x" * 32769 + b'"}}}', 400),
    ("POST", "/v1/fleets/demo/acquire", json.dumps({"claim": {"environment": {f"A{n}": "" for n in range(1001)}}}).encode(), 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"claim": {"tools": ["' + b"x" * 1025 + b'"]}}', 400),
    ("POST", "/v1/fleets/demo/acquire", json.dumps({"claim": {"tools": ["x"] * 1001}}).encode(), 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"timeout_seconds": -1}', 400),
    ("GET", "/v1/checkpoints/nonsense", None, 404),
    ("GET", "/v1/checkpoints/" + "x" * 201, None, 400),
    ("GET", "/v1/checkpoints?agent=A", None, 400),
    ("POST", f"/v1/checkpoints/{CHECKPOINT_ID}/restore", b'{"timeout_seconds": -1}', 400),
    ("POST", f"/v1/agents/{AGENT_ID}/drain", b'{"now": 1}', 400),
    ("POST", "/v1/agents/A/drain", b"{}", 400),
    ("POST", "/v1/agents/A/protect", b"{}", 400),
    ("POST", "/v1/fleets/demo/budget", b'{"tokens": 1}', 400),
    ("POST", f"/v1/agents/{AGENT_ID}/protect", b'{"protected": "no"}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"timeout_seconds": 3601}', 400),
    ("POST", "/v1/fleets/demo/acquire", b'{"require_warm": "yes"}', 400),
    ("POST", "/v1/fleets/demo/scale", None, 400),
    ("POST", "/v1/fleets/demo/scale", b"", 400),
    ("POST", "/v1/fleets/demo/scale", b"{", 400),
    ("POST", "/v1/fleets/demo/scale", b"[]", 400),
    ("POST", "/v1/fleets/demo/scale", b"null", 400),
    ("POST", "/v1/fleets/demo/scale", b"{}", 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": 1, "delta": 1}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": -1}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": 100001}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": 1' + b"0" * 6000 + b"}", 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": true}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": "1"}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": 1.0}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": NaN}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": null, "delta": 1}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": 1, "dry_run": 0}', 400),
    ("POST", "/v1/fleets/demo/scale", b'{"replicas": 1, "force": true}', 400),
    ("POST", "/v1/fleets/demo/scale", b'\xff{"replicas": 1}', 400),
    ("POST", "/v1/fleets/demo/scale", b"[" * 500_000, 400),
    ("POST", "/v1/fleets/demo/restart", b'{"agents": "demo-k3x9q"}', 400),
    ("POST", "/v1/fleets/demo/restart", b'{"agents": [1]}', 400),
    ("POST", "/v1/fleets/demo/restart", b'{"agents": ["demo"]}', 400),
    ("PUT", "/v1/fleets/demo", b"{}", 400),
    ("PUT", "/v1/fleets/demo", b'{"spec": []}', 400),
    ("PUT", "/v1/fleets/demo", b'{"spec": {"a": "\\ud800"}}', 400),
    ("POST", "/v1/shutdown", b"{}", 400),
    ("POST", "/v1/shutdown", b'{"mode": "now"}', 400),
]


@pytest.mark.parametrize(("method", "target", "body", "status"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_bad_requests_get_a_json_error(shared: Serving, method: str, target: str, body: bytes | None, status: int) -> None:
    before = changes(shared)
    answered = shared.ask(method, target, body)
    assert answered.status == status, answered.body
    assert answered.headers["content-type"] == "application/json"
    if method != "HEAD":
        error = json.loads(answered.body)["error"]
        assert set(error) == {"code", "message", "hint", "exit_status"}
        assert len(error["message"]) < 300
    if status == 405:
        possible = {known for known, path in REQUESTS if re.fullmatch(path.replace("{fleet}", "[^/]+"), target)}
        assert set(answered.headers["allow"].split(", ")) == possible
    assert changes(shared) == before


def test_errors_of_the_control_keep_code_hint_and_status() -> None:
    with serving() as server:
        server.control.fail = ConfigError("line 3: no", hint="try yes")
        answered = server.ask("PUT", "/v1/fleets/demo", b'{"spec": {}}')
        assert answered.status == 422
        assert json.loads(answered.body) == {"error": {"code": "E2002", "message": "line 3: no", "hint": "try yes", "exit_status": 6}}


def test_an_unforeseen_error_goes_to_the_log_and_only_its_kind_to_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        server.control.fail = RuntimeError("a secret")
        with caplog.at_level(logging.ERROR):
            answered = server.ask("GET", "/v1/status")
        assert answered.status == 500
        assert b"RuntimeError" in answered.body
        assert b"secret" not in answered.body
        assert "a secret" in caplog.text
        assert "Traceback" in caplog.text
        server.control.fail = None
        assert server.ask("GET", "/v1/status").status == 200


def test_what_json_cannot_say_is_replaced() -> None:
    with serving() as server:
        server.control.change("bad \udcff name", float("nan"), float("-inf"), {"\ud800": ("x",)}, "\U0001f600", "line\nbreak")
        answered = server.ask("GET", "/v1/status")
        notes = json.loads(answered.body.decode("utf-8"))["fleets"][0]["notes"]
        assert notes == ["bad \ufffd name", None, None, {"\ufffd": ["x"]}, "\U0001f600", "line\nbreak"]


def test_two_requests_in_one_packet_get_two_answers(shared: Serving) -> None:
    with closing(shared.connect()) as caller:
        caller.sendall(GET_DAEMON + GET_DAEMON.replace(b"Host: x", b"Connection: close"))
        # without Host the second is refused, which still is an answer
        assert read_to_end(caller).count(b"HTTP/1.1 ") == 2


# ---- size ----


def send_until_refused(caller: socket.socket, piece: bytes, times: int) -> int:
    sent = 0
    for _ in range(times):
        try:
            caller.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            break
        sent += len(piece)
    return sent


MEGABYTE = b"x" * 1024 * 1024


@pytest.mark.parametrize("method", ["PUT", "GET", "PATCH"])
def test_a_request_of_100_mb_is_refused_without_being_read(shared: Serving, method: str) -> None:
    with closing(shared.connect()) as caller:
        caller.sendall(f"{method} /v1/fleets/demo HTTP/1.1\r\nHost: x\r\nContent-Length: {100 * len(MEGABYTE)}\r\n\r\n".encode())
        sent = send_until_refused(caller, MEGABYTE, 100)
        answer = read_to_end(caller)
    assert sent < 8 * len(MEGABYTE)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'{"error":' in answer


def test_an_endless_chunked_body_is_refused(shared: Serving) -> None:
    with closing(shared.connect()) as caller:
        caller.sendall(b"PUT /v1/fleets/demo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = send_until_refused(caller, b"100000\r\n" + MEGABYTE + b"\r\n", 100)
        answer = read_to_end(caller)
    assert sent < 8 * len(MEGABYTE)
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_just_under_the_limit_is_taken(shared: Serving) -> None:
    text = json.dumps({"spec": {"x": ""}})
    body = text.replace('""', '"' + "y" * (1024 * 1024 - len(text)) + '"').encode()
    assert len(body) == 1024 * 1024
    assert shared.ask("PUT", "/v1/fleets/demo", body).status == 200
    assert shared.ask("PUT", "/v1/fleets/demo", body + b" ").status == 413


def test_a_huge_head_is_refused(shared: Serving) -> None:
    with closing(shared.connect()) as caller:
        sent = send_until_refused(caller, b"GET /v1/status HTTP/1.1\r\nX: " + MEGABYTE, 100)
        answer = read_to_end(caller)
    assert sent < 8 * len(MEGABYTE)
    assert answer.startswith(b"HTTP/1.1 431")


def test_what_is_not_http_is_told_so_in_json(shared: Serving) -> None:
    with closing(shared.connect()) as caller:
        caller.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = read_to_end(caller).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["code"] == "E2001"


# ---- time ----


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"G", b"E"),
        (b"GET /v1/status HTTP/1.1\r\n", b"a: b\r\n"),
        (b"PUT /v1/fleets/demo HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n", b"x"),
    ],
    ids=["a byte", "headers", "body"],
)
def test_a_request_that_only_drips_in_is_cut_off(first: bytes, drip: bytes) -> None:
    with serving(Limits(head_seconds=0.3, body_seconds=0.3)) as server, closing(server.connect()) as caller:
        caller.sendall(first)
        began = time.monotonic()
        caller.settimeout(0.02)
        answer = b""
        while time.monotonic() < began + 10:
            with suppress(OSError):  # closed already: the answer is there to be read all the same
                caller.sendall(drip)
            with suppress(TimeoutError):
                answer += caller.recv(4096)
                break
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 3
        assert server.ask("GET", "/v1/daemon").status == 200
        wait_until(lambda: server.connections == 0)


def test_an_idle_connection_is_closed_in_the_end() -> None:
    with serving(Limits(idle_seconds=0.2)) as server, closing(server.connect()) as silent, closing(server.connect()) as kept:
        kept.sendall(GET_DAEMON)
        assert read_to_end(kept).startswith(b"HTTP/1.1 200")
        assert read_to_end(silent) == b""


def test_a_socket_that_somebody_removed_is_made_again_and_who_is_connected_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetctl.daemon.server._CHECK_SECONDS", 0.01)
    with serving() as server, closing(server.connect()) as before:
        loop = server.control.loop
        assert loop is not None
        keeping = asyncio.run_coroutine_threadsafe(server.server.keep_open(), loop)
        shutil.rmtree(os.path.dirname(server.path))
        wait_until(lambda: os.path.exists(server.path))
        assert os.stat(server.path).st_mode & 0o777 == 0o600
        wait_until(lambda: server.ask("GET", "/v1/daemon").status == 200)
        before.sendall(GET_DAEMON)
        assert before.recv(65536).startswith(b"HTTP/1.1 200")
        keeping.cancel()


def test_a_slow_change_is_not_cut_off_by_deadlines() -> None:
    with serving(Limits(idle_seconds=0.05, head_seconds=0.05, body_seconds=0.05)) as server:
        server.control.hold = server.control.in_loop(asyncio.Event)
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(server.ask("PUT", "/v1/fleets/demo", b'{"spec": {}}').status))
        thread.start()
        wait_until(lambda: bool(server.control.asked))
        with closing(server.connect()) as idle:
            read_to_end(idle)  # returns when the deadlines of this one, later than those of the other, are over
        assert answers == []
        server.control.in_loop(server.control.hold.set)
        thread.join(10)
        assert answers == [200]


# ---- number ----


def test_the_oldest_idle_connection_makes_room_for_the_newest() -> None:
    with serving(Limits(connections=8)) as server:
        idle = [server.connect() for _ in range(8)]
        wait_until(lambda: server.connections == 8)
        with closing(server.connect()) as newest:
            newest.sendall(GET_DAEMON)
            assert newest.recv(65536).startswith(b"HTTP/1.1 200")
            assert read_to_end(idle[0]) == b""
            wait_until(lambda: server.connections == 8)
            idle[7].sendall(GET_DAEMON)
            assert idle[7].recv(65536).startswith(b"HTTP/1.1 200")
        for caller in idle:
            caller.close()


def test_when_all_connections_are_busy_the_newest_is_told() -> None:
    with serving(Limits(connections=3)) as server:
        server.control.hold = server.control.in_loop(asyncio.Event)
        busy = [server.connect() for _ in range(3)]
        for caller in busy:
            caller.sendall(b'PUT /v1/fleets/demo HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{"spec": {}}')
        wait_until(lambda: len(server.control.asked) == 3)
        assert server.ask("GET", "/v1/daemon").status == 503
        server.control.in_loop(server.control.hold.set)
        for caller in busy:
            assert caller.recv(65536).startswith(b"HTTP/1.1 200")
            caller.close()


def test_streams_are_bounded_and_a_refused_one_leaves_nothing_behind() -> None:
    with serving(Limits(streams=2)) as server:
        streams = [Stream[Any](server.path, "/v1/events?follow=1&limit=1") for _ in range(2)]
        for stream in streams:
            next(stream)
        assert server.ask("GET", "/v1/events?follow=1").status == 503
        assert server.ask("GET", "/v1/status?watch=1").status == 503
        assert len(server.control.followers) == 2
        assert server.ask("GET", "/v1/status").status == 200
        streams[0].close()
        wait_until(lambda: server.ask("GET", "/v1/events?follow=1&fleet=other").status == 404 and len(server.control.followers) == 1)
        with Stream[Any](server.path, "/v1/events?follow=1&limit=1") as again:
            assert next(again) == event(4)
        streams[1].close()
        wait_until(lambda: not server.control.followers)


def test_200_idle_clients_and_10_deaf_watchers_delay_nobody() -> None:
    with serving() as server:
        server.control.change("x" * 300_000)
        idle = [server.connect() for _ in range(200)]
        deaf = [server.connect() for _ in range(10)]
        for caller in deaf:
            caller.sendall(b"GET /v1/status?watch=0.05 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: server.connections == 210 and len(server.control.asked) >= 20)
        slowest = 0.0
        with closing(Connection(server.path)) as connection:
            for number in range(50):
                server.control.change("y" * 300_000, number)
                began = time.monotonic()
                assert connection.request("GET", "/v1/status")["fleets"][0]["notes"][1] == number
                slowest = max(slowest, time.monotonic() - began)
        assert slowest < 0.5
        for caller in idle + deaf:
            caller.close()


# ---- streams ----


def test_a_deaf_watcher_costs_one_status_and_is_dropped() -> None:
    with serving(Limits(write_seconds=0.5)) as server, closing(server.connect()) as deaf:
        server.control.change("x" * 1_000_000)
        deaf.sendall(b"GET /v1/status?watch=0.05 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: server.connections == 1)
        while server.connections:
            server.control.change("x" * 1_000_000)
        assert len(server.control.asked) <= 4  # one look before the stream, one sent, one waiting to be


def test_a_deaf_follower_is_dropped_and_unsubscribed() -> None:
    with serving(Limits(write_seconds=0.2)) as server, closing(server.connect()) as deaf:
        deaf.sendall(b"GET /v1/events?follow=1&limit=0 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(server.control.followers) == 1)
        big = {**event(9), "message": "x" * 1_000_000}
        for _ in range(5):
            server.control.in_loop(lambda: server.control.tell(big))
        wait_until(lambda: not server.control.followers and server.connections == 0)


def test_a_caller_that_does_not_read_a_plain_answer_is_dropped() -> None:
    with serving(Limits(write_seconds=0.2)) as server, closing(server.connect()) as deaf:
        server.control.change("x" * 5_000_000)
        deaf.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: server.connections == 1)
        wait_until(lambda: server.connections == 0)


def test_a_watched_status_comes_at_once_on_change_and_without_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BEAT_SECONDS", 0.5)
    with serving() as server, Stream[Any](server.path, "/v1/status?watch=0.05", silence=5) as stream:
        began = time.monotonic()
        assert next(stream)["fleets"][0]["notes"] == []
        assert time.monotonic() - began < 1
        server.control.change("first")
        assert next(stream)["fleets"][0]["notes"] == ["first"]
        began = time.monotonic()
        assert next(stream)["fleets"][0]["notes"] == ["first"]
        assert 0.3 < time.monotonic() - began < 3


def test_a_watched_status_is_not_sent_more_often_than_asked() -> None:
    with serving() as server, Stream[Any](server.path, "/v1/status?watch=0.3", silence=5) as stream:
        next(stream)
        began = time.monotonic()
        for number in range(3):
            server.control.change(number)
            assert next(stream)["fleets"][0]["notes"] == [number]  # the last state, even of changes during the wait
        assert time.monotonic() - began > 0.7


def test_no_change_between_two_looks_is_missed() -> None:
    with serving() as server, Stream[Any](server.path, "/v1/status?watch=0.05", silence=5) as stream:
        next(stream)
        for number in range(20):
            server.control.change(number)
            began = time.monotonic()
            while next(stream)["fleets"][0]["notes"] != [number]:
                pass
            assert time.monotonic() - began < 1.5  # sooner than the beat that comes without a change


def test_watching_a_fleet_that_vanishes_ends_with_its_error() -> None:
    with serving() as server, Stream[Any](server.path, "/v1/status?watch=0.05&fleet=demo", silence=5) as stream:
        next(stream)
        server.control.fleets = []
        server.control.change()
        with pytest.raises(NotFound, match="no fleet demo"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_followed_events_are_neither_lost_nor_doubled() -> None:
    with serving() as server:
        control = server.control
        control.during_read = lambda: control.happen(5, 6)
        with Stream[Any](server.path, "/v1/events?follow=1&limit=3", silence=10) as stream:
            assert [next(stream)["data"]["number"] for _ in range(3)] == [4, 5, 6]
            control.in_loop(lambda: control.happen(7))
            assert next(stream) == event(7)


def test_with_limit_0_only_new_events_are_told() -> None:
    with serving() as server:
        control = server.control
        control.during_read = lambda: control.happen(5)
        with Stream[Any](server.path, "/v1/events?follow=1&limit=0", silence=10) as stream:
            assert next(stream) == event(5)
            control.in_loop(lambda: control.happen(6))
            assert next(stream) == event(6)


def test_a_follower_that_the_control_drops_sees_a_clean_end() -> None:
    with serving() as server, Stream[Any](server.path, "/v1/events?follow=1&limit=1", silence=10) as stream:
        next(stream)
        server.control.in_loop(lambda: server.control.tell(None))
        assert list(stream) == []


def test_stopping_ends_streams_cleanly_and_does_not_wait_for_the_deaf() -> None:
    with serving() as server:
        server.control.change("x" * 1_000_000)
        deaf = [server.connect() for _ in range(5)]
        idle = [server.connect() for _ in range(5)]
        for caller in deaf:
            caller.sendall(b"GET /v1/status?watch=0.05 HTTP/1.1\r\nHost: x\r\n\r\n")
        with Stream[Any](server.path, "/v1/events?follow=1&limit=1", silence=10) as stream:
            next(stream)
            wait_until(lambda: len(server.control.asked) >= 11)
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 1
            assert list(stream) == []
        wait_until(lambda: not server.control.followers)
        for caller in deaf + idle:
            read_to_end(caller)
            caller.close()
        assert server.complaints == []


def test_a_running_request_is_answered_while_the_server_stops() -> None:
    with serving() as server:
        server.control.hold = server.control.in_loop(asyncio.Event)
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(server.ask("PUT", "/v1/fleets/demo", b'{"spec": {}}').status))
        asking.start()
        wait_until(lambda: bool(server.control.asked))
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(lambda: not os.path.exists(server.path))
        server.control.in_loop(server.control.hold.set)
        stopping.join(10)
        asking.join(10)
        assert answers == [200]


# ---- who ----

# Becomes the other user only once it runs: that user need not be able to reach the interpreter.
STRANGER = """
import os, socket, sys
if uid := int(sys.argv[2]):
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
caller = socket.socket(socket.AF_UNIX)
caller.connect(sys.argv[1])
try:
    caller.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
except OSError:
    pass
answer = b""
try:
    while data := caller.recv(65536):
        answer += data
except ConnectionResetError:  # how the kernel says that the request was not read; the answer came before
    pass
sys.stdout.buffer.write(answer)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_turned_away_even_where_the_file_lets_them_in() -> None:
    with serving() as server:
        folder = os.path.dirname(server.path)
        os.chmod(os.path.dirname(folder), 0o711)
        os.chmod(folder, 0o711)
        os.chmod(server.path, 0o666)
        run = [sys.executable, "-I", "-S", "-c", STRANGER, server.path]
        answered = subprocess.run([*run, "65534"], capture_output=True, timeout=20, check=False)
        assert answered.stdout.startswith(b"HTTP/1.1 403"), answered.stderr
        assert server.control.asked == []
        ours = subprocess.run([*run, "0"], capture_output=True, timeout=20, check=False)
        assert ours.stdout.startswith(b"HTTP/1.1 200")


def test_owner_and_root_may_connect_and_nobody_else() -> None:
    mine = os.geteuid()
    assert guard.may_connect(mine)
    assert guard.may_connect(0)
    assert not guard.may_connect(mine + 1)


# ---- the socket file ----


def test_the_socket_is_0600_and_gone_after_stop() -> None:
    old = os.umask(0)
    try:
        with serving() as server:
            mode = os.stat(server.path).st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert os.listdir(os.path.dirname(server.path)) == ["control.sock"]
            server.stop()
            assert not os.path.exists(server.path)
    finally:
        os.umask(old)


def make_stale(path: str) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(path)
        dead.listen(1)
    os.chmod(path, 0o600)


def test_a_stale_socket_is_replaced_without_a_gap() -> None:
    with short_folder() as folder:
        path = f"{folder}/s.sock"
        make_stale(path)
        seen: set[int | None] = set()
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                try:
                    seen.add(stat.S_IMODE(os.lstat(path).st_mode))
                except FileNotFoundError:
                    seen.add(None)

        looking = threading.Thread(target=look)
        looking.start()
        wait_until(lambda: bool(seen))
        for _ in range(100):
            bind(path, 10).close()
        done.set()
        looking.join(10)
        assert seen == {0o600}
        assert os.listdir(folder) == ["s.sock"]


def test_a_living_server_is_never_replaced() -> None:
    with serving() as server:
        with pytest.raises(DaemonRunning):
            bind(server.path, 10)
        assert server.ask("GET", "/v1/daemon").status == 200
        assert os.listdir(os.path.dirname(server.path)) == ["control.sock"]


def test_a_living_server_with_a_full_queue_is_never_replaced() -> None:
    with short_folder() as folder:
        path = f"{folder}/s.sock"
        with closing(bind(path, 0)), closing(socket.socket(socket.AF_UNIX)) as waiting:
            waiting.connect(path)  # nobody accepts: the queue is full now
            with pytest.raises(DaemonRunning):
                bind(path, 0)


def test_of_20_racers_exactly_one_wins() -> None:
    with short_folder() as folder:
        path = f"{folder}/s.sock"
        for _ in range(5):
            make_stale(path)
            outcomes: list[socket.socket | type[Exception]] = []
            start = threading.Barrier(20)

            def race(barrier: threading.Barrier = start, found: list[socket.socket | type[Exception]] = outcomes) -> None:
                barrier.wait()
                try:
                    found.append(bind(path, 100))  # room for the probes of those who lose
                except DaemonRunning as error:
                    found.append(type(error))

            racers = [threading.Thread(target=race) for _ in range(20)]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join(20)
            winners = [outcome for outcome in outcomes if isinstance(outcome, socket.socket)]
            assert len(winners) == 1
            assert len(outcomes) == 20
            with closing(socket.socket(socket.AF_UNIX)) as caller:
                caller.connect(path)
                winners[0].accept()[0].close()
            winners[0].close()
            os.unlink(path)


def test_what_is_no_socket_is_left_alone() -> None:
    with short_folder() as folder:
        path = Path(folder, "control.sock")
        path.write_text("precious")
        with pytest.raises(StateDirectoryError, match="not a socket"):
            bind(str(path), 10)
        assert path.read_text() == "precious"
        path.unlink()
        path.symlink_to("/dev/null")
        with pytest.raises(StateDirectoryError, match="not a socket"):
            bind(str(path), 10)


def test_a_path_that_is_too_long_or_missing_is_explained() -> None:
    with short_folder() as folder:
        with pytest.raises(StateDirectoryError, match="too long"):
            bind(f"{folder}/{'x' * 120}", 10)
        with pytest.raises(StateDirectoryError, match="No such file"):
            bind(f"{folder}/none/control.sock", 10)


def test_a_socket_that_is_not_ours_any_more_survives_stop() -> None:
    with serving() as server:
        os.unlink(server.path)
        with closing(bind(server.path, 10)):
            server.stop()
            assert os.path.exists(server.path)


def test_the_server_leaves_signals_and_the_loop_alone() -> None:
    async def run(path: str) -> None:
        server = ControlServer(FakeControl(), path)
        await server.start()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        assert len(asyncio.all_tasks()) == 1  # nothing that wakes up on its own
        await server.stop()
        await server.stop()

    with short_folder() as folder:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with asyncio.Runner() as runner:
            # a Runner takes SIGINT for itself while it runs, so what counts is what the server finds
            async def note() -> None:
                before[:] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
                await run(f"{folder}/control.sock")

            runner.run(note())


# ---- anything at all ----

SEEDS = [
    GET_DAEMON,
    b"GET /v1/status?watch=0.05&fleet=demo HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/events?follow=1&limit=5 HTTP/1.1\r\nHost: x\r\n\r\n",
    b'POST /v1/fleets/demo/scale HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"replicas": 3}',
    b'PUT /v1/fleets/demo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"spe\r\n8\r\nc": {}}\n\r\n0\r\n\r\n',
    b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n",
    b'PUT /v1/fleets/demo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 12\r\n\r\n{"spec": {}}',
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://x/v1/daemon HTTP/1.0\r\n\r\n",
]


def mangled(chance: random.Random) -> bytes:
    """A request with something wrong, or none at all."""
    text = bytearray(b"".join(chance.choices(SEEDS, k=chance.randint(1, 3))))
    for _ in range(chance.randint(0, 6)):
        at = chance.randrange(len(text) + 1)
        match chance.randrange(4):
            case 0:
                text[at : at + 1] = chance.randbytes(1)
            case 1:
                del text[at : at + chance.randint(1, 20)]
            case 2:
                text[at:at] = chance.choice([b"\r\n", b"\0", b"%", b"%00", b"\xff", b"?", b"&", b": ", b"9" * 30, b"{" * 50, b"\r\n\r\n"])
            case _:
                text = text[: at + 1]
        text = text or bytearray(b"\n")
    return bytes(text) if chance.random() < 0.95 else chance.randbytes(chance.randint(1, 3000))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_thousands_of_malformed_requests_break_nothing(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(20250501)
    with serving(Limits(connections=64)) as server, caplog.at_level(logging.WARNING):
        assert server.ask("GET", "/v1/daemon").status == 200
        wait_until(lambda: server.connections == 0)
        before = open_descriptors()
        for number in range(3000):
            with closing(server.connect()) as caller, suppress(OSError):  # refused before it was all sent
                caller.sendall(mangled(chance))
                if number % 3 == 0:
                    caller.shutdown(socket.SHUT_WR)
                    caller.settimeout(5)
                    caller.recv(65536)
                elif number % 3 == 1:
                    caller.settimeout(0.001)
                    caller.recv(65536)
        wait_until(lambda: open_descriptors() == before)
        assert server.complaints == []
        assert [record for record in caplog.records if record.name.startswith(("fleetctl", "asyncio", "uvicorn"))] == []
        assert server.ask("GET", "/v1/daemon").status == 200
        wait_until(lambda: not server.control.followers)
