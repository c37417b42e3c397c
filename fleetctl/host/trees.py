"""Copies and checks folders through descriptors: never out of the folder, whatever its owner makes of it meanwhile.

What is kept: regular files, folders, and symbolic links that stay inside. Sockets, pipes and devices are left out.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fleetctl.models import SavedFile, SavedFolder, SavedLink

_CHUNK_BYTES = 1 << 20
_FICLONE = 0x40049409
_TRIES = 3
_DEEPEST = 100  # folders inside folders; each costs a descriptor while what is below it is copied
_MOST_ENTRIES = 100_000
_KINDS = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_cannot_clone: set[int] = set()  # file systems that said so, by device


class TooLarge(Exception):
    """The tree is larger than it may be."""


class Stopped(Exception):
    """Whoever wanted the work is gone."""


@dataclass(slots=True)
class Tree:
    """What is in a folder, or was when it was copied. `notes`: what is not as it was; `complete`: nothing worth keeping is missing."""

    files: list[SavedFile] = field(default_factory=list)
    folders: list[SavedFolder] = field(default_factory=list)
    links: list[SavedLink] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def holds_something(self) -> bool:
        return bool(self.files or self.links)


def opened_folder(path: str, *, inside: int | None = None) -> int:
    """A descriptor of the folder itself: a symbolic link in its place is an error."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)


@contextlib.contextmanager
def folder_at(path: str, *, inside: int | None = None) -> Iterator[int]:
    fd = opened_folder(path, inside=inside)
    try:
        yield fd
    finally:
        os.close(fd)


def make_folder(name: str, *, inside: int) -> None:
    os.mkdir(name, mode=0o700, dir_fd=inside)


class Walk:
    """One look at a folder: hashes what is worth keeping, and copies it where a target is given. `most_bytes` is spent by all of it.

    Raises TooLarge, Stopped, and OSError for a target that cannot be written; what cannot be read is noted, and the tree not complete.
    """

    def __init__(self, most_bytes: int, stop: threading.Event | None = None) -> None:
        self.tree = Tree()
        self._left = most_bytes
        self._stop = stop or threading.Event()
        self._entries = 0

    def folder(self, source: int, target: int | None, path: str, depth: int = 0) -> None:
        """`path`: what the folder is called in the tree, and whose entries begin with it."""
        found = os.fstat(source)
        self.tree.folders.append(SavedFolder(path=path, mode=found.st_mode & 0o777))
        for name in sorted(os.listdir(source)):
            self._entries += 1
            if self._entries > _MOST_ENTRIES:
                raise TooLarge(f"more than {_MOST_ENTRIES} files")
            with contextlib.suppress(FileNotFoundError):  # gone since: somebody's temporary file
                self._entry(source, target, name, f"{path}/{name}", depth, found.st_dev)
        if target is not None:
            os.fsync(target)

    def _entry(self, source: int, target: int | None, name: str, path: str, depth: int, device: int) -> None:
        found = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFLNK:
            self._link(source, target, name, path)
        elif kind == stat.S_IFREG:
            self._file(source, target, name, path)
        elif kind != stat.S_IFDIR:
            self.tree.notes.append(f"{path} is {_KINDS.get(kind, 'no file')} and is left out")
        elif depth >= _DEEPEST or found.st_dev != device:
            self._missing(path, "too deep inside" if depth >= _DEEPEST else "another file system")
        else:
            self._folder_below(source, target, name, path, depth)

    def _folder_below(self, source: int, target: int | None, name: str, path: str, depth: int) -> None:
        try:
            below = opened_folder(name, inside=source)
        except (PermissionError, NotADirectoryError) as error:
            self._missing(path, error.strerror)
            return
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, below)
            there = None
            if target is not None:
                make_folder(name, inside=target)
                there = stack.enter_context(folder_at(name, inside=target))
            self.folder(below, there, path, depth + 1)

    def _link(self, source: int, target: int | None, name: str, path: str) -> None:
        leads_to = os.readlink(name, dir_fd=source)
        if not stays_inside(path, leads_to):
            self.tree.notes.append(f"{path} leads outside, to {leads_to}, and is left out")
            return
        self.tree.links.append(SavedLink(path=path, target=leads_to))
        if target is not None:
            os.symlink(leads_to, name, dir_fd=target)

    def _file(self, source: int, target: int | None, name: str, path: str) -> None:
        try:
            # Not blocking: between the look and this it may have become a pipe that nobody writes into.
            reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            self._missing(path, error.strerror)
            return
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, reading)
            if not stat.S_ISREG(os.fstat(reading).st_mode):
                return
            writing = None
            if target is not None:
                writing = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target)
                stack.callback(os.close, writing)
            try:
                size, digest, changed = self._content(reading, writing)
            except _Unreadable as error:
                self._missing(path, str(error))
                if target is not None:
                    os.unlink(name, dir_fd=target)
                return
            if changed:
                self.tree.notes.append(f"{path} changed while it was copied")
            mode = os.fstat(reading).st_mode & 0o777
            self.tree.files.append(SavedFile(path=path, size=size, sha256=digest, mode=mode))
            self._left -= size
            if writing is not None:
                os.fsync(writing)

    def _content(self, reading: int, writing: int | None) -> tuple[int, str, bool]:
        """Size and sha256 of what was read, and whether it changed under every try. A file that is replaced by another does not count."""
        for left in reversed(range(_TRIES)):
            before = _version(reading)
            if writing is not None and self._cloned(reading, writing):
                size, digest = self._hashed(writing, None)  # the clone is of one moment, whatever happens to the file
                return size, digest, False
            size, digest = self._hashed(reading, writing)
            if _version(reading) == before:
                return size, digest, False
            if not left:
                return size, digest, True
        raise AssertionError("there is at least one try")

    def _cloned(self, reading: int, writing: int) -> bool:
        device = os.fstat(writing).st_dev
        if device in _cannot_clone:
            return False
        try:
            fcntl.ioctl(writing, _FICLONE, reading)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            _cannot_clone.add(device)
            return False
        return True

    def _hashed(self, reading: int, writing: int | None) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                chunk = os.pread(reading, _CHUNK_BYTES, size)
            except OSError as error:
                raise _Unreadable(error.strerror) from error
            if not chunk:
                break
            if size + len(chunk) > self._left:
                raise TooLarge(f"it grew beyond {self._left} bytes")
            digest.update(chunk)
            if writing is not None:
                _write_all(writing, chunk, size)
            size += len(chunk)
        if writing is not None:
            os.ftruncate(writing, size)
        return size, digest.hexdigest()

    def _missing(self, path: str, why: str | None) -> None:
        self.tree.notes.append(f"{path} is missing: {why}")
        self.tree.complete = False


