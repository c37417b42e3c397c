"""Checkpoints on disk: `checkpoints/FLEET/AGENT/ID/` with a manifest, complete from the moment its name is there.

`state/` in it is what was in the agent's STATE_DIRECTORY, `written/` what it or a command wrote for the checkpoint. They are read,
checked, removed and exported here, with or without a daemon; `checkpoint_store` makes them.
"""

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from fleetctl.errors import CheckpointDamaged, FleetctlError, StateDirectoryError, UnknownCheckpoint
from fleetctl.host import trees
from fleetctl.host.paths import Paths
from fleetctl.host.trees import Stopped, Tree
from fleetctl.models import AGENT_ID_PATTERN, NAME_PATTERN, Checkpoint, CheckpointKind, SavedFile, SavedFolder, SavedLink

ID_PATTERN = r"^[0-9]{8}t[0-9]{6}-[a-z0-9]{5}$"
SCHEMA = "fleetctl/checkpoint/v1"
MANIFEST = "checkpoint.json"
STATE, WRITTEN = "state", "written"
TOPS = (STATE, WRITTEN)
_LARGEST_MANIFEST_BYTES = 64 * 1024 * 1024
PARTIAL, REMOVED = ".partial", ".removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a checkpoint is, by the names of its folders alone."""

    fleet: str
    agent_id: str
    id: str

    @property
    def taken_at(self) -> float:
        return datetime.strptime(self.id.partition("-")[0], "%Y%m%dt%H%M%S").replace(tzinfo=UTC).timestamp()


# ---- reading


def places(paths: Paths, fleet: str | None = None, agent_id: str | None = None) -> list[Place]:
    """Every complete checkpoint, oldest first; what is no checkpoint's name is passed over."""
    found = []
    for fleet_name in names_in(paths.checkpoints, NAME_PATTERN):
        for agent_name in names_in(f"{paths.checkpoints}/{fleet_name}", AGENT_ID_PATTERN) if fleet in (None, fleet_name) else ():
            if agent_id in (None, agent_name):
                ids = names_in(f"{paths.checkpoints}/{fleet_name}/{agent_name}", ID_PATTERN)
                found += [Place(fleet=fleet_name, agent_id=agent_name, id=one) for one in ids]
    # Within a second by when they were made: a folder's time is that of the last entry in it.
    return sorted(found, key=lambda place: (place.id[:15], _modified(path_of(paths, place)), place.id))


def find(paths: Paths, checkpoint_id: str) -> Place:
    """The place of a checkpoint. Raises UnknownCheckpoint."""
    for place in places(paths) if re.fullmatch(ID_PATTERN, checkpoint_id) else ():
        if place.id == checkpoint_id:
            return place
    raise UnknownCheckpoint(f"no checkpoint {checkpoint_id}")


def path_of(paths: Paths, place: Place) -> str:
    return f"{paths.checkpoints}/{place.fleet}/{place.agent_id}/{place.id}"


def read(paths: Paths, place: Place) -> Checkpoint:
    """What the manifest says. Raises UnknownCheckpoint, CheckpointDamaged."""
    with opened(paths, place) as folder:
        return _manifest(folder, place)


