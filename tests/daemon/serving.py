"""A `Control` that manages nothing, and the real server in front of it, for tests of the control socket."""

import asyncio
import http.client
import os
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fleetctl.daemon.server import ControlServer, Limits
from fleetctl.errors import NotFound, UnknownCheckpoint

Json = dict[str, Any]  # Any: JSON values
AGENT_ID = "demo-k3x9q"
AT = "2025-05-01T12:00:00.000Z"


def agent() -> Json:
    return {
        "id": AGENT_ID,
        "slot": 0,
        "pid": 4711,
        "state": "running",
        "ready": True,
        "cpu_percent": 1.5,
        "memory_bytes": None,
        "uptime_seconds": 3.25,
        "restarts": 1,
        "last_exit": {"code": None, "signal": 9, "at": AT, "text": "killed by SIGKILL"},
        "from_warm_pool": False,
        "next_try_seconds": None,
        "replacing": False,
        "pooled": False,
        "protected": False,
        "unsaved": None,
        "note": "",
        "status_text": "",
        "active": 1,
        "slots": 4,
        "pending": None,
        "dropped_messages": 0,
    }


def event(number: int) -> Json:
    more = {"at": AT, "kind": "started", "fleet": "demo", "agent_id": AGENT_ID, "message": f"event {number}"}
    return {"id": f"e{number}", **more, "data": {"number": number}}


AUTOSCALING: Json = {
    "enabled": True,
    "mode": "act",
    "min_replicas": 1,
    "max_replicas": 10,
    "scale_up_count": 2,
    "scale_down_count": 1,
    "next_decision_seconds": 12.5,
    "reason": "CPU utilization 85.0% > target 70%",
}

CHECKPOINT_ID = "20261125t004530-ab3de"
CHECKPOINT: Json = {
    "id": CHECKPOINT_ID,
    "fleet": "demo",
    "agent": AGENT_ID,
    "created_at": AT,
    "reason": "drained",
    "kind": "files",
    "has_token": False,
    "files": 1,
    "bytes": 1,
    "notes": [],
    "path": "/s/checkpoints/x",
}


