"""A daemon that keeps no processes: the control API over a real socket, for tests of what the command line makes of it."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fleetctl.errors import FleetctlError, NotFound, WarmPoolEmpty
from fleetctl.host.paths import Paths

Json = dict[str, Any]  # Any: JSON values


def an_agent(number: int = 0, fleet: str = "web", **changes: Any) -> Json:
    return {
        "id": f"{fleet}-{number:05}",
        "slot": number,
        "pid": 1000 + number,
        "state": "running",
        "ready": True,
        "cpu_percent": 12.34,
        "memory_bytes": 12_345_678,
        "uptime_seconds": 61.5,
        "restarts": 0,
        "last_exit": None,
        "from_warm_pool": False,
        "next_try_seconds": None,
        "replacing": False,
        "pooled": False,
        "protected": False,
        "unsaved": None,
        "note": "",
        "status_text": "",
        "active": None,
        "slots": None,
        "pending": None,
        "dropped_messages": 0,
        **changes,
    }


def a_pool(size: int, **changes: Any) -> Json:
    counts = {"hits": 0, "misses": 0, "hit_rate_percent": None}
    return {"enabled": size > 0, "current_size": size, "target_size": size, **counts, **changes}


def an_autoscaler(**changes: Any) -> Json:
    counts = {"scale_up_count": 0, "scale_down_count": 0, "next_decision_seconds": None, "reason": None}
    return {"enabled": False, "mode": None, "min_replicas": 1, "max_replicas": 100, **counts, **changes}


def a_sample(number: int, replicas: int, fleet: str = "web", **changes: Any) -> Json:
    sizes = {"replicas": replicas, "target_replicas": replicas, "ready": replicas, "min_replicas": 1, "max_replicas": 9}
    seen = {"metric": "cpu", "value": 10.0 * number, "load": 10.0 * number * replicas, "target": 70.0}
    return {"at": f"2026-01-31T12:00:{number:02}.000Z", "fleet": fleet, **sizes, **seen, **changes}


def a_warm_one(number: int, fleet: str = "web", **changes: Any) -> Json:
    return an_agent(number, fleet, **{"state": "suspended", "ready": False, "pooled": True, **changes})


def a_budget(**changes: Any) -> Json:
    spent = {"period": "day", "tokens": 0, "tokens_in": 0, "tokens_out": 0, "cost_usd": 0.0}
    limits = {"tokens_limit": 1000000, "cost_usd_limit": None, "renewed_at": "2026-02-01T00:00:00.000Z"}
    return {**spent, **limits, **changes}


def a_fleet(name: str = "web", size: int = 2, **changes: Any) -> Json:
    return {
        "name": name,
        "desired_replicas": size,
        "ready_replicas": size,
        "autoscaling": an_autoscaler(),
        "warm_pool": a_pool(0),
        "command": ["sleep", "60"],
        "down": False,
        "paused": None,
        "budget": a_budget(),
        "notes": [],
        "agents": [an_agent(number, name) for number in range(size)],
        **changes,
    }


def a_status(*fleets: Json, alive: bool = True) -> Json:
    daemon = {"alive": alive, "pid": 99, "version": "1", "uptime_seconds": 5.0, "state_dir": "/s", "note": None}
    return {"schema": "fleetctl/status/v1", "generated_at": "2026-01-31T12:00:00Z", "daemon": daemon, "fleets": list(fleets)}


A_DRAIN: Json = {"timeout_seconds": 0.0, "on_timeout": "kill", "checkpoint_timeout_seconds": 0.0}


class FakeDaemon:
    """Fleets that do at once what they are told, unless `obedient` is unset; remembers each request as (method, path, body)."""

    def __init__(self) -> None:
        self.fleets: dict[str, Json] = {}
        self.asked: list[tuple[str, str, Json]] = []
        self.events: list[Json] = []
        self.samples: list[Json] = []
        self.entries: list[Json] | None = None  # None: one
        self.last_decision: Json | None = None  # of the autoscaler
        self.obedient = True
        self.failing = False  # new agents fail instead of becoming ready
        self.refusing: set[str] = set()  # fleets that cannot be changed
        self.saving: Callable[[str], Json | None] = lambda agent_id: None  # takes the checkpoint of an agent
        self.differences: list[Json] = []  # between what is and what `up` asks for
        self.changed = threading.Condition()

    def answer(self, method: str, path: str, query: Json, body: Json) -> Json:
        self.asked.append((method, path, body))
        parts = path.strip("/").split("/")[1:]
        match method, parts:
            case "GET", ["status"]:
                return a_status(*([self._fleet(query["fleet"])] if "fleet" in query else self.fleets.values()))
            case "GET", ["daemon"]:
                status = a_status()["daemon"]
                return {**status, "schema": "fleetctl/daemon/v1", "fleets": sorted(self.fleets)}
            case "GET", ["fleets", name]:
                spec = {"name": name, "logs": {"keep": 5}, "graceful_drain": A_DRAIN, "restart": {"policy": "always"}}
                return {**self._fleet(name), "schema": "fleetctl/fleet/v1", "spec": spec, "spec_hash": "00"}
            case "GET", ["agents", agent_id]:
                return self._agent(agent_id)
            case "POST", ["agents", agent_id, "protect"]:
                agent = self._agent(agent_id)
                fleet, protected = agent["fleet"], body["protected"]
                for one in self._fleet(fleet)["agents"]:
                    if one["id"] == agent_id and not body["dry_run"]:
                        one["protected"] = protected
                message = f"{agent_id} is {'protected' if protected else 'protected no longer'}"
                told = {"schema": "fleetctl/protected/v1", "fleet": fleet, "agent": agent_id, "protected": protected, "message": message}
                return {**told, "dry_run": body["dry_run"], "changed": agent["protected"] is not protected}
            case "GET", ["history"]:
                entry = {"at": "2026-01-31T12:00:00.5Z", "fleet": "web", "action": "scale_up", "current_replicas": 2}
                more = {"target_replicas": 5, "reason": "asked for by scale", "cause": "manual"}
                return {"schema": "fleetctl/history/v1", "entries": [{**entry, **more}] if self.entries is None else self.entries}
            case "GET", ["samples"]:
                return {"schema": "fleetctl/samples/v1", "samples": [one for one in self.samples if one["fleet"] == query["fleet"]]}
            case "GET", ["events"]:
                chosen = [event for event in self.events if query.get("fleet") in (None, event["fleet"])]
                return {"schema": "fleetctl/events/v1", "events": chosen[-int(query["limit"]) :]}
            case "PUT", ["fleets", name]:
                return {**self._change(name, self._fleet(name)["desired_replicas"], body), "differences": self.differences}
            case "POST", ["fleets", name, "scale"]:
                fleet = self._fleet(name)
                wanted = body["replicas"] if "replicas" in body else fleet["desired_replicas"] + body["delta"]
                return self._change(name, wanted, body)
            case "POST", ["fleets", name, "restart"]:
                fleet = self._fleet(name)
                for agent in fleet["agents"]:
                    if self.obedient and not body["dry_run"] and (body["agents"] is None or agent["id"] in body["agents"]):
                        agent["pid"] += 5000
                return self._change(name, fleet["desired_replicas"], body)
            case "GET", ["fleets", name, "autoscaling"]:
                fleet = self._fleet(name)
                more = {"fleet": name, "current_replicas": fleet["desired_replicas"], "last_decision": self.last_decision}
                return {"schema": "fleetctl/autoscaling/v1", **fleet["autoscaling"], **more}
            case "POST", ["fleets", name, "autoscaling"]:
                fleet = self._fleet(name)
                answer = self._change(name, fleet["desired_replicas"], {"dry_run": True})
                if not body["dry_run"]:
                    fleet["autoscaling"] = an_autoscaler(enabled=body["enabled"], mode=body["mode"] if body["enabled"] else None)
                word = f"on ({body['mode']})" if body["enabled"] else "off"
                return {
                    **answer,
                    "dry_run": body["dry_run"],
                    "actions": [f"turn autoscaling {word}"],
                    "message": f"{name}: autoscaling is {word}",
                }
            case "POST", ["fleets", name, "budget"]:
                fleet = self._fleet(name)
                if not body["dry_run"]:
                    fleet.update(budget=a_budget(), paused=None)
                message = f"{name}: counting what it spends from 0 again"
                return {**self._change(name, fleet["desired_replicas"], {"dry_run": True}), "dry_run": body["dry_run"], "message": message}
            case "POST", ["fleets", name, "warm"]:
                fleet, before = self._fleet(name), self._fleet(name)["warm_pool"]["target_size"]
                answer = self._change(name, fleet["desired_replicas"], {"dry_run": True})
                with self.changed:
                    if not body["dry_run"]:
                        size = body["size"]
                        replicas = [agent for agent in fleet["agents"] if not agent["pooled"]]
                        state = {"state": "failed", "pid": None, "note": "exit 78"} if self.failing else {}
                        fleet["agents"] = [*replicas, *(a_warm_one(90 + number, name, **state) for number in range(size))]
                        fleet["warm_pool"] = a_pool(size)
                    self.changed.notify_all()
                actions = [f"resize the warm pool from {before} to {body['size']}"]
                return {**answer, "dry_run": body["dry_run"], "actions": actions, "message": f"{name}: {actions[0]}"}
            case "POST", ["fleets", name, "acquire"]:
                pool = [agent for agent in self._fleet(name)["agents"] if agent["pooled"]]
                if not pool and body["require_warm"]:
                    raise WarmPoolEmpty
                return {
                    "schema": "fleetctl/acquired/v1",
                    "fleet": name,
                    "agent_id": pool[0]["id"] if pool else f"{name}-00099",
                    "state": "running",
                    "from_warm_pool": bool(pool),
                    "pid": 4711,
                    "seconds": 0.0008,
                    "claim_path": "/s/run/claims/x.json",
                }
            case "POST", ["agents", agent_id, "drain"]:
                name = self._agent(agent_id)["fleet"]
                with self.changed:
                    if not body["dry_run"] and self.obedient:
                        if not body["now"]:
                            self.saving(agent_id)
                        fleet = self.fleets[name]
                        fleet["agents"] = [agent for agent in fleet["agents"] if agent["id"] != agent_id]
                        fleet["desired_replicas"] -= 1
                    self.changed.notify_all()
                told = {"schema": "fleetctl/drained/v1", "fleet": name, "agent": agent_id, "changed": not body["dry_run"], **body}
                message = f"{agent_id} {'would leave' if body['dry_run'] else 'leaves'}"
                return {**told, "desired_replicas": self.fleets[name]["desired_replicas"], "message": message}
            case "POST", ["agents", agent_id, "checkpoint"]:
                name = self._agent(agent_id)["fleet"]
                taken = None if body["dry_run"] else self.saving(agent_id)
                told = {"schema": "fleetctl/checkpointed/v1", "fleet": name, "agent": agent_id, **body, "checkpoint": taken}
                return {**told, "problem": "", "message": f"{agent_id} {'keeps nothing to save' if taken is None else 'was saved'}"}
            case "POST", ["checkpoints", checkpoint_id, "restore"]:
                dry_run = body["dry_run"]
                told = {"schema": "fleetctl/restored/v1", "fleet": "web", "checkpoint": checkpoint_id, "dry_run": dry_run, "seconds": 0.5}
                message = f"web-00099 goes on from {checkpoint_id}"
                return {**told, "agent_id": None if dry_run else "web-00099", "state": "running", "pid": 4711, "message": message}
            case "DELETE", ["fleets", name]:
                dry_run = query.get("dry_run") == "1"
                answer = self._change(name, self._fleet(name)["desired_replicas"], {"dry_run": True})
                if self.obedient and not dry_run:
                    del self.fleets[name]
                return {**answer, "dry_run": dry_run}
        raise FleetctlError(f"the fake does not know {method} {path}")

    def _fleet(self, name: str) -> Json:
        if name not in self.fleets:
            raise NotFound(f"no fleet {name}")
        return self.fleets[name]

    def _agent(self, agent_id: str) -> Json:
        for name, fleet in self.fleets.items():
            for agent in fleet["agents"]:
                if agent["id"] == agent_id:
                    more = {
                        "fleet": name,
                        "created_at": "2026-01-31T12:00:00Z",
                        "started_at": None,
                        "command": fleet["command"],
                        "cwd": "/",
                    }
                    tree = [{"pid": agent["pid"], "ppid": 1, "state": "S", "command": "sleep 60"}]
                    rest = {"log_path": "/l", "state_directory": "/d", "processes": tree, "environment": ["PATH"], "dropped_by_reason": {}}
                    return {"schema": "fleetctl/agent/v1", **agent, **more, **rest}
        raise NotFound(f"no agent {agent_id}")

    def _change(self, name: str, wanted: int, body: Json) -> Json:
        if name in self.refusing:
            raise FleetctlError(f"{name} cannot be changed")
        fleet, before = self.fleets[name], self.fleets[name]["desired_replicas"]
        with self.changed:
            if not body["dry_run"]:
                fleet["desired_replicas"] = wanted
                if self.obedient:
                    trouble = {"state": "failed", "ready": False, "pid": None, "note": "exit 78"} if self.failing else {}
                    new = [an_agent(number, name, **trouble) for number in range(len(fleet["agents"]), wanted)]
                    fleet["agents"] = fleet["agents"][:wanted] + new
                    fleet["ready_replicas"] = sum(agent["ready"] for agent in fleet["agents"])
            self.changed.notify_all()
        return {
            "schema": "fleetctl/change/v1",
            "fleet": name,
            "changed": wanted != before,
            "created": False,
            "dry_run": body["dry_run"],
            "desired_replicas": wanted,
            "actions": [f"scale from {before} to {wanted}"],
            "message": f"{name}: {before} -> {wanted}",
        }


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    fake: FakeDaemon

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle of a stream is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _serve(self) -> None:
        fake, url = self.server.fake, urlsplit(self.path)
        query: Json = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        try:
            answer, status = fake.answer(self.command, url.path, query, body), 200
        except FleetctlError as error:
            answer, status = {"error": error.to_json()}, error.http_status
        if status == 200 and ("watch" in query or "follow" in query):
            self._stream(query)
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, query: Json) -> None:
        fake = self.server.fake
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            lines = [fake.answer("GET", "/v1/status", query, {})] if "watch" in query else fake.events
            for line in lines:
                data = json.dumps(line).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            with fake.changed:
                fake.changed.wait(0.1 if "watch" in query else 3600)

    do_GET = do_POST = do_PUT = do_DELETE = _serve


@contextmanager
def running(state_dir: Path) -> Iterator[FakeDaemon]:
    """A fake daemon behind the control socket of this state directory."""
    paths, fake = Paths(os.path.realpath(state_dir)), FakeDaemon()
    paths.prepare()
    with _Server(paths.socket, _Handler) as server:
        server.fake = fake
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
            os.unlink(paths.socket)
