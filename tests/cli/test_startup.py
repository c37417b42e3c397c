"""The start-up budget as a test: what the common commands may not load."""

import json
import subprocess
import sys

import pytest

from tests.cli.conftest import environment
from tests.cli.fake_daemon import FakeDaemon, a_fleet

HEAVY = {
    "asyncio",
    "pydantic",
    "psutil",
    "rich",
    "http.client",
    "sqlite3",
    "socket",
    "fleetctl.fleet",
    "fleetctl.models",
    "fleetctl.config",
    "fleetctl.engines.kubernetes",
    "yaml",
    "tomllib",
}
# Reports on stderr, because stdout is the command's.
REPORT = """
import json, sys
from fleetctl.cli import app
status = app.run(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["scale", "10"],
        ["status", "--once", "--json"],
        ["status", "--once"],
        ["ps", "--json"],
        ["ps"],
        ["__complete", "--current=", "--", "logs"],
        ["--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_common_commands_load_nothing_heavy(arguments: list[str], daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    done = subprocess.run([sys.executable, "-c", REPORT, *arguments], capture_output=True, text=True, env=environment(), timeout=30)
    status, loaded = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done.stderr
    assert done.stdout or arguments[0] == "__complete"
    assert HEAVY.isdisjoint(loaded), HEAVY & set(loaded)


def test_a_fleet_in_a_cluster_loads_no_more_than_it_needs(daemon: FakeDaemon) -> None:
    """What the local engine needs stays out, and what no engine needs to look."""
    arguments = ["status", "--json", "--engine", "kubernetes"]
    around = environment() | {"KUBECONFIG": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", REPORT, *arguments], capture_output=True, text=True, env=around, timeout=30)
    status, loaded = json.loads(done.stderr.splitlines()[-1])
    assert status == 6, done.stderr
    assert {"asyncio", "pydantic", "psutil", "rich", "sqlite3", "fleetctl.fleet", "fleetctl.client", "fleetctl.config"}.isdisjoint(loaded)


def test_only_the_called_command_is_imported(daemon: FakeDaemon) -> None:
    done = subprocess.run([sys.executable, "-c", REPORT, "ps", "-q"], capture_output=True, text=True, env=environment(), timeout=30)
    loaded = set(json.loads(done.stderr.splitlines()[-1])[1])
    assert {name for name in loaded if name.startswith("fleetctl.cli.")} == {
        f"fleetctl.cli.{name}" for name in ("app", "terminal", "look", "options")
    }
