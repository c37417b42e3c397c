"""`sinks.toml` of the state directory: which events go where. All mistakes are told at once, each with its sink."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from fleetctl.errors import ConfigError

FILE_NAME = "sinks.toml"
_REFERENCE = re.compile(r"(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)", re.DOTALL)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
# What each kind of sink takes besides name, type, kinds and fleets, and what of it has to be there.
_KEYS: Mapping[str, Mapping[str, bool]] = {
    "file": {"path": True},
    "webhook": {"url": True, "secret": False, "timeout_seconds": False},
    "redis": {"url": True, "stream": False, "max_length": False, "timeout_seconds": False},
}
_COMMON = ("name", "type", "kinds", "fleets")


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkSettings:
    """One `[[sink]]`. `kinds`, `fleets`: patterns like "agent.*"; empty: all. `secret`, and `url` of redis: may say where the value is."""

    name: str
    type: str
    path: str = ""
    url: str = ""
    secret: str = ""
    stream: str = "fleetctl:events"
    max_length: int = 100_000
    timeout_seconds: float = 10.0
    kinds: tuple[str, ...] = ()
    fleets: tuple[str, ...] = ()

    def wants(self, event: Mapping[str, Any]) -> bool:  # Any: JSON values
        return _matches(self.kinds, event.get("kind")) and (event.get("fleet") is None or _matches(self.fleets, event.get("fleet")))

    @property
    def target(self) -> str:
        """Where its events go, for people: without user and password."""
        if self.type == "file":
            return self.path
        if _REFERENCE.fullmatch(self.url):
            return self.url
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        shown = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}{parts.path}"
        return f"{shown} {self.stream}" if self.type == "redis" else shown


def _matches(patterns: Sequence[str], value: object) -> bool:
    return not patterns or any(fnmatchcase(str(value), pattern) for pattern in patterns)


def read(path: str) -> list[SinkSettings]:
    """The sinks of the file; none where there is no file. ConfigError lists everything that is wrong."""
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return _checked(document, path)


def _checked(document: Mapping[str, Any], path: str) -> list[SinkSettings]:
    tables = document.get("sink")
    problems = [f"{key}: there is only [[sink]]" for key in document if key != "sink"]
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: " + "; ".join([*problems, "each sink is a table, [[sink]]"]))
    sinks: list[SinkSettings] = []
    for number, table in enumerate(tables, 1):
        name = table.get("name", table.get("type", ""))
        found = list(_problems({**table, "name": name}))
        if not found and name in [sink.name for sink in sinks]:
            found = [f"another sink has the name {name}; give each a name of its own"]
        problems += [f"sink {number} ({name}): {problem}" for problem in found]
        if not found:
            lists = {key: tuple(table[key]) for key in ("kinds", "fleets") if key in table}
            sinks.append(SinkSettings(**{**table, "name": name, **lists}))
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems in {path}:", *problems]))
    return sinks


def _problems(table: Mapping[str, Any]) -> list[str]:
    kind = table.get("type")
    if kind not in _KEYS:
        return [f"type = {kind!r}: there are {', '.join(_KEYS)}"]
    keys = _KEYS[str(kind)]
    found = [f"{key}: no such setting; there are {', '.join([*_COMMON, *keys])}" for key in table if key not in (*_COMMON, *keys)]
    found += [f"{key} is missing" for key, needed in keys.items() if needed and not table.get(key)]
    for key, value in table.items():
        if key in ("kinds", "fleets"):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                found.append(f'{key}: must be a list of patterns, like ["agent.*"]')
        elif key == "max_length":
            if type(value) is not int or not 1 <= value <= 1 << 40:
                found.append(f"{key} = {value!r}: must be a whole number above 0")
        elif key == "timeout_seconds":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 600:
                found.append(f"{key} = {value!r}: must be a number above 0, at most 600")
        elif key in (*_COMMON, *keys) and not isinstance(value, str):
            found.append(f"{key}: must be text in quotes")
    if not found:
        found += _meanings(table)
    return found


def _meanings(table: Mapping[str, Any]) -> list[str]:
    """What is wrong with values whose types are right."""
    found = []
    if not _NAME.fullmatch(table["name"]):
        found.append("name: lower-case letters, digits and dashes, at most 40")
    if (secret := table.get("secret")) is not None and not _REFERENCE.fullmatch(secret):
        found.append('secret: must say where it is, "env:NAME" or "file:PATH"; the secret itself does not belong here')
    if path := table.get("path"):
        found += [] if path.startswith("/") else ["path: must be absolute"]
    if url := table.get("url"):
        schemes = ("redis", "rediss", "unix") if table["type"] == "redis" else ("http", "https")
        try:
            scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
            sound = scheme == "unix" or bool(host and urlsplit(url).port != 0)
        except ValueError:
            scheme, sound = "", False
        if not (table["type"] == "redis" and _REFERENCE.fullmatch(url)) and not (scheme in schemes and sound):
            found.append(f"url: must begin with {' or '.join(f'{known}://' for known in schemes)} and name a host")
    return found
