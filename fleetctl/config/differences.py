"""What differs between two specs of a fleet, setting by setting, and what each difference takes: nothing, or new processes. Pure."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fleetctl.models import FleetSpec, to_json

HIDDEN_VALUE = "***"
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^\s/@]+@")
_NOT_SET: tuple[object, ...] = (None, [], {})
_Path = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One setting. `change`: added, changed or removed; `how`: live, or rollout, which replaces the agents' processes.

    `old`, `new`: JSON values, null where it is not set; values of environment variables are never in them.
    """

    key: str
    change: str
    how: str
    old: Any  # Any: JSON values
    new: Any


def differences(old: FleetSpec, new: FleetSpec) -> list[Difference]:
    """In the order of the settings; entries of a table, such as environment.PATH, each by itself."""
    before, after = dict(_leaves(to_json(old))), dict(_leaves(to_json(new)))
    return [
        _difference(path, before.get(path), after.get(path), "rollout" if _takes_new_processes(old, new, path) else "live")
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def _difference(path: _Path, old: Any, new: Any, how: str) -> Difference:
    change = "added" if old in _NOT_SET else "removed" if new in _NOT_SET else "changed"
    return Difference(key=".".join(path), change=change, how=how, old=_harmless(path, old), new=_harmless(path, new))


def _leaves(value: Mapping[str, Any], prefix: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, (*prefix, key))
        else:
            yield (*prefix, key), item


def _takes_new_processes(old: FleetSpec, new: FleetSpec, path: _Path) -> bool:
    """Whether this alone would leave running processes outdated."""
    name, rest = path[0], path[1:]
    mine, theirs = getattr(old, name), getattr(new, name)
    if rest and dataclasses.is_dataclass(mine) and not isinstance(mine, type):
        theirs = dataclasses.replace(mine, **{rest[0]: getattr(theirs, rest[0])})
    one: dict[str, Any] = {name: theirs}
    return replace(old, **one).process_hash != old.process_hash


def _harmless(path: _Path, value: Any) -> Any:
    if value is not None and path[0] == "environment":
        return HIDDEN_VALUE
    return _USER_AND_PASSWORD.sub(f"{HIDDEN_VALUE}@", value) if isinstance(value, str) else value
