"""PM2: an ecosystem file, what `pm2 jlist` prints, or the dump.pm2 that `pm2 save` writes. Every app becomes a fleet."""

import os.path
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fleetctl.errors import ConfigError
from fleetctl.importing import literal
from fleetctl.importing.commands import late, shell_line
from fleetctl.importing.draft import RESTARTS_HERE, Draft, Imported, flag, fleet_name, settle, supports, under

# Any in this module: JSON values from somebody else's file; every use of one checks what it is.

_INTERPRETERS = {".sh": "bash", ".py": "python3", ".rb": "ruby", ".php": "php", ".pl": "perl", ".js": "node", ".cjs": "node"} | {
    ".mjs": "node",
    ".ts": "bun",
    ".tsx": "bun",
}
_KILL_TIMEOUT_MS = 1600
_DEFAULT_INSTANCE_VARIABLE = "NODE_APP_INSTANCE"
_LOGS = "`fleetctl logs` shows what agents write, each line of several with the agent's name in front"
_USER = "agents run as the user who starts the daemon; run one daemon for each user"
_WHY_NOT = {
    "watch": "files are not watched; `fleetctl restart` puts new code to work, one agent after the other",
    "ignore_watch": "files are not watched",
    "watch_delay": "files are not watched",
    "cron_restart": "nothing is restarted by the clock; have cron call `fleetctl restart`",
    "cron": "nothing is restarted by the clock; have cron call `fleetctl restart`",
    "max_restarts": RESTARTS_HERE,
    "wait_ready": "agents do not talk to the daemon by process.send(); with readiness.notify they say READY=1 on NOTIFY_SOCKET",
    "listen_timeout": "see readiness.start_timeout_seconds, once the fleet has readiness.notify or a probe",
    "shutdown_with_message": "agents are asked to stop by a signal, not by process.send()",
    "namespace": "fleets have no groups; commands take several names",
    "uid": _USER,
    "gid": _USER,
    "user": _USER,
    "treekill": "signals always go to an agent's whole tree",
    "filter_env": "agents get PATH, HOME, locale and the like only, so nothing has to be filtered",
    "exec_mode": "every agent is a process of its own: to share a port, each listens on its own or with SO_REUSEPORT",
    "post_update": "code is not deployed from here",
    **dict.fromkeys(
        (
            "output",
            "out_file",
            "error",
            "error_file",
            "log",
            "log_file",
            "merge_logs",
            "combine_logs",
            "log_date_format",
            "time",
            "log_type",
            "out",
            "err_file",
            "err",
        ),
        _LOGS,
    ),
}
# Nothing to lose, or already so.
_SILENT = {
    "source_map_support",
    "vizion",
    "automation",
    "pmx",
    "disable_source_map_support",
    "pid_file",
    "pid",
    "instance_var",
    "force",
} | {
    "append_env_to_name",
    "env",
}
_HANDLED = {"name", "script", "args", "interpreter", "exec_interpreter", "interpreter_args", "node_args", "cwd", "instances"} | {
    *("autorestart", "stop_exit_codes", "min_uptime", "restart_delay", "exp_backoff_restart_delay", "kill_timeout"),
    *("max_memory_restart", "increment_var", "port", "autostart"),
}


def read(text: str, source: str, *, folder: str = ".", cores: int = 1, environment: str = "") -> Imported:
    """The fleets of the text. `folder`: where its file is, seen from where fleet.toml will be; `cores`: what `instances: "max"` means;
    `environment`: NAME of `env_NAME`, as `pm2 --env NAME`.

    ConfigError names what is wrong.
    """
    try:
        document = literal.read(text)
    except literal.NotPlain as error:
        hint = f"let node work it out: node -p \"JSON.stringify(require('./{os.path.basename(source)}'))\" | fleetctl import -"
        raise ConfigError(f"{source}:{error.line}: {error}; this file is read, and not run", hint=hint) from error
    around: list[tuple[str, str]] = []
    if isinstance(document, dict) and "deploy" in document:
        around.append(("deploy", "code is not deployed from here"))
    drafts: list[Draft] = []
    running = [app for app in _apps(document, source) if "pm2_env" in app or "pm_exec_path" in app]
    apps = _of_running(running) if running else _apps(document, source)
    around.append(
        ("variables of your shell", "agents get PATH, HOME, locale and the like only; name others in environment, env_file or secret_env")
    )
    for index, app in enumerate(apps):
        if app.get("pmx_module"):
            continue
        where = f"{source}: app {index + 1}"
        draft = _draft(app, [draft.name for draft in drafts], where, cores, environment)
        _add_folder(app, draft, folder)
        _leave_rest(app, draft, environment)
        drafts.append(settle(draft))
    if not drafts:
        raise ConfigError(f"{source}: no app in it", hint='an ecosystem file has "apps": [...]; `pm2 jlist` prints a list')
    return Imported(fleets=drafts, around=around)


