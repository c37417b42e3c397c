"""The checked-in completion scripts are what the command prints, and real shells complete with them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetctl.cli import app
from fleetctl.cli.completion import FILE_NAMES, FILES, SCRIPTS, candidates
from tests.cli.conftest import ROOT, environment
from tests.cli.fake_daemon import FakeDaemon, a_fleet, running

FOLDER = ROOT / "completions"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state directory, a current folder with two files, and `fleetctl` on the PATH."""
    (tmp_path / "here").mkdir()
    for name in ("fleet.toml", "other.toml"):
        (tmp_path / "here" / name).touch()
    program = tmp_path / "bin" / "fleetctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fleetctl "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FLEETCTL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{program.parent}:{environment()['PATH']}")
    return tmp_path


@pytest.fixture
def daemon(place: Path) -> Iterator[FakeDaemon]:
    with running(place / "state") as fake:
        fake.fleets |= {"api": a_fleet("api", 1), "web": a_fleet("web", 1)}
        yield fake


@pytest.mark.parametrize("shell", SCRIPTS)
def test_checked_in_script_is_the_printed_one(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["completion", shell]) == 0
    assert (FOLDER / FILE_NAMES[shell]).read_text() == capsys.readouterr().out


def test_there_are_no_other_scripts() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILE_NAMES.values())


def words(typed: str) -> list[str]:
    """What completes the last word of a command line; an empty one where it ends in a space."""
    *before, word = typed.split(" ")[1:]
    from typer.main import get_command

    return [value for value, _ in candidates(get_command(app.app), before, word)]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("fleetctl sc", ["scale"]),
        ("fleetctl __", []),
        ("fleetctl daemon s", ["start", "stop", "status"]),
        ("fleetctl daemon i", ["install"]),
        ("fleetctl daemon stop --k", ["--keep"]),
        ("fleetctl scale ", ["api=", "web="]),
        ("fleetctl down w", ["web"]),
        ("fleetctl down api w", ["web"]),
        ("fleetctl status ", ["api", "web"]),
        ("fleetctl logs w", ["web", "web-00000"]),
        ("fleetctl logs -n ", []),
        ("fleetctl logs -n 5 web-", ["web-00000"]),
        ("fleetctl inspect a", ["api", "api-00000"]),
        ("fleetctl wait web --for ", ["ready", "count=", "drained"]),
        ("fleetctl wait web --for=c", ["--for=count="]),
        ("fleetctl history --fleet ", ["api", "web"]),
        ("fleetctl completion ", list(SCRIPTS)),
        ("fleetctl import --format s", ["supervisord"]),
        ("fleetctl import ", [FILES]),
        ("fleetctl up --file ", [FILES]),
        ("fleetctl config check ", [FILES]),
        ("fleetctl up -- sl", [FILES]),
        ("fleetctl nonsense ", [FILES]),
        ("fleetctl --state-dir /nowhere down ", []),
        ("fleetctl down --state-dir=/nowhere ", []),
        ("fleetctl ps ", ["api", "web"]),
    ],
)
def test_candidates(typed: str, found: list[str], daemon: FakeDaemon) -> None:
    assert words(typed) == found


def test_options_are_completed_with_their_long_names(daemon: FakeDaemon) -> None:
    own, where = ["--all", "--follow", "--lines", "--tail", "--since"], ["--engine", "--context", "--namespace", "--state-dir"]
    assert words("fleetctl logs --") == [*own, *where, "--help"]
    assert words("fleetctl logs -f") == ["-f"]
    assert {"--hold", "--background"}.isdisjoint(words("fleetctl daemon --"))


def test_names_come_from_the_state_directory_when_the_daemon_is_dead(place: Path) -> None:
    for file in ("fleets/web.json", "run/locks/web-k3x9q.lock"):
        path = place / "state" / file
        path.parent.mkdir(parents=True)
        path.touch()
    before = sorted(place.rglob("*"))
    assert words("fleetctl logs ") == ["web", "web-k3x9q"]
    assert sorted(place.rglob("*")) == before


BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
compopt() { echo "compopt:$2"; }
_fleetctl "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["fleetctl", "sca"], ["scale"]),
        (["fleetctl", "logs", "web"], ["web", "web-00000"]),
        (["fleetctl", "scale", "w"], ["compopt:nospace", "web="]),
        (["fleetctl", "wait", "web", "--for", "=", "r"], ["ready"]),
        (["fleetctl", "up", "--file", ""], ["compopt:default", ""]),
        (["fleetctl", "daemon", "st"], ["start", "stop", "status"]),
    ],
)
def test_bash_completes(typed: list[str], found: list[str], daemon: FakeDaemon) -> None:
    script = str(FOLDER / FILE_NAMES["bash"])
    done = subprocess.run(["bash", "--norc", "-c", BASH, "bash", script, *typed], capture_output=True, text=True, timeout=30)
    assert (done.stdout.splitlines(), done.stderr) == (found, "")


def test_bash_registers_the_function() -> None:
    script = f"source {FOLDER / FILE_NAMES['bash']}; complete -p fleetctl"
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "complete -F _fleetctl fleetctl\n"


def shell_or_skip(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize(
    ("typed", "found"), [("fleetctl sca", ["scale"]), ("fleetctl logs w", ["web", "web-00000"]), ("fleetctl up --file f", ["fleet.toml"])]
)
def test_fish_completes(typed: str, found: list[str], daemon: FakeDaemon, place: Path) -> None:
    script = f"source {FOLDER / FILE_NAMES['fish']}; complete --do-complete '{typed}'"
    environment_of_fish = {**environment(), "HOME": str(place)}
    done = subprocess.run([shell_or_skip("fish"), "-c", script], capture_output=True, text=True, timeout=30, env=environment_of_fish)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == found


# zsh completes in its line editor only: a second zsh on a pseudo-terminal, whose completion functions report what they are given.
ZSH = r"""
zmodload zsh/zpty || exit 77
zpty z zsh -f -i
zpty -w z "PS1=; autoload -Uz compinit; compinit -u -D; source $1"
zpty -w z 'compadd() { builtin compadd -O __found "$@"; print -r -- "<${(j:,:)__found}>"; builtin compadd "$@" }'
zpty -w z 'bindkey "^I" complete-word; print rea''dy'
while zpty -r z line; do [[ $line == *ready* ]] && break; done
zpty -w -n z "$2"$'\t'
typeset all
repeat 100; do
    zpty -r -t z line && all+=$line
    [[ $all == *"<"*">"* ]] && break
    sleep 0.1
done
print -r -- "$all"
"""


@pytest.mark.parametrize(("typed", "found"), [("fleetctl sca", "scale"), ("fleetctl logs web-", "web-00000"), ("fleetctl scale w", "web=")])
def test_zsh_completes(typed: str, found: str, daemon: FakeDaemon, place: Path) -> None:
    script = str(FOLDER / FILE_NAMES["zsh"])
    environment_of_zsh = {**environment(), "HOME": str(place), "ZDOTDIR": str(place)}
    done = subprocess.run(
        [shell_or_skip("zsh"), "-f", "-c", ZSH, "zsh", script, typed], capture_output=True, text=True, timeout=60, env=environment_of_zsh
    )
    if done.returncode == 77:
        pytest.skip("this zsh has no zpty")
    assert f"<{found}>" in done.stdout, done.stdout + done.stderr