class FakeControl:
    """Knows one fleet, "demo", whose status a test may change or break; records what it is asked."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.asked: list[tuple[Any, ...]] = []
        self.notes: list[Any] = []
        self.fleets = ["demo"]
        self.fail: Exception | None = None
        self.past = [event(number) for number in range(5)]
        self.during_read: Callable[[], None] = lambda: None
        self.followers: set[asyncio.Queue[Json | None]] = set()
        self.hold: asyncio.Event | None = None  # `apply` waits for it
        self._changed = asyncio.Event()

    def in_loop(self, action: Callable[[], Any]) -> Any:
        """Run it in the server's loop, from the test's thread, and return its result."""

        async def run() -> Any:
            return action()

        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def change(self, *notes: Any) -> None:
        def action() -> None:
            self.notes = list(notes)
            self._changed.set()
            self._changed = asyncio.Event()

        self.in_loop(action)

    def tell(self, item: Json | None) -> None:
        for queue in self.followers:
            queue.put_nowait(item)

    def happen(self, *numbers: int) -> None:
        for number in numbers:
            self.past.append(event(number))
            self.tell(event(number))

    def _fleet(self) -> Json:
        return {
            "name": "demo",
            "desired_replicas": 1,
            "ready_replicas": 1,
            "autoscaling": AUTOSCALING,
            "warm_pool": {"enabled": True, "current_size": 1, "target_size": 2, "hits": 1, "misses": 0, "hit_rate_percent": 100.0},
            "command": ["sleep", "60"],
            "down": False,
            "notes": self.notes,
            "agents": [agent()],
        }

    def _check(self, *asked: Any, fleet: str | None = None) -> None:
        self.asked.append(asked)
        if self.fail is not None:
            raise self.fail
        if fleet is not None and fleet not in self.fleets:
            raise NotFound(f"There is no fleet {fleet}")

    def status(self, fleet: str | None) -> Json:
        self._check("status", fleet, fleet=fleet)
        daemon = {"alive": True, "pid": os.getpid(), "version": "1", "uptime_seconds": 1.0, "state_dir": "/x", "note": None}
        return {"schema": "fleetctl/status/v1", "generated_at": AT, "daemon": daemon, "fleets": [self._fleet()]}

    async def wait_change(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return

    def fleet(self, name: str) -> Json:
        self._check("fleet", name, fleet=name)
        return {**self._fleet(), "schema": "fleetctl/fleet/v1", "spec": {"name": "demo"}, "spec_hash": "0123"}

    def agent(self, agent_id: str) -> Json:
        self._check("agent", agent_id)
        if agent_id != AGENT_ID:
            raise NotFound(f"There is no agent {agent_id}")
        more = {
            "fleet": "demo",
            "created_at": AT,
            "started_at": AT,
            "command": ["sleep"],
            "cwd": "/",
            "log_path": "/l",
            "environment": ["A"],
            "idle": None,
            "progress": 7,
            "metrics": {"depth": 1.5},
            "tokens": {"in": 1200, "out": 34},
            "cost": 0.25,
            "dropped_by_reason": {},
        }
        tree = [{"pid": 4711, "ppid": 1, "state": "S", "command": "sleep 60"}]
        return {**agent(), **more, "schema": "fleetctl/agent/v1", "state_directory": "/s", "processes": tree}

    async def metrics(self) -> str:
        return "# HELP up Always.\n# TYPE up gauge\nup 1\n"

    def _change(self, dry_run: bool) -> Json:
        return {
            "schema": "fleetctl/change/v1",
            "fleet": "demo",
            "changed": not dry_run,
            "created": False,
            "dry_run": dry_run,
            "desired_replicas": 1,
            "actions": [],
            "message": "done",
        }

    async def apply(self, name: str, spec: Mapping[str, Any], *, replicas_given: bool, dry_run: bool) -> Json:
        self._check("apply", name, spec, replicas_given, dry_run)
        if self.hold is not None:
            await self.hold.wait()
        return self._change(dry_run)

    async def scale(self, name: str, *, replicas: int | None, delta: int | None, dry_run: bool) -> Json:
        self._check("scale", name, replicas, delta, dry_run, fleet=name)
        return self._change(dry_run)

    async def resize_warm_pool(self, name: str, *, size: int, dry_run: bool) -> Json:
        self._check("warm", name, size, dry_run, fleet=name)
        return self._change(dry_run)

    def autoscaling(self, name: str) -> Json:
        self._check("autoscaling", name, fleet=name)
        return {"schema": "fleetctl/autoscaling/v1", "fleet": name, **AUTOSCALING, "current_replicas": 3, "last_decision": None}

    async def set_autoscaling(self, name: str, *, enabled: bool, mode: str, dry_run: bool) -> Json:
        self._check("set_autoscaling", name, enabled, mode, dry_run, fleet=name)
        return self._change(dry_run)

    async def renew_budget(self, name: str, *, dry_run: bool) -> Json:
        self._check("renew_budget", name, dry_run, fleet=name)
        return self._change(dry_run)

    async def acquire(self, name: str, *, claim: Mapping[str, Any], require_warm: bool, timeout_seconds: float) -> Json:
        self._check("acquire", name, claim, require_warm, timeout_seconds, fleet=name)
        return {
            "schema": "fleetctl/acquired/v1",
            "fleet": name,
            "agent_id": AGENT_ID,
            "state": "running",
            "from_warm_pool": True,
            "pid": 4711,
            "seconds": 0.001,
            "claim_path": "/s/run/claims/x.json",
        }

    async def restart(self, name: str, *, agents: Sequence[str] | None, all_at_once: bool, dry_run: bool) -> Json:
        self._check("restart", name, agents, all_at_once, dry_run, fleet=name)
        return self._change(dry_run)

    async def down(self, name: str, *, now: bool, dry_run: bool) -> Json:
        self._check("down", name, now, dry_run, fleet=name)
        return self._change(dry_run)

    async def list_checkpoints(self, fleet: str | None, agent: str | None) -> Json:
        self._check("list_checkpoints", fleet, agent, fleet=fleet)
        return {"schema": "fleetctl/checkpoints/v1", "checkpoints": [CHECKPOINT], "problems": []}

    async def checkpoint(self, checkpoint_id: str) -> Json:
        self._check("checkpoint", checkpoint_id)
        if checkpoint_id != CHECKPOINT_ID:
            raise UnknownCheckpoint(f"no checkpoint {checkpoint_id}")
        contents = [{"path": "state/counter", "size": 1, "sha256": "00", "mode": 0o644}]
        more = {"schema": "fleetctl/checkpoint/v1", "slot": 0, "spec_hash": "00"}
        return {**CHECKPOINT, **more, "contents": contents, "links": [{"path": "state/l", "target": "counter"}]}

    async def create_checkpoint(self, agent_id: str, *, dry_run: bool) -> Json:
        self._check("create_checkpoint", agent_id, dry_run)
        told = {"schema": "fleetctl/checkpointed/v1", "fleet": "demo", "agent": agent_id, "dry_run": dry_run}
        return {**told, "checkpoint": CHECKPOINT, "problem": "", "message": "done"}

    async def restore_checkpoint(self, checkpoint_id: str, *, timeout_seconds: float, dry_run: bool) -> Json:
        self._check("restore_checkpoint", checkpoint_id, timeout_seconds, dry_run)
        told = {"schema": "fleetctl/restored/v1", "fleet": "demo", "checkpoint": checkpoint_id, "dry_run": dry_run, "message": "done"}
        return {**told, "agent_id": AGENT_ID, "state": "running", "pid": 4711, "seconds": 0.5}

    async def remove_checkpoint(self, checkpoint_id: str, *, dry_run: bool) -> Json:
        self._check("remove_checkpoint", checkpoint_id, dry_run)
        return {"schema": "fleetctl/checkpoint-removed/v1", "checkpoint": checkpoint_id, "dry_run": dry_run, "message": "done"}

    async def drain(self, agent_id: str, *, now: bool, dry_run: bool) -> Json:
        self._check("drain", agent_id, now, dry_run)
        told = {"schema": "fleetctl/drained/v1", "fleet": "demo", "agent": agent_id, "now": now, "dry_run": dry_run}
        return {**told, "changed": not dry_run, "desired_replicas": 0, "message": "done"}

    async def protect(self, agent_id: str, *, protected: bool, dry_run: bool) -> Json:
        self._check("protect", agent_id, protected, dry_run)
        told = {"schema": "fleetctl/protected/v1", "fleet": "demo", "agent": agent_id, "protected": protected, "dry_run": dry_run}
        return {**told, "changed": not dry_run, "message": "done"}

    async def history(self, fleet: str | None, limit: int) -> Json:
        self._check("history", fleet, limit, fleet=fleet)
        entry = {
            "at": AT,
            "fleet": "demo",
            "action": "scale_up",
            "current_replicas": 1,
            "target_replicas": 2,
            "reason": "r",
            "cause": "manual",
            "details": {},
        }
        return {"schema": "fleetctl/history/v1", "entries": [entry]}

    async def samples(self, fleet: str | None, limit: int) -> Json:
        self._check("samples", fleet, limit, fleet=fleet)
        sizes = {"replicas": 2, "target_replicas": 3, "ready": 2, "min_replicas": 1, "max_replicas": 9}
        seen = {"metric": "cpu", "value": 85.0, "load": 170.0, "target": 70.0}
        return {"schema": "fleetctl/samples/v1", "samples": [{"at": AT, "fleet": "demo", **sizes, **seen}]}

    async def events(self, fleet: str | None, limit: int) -> Json:
        self._check("events", fleet, limit, fleet=fleet)
        self.during_read()
        return {"schema": "fleetctl/events/v1", "events": self.past[-limit:]}

    async def follow_events(self, fleet: str | None) -> AsyncIterator[Json]:
        queue: asyncio.Queue[Json | None] = asyncio.Queue(1000)
        self.followers.add(queue)
        try:
            while (item := await queue.get()) is not None:
                yield item
        finally:
            self.followers.discard(queue)

    def daemon(self) -> Json:
        self._check("daemon")
        return {
            "schema": "fleetctl/daemon/v1",
            "alive": True,
            "pid": os.getpid(),
            "version": "1",
            "uptime_seconds": 1.0,
            "state_dir": "/x",
            "note": None,
            "fleets": self.fleets,
        }

    def shutdown(self, mode: str) -> Json:
        self._check("shutdown", mode)
        return {"schema": "fleetctl/shutdown/v1", "mode": mode}


@dataclass
class Serving:
    """A running server. `complaints`: what the event loop's exception handler was told."""

    control: FakeControl
    path: str
    server: ControlServer
    complaints: list[Mapping[str, Any]] = field(default_factory=list)

    def stop(self) -> None:
        assert self.control.loop is not None
        asyncio.run_coroutine_threadsafe(self.server.stop(), self.control.loop).result(20)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        connection.settimeout(20)
        return connection

    def ask(self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> "Answered":
        connection = _HttpConnection(self.path)
        try:
            with suppress(BrokenPipeError):  # refused before it was all sent: the answer is there all the same
                connection.request(method, target, body, dict(headers or {}))
            response = connection.getresponse()
            return Answered(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    @property
    def connections(self) -> int:
        return int(self.control.in_loop(lambda: len(self.server._connections())))


@dataclass
class Answered:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


@contextmanager
def short_folder() -> Iterator[str]:
    """A 0700 folder whose path leaves room for the name of a socket, as pytest's own may not."""
    with tempfile.TemporaryDirectory(prefix="fc-", dir="/tmp") as folder:
        yield folder


@contextmanager
def serving(limits: Limits | None = None, path: str | None = None) -> Iterator[Serving]:
    """The real server, in a thread with a loop of its own."""
    with short_folder() as folder:
        control = FakeControl()
        path = path or f"{folder}/run/control.sock"
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        found = Serving(control, path, ControlServer(control, path, limits=limits))
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, context: found.complaints.append(context))
        control.loop = loop
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(found.server.start(), loop).result(10)
            try:
                yield found
            finally:
                found.stop()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once it holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the other side closes, however it closes."""
    received = b""
    while True:
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data
