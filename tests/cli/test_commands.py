"""Commands over a fake daemon: words, JSON, exit statuses, and where each goes."""

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from fleetctl.cli import app, waiting
from fleetctl.cli.explain import explain_agent
from fleetctl.client import Client
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import DaemonUnreachable, NotStopped
from fleetctl.host.paths import Paths
from tests.cli.conftest import PROGRAM, Fleetctl, call, environment
from tests.cli.fake_daemon import FakeDaemon, a_budget, a_fleet, a_pool, a_warm_one, an_agent, an_autoscaler

# Any: typer's commands have no public type.


def all_commands() -> list[tuple[str, Any]]:
    """Every command with its full name, commands of commands included, hidden ones too."""
    root: Any = get_command(app.app)
    found: list[tuple[str, Any]] = []

    def visit(path: str, command: Any, context: typer.Context) -> None:
        for name in command.list_commands(context) if hasattr(command, "list_commands") else []:
            child = command.get_command(context, name)
            found.append((f"{path} {name}".strip(), child))
            visit(f"{path} {name}".strip(), child, typer.Context(child, info_name=name, parent=context))

    visit("", root, typer.Context(root, info_name="fleetctl"))
    return found


COMMANDS = dict(all_commands())


def test_all_commands_of_this_issue_are_there() -> None:
    words = "up down scale status ps logs restart warm acquire checkpoint drain autoscale explain inspect history events wait simulate"
    words += " daemon config doctor completion export import metrics top report sinks"
    nested = [
        "probe",
        "protect",
        "budget",
        "warm status",
        "warm fill",
        "warm drain",
        "warm resize",
        "checkpoint create",
        "checkpoint list",
        "checkpoint show",
        "checkpoint restore",
        "checkpoint export",
        "checkpoint rm",
        "autoscale on",
        "autoscale off",
        "autoscale status",
        "export kubernetes",
        "daemon start",
        "daemon stop",
        "daemon status",
        "daemon install",
        "sinks check",
        "sinks test",
        "config init",
        "config check",
        "config diff",
        "config show",
        "config schema",
    ]
    assert {name for name in COMMANDS if not name.startswith("_")} == {*words.split(), *nested}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, fleetctl: Fleetctl) -> None:
    shown = fleetctl(*name.split(), "--help")
    assert shown.status == 0
    assert f"fleetctl {name.split()[0]}" in shown.out.partition("Example")[2]
    assert COMMANDS[name].get_short_help_str(limit=70)
    for param in COMMANDS[name].params:
        assert param.help or param.hidden or name.startswith("_"), param.name


@pytest.mark.parametrize("name", ["up", "down", "scale", "restart", "warm drain", "warm resize", "drain"])
def test_every_change_has_a_dry_run_and_json(name: str) -> None:
    options = {option for param in COMMANDS[name].params for option in param.opts}
    assert {"--dry-run", "--json", "--no-wait", "--timeout", "--state-dir"} <= options


@pytest.mark.parametrize("name", ["create", "restore", "export", "rm"])
def test_every_change_to_checkpoints_has_a_dry_run_and_json(name: str) -> None:
    options = {option for param in COMMANDS[f"checkpoint {name}"].params for option in param.opts}
    assert {"--dry-run", "--json", "--state-dir"} <= options


READS = ["status", "ps", "inspect", "history", "events", "wait", "doctor", "daemon status", "config show", "warm status"]


@pytest.mark.parametrize("name", [*READS, "checkpoint list", "checkpoint show"])
def test_every_read_has_json(name: str) -> None:
    assert "--json" in {option for param in COMMANDS[name].params for option in param.opts}


def test_words_of_other_tools_lead_to_commands_that_exist() -> None:
    assert not app.OTHER_WORDS.keys() & app.MODULES.keys()
    for hint in app.OTHER_WORDS.values():
        assert set(re.findall(r"`fleetctl ([a-z]+)", hint)) <= app.MODULES.keys()


