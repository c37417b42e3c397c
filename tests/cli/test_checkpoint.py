"""`checkpoint` and `drain`: over real checkpoints on disk, and a fake daemon where one is needed."""

import asyncio
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fleetctl.host import checkpoints
from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, CheckpointsSpec
from tests.cli.conftest import Fleetctl
from tests.cli.fake_daemon import FakeDaemon, a_fleet, an_agent
from tests.docs.test_completions import words

ONE, TWO, OTHER = "20261125t004530-aaaaa", "20261125t004531-bbbbb", "20261125t004532-ccccc"
Json = dict[str, Any]  # Any: JSON values


@pytest.fixture
def lifecycle(state_dir: Path) -> LocalLifecycleManager:
    manager = LocalLifecycleManager(str(state_dir))
    manager.paths.prepare()
    return manager


def save(lifecycle: LocalLifecycleManager, agent_id: str = "web-00000", checkpoint_id: str = ONE, token: str = "") -> Json:
    """A checkpoint of a counter, as the daemon would tell of it."""
    agent = Agent(id=agent_id, fleet=agent_id.rpartition("-")[0], slot=0, created_at=0.0, resume_token=token)
    state = Path(lifecycle.paths.agent_state(agent_id))
    state.mkdir(exist_ok=True)
    (state / "counter").write_text("7")
    store = LocalCheckpointStore(lifecycle)
    saved = asyncio.run(store.save(agent, CheckpointsSpec(keep_seconds=1e9), checkpoint_id=checkpoint_id, reason="a test"))
    store.close()
    assert saved.checkpoint is not None
    return checkpoints.described(lifecycle.paths, saved.checkpoint)


@pytest.fixture
def saved(lifecycle: LocalLifecycleManager) -> LocalLifecycleManager:
    save(lifecycle)
    save(lifecycle, checkpoint_id=TWO, token="secret-token")
    save(lifecycle, "api-00001", OTHER)
    return lifecycle


def test_checkpoints_are_listed_oldest_first_with_a_dead_daemon(fleetctl: Fleetctl, saved: LocalLifecycleManager) -> None:
    shown = fleetctl("checkpoint")
    assert shown.status == 0
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [[ONE, "web-00000"], [TWO, "web-00000"], [OTHER, "api-00001"]]
    assert fleetctl("checkpoint", "list", "web").out.count("web-00000") == 2
    (only,) = json.loads(fleetctl("checkpoint", "list", "api-00001", "--json").out)["checkpoints"]
    assert (only["id"], only["files"], only["bytes"], only["kind"], only["has_token"]) == (OTHER, 1, 1, "files", False)


def test_without_any_that_is_said(fleetctl: Fleetctl, state_dir: Path) -> None:
    assert fleetctl("checkpoint").out == "no checkpoints\n"
    assert not state_dir.exists()


def test_names_that_are_nobodys_are_refused(fleetctl: Fleetctl, saved: LocalLifecycleManager) -> None:
    refused = fleetctl("checkpoint", "list", "nobody")
    assert (refused.status, "nobody" in refused.err) == (5, True)


def test_a_damaged_one_is_left_out_of_the_list_and_refused_by_name(fleetctl: Fleetctl, saved: LocalLifecycleManager) -> None:
    Path(saved.paths.checkpoints, "web/web-00000", ONE, "checkpoint.json").write_text("{}")
    listed = fleetctl("checkpoint", "list", "web")
    assert ONE not in listed.out
    assert f"checkpoint {ONE} is damaged" in listed.err
    Path(saved.paths.checkpoints, "web/web-00000", TWO, "state/counter").write_text("8")
    for command in ("show", "export"):
        refused = fleetctl("checkpoint", command, TWO)
        assert (refused.status, f"checkpoint {TWO} is damaged: state/counter was changed" in refused.err) == (1, True)


def test_a_checkpoint_is_shown_without_its_token(fleetctl: Fleetctl, saved: LocalLifecycleManager) -> None:
    for shown in (fleetctl("checkpoint", "show", TWO), fleetctl("checkpoint", "show", TWO, "--json")):
        assert shown.status == 0
        assert "state/counter" in shown.out
        assert "secret-token" not in shown.out + shown.err
    assert "resume token:  yes" in fleetctl("checkpoint", "show", TWO).out


@pytest.mark.parametrize("words", [("show",), ("export",), ("rm",), ("rm", ONE)])
def test_an_unknown_checkpoint_is_not_found(fleetctl: Fleetctl, saved: LocalLifecycleManager, words: tuple[str, ...]) -> None:
    refused = fleetctl("checkpoint", *words, "20200101t000000-zzzzz")
    assert (refused.status, "no checkpoint 20200101t000000-zzzzz" in refused.err) == (5, True)
    assert len(checkpoints.places(saved.paths)) == 3


