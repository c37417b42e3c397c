"""An event as a CloudEvent 1.0, in the JSON format. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"

Json = Mapping[str, Any]  # Any: JSON values


def cloud_event(number: int, event: Json, source: str) -> Json:
    """The envelope of a row of the events table. Its `id` is the same at each delivery, and no other event's of this source."""
    at = float(event.get("at") or 0.0)
    data = {"fleet": event.get("fleet"), "agent_id": event.get("agent_id"), "message": event.get("message"), **(event.get("data") or {})}
    return {
        "specversion": "1.0",
        # A database that was damaged and begun anew counts from 1 again; the time tells its events from the older ones.
        "id": f"{round(at * 1e6)}-{number}",
        "source": source,
        "type": f"fleetctl.{event.get('kind')}",
        "subject": event.get("agent_id") or event.get("fleet"),
        "time": datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": data,
    }


def loss(first: int, last: int, at: float) -> Json:
    """What is said in place of events that were gone before they could be delivered, as a row of the table."""
    message = f"{last - first + 1} events were lost: the place was away for longer than events are kept"
    return {"at": at, "kind": "sink.lost", "fleet": None, "agent_id": None, "message": message, "data": {"first": first, "last": last}}
