"""Whether given settings make a fleet: types and bounds by pydantic, and what spans several settings. Knows no file and no flag.

Takes any value whatsoever and answers with a spec or with problems, never with an exception.
"""

import difflib
import json
import math
import re
import shlex
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fleetctl import cron, formula
from fleetctl.addresses import filled, is_loopback, parse, parse_url, placeholders
from fleetctl.config.settings import ENVIRONMENT_NAME, RESERVED_PREFIX, SECRET_REFERENCE, keys_of, sections, setting, settings
from fleetctl.config.toml_lines import KeyPath
from fleetctl.models import RATE_PATTERN, FleetSpec

if TYPE_CHECKING:
    from pydantic import TypeAdapter

HIDDEN = ("environment", "secret_env")  # their values are in no message
NOWHERE = object()
MOST_PROBLEMS = 30

_DEFAULTS: Mapping[str, Any] = {info.key: info.default for info in settings()}  # Any: JSON values
_LONGEST_TEXT = 131_071  # bytes; the kernel takes no longer argument or variable
_DEEPEST = 8
# Stands for a value that JSON or the kernel cannot take: pydantic refuses it wherever it is put.
_REFUSED = math.inf
_MOST_SOCKETS = 32
_SOCKET_PORT = re.compile(r"\{port:[^}]*\}")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one key."""

    path: KeyPath
    text: str  # follows the key and the value
    show: bool = True


@cache
def _adapter() -> "TypeAdapter[FleetSpec]":
    from pydantic import TypeAdapter  # takes 60 ms, which find_file and settings need not pay

    return TypeAdapter(FleetSpec)


def check(given: Mapping[str, Any], *, refuse_unsupported_defaults: bool = True) -> tuple[FleetSpec | None, list[Problem]]:
    """The spec, or what is wrong: the first problem of each key, in the order found."""
    found: dict[KeyPath, Problem] = {}
    values = _scrubbed(given, (), found)
    values = _with_autoscaling(_with_warm_pool(_with_shell_string(_with_replicas(values))))
    for rule in _RULES:
        _add(found, rule(values))
    _add(found, _unsupported(values, even_defaults=refuse_unsupported_defaults))
    spec = _validated(values, found)
    for rule in _RULES_OF_SEVERAL:
        _add(found, rule(_without_refused(values, found)))
    return (None, list(found.values())) if found else (spec, [])


def _add(found: dict[KeyPath, Problem], problems: Iterable[Problem]) -> None:
    for problem in problems:
        found.setdefault(problem.path, problem)


def _without_refused(values: dict[str, Any], found: Mapping[KeyPath, Problem]) -> dict[str, Any]:
    """So that a number which is wrong by itself is not compared with others too."""
    return {
        key: {leaf: _REFUSED if (key, leaf) in found else item for leaf, item in value.items()}
        if isinstance(value, dict)
        else (_REFUSED if (key,) in found else value)
        for key, value in values.items()
    }


def _validated(values: dict[str, Any], found: dict[KeyPath, Problem]) -> FleetSpec | None:
    """Types, bounds and keys. JSON in strict mode: lists become tuples and strings enums, while "5" is no number."""
    from pydantic import ValidationError

    try:
        return _adapter().validate_json(json.dumps(values))
    except ValidationError as error:
        # Bounded: a client may send a hundred thousand unknown keys, and a suggestion for each costs time.
        for detail in islice(error.errors(include_url=False, include_input=False), MOST_PROBLEMS):
            problem = _from_pydantic(detail["type"], tuple(detail["loc"]), values)
            # A list whose only item is bad is also "too short": the item says it better.
            if not any(known[: len(problem.path)] == problem.path for known in found):
                found[problem.path] = problem
    return None


def _from_pydantic(kind: str, path: KeyPath, values: Mapping[str, Any]) -> Problem:
    key = dotted(path)
    if kind == "unexpected_keyword_argument":
        table = str(path[0]) if len(path) > 1 else ""
        return unknown(str(path[-1]), keys_of(table), values, table)
    if kind == "missing":
        about = setting(key)
        return Problem(path, f" is missing; it must be {about.bounds}" if about else " is missing")
    if key in sections():
        return Problem(path, ": must be a table")
    if len(path) > 1 and path[0] in ("command", *HIDDEN):
        return Problem(path, ": must be text in quotes")
    about = setting(key)
    return Problem(path, f": must be {about.bounds}" if about else ": is not valid")


def unknown(key: str, candidates: Sequence[str], values: Mapping[str, Any], table: str = "") -> Problem:
    """A key that does not exist, with the one that was probably meant. Its value is not shown: it may be a misspelt secret's."""
    path: KeyPath = (table, key) if table else (key,)
    if homes := _homes(key, table, at_top="fleet" in candidates):
        return Problem(path, f": no such setting here; it belongs in {homes}", show=False)
    near = difflib.get_close_matches(key[:60].lower().replace("-", "_"), candidates, n=1)
    hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join(candidates)
    return Problem(path, f": no such {'table' if isinstance(values.get(key), dict) and not table else 'setting'}; {hint}", show=False)


