"""Checkpoints being made: `ports.CheckpointStore` in one state directory, its work done in threads.

Everything is staged under a name with a dot, synced, and renamed; nothing that is there is ever changed in place. What interrupted
work leaves behind has such a name, and is removed when the next daemon starts.
"""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from fleetctl.errors import CheckpointDamaged, FleetctlError, SpawnFailed, UnknownCheckpoint
from fleetctl.host import checkpoints, commands, trees
from fleetctl.host.checkpoints import MANIFEST, PARTIAL, STATE, TOPS, Place, discard, names_in, opened, prune_folders, remove_tree, told
from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.trees import TooLarge, Tree, Walk
from fleetctl.models import AGENT_ID_PATTERN, NAME_PATTERN, Agent, Checkpoint, CheckpointKind, CheckpointsSpec, FleetSpec, Saved

log = logging.getLogger(__name__)
T = TypeVar("T")

_ROUNDING_BYTES = 1 << 40  # for trees of our own, whose size was checked when they were saved
_THREADS = 4
_RENAME_EXCHANGE = 2
_SAID_BYTES = 300
_OLD = ".old"


class LocalCheckpointStore:
    """`ports.CheckpointStore` in one state directory."""

    def __init__(self, lifecycle: LocalLifecycleManager) -> None:
        self._lifecycle, self._paths = lifecycle, lifecycle.paths
        self._threads = ThreadPoolExecutor(_THREADS, "checkpoints")
        self._stop = threading.Event()

    def tidy(self) -> None:
        """Remove what interrupted work left behind; once, before anything else is asked for."""
        folders = [self._paths.agents]
        for fleet in names_in(self._paths.checkpoints, NAME_PATTERN):
            found = f"{self._paths.checkpoints}/{fleet}"
            folders += [f"{found}/{agent}" for agent in names_in(found, AGENT_ID_PATTERN)]
        for folder in folders:
            try:
                _tidy(folder)
            except OSError as error:
                log.warning("%s cannot be tidied: %s", folder, error)

    def close(self) -> None:
        """Have work that is under way end soon, undone."""
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def keeps_nothing(self, agent: Agent) -> bool:
        for folder in (self._paths.agent_state(agent.id), self._paths.agent_checkpoint(agent.id)):
            try:
                with os.scandir(folder) as entries:
                    if next(entries, None) is not None:
                        return False
            except FileNotFoundError:
                continue
            except OSError:  # no folder, or one that cannot be read: to be told of
                return False
        return True

    async def prepare(self, agent: Agent) -> None:
        await self._in_thread(self._prepare, agent)

    async def command(self, agent: Agent, spec: FleetSpec) -> None:
        seconds, output = spec.graceful_drain.checkpoint_timeout_seconds, os.memfd_create("output", os.MFD_CLOEXEC)
        try:
            async with asyncio.timeout(seconds):
                ended = await commands.run(spec.checkpoints.command, agent, spec, self._lifecycle, output=output)
            trouble = "" if ended.code == 0 else str(ended)
        except TimeoutError:
            trouble = f"not done after {seconds:g} s"
        except (OSError, SpawnFailed) as error:
            trouble = f"cannot be run: {getattr(error, 'strerror', None) or error}"
        finally:
            said = _last_line(output)
            os.close(output)
        if trouble:
            raise FleetctlError(f"checkpoints.command: {trouble}{': ' * bool(said)}{said}")

    async def save(self, agent: Agent, spec: CheckpointsSpec, *, checkpoint_id: str, reason: str, commanded: bool = False) -> Saved:
        return await self._in_thread(self._save, agent, spec, checkpoint_id, reason, commanded)

    async def clear(self, agent: Agent) -> None:
        await self._in_thread(self._clear, agent)

    async def fill(self, agent: Agent) -> None:
        await self._in_thread(self._fill, agent)

    async def find(self, checkpoint_id: str) -> Checkpoint:
        return await self._in_thread(lambda: checkpoints.verify(self._paths, checkpoints.find(self._paths, checkpoint_id)))

    async def checkpoints(self, fleet: str | None = None, agent_id: str | None = None) -> list[Checkpoint]:
        return (await self._in_thread(checkpoints.listing, self._paths, fleet, agent_id))[0]

    async def remove(self, checkpoint_id: str) -> None:
        await self._in_thread(lambda: checkpoints.remove(self._paths, checkpoints.find(self._paths, checkpoint_id)))

    async def expire(self, specs: Mapping[str, CheckpointsSpec]) -> None:
        """Remove what need not be kept any longer, of fleets that are gone too: by what was asked for when it was saved."""
        await self._in_thread(self._expire, specs)

    async def _in_thread(self, work: Callable[..., T], *values: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *values)

    # -- what is done in a thread

    def _prepare(self, agent: Agent) -> None:
        folder = self._paths.agent_checkpoint(agent.id)
        with told(self._paths):
            if os.path.isdir(folder) and not os.path.islink(folder):
                _empty(folder)  # the folder itself stays: an agent in a sandbox sees this one
                return
            remove_tree(folder)
            os.mkdir(folder, 0o700)

    def _save(self, agent: Agent, spec: CheckpointsSpec, checkpoint_id: str, reason: str, commanded: bool) -> Saved:
        place = Place(fleet=agent.fleet, agent_id=agent.id, id=checkpoint_id)
        with told(self._paths):
            saving = _Saving(self._paths, place, agent, spec, reason, self._stop, commanded=commanded)
            saved = saving.run()
            if saved.checkpoint is not None:
                self._retain(place, spec)
            return saved

    def _retain(self, place: Place, spec: CheckpointsSpec) -> None:
        """Of this agent only: `expire` looks after all, now and then."""
        found = checkpoints.places(self._paths, place.fleet, place.agent_id)
        for old in checkpoints.expired(found, spec.keep, spec.keep_seconds, time.time(), spared=place.id):
            with contextlib.suppress(UnknownCheckpoint):
                checkpoints.remove(self._paths, old)

    def _expire(self, specs: Mapping[str, CheckpointsSpec]) -> None:
        now = time.time()
        for fleet in names_in(self._paths.checkpoints, NAME_PATTERN):
            found = checkpoints.places(self._paths, fleet)
            if fleet in specs:
                gone = checkpoints.expired(found, specs[fleet].keep, specs[fleet].keep_seconds, now)
            else:
                gone = [place for place in found if now - place.taken_at > self._keep_seconds(place)]
            for place in gone:
                with contextlib.suppress(UnknownCheckpoint):
                    checkpoints.remove(self._paths, place)

    def _keep_seconds(self, place: Place) -> float:
        try:
            return checkpoints.read(self._paths, place).keep_seconds
        except FleetctlError:
            return CheckpointsSpec().keep_seconds

    def _clear(self, agent: Agent) -> None:
        with told(self._paths):
            for folder in (self._paths.agent_state(agent.id), self._paths.agent_checkpoint(agent.id)):
                with contextlib.suppress(FileNotFoundError):
                    discard(os.path.dirname(folder), os.path.basename(folder))

    def _fill(self, agent: Agent) -> None:
        """Staged and renamed too: a STATE_DIRECTORY that is there was filled, whatever the agent has made of it since."""
        target = self._paths.agent_state(agent.id)
        if os.path.lexists(target):
            return
        agent_id, _, checkpoint_id = agent.restore.partition("/")
        staged = f"{self._paths.agents}/.{agent.id}{PARTIAL}"
        with told(self._paths), opened(self._paths, Place(fleet=agent.fleet, agent_id=agent_id, id=checkpoint_id)) as folder:
            checkpoint = checkpoints.verified(folder, Place(fleet=agent.fleet, agent_id=agent_id, id=checkpoint_id))
            remove_tree(staged)
            os.mkdir(staged, 0o700)
            try:
                self._fill_staged(folder, checkpoint, staged)
                os.rename(staged, target)
            except BaseException:
                remove_tree(staged)
                raise
            _sync(self._paths.agents)

    def _fill_staged(self, folder: int, checkpoint: Checkpoint, staged: str) -> None:
        if not any(one.path == STATE for one in checkpoint.folders):
            return
        walk = Walk(_ROUNDING_BYTES, self._stop)
        with trees.folder_at(STATE, inside=folder) as source, trees.folder_at(staged) as target:
            walk.folder(source, target, STATE)
            copied = {file.path: file.sha256 for file in walk.tree.files}
            if copied != {file.path: file.sha256 for file in checkpoint.files if file.path.startswith(f"{STATE}/")}:
                raise CheckpointDamaged(f"checkpoint {checkpoint.id} is damaged: it was changed meanwhile")
            _set_modes(target, checkpoint)


