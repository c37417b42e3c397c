"""`fleetctl import`: what becomes of other tools' files. Whatever it prints, `config check` accepts."""

import contextlib
import json
import shutil
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetctl import config
from fleetctl.errors import ConfigError
from fleetctl.importing import literal, pm2, procfile, supervisord
from fleetctl.importing.commands import late, shell_line, slot, split_line
from fleetctl.importing.draft import Imported, fleet_name, to_toml
from fleetctl.models import FleetSpec
from tests.cli.conftest import Fleetctl


def loaded(imported: Imported, folder: Path) -> dict[str, FleetSpec]:
    """The fleets as `up` reads what was written."""
    file = folder / "fleet.toml"
    file.write_text(to_toml(imported, "x"))
    return {one.spec.name: one.spec for one in config.load_file(file)}


def of_procfile(text: str, folder: Path) -> dict[str, FleetSpec]:
    return loaded(procfile.read(text, "Procfile"), folder)


def of_supervisord(text: str, folder: Path) -> dict[str, FleetSpec]:
    return loaded(supervisord.read([("supervisord.conf", text)], here="/srv/app", host="box"), folder)


def of_pm2(app: dict[str, object], folder: Path) -> FleetSpec:
    (spec,) = loaded(pm2.read(json.dumps({"apps": [app]}), "ecosystem.json", cores=8), folder).values()
    return spec


def left(imported: Imported) -> dict[str, str]:
    return dict(imported.around) | {what: why for draft in imported.fleets for what, why in draft.left}


# -- command lines


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python3 worker.py --queue 'a b'", ["python3", "worker.py", "--queue", "a b"]),
        ('./run "x y"', ["./run", "x y"]),
        ("puma -p $PORT", None),
        ("FOO=1 python3 x.py", None),
        ("cd web && npm start", None),
        ("cd web", None),
        ("exec sleep 1", None),
        ("cat < in", None),
        ("echo 'open", None),
        ("ls *.py", None),
        ("run ~/x", None),
        ("", None),
    ],
)
def test_a_shell_is_used_only_where_one_is_needed(line: str, words: list[str] | None) -> None:
    assert split_line(line) == words


@given(st.lists(st.text(string.printable.replace("\n", "").replace("\r", ""), max_size=12), min_size=1, max_size=4))
def test_words_come_out_of_the_shells_line_as_they_went_in(words: list[str]) -> None:
    import shlex

    assert shlex.split(shell_line(words)) == ["exec", *words]


def test_marks_become_the_shells_own_words() -> None:
    assert shell_line(["a b", f"--n={slot()}", f"x{slot(3, '%02d')}y"], [("A", f"/opt:{late('${PATH}')}")]) == (
        'export A=/opt:"${PATH}"; exec \'a b\' --n="$FLEETCTL_SLOT" x"$(printf %02d $((FLEETCTL_SLOT + 3)))"y'
    )


@pytest.mark.parametrize(
    ("wanted", "taken", "name"),
    [
        ("web", [], "web"),
        ("Web_Server", [], "web-server"),
        ("web", ["web"], "web-2"),
        ("web", ["web", "web-2"], "web-3"),
        ("x" * 60, [], "x" * 40),
        ("x" * 60, ["x" * 40], "x" * 35 + "-2"),
        ("???", [], "fleet"),
        ("-a-", [], "a"),
    ],
)
def test_fleets_get_names_that_are_allowed_and_free(wanted: str, taken: list[str], name: str) -> None:
    assert fleet_name(wanted, taken) == name


# -- Procfile


def test_each_process_type_becomes_a_fleet(tmp_path: Path) -> None:
    fleets = of_procfile("# all\nweb: puma -p $PORT\n\nJob_Runner:python3 run.py\nrelease: migrate\n", tmp_path)
    assert {name: (spec.command, spec.shell) for name, spec in fleets.items()} == {
        "web": (("puma -p $PORT",), True),
        "job-runner": (("python3", "run.py"), False),
    }
    assert {spec.cwd for spec in fleets.values()} == {str(tmp_path)}


def test_a_procfile_elsewhere_keeps_its_folder_and_its_variables(tmp_path: Path) -> None:
    spec = loaded(procfile.read("web: ./run", "p", folder="../app", has_env_file=True), tmp_path)["web"]
    assert (spec.cwd, spec.env_file) == (str(tmp_path.parent / "app"), str(tmp_path.parent / "app" / ".env"))