def _homes(key: str, table: str, *, at_top: bool) -> str:
    """The tables that a key belongs in, where it is known but not here."""
    homes = ["[fleet]"] if (at_top or table) and key in keys_of() else []
    homes += [f"[fleet.{section}]" for section in sections() if section != table and key in keys_of(section)]
    return " or ".join(homes)


def _scrubbed(value: Any, path: KeyPath, found: dict[KeyPath, Problem]) -> Any:  # Any: whatever a client or a file says
    """`value` as JSON that pydantic can read, with what JSON or the kernel cannot take replaced and told."""

    def refuse(text: str) -> float:
        found[path] = Problem(path, text, show=not isinstance(value, str))  # a misspelt table may hold secrets
        return _REFUSED

    if len(path) > _DEEPEST:
        return refuse(": nested too deeply")
    if isinstance(value, str):
        trouble = _text_trouble(value)
        return refuse(trouble) if trouble else str(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return max(-(1 << 62), min(value, 1 << 62))  # beyond every bound, and still a number to every JSON reader
    if isinstance(value, list | tuple):
        return [_scrubbed(item, (*path, index), found) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(item, (*path, str(key)), found) for key, item in _sound_items(value, path, found)}
    return refuse(": must be put in quotes" if hasattr(value, "isoformat") else ": is not a JSON value")


def _sound_items(table: Mapping[Any, Any], path: KeyPath, found: dict[KeyPath, Problem]) -> Iterator[tuple[Any, Any]]:
    for key, item in table.items():
        trouble = _text_trouble(key) if isinstance(key, str) else ": is not a name"
        if trouble:
            found[(*path, str(key))] = Problem((*path, str(key)), trouble, show=False)
        else:
            yield key, item


def _text_trouble(text: str) -> str:
    if "\0" in text:
        return ": holds a NUL character, which no program can be given"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return ": is not UTF-8 text"
    return f": is longer than {_LONGEST_TEXT} bytes" if size > _LONGEST_TEXT else ""


def _with_replicas(values: dict[str, Any]) -> dict[str, Any]:
    """Where only `min_replicas` is given, that many are wanted."""
    fewest = _number_in(values, "min_replicas")
    if "replicas" in values or fewest is None:
        return values
    return {**values, "replicas": max(_DEFAULTS["replicas"], fewest)}


def _with_shell_string(values: dict[str, Any]) -> dict[str, Any]:
    command = values.get("command")
    return {**values, "command": [command]} if values.get("shell") is True and isinstance(command, str) else values


def _with_warm_pool(values: dict[str, Any]) -> dict[str, Any]:
    """Whoever says how the pool shall be wants one."""
    pool = values.get("warm_pool")
    return {**values, "warm_pool": {"enabled": pool.get("size") != 0, **pool}} if isinstance(pool, dict) and pool else values


def _with_autoscaling(values: dict[str, Any]) -> dict[str, Any]:
    """Whoever says how the autoscaler shall be wants it."""
    section = values.get("autoscaling")
    return {**values, "autoscaling": {"enabled": True, **section}} if isinstance(section, dict) and section else values


def _number_in(values: Mapping[str, Any], *path: str) -> Any:  # Any: int or float; None where it is not a number
    value = find(values, path)
    value = _DEFAULTS[".".join(path)] if value is NOWHERE else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _check_replicas(values: Mapping[str, Any]) -> Iterator[Problem]:
    wanted, fewest, most = (_number_in(values, key) for key in ("replicas", "min_replicas", "max_replicas"))
    if fewest is not None and most is not None and fewest > most:
        yield Problem(("min_replicas",), f" is more than max_replicas ({most}); raise max_replicas or lower min_replicas")
    elif wanted is not None and most is not None and wanted > most:
        yield Problem(("replicas",), f" is more than max_replicas ({most}); raise max_replicas or ask for fewer")
    elif wanted is not None and fewest is not None and 0 < wanted < fewest:
        yield Problem(
            ("replicas",), f" is less than min_replicas ({fewest}); lower min_replicas or ask for more (0 keeps the fleet and runs none)"
        )


def _check_pairs(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Two settings of one section, of which the second may not be below the first."""
    for section, low, high in (("restart", "backoff_seconds", "backoff_cap_seconds"), ("logs", "max_bytes", "total_bytes")):
        least, most = _number_in(values, section, low), _number_in(values, section, high)
        if least is not None and most is not None and least > most:
            given = high if find(values, (section, high)) is not NOWHERE else low
            other = low if given == high else high
            relation = "less" if given == high else "more"
            yield Problem((section, given), f" is {relation} than {other} ({shown(least if given == high else most)})")


def _check_autoscaling(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What cannot be done together. Numbers that are wrong by themselves are told by their bounds."""
    section = values.get("autoscaling")
    if not isinstance(section, dict):
        return
    for key in ("scale_up_rates", "scale_down_rates"):
        for index, rate in enumerate(section[key] if isinstance(section.get(key), list) else []):
            if isinstance(rate, str) and not ((found := re.fullmatch(RATE_PATTERN, rate)) and 0 < float(found[3]) <= 86400):
                yield Problem(("autoscaling", key, index), ': must be like "4 per 15 s" or "100% per 15 s"')
    memory = section.get("target_memory_utilization")
    if memory is not None and find(values, ("resource_limits", "memory_limit_mb")) in (NOWHERE, None):
        yield Problem(("autoscaling", "target_memory_utilization"), ": needs resource_limits.memory_limit_mb, of which it is a part")
    metrics = section.get("metrics")
    own = any(isinstance(one, dict) and one.get("target") is not None for one in (metrics if isinstance(metrics, dict) else {}).values())
    if section.get("use_cpu") is False and memory is None and section.get("target_pending") is None and not own:
        yield Problem(("autoscaling", "use_cpu"), ": nothing else is measured; give another target, or leave it out")


_METRIC_NAME = r"[a-z_][a-z0-9_]{0,39}"
_MEASURED = ("cpu", "memory", "occupancy", "pending", "replicas")
_SOURCES = ("command", "file", "http", "redis", "python", "agents", "formula")
_REDIS_WORDS = r"(LLEN|XLEN|SCARD|ZCARD|HLEN|STRLEN|GET) [!-~]{1,200}"


def _check_metrics(values: Mapping[str, Any]) -> Iterator[Problem]:
    """The user's own metrics: one source each, nobody asked but who may be, and formulas that can be computed."""
    metrics = find(values, ("autoscaling", "metrics"))
    if not isinstance(metrics, dict):
        return
    for name, metric in metrics.items():
        where: KeyPath = ("autoscaling", "metrics", name)
        if not re.fullmatch(_METRIC_NAME, name):
            yield Problem(where, ": is no name for a metric; lower-case letters, digits and _ make one", show=False)
        elif name in _MEASURED:
            yield Problem(where, ": this name stands for what fleetctl measures itself; take another", show=False)
        elif isinstance(metric, dict):
            yield from _check_metric(where, metric, metrics)


def _check_metric(where: KeyPath, metric: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[Problem]:
    given = [source for source in _SOURCES if metric.get(source) not in (None, [], ())]
    if len(given) != 1:
        said = f"has {' and '.join(given)}" if given else "has no source"
        yield Problem(where, f": {said}; give exactly one of {', '.join(_SOURCES)}", show=False)
        return
    (source,) = given
    value = metric[source]
    if not isinstance(value, str):
        return
    if source == "formula":
        yield from _check_formula((*where, source), value, metrics)
    elif source == "http":
        yield from _check_endpoint((*where, source), value, metric.get("allow_hosts"))
    elif source == "redis" and not re.fullmatch(_REDIS_WORDS, value):
        yield Problem((*where, source), ": must be LLEN, XLEN, SCARD, ZCARD, HLEN, STRLEN or GET and a key")
    elif source == "python" and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value, re.ASCII):
        yield Problem((*where, source), ': must be like "package.module:function"')
    url = metric.get("redis_url")
    if source == "redis" and isinstance(url, str) and not re.fullmatch(r"(redis://|unix:/|env:|file:).+", url):
        yield Problem((*where, "redis_url"), ': must be redis://HOST:PORT/DB, unix:/path, or "env:NAME" or "file:PATH" of that', show=False)


def _check_formula(where: KeyPath, text: str, metrics: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        names = formula.parse(text).names
    except ValueError as error:
        yield Problem(where, f": {error}")
        return
    known = {*_MEASURED, *(name for name, one in metrics.items() if isinstance(one, dict) and one.get("formula") is None)}
    if unknown_names := sorted(names - known):
        yield Problem(where, f": no metric {unknown_names[0]}; there are {', '.join(sorted(known))}")


def _check_endpoint(where: KeyPath, url: str, allowed: object) -> Iterator[Problem]:
    try:
        host = parse_url(url).address.host
        if host and not is_loopback(host) and host not in (allowed if isinstance(allowed, list) else ()):
            yield Problem(where, f': asks another machine; if that is meant, say so: allow_hosts = ["{host}"]')
    except ValueError as error:
        yield Problem(where, f": {error}")


def _check_schedules(values: Mapping[str, Any]) -> Iterator[Problem]:
    schedules = find(values, ("autoscaling", "schedules"))
    for index, one in enumerate(schedules if isinstance(schedules, list) else []):
        if not isinstance(one, dict):
            continue
        where: KeyPath = ("autoscaling", "schedules", index)
        text, zone = one.get("cron"), one.get("timezone")
        try:
            if isinstance(text, str):
                cron.parse(text)
        except ValueError as error:
            yield Problem((*where, "cron"), f": {error}")
        try:
            if isinstance(zone, str):
                ZoneInfo(zone)
        except (ValueError, OSError, ZoneInfoNotFoundError):
            yield Problem((*where, "timezone"), ': no such time zone here; write it like "Europe/Berlin", or "UTC"')
        least, most = one.get("min_replicas"), one.get("max_replicas")
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield Problem((*where, "min_replicas"), f" is more than max_replicas ({shown(most)})")


def _check_autoscaling_numbers(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Times of which one may not be shorter than the other, and counts within the fleet's bounds."""
    if not isinstance(values.get("autoscaling"), dict):
        return
    sample, window = (_number_in(values, "autoscaling", key) for key in ("metrics_interval_seconds", "window_seconds"))
    if sample is not None and window is not None and sample > window:
        yield Problem(("autoscaling", "window_seconds"), f" is less than metrics_interval_seconds ({shown(sample)})")
    most = _number_in(values, "max_replicas")
    for key in ("min_available", "fallback_replicas"):
        count = _number_in(values, "autoscaling", key)
        if count is not None and most is not None and count > most and find(values, ("autoscaling", key)) is not NOWHERE:
            yield Problem(("autoscaling", key), f" is more than max_replicas ({shown(most)})")


def _check_idle(values: Mapping[str, Any]) -> Iterator[Problem]:
    """A fleet may go to zero only where that is allowed, and where something can tell that there is work again."""
    section = values.get("autoscaling")
    if not isinstance(section, dict) or section.get("idle_seconds") in (None, _REFUSED):
        return
    where: KeyPath = ("autoscaling", "idle_seconds")
    least, metrics = _number_in(values, "min_replicas"), section.get("metrics")
    told = isinstance(metrics, dict) and any(_tells_of_work(one) for one in metrics.values())
    if least:
        yield Problem(where, f": needs min_replicas = 0, or the fleet is never without agents (it is {shown(least)})")
    elif _number_in(values, "autoscaling", "min_available"):
        yield Problem(where, ": min_available keeps agents that have nothing to do; leave one of the two out")
    elif not values.get("sockets") and not told:
        yield Problem(
            where,
            ": nothing would tell of work while there is no agent; give [fleet.sockets], or a metric with a target that is read "
            "outside of the agents and is the whole fleet's, like the length of a queue",
        )


def _tells_of_work(metric: object) -> bool:
    """Whether this metric is a number of the whole fleet that is known without any agent."""
    if not isinstance(metric, dict) or metric.get("target") is None or metric.get("scope", "total") != "total":
        return False
    return metric.get("agents") is None


def _check_command(values: Mapping[str, Any]) -> Iterator[Problem]:
    command, shell = values.get("command"), values.get("shell", False)
    if isinstance(command, str) and shell is False:
        yield Problem(("command",), f": must be a list; {_ways_to_write(command)}")
    if isinstance(command, list) and shell is True and len(command) > 1:
        yield Problem(("command",), ": with shell = true the command is one string, or a list of one")
    if isinstance(command, list) and command and isinstance(command[0], str) and not command[0].strip():
        yield Problem(("command",), ": the first item is empty; it names the program")


def _ways_to_write(command: str) -> str:
    try:
        argv = shlex.split(command)
    except ValueError:  # a quote that is not closed
        argv = []
    as_list = f"write command = {_shown_list(argv)}" if argv else "write it as the program and its arguments"
    return f"{as_list}, or add shell = true to have /bin/sh run it"


def _check_signals(values: Mapping[str, Any]) -> Iterator[Problem]:
    drain = values.get("graceful_drain")
    named: dict[tuple[str, ...], object] = {("stop_signal",): values.get("stop_signal")}
    if isinstance(drain, dict):
        named |= {("graceful_drain", key): drain.get(key) for key in ("drain_signal", "checkpoint_signal")}
    for place, name in named.items():
        if not isinstance(name, str):
            continue
        if f"SIG{name.removeprefix('SIG')}" not in signal.Signals.__members__:
            known = [member.removeprefix("SIG") for member in signal.Signals.__members__]
            near = difflib.get_close_matches(name[:20].upper().removeprefix("SIG"), known, n=1)
            yield Problem(place, f": no such signal; {f'did you mean {near[0]}?' if near else 'common ones are TERM, INT, HUP, QUIT'}")
        elif place != ("stop_signal",) and name.removeprefix("SIG") in ("KILL", "STOP"):
            yield Problem(place, f": no agent can act on {name.removeprefix('SIG')}; use one that it can handle, like USR1")


def _check_environment(values: Mapping[str, Any]) -> Iterator[Problem]:
    tables = {key: values[key] for key in HIDDEN if isinstance(values.get(key), dict)}
    for key, table in tables.items():
        for name in table:
            if not re.fullmatch(ENVIRONMENT_NAME, name):
                yield Problem((key, name), ": not a variable's name; letters, digits and _ make one, and no digit comes first")
            elif name.startswith(RESERVED_PREFIX):
                yield Problem((key, name), f": names that begin with {RESERVED_PREFIX} are fleetctl's own")
    for name, reference in tables.get("secret_env", {}).items():
        if name in tables.get("environment", {}):
            yield Problem(("secret_env", name), ": is in environment too; keep one of them")
        if isinstance(reference, str) and not re.fullmatch(SECRET_REFERENCE, reference, re.DOTALL):
            yield Problem(
                ("secret_env", name), ': must say where the value is, "env:NAME" or "file:PATH"; the value itself does not belong here'
            )


def _check_env_file(values: Mapping[str, Any]) -> Iterator[Problem]:
    if values.get("env_file") == "":
        yield Problem(("env_file",), ": must be a file's name")


def _check_sockets(values: Mapping[str, Any]) -> Iterator[Problem]:
    sockets = values.get("sockets")
    if not isinstance(sockets, dict):
        return
    if len(sockets) > _MOST_SOCKETS:
        yield Problem(("sockets",), f": more than {_MOST_SOCKETS}", show=False)
    known: dict[str, str] = {}
    for name, text in sockets.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            yield Problem(("sockets", name), ": is not a socket's name; letters, digits, - and _ make one")
        if not isinstance(text, str):
            continue
        try:
            address = parse(text)
        except ValueError as error:
            yield Problem(("sockets", name), f": {error}")
            continue
        if address.path and not address.path.startswith("/"):
            yield Problem(("sockets", name), ": must be an absolute path")
        if str(address) in known and (address.path or address.port):
            yield Problem(("sockets", name), f": is the address of {known[str(address)]} already")
        known[str(address)] = name
    yield from _check_named_sockets(values, sockets)


def _check_named_sockets(values: Mapping[str, Any], sockets: Mapping[str, Any]) -> Iterator[Problem]:
    """What a command names in {fd:NAME} and {port:NAME} has to be there; other braces are the command's own."""
    command = values.get("command")
    for index, word in enumerate(command if sockets and isinstance(command, list) else ()):
        for found in sorted(placeholders(word)) if isinstance(word, str) else ():
            kind, _, name = found.partition(":")
            if kind in ("fd", "port") and name and name not in sockets:
                yield Problem(("command", index), f": there is no socket {name!r} for {{{found}}}; there are {', '.join(sockets)}")


def _check_probes(values: Mapping[str, Any]) -> Iterator[Problem]:
    has_port = values.get("port_base") is not None or bool(values.get("sockets"))
    for section in ("readiness", "liveness"):
        for key, read in (("http", parse_url), ("tcp", parse)):
            text = find(values, (section, key))
            if not isinstance(text, str):
                continue
            if "port" in placeholders(text) and not has_port:
                yield Problem((section, key), ": {port} stands for nothing here; set port_base, or declare a socket")
                continue
            if key == "tcp" and values.get("port_base") is None and any(name.partition(":")[0] == "port" for name in placeholders(text)):
                yield Problem(
                    (section, key), ": fleetctl itself listens on the fleet's sockets, so that always passes; use http, exec or notify"
                )
                continue
            try:
                read(_SOCKET_PORT.sub("1", filled(text, {"port": "1", "slot": "0"})))
            except ValueError as error:
                yield Problem((section, key), f": {error}")


_LEAST_PIDS = 3
_RUN_BESIDE = (("readiness", "exec"), ("liveness", "exec"), ("checkpoints", "command"))


def _check_sandbox(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is said of a sandbox that is not there, and on this machine what a sandbox would keep from working, or would not hold."""
    section = values.get("sandbox")
    if values.get("trust_level") != "untrusted":
        if isinstance(section, dict) and any(value not in (_DEFAULTS.get(f"sandbox.{key}"), ()) for key, value in section.items()):
            yield Problem(("sandbox",), ': only agents with trust_level = "untrusted" have one; set that, or leave this out', show=False)
        return
    if values.get("engine", "local") != "local":
        return
    limit = find(values, ("resource_limits", "pids_limit"))
    if isinstance(limit, int) and limit < _LEAST_PIDS:
        yield Problem(("resource_limits", "pids_limit"), f": must be {_LEAST_PIDS} or more for an agent in a sandbox, which needs two")
    for path in _RUN_BESIDE:
        if find(values, path) not in (NOWHERE, [], ()):
            yield Problem(path, ": would run outside of the sandbox; use notify, http or tcp, or what the agent itself does")
    if values.get("port_base") is not None and not (isinstance(section, dict) and section.get("network")):
        yield Problem(("port_base",), ": nobody reaches an agent without a network; declare a socket, or set sandbox.network = true")


# Those of one setting say more than pydantic, so they come before it; those of several need sound values, and come after it.
_RULES = (
    _check_command,
    _check_signals,
    _check_environment,
    _check_env_file,
    _check_sockets,
    _check_probes,
    _check_sandbox,
    _check_autoscaling,
    _check_metrics,
    _check_schedules,
)
_RULES_OF_SEVERAL = (_check_replicas, _check_pairs, _check_autoscaling_numbers, _check_idle)


def _unsupported(values: Mapping[str, Any], *, even_defaults: bool) -> Iterator[Problem]:
    """Settings that would do nothing yet: better refused than ignored. A stored spec has them all, at their defaults."""
    for info in settings():
        value = NOWHERE if info.supported else find(values, tuple(info.key.split(".")))
        if value is not NOWHERE and (even_defaults or value != info.default):
            yield Problem(tuple(info.key.split(".")), ": not supported yet; leave it out")


def find(values: object, path: KeyPath) -> Any:  # Any: a JSON value, or NOWHERE
    for part in path:
        table = dict(enumerate(values)) if isinstance(values, list | tuple) else values
        if not isinstance(table, Mapping) or part not in table:
            return NOWHERE
        values = table[part]
    return values


def dotted(path: KeyPath) -> str:
    """("fleet", 0, "logs", "keep") -> fleet[0].logs.keep"""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part) else _quoted(part))
    return text


def shown(value: object) -> str:
    """A value in a message: short, on one line, without control characters."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 63 else "a huge number"
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else str(value)
    if isinstance(value, list | tuple):
        return _shown_list(value) if all(isinstance(item, str) for item in value) else "a list"
    return "a table" if isinstance(value, Mapping) else plain(str(value))


def _shown_list(items: Sequence[str]) -> str:
    more = ", ..." if len(items) > 8 else ""
    return "[" + ", ".join(_quoted(item) for item in items[:8]) + more + "]"


def _quoted(text: str) -> str:
    return '"' + plain(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def plain(text: str) -> str:
    """Cut to 80 characters, and with escapes for what a terminal would act on."""
    cut = text if len(text) <= 80 else text[:77] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in cut)
