"""supervisord.conf: every [program:x] becomes a fleet of numprocs agents."""

import configparser
import re
import shlex
from collections.abc import Mapping, Sequence

from fleetctl.errors import ConfigError
from fleetctl.importing.commands import is_late, late, shell_line, slot
from fleetctl.importing.draft import RESTARTS_HERE, Draft, Imported, flag, fleet_name, settle

_OURS = "`fleetctl logs` shows what agents write, and cuts it by size"
_USER = "agents run as the user who starts the daemon; run one daemon for each user"
_WHY_NOT_SECTION = {
    "group": "fleets have no groups; give commands several names: `fleetctl restart web api`",
    "eventlistener": "speaks supervisord's own protocol on its standard input; `fleetctl events -f --json` tells what happens",
    "fcgi-program": "supervisord opens a socket for it and hands it over; agents open their own",
}
_NOT_NEEDED = {"unix_http_server", "inet_http_server", "supervisorctl", "supervisord", "include"}
_WHY_NOT = {
    "priority": "fleets start side by side, in no order",
    "startretries": RESTARTS_HERE,
    "user": _USER,
    "umask": "agents have the umask of the daemon",
    "serverurl": "there is no XML-RPC server; the control socket speaks HTTP and JSON",
    "process_name": "agents get ids of their own, and FLEETCTL_SLOT counts them from 0",
    **dict.fromkeys(("stdout_logfile", "stderr_logfile"), _OURS),
    **dict.fromkeys(("stderr_logfile_maxbytes", "stderr_logfile_backups"), "an agent has one log for both streams"),
    **dict.fromkeys(
        ("stdout_capture_maxbytes", "stderr_capture_maxbytes", "stdout_events_enabled", "stderr_events_enabled"),
        "output is kept, and never read as events",
    ),
    **dict.fromkeys(("stdout_syslog", "stderr_syslog"), "output goes to files, not to syslog"),
}
# What already holds for every agent here.
_ALWAYS = {
    "stopasgroup": "signals always go to an agent's whole tree",
    "killasgroup": "signals always go to an agent's whole tree",
    "redirect_stderr": "an agent has one log for both streams",
}
_HANDLED = {
    *("command", "environment", "directory", "numprocs", "numprocs_start", "autostart", "autorestart", "exitcodes", "startsecs"),
    *("stopsignal", "stopwaitsecs", "stdout_logfile_maxbytes", "stdout_logfile_backups"),
}
# Every agent has these from the daemon, so nobody need hand them over.
_INHERITED = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR"}
_EXPRESSION = re.compile(r"%(?:%|\((\w+)\)([-+ 0#]*\d*)([sdi]))")


def includes(text: str, source: str) -> list[str]:
    """The patterns of the files that [include] adds."""
    parser = _parsed([(source, text)])
    return parser.get("include", "files", fallback="").split()


def read(files: Sequence[tuple[str, str]], *, here: str, host: str = "localhost") -> Imported:
    """The fleets of the file and of those it includes, given as (name, text); `here`: the folder of the first.

    ConfigError names what is wrong.
    """
    source = files[0][0]
    parser = _parsed(files)
    known = {"here": here, "host_node_name": host}
    drafts: list[Draft] = []
    around = [
        ("variables of supervisord", "agents get PATH, HOME, locale and the like only; name others in environment, env_file or secret_env")
    ]
    for section in parser.sections():
        kind, _, name = section.partition(":")
        if kind == "program":
            options = {key: value or "" for key, value in parser.items(section)}
            common = parser.get("supervisord", "environment", fallback="")
            taken = [draft.name for draft in drafts]
            drafts.append(_draft(fleet_name(name, taken), name.strip(), options, common, known, source))
        elif kind not in _NOT_NEEDED and kind != "rpcinterface":
            around.append((f"[{section}]", _WHY_NOT_SECTION.get(kind, "not a section of supervisord.conf that says what to run")))
    for key in ("user", "umask"):
        if value := parser.get("supervisord", key, fallback=""):
            around.append((f"{key} = {value}", _WHY_NOT[key]))
    if not drafts:
        raise ConfigError(f"{source}: no [program:NAME] in it", hint="a supervisord.conf has one for each program")
    return Imported(fleets=drafts, around=around)