def test_a_procfile_says_what_it_leaves_behind() -> None:
    remarks = left(procfile.read("web: puma -p $PORT\nrelease: migrate", "Procfile"))
    assert {"variables of your shell", "release (line 2)"} <= set(remarks)


@pytest.mark.parametrize(
    ("text", "said"),
    [("web: a\nnonsense\n", "Procfile:2"), ("", "no process type"), ("web:\n", "Procfile:1"), ("release: x", "no process type")],
)
def test_a_bad_procfile_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        procfile.read(text, "Procfile")


# -- supervisord.conf

SUPERVISORD = """
[unix_http_server]
file=/run/s.sock
[supervisord]
environment=GLOBAL=1
user=root
[program:web]
command=./serve --port 80%(process_num)02d --host %(host_node_name)s --dir "%(here)s/my files" ; the server
process_name=%(program_name)s_%(process_num)02d
numprocs=3
numprocs_start=1
directory=%(here)s
environment=A="x,y",TOKEN=%(ENV_TOKEN)s,MIXED=/opt:%(ENV_EXTRA)s,PERCENT=%%
autorestart=true
startsecs=5
stopsignal=SIGQUIT
stopwaitsecs=45
stdout_logfile=/var/log/web.log
stdout_logfile_maxbytes=5MB
stdout_logfile_backups=2
priority=10
user=www
[program:off]
command=sleep 100
autostart=false
[group:all]
programs=web,off
[eventlistener:mem]
command=memmon
"""


def test_a_program_of_supervisord_becomes_a_fleet(tmp_path: Path) -> None:
    web = of_supervisord(SUPERVISORD, tmp_path)["web"]
    assert web.command == (
        'export MIXED=/opt:"${EXTRA}"; exec ./serve --port 80"$(printf %02d $((FLEETCTL_SLOT + 1)))" --host box '
        "--dir '/srv/app/my files'",
    )
    assert web.shell
    assert web.environment == {"GLOBAL": "1", "A": "x,y", "PERCENT": "%"}
    assert web.secret_env == {"TOKEN": "env:TOKEN", "EXTRA": "env:EXTRA"}
    assert (web.replicas, web.cwd, web.restart.policy, web.stop_signal) == (3, "/srv/app", "always", "QUIT")
    assert (web.readiness.settle_seconds, web.graceful_drain.timeout_seconds) == (5.0, 45.0)
    assert (web.logs.max_bytes, web.logs.keep) == (5 << 20, 2)


def test_defaults_of_supervisord_come_along(tmp_path: Path) -> None:
    off = of_supervisord(SUPERVISORD, tmp_path)["off"]
    assert (off.command, off.shell, off.replicas) == (("sleep", "100"), False, 0)
    assert (off.restart.policy, off.graceful_drain.timeout_seconds) == ("on-failure", 10.0)


