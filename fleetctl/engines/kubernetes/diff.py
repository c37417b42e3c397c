"""What an apply changes, in words: an object as it is beside the same object as the server says it would be. Pure."""

import re
from collections.abc import Iterator, Mapping

from fleetctl.engines.kubernetes.names import Object

# What the server writes itself.
_ITS_OWN = re.compile(
    r"^(status\b|metadata\.(managedFields|resourceVersion|generation|uid|creationTimestamp|selfLink)\b|"
    r"metadata\.annotations\.deployment\.kubernetes\.io)"
)
_VALUE = re.compile(r"\.env\[[^]]*\]\.value$")
_LONGEST = 60


def differences(old: Object | None, new: Object, *, but: str = "") -> list[str]:
    """One line for each field that changes, but this one; values of environment variables are not shown."""
    what = f"{new['kind'].lower()} {new['metadata']['name']}"
    if old is None:
        return [f"create {what}"]
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [path for path in {**before, **after} if path != but and not _ITS_OWN.match(path) and before.get(path) != after.get(path)]
    return [f"change {what}: {path}: {_shown(path, before.get(path))} -> {_shown(path, after.get(path))}" for path in changed]


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values; an item of a list goes by its name, where it has one."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            name = item.get("name", number) if isinstance(item, Mapping) else number
            yield from _leaves(item, f"{path}[{name}]")
    else:
        yield path, value


def _shown(path: str, value: object) -> str:
    if value is None:
        return "nothing"
    if _VALUE.search(path):
        return "***"
    text = str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
