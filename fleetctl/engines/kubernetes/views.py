"""Objects of the cluster -> what `status` and `ps` tell of them, in the shapes of the local daemon. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleetctl.daemon.wire import AgentStatus, Autoscaling, ExitInfo, FleetStatus, WarmPool
from fleetctl.engines.kubernetes import names
from fleetctl.engines.kubernetes.names import Object
from fleetctl.engines.kubernetes.times import unix

# Why a container waits: what nothing but a change of the fleet will end, and what the kubelet tries again by itself.
_HOPELESS = {
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImagePullBackOff",
}
_SUFFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SUFFIXES |= {"Ki": 1024.0, "Mi": 1024.0**2, "Gi": 1024.0**3, "Ti": 1024.0**4}

Json = dict[str, Any]  # Any: JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found of our fleets at one moment; `usage` by pod, (CPU cores, bytes)."""

    deployments: Sequence[Object] = ()
    pods: Sequence[Object] = ()
    autoscalers: Sequence[Object] = ()
    sandbox_pools: Sequence[Object] = ()
    usage: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    now: float = 0.0


def fleets(seen: Seen) -> list[FleetStatus]:
    """Every fleet that has a Deployment or at least an agent of ours, by name."""
    found = {names.fleet_of(one) for one in (*seen.deployments, *seen.pods)} - {""}
    return [_fleet(name, seen) for name in sorted(found)]


def is_replicas(deployment: Object) -> bool:
    return bool(deployment["metadata"]["labels"].get(names.POOL) != names.STANDBY)


def deployment_of(name: str, seen: Seen) -> Object | None:
    return next((one for one in seen.deployments if names.fleet_of(one) == name and is_replicas(one)), None)


def autoscaler_of(name: str, seen: Seen) -> Object | None:
    return next((one for one in seen.autoscalers if names.fleet_of(one) == name), None)


def _fleet(name: str, seen: Seen) -> FleetStatus:
    deployment, autoscaler = deployment_of(name, seen), autoscaler_of(name, seen)
    pods = _by_age(pod for pod in seen.pods if names.fleet_of(pod) == name)
    agents = [_agent(pod, number, seen) for number, pod in enumerate(pod for pod in pods if not has_ended(pod))]
    going = deployment is None or "deletionTimestamp" in deployment["metadata"]
    pool, kind = _warm_pool(name, deployment, agents, seen)
    status: FleetStatus = {
        "name": name,
        "desired_replicas": 0 if deployment is None or going else int(deployment["spec"].get("replicas", 1)),
        "ready_replicas": sum(1 for agent in agents if agent["ready"] and not agent["pooled"]),
        "autoscaling": _autoscaling(autoscaler, deployment),
        "warm_pool": pool,
        "command": _command(deployment),
        "down": going,
        "notes": [*_complaints(deployment), *_endings(pods), *_scaling_notes(autoscaler), *([kind] if kind else [])],
        "agents": agents,
        "updating": deployment is not None and _updating(deployment),
    }
    return status


def _autoscaling(autoscaler: Object | None, deployment: Object | None) -> Autoscaling:
    """The cluster's autoscaler, which keeps no count of what it did."""
    spec = (autoscaler or {}).get("spec") or {}
    given = ((deployment or {}).get("metadata") or {}).get("annotations") or {}
    return {
        "enabled": autoscaler is not None,
        "mode": "act" if autoscaler else None,
        "min_replicas": int(spec.get("minReplicas") or given.get(names.MIN_REPLICAS) or 0),
        "max_replicas": int(spec.get("maxReplicas") or given.get(names.MAX_REPLICAS) or 0),
        "scale_up_count": 0,
        "scale_down_count": 0,
        "next_decision_seconds": None,
        "reason": str(_conditions(autoscaler).get("ScalingActive", {}).get("message") or "") or None,
    }


def _by_age(pods: Iterable[Object]) -> list[Object]:
    return sorted(pods, key=lambda pod: (str(pod["metadata"].get("creationTimestamp")), pod["metadata"]["name"]))


def _command(deployment: Object | None) -> list[str]:
    containers = deployment["spec"]["template"]["spec"]["containers"] if deployment else []
    return list(map(str, containers[0].get("command") or [containers[0].get("image", "")])) if containers else []


def _updating(deployment: Object) -> bool:
    """Whether pods of an older template are still there, or the cluster has not even read the newest one."""
    status, wanted = deployment.get("status") or {}, int(deployment["spec"].get("replicas", 1))
    behind = int(status.get("observedGeneration", 0)) < int(deployment["metadata"].get("generation", 0))
    updated, there = int(status.get("updatedReplicas", 0)), int(status.get("replicas", 0))
    return behind or updated < wanted or there > updated


def _conditions(found: Object | None) -> dict[str, Json]:
    return {str(one.get("type")): one for one in ((found or {}).get("status") or {}).get("conditions") or ()}


def _complaints(deployment: Object | None) -> list[str]:
    """What the cluster says is wrong with a Deployment: no quota, an admission rule, no progress."""
    conditions = _conditions(deployment)
    failure, progress = conditions.get("ReplicaFailure", {}), conditions.get("Progressing", {})
    found = [str(failure.get("message"))] if failure.get("status") == "True" else []
    return found + ([str(progress.get("message"))] if progress.get("status") == "False" else [])


