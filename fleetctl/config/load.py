"""A file, a command line or a client's JSON -> FleetSpec, with the environment and the flags laid over it.

Every value knows its source, and all problems of a file are told at once, each with its line. `checks` says what is wrong.
"""

import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleetctl.config.checks import HIDDEN, MOST_PROBLEMS, NOWHERE, Problem, check, dotted, find, plain, shown, unknown
from fleetctl.config.settings import RESERVED_PREFIX, sections, setting, settings
from fleetctl.config.toml_lines import KeyPath, key_lines
from fleetctl.errors import ConfigError
from fleetctl.models import AgentConfig, FleetSpec, to_json

FILE_NAME = "fleet.toml"
# Only these: an agent has other FLEETCTL_* variables, and `fleetctl` may be called by an agent.
ENVIRONMENT_SETTINGS = ("name", "engine", "replicas", "min_replicas", "max_replicas", "stop_signal", "cwd")

# Where they are shorter than the setting.
_FLAGS = {
    "min_replicas": "--min",
    "max_replicas": "--max",
    "warm_pool.size": "--warm",
    "autoscaling.enabled": "--min and --max",
    "readiness.http": "--http",
    "readiness.tcp": "--tcp",
    "kubernetes.image": "--image",
    "kubernetes.context": "--context",
    "kubernetes.namespace": "--namespace",
}
_LONGEST_FILE = 1 << 20
# Settings of a fleet that a Python program says elsewhere.
_NOT_IN_CONFIG = {
    "name": ": is given beside the configuration, FleetManager(config=..., name=...)",
    "replicas": ": is what scale_up and scale_down are told",
    "shell": ': write the command of an AgentConfig as ["/bin/sh", "-c", "..."]',
    **dict.fromkeys(
        ("command", "cwd", "environment", "tools", "resource_limits", "trust_level"), ": is of an agent, so it belongs in its AgentConfig"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A fleet's spec and, for each setting, where its value came from: "fleet.toml line 7", "--replicas", "default" ..."""

    spec: FleetSpec
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    name: str
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """Of `path`, or of the nearest table around it."""
        return next((self.lines[path[:size]] for size in range(len(path), 0, -1) if path[:size] in self.lines), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """One fleet's settings as given. `given_by`: flags and variables; `lifted`: sections written outside the fleet's table."""

    values: dict[str, Any]  # Any: JSON values, not checked yet
    given_by: Mapping[str, str] = field(default_factory=dict)
    document: _Document | None = None
    prefix: KeyPath = ()
    lifted: frozenset[str] = frozenset()

    def by_hand(self, path: KeyPath) -> str | None:
        return next((self.given_by[key] for size in (1, 2) if (key := dotted(path[:size])) in self.given_by), None)

    def written_at(self, path: KeyPath) -> KeyPath:
        return path if path and path[0] in self.lifted else self.prefix + path

    def source(self, key: str) -> str:
        path = tuple(key.split("."))
        if by_hand := self.by_hand(path):
            return by_hand
        if self.document is None or find(self.values, path) is NOWHERE:
            return "default"
        return f"{self.document.name} line {self.document.line(self.written_at(path))}"

    def say(self, problem: Problem) -> tuple[int, str]:
        """The problem's line, and its sentence."""
        value = find(self.values, problem.path)
        is_shown = problem.show and value is not NOWHERE and problem.path and problem.path[0] not in HIDDEN
        text = shown(value) if is_shown else ""
        if by_hand := self.by_hand(problem.path):
            joint = "=" if by_hand.startswith(RESERVED_PREFIX) else " "
            return 0, by_hand + (joint + text if text else "") + problem.text
        path = self.written_at(problem.path)
        sentence = dotted(path) + (f" = {text}" if text else "") + problem.text
        if self.document is None:
            return 0, sentence if path else f"the spec{problem.text}"
        line = self.document.line(path)
        return line, f"{self.document.name}:{line}: {sentence}"


def find_file(given: str | None, start: Path) -> Path | None:
    """The file that was given, else the fleet.toml in `start`, if any. ConfigError where the given one is missing."""
    if given is None:
        path = start / FILE_NAME
        return path if os.path.lexists(path) else None
    path = start / os.path.expanduser(given)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file's name"
        raise ConfigError(f"{plain(given)}: {reason}", hint="`fleetctl config init` writes a first fleet.toml") from error
    return path


def load_file(path: Path, overrides: Mapping[str, object] | None = None) -> list[Loaded]:
    """The fleets of a file, with environment and flags laid over each of them. ConfigError lists every problem there is."""
    name = _short_name(path)
    tree, document = _parse(_read(path, name), name)
    given = _given(overrides)
    drafts, said = _drafts(tree, document)
    if len(drafts) > 1 and "name" in given:
        said.append((0, f"{given['name'][1]} names one fleet, and {name} has {len(drafts)}"))
        del given["name"]
    folder = str(path.parent if path.is_absolute() else _here() / path.parent)
    loaded: list[Loaded] = []
    names: set[str] = set()
    for draft in drafts:
        ready = _overlaid(_rooted(draft, folder), given)
        spec, problems = check(ready.values)
        said += [ready.say(problem) for problem in problems]
        own_name = ready.values.get("name")
        if isinstance(own_name, str):
            said += [ready.say(Problem(("name",), ": another fleet of this file has this name"))] if own_name in names else []
            names.add(own_name)
        if spec is not None:
            loaded.append(Loaded(spec=spec, sources=_sources(ready)))
    _raise_if(said, name)
    return loaded


def load_command(command: Sequence[str], cwd: Path, overrides: Mapping[str, object] | None = None) -> Loaded:
    """A fleet of one command line; its name is taken from the program where no other is given."""
    values = {"name": _name_from(command), "command": list(command), "cwd": str(cwd)}
    return _load_values(values, {"name": "command line", "command": "command line"}, overrides)


def load_library(
    given: Mapping[str, Any], template: AgentConfig | None, *, name: str, cwd: Path, stored: Mapping[str, Any] | None = None
) -> FleetSpec:
    """The fleet of a Python program: settings as a nested dictionary, and the template of its agents. ConfigError lists every problem.

    `stored`: the fleet as an earlier program left it, of which the size and, without a template, the agents are kept. `cwd`: where
    agents run whose template does not say, and what relative paths are relative to.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"config: must be a dictionary of settings, not {type(given).__name__}")
    if template is not None and not isinstance(template, AgentConfig):
        raise ConfigError(f"config_template: must be an AgentConfig, not {type(template).__name__}")
    agents = _kept_agents(stored) if stored is not None and template is None else _templated(template or AgentConfig())
    if template is None and stored is None and find(given, ("autoscaling", "target_memory_utilization")) not in (NOWHERE, None):
        agents["resource_limits"] = {"memory_limit_mb": 1}  # which ones is not to be asked before there is a template
    if template is None and find(given, ("sandbox",)) is not NOWHERE:
        agents["trust_level"] = "untrusted"  # whose sandbox it is, is for the template to say
    pool = given.get("warm_pool")
    values = {
        **{key: value for key, value in given.items() if key not in _NOT_IN_CONFIG},
        "warm_pool": {"enabled": True, **pool} if isinstance(pool, Mapping) else {"enabled": True} if pool is None else pool,
        **agents,
        "name": name,
        "replicas": _kept_replicas(given, stored),
    }
    values = _rooted(_Draft(values=values), str(cwd)).values
    spec, problems = check(values, refuse_unsupported_defaults=False)
    settings_draft, template_draft = _Draft(values=values), _Draft(values=values, prefix=("config_template",))
    said = [settings_draft.say(Problem((key,), _NOT_IN_CONFIG[key], show=False)) for key in given if key in _NOT_IN_CONFIG]
    said += [(template_draft if problem.path[:1] and problem.path[0] in agents else settings_draft).say(problem) for problem in problems]
    _raise_if(said, "the configuration")
    assert spec is not None  # no problems, so there is one
    return spec


def load_demo(overrides: Mapping[str, object] | None = None) -> Loaded:
    """The bundled demo agent, which says when it is ready."""
    values = {"name": "demo", "command": [sys.executable, "-m", "fleetctl.demo"], "cwd": str(_here()), "readiness": {"notify": True}}
    return _load_values(values, {}, overrides)


def spec_from_json(data: Mapping[str, Any]) -> FleetSpec:
    """The spec that `spec_to_json` wrote, or that a client sent. ConfigError for anything else, whatever it is."""
    if not isinstance(data, Mapping):
        raise ConfigError("the spec must be a JSON object")
    draft = _Draft(values=dict(data))
    spec, problems = check(draft.values, refuse_unsupported_defaults=False)
    _raise_if([draft.say(problem) for problem in problems], "the spec")
    assert spec is not None  # no problems, so there is one
    return spec


def spec_to_json(spec: FleetSpec) -> dict[str, Any]:
    """All settings as JSON values, environment values included: for the control socket and the state directory only."""
    return dict(to_json(spec))


def _templated(template: AgentConfig) -> dict[str, Any]:
    command = template.command
    values: dict[str, Any] = {
        "command": [sys.executable, "-m", "fleetctl.demo"] if command is None else command,
        "cwd": "." if template.cwd is None else template.cwd,
        "environment": template.environment,
        "tools": template.tools,
        "resource_limits": template.resource_limits,
        "trust_level": template.trust_level,
    }
    return values


def _kept_agents(stored: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("command", "shell", "cwd", "environment", "tools", "resource_limits", "trust_level")
    return {key: stored[key] for key in keys if key in stored}


def _kept_replicas(given: Mapping[str, Any], stored: Mapping[str, Any] | None) -> int:
    """As many as there were, within the bounds that are given now."""
    kept = stored.get("replicas") if stored is not None else 0
    if not isinstance(kept, int) or kept <= 0:
        return 0
    fewest, most = given.get("min_replicas", 1), given.get("max_replicas", 100)
    return min(max(kept, fewest), most) if isinstance(fewest, int) and isinstance(most, int) else kept


def _short_name(path: Path) -> str:
    """As people know the file: below the current directory without that directory."""
    try:
        return str(path.relative_to(os.getcwd()))
    except (ValueError, OSError):
        return str(path)


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError("the current directory is gone", hint="change to one that exists") from error


def _read(path: Path, name: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > _LONGEST_FILE:
        raise ConfigError(f"{name}: longer than {_LONGEST_FILE} bytes, so surely no {FILE_NAME}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text") from error


def _parse(text: str, name: str) -> tuple[dict[str, Any], _Document]:
    try:
        tree = tomllib.loads(text)
        return tree, _Document(name=name, lines=key_lines(text))
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and a number with thousands of digits
        raise ConfigError(_syntax_error(name, text, str(error))) from error


def _syntax_error(name: str, text: str, message: str) -> str:
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if not found:
        return f"{name}: not valid TOML: {plain(message)}"
    reason, line, column = found.groups()
    if line is None:
        return f"{name}:{len(text.splitlines())}: not valid TOML: {plain(reason)} at the end of the file"
    return f"{name}:{line}:{column}: not valid TOML: {plain(reason)}"


def _drafts(tree: dict[str, Any], document: _Document) -> tuple[list[_Draft], list[tuple[int, str]]]:
    """The fleets of the document, and what is wrong around them."""
    around = _Draft(values=tree, document=document)
    fleets = tree.get("fleet")
    several = isinstance(fleets, list)
    problems = [unknown(key, ["fleet", *sections()], tree) for key in tree if key != "fleet" and key not in sections()]
    lifted = {key: value for key, value in tree.items() if key in sections()}
    drafts = []
    if isinstance(fleets, dict):
        twice = [key for key in lifted if key in fleets]
        problems += [Problem((key,), f" is also written as [fleet.{key}]; keep one of them", show=False) for key in twice]
        drafts.append(_Draft(values=lifted | fleets, document=document, prefix=("fleet",), lifted=frozenset(lifted) - frozenset(twice)))
    elif several and fleets:
        problems += [
            Problem((key,), f": with several fleets, write [fleet.{key}] below the [[fleet]] it is for", show=False) for key in lifted
        ]
        for index, fleet in enumerate(fleets):
            if isinstance(fleet, dict):
                drafts.append(_Draft(values=fleet, document=document, prefix=("fleet", index)))
            else:
                problems.append(Problem(("fleet", index), ": must be a table"))
    elif fleets is not None:
        problems.append(Problem(("fleet",), ": must be a table, [fleet], or several, [[fleet]]"))
    elif not problems:
        raise ConfigError(f"{document.name} has no [fleet] table", hint="`fleetctl config init` writes a first fleet.toml")
    return drafts, [around.say(problem) for problem in problems]


def _rooted(draft: _Draft, folder: str) -> _Draft:
    """With paths made absolute: those in a file are relative to the file's folder."""
    values = {"cwd": ".", **draft.values}
    for key in ("cwd", "env_file"):
        values[key] = _absolute(values.get(key), folder)
    references = values.get("secret_env")
    if isinstance(references, dict):
        values["secret_env"] = {name: _absolute_reference(reference, folder) for name, reference in references.items()}
    if isinstance(sockets := values.get("sockets"), dict):
        values["sockets"] = {name: _absolute_reference(address, folder, "unix:") for name, address in sockets.items()}
    if isinstance(sandbox := values.get("sandbox"), dict):
        values["sandbox"] = {
            key: [_absolute(path, folder) for path in value] if isinstance(value, list | tuple) else value for key, value in sandbox.items()
        }
    values = {key: value for key, value in values.items() if value is not None}
    given_by = draft.given_by if "cwd" in draft.values else {**draft.given_by, "cwd": "default"}
    return replace(draft, values=values, given_by=given_by)


def _absolute(value: object, folder: str) -> object:
    """Leaves alone what is no path; that is for the checks to say."""
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    return os.path.normpath(os.path.join(folder, os.path.expanduser(value)))


def _absolute_reference(reference: object, folder: str, kind: str = "file:") -> object:
    if not isinstance(reference, str) or not reference.startswith(kind):
        return reference
    return f"{kind}{_absolute(reference.removeprefix(kind), folder)}"


def _given(overrides: Mapping[str, object] | None) -> dict[str, tuple[object, str]]:
    """Dotted key -> value and who gave it: FLEETCTL_* variables, and flags over them. A flag that is None was not given."""
    given: dict[str, tuple[object, str]] = {}
    for key in ENVIRONMENT_SETTINGS:
        variable = RESERVED_PREFIX + key.upper()
        if text := os.environ.get(variable):
            given[key] = (_from_text(key, text), variable)
    for key, value in (overrides or {}).items():
        if value is not None:
            given[key] = (value, _FLAGS.get(key, "--" + key.replace(".", "-").replace("_", "-")))
    return given


def _from_text(key: str, text: str) -> object:
    about = setting(key)
    is_number = about is not None and about.type == "whole number" and re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip())
    return int(text) if is_number else text


def _overlaid(draft: _Draft, given: Mapping[str, tuple[object, str]]) -> _Draft:
    values, given_by = dict(draft.values), dict(draft.given_by)
    for key, (value, giver) in given.items():
        section, _, leaf = key.rpartition(".")
        given_by[key] = giver
        if not section:
            values[key] = _absolute(value, str(_here())) if key in ("cwd", "env_file") else value
        elif isinstance(table := values.get(section, {}), dict):
            values[section] = {**table, leaf: value}
    return replace(draft, values=values, given_by=given_by)


def _load_values(values: dict[str, Any], given_by: Mapping[str, str], overrides: Mapping[str, object] | None) -> Loaded:
    draft = _overlaid(_Draft(values=values, given_by=given_by), _given(overrides))
    spec, problems = check(draft.values)
    _raise_if([draft.say(problem) for problem in problems], "the command line")
    assert spec is not None  # no problems, so there is one
    return Loaded(spec=spec, sources=_sources(draft))


def _sources(draft: _Draft) -> dict[str, str]:
    return {info.key: draft.source(info.key) for info in settings()}


def _name_from(command: Sequence[str]) -> str:
    """./My_Worker.py -> my-worker"""
    program = os.path.basename(command[0].rstrip("/")) if command else ""
    plain = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\.(py|sh|js|rb|pl)$", "", program.lower()))
    return plain.strip("-")[:40].strip("-") or "fleet"


def _raise_if(said: Sequence[tuple[int, str]], where: str) -> None:
    if not said:
        return
    lines = list(dict.fromkeys(text for _, text in sorted(said, key=lambda item: item[0])))  # a flag's problem is every fleet's
    if len(lines) == 1:
        raise ConfigError(lines[0])
    more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
    raise ConfigError("\n  ".join([f"{len(lines)} problems in {where}:", *lines[:MOST_PROBLEMS], *more]))
