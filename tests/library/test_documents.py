"""What the documents show of the library: run as it stands there."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import fleetctl
import fleetctl.testing
from tests.real.harness import ROOT, Place, spec

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## From Python\n")[2].partition("\n## ")[0]
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def output_of(code: str | Path, state_dir: str | None = None) -> str:
    words = [sys.executable, str(code)] if isinstance(code, Path) else [sys.executable, "-c", code]
    environ = {**os.environ, **({"FLEETCTL_STATE_DIR": state_dir} if state_dir else {})}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_of_the_readme_runs() -> None:
    ready, metrics, acquired, ended = re.fullmatch(
        r"((?:fleet-\S{5}: running\n){3})(3 replicas, CPU \d+\.\d%\n)(warm|cold)\n(ended: .*; healthy: True\n)", output_of(PROGRAMS[0])
    ).groups()  # type: ignore[union-attr]  # where it does not match, the test has failed
    assert ready
    assert metrics
    assert len(re.findall(r"fleet-\S{5}\b", ended)) == (2 if acquired == "warm" else 1)


def test_the_client_of_the_readme_scales_a_daemons_fleet(place: Place) -> None:
    place.start()
    place.client.apply("demo", spec("demo", ["sleep", "600"], 1))
    assert re.fullmatch(r"(demo-\S{5}: running, pid \d+\n){3}", output_of(PROGRAMS[1], place.root))


def test_the_story_in_the_docstring_of_the_fakes_is_true() -> None:
    lines = (fleetctl.testing.__doc__ or "").partition("no waiting:\n")[2].splitlines()
    exec(textwrap.dedent("\n".join(lines)), {**vars(fleetctl.testing), "FleetManager": fleetctl.FleetManager})


def test_the_example_gives_each_session_an_agent() -> None:
    said = output_of(ROOT / "examples/library/sessions.py")
    sessions = re.findall(r"^session \d: (sessions-\S{5}) \(process \d+\), (warm|cold), after \d+ ms$", said, re.MULTILINE)
    assert len({agent_id for agent_id, _ in sessions}) == 3
    assert [how for _, how in sessions][:2] == ["warm", "warm"]
    assert re.search(rf"^ended, the oldest first: {sessions[0][0]}, {sessions[1][0]}$", said, re.MULTILINE)
    assert f"the pool had what was asked for {sum(how == 'warm' for _, how in sessions)} times of 3" in said