class _Unreadable(Exception):
    pass


def _write_all(fd: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _version(fd: int) -> tuple[int, int, int]:
    """What changes with every write. Kernels before 6.13 count in ticks of 4 ms: two writes in one of them look like one."""
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def size_of(folder: int, depth: int = 0) -> int:
    """Bytes of the regular files below, as far as a walk would go and as far as can be seen."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    total += found.st_size
                elif stat.S_ISDIR(found.st_mode) and depth < _DEEPEST:
                    with folder_at(entry.name, inside=folder) as below:
                        total += size_of(below, depth + 1)
    return total


def stays_inside(path: str, target: str) -> bool:
    """Whether a link at this path of the tree, leading there, cannot leave the topmost folder of its path.

    `..` may stand in front only: behind another name it starts from wherever that leads.
    """
    if not target or target.startswith("/") or "\0" in target:
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return ".." not in parts[ups:] and ups <= path.count("/") - 1


def sound_path(path: str, tops: tuple[str, ...]) -> bool:
    """Whether it is the path of something in or below one of these folders, in the one way to write it."""
    parts = path.split("/")
    return parts[0] in tops and "\0" not in path and not any(part in ("", ".", "..") for part in parts)


def difference(root: int, tree: Tree, tops: tuple[str, ...], beside: str) -> str:
    """What first is not as the tree says in this folder; empty where all is. `beside`: a file that is no part of it."""
    for path in (*(file.path for file in tree.files), *(folder.path for folder in tree.folders), *(link.path for link in tree.links)):
        if not sound_path(path, tops):
            return f"it names {path!r}, which leads outside"
    for link in tree.links:
        if not stays_inside(link.path, link.target):
            return f"its link {link.path} leads outside, to {link.target}"
    expected = _Expected(
        files={entry.path: entry for entry in tree.files},
        folders={entry.path for entry in tree.folders},
        links={entry.path: entry.target for entry in tree.links},
    )
    found = expected.below(root, "", beside)
    if found:
        return found
    missing = sorted(expected.unseen())
    return f"{missing[0]} is missing" if missing else ""


@dataclass(slots=True)
class _Expected:
    """What is yet to be seen of a tree."""

    files: Mapping[str, SavedFile]
    folders: set[str]
    links: Mapping[str, str]
    seen: set[str] = field(default_factory=set)

    def unseen(self) -> set[str]:
        return (self.files.keys() | self.folders | self.links.keys()) - self.seen

    def below(self, folder: int, path: str, beside: str = "") -> str:
        for name in sorted(os.listdir(folder)):
            if name == beside:
                continue
            inside = f"{path}/{name}" if path else name
            trouble = self._entry(folder, name, inside)
            if trouble:
                return trouble
        return ""

    def _entry(self, folder: int, name: str, path: str) -> str:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFLNK:
            self.seen.add(path)
            right = self.links.get(path) == os.readlink(name, dir_fd=folder)
            return "" if right else f"{path} is a symbolic link that was not saved"
        if kind == stat.S_IFDIR:
            if path not in self.folders:
                return f"{path} was not saved"
            self.seen.add(path)
            with folder_at(name, inside=folder) as below:
                return self.below(below, path)
        if kind != stat.S_IFREG or path not in self.files:
            return f"{path} was not saved"
        self.seen.add(path)
        if found.st_nlink != 1:
            return f"{path} is a hard link to a file that may be anywhere"
        return self._file(folder, name, self.files[path])

    def _file(self, folder: int, name: str, entry: SavedFile) -> str:
        reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            size = os.fstat(reading).st_size
            if size != entry.size:
                return f"{entry.path} has {size} bytes, not {entry.size}"
            return "" if hashed(reading) == entry.sha256 else f"{entry.path} was changed: its checksum is another"
        finally:
            os.close(reading)


def hashed(reading: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(reading, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