def test_help_alone_and_version(fleetctl: Fleetctl) -> None:
    assert "status" in fleetctl("--help").out == fleetctl("-h").out
    assert fleetctl().out == fleetctl("--help").out
    assert fleetctl("--version").out.startswith("fleetctl ")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["scal", "3"], 2, "did you mean `fleetctl scale`?"),
        (["nonsense"], 2, "no such command: nonsense"),
        (["ls"], 2, "`fleetctl ps` lists agents"),
        (["stop", "web"], 2, "`fleetctl down` takes fleets down"),
        (["version"], 2, "`fleetctl --version`"),
        (["xs"], 2, "`fleetctl --help` lists the commands"),
        (["pss"], 2, "did you mean `fleetctl ps`?"),
        (["--nonsense"], 2, "No such option: --nonsense"),
        (["status", "--nonsense"], 2, "`fleetctl status --help`"),
        (["scale"], 2, "Missing argument"),
        (["scale", "--dryrun", "3"], 2, "no such option: --dryrun"),
        (["scale", "web"], 2, "no number of agents"),
        (["scale", "web", "2"], 2, "`fleetctl scale web=2`"),
        (["scale", "+2", "web"], 2, "`fleetctl scale web=+2`"),
        (["scale", "3"], 4, "fleetctl daemon start"),
        (["inspect", "web"], 4, "does not run"),
        (["wait", "web", "--for", "nothing"], 2, "--for ready"),
        (["wait", "web", "--timeout", "x"], 2, "x"),
        (["up", "--timeout", "-1"], 2, "seconds"),
        (["logs", "ghost"], 5, "no such fleet or agent: ghost"),
        (["logs", "--since", "noon"], 2, "no time"),
        (["up", "--file", "nowhere.toml"], 6, "nowhere.toml"),
        (["up", "--", "/no/such/program"], 6, "/no/such/program"),
        (["up", "--file", "x", "--", "sleep", "1"], 2, "not both"),
        (["up", "--replicas", "10000"], 6, "max_replicas"),
        (["up", "--name", "Not_A_Name"], 6, "name"),
        (["daemon", "stop", "--keep", "--drain"], 2, "either --keep or --drain"),
        (["warm", "full"], 2, "full"),
        (["warm", "resize"], 2, "Missing argument"),
        (["warm", "resize", "-1"], 2, "-1"),
        (["warm", "resize", "1001"], 2, "1001"),
        (["warm", "fill"], 4, "does not run"),
        (["acquire"], 4, "does not run"),
        (["acquire", "--env", "TASK"], 2, "not NAME=VALUE"),
        (["acquire", "--env", "7=TASK"], 2, "not NAME=VALUE"),
        (["acquire", "--timeout", "-1"], 2, "from 0 to 3600"),
        (["completion", "tcsh"], 2, "bash"),
        (["config", "check"], 6, "config init"),
    ],
)
def test_errors_name_the_cause_and_the_next_step_on_stderr(arguments: list[str], status: int, said: str, fleetctl: Fleetctl) -> None:
    result = fleetctl(*arguments)
    assert (result.status, result.out) == (status, "")
    assert result.err.startswith("error: ")
    assert said in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["scale", "5"], [("web", {"replicas": 5, "dry_run": False})]),
        (["scale", "-1"], [("web", {"delta": -1, "dry_run": False})]),
        (["scale", "+3", "--no-wait"], [("web", {"delta": 3, "dry_run": False})]),
        (["scale", "web=+2", "--dry-run"], [("web", {"delta": 2, "dry_run": True})]),
    ],
)
def test_scale_asks_for_what_was_typed(arguments: list[str], asked: list[tuple[str, Any]], daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    assert fleetctl(*arguments).status == 0
    assert [(path.split("/")[3], body) for method, path, body in daemon.asked if method == "POST"] == asked


def test_warm_resize_asks_and_waits_until_it_is_so(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    result = fleetctl("warm", "resize", "3")
    assert (result.status, result.out, result.err) == (0, "web: 3 of 3 warm\n", "web: resize the warm pool from 0 to 3\n")
    assert fleetctl("warm", "fill", "web").out == "web: 3 of 3 warm\n"
    assert fleetctl("warm", "resize", "2", "web", "--dry-run").out.startswith("web: resize the warm pool from 3 to 2\n")
    told = json.loads(fleetctl("warm", "drain", "web", "--json").out)
    assert (told["schema"], told["fleets"][0]["warm_pool"]["current_size"]) == ("fleetctl/changes/v1", 0)
    asked = [(path, body) for method, path, body in daemon.asked if method == "POST"]
    assert asked == [("/v1/fleets/web/warm", {"size": size, "dry_run": dry}) for size, dry in ((3, False), (2, True), (0, False))]


def test_autoscale_turns_it_on_and_off_and_says_how_it_stands(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    assert fleetctl("autoscale", "on").err == "web: autoscaling is on (act)\n"
    assert fleetctl("autoscale", "on", "web", "--recommend", "--dry-run").out.startswith("web: autoscaling is on (recommend)\n")
    daemon.fleets["web"]["autoscaling"] |= {"reason": "CPU utilization 85.0% > target 70%", "next_decision_seconds": 12.0}
    shown = fleetctl("autoscale").out
    assert re.search(r"web +act +2 +1 +100 +0 +0 +12s +CPU utilization 85\.0% > target 70%", shown)
    assert fleetctl("autoscale", "status", "web").out == shown
    told = json.loads(fleetctl("autoscale", "status", "--json").out)
    assert (told["schema"], told["fleets"][0]["enabled"]) == ("fleetctl/autoscale/v1", True)
    assert "autoscaler: CPU utilization 85.0% > target 70%; decides again in 12s" in fleetctl("status", "--once").out
    assert fleetctl("autoscale", "off").status == 0
    assert fleetctl("autoscale", "on", "ghost").status == 5
    posted = [body for method, path, body in daemon.asked if method == "POST" and path == "/v1/fleets/web/autoscaling"]
    assert [(one["enabled"], one["mode"], one["dry_run"]) for one in posted] == [
        (True, "act", False),
        (True, "recommend", True),
        (False, "act", False),
    ]


def test_explain_says_what_holds_a_fleet_back_and_what_comes(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    scaling = an_autoscaler(enabled=True, mode="act", max_replicas=9, next_decision_seconds=12.0)
    failed = an_agent(
        1, state="failed", ready=False, pid=None, next_try_seconds=30.0, note="crash loop", last_exit={"code": 3, "signal": None}
    )
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), failed], ready_replicas=1, autoscaling=scaling)
    proposal = {"metric": "cpu", "wish": 3, "error": None, "optional": False, "gaps": 1, "reason": "CPU utilization 100.0% > target 70%"}
    silent = {"metric": "occupancy", "wish": None, "error": "no values", "optional": True, "gaps": 0, "reason": "occupancy unavailable"}
    limit = {"kind": "host", "text": "2 cores carry 2 agents", "seconds_left": None}
    cooldown = {"kind": "cooldown", "text": "the fleet grew", "seconds_left": 40.2}
    daemon.last_decision = {
        "current_replicas": 2,
        "target_replicas": 2,
        "wish": 2,
        "winner": "cpu",
        "reason": "...",
        "proposals": [proposal, silent],
        "limits": [limit, cooldown],
    }
    assert fleetctl("explain").out.splitlines() == [
        "web  1 of 2 ready",
        "  web-00001: it ended (exit 3)",
        "  autoscaling is on, between 1 and 9 agents",
        "  CPU utilization 100.0% > target 70% -> 3 agents, which wins; 1 agent not measured",
        "  next: web-00001: it is started again in 30s",
        "  next: held back: 2 cores carry 2 agents",
        "  next: held back: the fleet grew, 40s left",
        "  next: it decides again in 12s; a load that is much too high for 2 agents, at any measurement",
    ]
    told = json.loads(fleetctl("explain", "web", "--json").out)
    assert (told["schema"], told["explained"][0]["autoscaling"]["last_decision"]["winner"]) == ("fleetctl/explain/v1", "cpu")
    assert fleetctl("explain", "web-00001").out.splitlines() == [
        "web-00001  failed",
        "  it ended (exit 3)",
        "  crash loop",
        "  next: it is started again in 30s",
    ]
    assert fleetctl("explain", "ghost").status == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["its process 1000 runs since 1m01s and is ready", "when it ends it is started again, restart.policy = always"]),
        ({"ready": False, "note": "not ready: no answer"}, ["not ready: no answer"]),
        ({"replacing": True}, ["it is replaced by a new process when its turn comes"]),
        ({"state": "starting", "ready": False}, ["its process 1000 was started 1m01s ago and is not ready yet"]),
        ({"state": "starting", "ready": False, "pid": None}, ["it is about to start"]),
        ({"state": "suspended", "ready": False, "pooled": True}, ["waits in the warm pool", "the oldest first"]),
        (
            {"state": "draining", "ready": False, "note": "scaled down to 1"},
            ["it was asked to stop: scaled down to 1", "it has 0 s to finish"],
        ),
        ({"state": "failed", "ready": False, "pid": None}, ["it is not tried again; `fleetctl restart web-00000` does"]),
        (
            {"state": "terminated", "ready": False, "pid": None, "last_exit": {"code": 0, "signal": None}},
            ["it ended (exit 0) and does not come back"],
        ),
    ],
)
def test_explain_knows_every_state_of_an_agent(daemon: FakeDaemon, fleetctl: Fleetctl, changes: dict[str, Any], said: list[str]) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, **changes)])
    shown = fleetctl("explain", "web-00000")
    assert shown.status == 0
    assert all(words in shown.out for words in said), shown.out