def test_an_export_is_an_archive_of_all_of_it(fleetctl: Fleetctl, saved: LocalLifecycleManager, tmp_path: Path) -> None:
    target = tmp_path / "here" / f"web-00000-{ONE}.tar.gz"
    assert "would be written" in fleetctl("checkpoint", "export", ONE, "--dry-run").out
    assert not target.exists()
    assert fleetctl("checkpoint", "export", ONE).out == f"{target.name}\n"
    with tarfile.open(target) as archive:
        assert archive.getnames() == [f"{ONE}/checkpoint.json", f"{ONE}/state", f"{ONE}/state/counter"]
    again = fleetctl("checkpoint", "export", ONE)
    assert (again.status, "there is such a file already" in again.err) == (1, True)
    assert fleetctl("checkpoint", "export", ONE, "-o", str(tmp_path / "gone/x")).status == 1


def test_checkpoints_are_removed_when_that_is_meant(fleetctl: Fleetctl, saved: LocalLifecycleManager) -> None:
    assert fleetctl("checkpoint", "rm", ONE, TWO, "--dry-run").out == f"{ONE} would be removed\n{TWO} would be removed\n"
    assert len(checkpoints.places(saved.paths)) == 3
    assert json.loads(fleetctl("checkpoint", "rm", ONE, TWO, "--json").out)["checkpoints"] == [ONE, TWO]
    assert [place.id for place in checkpoints.places(saved.paths)] == [OTHER]


@pytest.mark.parametrize("words", [("checkpoint", "create", "web-00000"), ("checkpoint", "restore", ONE), ("drain", "web-00000")])
def test_what_needs_a_daemon_says_so(fleetctl: Fleetctl, saved: LocalLifecycleManager, words: tuple[str, ...]) -> None:
    assert fleetctl(*words).status == 4


def test_create_prints_the_id(fleetctl: Fleetctl, lifecycle: LocalLifecycleManager, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    daemon.saving = lambda agent_id: save(lifecycle, agent_id)
    assert fleetctl("checkpoint", "create", "web-00000").out == f"{ONE}\n"
    nothing = fleetctl("checkpoint", "create", "web-00000", "--dry-run")
    assert (nothing.out, "web-00000" in nothing.err) == ("", True)


def test_restore_prints_the_new_agents_id(fleetctl: Fleetctl, daemon: FakeDaemon) -> None:
    assert fleetctl("checkpoint", "restore", ONE, "--timeout", "5").out == "web-00099\n"
    assert daemon.asked[-1] == ("POST", f"/v1/checkpoints/{ONE}/restore", {"timeout_seconds": 5.0, "dry_run": False})
    assert fleetctl("checkpoint", "restore", ONE, "--dry-run").out == ""
    assert fleetctl("checkpoint", "restore", ONE, "--timeout", "-1").status == 2


def test_drain_waits_and_prints_the_checkpoint(fleetctl: Fleetctl, lifecycle: LocalLifecycleManager, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    save(lifecycle, "web-00001", ONE)
    daemon.saving = lambda agent_id: save(lifecycle, agent_id, TWO)
    done = fleetctl("drain", "web-00001")
    assert (done.status, done.out) == (0, f"{TWO}\n")
    assert f"web-00001 has ended; what it kept is in checkpoint {TWO}" in done.err


def test_an_old_checkpoint_is_not_taken_for_that_of_the_drain(fleetctl: Fleetctl, saved: LocalLifecycleManager, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    done = fleetctl("drain", "web-00000", "--now")
    assert (done.status, done.out) == (0, "")
    assert "nothing of it was saved" in done.err
    assert ("POST", "/v1/agents/web-00000/drain", {"now": True, "dry_run": False}) in daemon.asked


def test_drain_as_json(fleetctl: Fleetctl, lifecycle: LocalLifecycleManager, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    daemon.saving = lambda agent_id: save(lifecycle, agent_id)
    told = json.loads(fleetctl("drain", "web-00001", "--dry-run", "--json").out)
    assert (told["changed"], told["ended"], told["checkpoint"]) == (False, False, None)
    told = json.loads(fleetctl("drain", "web-00001", "--json").out)
    assert (told["changed"], told["ended"], told["checkpoint"]["id"], told["desired_replicas"]) == (True, True, ONE, 1)


def test_drain_says_what_keeps_it_waiting(fleetctl: Fleetctl, lifecycle: LocalLifecycleManager, daemon: FakeDaemon) -> None:
    stuck = an_agent(1, state="draining", ready=False, unsaved="No space left on device", note="scaled down")
    daemon.fleets["web"] = a_fleet(agents=[an_agent(0), stuck])
    daemon.obedient = False
    waited = fleetctl("drain", "web-00001", "--timeout", "0.3")
    assert waited.status == 124
    assert waited.err.count("No space left on device") == 1
    assert "`fleetctl drain web-00001 --now`" in waited.err


def test_nobody_is_drained_by_mistake(fleetctl: Fleetctl, daemon: FakeDaemon) -> None:
    daemon.fleets["web"] = a_fleet()
    refused = fleetctl("drain", "web-99999")
    assert (refused.status, "no such agent: web-99999" in refused.err) == (5, True)
    assert not [asked for asked in daemon.asked if asked[0] == "POST"]


def test_ids_are_completed_newest_first(saved: LocalLifecycleManager) -> None:
    assert words("fleetctl checkpoint restore ") == [OTHER, TWO, ONE]
    assert words("fleetctl checkpoint rm 20261125t004531") == [TWO]
