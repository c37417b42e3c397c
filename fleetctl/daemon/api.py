"""What can be asked over the control socket: one table of operations, which validates requests, routes them and documents itself.

Knows nothing of sockets or HTTP servers. The schemas of parameters and bodies that the OpenAPI document shows are the ones that
requests are checked against, so the two cannot differ.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints, is_typeddict
from urllib.parse import parse_qsl

from fleetctl import __version__, errors
from fleetctl.daemon import exposition, wire
from fleetctl.models import AGENT_ID_PATTERN, NAME_PATTERN

MOST_REPLICAS = 100_000
MOST_WARM = 1_000
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,254}$"
BODY = "body"
BEAT_SECONDS = 2.0  # a watched status is sent at least this often
OVERLAP_EVENTS = 1000  # more than can happen while the past is read from the database

# Any, in this module: JSON values, and the JSON Schemas that describe them.
Schema = Mapping[str, Any]


class Control(Protocol):
    """What the server calls; all of it raises FleetctlError subclasses for the caller. Nothing here may block for long."""

    def status(self, fleet: str | None) -> dict[str, Any]: ...

    async def wait_change(self, timeout: float) -> None:
        """Return when anything visible has changed since the wait began, or after `timeout` seconds."""
        ...

    def fleet(self, name: str) -> dict[str, Any]: ...

    def agent(self, agent_id: str) -> dict[str, Any]: ...

    async def apply(self, name: str, spec: Mapping[str, Any], *, replicas_given: bool, dry_run: bool) -> dict[str, Any]: ...

    async def scale(self, name: str, *, replicas: int | None, delta: int | None, dry_run: bool) -> dict[str, Any]: ...

    async def resize_warm_pool(self, name: str, *, size: int, dry_run: bool) -> dict[str, Any]: ...

    def autoscaling(self, name: str) -> dict[str, Any]: ...

    async def set_autoscaling(self, name: str, *, enabled: bool, mode: str, dry_run: bool) -> dict[str, Any]: ...

    async def renew_budget(self, name: str, *, dry_run: bool) -> dict[str, Any]: ...

    async def acquire(self, name: str, *, claim: Mapping[str, Any], require_warm: bool, timeout_seconds: float) -> dict[str, Any]: ...

    async def restart(self, name: str, *, agents: Sequence[str] | None, all_at_once: bool, dry_run: bool) -> dict[str, Any]: ...

    async def down(self, name: str, *, now: bool, dry_run: bool) -> dict[str, Any]: ...

    async def list_checkpoints(self, fleet: str | None, agent: str | None) -> dict[str, Any]: ...

    async def checkpoint(self, checkpoint_id: str) -> dict[str, Any]: ...

    async def create_checkpoint(self, agent_id: str, *, dry_run: bool) -> dict[str, Any]: ...

    async def restore_checkpoint(self, checkpoint_id: str, *, timeout_seconds: float, dry_run: bool) -> dict[str, Any]: ...

    async def remove_checkpoint(self, checkpoint_id: str, *, dry_run: bool) -> dict[str, Any]: ...

    async def drain(self, agent_id: str, *, now: bool, dry_run: bool) -> dict[str, Any]: ...

    async def protect(self, agent_id: str, *, protected: bool, dry_run: bool) -> dict[str, Any]: ...

    async def history(self, fleet: str | None, limit: int) -> dict[str, Any]: ...

    async def samples(self, fleet: str | None, limit: int) -> dict[str, Any]: ...

    async def events(self, fleet: str | None, limit: int) -> dict[str, Any]: ...

    def follow_events(self, fleet: str | None) -> AsyncIterator[dict[str, Any]]:
        """Events from the first `anext` on, through a bounded queue: a deaf reader is dropped, and the iterator ends."""
        ...

    def daemon(self) -> dict[str, Any]: ...

    async def metrics(self) -> str: ...

    def shutdown(self, mode: str) -> dict[str, Any]: ...


class Problem(Exception):
    """A request that is answered with this HTTP status and error."""

    def __init__(self, status: int, error: errors.FleetctlError, allow: str = "") -> None:
        super().__init__(error.message)
        self.status, self.error, self.allow = status, error, allow


def usage(message: str, status: int = 400) -> Problem:
    return Problem(status, errors.UsageError(message, hint=errors.API_HINT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One validated request."""

    control: Control
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Mapping[str, Any]


