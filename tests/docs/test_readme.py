"""README.md is true: its commands run and print what it says, its tables are what the code says, its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fleetctl import config
from fleetctl.cli.app import HIDDEN, MODULES
from fleetctl.config.load import ENVIRONMENT_SETTINGS
from fleetctl.config.settings import sections
from fleetctl.host import environment
from fleetctl.models import Agent, FleetSpec
from tests.docs.tables import README, with_tables
from tests.real.harness import ROOT, Place

TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -e "


class Step(NamedTuple):
    """A command of a console block and what the README says that it prints."""

    command: str
    output: str


def steps(block: str) -> list[Step]:
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert parts[0] == "", "a console block begins with a command"
    return [Step(*pair) for pair in zip(parts[1::2], parts[2::2], strict=True)]


def shape(output: str) -> str:
    """The output without what differs from run to run: pids, ids, sizes, times, paths, and the widths that follow from them."""
    output = re.sub(r"\S*/python3?\b", "PYTHON", output)
    output = re.sub(r"\b(demo|greeter)-[a-z0-9]{5}\b", r"\1-ID", output)
    output = re.sub(r"\b\d{8}t\d{6}-[a-z0-9]{5}\b", "CHECKPOINT", output)
    output = re.sub(r"\(pid \d+\)", "(pid N)", output)
    # What the demo says of itself is there or not yet, and changes every few seconds.
    output = re.sub(r" +(NOTE|\d+ units done)$", "", output, flags=re.MULTILINE)
    # Behind an agent's state come numbers, or dashes where nothing was measured yet.
    output = re.sub(r"(?<=running)[ \d.smhd%BKMG-]+$", " NUMBERS", output, flags=re.MULTILINE)
    return re.sub(r" +", " ", output)


@pytest.fixture
def home() -> Iterator[Path]:
    """A home with nothing in it, so that the default state directory is below it."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    state = folder / ".local/state/fleetctl"
    yield folder
    Place(state).close()
    shutil.rmtree(folder)


def run(command: str, home: Path) -> str:
    """What a person sees: both streams together."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FLEETCTL_", "XDG_"))}
    environ |= {"HOME": str(home), "PATH": f"{_program_folder(home)}:{environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=home, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def _program_folder(home: Path) -> Path:
    """Where `fleetctl` is: this checkout with this Python, whether it is installed or not."""
    program = home / "bin/fleetctl"
    if not program.exists():
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fleetctl "$@"\n')
        program.chmod(0o755)
    return program.parent


def test_the_commands_print_what_the_readme_says(home: Path) -> None:
    ran = 0
    for language, block in BLOCKS:
        if language == "toml":
            (home / "fleet.toml").write_text(block)
        for command, output in steps(block) if language == "console" else []:
            assert shape(run(command, home)) == shape(output), command
            ran += 1
    assert ran >= 10
    assert not Place(home / ".local/state/fleetctl").processes(), "the README leaves agents behind"


def test_the_first_screen_has_one_line_that_runs_it_and_one_that_tests_it() -> None:
    lines = [block for language, block in BLOCKS if language == "sh"][:2]
    assert lines == [
        f"{SET_UP}. && .venv/bin/fleetctl up --replicas 5\n",
        f"{SET_UP}'.[dev]' && .venv/bin/pytest\n",
    ]
    assert all(line in "\n".join(TEXT.splitlines()[:25]) for line in map(str.strip, lines))


def test_ci_runs_both_lines_as_the_readme_has_them() -> None:
    """It finds them with these patterns; each must find one line, the right one."""
    script = (ROOT / ".ci/run").read_text()
    patterns = re.findall(r"grep -m1 -E '([^']+)' README.md", script)
    found = [re.findall(pattern, TEXT, re.MULTILINE) for pattern in patterns]
    assert found == [[block.strip()] for language, block in BLOCKS if language == "sh"]


def test_the_tables_are_what_the_code_says() -> None:
    assert with_tables(TEXT) == TEXT, "run python -m tests.docs.tables"


def section(heading: str) -> str:
    return TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_command_is_in_the_list() -> None:
    named = set(re.findall(r"`([a-z]+)", section("Commands")))
    assert set(MODULES) - HIDDEN <= named


def test_every_command_that_is_named_exists() -> None:
    assert set(re.findall(r"`fleetctl ([a-z]+)", TEXT)) <= set(MODULES)


def test_every_variable_that_sets_something_is_named() -> None:
    assert all(f"`FLEETCTL_{key.upper()}`" in section("Environment variables") for key in ENVIRONMENT_SETTINGS)


def test_every_variable_that_an_agent_gets_is_named() -> None:
    agent = Agent(id="web-00000", fleet="web", slot=0, created_at=0.0, token="t")
    given = environment.build(agent, FleetSpec(name="web", command=("true",)), state_root="/s", state_directory="/d", claim_path="/c")
    listed = section("Environment variables")
    assert all(f"`{name}`" in listed for name in given if name.startswith("FLEETCTL_") or name == "STATE_DIRECTORY")


@pytest.mark.parametrize("folder", ["hello", "http-service", "queue-worker", "kubernetes", "mcp-pool", "stateful"])
def test_every_example_has_a_readme_and_a_valid_file(folder: str) -> None:
    assert (ROOT / "examples" / folder / "README.md").read_text().startswith("# ")
    assert [one.spec.name for one in config.load_file(ROOT / "examples" / folder / "fleet.toml")] == [folder]


def test_links_lead_somewhere() -> None:
    for document in (README, *ROOT.glob("examples/*/README.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" not in link
            assert (document.parent / link).exists(), f"{document}: {link}"


def test_links_inside_lead_to_a_heading() -> None:
    headings = re.findall(r"^##+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert links <= anchors, links - anchors
    assert len(links) > 10


def test_settings_that_stand_for_other_tools_words_exist() -> None:
    """Left of the table is what is ours: commands, settings and files."""
    known = {info.key for info in config.settings()} | set(sections()) | {"fleet.toml"}
    words = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\|([^|]*)\|", section("If you come from"), re.MULTILINE)))
    assert {word for word in words if not word.startswith("fleetctl ")} <= known
    assert len(words) > 15


def test_fleet_toml_of_the_readme_is_valid(tmp_path: Path) -> None:
    block = next(block for language, block in BLOCKS if language == "toml")
    (tmp_path / "fleet.toml").write_text(block)
    assert config.load_file(tmp_path / "fleet.toml")[0].spec.name == "greeter"
