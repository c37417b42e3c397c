"""fleet.toml, environment and flags to a spec: what is accepted, where each value came from, and what each mistake is told as."""

import dataclasses
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from fleetctl import config
from fleetctl.errors import ConfigError
from fleetctl.models import FleetSpec, LogSpec, RestartPolicy, RestartSpec

HEAD = '[fleet]\nname = "web"\ncommand = ["sleep", "60"]\n'
UNTRUSTED = HEAD + 'trust_level = "untrusted"\n'
MINIMAL: Mapping[str, Any] = {"name": "web", "command": ["sleep", "60"]}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FLEETCTL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, text: str, overrides: Mapping[str, object] | None = None) -> list[config.Loaded]:
    path = folder / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return config.load_file(path, overrides)


def load_one(folder: Path, text: str, overrides: Mapping[str, object] | None = None) -> config.Loaded:
    (loaded,) = load(folder, text, overrides)
    return loaded


def failure(folder: Path, text: str, overrides: Mapping[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, overrides)
    return caught.value.message


# What is accepted


def test_smallest_file_gives_the_defaults_and_the_files_folder(folder: Path) -> None:
    loaded = load_one(folder, HEAD)
    assert loaded.spec == FleetSpec(name="web", command=("sleep", "60"), cwd=str(folder))
    assert loaded.sources["name"] == "fleet.toml line 2"
    assert loaded.sources["command"] == "fleet.toml line 3"
    assert loaded.sources["cwd"] == "default"
    assert set(loaded.sources) == {info.key for info in config.settings()}


FULL = """
# two comments
[fleet]
name = "web"
command = [
  "python3", "worker.py",
]
cwd = "work"
environment = { LANG = "C.UTF-8", "EMPTY" = "" }
env_file = "../.env"
secret_env.API_KEY = "env:MY_KEY"
secret_env.CERT = "file:cert.pem"
replicas = 5
max_replicas = 8
stop_signal = "SIGINT"
restart.policy = "on-failure"

[fleet.readiness]
settle_seconds = 2

[fleet.graceful_drain]
timeout_seconds = 1.5
"""


def test_full_file_is_read_whole(folder: Path) -> None:
    loaded = load_one(folder, FULL)
    spec = loaded.spec
    assert spec.command == ("python3", "worker.py")
    assert spec.cwd == str(folder / "work")
    assert spec.environment == {"LANG": "C.UTF-8", "EMPTY": ""}
    assert spec.env_file == str(folder.parent / ".env")
    assert spec.secret_env == {"API_KEY": "env:MY_KEY", "CERT": f"file:{folder}/cert.pem"}
    assert (spec.replicas, spec.max_replicas) == (5, 8)
    assert spec.stop_signal_number == signal.SIGINT
    assert spec.restart == RestartSpec(policy=RestartPolicy.ON_FAILURE)
    assert spec.readiness.settle_seconds == 2.0
    assert spec.graceful_drain.timeout_seconds == 1.5
    assert {key: loaded.sources[key] for key in ("environment", "replicas", "restart.policy", "readiness.settle_seconds", "logs.keep")} == {
        "environment": "fleet.toml line 9",
        "replicas": "fleet.toml line 13",
        "restart.policy": "fleet.toml line 16",
        "readiness.settle_seconds": "fleet.toml line 19",
        "logs.keep": "default",
    }


def test_section_at_the_top_belongs_to_the_one_fleet(folder: Path) -> None:
    loaded = load_one(folder, "[logs]\nkeep = 2\n" + HEAD)
    assert loaded.spec.logs == LogSpec(keep=2)
    assert loaded.sources["logs.keep"] == "fleet.toml line 2"


def test_several_fleets_keep_their_order_and_their_lines(folder: Path) -> None:
    text = '[[fleet]]\nname = "b"\ncommand = ["b"]\n[fleet.logs]\nkeep = 1\n[[fleet]]\nname = "a"\ncommand = ["a"]\nlogs = { keep = 7 }\n'
    first, second = load(folder, text)
    assert [first.spec.name, second.spec.name] == ["b", "a"]
    assert [first.spec.logs.keep, second.spec.logs.keep] == [1, 7]
    assert [first.sources["logs.keep"], second.sources["logs.keep"]] == ["fleet.toml line 5", "fleet.toml line 9"]


@pytest.mark.parametrize("command", ['"echo a | cat"', '["echo a | cat"]'])
def test_shell_command_is_one_string(folder: Path, command: str) -> None:
    spec = load_one(folder, f'[fleet]\nname = "web"\nshell = true\ncommand = {command}\n').spec
    assert (spec.shell, spec.command) == (True, ("echo a | cat",))


def test_home_directory_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_one(folder, HEAD + 'cwd = "~/x"\n').spec.cwd == "/home/somebody/x"


def test_paths_of_a_sandbox_are_the_files_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    spec = load_one(folder, UNTRUSTED + '[fleet.sandbox]\nread_only_paths = ["data", "~/tools"]\nread_write_paths = ["/srv/work"]\n').spec
    assert spec.sandbox.read_only_paths == (str(folder / "data"), "/home/somebody/tools")
    assert spec.sandbox.read_write_paths == ("/srv/work",)


def test_zero_replicas_keep_the_fleet_and_run_none(folder: Path) -> None:
    assert load_one(folder, HEAD + "replicas = 0\nmin_replicas = 2\n").spec.replicas == 0


def test_where_only_the_minimum_is_given_that_many_are_wanted(folder: Path) -> None:
    assert load_one(folder, HEAD + "min_replicas = 3\n").spec.replicas == 3
    assert load_one(folder, HEAD + "min_replicas = 0\n").spec.replicas == 1


def test_byte_order_mark_and_crlf_are_no_obstacle(folder: Path) -> None:
    (folder / "fleet.toml").write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode())
    (loaded,) = config.load_file(folder / "fleet.toml")
    assert loaded.sources["command"] == "fleet.toml line 3"