def _parsed(files: Sequence[tuple[str, str]]) -> configparser.RawConfigParser:
    # As supervisord reads it: later sections of a name win, and " ;" or " #" ends a value.
    parser = configparser.RawConfigParser(strict=False, inline_comment_prefixes=(";", "#"), default_section="\0", allow_no_value=True)
    for source, text in files:
        try:
            parser.read_string(text, source)
        except configparser.Error as error:
            raise ConfigError(f"{source}: not a supervisord.conf: {' '.join(error.message.split())}") from error
    return parser


def _draft(fleet: str, program: str, options: Mapping[str, str], common: str, known: Mapping[str, str], source: str) -> Draft:
    draft = Draft(name=fleet, origin=f"[program:{program}]")
    where = f"{source}: [program:{program}]"
    start = _whole(options.get("numprocs_start", "0"), f"{where} numprocs_start")
    known = {**known, "program_name": program, "group_name": program, "numprocs": options.get("numprocs", "1")}
    wanted: set[str] = set()

    def expand(text: str, key: str) -> str:
        return _expand(text, known, start, wanted, f"{where} {key}")

    exports: list[tuple[str, str]] = []
    for name, value in [
        *_variables(expand(common, "environment"), f"{source}: [supervisord] environment"),
        *_variables(expand(options.get("environment", ""), "environment"), f"{where} environment"),
    ]:
        _add_variable(draft, exports, name, value)
    _add_command(draft, expand(options.get("command", ""), "command"), exports, where)
    for name in sorted(wanted - _INHERITED):
        if name not in draft.table("environment") | draft.table("secret_env"):
            draft.refer(name, f"env:{name}", "%(ENV_...)s")
    if directory := options.get("directory"):
        folder = expand(directory, "directory")
        if is_late(folder):
            draft.leave("directory", "a fleet has one working directory, and this one is another for each process")
        else:
            draft.carry("cwd", folder, "directory")
    else:
        draft.leave("the working directory", "was supervisord's own; here it is the folder of fleet.toml: set cwd if it matters")
    _add_size(draft, options, where)
    _add_restarts(draft, options, where)
    _add_stop(draft, options, where)
    _add_logs(draft, options)
    _leave_rest(draft, options)
    return settle(draft)


def _expand(text: str, known: Mapping[str, str], start: int, wanted: set[str], where: str) -> str:
    """The text with its %(name)s filled in; what only the start of an agent can tell becomes a mark for the shell."""

    def fill(found: re.Match[str]) -> str:
        name, flags, kind = found.groups()
        if name is None:
            return "%"
        if name == "process_num":
            return slot(start, f"%{flags}{kind}")
        if name.startswith("ENV_"):
            wanted.add(name.removeprefix("ENV_"))
            return late("${" + name.removeprefix("ENV_") + "}")
        if name not in known:
            raise ConfigError(f"{where}: %({name}){kind} is nothing that supervisord fills in")
        return known[name]

    return _EXPRESSION.sub(fill, text)


def _variables(text: str, where: str) -> list[tuple[str, str]]:
    """KEY="value",KEY2='value', KEY3=value"""
    lexer = shlex.shlex(text.replace("\n", " "), posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters, lexer.escape = ",", True, "", ""
    try:
        items = [item.strip() for item in lexer]
    except ValueError as error:
        raise ConfigError(f"{where}: {str(error).lower()}") from error
    pairs = [item.partition("=") for item in items if item]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"{where}: {name.strip()!r} is not NAME=VALUE")
    return [(name.strip(), value) for name, _, value in pairs]