def test_what_supervisord_does_besides_is_told() -> None:
    remarks = left(supervisord.read([("s", SUPERVISORD)], here="/"))
    wanted = {"priority = 10", "user = www", "user = root", "[group:all]", "[eventlistener:mem]", "stdout_logfile = /var/log/web.log"}
    assert wanted | {"autostart = false", "the working directory"} <= set(remarks)
    assert all(remarks.values())


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("autorestart=false", "restart.policy", "never"),
        ("autorestart=unexpected", "restart.policy", "on-failure"),
        ("stopsignal=term", "stop_signal", "TERM"),
        ("stopwaitsecs=0", "graceful_drain.timeout_seconds", 0.0),
        ("numprocs=250\nprocess_name=%(process_num)d", "max_replicas", 250),
        ("stdout_logfile_maxbytes=64KB", "logs.max_bytes", 65536),
        ("directory=/opt", "cwd", "/opt"),
    ],
)
def test_options_of_supervisord(option: str, key: str, value: object, tmp_path: Path) -> None:
    spec: object = of_supervisord(f"[program:x]\ncommand=run\n{option}\n", tmp_path)["x"]
    for part in key.split("."):
        spec = getattr(spec, part)
    assert spec == value


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("stdout_logfile_maxbytes=1KB", "stdout_logfile_maxbytes (logs.max_bytes)"),
        ("stdout_logfile_maxbytes=0", "stdout_logfile_maxbytes = 0"),
        ("stopwaitsecs=999999", "stopwaitsecs (graceful_drain.timeout_seconds)"),
        ("exitcodes=0,3", "exitcodes = 0,3"),
        ("redirect_stderr=false", "redirect_stderr = false"),
        ("umask=022", "umask = 022"),
        ("nonsense=1", "nonsense = 1"),
        ("directory=/srv/%(process_num)d", "directory"),
        ("environment=FLEETCTL_X=1", "FLEETCTL_X (environment)"),
        ("environment=DB_PASSWORD=1", "DB_PASSWORD as a secret"),
        ("stopsignal=NOPE", "stopsignal (stop_signal)"),
    ],
)
def test_what_fleet_toml_would_refuse_is_left_out_with_a_reason(option: str, what: str, tmp_path: Path) -> None:
    imported = supervisord.read([("s", f"[program:x]\ncommand=run\n{option}\n")], here="/")
    assert left(imported)[what]
    assert "x" in loaded(imported, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "not a supervisord.conf"),
        ("[supervisord]\n", "no \\[program:NAME\\]"),
        ("[program:x]\n", "no command"),
        ("[program:x]\ncommand=a 'b\n", "no closing quotation"),
        ("[program:x]\ncommand=a\nnumprocs=many\n", "'many' is not a whole number"),
        ("[program:x]\ncommand=%(nope)s\n", "nope"),
        ("[program:x]\ncommand=a\nenvironment=A\n", "NAME=VALUE"),
        ("[program:x]\ncommand=a\nautorestart=maybe\n", "maybe"),
    ],
)
def test_a_bad_supervisord_conf_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        supervisord.read([("s.conf", text)], here="/")


# -- PM2


def test_an_app_of_pm2_becomes_a_fleet(tmp_path: Path) -> None:
    spec = of_pm2(
        {
            "name": "API Server",
            "script": "./server.js",
            "args": "--x 'a b'",
            "node_args": ["--trace-warnings"],
            "instances": "max",
            "env": {"NODE_ENV": "x", "N": 3, "YES": True, "NONE": None},
            "kill_timeout": 5000,
            "min_uptime": "10s",
            "exp_backoff_restart_delay": 100,
        },
        tmp_path,
    )
    assert (spec.name, spec.replicas, spec.cwd) == ("api-server", 8, str(tmp_path))
    assert spec.command == ("node", "--trace-warnings", "./server.js", "--x", "a b")
    assert spec.environment == {"NODE_ENV": "x", "N": "3", "YES": "true"}
    assert (spec.stop_signal, spec.graceful_drain.timeout_seconds, spec.restart.healthy_after_seconds) == ("INT", 5.0, 10.0)
    assert (spec.restart.backoff_seconds, spec.restart.backoff_cap_seconds) == (0.1, 15.0)


@pytest.mark.parametrize(
    ("app", "command"),
    [
        ({"script": "w.py"}, ("python3", "w.py")),
        ({"script": "w.py", "interpreter": "pypy"}, ("pypy", "w.py")),
        ({"script": "./w", "interpreter": "none"}, ("./w",)),
        ({"script": "npm", "args": ["start"]}, ("npm", "start")),
        ({"script": "a.js", "interpreter": "node@18"}, ("node", "a.js")),
        ({"script": "run.sh", "interpreter_args": "-x"}, ("bash", "-x", "run.sh")),
    ],
)
def test_interpreters_are_those_of_pm2(app: dict[str, object], command: tuple[str, ...], tmp_path: Path) -> None:
    assert of_pm2(app, tmp_path).command == command


@pytest.mark.parametrize(
    ("instances", "replicas"), [(3, 3), ("3", 3), (0, 8), ("max", 8), (-1, 7), (-20, 1), ("many", 1), (120, 120)], ids=str
)
def test_instances_of_pm2(instances: object, replicas: int, tmp_path: Path) -> None:
    assert of_pm2({"script": "a.js", "instances": instances}, tmp_path).replicas == replicas


