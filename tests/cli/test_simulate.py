"""`simulate` as a user meets it: traces it reads and refuses, the table, the JSON, the plot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleetctl.cli.chart import bars, chart, squeeze
from tests.cli.conftest import Fleetctl, environment

DAY = "\n".join(["seconds,requests", *(f"{60 * minute},{60 + 300 * (minute // 40 % 2)}" for minute in range(240))])


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "load.csv"
    path.write_text(DAY)
    return str(path)


def test_the_table_compares_policies(trace: str, fleetctl: Fleetctl) -> None:
    shown = fleetctl("simulate", trace)
    assert shown.status == 0
    first, header, *rows = shown.out.splitlines()
    assert first == "50,400 requests in 4h00m, occupancy aimed at 70%, 2 replicas at first"
    assert header.split()[:2] == ["POLICY", "WAIT"]
    assert "OVER 1 s" in header
    assert [row.split()[0] for row in rows] == ["fleetctl", "kubernetes", "fixed"]


def test_the_json_has_everything_and_is_the_same_each_time(trace: str, fleetctl: Fleetctl) -> None:
    arguments = ["simulate", trace, "--json", "--seed", "7", "--lost-samples", "0.2", "--policy", "fleetctl", "--policy", "fixed=9"]
    found = json.loads(fleetctl(*arguments).out)
    assert found["schema"] == "fleetctl/simulation/v1"
    assert (found["seconds"], round(found["requests"]), found["start_replicas"]) == (14400.0, 50400, 2)
    assert [one["policy"] for one in found["policies"]] == ["fleetctl", "fixed=9"]
    ours, fixed = found["policies"]
    assert set(ours) == {
        *("policy", "wait_mean_seconds", "wait_p95_seconds", "over_objective", "replica_hours", "replica_hours_ratio"),
        *("actions", "reversals", "largest"),
    }
    assert (fixed["actions"], fixed["replica_hours"]) == (0, 36.0)
    assert ours["actions"] > 3
    assert found == json.loads(fleetctl(*arguments).out)
    assert found != json.loads(fleetctl(*arguments[:3], "--seed", "8", *arguments[5:]).out)


def test_options_reach_the_plant_and_the_policy(trace: str, fleetctl: Fleetctl) -> None:
    def ours(*options: str) -> dict[str, float]:
        shown = fleetctl("simulate", trace, "--json", "--policy", "fleetctl", *options)
        assert shown.status == 0, shown.err
        found: dict[str, float] = json.loads(shown.out)["policies"][0]
        return found

    plain = ours()
    assert ours("--max", "4")["largest"] == 4
    assert ours("--min", "5")["replica_hours"] > plain["replica_hours"]
    assert ours("--target", "35")["replica_hours"] > 1.5 * plain["replica_hours"]
    assert ours("--scale-load", "10")["replica_hours"] > 7 * plain["replica_hours"]
    assert ours("--service-time", "0.5")["replica_hours"] < plain["replica_hours"]
    assert ours("--slots", "4")["replica_hours"] < plain["replica_hours"]
    assert ours("--objective", "100")["over_objective"] < plain["over_objective"]
    assert ours("--cold-start", "120", "--warm", "0")["wait_mean_seconds"] > plain["wait_mean_seconds"]
    assert ours("--down-stabilization", "3600")["actions"] < plain["actions"]
    assert ours("--cores", "3")["largest"] == 3
    assert ours("--start", "9", "--up-stabilization", "10", "--interval", "10", "--warm-start", "1", "--refill", "5")["largest"] >= 9
    assert ours("--metric", "cpu", "--cpu-limit", "2", "--replica-cores", "1", "--sample-interval", "10") != plain


def test_the_plot_shows_the_load_and_every_policy(trace: str, fleetctl: Fleetctl) -> None:
    shown = fleetctl("simulate", trace, "--plot", "--policy", "kubernetes")
    blocks = shown.out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks[1:]] == ["requests/s", "replicas, kubernetes"]
    assert "█" in blocks[2]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no rows in it"),
        (b"0,1\n60,x\n", "line 2: 'x' is not a number"),
        (b"0,1\n60,2\n30,3\n", "line 3: second 30 comes after second 60"),
        (b"0,-1\n", "line 1: '-1' requests: a count cannot be negative"),
        (b"\x7fELF\x02\x01\xff\xfe", "this is not a text file"),
        (b"0,1\n60,1e300\n", "line 2: '1e300' requests are more than 1e+12"),
    ],
)
def test_a_malformed_trace_is_refused_in_one_sentence(content: bytes, complaint: str, tmp_path: Path, fleetctl: Fleetctl) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    shown = fleetctl("simulate", str(path))
    assert (shown.status, shown.out) == (2, "")
    assert f"error: {path}" in shown.err
    assert complaint in shown.err
    assert "hint: a trace" in shown.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--target", "91"], "--target 91: it must lie in 1..90"),
        (["--min", "5", "--max", "4"], "--max 4: it must lie in 5.."),
        (["--lost-samples", "nan"], "--lost-samples nan"),
        (["--slots", "0"], "slots cannot be 0"),
        (["--service-time", "-1"], "service seconds cannot be -1"),
        (["--policy", "magic"], "no policy 'magic'"),
        (["--policy", "fixed=0"], "no policy 'fixed=0'"),
        (["--metric", "tea"], "no metric 'tea'"),
        (["--scale-load", "inf"], "--scale-load inf"),
    ],
)
def test_impossible_options_are_refused(options: list[str], complaint: str, trace: str, fleetctl: Fleetctl) -> None:
    shown = fleetctl("simulate", trace, *options)
    assert shown.status == 2
    assert complaint in shown.err


@pytest.mark.parametrize("path", ["nowhere.csv", "."])
def test_what_cannot_be_read_is_named(path: str, fleetctl: Fleetctl) -> None:
    shown = fleetctl("simulate", path)
    assert shown.status == 2
    assert f"error: cannot read {path}" in shown.err


def test_it_reads_standard_input_starts_nothing_and_needs_no_daemon(tmp_path: Path) -> None:
    state = tmp_path / "state"
    report = "import sys; from fleetctl.cli import app; app.run(sys.argv[1:]); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", report, "simulate", "-"],
        input=DAY,
        capture_output=True,
        text=True,
        check=True,
        env={**environment(), "FLEETCTL_STATE_DIR": str(state)},
    )
    assert "50,400 requests" in done.stdout
    assert not state.exists()
    assert not {"asyncio", "pydantic", "psutil", "rich", "fleetctl.fleet", "http.client"} & set(done.stderr.split())


def test_a_chart_loses_no_peak() -> None:
    assert squeeze([1, 9, 1, 1], 2) == [9, 1]
    assert squeeze([1, 2], 5) == [1, 2]
    assert bars([0, 1, 8, 16], columns=4, height=2, top=16) == ["   █", " ▁██"]
    assert bars([0.001, 5], columns=2, height=1, top=100) == ["▁▁"]
    assert bars([0, 0], columns=2, height=1, top=0) == ["  "]
    assert chart("load", [4, 8], columns=20, height=2, top=8) == ["load", "8  █", "0 ██"]