def test_relative_path_to_the_file_counts_from_the_current_directory(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "fleet.toml").write_text(HEAD)
    (loaded,) = config.load_file(Path("sub/fleet.toml"))
    assert loaded.spec.cwd == str(folder / "sub")
    assert loaded.sources["name"] == "sub/fleet.toml line 2"


# Environment and flags


def test_flag_wins_over_environment_over_file_over_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = HEAD + "replicas = 2\nmax_replicas = 20\nstop_signal = 'HUP'\n"
    monkeypatch.setenv("FLEETCTL_REPLICAS", "3")
    monkeypatch.setenv("FLEETCTL_MAX_REPLICAS", "30")
    loaded = load_one(folder, text, {"replicas": 4, "min_replicas": None, "logs.keep": 9})
    assert (loaded.spec.replicas, loaded.spec.max_replicas, loaded.spec.stop_signal, loaded.spec.logs.keep) == (4, 30, "HUP", 9)
    assert [loaded.sources[key] for key in ("replicas", "max_replicas", "stop_signal", "min_replicas", "logs.keep")] == [
        "--replicas",
        "FLEETCTL_MAX_REPLICAS",
        "fleet.toml line 6",
        "default",
        "--logs-keep",
    ]


def test_variables_that_fleetctl_gives_to_agents_are_no_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLEET", "AGENT_ID", "SLOT", "TOKEN", "STATE_DIR", "LAUNCH", "SHELL", "COMMAND", "ENVIRONMENT", "SPEC_HASH"):
        monkeypatch.setenv(f"FLEETCTL_{name}", "7")
    assert load_one(folder, HEAD).spec == FleetSpec(name="web", command=("sleep", "60"), cwd=str(folder))


def test_directories_from_outside_the_file_count_from_the_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.setenv("FLEETCTL_CWD", "x")
    monkeypatch.chdir(folder / "elsewhere")
    loaded = load_one(folder, HEAD + "cwd = 'y'\n")
    assert (loaded.spec.cwd, loaded.sources["cwd"]) == (str(folder / "elsewhere" / "x"), "FLEETCTL_CWD")


def test_empty_variable_is_not_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETCTL_REPLICAS", "")
    assert load_one(folder, HEAD).sources["replicas"] == "default"


def test_flag_applies_to_every_fleet_of_a_file_but_a_name_to_one(folder: Path) -> None:
    text = '[[fleet]]\nname = "a"\ncommand = ["x"]\n[[fleet]]\nname = "b"\ncommand = ["x"]\n'
    assert [loaded.spec.replicas for loaded in load(folder, text, {"replicas": 4})] == [4, 4]
    assert failure(folder, text, {"name": "c"}) == "--name names one fleet, and fleet.toml has 2"


@pytest.mark.parametrize(
    ("overrides", "variables", "message"),
    [
        ({"replicas": 10000}, {}, "--replicas 10000 is more than max_replicas (100); raise max_replicas or ask for fewer"),
        ({"replicas": -1}, {}, "--replicas -1: must be a whole number from 0 to 100000"),
        ({"min_replicas": 7, "max_replicas": 3}, {}, "--min 7 is more than max_replicas (3); raise max_replicas or lower min_replicas"),
        ({"warm_pool.size": -3}, {}, "--warm -3: must be a whole number from 0 to 1000"),
        ({"name": "Web"}, {}, '--name "Web": must be 1 to 40 lower-case letters, digits and dashes'),
        ({"replica": 3}, {}, "--replica: no such setting; did you mean replicas?"),
        ({}, {"FLEETCTL_REPLICAS": "ten"}, 'FLEETCTL_REPLICAS="ten": must be a whole number from 0 to 100000'),
        ({}, {"FLEETCTL_REPLICAS": "9" * 5000}, 'FLEETCTL_REPLICAS="999'),
        ({}, {"FLEETCTL_STOP_SIGNAL": "TREM"}, 'FLEETCTL_STOP_SIGNAL="TREM": no such signal; did you mean TERM?'),
    ],
)
def test_bad_value_from_outside_names_the_flag_or_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object], variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert failure(folder, HEAD, overrides).startswith(message)


def test_flag_that_contradicts_the_file_points_to_the_file(folder: Path) -> None:
    message = failure(folder, HEAD + "replicas = 2\n", {"min_replicas": 5})
    assert message.startswith("fleet.toml:4: fleet.replicas = 2 is less than min_replicas (5); ")


# What is refused, and how it is told

