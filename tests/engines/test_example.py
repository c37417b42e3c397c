"""examples/kubernetes is true: its file, its image recipe and its agent fit together."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleetctl import config
from fleetctl.engines.kubernetes import manifests
from tests.real.harness import ROOT

FOLDER = ROOT / "examples/kubernetes"
RECIPE = (FOLDER / "Containerfile").read_text()


def test_the_image_holds_what_the_fleet_runs_as_the_user_it_says() -> None:
    (loaded,) = config.load_file(FOLDER / "fleet.toml")
    spec, cluster = loaded.spec, loaded.spec.kubernetes
    assert re.findall(r"^USER (.*)$", RECIPE, re.MULTILINE) == [str(cluster.user)]
    assert re.findall(r"^WORKDIR (.*)$", RECIPE, re.MULTILINE) == [cluster.working_directory]
    copied = re.findall(r"^COPY (\S+) \.$", RECIPE, re.MULTILINE)
    assert copied == [word for word in spec.command if word.endswith(".py")]
    assert cluster.image is not None
    assert f"podman build -t {cluster.image} ." in RECIPE
    assert [one["kind"] for one in manifests.objects(spec)] == ["Deployment"]


def test_the_agent_counts_says_that_it_is_well_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    program, environment = [sys.executable, "-u", str(FOLDER / "counter.py")], {**os.environ, "STATE_DIRECTORY": str(tmp_path)}

    def is_healthy() -> bool:
        return subprocess.run([*program, "--healthy"], env=environment, timeout=30).returncode == 0

    assert not is_healthy()
    for began in (0, 1):
        with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as agent:
            assert agent.stdout is not None
            assert agent.stdout.readline() == f"agent: going on from {began}\n"
            assert agent.stdout.readline() == f"agent: {began + 1}\n"
            assert is_healthy()
            agent.send_signal(signal.SIGTERM)
            said = agent.stdout.read().splitlines()[-1]
            reached = re.fullmatch(r"agent: stopped cleanly at (\d+)", said)
            assert reached
            (tmp_path / "count").write_text("1")  # however many it came to
        assert agent.returncode == 0


@pytest.mark.parametrize("words", ["fleetctl export kubernetes", "--engine kubernetes", "--role"])
def test_its_readme_names_the_commands(words: str) -> None:
    assert words in (FOLDER / "README.md").read_text()