def _apps(document: object, source: str) -> list[dict[str, Any]]:
    apps = document.get("apps", document if "script" in document else []) if isinstance(document, dict) else document
    apps = [apps] if isinstance(apps, dict) else apps
    if not isinstance(apps, list) or not all(isinstance(app, dict) for app in apps):
        raise ConfigError(f"{source}: neither an ecosystem file nor what `pm2 jlist` prints", hint='an ecosystem file has "apps": [...]')
    return apps


def _of_running(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Apps as an ecosystem file has them, made of running processes: those of one name are instances of one app."""
    apps: dict[str, dict[str, Any]] = {}
    for entry in entries:
        about = entry.get("pm2_env", entry)
        if not isinstance(about, dict):
            continue
        name = str(about.get("name", entry.get("name", "")))
        if name in apps:
            apps[name]["instances"] += 1
            continue
        app = {key: about[key] for key in (*_HANDLED, *_WHY_NOT, "pmx_module", "instance_var") if key in about}
        for file in ("out_file", "error_file", "log_file", "namespace", "treekill", "filter_env", "merge_logs", "log_date_format"):
            app.pop(file, None)  # there always, whether wanted or not
        app |= {"name": name, "instances": 1, "script": about.get("pm_exec_path", ""), "cwd": about.get("pm_cwd")}
        app["interpreter"] = about.get("exec_interpreter") or "none"
        variables = about.get("env")
        app["variables of the running process"] = len(variables) if isinstance(variables, dict) else 0
        apps[name] = app
    return list(apps.values())


def _draft(app: Mapping[str, Any], taken: Sequence[str], where: str, cores: int, environment: str) -> Draft:
    script = app.get("script")
    if not isinstance(script, str) or not script.strip():
        raise ConfigError(f"{where}: no script")
    name = str(app.get("name") or os.path.basename(script).partition(".")[0])
    draft = Draft(name=fleet_name(name, taken), origin=f"app {name}")
    words = _command(app, draft)
    variables = _variables(app, draft, environment)
    line = _counted(app, draft, words, variables, where)
    draft.carry("command", line or words, "script, interpreter and arguments")
    if line:
        draft.carry("shell", True, "increment_var")
    _add_size(app, draft, cores)
    _add_restarts(app, draft)
    for variable, value in variables.items():
        draft.add_variable(variable, value, "env" + f" and env_{environment}" * bool(environment))
    if any("python" in word for word in words[:1]):
        draft.add_variable("PYTHONUNBUFFERED", "1", "env; PM2 sets it for Python")
    return draft


def _add_folder(app: Mapping[str, Any], draft: Draft, folder: str) -> None:
    given = app.get("cwd") if isinstance(app.get("cwd"), str) else None
    path = under(folder, given or ".")
    if path != ".":
        draft.carry("cwd", path, "cwd" if given else "where the file is")


def _words(value: object, draft: Draft, key: str) -> list[str]:
    if isinstance(value, list):
        return [str(word) for word in value]
    if not isinstance(value, str):
        return []
    try:
        return shlex.split(value)
    except ValueError:
        draft.leave(key, "has a quote that is not closed")
        return []


def _command(app: Mapping[str, Any], draft: Draft) -> list[str]:
    script = str(app["script"]).strip()
    given = app.get("interpreter", app.get("exec_interpreter"))
    interpreter = given if isinstance(given, str) and given else _INTERPRETERS.get(os.path.splitext(script)[1], "none")
    if found := re.fullmatch(r"node@(.*)", interpreter):
        draft.leave(
            f"interpreter = {interpreter}", f"node is taken from the PATH; give the full path of version {found[1]} if it has to be"
        )
        interpreter = "node"
    own = _words(app.get("interpreter_args", app.get("node_args")), draft, "interpreter_args")
    program = [script] if interpreter == "none" else [interpreter, *own, script]
    if interpreter == "none" and own:
        draft.leave("interpreter_args", "the script is a program by itself")
    return [*program, *_words(app.get("args"), draft, "args")]


def _variables(app: Mapping[str, Any], draft: Draft, environment: str) -> dict[str, str]:
    found: dict[str, str] = {}
    chosen = [app.get("env"), app.get(f"env_{environment}") if environment else None]
    for table in chosen:
        for name, value in table.items() if isinstance(table, dict) else ():
            if value is not None:
                found[str(name)] = value if isinstance(value, str) else _text(value)
    if isinstance(app.get("port"), int | str):
        found["PORT"] = str(app["port"])
    if environment and not isinstance(app.get(f"env_{environment}"), dict):
        draft.leave(f"env_{environment}", "this app has none")
    return found


def _text(value: object) -> str:
    """As JavaScript turns a value into a variable."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _counted(app: Mapping[str, Any], draft: Draft, words: Sequence[str], variables: dict[str, str], where: str) -> str:
    """The shell's line that counts `increment_var` up from instance to instance; empty where nothing is to be counted."""
    name = app.get("increment_var")
    if not isinstance(name, str):
        return ""
    first = variables.pop(name, "0")
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(r"\d{1,9}", first):
        raise ConfigError(f"{where}: increment_var needs a variable with a whole number")
    if name == "PORT" and supports("port_base"):
        draft.carry("port_base", int(first), "increment_var")
        return ""
    return shell_line(words, [(name, late(f"$(({first} + FLEETCTL_SLOT))"))])


def _add_size(app: Mapping[str, Any], draft: Draft, cores: int) -> None:
    wanted = app.get("instances", 1)
    if wanted in ("max", 0, "0"):
        count = cores
    elif isinstance(wanted, int) and wanted < 0:
        count = max(1, cores + wanted)
    else:
        count = int(wanted) if str(wanted).isdigit() else 1
    if "instances" in app:
        draft.carry("replicas", count, f"instances = {wanted}" + f", with {cores} cores" * (wanted != count and str(wanted) != str(count)))
    if count > 100:
        draft.carry("max_replicas", count, "instances")
    if count > 1 and "increment_var" not in app:
        variable = app.get("instance_var") or _DEFAULT_INSTANCE_VARIABLE
        draft.leave(str(variable), "agents find their number, from 0, in FLEETCTL_SLOT")
    if flag(app.get("autostart", True)) is False:
        draft.carry("replicas", 0, "autostart = false")
        draft.leave("autostart = false", f"the fleet is there with no agents; `fleetctl scale {draft.name}={count}` starts it")


def _add_restarts(app: Mapping[str, Any], draft: Draft) -> None:
    codes = app.get("stop_exit_codes")
    codes = [codes] if isinstance(codes, int) else codes
    if flag(app.get("autorestart", True)) is False:
        draft.carry("restart.policy", "never", "autorestart = false")
    elif isinstance(codes, list) and codes:
        if 0 in codes or "0" in codes:
            draft.carry("restart.policy", "on-failure", "stop_exit_codes")
        if rest := [code for code in codes if code not in (0, "0")]:
            draft.leave(f"stop_exit_codes {', '.join(map(str, rest))}", "exit status 78 is the one that says: do not start me again")
    if (delay := _milliseconds(app.get("restart_delay"))) and delay > 0:
        draft.carry("restart.backoff_seconds", delay / 1000, "restart_delay, in milliseconds")
        draft.carry("restart.backoff_cap_seconds", delay / 1000, "restart_delay")
    elif (delay := _milliseconds(app.get("exp_backoff_restart_delay"))) and delay > 0:
        draft.carry("restart.backoff_seconds", delay / 1000, "exp_backoff_restart_delay, in milliseconds")
        draft.carry("restart.backoff_cap_seconds", 15.0, "exp_backoff_restart_delay: PM2 stops growing there")
    if (uptime := _milliseconds(app.get("min_uptime"))) and uptime > 0:
        draft.carry("restart.healthy_after_seconds", uptime / 1000, "min_uptime, in milliseconds")
    timeout = _milliseconds(app.get("kill_timeout"))
    seconds = (_KILL_TIMEOUT_MS if timeout is None else timeout) / 1000
    draft.carry("stop_signal", "INT", "PM2's own")
    draft.carry("graceful_drain.timeout_seconds", seconds, "kill_timeout" + ", its default" * (timeout is None))
    limit = app.get("max_memory_restart")
    if limit and (size := _bytes(limit)):
        draft.carry("resource_limits.memory_limit_mb", size / (1 << 20), "max_memory_restart")


def _milliseconds(value: object) -> float | None:
    """1600, "1600", "10s", "5m", "1h" """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)", str(value).strip().lower())
    return float(found[1]) * {"": 1, "ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}[found[2]] if found else None


def _bytes(value: object) -> int | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", str(value).strip().upper())
    return int(float(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[found[2]]) if found else None


def _leave_rest(app: Mapping[str, Any], draft: Draft, environment: str) -> None:
    for key, value in app.items():
        if key in _HANDLED or key in _SILENT or value in (None, False, "", [], {}):
            continue
        if key == "variables of the running process":
            draft.leave(
                f"{value} variables", "they hold all of the shell that started it; name those your app needs in environment or secret_env"
            )
        elif key.startswith("env_"):
            if key != f"env_{environment}":
                draft.leave(key, f"`--env {key.removeprefix('env_')}` takes it over env")
        elif key == "exec_mode":
            if str(value).startswith("cluster"):
                draft.leave(f"exec_mode = {value}", _WHY_NOT[key])
        elif key in _WHY_NOT:
            draft.leave(_with_value(key, value), _WHY_NOT[key])
        else:
            draft.leave(key, "not a setting of PM2 that says how an app runs")


def _with_value(key: str, value: object) -> str:
    return f"{key} = {_text(value)}" if isinstance(value, str | int | float) else key
