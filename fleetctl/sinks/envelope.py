"""An event as a CloudEvent 1.0, in the JSON format. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"

Json = Mapping[str, Any]  # Any: JSON values


def cloud_event(event: Json, source: str) -> Json:
    """An event as it is stored, or as the control socket tells it. Its `id` is the same wherever it is told, and no other event's."""
    at = event.get("at") or 0.0
    data = {"fleet": event.get("fleet"), "agent_id": event.get("agent_id"), "message": event.get("message"), **(event.get("data") or {})}
    return {
        "specversion": "1.0",
        "id": event["id"],
        "source": source,
        "type": f"fleetctl.{event.get('kind')}",
        "subject": event.get("agent_id") or event.get("fleet"),
        "time": at if isinstance(at, str) else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": data,
    }


def loss(first: int, last: int, at: float) -> Json:
    """What is said in place of events that were gone before they could be delivered, as a row of the table."""
    message = f"{last - first + 1} events were lost: the place was away for longer than events are kept"
    told = {"at": at, "kind": "sink.lost", "fleet": None, "agent_id": None, "message": message, "data": {"first": first, "last": last}}
    return {"id": f"{round(at * 1e6)}-{last}", **told}