Stream = AsyncGenerator[Mapping[str, Any], None]
Answer = dict[str, Any] | Stream | str  # one object, a stream of objects, one a line, or text of the operation's `media`


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method on one path. `line`: the type of a stream's objects, where the operation can stream; `media`: of its other answer."""

    method: str
    path: str
    summary: str
    run: Callable[[Call], Awaitable[Answer]]
    reply: type
    query: Mapping[str, Schema] = field(default_factory=dict)
    body: Schema | None = None
    line: type | None = None
    media: str = "application/json"


# ---- what may be said ----

_FLEET: Schema = {"type": "string", "pattern": NAME_PATTERN, "description": "The fleet's name"}
_PATH_PARAMETERS: Mapping[str, Schema] = {
    "fleet": _FLEET,
    "agent": {"type": "string", "pattern": AGENT_ID_PATTERN, "description": "The agent's id, such as demo-k3x9q"},
    # Without a pattern: what is none is answered like one that does not exist.
    "checkpoint": {"type": "string", "maxLength": 200, "description": "The checkpoint's id, such as 20261125t004530-ab3de"},
}
_ONE_AGENT: Schema = {"type": "string", "pattern": AGENT_ID_PATTERN, "description": "Only this agent's"}
_ONE_FLEET: Schema = {**_FLEET, "description": "Only this fleet"}
_DRY_RUN: Schema = {"type": "boolean", "default": False, "description": "Say what would change, change nothing"}


def _limit(default: int, least: int = 1) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": 10_000, "default": default, "description": "The last so many"}