def test_a_variable_that_counts_up_does_so_here(tmp_path: Path) -> None:
    spec = of_pm2({"script": "a.js", "instances": 2, "increment_var": "NUMBER", "env": {"NUMBER": 7}}, tmp_path)
    assert (spec.command, spec.shell) == (('export NUMBER="$((7 + FLEETCTL_SLOT))"; exec node a.js',), True)
    assert "NUMBER" not in spec.environment


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"watch": True}, "watch = true"),
        ({"cron_restart": "0 * * * *"}, "cron_restart = 0 * * * *"),
        ({"exec_mode": "cluster"}, "exec_mode = cluster"),
        ({"wait_ready": True}, "wait_ready = true"),
        ({"out_file": "x.log"}, "out_file = x.log"),
        ({"env_production": {"A": "1"}}, "env_production"),
        ({"instances": 2}, "NODE_APP_INSTANCE"),
        ({"stop_exit_codes": [0, 143]}, "stop_exit_codes 143"),
        ({"restart_delay": 99_999_999}, "restart_delay, in milliseconds (restart.backoff_seconds)"),
        ({"frobnicate": 1}, "frobnicate"),
    ],
)
def test_what_pm2_does_besides_is_told(more: dict[str, object], what: str, tmp_path: Path) -> None:
    imported = pm2.read(json.dumps([{"script": "a.js", **more}]), "e.json")
    assert left(imported)[what]
    assert loaded(imported, tmp_path)


def test_another_environment_is_taken_over_the_first(tmp_path: Path) -> None:
    text = json.dumps([{"script": "a.js", "env": {"A": "1", "B": "1"}, "env_production": {"B": "2"}}])
    (spec,) = loaded(pm2.read(text, "e", environment="production"), tmp_path).values()
    assert spec.environment == {"A": "1", "B": "2"}


def test_running_processes_of_one_name_are_one_fleet_and_their_environment_stays_out(tmp_path: Path) -> None:
    about = {"pm_exec_path": "/srv/a.js", "pm_cwd": "/srv", "exec_interpreter": "node", "exec_mode": "cluster_mode", "instances": 2}
    entry = {"name": "api", "pm_id": 0, "pm2_env": {**about, "name": "api", "env": {"SECRET": "s3cret", "PATH": "/bin"}, "watch": False}}
    imported = pm2.read(json.dumps([entry, {**entry, "pm_id": 1}]), "stdin")
    spec = loaded(imported, tmp_path)["api"]
    assert (spec.command, spec.cwd, spec.replicas) == (("node", "/srv/a.js"), "/srv", 2)
    assert "s3cret" not in to_toml(imported, "-")
    assert "2 variables" in left(imported)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[]", []),
        ("module.exports = { a: 1, 'b': [1, 2,], };", {"a": 1, "b": [1, 2]}),
        ("// x\nexport default {a: `y`, /* z */ b: 5 * 60 * 1000, c: undefined}", {"a": "y", "b": 300_000, "c": None}),
        ('"use strict";\nmodule.exports={n:-1.5,h:0x1F,t:true}', {"n": -1.5, "h": 31, "t": True}),
        (r"""{a: 'it\'s', b: "x\u0041\n", $c_1: '//no'}""", {"a": "it's", "b": "xA\n", "$c_1": "//no"}),
    ],
)
def test_javascript_that_is_data_is_read(text: str, value: object) -> None:
    assert literal.read(text) == value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("const os = require('os');\nmodule.exports = {}", 1),
        ("module.exports = {\n  a: process.env.A }", 2),
        ("{a: `x${y}`}", 1),
        ("{a: 1 + 2}", 1),
        ("{a: 1", 1),
        ("{a}", 1),
        ("[1 2]", 1),
        ("{...x}", 1),
        ("{a: true.x}", 1),
        ("", 1),
        ("[" * 100, 1),
        ("{a: 'open\n'}", 1),
    ],
)
def test_javascript_that_has_to_run_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(literal.NotPlain) as caught:
        literal.read(text)
    assert caught.value.line == line