@pytest.mark.parametrize(
    ("readiness", "said"),
    [
        ({"settle_seconds": 2.5}, "without a probe it counts as ready when it has lived for 2.5 s"),
        ({"notify": True, "start_timeout_seconds": 0.0}, "it counts as ready when it says READY=1"),
        (
            {"settle_seconds": 1.0, "notify": True, "exec": ["./check"], "start_timeout_seconds": 60.0},
            "it counts as ready when it says READY=1 and its readiness probe succeeds; not so within 60 s is a failed start",
        ),
    ],
)
def test_explain_says_what_a_starting_agent_waits_for(readiness: dict[str, Any], said: str) -> None:
    explained = explain_agent(an_agent(0, state="starting", ready=False), {"spec": {"readiness": readiness}})
    assert explained["next"] == [said]


def test_warm_says_how_things_are(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    pool = a_pool(1, target_size=2, hits=3, misses=1, hit_rate_percent=75.0)
    daemon.fleets |= {"api": a_fleet("api"), "web": a_fleet(agents=[an_agent(0), a_warm_one(1)], warm_pool=pool)}
    shown = fleetctl("warm").out
    assert [line.split() for line in shown.splitlines()] == [
        ["FLEET", "WARM", "WANTED", "HITS", "MISSES", "HIT", "RATE"],
        ["api", "0", "off", "0", "0", "-"],
        ["web", "1", "2", "3", "1", "75.0%"],
    ]
    assert fleetctl("warm", "status").out == shown
    told = json.loads(fleetctl("warm", "status", "web", "--json").out)
    assert told["schema"] == "fleetctl/warm/v1"
    (fleet,) = told["fleets"]
    assert {**pool, "name": "web"}.items() <= fleet.items()
    assert [agent["id"] for agent in fleet["instances"]] == ["web-00001"]


def test_a_pool_that_cannot_fill_says_why(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    result = fleetctl("warm", "fill")
    assert result.status == 1
    assert "fleetctl warm resize 5 web" in result.err
    daemon.failing = True
    result = fleetctl("warm", "resize", "1")
    assert result.status == 1
    assert "web-00090 failed: exit 78" in result.err
    assert fleetctl("warm", "fill", "ghost").status == 5


def test_acquire_prints_the_id_and_says_how_it_came(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), a_warm_one(1)], warm_pool=a_pool(1))
    result = fleetctl("acquire", "--env", "TASK=7", "--env", "NOTE=a=b", "--tool", "search")
    assert (result.status, result.out) == (0, "web-00001\n")
    assert result.err == "web-00001 (pid 4711) from the warm pool in 0.8 ms; its claim is in /s/run/claims/x.json\n"
    _, path, body = daemon.asked[-1]
    assert path == "/v1/fleets/web/acquire"
    assert body["claim"] == {"environment": {"TASK": "7", "NOTE": "a=b"}, "tools": ["search"]}
    told = json.loads(fleetctl("acquire", "web", "--json").out)
    assert (told["schema"], told["agent_id"], told["from_warm_pool"]) == ("fleetctl/acquired/v1", "web-00001", True)