ARRAY = '[[fleet]]\nname = "a"\ncommand = ["x"]\n'
MISTAKES = [
    # syntax
    ("[fleet]\nname = \n", ["fleet.toml:2:8: not valid TOML: Invalid value"]),
    ("[fleet]\nname = 'a'\nname = 'b'\n", ["fleet.toml:3:", "not valid TOML: Cannot overwrite a value"]),
    ('[fleet]\nname = "\x1b[31m"\n', ["fleet.toml:2:9: not valid TOML", "\\x1b"]),
    ("[fleet]\nreplicas = " + "9" * 5000, ["fleet.toml: not valid TOML"]),
    ("a = " + "[" * 5000 + "]" * 5000, ["fleet.toml: nested too deeply"]),
    # the sandbox
    (HEAD + "[fleet.sandbox]\nnetwork = true\n", ["sandbox", 'only agents with trust_level = "untrusted" have one']),
    (UNTRUSTED + "port_base = 8000\n", ["port_base = 8000", "nobody reaches an agent without a network; declare a socket"]),
    (UNTRUSTED + '[fleet.readiness]\nexec = ["./check"]\n', ["readiness.exec", "would run outside of the sandbox"]),
    (UNTRUSTED + '[fleet.liveness]\nexec = ["./check"]\n', ["liveness.exec", "would run outside of the sandbox"]),
    (UNTRUSTED + '[fleet.checkpoints]\ncommand = ["./save"]\n', ["checkpoints.command", "would run outside of the sandbox"]),
    (UNTRUSTED + "[fleet.resource_limits]\npids_limit = 2\n", ["pids_limit = 2", "must be 3 or more for an agent in a sandbox"]),
    (UNTRUSTED + '[fleet.sandbox]\nread_only_paths = "/srv"\n', ["read_only_paths", "list of text"]),
    # the tables
    ("", ["fleet.toml has no [fleet] table"]),
    ("# nothing\n", ["fleet.toml has no [fleet] table"]),
    ("[fleets]\nname = 'a'\n", ["fleet.toml:1: fleets: no such table; did you mean fleet?"]),
    ("fleet = 3\n", ["fleet.toml:1: fleet = 3: must be a table, [fleet], or several, [[fleet]]"]),
    ("fleet = []\n", ["fleet.toml:1: fleet = []: must be a table"]),
    ("fleet = [\n3]\n", ["fleet.toml:2: fleet[0] = 3: must be a table"]),
    ("replicas = 3\n" + HEAD, ["fleet.toml:1: replicas: no such setting here; it belongs in [fleet]"]),
    (HEAD + "keep = 3\n", ["fleet.toml:4: fleet.keep: no such setting here; it belongs in [fleet.logs]"]),
    (HEAD + "[database]\nurl = 'x'\n", ["fleet.toml:4: database: no such table; there are fleet, restart, "]),
    (HEAD + "[fleet.logs]\nkeep = 1\n[logs]\nkeep = 2\n", ["fleet.toml:6: logs is also written as [fleet.logs]; keep one of them"]),
    (ARRAY + "[logs]\nkeep = 2\n", ["fleet.toml:4: logs: with several fleets, write [fleet.logs] below the [[fleet]] it is for"]),
    (ARRAY + "\n" + ARRAY, ['fleet.toml:6: fleet[1].name = "a": another fleet of this file has this name']),
    # keys
    (HEAD + "replica = 3\n", ["fleet.toml:4: fleet.replica: no such setting; did you mean replicas?"]),
    (HEAD + "min-replicas = 3\n", ["fleet.toml:4: fleet.min-replicas: no such setting; did you mean min_replicas?"]),
    (HEAD + '"a\\nb" = 3\n', ['fleet.toml:4: fleet."a\\nb": no such setting']),
    (HEAD + "\n[fleet.restart]\npolcy = 'always'\n", ["fleet.toml:6: fleet.restart.polcy: no such setting; did you mean policy?"]),
    (HEAD + "restart = { policy = 'always', polcy = 'x' }\n", ["fleet.toml:4: fleet.restart.polcy: no such setting"]),
    ("[fleet]\ncommand = ['x']\n", ["fleet.toml:1: fleet.name is missing; it must be 1 to 40 lower-case"]),
    ("[fleet]\nname = 'x'\n", ["fleet.toml:1: fleet.command is missing; it must be a list of the program and its arguments"]),
    # types
    (HEAD + '\n\n\nreplicas = "five"\n', ['fleet.toml:7: fleet.replicas = "five": must be a whole number from 0 to 100000']),
    (HEAD + 'replicas = "5"\n', ['fleet.toml:4: fleet.replicas = "5": must be a whole number']),
    (HEAD + "replicas = 5.0\n", ["fleet.toml:4: fleet.replicas = 5: must be a whole number"]),
    (HEAD + "replicas = true\n", ["fleet.toml:4: fleet.replicas = true: must be a whole number"]),
    (HEAD + "replicas = [1]\n", ["fleet.toml:4: fleet.replicas = a list: must be a whole number"]),
    (HEAD + "replicas = 2024-01-01\n", ["fleet.toml:4: fleet.replicas = 2024-01-01: must be"]),
    (HEAD + "cwd = 2024-01-01\n", ["fleet.toml:4: fleet.cwd = 2024-01-01: must be put in quotes"]),
    (HEAD + "shell = 'yes'\n", ['fleet.toml:4: fleet.shell = "yes": must be true or false']),
    (HEAD + "logs = 3\n", ["fleet.toml:4: fleet.logs = 3: must be a table"]),
    (HEAD + "env_file = ''\n", ["fleet.toml:4: fleet.env_file", "must be a file's name"]),
    (HEAD + "cwd = ''\n", ['fleet.toml:4: fleet.cwd = "": must be text in quotes, not empty']),
    (
        HEAD + "[fleet.readiness]\nsettle_seconds = '1'\n",
        ['fleet.toml:5: fleet.readiness.settle_seconds = "1": must be a number from 0 to 3600'],
    ),
    (HEAD + "[fleet.readiness]\nsettle_seconds = nan\n", ["fleet.toml:5: fleet.readiness.settle_seconds = nan: must be a number"]),
    # ranges
    (HEAD + "replicas = -1\n", ["fleet.toml:4: fleet.replicas = -1: must be a whole number from 0 to 100000"]),
    (HEAD + "replicas = 9" + "9" * 30, ["fleet.toml:4: fleet.replicas = a huge number: must be a whole number from 0 to 100000"]),
    (HEAD + "max_replicas = 0\n", ["fleet.toml:4: fleet.max_replicas = 0: must be a whole number from 1 to 100000"]),
    (
        HEAD + "replicas = 10000\n",
        ["fleet.toml:4: fleet.replicas = 10000 is more than max_replicas (100); raise max_replicas or ask for fewer"],
    ),
    (HEAD + "min_replicas = 9\nmax_replicas = 3\n", ["fleet.toml:4: fleet.min_replicas = 9 is more than max_replicas (3)"]),
    (HEAD + "replicas = 2\nmin_replicas = 3\n", ["fleet.toml:4: fleet.replicas = 2 is less than min_replicas (3)"]),
    (HEAD + "restart.backoff_seconds = 0\n", ["fleet.restart.backoff_seconds = 0: must be a number from 0.01 to 3600"]),
    (HEAD + "restart.backoff_seconds = 90\n", ["fleet.restart.backoff_seconds = 90 is more than backoff_cap_seconds (60)"]),
    (HEAD + "logs.total_bytes = 5000\n", ["fleet.logs.total_bytes = 5000 is less than max_bytes (10485760)"]),
    (HEAD + "restart.policy = 'sometimes'\n", ['fleet.restart.policy = "sometimes": must be one of "never", "on-failure", "always"']),
    (HEAD + "restart.healthy_after_seconds = 0\n", ["must be a number above 0, at most 86400"]),
    # names
    ("[fleet]\nname = 'My_Fleet'\ncommand = ['x']\n", ['fleet.toml:2: fleet.name = "My_Fleet": must be 1 to 40 lower-case letters']),
    ("[fleet]\nname = '-a'\ncommand = ['x']\n", ['fleet.name = "-a": must be 1 to 40']),
    ("[fleet]\nname = ''\ncommand = ['x']\n", ['fleet.name = "": must be 1 to 40']),
    ("[fleet]\nname = 'a\\n'\ncommand = ['x']\n".replace("'a\\n'", '"a\\n"'), ["fleet.name = ", "must be 1 to 40"]),
    (f"[fleet]\nname = '{'a' * 41}'\ncommand = ['x']\n", ["must be 1 to 40 lower-case letters"]),
    ("[fleet]\nname = '../x'\ncommand = ['x']\n", ["must be 1 to 40 lower-case letters"]),
    # commands
    ("[fleet]\nname = 'a'\ncommand = []\n", ["fleet.toml:3: fleet.command = []: must be a list of the program and its arguments"]),
    ("[fleet]\nname = 'a'\ncommand = ['']\n", ["fleet.command", "the first item is empty; it names the program"]),
    ("[fleet]\nname = 'a'\ncommand = ['x',\n 3]\n", ["fleet.toml:4: fleet.command[1] = 3: must be text in quotes"]),
    (
        "[fleet]\nname = 'a'\ncommand = \"python 'a b.py' -v\"\n",
        ['must be a list; write command = ["python", "a b.py", "-v"], or add shell = true to have /bin/sh run it'],
    ),
    ("[fleet]\nname = 'a'\ncommand = \"it's\"\n", ["must be a list; write it as the program and its arguments, or add shell = true"]),
    ("[fleet]\nname = 'a'\nshell = true\ncommand = ['a', 'b']\n", ["with shell = true the command is one string, or a list of one"]),
    ("[fleet]\nname = 'a'\nshell = true\ncommand = ' '\n", ["fleet.command", "is empty"]),
    ('[fleet]\nname = "a"\ncommand = ["a\\u0000"]\n', ["fleet.toml:3: fleet.command[0]: holds a NUL character"]),
    (f"[fleet]\nname = 'a'\ncommand = ['x', '{'y' * 131072}']\n", ["fleet.command[1]: is longer than 131071 bytes"]),
    (HEAD + 'cwd = "a\\u0000b"\n', ["fleet.toml:4: fleet.cwd: holds a NUL character"]),
    # signals
    (HEAD + "stop_signal = 'TREM'\n", ['fleet.toml:4: fleet.stop_signal = "TREM": no such signal; did you mean TERM?']),
    (HEAD + "stop_signal = 'term'\n", ["no such signal; did you mean TERM?"]),
    (HEAD + "stop_signal = 'SIGKIL'\n", ["no such signal; did you mean KILL?"]),
    (HEAD + "stop_signal = 15\n", ["fleet.stop_signal = 15: must be the name of a signal, like TERM or INT"]),
    # to zero
    (
        HEAD + "min_replicas = 1\n[fleet.autoscaling]\nidle_seconds = 70.0\n[fleet.sockets]\nhttp = '127.0.0.1:0'\n",
        ["fleet.toml:6: fleet.autoscaling.idle_seconds = 70: needs min_replicas = 0, or the fleet is never without agents (it is 1)"],
    ),
    (
        HEAD + "min_replicas = 0\n[fleet.autoscaling]\nidle_seconds = 70\n",
        ["idle_seconds = 70: nothing would tell of work while there is no agent; give [fleet.sockets], or a metric with a target"],
    ),
    (
        HEAD + "min_replicas = 0\n[fleet.autoscaling]\nidle_seconds = 70\n[fleet.autoscaling.metrics.jobs]\ntarget = 5\nagents = 'jobs'\n",
        ["idle_seconds = 70: nothing would tell of work while there is no agent"],
    ),
    (
        HEAD + "min_replicas = 0\n[fleet.autoscaling]\nidle_seconds = 70\nmin_available = 1\n[fleet.sockets]\nhttp = '127.0.0.1:0'\n",
        ["idle_seconds = 70: min_available keeps agents that have nothing to do; leave one of the two out"],
    ),
    (HEAD + "[fleet.autoscaling]\nidle_seconds = 0\n", ["idle_seconds = 0: must be a number above 0, at most 86400"]),
    (
        HEAD + "max_replicas = 5\n[fleet.autoscaling]\nmin_available = 6\n",
        ["fleet.toml:6: fleet.autoscaling.min_available = 6 is more than max_replicas (5)"],
    ),
    (
        HEAD + "max_replicas = 5\n[fleet.autoscaling]\nfallback_replicas = 7\n",
        ["fleet.toml:6: fleet.autoscaling.fallback_replicas = 7 is more than max_replicas (5)"],
    ),
    (
        HEAD + '[fleet.autoscaling]\nscale_up_rates = ["4 per 15 s", "many"]\n',
        ['fleet.toml:5: fleet.autoscaling.scale_up_rates[1] = "many": must be like "4 per 15 s" or "100% per 15 s"'],
    ),
    (
        HEAD + '[fleet.autoscaling]\nscale_down_rates = ["1 per 0 s"]\n',
        ['fleet.autoscaling.scale_down_rates[0] = "1 per 0 s": must be like "4 per 15 s" or "100% per 15 s"'],
    ),
    (
        HEAD + "[fleet.autoscaling]\ntarget_memory_utilization = 80\n",
        ["fleet.autoscaling.target_memory_utilization = 80: needs resource_limits.memory_limit_mb, of which it is a part"],
    ),
    (HEAD + "[fleet.autoscaling]\nuse_cpu = false\n", ["fleet.autoscaling.use_cpu = false: nothing else is measured"]),
    (
        HEAD + "[fleet.autoscaling]\nwindow_seconds = 2\n",
        ["fleet.autoscaling.window_seconds = 2 is less than metrics_interval_seconds (5)"],
    ),
    *(
        (HEAD + f"[fleet.autoscaling.metrics.{name}]\n{text}\n", [f"fleet.autoscaling.metrics.{name}{said}"])
        for name, text, said in [
            ("queue", "target = 5", ": has no source; give exactly one of command, file, http, redis, python, agents, formula"),
            ("queue", 'target = 5\nfile = "a"\nhttp = "http://127.0.0.1/"', ": has file and http; give exactly one"),
            ("cpu", 'target = 5\nfile = "a"', ": this name stands for what fleetctl measures itself"),
            ("Queue", 'target = 5\nfile = "a"', ": is no name for a metric"),
            ("queue", 'target = 0\nfile = "a"', ".target = 0"),
            ("queue", 'target = 5\nhttp = "http://192.0.2.1/x"', '.http = "http://192.0.2.1/x": asks another machine'),
            ("queue", 'target = 5\nhttp = "https://127.0.0.1/"', '.http = "https://127.0.0.1/": must be like'),
            ("queue", 'target = 5\nredis = "FLUSHALL now"', '.redis = "FLUSHALL now": must be LLEN'),
            ("queue", 'target = 5\nredis = "LLEN q"\nredis_url = "q"', ".redis_url: must be redis://"),
            ("queue", 'target = 5\npython = "os.system"', '.python = "os.system": must be like "package.module:function"'),
            ("queue", "target = 5\nformula = \"open('x')\"", ".formula"),
            ("queue", 'target = 5\nformula = "nothing + 1"', '.formula = "nothing + 1": no metric nothing; there are cpu'),
        ]
    ),
    *(
        (HEAD + f"[[fleet.autoscaling.schedules]]\n{text}\n", [f"fleet.autoscaling.schedules[0]{said}"])
        for text, said in [
            ('cron = "0 0 31 2 *"\nduration_seconds = 60', '.cron = "0 0 31 2 *": names a day that no month has'),
            ('cron = "0 25 * * *"\nduration_seconds = 60', ".cron = \"0 25 * * *\": '25' is not within 0 to 23"),
            ('cron = "0 5 * * *"\nduration_seconds = 60\ntimezone = "Mars/North"', '.timezone = "Mars/North": no such time zone here'),
            (
                'cron = "0 5 * * *"\nduration_seconds = 60\nmin_replicas = 5\nmax_replicas = 4',
                ".min_replicas = 5 is more than max_replicas (4)",
            ),
            ('cron = "0 5 * * *"\nduration_seconds = 5', ".duration_seconds"),
        ]
    ),
    (HEAD + "target_cpu_utilization = 95\n", ["fleet.target_cpu_utilization = 95: must be a number above 0, at most 90"]),
    (HEAD + '[fleet.autoscaling]\nmode = "maybe"\n', ['fleet.autoscaling.mode = "maybe": must be one of "act", "recommend"']),
    (HEAD + "[graceful_drain]\ndrain_signal = 'USR3'\n", ['graceful_drain.drain_signal = "USR3": no such signal; did you mean USR2?']),
    (HEAD + "[graceful_drain]\ncheckpoint_signal = 'KILL'\n", ['graceful_drain.checkpoint_signal = "KILL": no agent can act on KILL']),
]
SECRET_MISTAKES = [
    ('environment = "SECRET"', "fleet.toml:4: fleet.environment: must be a table of NAME"),
    ('environment.A = ["SECRET"]', "fleet.toml:4: fleet.environment.A: must be text in quotes"),
    ('environment.A = ["SECRET\\u0000"]', "fleet.environment.A"),
    ('environment = { "A B" = "SECRET" }', "fleet.environment.\"A B\": not a variable's name"),
    ('environment = { "" = "SECRET" }', "not a variable's name"),
    ('environment = { "A=B" = "SECRET" }', "not a variable's name"),
    ('environment = { "1A" = "SECRET" }', "not a variable's name"),
    ('environment = { "A\\u0000" = "SECRET" }', "holds a NUL character"),
    ('environment.A = "SECRET\\u0000"', "fleet.environment.A: holds a NUL character"),
    ('environment.FLEETCTL_TOKEN = "SECRET"', "names that begin with FLEETCTL_ are fleetctl's own"),
    ('secret_env.FLEETCTL_TOKEN = "env:SECRET"', "names that begin with FLEETCTL_ are fleetctl's own"),
    ('secret_env.K = "SECRET"', 'fleet.secret_env.K: must say where the value is, "env:NAME" or "file:PATH"'),
    ('secret_env.K = "env:SECRET-1"', "must say where the value is"),
    ('secret_env.K = "file:"', "must say where the value is"),
    ('secret_env.K = 3', "fleet.secret_env.K: must be text in quotes"),
    ('environment.A = "SECRET"\nsecret_env.A = "env:B"', "fleet.toml:5: fleet.secret_env.A: is in environment too"),
    ('enviroment.A = "SECRET"', "fleet.enviroment: no such table; did you mean environment?"),
    ('enviroment.A = "SECRET\\u0000"', "fleet.enviroment"),
    ('restart.API_KEY = "SECRET"', "fleet.restart.API_KEY: no such setting"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), MISTAKES)
