"""What the tests of engines share: a cluster that keeps nothing, and the command line in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetctl.engines.kubernetes import api, logs, watching
from tests.cli.conftest import Fleetctl
from tests.engines.fake_kubernetes import FakeKubernetes, running, write_kubeconfig


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """A cluster that KUBECONFIG names, a folder without a fleet.toml, and short pauses between tries."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("FLEETCTL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FLEETCTL_ENGINE", "kubernetes")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    for module, name in (
        (api, "FIRST_PAUSE_SECONDS"),
        (api, "LONGEST_PAUSE_SECONDS"),
        (logs, "AGAIN_SECONDS"),
        (watching, "AGAIN_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.01)
    with running() as fake:
        write_kubeconfig(tmp_path / "kubeconfig", fake.url)
        yield fake


@pytest.fixture
def fleetctl(capsys: pytest.CaptureFixture[str]) -> Fleetctl:
    return Fleetctl(capsys)