def test_acquire_of_an_empty_pool_can_be_refused(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    assert "by a cold start" in fleetctl("acquire").err
    result = fleetctl("acquire", "--require-warm")
    assert (result.status, result.out) == (1, "")
    assert "--require-warm" in result.err


def test_status_shows_the_instances_of_the_pool_as_such(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(size=1, agents=[an_agent(0), a_warm_one(1)], warm_pool=a_pool(1))
    title, _, replica, instance = fleetctl("status", "--once").out.splitlines()
    assert title.startswith("web  1 of 1 ready, 1 of 1 warm")
    assert "warm" not in replica
    assert "suspended" in instance
    assert instance.endswith("in the warm pool")
    assert fleetctl("status", "--check").status == 0


def test_scale_says_the_change_on_stderr_and_the_outcome_on_stdout(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    result = fleetctl("scale", "4")
    assert (result.status, result.out, result.err) == (0, "web: 4 of 4 ready\n", "web: 2 -> 4\n")


def test_scale_of_several_fleets_needs_a_name(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {"api": a_fleet("api"), "web": a_fleet()}
    result = fleetctl("scale", "4")
    assert result.status == 2
    assert "api, web" in result.err
    assert "fleetctl scale api=4" in result.err
    assert fleetctl("scale", "api=3", "web=1").out == "api: 3 of 3 ready; web: 1 of 1 ready\n"


def test_scale_as_json_is_one_object(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    told = json.loads(fleetctl("scale", "3", "--json").out)
    assert told["schema"] == "fleetctl/changes/v1"
    assert [change["desired_replicas"] for change in told["changes"]] == [3]
    assert [fleet["ready_replicas"] for fleet in told["fleets"]] == [3]
    assert told["failed"] == []


@pytest.mark.parametrize("command", [["scale", "web=3", "ghost=1", "spook=2"], ["down", "web", "ghost", "spook"]])
def test_names_are_checked_before_anything_is_done(command: list[str], daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {"api": a_fleet("api"), "web": a_fleet()}
    result = fleetctl(*command)
    assert (result.status, result.out) == (5, "")
    assert result.err == "error: no such fleets: ghost, spook\nhint: fleets here: api, web\n"
    assert daemon.fleets == {"api": a_fleet("api"), "web": a_fleet()}


def test_one_fleet_that_fails_does_not_keep_the_others_from_their_change(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {"api": a_fleet("api"), "web": a_fleet()}
    daemon.refusing.add("api")
    result = fleetctl("scale", "api=1", "web=3", "--json")
    assert result.status == 1
    told = json.loads(result.out)
    assert [(one["fleet"], one["exit_status"]) for one in told["failed"]] == [("api", 1)]
    assert told["fleets"][0]["ready_replicas"] == 3


def test_a_failed_agent_ends_the_waiting_with_its_name_note_and_output(daemon: FakeDaemon, state_dir: Path, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    daemon.failing = True
    (state_dir / "logs" / "web").mkdir(mode=0o700)
    (state_dir / "logs" / "web" / "web-00002.log").write_bytes(b"first\n\x1b[31mthe end\n")
    result = fleetctl("scale", "3")
    assert (result.status, result.out) == (1, "")
    assert "web-00002 failed: exit 78" in result.err
    assert "    the end\n" in result.err
    assert "fleetctl logs web-00002" in result.err


def test_scaling_away_a_failed_agent_is_no_failure(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), an_agent(1, state="failed", ready=False)], ready_replicas=1)
    assert fleetctl("scale", "1").status == 0


def test_timeout_says_how_far_it_is(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), an_agent(1, state="backoff", ready=False, note="exit 3")], ready_replicas=1)
    daemon.obedient = False
    result = fleetctl("scale", "2", "--timeout", "0.2", "--json")
    assert result.status == 124
    assert "web: 1 of 2 ready, 1 backoff" in result.err
    assert "web-00001: backoff, exit 3" in result.err
    assert [one["exit_status"] for one in json.loads(result.out)["failed"]] == [124]


@pytest.mark.parametrize("command", [["down"], ["scale", "1"]])
def test_survivors_are_named_and_the_status_is_1(
    command: list[str], daemon: FakeDaemon, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "SURVIVOR_SECONDS", 0.2)
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), an_agent(1, state="draining", ready=False)])
    daemon.obedient = False
    result = fleetctl(*command)
    assert (result.status, result.out) == (1, "")
    assert "still alive, though killed: web-00001" in result.err


def test_waiting_ends_when_somebody_takes_the_fleet_down(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(down=True)
    daemon.obedient = False
    result = fleetctl("scale", "3")
    assert (result.status, "web was taken down meanwhile" in result.err) == (1, True)


def test_restart_waits_for_new_processes(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    assert fleetctl("restart", "web-00001").out == "web: 2 of 2 ready\n"
    assert [agent["pid"] for agent in daemon.fleets["web"]["agents"]] == [1000, 6001]
    daemon.obedient = False
    assert fleetctl("restart", "--timeout", "0.2").status == 124


def test_down_without_a_name_takes_all_down_and_says_so(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {"api": a_fleet("api", 1), "web": a_fleet()}
    result = fleetctl("down")
    assert (result.status, result.out) == (0, "api is down, 1 agent ended\nweb is down, 2 agents ended\n")
    assert daemon.fleets == {}
    again = fleetctl("down")
    assert (again.status, again.err) == (0, "nothing to take down: there are no fleets\n")


def test_down_of_an_unknown_fleet_is_status_5(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    assert fleetctl("down", "ghost").status == 5


def test_dry_runs_change_nothing(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    for command in (["down"], ["scale", "9"], ["restart"]):
        result = fleetctl(*command, "--dry-run")
        assert result.status == 0
        assert "would" in result.out
    assert daemon.fleets["web"] == a_fleet()


def a_file(*names: str) -> None:
    Path("fleet.toml").write_text("".join(f'[[fleet]]\nname = "{name}"\ncommand = ["sleep", "9"]\n' for name in names))


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], ["api", "web", "sleep"]),
        (["web"], ["web"]),
        (["web", "api", "-n", "3"], ["api", "web"]),
        (["--file", "fleet.toml", "web"], ["web"]),
        (["sleep"], ["sleep"]),
        (["--", "true", "api"], ["true"]),
        (["true"], ["true"]),
        (["--name", "other", "true", "1"], ["other"]),
    ],
)
def test_up_takes_names_of_fleets_of_the_file(arguments: list[str], chosen: list[str], fleetctl: Fleetctl) -> None:
    a_file("api", "web", "sleep")
    result = fleetctl("up", "--dry-run", "--json", *arguments)
    assert (result.status, result.err) == (0, "")
    assert [change["fleet"] for change in json.loads(result.out)["changes"]] == chosen


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["-n", "3"], 2, "fleet.toml has api, web"),
        (["api", "ghost"], 5, "fleet.toml has no fleet ghost"),
        (["--file", "fleet.toml", "ghost"], 5, "it has api, web"),
        (["ghost"], 6, "fleet.toml has the fleets api, web"),
    ],
)
def test_up_says_which_fleets_the_file_has(arguments: list[str], status: int, said: str, fleetctl: Fleetctl) -> None:
    a_file("api", "web")
    result = fleetctl("up", "--dry-run", *arguments)
    assert (result.status, said in result.err) == (status, True), result.err