def test_mistake_is_told_with_its_place_and_what_is_allowed(folder: Path, text: str, parts: list[str]) -> None:
    message = failure(folder, text)
    missing = [part for part in parts if part not in message]
    assert not missing, message
    assert "\n" not in message, "one mistake is one line"
    assert message.isprintable()


@pytest.mark.parametrize(("line", "part"), SECRET_MISTAKES)
def test_value_that_may_be_secret_is_never_shown(folder: Path, line: str, part: str) -> None:
    message = failure(folder, HEAD + line + "\n")
    assert part in message
    assert "SECRET" not in message


def test_every_problem_of_a_file_is_listed_in_the_order_of_its_lines(folder: Path) -> None:
    text = '[fleet]\nreplica = 2\nname = "A"\ncommand = "x y"\nmax_replicas = 0\nstop_signal = "X"\n[fleet.logs]\nkeep = -1\n[[other]]\n'
    first, *lines = failure(folder, text).split("\n")
    assert first == "7 problems in fleet.toml:"
    assert [re.findall(r"^  fleet\.toml:(\d+): ", line) for line in lines] == [["2"], ["3"], ["4"], ["5"], ["6"], ["8"], ["9"]]


def test_problems_of_all_fleets_are_listed(folder: Path) -> None:
    message = failure(folder, '[[fleet]]\nname = "a"\n[[fleet]]\nname = "a"\ncommand = ["x"]\nreplicas = "x"\n')
    assert message.split("\n") == [
        "3 problems in fleet.toml:",
        "  fleet.toml:1: fleet[0].command is missing; it must be "
        'a list of the program and its arguments, like ["python3", "worker.py"]',
        '  fleet.toml:4: fleet[1].name = "a": another fleet of this file has this name',
        '  fleet.toml:6: fleet[1].replicas = "x": must be a whole number from 0 to 100000',
    ]  # fmt: skip


