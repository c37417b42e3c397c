"""`explain`: why a fleet or an agent is as it is, what happens next, and when."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from fleetctl.cli.options import Json, StateDir
from fleetctl.cli.render import Line, clean, count, duration, last_exit, note_text
from fleetctl.cli.terminal import emit_json, emit_lines
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import NotFound, UsageError

Object = Mapping[str, Any]  # Any: an object of the control API


def explain(
    name: Annotated[
        str | None, typer.Argument(metavar="FLEET|AGENT", help="What to explain; default: all fleets", show_default=False)
    ] = None,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Say why a fleet or an agent is in its state, what happens next, and when.

    Of an autoscaled fleet: what each metric asks for, what holds the next move back, and until when.

    \b
    Examples:
      fleetctl explain
      fleetctl explain web
      fleetctl explain web-k3x9q --json
    """
    with LocalEngine(state_dir) as engine:
        client = engine.client
        names = client.daemon()["fleets"]
        if name is None or name in names:
            chosen = names if name is None else [name]
            explained = [explain_fleet(client.fleet(one), client.autoscaling(one)) for one in chosen]
        else:
            try:
                agent = client.agent(name)
            except (NotFound, UsageError):  # the latter: what can be no id
                raise NotFound(f"no such fleet or agent: {name}") from None
            explained = [explain_agent(agent, client.fleet(agent["fleet"]))]
    if json:
        emit_json({"schema": "fleetctl/explain/v1", "explained": explained})
        return
    for number, one in enumerate(explained):
        emit_lines([*([[("", "")]] if number else []), *lines(one)])
    if not explained:
        emit_lines([[("no fleets; `fleetctl up` starts one", "dim")]])


def lines(explained: Object) -> list[Line]:
    """As people read it: what, then why, then what next."""
    shown: list[Line] = [[(clean(explained["name"]), "bold"), (f"  {clean(explained['state'])}", "")]]
    shown += [[("  ", ""), (clean(text), "")] for text in explained["because"]]
    shown += [[("  next: ", "cyan"), (clean(text), "")] for text in explained["next"]]
    return shown


def explain_fleet(fleet: Object, autoscaling: Object) -> Object:
    because, coming = [], []
    agents = [agent for agent in fleet["agents"] if not agent["pooled"]]
    missing = fleet["desired_replicas"] - len(agents)
    if fleet["down"]:
        because.append("it is being taken down")
    elif missing > 0:
        because.append(f"{count(missing, 'agent')} are still to be started")
    because += [f"note: {note}" for note in fleet["notes"]]
    because += [f"{agent['id']}: {text}" for agent in agents if not _content(agent) for text in _why(agent)[:1]]
    coming += [f"{agent['id']}: {text}" for agent in agents if not _content(agent) for text in _next(agent, fleet)[:1]]
    if safe := sum(agent["protected"] for agent in agents):
        because.append(f"{count(safe, 'agent')} protected: {'it is' if safe == 1 else 'they are'} spared when it shrinks")
    pool = fleet["warm_pool"]
    if pool["enabled"] and pool["current_size"] < pool["target_size"]:
        because.append(f"the warm pool has {pool['current_size']} of {pool['target_size']} instances")
    because += list(_autoscaling_because(autoscaling))
    coming += list(_autoscaling_next(autoscaling))
    if not because:
        because.append("it is as it should be")
    state = f"{fleet['ready_replicas']} of {fleet['desired_replicas']} ready"
    return {"kind": "fleet", "name": fleet["name"], "state": state, "because": because, "next": coming, "autoscaling": autoscaling}


def _content(agent: Object) -> bool:
    return bool(agent["state"] == "running" and agent["ready"] and not agent["replacing"] and not agent["note"])


def _autoscaling_because(found: Object) -> Iterable[str]:
    if not found["enabled"]:
        yield "autoscaling is off: its size is what was asked for"
        return
    acts = "" if found["mode"] == "act" else ", and only tells what it would do"
    yield f"autoscaling is on, between {found['min_replicas']} and {found['max_replicas']} agents{acts}"
    last = found["last_decision"]
    if last is None:
        yield f"autoscaler: {found['reason']}"
        return
    for proposal in last["proposals"]:
        if proposal["error"] == "no values" and proposal["optional"]:
            continue  # nobody has to report it, and nobody does
        wish = "no vote" if proposal["wish"] is None else count(proposal["wish"], "agent")
        winner = ", which wins" if proposal["metric"] == last["winner"] and len(last["proposals"]) > 1 else ""
        gaps = f"; {count(proposal['gaps'], 'agent')} not measured" if proposal["gaps"] else ""
        yield f"{proposal['reason']} -> {wish}{winner}{gaps}"
    if not last["proposals"] or not found["current_replicas"]:
        yield str(last["reason"])