def listing(paths: Paths, fleet: str | None = None, agent_id: str | None = None) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints by their manifests, oldest first, and why others of them cannot be read."""
    found, problems = [], []
    for place in places(paths, fleet, agent_id):
        try:
            found.append(read(paths, place))
        except UnknownCheckpoint:  # removed meanwhile
            continue
        except CheckpointDamaged as error:
            problems.append(error.message)
    return found, problems


def verify(paths: Paths, place: Place) -> Checkpoint:
    """The checkpoint, every file of it read and compared. Raises UnknownCheckpoint; CheckpointDamaged, which says what is wrong."""
    with opened(paths, place) as folder:
        return verified(folder, place)


def verified(folder: int, place: Place) -> Checkpoint:
    checkpoint = _manifest(folder, place)
    try:
        trouble = trees.difference(folder, _tree(checkpoint), TOPS, MANIFEST)
    except OSError as error:
        trouble = f"it cannot be read: {error.strerror}"
    if trouble:
        raise CheckpointDamaged(f"checkpoint {place.id} is damaged: {trouble}")
    return checkpoint


@contextlib.contextmanager
def opened(paths: Paths, place: Place) -> Iterator[int]:
    """The folder of a checkpoint, reached without following a symbolic link."""
    with contextlib.ExitStack() as stack:
        folder: int | None = None
        try:
            for name in (paths.checkpoints, place.fleet, place.agent_id, place.id):
                folder = stack.enter_context(trees.folder_at(name, inside=folder))
        except FileNotFoundError as error:
            raise UnknownCheckpoint(f"no checkpoint {place.id}") from error
        except OSError as error:
            raise CheckpointDamaged(f"checkpoint {place.id} is damaged: it is no folder ({error.strerror})") from error
        assert folder is not None
        yield folder


def _manifest(folder: int, place: Place) -> Checkpoint:
    try:
        checkpoint = from_json(json.loads(_small_file(folder, MANIFEST)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not what was written"
        raise CheckpointDamaged(f"checkpoint {place.id} is damaged: {MANIFEST} cannot be read ({why})") from error
    if (checkpoint.id, checkpoint.fleet, checkpoint.agent_id) != (place.id, place.fleet, place.agent_id):
        raise CheckpointDamaged(f"checkpoint {place.id} is damaged: {MANIFEST} is of another checkpoint")
    return checkpoint


def _small_file(folder: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size > _LARGEST_MANIFEST_BYTES:
            raise ValueError("no file of ours")
        return file.read().decode()


def _tree(checkpoint: Checkpoint) -> Tree:
    return Tree(files=[*checkpoint.files], folders=[*checkpoint.folders], links=[*checkpoint.links])


def to_json(checkpoint: Checkpoint) -> dict[str, Any]:  # Any: JSON values
    """The manifest."""
    return {
        "schema": SCHEMA,
        "id": checkpoint.id,
        "fleet": checkpoint.fleet,
        "agent": checkpoint.agent_id,
        "slot": checkpoint.slot,
        "spec_hash": checkpoint.spec_hash,
        "created_at": datetime.fromtimestamp(checkpoint.created_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "reason": checkpoint.reason,
        "kind": str(checkpoint.kind),
        "resume_token": checkpoint.resume_token,
        "files": [asdict(file) for file in checkpoint.files],
        "folders": [asdict(folder) for folder in checkpoint.folders],
        "links": [asdict(link) for link in checkpoint.links],
        "notes": list(checkpoint.notes),
        "keep_seconds": checkpoint.keep_seconds,
    }


def described(paths: Paths, checkpoint: Checkpoint) -> dict[str, Any]:  # Any: JSON values
    """What is told of it; its token is not."""
    place = Place(fleet=checkpoint.fleet, agent_id=checkpoint.agent_id, id=checkpoint.id)
    manifest = to_json(checkpoint)
    return {
        **{key: manifest[key] for key in ("id", "fleet", "agent", "created_at", "reason", "kind")},
        "has_token": bool(checkpoint.resume_token),
        "files": len(checkpoint.files),
        "bytes": checkpoint.size,
        "notes": list(checkpoint.notes),
        "path": path_of(paths, place),
    }


def detailed(paths: Paths, checkpoint: Checkpoint) -> dict[str, Any]:  # Any: JSON values
    """The same with all that is in it."""
    manifest = to_json(checkpoint)
    more = {"schema": SCHEMA, "slot": checkpoint.slot, "spec_hash": checkpoint.spec_hash}
    return {**described(paths, checkpoint), **more, "contents": manifest["files"], "links": manifest["links"]}


def from_json(data: Any) -> Checkpoint:  # Any: whatever the file holds
    if data["schema"] != SCHEMA:
        raise ValueError(data["schema"])
    return Checkpoint(
        id=_text(data["id"]),
        fleet=_text(data["fleet"]),
        agent_id=_text(data["agent"]),
        slot=int(data["slot"]),
        spec_hash=_text(data["spec_hash"]),
        created_at=datetime.fromisoformat(_text(data["created_at"])).timestamp(),
        reason=_text(data["reason"]),
        kind=CheckpointKind(data["kind"]),
        resume_token=_text(data["resume_token"]),
        files=tuple(
            SavedFile(path=_text(one["path"]), size=int(one["size"]), sha256=_text(one["sha256"]), mode=int(one["mode"]) & 0o777)
            for one in data["files"]
        ),
        folders=tuple(SavedFolder(path=_text(one["path"]), mode=int(one["mode"]) & 0o777) for one in data["folders"]),
        links=tuple(SavedLink(path=_text(one["path"]), target=_text(one["target"])) for one in data["links"]),
        notes=tuple(map(_text, data["notes"])),
        keep_seconds=float(data["keep_seconds"]),
    )


def _text(value: Any) -> str:  # Any: whatever the file holds
    if not isinstance(value, str):
        raise TypeError(value)
    return value


# ---- removing


def remove(paths: Paths, place: Place) -> None:
    """Take it away in one step. Raises UnknownCheckpoint, StateDirectoryError."""
    with told(paths), opened(paths, place):
        discard(f"{paths.checkpoints}/{place.fleet}/{place.agent_id}", place.id)
    prune_folders(paths, place)


def discard(parent: str, name: str) -> None:
    """Remove a folder in one step: what is left of it when we die in the middle has another name."""
    gone = f"{parent}/.{name}{REMOVED}"
    remove_tree(gone)
    os.rename(f"{parent}/{name}", gone)
    remove_tree(gone)


def remove_tree(path: str) -> None:
    def make_way(function: Callable[..., object], name: str, error: object) -> None:
        """A folder that its owner may not write or enter: it was the agent's."""
        os.chmod(os.path.dirname(name), 0o700)
        if os.path.isdir(name) and not os.path.islink(name):
            os.chmod(name, 0o700)
            shutil.rmtree(name)
        else:
            os.unlink(name)

    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, onerror=make_way)
        else:
            os.unlink(path)