@given(st.text(alphabet="{}[]:,'\"`\\/*$. \nabx10-", max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(literal.NotPlain):
        json.dumps(literal.read(text))


@pytest.mark.parametrize("text", ['{"apps": 3}', "[1]", '{"apps": []}', '[{"name": "x"}]', '[{"script": 3}]', "3"])
def test_a_bad_file_of_pm2_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        pm2.read(text, "e.json")


# -- whatever is in it

_names = st.text(string.ascii_letters + "_-é", min_size=1, max_size=12)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "script": st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
                    str.strip
                )
            },
            optional={"name": _texts, "args": _texts | st.lists(_texts), "env": st.dictionaries(_names, _texts, max_size=3)}
            | {"cwd": _texts, "kill_timeout": st.integers() | _texts, "instances": st.integers() | _texts},
        ),
        min_size=1,
        max_size=3,
    )
)
def test_every_file_of_pm2_is_refused_or_becomes_a_valid_fleet_toml(apps: list[dict[str, object]]) -> None:
    import tomllib

    try:
        imported = pm2.read(json.dumps(apps), "e.json")
    except ConfigError:
        return
    for values in tomllib.loads(to_toml(imported, "e.json"))["fleet"]:
        config.spec_from_json(values)


# -- the command


def test_import_prints_what_config_check_accepts(fleetctl: Fleetctl) -> None:
    Path("Procfile").write_text("web: sleep 100\nloop: while :; do sleep 1; done\n")
    made = fleetctl("import", "Procfile")
    Path("fleet.toml").write_text(made.out)
    assert made.status == 0
    assert fleetctl("config", "check").out == "fleet.toml is valid: web, loop\n"
    assert "web: carried over from web, line 1: command" in made.err
    assert "not carried over: variables of your shell" in made.err


def test_import_never_writes_over_a_file_unless_told(fleetctl: Fleetctl) -> None:
    Path("Procfile").write_text("web: sleep 100\n")
    Path("fleet.toml").write_text("mine")
    refused = fleetctl("import", "Procfile", "--output", "fleet.toml")
    assert (refused.status, Path("fleet.toml").read_text()) == (6, "mine")
    assert "--force" in refused.err
    assert fleetctl("import", "Procfile", "--output", "fleet.toml", "--force").status == 0
    assert fleetctl("config", "check").status == 0


def test_import_into_another_folder_still_finds_the_app(fleetctl: Fleetctl) -> None:
    for folder in ("app", "deploy"):
        Path(folder).mkdir()
    Path("app/Procfile").write_text("web: ./run\n")
    Path("app/.env").write_text("A=1\n")
    shutil.copy("/bin/true", "app/run")
    assert fleetctl("import", "app/Procfile", "-o", "deploy/fleet.toml").status == 0
    assert fleetctl("config", "check", "deploy/fleet.toml").status == 0


def test_supervisords_included_files_are_read_too(fleetctl: Fleetctl) -> None:
    Path("conf.d").mkdir()
    Path("conf.d/a.conf").write_text("[program:a]\ncommand=sleep 1\n")
    Path("main.conf").write_text("[supervisord]\n[include]\nfiles = conf.d/*.conf none/*.conf\n")
    result = fleetctl("import", "main.conf", "--json")
    assert [fleet["name"] for fleet in json.loads(result.out)["fleets"]] == ["a"]
    assert "no file is none/*.conf" in result.err


def test_what_is_not_on_this_machine_is_told_and_written_all_the_same(fleetctl: Fleetctl) -> None:
    Path("Procfile").write_text("web: no-such-program\n")
    result = fleetctl("import", "Procfile")
    assert result.status == 0
    assert "look at this first: fleet web" in result.err


@pytest.mark.parametrize(
    ("name", "text", "status", "said"),
    [
        ("nowhere", None, 6, "No such file"),
        ("x.yaml", "apps:\n", 6, "YAML"),
        ("x", "what is this?\n", 6, "--format"),
        ("ecosystem.config.js", "module.exports = require('./x')", 6, "node -p"),
        ("Procfile", "a\0b: \x1b[31m", 6, "Procfile:1"),
        ("bin", b"\xff\xfe", 6, "not UTF-8"),
    ],
)
def test_bad_files_are_refused_with_what_to_try(fleetctl: Fleetctl, name: str, text: str | bytes | None, status: int, said: str) -> None:
    if text is not None:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    result = fleetctl("import", name)
    assert (result.status, result.out) == (status, "")
    assert said in result.err
    assert "\x1b" not in result.err


@pytest.mark.parametrize("arguments", [("Procfile", "--format", "compose"), ("Procfile", "--env", "production")])
def test_wrong_words_are_refused(fleetctl: Fleetctl, arguments: tuple[str, ...]) -> None:
    Path("Procfile").write_text("web: sleep 1\n")
    assert fleetctl("import", *arguments).status == 2
