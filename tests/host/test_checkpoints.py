"""Checkpoints on disk: whole or not there, checked against their manifest, and never out of their folder."""

import asyncio
import contextlib
import json
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetctl.errors import CheckpointDamaged, FleetctlError, StateDirectoryError, UnknownCheckpoint
from fleetctl.host import checkpoint_store, checkpoints, trees
from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.checkpoints import Place
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, Checkpoint, CheckpointKind, CheckpointsSpec, Saved

ID = "20261125t004530-ab3de"
SPEC = CheckpointsSpec()


A_CHECKPOINT = Checkpoint(
    id=ID, fleet="web", agent_id="web-k3x9q", slot=0, spec_hash="", created_at=0.0, reason="", kind=CheckpointKind.TOKEN, resume_token="t"
)


def an_agent(**changes: Any) -> Agent:  # Any: fields of Agent
    return Agent(**{"id": "web-k3x9q", "fleet": "web", "slot": 2, "created_at": 0.0, "spec_hash": "abc", **changes})


class Disk:
    """A state directory with one agent's STATE_DIRECTORY in it."""

    def __init__(self, root: str) -> None:
        lifecycle = LocalLifecycleManager(root)
        self.paths = lifecycle.paths
        self.paths.prepare()
        self.agent = an_agent()
        self.store = LocalCheckpointStore(lifecycle)
        self.state = Path(self.paths.agent_state(self.agent.id))
        self.state.mkdir()
        self.place = Place(fleet="web", agent_id=self.agent.id, id=ID)
        self.folder = Path(checkpoints.path_of(self.paths, self.place))

    def write(self, path: str, text: str = "x", mode: int = 0o644) -> Path:
        file = self.state / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    def save(self, spec: CheckpointsSpec = SPEC, *, checkpoint_id: str = ID, commanded: bool = False) -> Saved:
        return asyncio.run(self.store.save(self.agent, spec, checkpoint_id=checkpoint_id, reason="a test", commanded=commanded))

    def saved(self) -> Checkpoint:
        found = self.save().checkpoint
        assert found is not None
        return found

    def prepared(self) -> Path:
        asyncio.run(self.store.prepare(self.agent))
        return Path(self.paths.agent_checkpoint(self.agent.id))

    def verify(self) -> Checkpoint:
        return checkpoints.verify(self.paths, self.place)

    def restored(self, agent_id: str = "web-other") -> Path:
        fresh = an_agent(id=agent_id, restore=f"{self.agent.id}/{ID}")
        asyncio.run(self.store.fill(fresh))
        return Path(self.paths.agent_state(agent_id))

    def edit(self, change: Callable[[Any], None]) -> None:  # Any: JSON values
        manifest = self.folder / "checkpoint.json"
        data = json.loads(manifest.read_text())
        change(data)
        manifest.write_text(json.dumps(data))


@pytest.fixture
def disk(state_dir: str) -> Iterator[Disk]:
    here = Disk(state_dir)
    yield here
    here.store.close()