def prune_folders(paths: Paths, place: Place) -> None:
    """The folders that held the last one are not needed any more."""
    with contextlib.suppress(OSError):
        os.rmdir(f"{paths.checkpoints}/{place.fleet}/{place.agent_id}")
        os.rmdir(f"{paths.checkpoints}/{place.fleet}")


def expired(found: Sequence[Place], keep: int, keep_seconds: float, now: float, spared: str = "") -> list[Place]:
    """Which of one fleet's checkpoints, oldest first, need not be kept any longer."""
    behind: dict[str, int] = {}
    gone = []
    for place in reversed(found):
        behind[place.agent_id] = behind.get(place.agent_id, 0) + 1
        if (behind[place.agent_id] > keep or now - place.taken_at > keep_seconds) and place.id != spared:
            gone.append(place)
    return gone


# ---- exporting


def export(paths: Paths, place: Place, target: str) -> int:
    """Write it as a gzipped tar archive, every file checked on the way; its size in bytes. Raises CheckpointDamaged, FleetctlError."""
    import tarfile

    staged = f"{target}{PARTIAL}"
    if os.path.lexists(target):
        raise FleetctlError(f"{target}: there is such a file already", hint="choose another name with --output")
    with opened(paths, place) as folder:
        checkpoint = verified(folder, place)
        try:
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with open(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
                    _add_all(archive, folder, checkpoint)
                os.rename(staged, target)
            except BaseException:
                os.unlink(staged)
                raise
            return os.stat(target).st_size
        except OSError as error:
            raise FleetctlError(f"{target}: {error.strerror}") from error


def _add_all(archive: Any, folder: int, checkpoint: Checkpoint) -> None:  # Any: tarfile is imported where it is used
    """The manifest, then all that it names: the bytes read now are compared with it once more."""
    import io
    import tarfile

    def header(path: str, mode: int, kind: bytes, size: int = 0) -> tarfile.TarInfo:
        info = tarfile.TarInfo(f"{checkpoint.id}/{path}" if path else checkpoint.id)
        info.mode, info.type, info.size, info.mtime = mode, kind, size, int(checkpoint.created_at)
        return info

    manifest = encoded(checkpoint)
    archive.addfile(header(MANIFEST, 0o600, tarfile.REGTYPE, len(manifest)), io.BytesIO(manifest))
    for one in checkpoint.folders:
        archive.addfile(header(one.path, one.mode, tarfile.DIRTYPE))
    for link in checkpoint.links:
        info = header(link.path, 0o777, tarfile.SYMTYPE)
        info.linkname = link.target
        archive.addfile(info)
    for saved in checkpoint.files:
        with _file_at(folder, saved.path) as reading:
            if os.fstat(reading).st_size != saved.size or trees.hashed(reading) != saved.sha256:
                raise CheckpointDamaged(f"checkpoint {checkpoint.id} is damaged: {saved.path} was changed meanwhile")
            with open(reading, "rb", closefd=False) as file:
                archive.addfile(header(saved.path, saved.mode, tarfile.REGTYPE, saved.size), file)


@contextlib.contextmanager
def _file_at(folder: int, path: str) -> Iterator[int]:
    """A file below the folder, reached without following a symbolic link."""
    with contextlib.ExitStack() as stack:
        at = folder
        *above, name = path.split("/")
        for part in above:
            at = stack.enter_context(trees.folder_at(part, inside=at))
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        stack.callback(os.close, fd)
        yield fd


def encoded(checkpoint: Checkpoint) -> bytes:
    return (json.dumps(to_json(checkpoint), indent=1) + "\n").encode()  # ASCII: names that are no text survive as escapes


def names_in(folder: str, pattern: str) -> list[str]:
    """Sorted; a symbolic link in the place of the folder has none."""
    try:
        with trees.folder_at(folder) as fd:
            return sorted(name for name in os.listdir(fd) if re.fullmatch(pattern, name))
    except OSError:
        return []


def _modified(path: str) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0


@contextlib.contextmanager
def told(paths: Paths) -> Iterator[None]:
    """Trouble of the disk as an error that says where."""
    try:
        yield
    except Stopped as error:
        raise StateDirectoryError("the daemon ends") from error
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) and error.filename.startswith("/") else paths.checkpoints
        raise StateDirectoryError(f"{where}: {error.strerror}", hint="free some space there") from error
