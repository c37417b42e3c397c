"""The settings as people meet them: a list, a JSON Schema and a commented first file, all read from the model.

Says what each setting allows; `config` says what is wrong with a given value. Imports pydantic only for the schema.
"""

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from fleetctl.errors import ConfigError
from fleetctl.models import NAME_PATTERN, FleetSpec, Setting

ENVIRONMENT_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
RESERVED_PREFIX = "FLEETCTL_"
SECRET_REFERENCE = r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$"

# What the patterns and the types of these settings mean, in words.
_ALLOWED = {
    "autoscaling.metrics": "tables, [fleet.autoscaling.metrics.NAME]",
    "autoscaling.schedules": "tables, [[fleet.autoscaling.schedules]], with cron and duration_seconds",
    "name": "1 to 40 lower-case letters, digits and dashes, with no dash at either end",
    "command": 'a list of the program and its arguments, like ["python3", "worker.py"]',
    "stop_signal": "the name of a signal, like TERM or INT",
    "graceful_drain.drain_signal": "the name of a signal, like TERM or INT",
    "graceful_drain.checkpoint_signal": "the name of a signal, like TERM or INT",
    "kubernetes.image": 'the name of an image, like "registry.example.com/team/worker:1.0"',
    "kubernetes.namespace": "1 to 63 lower-case letters, digits and dashes, with no dash at either end",
    "kubernetes.working_directory": "an absolute path",
    "kubernetes.storage_size": 'a number and Mi, Gi or Ti, like "10Gi"',
    **{
        f"kubernetes.{key}": "lower-case letters, digits, dashes and dots"
        for key in ("service_account", "image_pull_secret", "secret", "storage_class")
    },
    "environment": 'a table of NAME = "value"',
    "tools": 'a list of names, like ["search", "edit"]',
    "secret_env": 'a table of NAME = "env:OTHER_NAME" or NAME = "file:PATH"',
}
_EXAMPLES = {
    "env_file": ".env",
    "environment": {"GREETING": "hello"},
    "secret_env": {"API_KEY": "env:API_KEY"},
    "tools": ["search", "edit"],
    "port_base": 8000,
    "sockets": {"http": "127.0.0.1:8080"},
    "watchdog_seconds": 30.0,
    "stuck_after_seconds": 600.0,
    "autoscaling.schedules": [],
    "autoscaling.metrics": {"backlog": {"file": "backlog.txt", "target": 10}},
    "resource_limits.cpu_limit": 1.0,
    "budget.tokens": 1000000,
    "budget.cost_usd": 20.0,
    "resource_limits.memory_limit_mb": 512.0,
    "resource_limits.pids_limit": 200,
    "resource_limits.nofile": 1024,
    "resource_limits.nice": 10,
    "autoscaling.target_memory_utilization": 80.0,
    "autoscaling.target_pending": 10.0,
    "autoscaling.scale_down_rates": ["1 per 60 s"],
    "autoscaling.idle_seconds": 600.0,
    "readiness.http": "http://127.0.0.1:8080/healthz",
    "readiness.tcp": "127.0.0.1:8080",
    "readiness.exec": ["./check-ready"],
    "liveness.http": "http://127.0.0.1:8080/healthz",
    "liveness.tcp": "127.0.0.1:8080",
    "liveness.exec": ["./check-alive"],
    "graceful_drain.drain_signal": "USR2",
    "graceful_drain.checkpoint_signal": "USR1",
    "kubernetes.image": "registry.example.com/team/worker:1.0",
    "kubernetes.context": "production",
    "kubernetes.namespace": "agents",
    "kubernetes.service_account": "worker",
    "kubernetes.image_pull_secret": "registry",
    "kubernetes.secret": "worker-secrets",
    "kubernetes.working_directory": "/srv",
    "kubernetes.user": 65532,
    "kubernetes.cpu_request": 0.25,
    "kubernetes.memory_request_mb": 256.0,
    "kubernetes.storage_size": "10Gi",
    "kubernetes.storage_class": "standard",
    "checkpoints.command": ["./save-state"],
    "checkpoints.restore_command": ["./worker", "--resume", "{token}"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingInfo:
    """One setting of `fleet.toml`. `key`: its path below `[fleet]`; `default` is a JSON value; `bounds`: what is allowed, in words."""

    key: str
    type: str
    required: bool
    default: Any  # Any: a JSON value
    doc: str
    bounds: str
    supported: bool


def settings() -> list[SettingInfo]:
    """Every setting, sections flattened (`logs.keep`), in the model's order."""
    return list(_by_key().values())


def setting(key: str) -> SettingInfo | None:
    return _by_key().get(key)


def is_default(key: str, value: Any) -> bool:  # Any: a JSON value
    """Whether a setting has the value that it has where nobody says anything; nothing at all is none, {} and []."""
    info = _by_key().get(key)
    return info is not None and not info.required and _nothing_as_none(value) == _nothing_as_none(info.default)


def _nothing_as_none(value: Any) -> Any:  # Any: a JSON value
    return None if value == {} or value == [] else value


@cache
def sections() -> Mapping[str, str]:
    """The tables below `[fleet]`, each with what it is about."""
    return {name: _about(hint) for name, hint in typing.get_type_hints(FleetSpec).items() if dataclasses.is_dataclass(hint)}


def keys_of(section: str = "") -> list[str]:
    """What may be written in `[fleet]`, or in one of its tables."""
    if not section:
        return [*(key for key in _by_key() if "." not in key), *sections()]
    return [key.partition(".")[2] for key in _by_key() if key.startswith(section + ".")]


@cache
def _by_key() -> Mapping[str, SettingInfo]:
    return {info.key: info for info in _infos(FleetSpec, "")}


def _infos(model: Any, prefix: str) -> typing.Iterator[SettingInfo]:  # Any: a dataclass of the model
    hints = typing.get_type_hints(model, include_extras=True)
    for field in dataclasses.fields(model):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from _infos(hint, key + ".")
            continue
        kind, about = typing.get_args(hint)
        default, required = _default(field)
        yield SettingInfo(
            key=key,
            type=_type_text(kind),
            required=required,
            default=default,
            doc=about.doc,
            bounds=_ALLOWED.get(key) or _bounds(kind, about),
            supported=about.supported,
        )


def _default(field: "dataclasses.Field[Any]") -> tuple[Any, bool]:
    if field.default is not dataclasses.MISSING:
        default = field.default
        return (str(default) if isinstance(default, StrEnum) else list(default) if isinstance(default, tuple) else default), False
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory(), False
    return None, True


def _type_text(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return _type_text(next(arm for arm in typing.get_args(kind) if arm is not types.NoneType))
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "text"
    names: dict[object, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", tuple: "list of text"}
    return names.get(typing.get_origin(kind) or kind, "table of text")


def _bounds(kind: Any, about: Setting) -> str:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "one of " + ", ".join(f'"{choice}"' for choice in kind)
    text = _type_text(kind)
    if text not in ("whole number", "number"):
        return "text in quotes, not empty" if text == "text" else text
    if about.ge is not None and about.le is not None:
        return f"a {text} from {_number(about.ge)} to {_number(about.le)}"
    low = "" if about.ge is None else f", {_number(about.ge)} or more"
    low = low if about.gt is None else f" above {_number(about.gt)}"
    return f"a {text}{low}" + ("" if about.le is None else f", at most {_number(about.le)}")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _about(model: Any) -> str:
    """`[fleet.logs]`: rotation of the output.  ->  rotation of the output"""
    return str(model.__doc__).partition("\n")[0].partition(": ")[2].rstrip(".")


def schema() -> dict[str, Any]:
    """The JSON Schema of `fleet.toml` as people write it. A setting that is not supported yet is not in it."""
    from pydantic import TypeAdapter  # here, because the rest of this module does without

    fleet = TypeAdapter(FleetSpec).json_schema(ref_template="#/$defs/{model}")
    definitions = fleet.pop("$defs")
    tables = {name: fleet["properties"].pop(name) for name in sections()}
    for name, table in tables.items():
        _drop_unsupported(definitions[_definition(table)], name + ".")
    _drop_unsupported(fleet, "")
    kept = {name: _definition(table) for name, table in tables.items() if definitions[_definition(table)]["properties"]}
    inner = {"MetricSpec", "ScheduleSpec"}  # tables in a table, of which there may be many
    definitions = {key: value for key, value in definitions.items() if "properties" not in value or key in {*kept.values(), *inner}}
    references = {name: {"$ref": f"#/$defs/{definition}", "description": sections()[name]} for name, definition in kept.items()}
    fleet["properties"] |= references | _written_forms(fleet["properties"])
    argv = fleet["properties"]["command"]
    fleet["properties"]["command"] = {"type": ["array", "string"], "description": argv["description"]}
    fleet |= _command_form(argv)
    one = {"$ref": "#/$defs/FleetSpec"}
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fleet.toml",
        "type": "object",
        "properties": {"fleet": {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}, **references},
        "required": ["fleet"],
        "additionalProperties": False,
        # A table of settings at the top belongs to the one fleet; with several it could mean any of them.
        "dependentSchemas": {name: {"properties": {"fleet": {"type": "object", "properties": {name: False}}}} for name in references},
        "$defs": {"FleetSpec": fleet, **definitions},
    }
    return typing.cast(dict[str, Any], _without_titles(document))  # a dict goes in


def _definition(reference: Mapping[str, Any]) -> str:
    plain = reference if "$ref" in reference else reference["allOf"][0]  # pydantic before 2.9 wraps a reference that has a default
    return str(plain["$ref"]).rpartition("/")[2]


def _drop_unsupported(table: dict[str, Any], prefix: str) -> None:
    table["properties"] = {name: value for name, value in table["properties"].items() if _by_key()[prefix + name].supported}


def _written_forms(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Rules that the model's types do not carry, and what TOML cannot say (null)."""
    names = {"propertyNames": {"pattern": ENVIRONMENT_NAME, "not": {"pattern": "^" + RESERVED_PREFIX}}}
    return {
        "env_file": {"type": "string", "minLength": 1, "description": properties["env_file"]["description"]},
        "environment": {**properties["environment"], **names, "default": {}},
        "secret_env": {
            **properties["secret_env"],
            **names,
            "additionalProperties": {"type": "string", "pattern": SECRET_REFERENCE},
            "default": {},
        },
    }


def _command_form(argv: Mapping[str, Any]) -> dict[str, Any]:
    """A list, or with `shell = true` one string."""
    string = {"type": "string", "minLength": 1}
    return {
        "if": {"properties": {"shell": {"const": True}}, "required": ["shell"]},
        "then": {"properties": {"command": {"anyOf": [string, {**argv, "maxItems": 1}]}}},
        "else": {"properties": {"command": argv}},
    }


def _without_titles(value: Any) -> Any:
    """The same without the titles that pydantic makes up from the names."""
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_titles(item) for key, item in value.items() if not (key == "title" and item != "fleet.toml")}
    return _without_null(kept)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a setting that may be absent is left out."""
    arms = schema.get("anyOf", ())
    if {"type": "null"} not in arms:
        return schema
    (other,) = [arm for arm in arms if arm != {"type": "null"}]
    return {**{key: item for key, item in schema.items() if key not in ("anyOf", "default")}, **other}


def starter(name: str) -> str:
    """A first `fleet.toml`: it runs the bundled demo agent, and shows every other setting as a comment with its default."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"{_toml(name)} is not a fleet's name: {_ALLOWED['name']}")
    lines = [
        "# What fleetctl keeps running. `fleetctl config check` reads this file, `fleetctl up` makes it so.",
        "# Lines that begin with #key are settings at their default; take off the # to change them.",
        "",
        "[fleet]",
        f"name = {_toml(name)}",
        "# Program and arguments. This is the bundled demo agent: put your own program here.",
        f"command = {_toml([sys.executable, '-m', 'fleetctl.demo'])}",
        "# Agents to keep running",
        "replicas = 3",
    ]
    for info in settings():
        if info.supported and "." not in info.key and info.key not in ("name", "command", "replicas"):
            lines += _commented(info)
    for section, about in sections().items():
        inner = [info for info in settings() if info.supported and info.key.startswith(section + ".")]
        if inner:
            lines += ["", f"# {about[:1].upper()}{about[1:]}", f"[fleet.{section}]"]
        for info in inner:
            lines += _commented(info)
    return "\n".join(lines) + "\n"


def _commented(info: SettingInfo) -> list[str]:
    value = info.default or _EXAMPLES.get(info.key, info.default)
    bounds = f" ({info.bounds})" if info.type in ("whole number", "number") or info.bounds.startswith("one of") else ""
    return [f"# {info.doc}{bounds}", f"#{info.key.rpartition('.')[2]} = {_toml(value)}"]


def _toml(value: Any) -> str:  # Any: a JSON value without null
    """`value` as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