def tree(folder: Path) -> dict[str, object]:
    """Every path below with what it is: mode and content of a file, mode of a folder, target of a link."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode & 0o777
        found[name] = os.readlink(path) if path.is_symlink() else mode if path.is_dir() else (mode, path.read_bytes())
    return found


# ---- saving


def test_what_is_saved_is_what_was_there_with_modes_folders_and_links(disk: Disk) -> None:
    disk.write("counter", "7", 0o640)
    disk.write("deep/er/script", "#!/bin/sh\n", 0o755)
    (disk.state / "empty").mkdir(mode=0o750)
    (disk.state / "deep/latest").symlink_to("er/script")
    (disk.state / "deep/er/up").symlink_to("../../counter")
    before = tree(disk.state)
    saved = disk.saved()
    assert (saved.kind, saved.agent_id, saved.slot, saved.spec_hash, saved.notes) == (CheckpointKind.FILES, "web-k3x9q", 2, "abc", ())
    assert disk.verify() == saved
    assert tree(disk.restored()) == before
    assert disk.restored().stat().st_mode & 0o777 == 0o700


def test_the_manifest_says_what_the_design_says(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.agent = an_agent(resume_token="secret-token")
    disk.save()
    manifest = json.loads((disk.folder / "checkpoint.json").read_text())
    named = {"schema", "id", "fleet", "agent", "slot", "spec_hash", "created_at", "reason", "kind", "resume_token", "files"}
    assert named <= manifest.keys()
    assert (manifest["schema"], manifest["kind"], manifest["resume_token"]) == (checkpoints.SCHEMA, "files", "secret-token")
    (file,) = manifest["files"]
    assert file == {"path": "state/counter", "size": 1, "sha256": file["sha256"], "mode": 0o644}
    assert len(file["sha256"]) == 64


def test_nobody_else_can_read_any_of_it(disk: Disk) -> None:
    disk.write("a/b", "7", 0o666)
    disk.save()
    modes = {path.lstat().st_mode & 0o777 for path in Path(disk.paths.checkpoints).rglob("*")}
    assert modes == {0o600, 0o700}


def test_there_is_no_checkpoint_of_nothing(disk: Disk) -> None:
    (disk.state / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(disk.state / "s"))
        saved = disk.save()
    assert saved == Saved(checkpoint=None)
    assert not os.listdir(disk.paths.checkpoints)


def test_a_token_alone_is_a_checkpoint(disk: Disk) -> None:
    disk.agent = an_agent(resume_token="t")
    saved = disk.saved()
    assert (saved.kind, saved.resume_token, saved.files) == (CheckpointKind.TOKEN, "t", ())
    assert tree(disk.restored()) == {}


def test_a_state_directory_that_does_not_exist_holds_nothing(disk: Disk) -> None:
    disk.state.rmdir()
    assert disk.store.keeps_nothing(disk.agent)
    assert disk.save() == Saved(checkpoint=None)


def test_a_look_tells_whether_an_agent_keeps_something(disk: Disk) -> None:
    assert disk.store.keeps_nothing(disk.agent)
    disk.write("counter")
    assert not disk.store.keeps_nothing(disk.agent)


def test_what_leads_outside_and_what_is_no_file_is_left_out_and_said(disk: Disk) -> None:
    disk.write("kept")
    (disk.state / "out").symlink_to("/etc/passwd")
    (disk.state / "up").symlink_to("../../daemon.lock")
    (disk.state / "sly").symlink_to("here/../../../x")
    os.mkfifo(disk.state / "pipe")
    saved = disk.save()
    assert saved.checkpoint is not None
    assert saved.complete
    assert [file.path for file in saved.checkpoint.files] == ["state/kept"]
    assert saved.checkpoint.links == ()
    assert [note.partition(" ")[0] for note in saved.checkpoint.notes] == ["state/out", "state/pipe", "state/sly", "state/up"]
    assert tree(disk.restored()).keys() == {"kept"}


def test_a_state_directory_that_is_a_link_is_not_followed(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret").write_text("x")
    disk.state.rmdir()
    disk.state.symlink_to(tmp_path / "elsewhere")
    saved = disk.save()
    assert (saved.checkpoint, saved.complete) == (None, False)
    assert "cannot be read" in saved.problem


def test_a_file_that_is_too_large_for_the_limit_is_not_copied_and_that_is_said(disk: Disk) -> None:
    disk.write("model", "x" * 2000)
    saved = disk.save(CheckpointsSpec(max_bytes=1999))
    assert (saved.checkpoint, saved.complete) == (None, False)
    assert "max_bytes (1999)" in saved.problem
    assert "stays where it is" in saved.problem
    assert disk.save(CheckpointsSpec(max_bytes=2000)).complete


def test_a_token_is_saved_though_the_files_are_too_large(disk: Disk) -> None:
    disk.write("model", "x" * 2000)
    disk.agent = an_agent(resume_token="t")
    saved = disk.save(CheckpointsSpec(max_bytes=10))
    assert saved.checkpoint is not None
    assert (saved.checkpoint.kind, saved.checkpoint.files, saved.complete) == (CheckpointKind.TOKEN, (), False)
    assert saved.checkpoint.notes == (saved.problem,)
    disk.verify()


def test_a_file_that_grows_beyond_the_limit_while_it_is_copied_is_noticed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write("model", "x" * 2000)
    monkeypatch.setattr(trees, "size_of", lambda folder: 0)  # what it was when it was looked at
    assert not disk.save(CheckpointsSpec(max_bytes=1000)).complete
    assert not Path(disk.paths.checkpoints, "web").exists()


def changing(monkeypatch: pytest.MonkeyPatch, file: Path, times: int) -> None:
    """Have the file change in place between the look at it and the look after its copying, so many times."""
    looks, look = [0], trees._version

    def and_change(fd: int) -> tuple[int, int, int]:
        found = look(fd)
        looks[0] += 1
        if looks[0] % 2 and looks[0] // 2 < times:
            with open(file, "a") as writing:
                writing.write("more")
        return found

    monkeypatch.setattr(trees, "_version", and_change)
    monkeypatch.setattr(trees.Walk, "_cloned", lambda *_: False)


def test_a_file_that_changes_under_the_copy_is_copied_again(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    file = disk.write("log", "start")
    changing(monkeypatch, file, 2)
    saved = disk.saved()
    assert saved.notes == ()
    assert (disk.folder / "state/log").read_text() == "startmoremore"


def test_a_file_that_never_holds_still_is_noted(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    file = disk.write("log", "start")
    changing(monkeypatch, file, 1000)
    assert disk.saved().notes == ("state/log changed while it was copied",)
    disk.verify()


def test_a_file_that_shrinks_between_two_tries_has_no_old_end(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    file, looks, look = disk.write("log", "a long text"), [0], trees._version

    def and_shrink(fd: int) -> tuple[int, int, int]:
        looks[0] += 1
        if looks[0] == 2:  # it was copied, and then
            file.write_text("ab")
        return look(fd)

    monkeypatch.setattr(trees, "_version", and_shrink)
    monkeypatch.setattr(trees.Walk, "_cloned", lambda *_: False)
    disk.save()
    assert (disk.folder / "state/log").read_text() == "ab"
    disk.verify()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_noted_and_the_directory_is_not_complete(disk: Disk) -> None:
    disk.write("kept")
    disk.write("secret", mode=0)
    saved = disk.save()
    assert not saved.complete
    assert "state/secret is missing: Permission denied" in saved.problem


def test_names_that_are_no_text_survive(disk: Disk) -> None:
    name = os.fsdecode(b"caf\xe9")
    disk.write(name, "x")
    disk.save()
    disk.verify()
    assert [path.name for path in disk.restored().iterdir()] == [name]


# ---- saving again under the same id


def test_what_changed_since_replaces_the_checkpoint_as_a_whole(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.write("job", "half done")
    first = disk.saved()
    disk.write("counter", "8")
    (disk.state / "job").unlink()
    second = disk.saved()
    assert second.id == first.id
    assert tree(disk.folder / "state") == {"counter": (0o600, b"8")}
    assert os.listdir(disk.folder.parent) == [ID]
    disk.verify()


def test_where_nothing_changed_nothing_is_written(disk: Disk) -> None:
    disk.write("counter", "7")
    first = disk.saved()
    before = disk.folder.stat().st_ino
    assert disk.saved() == first
    assert disk.folder.stat().st_ino == before


def test_without_an_exchange_of_names_it_is_replaced_too(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_store, "_exchanged", lambda *_: False)
    test_what_changed_since_replaces_the_checkpoint_as_a_whole(disk)


def test_an_agent_that_did_away_with_all_it_kept_has_no_checkpoint_any_more(disk: Disk) -> None:
    disk.write("job", "to do")
    disk.save()
    (disk.state / "job").unlink()
    assert disk.save() == Saved(checkpoint=None)
    assert checkpoints.places(disk.paths) == []


def test_a_state_directory_that_was_taken_away_empties_no_checkpoint(disk: Disk) -> None:
    """The daemon died after it had removed it, and saves once more."""
    disk.write("job", "to do")
    saved = disk.saved()
    asyncio.run(disk.store.clear(disk.agent))
    assert disk.save() == Saved(checkpoint=saved, fresh=False)
    assert tree(disk.restored()).keys() == {"job"}


def test_what_has_become_too_large_keeps_the_checkpoint_that_is_there(disk: Disk) -> None:
    disk.write("job", "to do")
    saved = disk.saved()
    disk.write("model", "x" * 2000)
    again = disk.save(CheckpointsSpec(max_bytes=1000))
    assert (again.checkpoint, again.complete) == (saved, False)
    disk.verify()


def test_a_damaged_checkpoint_is_saved_anew(disk: Disk) -> None:
    disk.write("job", "to do")
    disk.save()
    (disk.folder / "state/job").write_text("edited")
    disk.save()
    assert (disk.folder / "state/job").read_text() == "to do"


def test_what_a_command_wrote_is_the_checkpoint_and_is_kept_when_the_state_is_added(disk: Disk) -> None:
    disk.write("live.db", "torn")
    written = disk.prepared()
    (written / "dump").write_text("whole")
    saved = disk.save(commanded=True)
    assert saved.checkpoint is not None
    assert (saved.checkpoint.kind, [file.path for file in saved.checkpoint.files]) == (CheckpointKind.COMMAND, ["written/dump"])
    assert not saved.complete  # the STATE_DIRECTORY is not in it
    (written / "dump").unlink()
    again = disk.save()
    assert again.complete
    assert again.checkpoint is not None
    assert (again.checkpoint.kind, len(again.checkpoint.files)) == (CheckpointKind.COMMAND, 2)
    assert (disk.folder / "written/dump").read_text() == "whole"
    assert tree(disk.restored()).keys() == {"live.db"}


def test_a_command_finds_an_empty_folder(disk: Disk) -> None:
    (disk.prepared() / "old").touch()
    assert os.listdir(disk.prepared()) == []


# ---- damage: (what was done to it, what the refusal says)


def _swap_for_link(path: str, disk: Disk) -> None:
    """What is there goes elsewhere, and a link to it takes its place."""
    place, away = Path(disk.paths.root, path), Path(disk.paths.root, "away")
    os.rename(place, away)
    place.symlink_to(away)


def _swap_for_file(disk: Disk) -> None:
    os.rename(disk.folder, Path(disk.paths.root, "away"))
    disk.folder.touch()


def _swap_for_pipe(disk: Disk) -> None:
    (disk.folder / "state/counter").unlink()
    os.mkfifo(disk.folder / "state/counter")


def _link_out(disk: Disk) -> None:
    (disk.folder / "state/l").symlink_to("/etc")
    disk.edit(lambda data: data["links"].append({"path": "state/l", "target": "/etc"}))


def _halve(disk: Disk) -> None:
    manifest = disk.folder / "checkpoint.json"
    os.truncate(manifest, manifest.stat().st_size // 2)


def _rename(path: str) -> Callable[[Disk], None]:
    return lambda disk: disk.edit(lambda data: data["files"][0].update(path=path))


HERE = f"checkpoints/web/web-k3x9q/{ID}"
DAMAGE: dict[str, tuple[Callable[[Disk], object], str]] = {
    "edited": (lambda disk: (disk.folder / "state/counter").write_text("8"), "state/counter was changed"),
    "truncated": (lambda disk: (disk.folder / "state/counter").write_text(""), "has 0 bytes, not 1"),
    "grown": (lambda disk: (disk.folder / "state/counter").write_text("77"), "has 2 bytes, not 1"),
    "missing": (lambda disk: (disk.folder / "state/counter").unlink(), "state/counter is missing"),
    "an extra file": (lambda disk: (disk.folder / "state/extra").touch(), "state/extra was not saved"),
    "an extra folder": (lambda disk: (disk.folder / "state/extra").mkdir(), "state/extra was not saved"),
    "an extra file beside": (lambda disk: (disk.folder / "extra").touch(), "extra was not saved"),
    "a link for a file": (partial(_swap_for_link, f"{HERE}/state/counter"), "state/counter is a symbolic link"),
    "a link for a folder": (partial(_swap_for_link, f"{HERE}/state"), "state is a symbolic link"),
    "a link for the whole": (partial(_swap_for_link, HERE), "it is no folder"),
    "a link for the fleet": (partial(_swap_for_link, "checkpoints/web"), "it is no folder"),
    "a link for the manifest": (partial(_swap_for_link, f"{HERE}/checkpoint.json"), "checkpoint.json cannot be read"),
    "a file for the whole": (_swap_for_file, "it is no folder"),
    "a hard link": (lambda disk: os.link(disk.folder / "state/counter", f"{disk.paths.root}/other"), "is a hard link"),
    "a pipe for a file": (_swap_for_pipe, "state/counter was not saved"),
    "a path up": (_rename("state/../../../../etc/passwd"), "leads outside"),
    "an absolute path": (_rename("/etc/passwd"), "leads outside"),
    "a path of another part": (_rename("checkpoint.json"), "leads outside"),
    "an empty path": (_rename(""), "leads outside"),
    "a link that leads outside": (_link_out, "state/l leads outside, to /etc"),
    "another's manifest": (lambda disk: disk.edit(lambda data: data.update(agent="web-other")), "is of another checkpoint"),
    "another schema": (lambda disk: disk.edit(lambda data: data.update(schema="fleetctl/checkpoint/v9")), "checkpoint.json cannot be read"),
    "a number past every float": (lambda disk: disk.edit(lambda data: data.update(keep_seconds=10**400)), "checkpoint.json cannot be read"),
    "no manifest": (lambda disk: (disk.folder / "checkpoint.json").unlink(), "checkpoint.json cannot be read"),
    "half a manifest": (_halve, "checkpoint.json cannot be read"),
    "a manifest of another kind": (lambda disk: (disk.folder / "checkpoint.json").write_text("[1]"), "checkpoint.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_made_of_it(disk: Disk, damage: str) -> None:
    disk.write("counter", "7")
    disk.save()
    change, says = DAMAGE[damage]
    change(disk)
    with pytest.raises(CheckpointDamaged) as refused:
        disk.verify()
    assert ID in refused.value.message
    assert says in refused.value.message
    with pytest.raises(CheckpointDamaged):
        disk.restored()
    assert sorted(os.listdir(disk.paths.agents)) == [disk.agent.id]
    with pytest.raises(CheckpointDamaged):
        checkpoints.export(disk.paths, disk.place, f"{disk.paths.root}/out.tar.gz")
    assert not [name for name in os.listdir(disk.paths.root) if name.startswith("out")]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda one: st.lists(one, max_size=3))


@given(st.dictionaries(st.sampled_from([*checkpoints.to_json(A_CHECKPOINT)]), JSON))
def test_no_manifest_whatever_it_holds_is_more_than_damaged(changes: dict[str, object]) -> None:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):
        checkpoints.from_json({**checkpoints.to_json(A_CHECKPOINT), **changes})


def test_a_store_that_leads_elsewhere_takes_nothing(disk: Disk, tmp_path: Path) -> None:
    disk.write("counter", "7")
    os.makedirs(disk.paths.checkpoints, exist_ok=True)
    Path(disk.paths.checkpoints, "web").symlink_to(tmp_path)
    with pytest.raises(StateDirectoryError, match="checkpoints/web"):
        disk.save()
    assert list(tmp_path.iterdir()) == []


# (path of the link, where it leads, whether it stays inside)
LINKS = [
    ("state/l", "counter", True),
    ("state/l", "./a//b", True),
    ("state/l", "..", False),
    ("state/l", "/etc", False),
    ("state/l", "", False),
    ("state/l", "a/..", False),
    ("state/a/l", "../counter", True),
    ("state/a/l", "../../written/x", False),
    ("state/a/b/l", "../..", True),
    ("state/a/b/l", "../../..", False),
    ("state/a/b/l", "../c/../../..", False),
]


@pytest.mark.parametrize(("path", "target", "inside"), LINKS)
def test_links_that_stay_inside(path: str, target: str, inside: bool) -> None:
    assert trees.stays_inside(path, target) is inside


# ---- finding, keeping, removing


def test_unknown_checkpoints_are_said_to_be_unknown(disk: Disk) -> None:
    for name in (ID, "nonsense", "../../etc", "", "20261125t004530-AB3DE"):
        with pytest.raises(UnknownCheckpoint):
            checkpoints.find(disk.paths, name)


def test_what_is_staged_is_not_listed_and_goes_when_a_daemon_starts(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.save()
    parent = disk.folder.parent
    for leftover in (".20261125t004531-zzzzz.partial", f".{ID}.removed", f".{ID}.old"):
        (parent / leftover / "state").mkdir(parents=True)
    Path(disk.paths.agents, ".web-other.partial").mkdir()
    assert [place.id for place in checkpoints.places(disk.paths)] == [ID]
    disk.store.tidy()
    assert os.listdir(parent) == [ID]
    assert os.listdir(disk.paths.agents) == [disk.agent.id]


def test_a_replacement_that_was_cut_off_between_its_two_names_is_undone(disk: Disk) -> None:
    disk.write("counter", "7")
    saved = disk.saved()
    os.rename(disk.folder, disk.folder.parent / f".{ID}.old")
    disk.store.tidy()
    assert disk.verify() == saved


def test_the_newest_of_each_agent_are_kept(disk: Disk) -> None:
    disk.write("counter", "7")
    ids = [f"20261125t0045{number:02}-aaaaa" for number in range(5)]
    for checkpoint_id in ids:
        disk.save(CheckpointsSpec(keep=3, keep_seconds=1e9), checkpoint_id=checkpoint_id)
    assert [place.id for place in checkpoints.places(disk.paths)] == ids[-3:]


NOW = Place(fleet="web", agent_id="web-a", id="20260101t000000-aaaaa").taken_at


@pytest.mark.parametrize(
    ("keep", "keep_seconds", "gone"),
    [(10, 1e9, []), (1, 1e9, ["a1"]), (10, 50.0, ["a1", "b1"]), (10, 5.0, ["a1", "a2", "b1"]), (1, 50.0, ["a1", "b1"])],
)
def test_which_have_expired(keep: int, keep_seconds: float, gone: list[str]) -> None:
    def place(agent: str, seconds: int) -> Place:
        return Place(fleet="web", agent_id=f"web-{agent[0]}", id=f"20260101t0000{seconds:02}-{agent}aaa")

    there = [place("a1", 0), place("b1", 1), place("a2", 58)]
    found = checkpoints.expired(there, keep, keep_seconds, NOW + 64)
    assert sorted(one.id[16:18] for one in found) == gone


def test_the_one_just_saved_is_spared(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.save(CheckpointsSpec(keep_seconds=0.001), checkpoint_id="20200101t000000-aaaaa")
    assert len(checkpoints.places(disk.paths)) == 1


def test_checkpoints_of_fleets_that_are_gone_are_kept_as_long_as_they_asked_for(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.save(CheckpointsSpec(keep_seconds=1e10), checkpoint_id="20200101t000000-aaaaa")
    asyncio.run(disk.store.expire({}))
    assert len(checkpoints.places(disk.paths)) == 1
    asyncio.run(disk.store.expire({"web": CheckpointsSpec(keep_seconds=60.0)}))
    assert checkpoints.places(disk.paths) == []


def test_removing_leaves_no_empty_folders(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.save()
    checkpoints.remove(disk.paths, disk.place)
    assert os.listdir(disk.paths.checkpoints) == []
    with pytest.raises(UnknownCheckpoint):
        checkpoints.remove(disk.paths, disk.place)


def test_a_state_directory_is_taken_away_whatever_its_modes(disk: Disk) -> None:
    disk.write("a/b", "x", 0o400)
    (disk.state / "a").chmod(0o500)
    asyncio.run(disk.store.prepare(disk.agent))
    asyncio.run(disk.store.clear(disk.agent))
    assert os.listdir(disk.paths.agents) == []


# ---- restoring, exporting


def test_a_state_directory_that_is_there_is_not_filled_again(disk: Disk) -> None:
    disk.write("counter", "7")
    disk.save()
    (disk.restored() / "counter").write_text("8")
    assert (disk.restored() / "counter").read_text() == "8"


def test_restoring_what_does_not_exist_is_unknown(disk: Disk) -> None:
    with pytest.raises(UnknownCheckpoint):
        disk.restored()


def test_an_archive_holds_everything_and_unpacks_to_a_whole_checkpoint(disk: Disk, tmp_path: Path) -> None:
    disk.write("a/counter", "7", 0o640)
    (disk.state / "l").symlink_to("a/counter")
    disk.agent = an_agent(resume_token="t")
    disk.save()
    target = tmp_path / "out.tar.gz"
    assert checkpoints.export(disk.paths, disk.place, str(target)) == target.stat().st_size
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        archive.extractall(tmp_path / "in", filter="data")
    assert tree(tmp_path / "in" / ID / "state") == {"a": 0o755, "a/counter": (0o640, b"7"), "l": "a/counter"}
    assert json.loads((tmp_path / "in" / ID / "checkpoint.json").read_text()) == json.loads((disk.folder / "checkpoint.json").read_text())
    with pytest.raises(FleetctlError, match="already"):
        checkpoints.export(disk.paths, disk.place, str(target))


def test_work_that_nobody_wants_any_more_ends_and_leaves_nothing(disk: Disk) -> None:
    disk.write("counter", "7")
    stop = threading.Event()
    stop.set()
    disk.store._stop = stop
    with pytest.raises(StateDirectoryError):
        disk.save()
    assert not Path(disk.paths.checkpoints, "web").exists()