def _autoscaling_next(found: Object) -> Iterable[str]:
    last = found["last_decision"] if found["enabled"] else None
    if last is None:
        return
    current, target, wish = found["current_replicas"], last["target_replicas"], last["wish"]
    for limit in last["limits"]:
        left = limit["seconds_left"]
        yield f"held back: {limit['text']}" + ("" if left is None else f", {duration(max(0.0, left))} left")
    if target != last["current_replicas"] and found["mode"] == "recommend":
        yield f"it would go from {last['current_replicas']} to {target} agents"
    elif wish != current:
        yield f"it wishes for {count(wish, 'agent')}"
    soon = found["next_decision_seconds"]
    if soon is not None and not current:
        yield f"it decides again in {duration(soon)}; where a connection wakes it, at once"
    elif soon is not None:
        yield f"it decides again in {duration(soon)}; a load that is much too high for {count(current, 'agent')}, at any measurement"


def explain_agent(agent: Object, fleet: Object) -> Object:
    return {"kind": "agent", "name": agent["id"], "state": agent["state"], "because": _why(agent), "next": _next(agent, fleet)}


def _why(agent: Object) -> list[str]:
    note = note_text(agent)
    notes = [note] if note else []
    since = duration(agent["uptime_seconds"])
    match agent["state"]:
        case "running" if agent["ready"]:
            return [*notes, f"its process {agent['pid']} runs since {since} and is ready"]
        case "running":
            return notes or [f"its process {agent['pid']} runs since {since} and is not ready"]
        case "starting":
            return [
                f"its process {agent['pid']} was started {since} ago and is not ready yet" if agent["pid"] else "it is about to start",
                *notes,
            ]
        case "suspended":
            return ["it is stopped where it stands, and waits in the warm pool"]
        case "draining":
            return [f"it was asked to stop: {note}" if note else "it was asked to stop"]
        case "backoff" | "failed":
            return [f"it ended ({last_exit(agent['last_exit'])})", *notes]
        case "terminated" if agent["replacing"]:
            return [f"it ended ({last_exit(agent['last_exit'])}) and comes back", *notes]
        case _:
            return [f"it ended ({last_exit(agent['last_exit'])}) and does not come back", *notes]


def _ready_when(readiness: Object) -> list[str]:
    probed = any(readiness.get(kind) for kind in ("http", "tcp", "exec"))
    when = [*(["it says READY=1"] if readiness.get("notify") else []), *(["its readiness probe succeeds"] if probed else [])]
    if not when:
        settle = readiness.get("settle_seconds")
        return [] if settle is None else [f"without a probe it counts as ready when it has lived for {settle:g} s"]
    limit = readiness.get("start_timeout_seconds")
    return [f"it counts as ready when {' and '.join(when)}" + (f"; not so within {limit:g} s is a failed start" if limit else "")]


def _next(agent: Object, fleet: Object) -> list[str]:
    spec = fleet["spec"]
    match agent["state"]:
        case "running" if agent["replacing"]:
            return ["it is replaced by a new process when its turn comes"]
        case "running" if agent["ready"]:
            return [f"when it ends it is started again, restart.policy = {spec['restart']['policy']}"]
        case "starting":
            return _ready_when(spec.get("readiness", {}))
        case "suspended":
            return ["`scale` and `acquire` let it go on, the oldest first"]
        case "draining":
            return [f"it has {spec['graceful_drain']['timeout_seconds']:g} s to finish, then it is killed"]
        case "backoff" | "failed" if agent["next_try_seconds"] is not None:
            return [f"it is started again in {duration(agent['next_try_seconds'])}"]
        case "failed":
            return [f"it is not tried again; `fleetctl restart {agent['id']}` does"]
        case _:
            return []