def _object(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_APPLY = _object(
    {
        "spec": {"type": "object", "description": "The settings of `[fleet]` in fleet.toml"},
        "replicas_given": {"type": "boolean", "default": True, "description": "false: an existing fleet keeps its number of replicas"},
        "dry_run": _DRY_RUN,
    },
    ["spec"],
)
_SCALE = _object(
    {
        "replicas": {"type": "integer", "minimum": 0, "maximum": MOST_REPLICAS, "description": "Agents wanted; this or `delta`"},
        "delta": {"type": "integer", "minimum": -MOST_REPLICAS, "maximum": MOST_REPLICAS, "description": "So many more, or fewer"},
        "dry_run": _DRY_RUN,
    }
)
_WARM = _object(
    {"size": {"type": "integer", "minimum": 0, "maximum": MOST_WARM, "description": "Instances to keep suspended"}, "dry_run": _DRY_RUN},
    ["size"],
)
_AUTOSCALING = _object(
    {
        "enabled": {"type": "boolean", "description": "Let the load decide how many agents there are"},
        "mode": {"type": "string", "enum": ["act", "recommend"], "default": "act", "description": "recommend: decisions are only told"},
        "dry_run": _DRY_RUN,
    },
    ["enabled"],
)
_CLAIM = _object(
    {
        "environment": {
            "type": "object",
            "propertyNames": {"type": "string", "pattern": VARIABLE_PATTERN},
            "additionalProperties": {"type": "string", "maxLength": 32_768},
            "maxProperties": 1_000,
            "default": {},
        },
        "tools": {"type": "array", "items": {"type": "string", "maxLength": 1_024}, "maxItems": 1_000, "default": []},
    }
)
_ACQUIRE = _object(
    {
        "claim": {**_CLAIM, "default": {"environment": {}, "tools": []}, "description": "What the agent is told in its claim file"},
        "require_warm": {"type": "boolean", "default": False, "description": "Fail where the warm pool is empty, instead of starting one"},
        "timeout_seconds": {"type": "number", "minimum": 0, "maximum": 3600, "default": 30, "description": "For a cold start to be ready"},
    }
)
_ONLY_DRY_RUN = _object({"dry_run": _DRY_RUN})
_RESTORE = _object(
    {
        "timeout_seconds": {"type": "number", "minimum": 0, "maximum": 3600, "default": 30, "description": "For the agent to be ready"},
        "dry_run": _DRY_RUN,
    }
)
_DRAIN = _object(
    {
        "now": {"type": "boolean", "default": False, "description": "Without a checkpoint, and without time to finish"},
        "dry_run": _DRY_RUN,
    }
)
_PROTECT = _object(
    {
        "protected": {"type": "boolean", "default": True, "description": "Spare the agent where its fleet shrinks, or no longer"},
        "dry_run": _DRY_RUN,
    }
)
_RESTART = _object(
    {
        "agents": {
            "type": ["array", "null"],
            "items": {"type": "string", "pattern": AGENT_ID_PATTERN},
            "maxItems": MOST_REPLICAS,
            "default": None,
            "description": "Only these; null means all",
        },
        "all_at_once": {"type": "boolean", "default": False, "description": "Do not wait for one to be ready before the next"},
        "dry_run": _DRY_RUN,
    }
)
_SHUTDOWN = _object(
    {"mode": {"type": "string", "enum": ["keep", "drain"], "description": "keep: agents run on; drain: they are stopped first"}}, ["mode"]
)

# ---- what is done ----


async def _status(call: Call) -> Answer:
    status = call.control.status(call.query["fleet"])  # also before a watch: an unknown fleet is a 404, not a stream
    seconds = call.query["watch"]
    return status if seconds is None else watch(call.control, call.query["fleet"], seconds)


async def watch(control: Control, fleet: str | None, seconds: float) -> Stream:
    """The status now, and after every change, at most once each `seconds`; without a change every BEAT_SECONDS."""
    while True:
        changed = asyncio.create_task(control.wait_change(BEAT_SECONDS))
        try:
            await asyncio.sleep(0)  # the wait begins before the look, so that no change falls between the two
            yield control.status(fleet)
            await asyncio.sleep(seconds)
            await changed
        finally:
            changed.cancel()


async def _events(call: Call) -> Answer:
    fleet, limit = call.query["fleet"], call.query["limit"]
    return await follow(call.control, fleet, limit) if call.query["follow"] else await call.control.events(fleet, limit)


async def follow(control: Control, fleet: str | None, limit: int) -> Stream:
    """The last `limit` events, then every new one, none lost or doubled between; ready when it returns. Raises NotFound."""
    stream = _following(control.follow_events(fleet), control, fleet, limit)
    await anext(stream)
    return stream


async def _following(news: AsyncIterator[dict[str, Any]], control: Control, fleet: str | None, limit: int) -> Stream:
    """What `follow` says, after one empty object that tells that the subscription stands and the past is read."""
    coming = asyncio.create_task(_next(news))
    try:
        await asyncio.sleep(0)  # the subscription begins before the past is read
        past = (await control.events(fleet, limit + OVERLAP_EVENTS))["events"]
        yield {}
        for event in past[-limit:] if limit else []:
            yield event
        # What happened while the past was being read is in both; with limit 0 none of the past was shown.
        known = past if limit else []
        while (happened := await coming) is not None:
            coming = asyncio.create_task(_next(news))
            if happened not in known:
                known = []
                yield happened
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        if isinstance(news, AsyncGenerator):
            await news.aclose()  # ends the subscription now, not when the garbage is collected


async def _next(news: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return await anext(news)
    except StopAsyncIteration:
        return None


async def _fleet(call: Call) -> Answer:
    return call.control.fleet(call.path["fleet"])


async def _agent(call: Call) -> Answer:
    return call.control.agent(call.path["agent"])


async def _apply(call: Call) -> Answer:
    body = call.body
    return await call.control.apply(call.path["fleet"], body["spec"], replicas_given=body["replicas_given"], dry_run=body["dry_run"])


async def _scale(call: Call) -> Answer:
    replicas, delta = call.body["replicas"], call.body["delta"]
    if (replicas is None) == (delta is None):
        raise usage(f"{BODY}: give either `replicas` or `delta`")
    return await call.control.scale(call.path["fleet"], replicas=replicas, delta=delta, dry_run=call.body["dry_run"])


async def _resize_warm_pool(call: Call) -> Answer:
    return await call.control.resize_warm_pool(call.path["fleet"], size=call.body["size"], dry_run=call.body["dry_run"])


async def _autoscaling(call: Call) -> Answer:
    return call.control.autoscaling(call.path["fleet"])


async def _set_autoscaling(call: Call) -> Answer:
    body = call.body
    return await call.control.set_autoscaling(call.path["fleet"], enabled=body["enabled"], mode=body["mode"], dry_run=body["dry_run"])


async def _renew_budget(call: Call) -> Answer:
    return await call.control.renew_budget(call.path["fleet"], dry_run=call.body["dry_run"])


async def _acquire(call: Call) -> Answer:
    body = call.body
    return await call.control.acquire(
        call.path["fleet"], claim=body["claim"], require_warm=body["require_warm"], timeout_seconds=body["timeout_seconds"]
    )


async def _restart(call: Call) -> Answer:
    body = call.body
    return await call.control.restart(call.path["fleet"], agents=body["agents"], all_at_once=body["all_at_once"], dry_run=body["dry_run"])


async def _down(call: Call) -> Answer:
    return await call.control.down(call.path["fleet"], now=call.query["now"], dry_run=call.query["dry_run"])


async def _list_checkpoints(call: Call) -> Answer:
    return await call.control.list_checkpoints(call.query["fleet"], call.query["agent"])


async def _checkpoint(call: Call) -> Answer:
    return await call.control.checkpoint(call.path["checkpoint"])


async def _create_checkpoint(call: Call) -> Answer:
    return await call.control.create_checkpoint(call.path["agent"], dry_run=call.body["dry_run"])


async def _restore_checkpoint(call: Call) -> Answer:
    body = call.body
    return await call.control.restore_checkpoint(call.path["checkpoint"], timeout_seconds=body["timeout_seconds"], dry_run=body["dry_run"])


async def _remove_checkpoint(call: Call) -> Answer:
    return await call.control.remove_checkpoint(call.path["checkpoint"], dry_run=call.query["dry_run"])


async def _drain(call: Call) -> Answer:
    return await call.control.drain(call.path["agent"], now=call.body["now"], dry_run=call.body["dry_run"])


async def _protect(call: Call) -> Answer:
    return await call.control.protect(call.path["agent"], protected=call.body["protected"], dry_run=call.body["dry_run"])


async def _history(call: Call) -> Answer:
    return await call.control.history(call.query["fleet"], call.query["limit"])


async def _samples(call: Call) -> Answer:
    return await call.control.samples(call.query["fleet"], call.query["limit"])


async def _daemon(call: Call) -> Answer:
    return call.control.daemon()


async def _metrics(call: Call) -> Answer:
    return await call.control.metrics()


async def _shutdown(call: Call) -> Answer:
    return call.control.shutdown(call.body["mode"])


async def _openapi(call: Call) -> Answer:
    return openapi()


_NOW: Schema = {"type": "boolean", "default": False, "description": "Kill the agents instead of draining them"}
_WATCH: Schema = {
    "type": "number",
    "minimum": 0.05,
    "maximum": 60,
    "description": "Stream the status, one object a line: now, after every change (at most one each so many seconds), every 2 s without",
}
_FOLLOW: Schema = {"type": "boolean", "default": False, "description": "Stream the events, one object a line, the last `limit` first"}

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        method="GET",
        path="/v1/status",
        summary="The daemon, its fleets and their agents",
        run=_status,
        reply=wire.Status,
        query={"fleet": _ONE_FLEET, "watch": _WATCH},
        line=wire.Status,
    ),
    Operation(method="GET", path="/v1/fleets/{fleet}", summary="One fleet with its settings", run=_fleet, reply=wire.FleetDetail),
    Operation(
        method="PUT", path="/v1/fleets/{fleet}", summary="Make the fleet be as the spec says", run=_apply, reply=wire.Change, body=_APPLY
    ),
    Operation(
        method="DELETE",
        path="/v1/fleets/{fleet}",
        summary="Take the fleet down",
        run=_down,
        reply=wire.Change,
        query={"now": _NOW, "dry_run": _DRY_RUN},
    ),
    Operation(
        method="POST", path="/v1/fleets/{fleet}/scale", summary="Ask for more or fewer agents", run=_scale, reply=wire.Change, body=_SCALE
    ),
    Operation(
        method="POST",
        path="/v1/fleets/{fleet}/warm",
        summary="Keep more or fewer suspended instances ready",
        run=_resize_warm_pool,
        reply=wire.Change,
        body=_WARM,
    ),
    Operation(
        method="GET",
        path="/v1/fleets/{fleet}/autoscaling",
        summary="What the autoscaler decided last, and why",
        run=_autoscaling,
        reply=wire.AutoscalingDetail,
    ),
    Operation(
        method="POST",
        path="/v1/fleets/{fleet}/autoscaling",
        summary="Let the load decide how many agents there are, or not",
        run=_set_autoscaling,
        reply=wire.Change,
        body=_AUTOSCALING,
    ),
    Operation(
        method="POST",
        path="/v1/fleets/{fleet}/budget",
        summary="Count what the fleet spends in this period from 0 again",
        run=_renew_budget,
        reply=wire.Change,
        body=_ONLY_DRY_RUN,
    ),
    Operation(
        method="POST",
        path="/v1/fleets/{fleet}/acquire",
        summary="Get one more agent, at once where the warm pool has one",
        run=_acquire,
        reply=wire.Acquired,
        body=_ACQUIRE,
    ),
    Operation(
        method="POST",
        path="/v1/fleets/{fleet}/restart",
        summary="Replace agents by new ones",
        run=_restart,
        reply=wire.Change,
        body=_RESTART,
    ),
    Operation(method="GET", path="/v1/agents/{agent}", summary="One agent with its processes", run=_agent, reply=wire.AgentDetail),
    Operation(
        method="POST",
        path="/v1/agents/{agent}/drain",
        summary="Let this agent finish and leave; its fleet is one smaller",
        run=_drain,
        reply=wire.Drained,
        body=_DRAIN,
    ),
    Operation(
        method="POST",
        path="/v1/agents/{agent}/protect",
        summary="Spare this agent where its fleet shrinks, or no longer",
        run=_protect,
        reply=wire.Protected,
        body=_PROTECT,
    ),
    Operation(
        method="POST",
        path="/v1/agents/{agent}/checkpoint",
        summary="Save what this agent keeps while it goes on",
        run=_create_checkpoint,
        reply=wire.Checkpointed,
        body=_ONLY_DRY_RUN,
    ),
    Operation(
        method="GET",
        path="/v1/checkpoints",
        summary="What was saved of agents, oldest first",
        run=_list_checkpoints,
        reply=wire.Checkpoints,
        query={"fleet": _ONE_FLEET, "agent": _ONE_AGENT},
    ),
    Operation(
        method="GET",
        path="/v1/checkpoints/{checkpoint}",
        summary="One checkpoint, every byte of it checked",
        run=_checkpoint,
        reply=wire.CheckpointDetail,
    ),
    Operation(
        method="DELETE",
        path="/v1/checkpoints/{checkpoint}",
        summary="Remove a checkpoint",
        run=_remove_checkpoint,
        reply=wire.CheckpointRemoved,
        query={"dry_run": _DRY_RUN},
    ),
    Operation(
        method="POST",
        path="/v1/checkpoints/{checkpoint}/restore",
        summary="Start one more agent, which goes on from the checkpoint",
        run=_restore_checkpoint,
        reply=wire.Restored,
        body=_RESTORE,
    ),
    Operation(
        method="GET",
        path="/v1/history",
        summary="Scaling decisions, oldest first",
        run=_history,
        reply=wire.History,
        query={"fleet": _ONE_FLEET, "limit": _limit(20)},
    ),
    Operation(
        method="GET",
        path="/v1/samples",
        summary="Load and size of autoscaled fleets, oldest first",
        run=_samples,
        reply=wire.Samples,
        query={"fleet": _ONE_FLEET, "limit": _limit(500)},
    ),
    Operation(
        method="GET",
        path="/v1/events",
        summary="What happened, oldest first",
        run=_events,
        reply=wire.Events,
        query={"fleet": _ONE_FLEET, "limit": _limit(100, least=0), "follow": _FOLLOW},
        line=wire.EventInfo,
    ),
    Operation(method="GET", path="/v1/daemon", summary="The daemon itself", run=_daemon, reply=wire.DaemonInfo),
    Operation(
        method="GET",
        path="/metrics",
        summary="Numbers for Prometheus, in its text format",
        run=_metrics,
        reply=str,
        media=exposition.CONTENT_TYPE,
    ),
    Operation(method="POST", path="/v1/shutdown", summary="Stop the daemon", run=_shutdown, reply=wire.Shutdown, body=_SHUTDOWN),
    Operation(method="GET", path="/openapi.json", summary="This document", run=_openapi, reply=dict),
)