def _add_variable(draft: Draft, exports: list[tuple[str, str]], name: str, value: str) -> None:
    whole = re.fullmatch(late(r"\$\{(\w+)\}"), value)
    if whole:
        draft.refer(name, f"env:{whole[1]}", "environment")
    elif is_late(value):
        exports.append((name, value))
    else:
        draft.add_variable(name, value, "environment")


def _add_command(draft: Draft, command: str, exports: Sequence[tuple[str, str]], where: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{where} command: {str(error).lower()}") from error
    if not words:
        raise ConfigError(f"{where}: no command")
    if exports or any(map(is_late, words)):
        draft.carry("command", shell_line(words, exports), "command" + (" and environment" if exports else ""))
        draft.carry("shell", True, "fills in what differs from agent to agent")
    else:
        draft.carry("command", words, "command")


def _add_size(draft: Draft, options: Mapping[str, str], where: str) -> None:
    size = _whole(options.get("numprocs", "1"), f"{where} numprocs")
    if flag(options.get("autostart", "true")) is False:
        draft.carry("replicas", 0, "autostart = false")
        draft.leave("autostart = false", f"the fleet is there with no agents; `fleetctl scale {draft.name}={size}` starts it")
    elif "numprocs" in options:
        draft.carry("replicas", size, "numprocs")
    if size > 100:
        draft.carry("max_replicas", size, "numprocs")


def _add_restarts(draft: Draft, options: Mapping[str, str], where: str) -> None:
    word = options.get("autorestart", "unexpected").strip().lower()
    restarts = flag(word)
    if restarts is None and word != "unexpected":
        raise ConfigError(f"{where} autorestart: {word!r} is not true, false or unexpected")
    policy = "on-failure" if restarts is None else "always" if restarts else "never"
    draft.carry("restart.policy", policy, f"autorestart = {word}" + ", its default" * ("autorestart" not in options))
    if policy == "on-failure" and (codes := options.get("exitcodes", "0").strip()) != "0":
        draft.leave(f"exitcodes = {codes}", "only exit status 0 counts as expected; 75 means start me again, 78 do not")
    if "startsecs" in options:
        draft.carry("readiness.settle_seconds", float(_whole(options["startsecs"], f"{where} startsecs")), "startsecs")


def _add_stop(draft: Draft, options: Mapping[str, str], where: str) -> None:
    if "stopsignal" in options:
        draft.carry("stop_signal", options["stopsignal"].strip().upper().removeprefix("SIG"), "stopsignal")
    seconds = float(_whole(options.get("stopwaitsecs", "10"), f"{where} stopwaitsecs"))
    draft.carry("graceful_drain.timeout_seconds", seconds, "stopwaitsecs" + ", its default" * ("stopwaitsecs" not in options))


def _add_logs(draft: Draft, options: Mapping[str, str]) -> None:
    if size := options.get("stdout_logfile_maxbytes"):
        found = re.fullmatch(r"(\d+)\s*([KMG]?)B?", size.strip().upper())
        if found and int(found[1]):
            value = int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[found[2]]
            draft.carry("logs.max_bytes", value, "stdout_logfile_maxbytes")
        else:
            draft.leave(f"stdout_logfile_maxbytes = {size}", "no log grows without bound; the default is 10 MiB and five older pieces")
    if (keep := options.get("stdout_logfile_backups", "").strip()).isdigit():
        draft.carry("logs.keep", int(keep), "stdout_logfile_backups")


def _leave_rest(draft: Draft, options: Mapping[str, str]) -> None:
    for key, value in options.items():
        if key in _HANDLED:
            continue
        if key in _ALWAYS:
            if flag(value) is False:
                draft.leave(f"{key} = {value}", _ALWAYS[key])
        elif key == "process_name" and value.strip() in ("%(program_name)s", "%(program_name)s_%(process_num)02d"):
            continue
        else:
            draft.leave(f"{key} = {value}", _WHY_NOT.get(key, "not a setting of supervisord that says how a program runs"))


def _whole(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text.strip()!r} is not a whole number") from error