class _Saving:
    """One checkpoint on its way to disk."""

    def __init__(
        self, paths: Paths, place: Place, agent: Agent, spec: CheckpointsSpec, reason: str, stop: threading.Event, *, commanded: bool
    ) -> None:
        self._paths, self._place, self._agent, self._spec, self._reason, self._stop = paths, place, agent, spec, reason, stop
        self._commanded = commanded
        self._problem = ""
        self._known: Checkpoint | None = None
        self._kept: set[str] = set()  # parts that come from the checkpoint that is there

    def run(self) -> Saved:
        """Raises OSError; leaves nothing half-done behind."""
        with contextlib.ExitStack() as stack:
            old = self._old(stack)
            sources = {top: source for top in TOPS if (source := self._source(stack, top, old)) is not None}
            if self._known is not None:
                seen = self._walked(sources, None)
                if self._problem or self._is_known(seen):
                    return replace(self._saved(self._known, seen), fresh=False)
            return self._staged(stack, sources)

    def _old(self, stack: contextlib.ExitStack) -> int | None:
        """The checkpoint that is there under this id already; a damaged one is made anew."""
        try:
            folder = stack.enter_context(opened(self._paths, self._place))
            self._known = checkpoints.verified(folder, self._place)
        except UnknownCheckpoint:
            return None
        except CheckpointDamaged as error:
            log.warning("%s; it is saved anew", error.message)
            return None
        return folder

    def _source(self, stack: contextlib.ExitStack, top: str, old: int | None) -> int | None:
        """Where this part of the checkpoint comes from: the agent, or where that has none the checkpoint that is there already."""
        if top == STATE and self._commanded:
            return None
        here = self._paths.agent_state(self._agent.id) if top == STATE else self._paths.agent_checkpoint(self._agent.id)
        try:
            found = stack.enter_context(trees.folder_at(here))
        except FileNotFoundError:
            found = None
        except OSError as error:
            self._problem = f"{here} cannot be read: {error.strerror}"
            return None
        if found is not None and (top == STATE or os.listdir(found)):
            return found
        if old is not None and self._known is not None and any(one.path == top for one in self._known.folders):
            self._kept.add(top)
            return stack.enter_context(trees.folder_at(top, inside=old))
        return None

    def _walked(self, sources: dict[str, int], target: int | None) -> Tree:
        """All parts in one tree; without those that are too large, which is said."""
        if sum(map(trees.size_of, sources.values())) > self._spec.max_bytes:
            self._note_size()
            return Tree(complete=False)
        walk = Walk(self._spec.max_bytes, self._stop)
        try:
            for top, source in sources.items():
                if target is None:
                    walk.folder(source, None, top)
                    continue
                trees.make_folder(top, inside=target)
                with trees.folder_at(top, inside=target) as there:
                    walk.folder(source, there, top)
        except TooLarge as error:
            self._note_size(str(error))
            return Tree(complete=False)
        return self._with_first_modes(walk.tree)

    def _with_first_modes(self, tree: Tree) -> Tree:
        """In the store all is 0600 and 0700; of what is kept from there the manifest knows what it was."""
        if self._known is None or not self._kept:
            return tree
        modes = {file.path: file.mode for file in self._known.files} | {folder.path: folder.mode for folder in self._known.folders}
        modes = {path: mode for path, mode in modes.items() if path.partition("/")[0] in self._kept}
        tree.files = [replace(file, mode=modes.get(file.path, file.mode)) for file in tree.files]
        tree.folders = [replace(folder, mode=modes.get(folder.path, folder.mode)) for folder in tree.folders]
        return tree

    def _note_size(self, why: str = "") -> None:
        beyond = why or f"it holds more than max_bytes ({self._spec.max_bytes})"
        self._problem = f"its STATE_DIRECTORY is not saved and stays where it is: {beyond}"

    def _is_known(self, seen: Tree) -> bool:
        """Whether the checkpoint that is there holds just this already, so that nothing has to be written, on a full disk for instance."""
        known = self._known
        assert known is not None
        same = (seen.files, seen.folders, seen.links) == ([*known.files], [*known.folders], [*known.links])
        return same and known.resume_token == self._agent.resume_token

    def _staged(self, stack: contextlib.ExitStack, sources: dict[str, int]) -> Saved:
        parent = self._parent_folder(stack)
        name = f".{self._place.id}{PARTIAL}"
        path = f"{self._paths.checkpoints}/{self._place.fleet}/{self._place.agent_id}/{name}"
        remove_tree(path)
        try:
            trees.make_folder(name, inside=parent)
            with trees.folder_at(name, inside=parent) as folder:
                tree = self._walked(sources, folder)
                if not tree.holds_something and not self._agent.resume_token:
                    if self._known is not None:  # the agent has done away with it: what is done must not be done again
                        checkpoints.remove(self._paths, self._place)
                    return self._saved(None, tree)
                if self._problem:  # too large: a part of it may be there already
                    _empty(path)
                checkpoint = self._described(tree)
                _write_file(folder, MANIFEST, checkpoints.encoded(checkpoint))
                os.fsync(folder)
            _put_in_place(parent, name, self._place.id)
            os.fsync(parent)
        finally:
            remove_tree(path)  # what did not work, or what had the name before
            prune_folders(self._paths, self._place)
        return self._saved(checkpoint, tree)

    def _parent_folder(self, stack: contextlib.ExitStack) -> int:
        """The folder of the agent's checkpoints, made where it is missing, and reached without following a symbolic link."""
        folder, path = stack.enter_context(trees.folder_at(self._paths.root)), self._paths.root
        for name in (os.path.basename(self._paths.checkpoints), self._place.fleet, self._place.agent_id):
            path = f"{path}/{name}"
            try:
                with contextlib.suppress(FileExistsError):
                    trees.make_folder(name, inside=folder)
                    os.fsync(folder)
                folder = stack.enter_context(trees.folder_at(name, inside=folder))
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error
        return folder

    def _described(self, tree: Tree) -> Checkpoint:
        agent = self._agent
        commanded = self._commanded or (self._known is not None and self._known.kind is CheckpointKind.COMMAND)
        files = CheckpointKind.COMMAND if commanded else CheckpointKind.FILES
        return Checkpoint(
            id=self._place.id,
            fleet=agent.fleet,
            agent_id=agent.id,
            slot=agent.slot,
            spec_hash=agent.spec_hash,
            created_at=round(time.time(), 3),  # as exact as the manifest is
            reason=self._reason,
            kind=files if tree.holds_something else CheckpointKind.TOKEN,
            resume_token=agent.resume_token,
            files=tuple(tree.files),
            folders=tuple(tree.folders),
            links=tuple(tree.links),
            notes=(*tree.notes, *([self._problem] if self._problem else [])),
            keep_seconds=self._spec.keep_seconds,
        )

    def _saved(self, checkpoint: Checkpoint | None, tree: Tree) -> Saved:
        missing = next((note for note in tree.notes if " is missing: " in note), "")
        problem = self._problem or missing
        return Saved(checkpoint=checkpoint, complete=tree.complete and not self._problem and not self._commanded, problem=problem)