def by_path() -> dict[str, dict[str, Operation]]:
    """The operations of each path, by method."""
    paths: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = operation
    return paths


# ---- checking what was said ----

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (NoneType,),
}
_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_WORDS = {"1": True, "true": True, "0": False, "false": False}


def _has_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def check(value: Any, schema: Schema, where: str) -> Any:
    """The value, with defaults filled in; raises Problem (400). Knows the few words of JSON Schema that the table above uses."""
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(_has_type(value, name) for name in names):
        raise usage(f"{where}: {_shown(value)} is not of type {' or '.join(names)}")
    if isinstance(value, str):
        _check_text(value, schema, where)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, schema, where)
    elif isinstance(value, list):
        if len(value) > schema["maxItems"]:
            raise usage(f"{where}: more than {schema['maxItems']} items")
        return [check(item, schema["items"], f"{where}[{index}]") for index, item in enumerate(value)]
    elif isinstance(value, dict) and "properties" in schema:
        return _check_object(value, schema, where)
    elif isinstance(value, dict) and "propertyNames" in schema:
        return _check_map(value, schema, where)
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_text(value: str, schema: Schema, where: str) -> None:
    # fullmatch, because the `$` of a pattern also matches before a final newline
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        raise usage(f"{where}: {_shown(value)} cannot be the name of a fleet or agent (lower-case letters, digits and dashes)")
    if len(value) > schema.get("maxLength", math.inf):
        raise usage(f"{where}: {len(value)} characters are more than {schema['maxLength']}")
    if "enum" in schema and value not in schema["enum"]:
        raise usage(f"{where}: {_shown(value)} is not one of {', '.join(schema['enum'])}")