def has_ended(pod: Object) -> bool:
    """Whether it is over with this pod: it was evicted, say, and another has taken its place. The cluster lists it for a while."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _endings(pods: Iterable[Object]) -> list[str]:
    found = [(pod["metadata"]["name"], pod["status"]) for pod in pods if has_ended(pod)]
    words = [(name, str(status.get("reason") or ""), str(status.get("message") or "")) for name, status in found]
    return [f"{name} has ended: " + ": ".join(filter(None, [reason, message])) for name, reason, message in words if reason or message]


def _scaling_notes(autoscaler: Object | None) -> list[str]:
    if autoscaler is None:
        return []
    spec, conditions = autoscaler["spec"], _conditions(autoscaler)
    notes = [f"the cluster's autoscaler decides how many, {spec.get('minReplicas', 1)} to {spec['maxReplicas']}"]
    for kind, bad in (("ScalingActive", "False"), ("AbleToScale", "False"), ("ScalingLimited", "True")):
        if conditions.get(kind, {}).get("status") == bad:
            notes.append(f"autoscaler: {conditions[kind].get('message')}")
    return notes


def _warm_pool(name: str, deployment: Object | None, agents: Sequence[AgentStatus], seen: Seen) -> tuple[WarmPool, str]:
    """The pool, and in words what keeps it."""
    standby = next((one for one in seen.deployments if names.fleet_of(one) == name and not is_replicas(one)), None)
    sandboxes = next((one for one in seen.sandbox_pools if names.fleet_of(one) == name), None)
    keeper = standby or sandboxes
    ready = sum(1 for agent in agents if agent["pooled"] and agent["ready"])
    if sandboxes:
        ready = int((sandboxes.get("status") or {}).get("readyReplicas", ready))
    pool: WarmPool = {
        "enabled": keeper is not None,
        "current_size": ready,
        "target_size": int(keeper["spec"].get("replicas", 1)) if keeper else 0,
        "hits": None,
        "misses": None,
        "hit_rate_percent": None,
    }
    kind = "a SandboxWarmPool" if sandboxes else "a standby Deployment: its agents run, they are not suspended"
    return pool, f"warm pool: {kind}" if keeper else ""


def _agent(pod: Object, number: int, seen: Seen) -> AgentStatus:
    metadata, status = pod["metadata"], pod.get("status") or {}
    container: Json = next(iter(status.get("containerStatuses") or ()), {})
    now = container.get("state") or {}
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in status.get("conditions") or ())
    leaving = "deletionTimestamp" in metadata
    cores, memory = seen.usage.get(metadata["name"], (None, None))
    started = unix((now.get("running") or {}).get("startedAt"))
    ended = now.get("terminated") or (container.get("lastState") or {}).get("terminated")
    return {
        "id": metadata["name"],
        "slot": number,
        "pid": None,
        "state": "draining" if leaving else _state(now),
        "ready": ready and not leaving,
        "cpu_percent": None if cores is None else round(cores * 100, 1),
        "memory_bytes": memory,
        "uptime_seconds": None if started is None else max(0.0, round(seen.now - started, 1)),
        "restarts": int(container.get("restartCount", 0)),
        "last_exit": _exit(ended) if ended else None,
        "from_warm_pool": False,
        "next_try_seconds": None,
        "replacing": False,
        "pooled": (metadata.get("labels") or {}).get(names.POOL) == names.STANDBY,
        "protected": False,
        "unsaved": None,
        "note": _note(pod, status, now),
        "status_text": "",
        "active": None,
        "slots": None,
        "pending": None,
        "dropped_messages": 0,
    }


def _state(now: Json) -> str:
    reason = str((now.get("waiting") or {}).get("reason", ""))
    if reason in _HOPELESS:
        return "failed"
    if reason == "CrashLoopBackOff" or "terminated" in now:
        return "backoff"
    return "running" if "running" in now else "starting"


def _exit(ended: Json) -> ExitInfo:
    code, signal, reason = ended.get("exitCode"), ended.get("signal"), str(ended.get("reason") or "")
    text = f"killed by signal {signal}" if signal else f"exit {code}"
    if reason == "OOMKilled":
        text = "killed for using more memory than its limit"
    return {"code": None if signal else code, "signal": signal or None, "at": ended.get("finishedAt"), "text": text}


def _note(pod: Object, status: Json, now: Json) -> str:
    """Why it is not as it should be, in the cluster's words; else where it runs."""
    waiting = now.get("waiting") or {}
    unplaced: Json = next(
        (one for one in status.get("conditions") or () if one.get("type") == "PodScheduled" and one.get("status") == "False"), {}
    )
    words = [str(waiting.get("reason") or ""), str(waiting.get("message") or ""), str(unplaced.get("message") or "")]
    told = ": ".join(dict.fromkeys(word for word in words if word and word != "ContainerCreating"))
    node = (pod.get("spec") or {}).get("nodeName")
    return told or (f"on {node}" if node else "")


def quantity(text: object) -> float:
    """ "250m", "128Mi", "1234567n" -> a number; 0 for what is none."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    try:
        return float(found[1]) * _SUFFIXES[found[2]] if found else 0.0
    except (KeyError, ValueError):
        return 0.0


def usage(metrics: Iterable[Object]) -> dict[str, tuple[float, int]]:
    """What the metrics server measured: pod -> (cores, bytes)."""
    return {
        one["metadata"]["name"]: (
            sum(quantity(container["usage"].get("cpu")) for container in one.get("containers") or ()),
            int(sum(quantity(container["usage"].get("memory")) for container in one.get("containers") or ())),
        )
        for one in metrics
    }
