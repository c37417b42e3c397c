"""`export kubernetes`: YAML on stdout or in a folder, with what does not map named; nothing of anybody else's written over."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Fleetctl

FILE = """
[[fleet]]
name = "web"
command = ["./serve"]
kubernetes = { image = "example.com/web:1" }
warm_pool = { size = 2 }

[[fleet]]
name = "job"
command = ["work"]
env_file = "keys.env"
kubernetes = { image = "example.com/job:2", namespace = "jobs" }
"""


@pytest.fixture(autouse=True)
def file(state_dir: Path) -> Path:
    path = Path.cwd() / "fleet.toml"
    path.write_text(FILE)
    return path


def test_it_prints_every_object_and_names_what_does_not_map(fleetctl: Fleetctl) -> None:
    result = fleetctl("export", "kubernetes")
    assert result.status == 0
    objects = list(filter(None, yaml.safe_load_all(result.out)))
    assert [(one["kind"], one["metadata"]["name"]) for one in objects] == [
        ("Deployment", "web"),
        ("Deployment", "web-standby"),
        ("Deployment", "job"),
    ]
    for words in ("web: warm_pool: a cluster cannot suspend", "job: env_file: the values come from Secret job-env"):
        assert f"note: {words}" in result.err
        assert f"# {words}" in result.out


def test_a_fleet_of_the_file_alone_with_another_image_and_namespace(fleetctl: Fleetctl) -> None:
    result = fleetctl("export", "kubernetes", "job", "--image", "other:3", "--namespace", "elsewhere", "--json")
    told = json.loads(result.out)
    assert result.err == ""
    (fleet,) = told["fleets"]
    (deployment,) = fleet["objects"]
    assert deployment["metadata"]["namespace"] == "elsewhere"
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "other:3"
    assert {note["setting"] for note in fleet["notes"]} == {"env_file", "kubernetes.storage_size"}


def test_a_folder_has_a_file_for_each_object_and_a_list_of_them(fleetctl: Fleetctl) -> None:
    result = fleetctl("export", "kubernetes", "-o", "deploy", "--role")
    assert result.status == 0
    assert result.out == ""
    listed = yaml.safe_load(Path("deploy/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == ["fleetctl-role.yaml", "job-deployment.yaml", "web-deployment.yaml", "web-standby-deployment.yaml"]
    assert {path.name for path in Path("deploy").iterdir()} == {*listed, "kustomization.yaml"}
    assert fleetctl("export", "kubernetes", "-o", "deploy").status == 0


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_reads_the_folder(fleetctl: Fleetctl) -> None:
    fleetctl("export", "kubernetes", "web", "-o", "deploy")
    done = subprocess.run(["kubectl", "kustomize", "deploy"], capture_output=True, text=True, timeout=30, check=True)
    assert [one["metadata"]["name"] for one in yaml.safe_load_all(done.stdout)] == ["web", "web-standby"]


def test_a_file_of_somebody_else_stays(fleetctl: Fleetctl) -> None:
    Path("deploy").mkdir()
    theirs = Path("deploy/kustomization.yaml")
    theirs.write_text("resources: []\n")
    result = fleetctl("export", "kubernetes", "-o", "deploy")
    assert result.status == 1
    assert "deploy/kustomization.yaml is there and was not written by this command" in result.err
    assert [path.name for path in Path("deploy").iterdir()] == ["kustomization.yaml"]
    assert fleetctl("export", "kubernetes", "-o", "deploy", "--force").status == 0
    assert "web-deployment.yaml" in theirs.read_text()


@pytest.mark.parametrize(
    ("text", "arguments", "status", "words"),
    [
        ('[fleet]\nname = "web"\ncommand = ["x"]', [], 6, "kubernetes.image is missing"),
        ('[fleet]\nname = "web"\ncommand = ["x"]', ["--image", "no image"], 6, '--image "no image": must be the name of an image'),
        (FILE, ["nope"], 5, "fleet.toml has no fleet nope"),
        (FILE, ["-f", "nowhere.toml"], 6, "nowhere.toml"),
        (FILE.replace('"job"', '"web-standby"'), [], 6, "two fleets would have the same Deployment web-standby"),
        (FILE, ["-o", "fleet.toml"], 1, "fleet.toml: File exists"),
    ],
)
def test_bad_input_is_told_and_nothing_printed(
    fleetctl: Fleetctl, file: Path, text: str, arguments: list[str], status: int, words: str
) -> None:
    file.write_text(text)
    result = fleetctl("export", "kubernetes", *arguments)
    assert (result.status, result.out) == (status, "")
    assert words in result.err


def test_without_a_file_it_says_so(fleetctl: Fleetctl, file: Path) -> None:
    file.unlink()
    assert fleetctl("export", "kubernetes").status == 6