def _check_number(value: float, schema: Schema, where: str) -> None:
    if not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        raise usage(f"{where}: {_shown(value)} is not between {schema.get('minimum')} and {schema.get('maximum')}")


def _check_object(value: Mapping[str, Any], schema: Schema, where: str) -> dict[str, Any]:
    properties = schema["properties"]
    if unknown := sorted(value.keys() - properties.keys()):
        raise usage(f"{where}: unknown field {_shown(unknown[0])}; known are {', '.join(properties)}")
    if missing := [name for name in schema["required"] if name not in value]:
        raise usage(f"{where}: `{missing[0]}` is missing")
    # What a caller gave is named as in the list of fields, so that a command may pass the word on to who wrote it.
    inside = "" if where == BODY else f"{where}."
    return {
        name: check(value[name], rule, f"{inside}{name}") if name in value else rule.get("default") for name, rule in properties.items()
    }


def _check_map(value: Mapping[str, Any], schema: Schema, where: str) -> dict[str, Any]:
    """A table of names and values, such as variables."""
    if len(value) > schema["maxProperties"]:
        raise usage(f"{where}: more than {schema['maxProperties']} fields")
    for name in value:
        if not re.fullmatch(schema["propertyNames"]["pattern"], name):
            raise usage(f"{where}: {_shown(name)} cannot be the name of a variable (letters, digits and underscores)")
    return {name: check(item, schema["additionalProperties"], f"{where}.{name}") for name, item in value.items()}