def test_config_show_sets_fleets_apart(fleetctl: Fleetctl) -> None:
    a_file("api", "web")
    assert fleetctl("config", "show").out.count("\n\n# web\n") == 1


def test_up_runs_a_command_beside_a_file_that_is_wrong(fleetctl: Fleetctl) -> None:
    Path("fleet.toml").write_text("[fleet")
    assert fleetctl("up", "--dry-run", "true").status == 0
    assert fleetctl("up", "--dry-run").status == 6
    assert fleetctl("up", "--dry-run", "ghost").status == 6


def test_up_without_file_or_command_says_that_it_runs_the_demo(fleetctl: Fleetctl) -> None:
    assert "no fleet.toml here: running the bundled demo agent\n" in fleetctl("up", "--dry-run").err
    a_file("api")
    assert "demo" not in fleetctl("up", "--dry-run").err


def test_dry_run_of_up_starts_no_daemon(state_dir: Path, fleetctl: Fleetctl) -> None:
    result = fleetctl("up", "-n", "3", "--dry-run")
    assert result.status == 0
    assert result.out.startswith("demo: would be created with 3 agents\n  start the daemon\n  start 3 x ")
    assert "would be created with 1 agent\n" in fleetctl("up", "-n", "1", "--dry-run").out
    assert not state_dir.exists()


