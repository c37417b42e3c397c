"""Events of the cluster -> what `events` and `history` tell, in the shapes of the local daemon. Pure.

A cluster forgets its events, by default after an hour; so do these.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fleetctl.daemon.wire import EventInfo, HistoryEntry
from fleetctl.engines.kubernetes import names
from fleetctl.engines.kubernetes.names import Object
from fleetctl.engines.kubernetes.times import rfc3339, unix

_SCALED = re.compile(r"Scaled (?P<way>up|down) replica set (?P<set>\S+) (?:from (?P<old>\d+) )?to (?P<new>\d+)(?: from (?P<before>\d+))?")
_RESIZED = re.compile(r"New size: (?P<size>\d+); reason: (?P<reason>.*)", re.DOTALL)
_SAME_MOMENT_SECONDS = 5.0


def fleet_of(event: Object, fleets: Iterable[str]) -> str:
    """The fleet an event is about, by the names that the cluster gives to what belongs to a Deployment; empty for what is none of ours."""
    about = event.get("involvedObject") or {}
    kind, name = str(about.get("kind")), str(about.get("name"))
    for fleet in sorted(fleets, key=len, reverse=True):
        owners = {fleet, names.standby_name(fleet)}
        tail = {"ReplicaSet": r"-[a-z0-9]{1,10}", "Pod": r"-[a-z0-9]{1,10}(-[a-z0-9]{5})?"}.get(kind, "")
        own = owners | {names.service_name(fleet), names.claim_name(fleet)}
        if (name in own and not tail) or (tail and any(re.fullmatch(re.escape(owner) + tail, name) for owner in owners)):
            return fleet
    return ""


def moment(event: Object) -> float:
    """When it happened last."""
    series = event.get("series") or {}
    given = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"), event["metadata"].get("creationTimestamp"))
    return next((at for at in map(unix, given) if at is not None), 0.0)


def told(event: Object, fleet: str) -> EventInfo:
    about = event.get("involvedObject") or {}
    kind, name = str(about.get("kind", "")), str(about.get("name", ""))
    data: dict[str, Any] = {"type": event.get("type"), "count": event.get("count") or 1, "object": f"{kind}/{name}"}  # Any: JSON values
    metadata = event.get("metadata") or {}
    return {
        # A cluster counts an event that repeats in the same object.
        "id": f"{metadata.get('uid', '')}-{event.get('count') or 1}",
        "at": rfc3339(moment(event)),
        "kind": f"{kind.lower()}.{_snake(str(event.get('reason', '')))}",
        "fleet": fleet,
        "agent_id": name if kind == "Pod" else None,
        "message": str(event.get("message") or "").strip(),
        "data": data,
    }


def _snake(reason: str) -> str:
    """SuccessfulCreate -> successful_create"""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", reason).lower()


def events(found: Iterable[Object], fleets: Sequence[str], limit: int) -> list[EventInfo]:
    """The last so many events of these fleets, oldest first."""
    ours = [(moment(event), told(event, fleet)) for event in found if (fleet := fleet_of(event, fleets))]
    rows = [row for _, row in sorted(ours, key=lambda item: item[0])]
    return rows[-limit:] if limit else []


def history(found: Sequence[Object], autoscalers: Sequence[Object], fleets: Sequence[str], limit: int) -> list[HistoryEntry]:
    """The last so many changes of size, oldest first, and what keeps an autoscaler from acting now."""
    rows: list[tuple[float, HistoryEntry]] = []
    for fleet in fleets:
        own = sorted((event for event in found if fleet_of(event, [*fleets]) == fleet), key=moment)
        rows += _sizes(own, fleet)
    rows += [row for one in autoscalers if names.fleet_of(one) in fleets for row in _held(one)]
    ordered = [row for _, row in sorted(rows, key=lambda item: item[0])]
    return ordered[-limit:] if limit else []


def _sizes(events: Sequence[Object], fleet: str) -> list[tuple[float, HistoryEntry]]:
    """Each change of a replica set's size, as a change of the fleet's: a rollout moves agents from one set to another."""
    reasons = [
        (moment(event), int(size["size"]), size["reason"].strip())
        for event in events
        if event.get("reason") == "SuccessfulRescale" and (size := _RESIZED.match(str(event.get("message"))))
    ]
    sets: dict[str, int] = {}
    rows: list[tuple[float, HistoryEntry]] = []
    for event in events:
        scaled = _SCALED.match(str(event.get("message")))
        if not scaled or (event.get("involvedObject") or {}).get("name") != fleet:
            continue
        name, new, old = scaled["set"], int(scaled["new"]), scaled["old"] or scaled["before"]
        if name not in sets and (old is not None or scaled["way"] == "down"):
            sets[name] = int(old or new + 1)
        before = sum(sets.values())
        rollout = any(size and other != name for other, size in sets.items())
        sets[name] = new
        rows.append((moment(event), _entry(moment(event), fleet, before, sum(sets.values()), rollout, reasons)))
    return rows


def _entry(at: float, fleet: str, before: int, after: int, rollout: bool, reasons: Sequence[tuple[float, int, str]]) -> HistoryEntry:
    by_load = next((reason for when, size, reason in reasons if size == after and abs(when - at) <= _SAME_MOMENT_SECONDS), None)
    cause = "rollout" if rollout else "manual" if by_load is None else "autoscaler"
    words = {"rollout": "agents are replaced by those of a newer template", "manual": "the wished size was changed"}
    return {
        "at": rfc3339(at),
        "fleet": fleet,
        "action": "scale_up" if after > before else "scale_down" if after < before else "no_action",
        "current_replicas": before,
        "target_replicas": after,
        "reason": by_load or words[cause],
        "cause": cause,
        "details": {},
    }


def _held(autoscaler: Object) -> Iterable[tuple[float, HistoryEntry]]:
    """What the autoscaler's conditions say it does not do, and why."""
    status = autoscaler.get("status") or {}
    current, wanted = int(status.get("currentReplicas") or 0), int(status.get("desiredReplicas") or 0)
    for condition in status.get("conditions") or ():
        bad = "True" if condition.get("type") == "ScalingLimited" else "False"
        if condition.get("type") in ("ScalingLimited", "ScalingActive", "AbleToScale") and condition.get("status") == bad:
            at = unix(condition.get("lastTransitionTime")) or 0.0
            yield (
                at,
                {
                    "at": rfc3339(at),
                    "fleet": names.fleet_of(autoscaler),
                    "action": "no_action",
                    "current_replicas": current,
                    "target_replicas": wanted or current,
                    "reason": str(condition.get("message") or condition.get("reason") or ""),
                    "cause": "autoscaler",
                    "details": {},
                },
            )