def test_list_of_problems_is_cut(folder: Path) -> None:
    message = failure(folder, HEAD + "[fleet.environment]\n" + "".join(f"A{index} = {index}\n" for index in range(200)))
    assert len(message.split("\n")) <= 33


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"[fleet]\nname = '\xff'\n", "fleet.toml:2: not UTF-8 text"), (b"#" * (1 << 20) + b"#", "longer than 1048576 bytes")],
)
def test_file_that_is_no_text_is_refused(folder: Path, content: bytes, part: str) -> None:
    (folder / "fleet.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(part)):
        config.load_file(folder / "fleet.toml")


def test_file_that_cannot_be_read_says_why(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^gone\.toml: No such file or directory$"):
        config.load_file(folder / "gone.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load_file(folder)


# Finding the file


def test_file_is_found_only_where_there_is_one(folder: Path) -> None:
    assert config.find_file(None, folder) is None
    (folder / "fleet.toml").write_text(HEAD)
    assert config.find_file(None, folder) == folder / "fleet.toml"
    assert config.find_file("fleet.toml", folder) == folder / "fleet.toml"
    assert config.find_file(str(folder / "fleet.toml"), Path("/")) == folder / "fleet.toml"


@pytest.mark.parametrize("name", ["gone.toml", "fleet.toml/x", "a\0b", "x" * 5000])
def test_given_file_that_is_missing_is_an_error(folder: Path, name: str) -> None:
    (folder / "fleet.toml").write_text(HEAD)
    with pytest.raises(ConfigError) as caught:
        config.find_file(name, folder)
    assert caught.value.message.isprintable()
    assert "config init" in caught.value.hint


def test_dangling_link_is_not_taken_for_no_file(folder: Path) -> None:
    (folder / "fleet.toml").symlink_to("nowhere")
    found = config.find_file(None, folder)
    assert found is not None
    with pytest.raises(ConfigError, match="No such file"):
        config.load_file(found)


# Commands without a file


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("sleep", "sleep"),
        ("./My_Worker.py", "my-worker"),
        ("/usr/bin/python3.11", "python3-11"),
        ("a" * 60, "a" * 40),
        ("./é", "fleet"),
        ("--", "fleet"),
    ],
)
def test_fleet_of_a_command_is_named_after_the_program(folder: Path, program: str, name: str) -> None:
    loaded = config.load_command([program, "1"], folder)
    assert loaded.spec == FleetSpec(name=name, command=(program, "1"), cwd=str(folder))
    assert (loaded.sources["command"], loaded.sources["replicas"]) == ("command line", "default")


def test_flags_apply_to_a_command_and_to_the_demo(folder: Path) -> None:
    assert config.load_command(["x"], folder, {"name": "n", "replicas": 3}).spec == FleetSpec(
        name="n", command=("x",), cwd=str(folder), replicas=3
    )
    demo = config.load_demo({"replicas": 5})
    assert demo.spec.name == "demo"
    assert demo.spec.command == (sys.executable, "-m", "fleetctl.demo")
    assert (demo.sources["replicas"], demo.sources["command"]) == ("--replicas", "default")


@pytest.mark.parametrize(("command", "part"), [([], "must be a list"), ([""], "names the program"), (["x", "\udcff"], "is not UTF-8 text")])
def test_bad_command_line_is_refused(folder: Path, command: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        config.load_command(command, folder)


# JSON from clients and from the state directory

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["x\0", "\ud800", 10**30, -(10**400)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("\udfff"), inner, max_size=4),
    max_leaves=12,
)
KEYS = [info.key.partition(".")[0] for info in config.settings()]


@effort(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_a_spec_or_a_config_error(data: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config.spec_from_json(data)
    json.dumps(caught.value.to_json()).encode("utf-8")
    caught.value.message.encode("utf-8")


@effort(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6))
def test_any_values_of_settings_are_a_spec_or_a_config_error(data: dict[str, Any]) -> None:
    try:
        spec = config.spec_from_json({**MINIMAL, **data})
    except ConfigError as error:
        error.message.encode("utf-8")
    else:
        assert config.spec_from_json(json.loads(json.dumps(config.spec_to_json(spec)))) == spec


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"logs": [value]}
    return value


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "x",
        _nested(100_000),
        {**MINIMAL, "environment": _nested(50_000)},
        {**MINIMAL, "replicas": 10**5000},
        {**MINIMAL, "replicas": 10**30},
        {**MINIMAL, "replicas": float("nan")},
        {**MINIMAL, "readiness": {"settle_seconds": float("inf")}},
        {**MINIMAL, "cwd": "\ud800"},
        {**MINIMAL, "environment": {"\ud800": "x"}},
        {**MINIMAL, "environment": {"A": object()}},
        {1: 2},
        {**MINIMAL, "replicas": "5"},
        {**MINIMAL, "restart": {"policy": "Always"}},
        {**MINIMAL, "restart": None},
        {**MINIMAL, "command": {"0": "x"}},
        {**MINIMAL, "schema": "x"},
        {**MINIMAL, "warm_pool": {"size": 1001}},
    ],
)
def test_bad_json_is_a_config_error(data: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config.spec_from_json(data)
    assert caught.value.message.replace("\n", "").isprintable()
    assert len(caught.value.message) < 1000


def test_hundred_thousand_unknown_keys_get_few_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = difflib.get_close_matches, []

    def counting(word: str, possibilities: Sequence[str], n: int = 3) -> list[str]:
        asked.append(word)
        return real(word, possibilities, n)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    with pytest.raises(ConfigError):
        config.spec_from_json({**MINIMAL, **{f"key{index}": index for index in range(100_000)}})
    assert 0 < len(asked) <= 30


def test_spec_survives_json(folder: Path) -> None:
    spec = load_one(folder, FULL).spec
    assert config.spec_from_json(json.loads(json.dumps(config.spec_to_json(spec)))) == spec


@pytest.mark.parametrize(
    "source",
    [
        {"sockets": {"http": "127.0.0.1:0"}, "autoscaling": {"idle_seconds": 60}},
        {"autoscaling": {"idle_seconds": 60, "metrics": {"jobs": {"file": "jobs", "target": 5}}}},
    ],
)
def test_a_fleet_goes_to_zero_where_something_tells_of_work(source: Mapping[str, Any]) -> None:
    assert config.spec_from_json({**MINIMAL, "min_replicas": 0, **source}).autoscaling.idle_seconds == 60


@pytest.mark.parametrize(
    ("section", "enabled"),
    [
        ("", False),
        ("[warm_pool]\nsize = 3\n", True),
        ("[warm_pool]\nsize = 0\n", False),
        ("[warm_pool]\nsize = 3\nenabled = false\n", False),
    ],
)
def test_whoever_says_how_the_warm_pool_shall_be_wants_one(folder: Path, section: str, enabled: bool) -> None:
    assert load_one(folder, HEAD + section).spec.warm_pool.enabled is enabled


# Whether it can run


def runnable(folder: Path, **changes: Any) -> ConfigError | None:
    spec = dataclasses.replace(FleetSpec(name="web", command=("sleep", "60"), cwd=str(folder)), **changes)
    try:
        config.check_runnable(spec)
    except ConfigError as error:
        return error
    return None


def script(folder: Path, name: str, text: str, mode: int) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(mode)


def test_programs_that_are_there_are_fine(folder: Path) -> None:
    script(folder, "run", "#!/bin/sh\n", 0o755)
    (folder / "cert").write_text("x")
    assert runnable(folder) is None
    assert runnable(folder, command=("./run",)) is None
    assert runnable(folder, command=(str(folder / "run"),)) is None
    assert runnable(folder, command=("run",), environment={"PATH": f"/nowhere:{folder}"}) is None
    assert runnable(folder, command=("run",), environment={"PATH": "."}) is None
    assert runnable(folder, command=("no such thing at all",), shell=True) is None
    assert runnable(folder, secret_env={"A": f"file:{folder}/cert", "B": "env:NOT_SET"}) is None


def test_path_that_only_the_start_knows_is_not_guessed(folder: Path) -> None:
    (folder / ".env").write_text("# x\nexport PATH=/somewhere\n")
    assert runnable(folder, command=("run",), env_file=str(folder / ".env")) is None
    assert runnable(folder, command=("run",), secret_env={"PATH": "env:AGENT_PATH"}) is None


def test_path_of_this_process_is_used_where_the_fleet_has_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(folder, "run", "#!/bin/sh\n", 0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert runnable(folder, command=("run",)) is None
    error = runnable(folder, command=("sleep",))
    assert error is not None
    assert error.message == 'fleet web: command "sleep": no such program on the PATH'


@pytest.mark.parametrize(
    ("changes", "part", "hint"),
    [
        ({"command": ("no-such-program",)}, 'command "no-such-program": no such program on the PATH', "install it, give its full path"),
        ({"command": ("./gone",)}, 'command "./gone": does not exist', "give the path of a program"),
        ({"command": ("/",)}, 'command "/": is a directory, not a program', "give the path of a program"),
        ({"command": ("./plain",)}, "is not executable", "`chmod +x "),
        ({"command": ("plain",), "environment": {"PATH": "."}}, "is not executable", "`chmod +x "),
        (
            {"command": ("./script",)},
            'command "./script": its first line names "/no/such/interpreter", which is not there',
            "correct the #! line",
        ),
        ({"command": ("./plain/x",)}, 'command "./plain/x": not a directory', "give the path of a program"),
        ({"cwd": "/no/such/folder"}, 'cwd "/no/such/folder": does not exist', "create the directory"),
        ({"cwd": "/no/such/folder", "shell": True}, 'cwd "/no/such/folder": does not exist', "create the directory"),
        ({"cwd": "/dev/null"}, 'cwd "/dev/null": not a directory', "set cwd to a directory"),
        ({"env_file": "/no/such/.env"}, 'env_file "/no/such/.env": does not exist', "correct env_file"),
        ({"env_file": "/"}, 'env_file "/": is a directory', "correct env_file"),
        ({"secret_env": {"K": "file:/no/such/key"}}, 'secret_env.K "/no/such/key": does not exist', "correct secret_env.K"),
    ],
)
def test_what_cannot_run_is_told_before_it_is_started(folder: Path, changes: dict[str, Any], part: str, hint: str) -> None:
    script(folder, "plain", "x", 0o644)
    script(folder, "script", "#!/no/such/interpreter -x\n", 0o755)
    error = runnable(folder, **changes)
    assert error is not None
    assert part in error.message
    assert hint in error.hint


def test_everything_that_cannot_run_is_told_at_once(folder: Path) -> None:
    error = runnable(folder, command=("no-such-program",), cwd="/no/such/folder", env_file="/no/such/.env")
    assert error is not None
    assert [name for name in ("cwd", "env_file", "command") if name in error.message] == ["cwd", "env_file", "command"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_common_user(folder: Path, **changes: Any) -> str:
    """What `runnable` says in a process that root's rights do not help."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        os.write(sending, str(runnable(folder, **changes)).encode())
        os._exit(0)
    os.close(sending)
    with open(receiving, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_what_we_may_not_use_is_told(open_folder: Path) -> None:
    (open_folder / "locked").mkdir(mode=0o000)
    script(open_folder, ".env", "A=1\n", 0o000)
    script(open_folder, "run", "#!/bin/sh\n", 0o700 if os.geteuid() == 0 else 0o600)
    said = as_common_user(open_folder, cwd=str(open_folder / "locked"), env_file=str(open_folder / ".env"), command=(f"{open_folder}/run",))
    assert f'cwd "{open_folder}/locked": permission denied' in said
    assert f'env_file "{open_folder}/.env": permission denied' in said
    assert f'command "{open_folder}/run": {open_folder}/run is not executable' in said


# Documents made from the model


def test_starter_loads_and_names_every_supported_setting(folder: Path) -> None:
    text = config.starter("my-fleet")
    spec = load_one(folder, text).spec
    assert (spec.name, spec.replicas, spec.command) == ("my-fleet", 3, (sys.executable, "-m", "fleetctl.demo"))
    mentioned = set(re.findall(r"^#?([a-z_]+) = ", text, re.MULTILINE))
    assert mentioned == {info.key.rpartition(".")[2] for info in config.settings() if info.supported}


@pytest.mark.parametrize("line", ['image = "no image"', "user = 0", "cpu_request = 0", 'storage_size = "much"', 'namespace = "A"'])
def test_bounds_hold_for_settings_that_may_be_left_out(folder: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"fleet\.toml:5: fleet\.kubernetes\..*: must be"):
        load_one(folder, f'[fleet]\nname = "x"\ncommand = ["true"]\n[fleet.kubernetes]\n{line}\n')


def test_starter_with_every_comment_taken_off_loads_and_changes_nothing(folder: Path) -> None:
    plain = load_one(folder, config.starter("x")).spec
    text = re.sub(r"^#([a-z_]+ = )", r"\1", config.starter("x"), flags=re.MULTILINE)
    spec = load_one(folder, text.replace("min_replicas = 1\n", "min_replicas = 0\n", 1)).spec  # which idle_seconds needs
    assert spec == dataclasses.replace(
        plain,
        min_replicas=0,
        environment={"GREETING": "hello"},
        env_file=str(folder / ".env"),
        secret_env={"API_KEY": "env:API_KEY"},
        tools=("search", "edit"),
        resource_limits=spec.resource_limits,
        watchdog_seconds=spec.watchdog_seconds,
        stuck_after_seconds=spec.stuck_after_seconds,
        budget=spec.budget,
        autoscaling=spec.autoscaling,
        kubernetes=spec.kubernetes,
        port_base=8000,
        sockets={"http": "127.0.0.1:8080"},
        readiness=spec.readiness,
        liveness=spec.liveness,
        graceful_drain=spec.graceful_drain,
        checkpoints=spec.checkpoints,
    )


@pytest.mark.parametrize("name", ["", "A", "a b", 'a"\nx = 1', "a\n"])
def test_starter_refuses_a_name_that_would_not_load(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a fleet's name"):
        config.starter(name)


def test_settings_agree_with_the_model() -> None:
    spec = config.spec_to_json(FleetSpec(name="x", command=("x",)))
    for info in config.settings():
        value: Any = spec
        for part in info.key.split("."):
            value = value[part]
        assert info.doc
        assert info.bounds
        if not info.required:
            assert value == info.default, info.key
    assert [info.key for info in config.settings() if info.required] == ["name", "command"]


def test_schema_describes_every_supported_setting_and_no_other() -> None:
    schema = config.schema()
    fleet = schema["$defs"]["FleetSpec"]["properties"]
    for info in config.settings():
        section, _, leaf = info.key.rpartition(".")
        reference = fleet.get(section, {}).get("$ref", "#/$defs/FleetSpec" if not section else "")
        properties = schema["$defs"].get(reference.rpartition("/")[2], {"properties": {}})["properties"]
        assert (leaf in properties) == info.supported, info.key
        if info.supported:
            assert properties[leaf]["description"] == info.doc
            assert properties[leaf].get("default", info.default) == info.default
    assert json.loads(json.dumps(schema)) == schema
    assert _references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}


def _references(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(_references, value))
    if not isinstance(value, dict):
        return set()
    return {str(value["$ref"])} if "$ref" in value else set().union(*map(_references, value.values()))


# Importing


def test_pydantic_is_imported_at_the_first_check_and_not_before() -> None:
    code = "import sys, fleetctl.config as c; c.settings(); c.starter('x'); print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@effort(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_file_is_read_or_refused_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([FULL, HEAD, config.starter("x"), ARRAY]))
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 20))
    piece = data.draw(st.text(max_size=6) | st.sampled_from(["[", "]", "[[", '"', '"""', "=", "{", "}", ".", "\n", "1e999", "0x1", "inf"]))
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    path.write_bytes((text[:at] + piece + text[at + cut :]).encode("utf-8", "surrogatepass"))
    try:
        for loaded in config.load_file(path):
            assert all(re.fullmatch(r"default|.* line \d+", source) for source in loaded.sources.values())
    except ConfigError as error:
        error.message.encode("utf-8")