def _last_line(fd: int) -> str:
    """The last thing that was written, as one harmless line."""
    size = os.fstat(fd).st_size
    lines = os.pread(fd, _SAID_BYTES, max(0, size - _SAID_BYTES)).decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return " ".join("".join(char if char.isprintable() else " " for char in last).split())


def _write_file(folder: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _put_in_place(parent: int, staged: str, name: str) -> None:
    """The staged folder gets the name, and the folder that had it the staged name, in one step."""
    try:
        os.rename(staged, name, src_dir_fd=parent, dst_dir_fd=parent)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchanged(parent, staged, name):
        # A file system that cannot exchange names: for a moment neither has it, and `tidy` puts the old one back if we die then.
        old = f".{name}{_OLD}"
        os.rename(name, old, src_dir_fd=parent, dst_dir_fd=parent)
        try:
            os.rename(staged, name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            os.rename(old, name, src_dir_fd=parent, dst_dir_fd=parent)
            raise
        os.rename(old, staged, src_dir_fd=parent, dst_dir_fd=parent)


def _exchanged(parent: int, one: str, other: str) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than 2018
        return False
    if renameat2(parent, one.encode(), parent, other.encode(), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), other)


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        remove_tree(f"{folder}/{name}")


def _set_modes(folder: int, checkpoint: Checkpoint) -> None:
    """The permission bits that were saved; the folders last and from below, for they may forbid the way to the others."""
    saved = [(one.path, one.mode) for one in checkpoint.files]
    saved += [(one.path, one.mode) for one in sorted(checkpoint.folders, key=lambda one: one.path.count("/"), reverse=True)]
    for path, mode in saved:
        top, _, below = path.partition("/")
        if top == STATE and below:
            os.chmod(below, mode, dir_fd=folder)  # nobody else writes here: no part of it can have become a link


def _tidy(folder: str) -> None:
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        if name.startswith(".") and name.endswith(_OLD) and not os.path.lexists(whole := f"{folder}/{name[1 : -len(_OLD)]}"):
            os.rename(path, whole)
        elif name.startswith("."):
            remove_tree(path)


def _sync(path: str) -> None:
    with trees.folder_at(path) as fd:
        os.fsync(fd)