def parse_path(given: Mapping[str, str]) -> dict[str, str]:
    return {name: check(value, _PATH_PARAMETERS[name], name) for name, value in given.items()}


def parse_query(raw: bytes, operation: Operation) -> dict[str, Any]:
    """The query's values by name, defaults filled in; an empty value counts as not given."""
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError:
        raise usage("The query cannot be read") from None
    known = operation.query
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name not in known:
            raise usage(f"Unknown query parameter {_shown(name)}; known here: {', '.join(known) or 'none'}")
        if name in given:
            raise usage(f"The query parameter {name} is given twice")
        if text:
            given[name] = check(_from_text(text, known[name]["type"]), known[name], name)
    return {name: given.get(name, rule.get("default")) for name, rule in known.items()}


def _from_text(text: str, kind: str) -> Any:
    """The text of a query as a value of this type, or as it is where it does not look like one (the check then says so)."""
    if kind == "boolean":
        return _WORDS.get(text, text)
    if kind in ("integer", "number") and _NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return text


def parse_body(raw: bytes, operation: Operation) -> dict[str, Any]:
    """The body's fields, defaults filled in; empty for an operation that takes none."""
    if operation.body is None:
        return {}
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # escapes of half a character: no file or program could take them
    except UnicodeError:
        raise usage("The body is not text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise usage(f"The body is not JSON: {error}") from None
    parsed: dict[str, Any] = check(value, operation.body, BODY)
    return parsed


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# ---- saying it ----


def encode(value: Any) -> bytes:
    """JSON in UTF-8 that every parser reads: a number that is none becomes null, half a character U+FFFD."""
    try:
        return _dumps(value)
    except ValueError:  # NaN, infinity, or (as UnicodeEncodeError) a lone surrogate, as undecodable file names have them
        return _dumps(_cleaned(value))


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _cleaned(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    return value


# ---- the document ----


def schema_of(hint: Any, found: dict[str, Schema]) -> Schema:
    """The JSON Schema of a type of wire.py; TypedDicts go into `found` by name and are referred to."""
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null", dict: "object"}
    if hint in plain:
        return {"type": plain[hint]}
    if hint is Any:
        return {}
    if is_typeddict(hint):
        if hint.__name__ not in found:
            found[hint.__name__] = {}  # holds the place while its parts are described
            found[hint.__name__] = _described(hint, found)
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin is list:
        return {"type": "array", "items": schema_of(parts[0], found)}
    if origin is dict:
        return {"type": "object"}
    if origin is Literal:
        return {"const": parts[0]} if len(parts) == 1 else {"enum": list(parts)}
    if origin is UnionType:
        return {"anyOf": [schema_of(part, found) for part in parts]}
    raise TypeError(f"no schema for {hint!r}")


def _described(kind: Any, found: dict[str, Schema]) -> Schema:  # Any: a TypedDict class, of which typing has no type
    properties = {name: schema_of(hint, found) for name, hint in get_type_hints(kind).items()}
    # additional properties are allowed: fields are only ever added, and a caller must bear that
    always = [name for name in properties if name in kind.__required_keys__]
    described = {"type": "object", "properties": properties, "required": always}
    return {"description": kind.__doc__, **described} if kind.__doc__ else described


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of all operations."""
    found: dict[str, Schema] = {}
    error = {"description": "An error", "content": {"application/json": {"schema": schema_of(wire.ErrorReply, found)}}}
    paths = {
        path: {method.lower(): _documented(operation, error, found) for method, operation in methods.items()}
        for path, methods in by_path().items()
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fleetctl control socket",
            "version": __version__,
            "description": "HTTP/1.1 over the Unix socket run/control.sock of the state directory. A stream that cannot go on ends "
            "with one object that holds `error`.",
        },
        "servers": [{"url": "http://localhost"}],
        "paths": paths,
        "components": {"schemas": found},
    }


def _documented(operation: Operation, error: Schema, found: dict[str, Schema]) -> dict[str, Any]:
    content = {operation.media: {"schema": schema_of(operation.reply, found)}}
    if operation.line is not None:
        content["application/x-ndjson"] = {"schema": schema_of(operation.line, found)}
    documented: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": operation.run.__name__.strip("_"),
        "parameters": list(_parameters(operation)),
        "responses": {"200": {"description": operation.summary, "content": content}, "default": error},
    }
    if operation.body is not None:
        documented["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
    return documented


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", operation.path):
        yield {"name": name, "in": "path", "required": True, "schema": _PATH_PARAMETERS[name]}
    for name, rule in operation.query.items():
        yield {"name": name, "in": "query", "required": False, "schema": rule}