def test_config_diff_names_what_changes_and_how_without_secrets(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    a_file("web")
    daemon.fleets |= {"web": a_fleet(), "old": a_fleet("old")}
    daemon.differences = [
        {"key": "environment.KEY", "change": "changed", "how": "rollout", "old": "***", "new": "***"},
        {"key": "port_base", "change": "removed", "how": "rollout", "old": 8000, "new": None},
        {"key": "replicas", "change": "changed", "how": "live", "old": 2, "new": 3},
    ]
    result = fleetctl("config", "diff")
    assert result.out.endswith(
        '\n  ~ environment.KEY: "***" -> "***" (by rollout)\n  - port_base: 8000 -> - (by rollout)\n  ~ replicas: 2 -> 3 (live)\n'
    )
    assert "also running: old;" in result.err
    assert json.loads(fleetctl("config", "diff", "--json").out)["changes"][0]["differences"] == daemon.differences


@pytest.mark.parametrize(("ready", "status"), [(2, 0), (1, 3)])
def test_check_tells_by_its_exit_status(ready: int, status: int, daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    agents = [an_agent(number, ready=number < ready) for number in range(2)]
    daemon.fleets["web"] = a_fleet(agents=agents, ready_replicas=ready)
    assert fleetctl("status", "--check").status == status
    assert fleetctl("status").status == 0


def test_status_as_json_is_the_daemons_own_object(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {"api": a_fleet("api"), "web": a_fleet()}
    told = json.loads(fleetctl("status", "--json").out)
    assert (told["schema"], [fleet["name"] for fleet in told["fleets"]]) == ("fleetctl/status/v1", ["api", "web"])
    assert [fleet["name"] for fleet in json.loads(fleetctl("status", "web", "--json").out)["fleets"]] == ["web"]
    assert fleetctl("status", "ghost").status == 5


def test_ps_lists_agents_flat(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    ended = an_agent(2, state="terminated", pid=None, ready=False)
    daemon.fleets |= {"api": a_fleet("api", 1), "web": a_fleet(agents=[an_agent(0), ended])}
    told = json.loads(fleetctl("ps", "--json").out)
    assert [(agent["fleet"], agent["id"]) for agent in told["agents"]] == [("api", "api-00000"), ("web", "web-00000"), ("web", "web-00002")]
    assert fleetctl("ps", "-q").out == "api-00000\nweb-00000\n"
    assert fleetctl("ps", "-aq").out == "api-00000\nweb-00000\nweb-00002\n"
    assert "1 more ended" in fleetctl("ps").err


def test_ps_says_that_there_are_no_agents(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    assert fleetctl("ps").err == "no agents\n"
    assert fleetctl("ps", "-q").err == ""
    daemon.fleets["web"] = a_fleet(agents=[an_agent(state="terminated", pid=None, ready=False)])
    assert fleetctl("ps").err == "no agents\n1 ended; `fleetctl ps -a` shows them\n"


def test_inspect_shows_an_agent_or_a_fleet(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    assert "State:        running" in fleetctl("inspect", "web-00000").out
    given, every = fleetctl("inspect", "web").out, fleetctl("inspect", "web", "--all").out
    assert ("graceful_drain.timeout_seconds:" in given, "logs.keep:" in given, "logs.keep:" in every) == (True, False, True)
    assert "3 more settings as they are by default; --all shows them" in given
    assert "more settings" not in every
    assert json.loads(fleetctl("inspect", "web", "--json").out)["schema"] == "fleetctl/fleet/v1"
    assert json.loads(fleetctl("inspect", "web-00000", "--json").out)["schema"] == "fleetctl/agent/v1"
    assert fleetctl("inspect", "ghost").status == 5


def test_history_and_events(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.events = [
        {
            "id": "e",
            "at": "2026-01-31T12:00:00Z",
            "kind": "agent.started",
            "fleet": "web",
            "agent_id": "web-1",
            "message": "up",
            "data": {"n": 1},
        }
    ]
    assert "2 -> 5" in fleetctl("history").out
    assert json.loads(fleetctl("history", "--json").out)["entries"][0]["target_replicas"] == 5
    assert fleetctl("events").out == "2026-01-31 12:00:00Z  agent.started     web-1             up\n"
    (told,) = json.loads(fleetctl("events", "--json").out)["events"]
    source = told.pop("source")
    assert source.startswith("//")
    assert told == {
        "specversion": "1.0",
        "id": "e",
        "type": "fleetctl.agent.started",
        "subject": "web-1",
        "time": "2026-01-31T12:00:00Z",
        "datacontenttype": "application/json",
        "data": {"fleet": "web", "agent_id": "web-1", "message": "up", "n": 1},
    }


@pytest.mark.parametrize("command", [["history"], ["events"], ["events", "-f"]])
def test_history_and_events_of_an_unknown_fleet_are_status_5(command: list[str], daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    daemon.entries = []
    result = fleetctl(*command, "--fleet", "ghost")
    assert (result.status, result.out) == (5, "")
    assert "fleets here: web" in result.err
    if "-f" not in command:
        assert fleetctl(*command, "--fleet", "web").status == 0


def test_reads_take_names_of_several_fleets(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {name: a_fleet(name, 1) for name in ("api", "job", "web")}
    daemon.events = [
        {
            "id": name,
            "at": f"2026-01-31T12:00:0{number}Z",
            "kind": "agent.started",
            "fleet": name,
            "agent_id": "x",
            "message": name,
            "data": {},
        }
        for number, name in enumerate(("web", "api", "job"))
    ]
    assert fleetctl("ps", "-q", "api", "web").out == "api-00000\nweb-00000\n"
    assert [fleet["name"] for fleet in json.loads(fleetctl("status", "api", "web", "--json").out)["fleets"]] == ["api", "web"]
    assert fleetctl("wait", "api", "web").out == "api: 1 of 1 ready; web: 1 of 1 ready\n"
    assert [event["id"] for event in json.loads(fleetctl("events", "api", "--fleet", "web", "--json").out)["events"]] == ["web", "api"]
    assert [event["id"] for event in json.loads(fleetctl("events", "api", "web", "-n1", "--json").out)["events"]] == ["api"]
    assert len(json.loads(fleetctl("history", "web", "--json").out)["entries"]) == 1
    for command in (["ps", "-q"], ["status"], ["wait"], ["events"], ["history"]):
        daemon.entries = []
        result = fleetctl(*command, "api", "ghost")
        assert (result.status, result.out, "no such fleet: ghost" in result.err) == (5, "", True)


def test_commands_are_shown_as_they_would_be_typed(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets |= {"api": a_fleet("api", 0, command=["sh", "-c", "echo $HOME"]), "web": a_fleet(command=["while :; do run; done"])}
    shown = fleetctl("status").out
    assert "  sh -c 'echo $HOME'\n" in shown
    assert "  while :; do run; done\n" in shown
    assert "Command:      while :; do run; done\n" in fleetctl("inspect", "web-00000").out


def test_a_daemon_that_does_not_answer_is_one_for_the_doctor(state_dir: Path, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths(os.path.realpath(state_dir))
    paths.prepare()
    monkeypatch.setattr(LocalEngine, "client", property(lambda self: Client(str(state_dir), timeout=0.1)))
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(paths.socket)
        deaf.listen()
        result = fleetctl("status")
    assert (result.status, "hint: `fleetctl doctor`" in result.err) == (124, True)


def test_wait_returns_when_it_holds_or_the_time_is_over(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    assert fleetctl("wait", "web").out == "web: 2 of 2 ready\n"
    assert fleetctl("wait", "web", "--for", "count=3", "--timeout", "0.2").status == 124
    assert fleetctl("wait", "ghost").status == 5
    assert fleetctl("wait", "ghost", "--for", "drained").status == 0


def test_state_directory_is_taken_before_and_after_the_command(
    daemon: FakeDaemon, state_dir: Path, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.fleets["web"] = a_fleet()
    monkeypatch.setenv("FLEETCTL_STATE_DIR", "/nonexistent")
    assert fleetctl("--state-dir", str(state_dir), "ps", "-q").out == fleetctl("ps", "-q", "--state-dir", str(state_dir)).out != ""


def test_reads_without_a_daemon_say_so_and_start_nothing(state_dir: Path, fleetctl: Fleetctl) -> None:
    for command in (["status"], ["ps"], ["history"], ["events"], ["logs"], ["doctor"], ["daemon", "status"]):
        assert fleetctl(*command).status == 0
    told = fleetctl("daemon", "status")
    assert (told.out.startswith("no daemon runs for "), told.err) == (True, "`fleetctl daemon start` or `fleetctl up` starts one\n")
    assert max(len(line) for line in (fleetctl("status").err + fleetctl("history").err).splitlines()) < 100
    result = fleetctl("status", "--json")
    assert json.loads(result.out)["daemon"]["alive"] is False
    assert "does not run" in result.err
    assert fleetctl("status", "--check").status == 3
    assert fleetctl("daemon", "status", "--check").status == 3
    assert not state_dir.exists()


def test_daemon_stop_not_on_a_terminal_wants_to_be_told(daemon: FakeDaemon, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.fleets["web"] = a_fleet()
    result = fleetctl("daemon", "stop")
    assert result.status == 2
    assert "--keep" in result.err
    assert "--drain" in result.err
    stopped: list[str] = []

    def stop(self: LocalEngine, mode: str, timeout: float | None, meanwhile: object) -> int:
        stopped.append(mode)
        return 99

    monkeypatch.setattr(LocalEngine, "stop_daemon", stop)
    assert fleetctl("daemon", "stop", "--drain").out == "the daemon (pid 99) has ended; its 2 agents have stopped\n"
    daemon.fleets.clear()
    assert fleetctl("daemon", "stop").status == 0
    assert stopped == ["drain", "keep"]


def test_stopping_a_daemon_that_does_not_run_is_done_already(fleetctl: Fleetctl) -> None:
    result = fleetctl("daemon", "stop", "--keep")
    assert (result.status, result.err) == (0, "no daemon runs\n")


def test_a_fault_of_our_own_is_told_without_a_traceback(fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LocalEngine) -> None:
        raise ZeroDivisionError("by \x1b[31mzero")

    monkeypatch.setattr(LocalEngine, "client", property(broken))
    result = fleetctl("scale", "1")
    assert result.status == 1
    assert result.err.startswith("internal error: ZeroDivisionError: by")
    assert "Traceback" not in result.err
    monkeypatch.setenv("FLEETCTL_DEBUG", "1")
    assert "Traceback" in fleetctl("scale", "1").err


def test_errors_may_have_several_lines_and_are_cleaned(fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LocalEngine) -> None:
        raise NotStopped("one\n\x1b[2Jtwo", hint="three\x07")

    monkeypatch.setattr(LocalEngine, "client", property(broken))
    assert fleetctl("scale", "1").err == "error: one\n  two\nhint: three \n"


def test_a_reader_that_has_seen_enough_is_no_failure(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(size=2000)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, "ps"], stdout=writer, stderr=subprocess.PIPE, env=environment(), timeout=30)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_matter(redirection: str, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m fleetctl ps {redirection}', PROGRAM[0]], capture_output=True, env=environment(), timeout=30
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_be_written_is_an_error_in_words(daemon: FakeDaemon) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "ps"], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=30)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_locale_without_the_characters_breaks_nothing(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, note="日本")])
    done = subprocess.run([*PROGRAM, "ps"], capture_output=True, env={**environment(), "PYTHONIOENCODING": "ascii"}, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"??" in done.stdout


def test_no_color_and_pipes_have_no_escape_sequences(daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0, note="\x1b[31mred\x1b[0m")])
    for command in (["status"], ["ps"], ["inspect", "web"]):
        done = call(*command)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout + done.stderr


def test_stopping_waits_for_a_daemon_that_is_gone_already(state_dir: Path) -> None:
    with pytest.raises(DaemonUnreachable):
        LocalEngine(str(state_dir)).stop_daemon("keep")


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["scale", "3", "--json"], 4, "E2004"),
        (["inspect", "web", "--json"], 4, "E2004"),
        (["--nonsense", "--json"], 2, "E2001"),
        (["status", "--nonsense", "--json"], 2, "E2001"),
        (["nonsense", "--json"], 2, "E2001"),
        (["scale", "--json"], 2, "E2001"),
        (["wait", "web", "--timeout", "x", "--json"], 2, "E2001"),
        (["status", "ghost", "--json"], 5, "E2003"),
        (["config", "check", "--json"], 6, "E2002"),
        (["up", "--json", "--", "/no/such/program"], 6, "E2002"),
    ],
)
def test_errors_are_one_json_object_too_where_json_is_asked_for(arguments: list[str], status: int, code: str, fleetctl: Fleetctl) -> None:
    result = fleetctl(*arguments)
    told = json.loads(result.out)
    assert (told["schema"], told["error"]["code"], told["error"]["exit_status"]) == ("fleetctl/error/v1", code, status)
    assert (result.status, f"error: {told['error']['message']}" in result.err) == (status, True)
    assert told["error"]["hint"] in result.err


def test_json_behind_two_dashes_is_the_agents_own_word(fleetctl: Fleetctl) -> None:
    assert fleetctl("up", "--", "/no/such/program", "--json").out == ""


def test_a_timeout_is_told_in_one_json_object(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet()
    told = json.loads(fleetctl("wait", "web", "--for", "count=3", "--timeout", "0.2", "--json").out)
    assert told["error"]["code"] == "E2009"
    assert "web: 2 of 2 ready" in told["error"]["message"]


def test_config_check_as_json_lists_the_problems(fleetctl: Fleetctl) -> None:
    Path("fleet.toml").write_text('[fleet]\nname = "Web"\ncommand = ["sleep", "9"]\nreplicsa = 3\n')
    problems = json.loads(fleetctl("config", "check", "--json").out)["error"]["problems"]
    assert [problem.partition(": ")[0] for problem in problems if problem.startswith("fleet.toml")] == ["fleet.toml:2", "fleet.toml:4"]


def test_budget_shows_what_is_spent_and_renews_it(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    reason = "its budget of 1,000,000 tokens per day is used up"
    daemon.fleets["web"] = a_fleet(paused=reason, budget=a_budget(tokens=1000017, cost_usd=2.5))
    shown = fleetctl("budget").out
    assert "1,000,017 of 1,000,000" in shown
    assert "2.50" in shown
    assert f"paused: {reason}" in shown
    (told,) = json.loads(fleetctl("budget", "web", "--json").out)["fleets"]
    assert (told["name"], told["paused"], told["tokens"]) == ("web", reason, 1000017)
    refused = fleetctl("budget", "--renew")
    assert (refused.status, "of which fleet" in refused.err) == (2, True)
    assert fleetctl("budget", "nobody", "--renew").status == 5
    assert daemon.fleets["web"]["paused"] == reason
    assert "from 0 again" in fleetctl("budget", "web", "--renew").err
    assert daemon.fleets["web"]["paused"] is None


def test_protect_says_so_and_shows_it(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), an_agent(1)])
    assert "web-00000 is protected" in fleetctl("protect", "web-00000").err
    assert "protected" in fleetctl("ps").out
    assert "1 agent protected: it is spared when it shrinks" in fleetctl("explain", "web").out
    (told,) = json.loads(fleetctl("protect", "--off", "web-00000", "--json").out)["agents"]
    assert (told["agent"], told["protected"], told["changed"]) == ("web-00000", False, True)
    assert "protected" not in fleetctl("ps").out


def test_protect_changes_nothing_where_one_of_the_names_is_no_agents(daemon: FakeDaemon, fleetctl: Fleetctl) -> None:
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0)])
    refused = fleetctl("protect", "web-00000", "web-99999")
    assert (refused.status, "no such agent: web-99999" in refused.err) == (5, True)
    assert not daemon.fleets["web"]["agents"][0]["protected"]
