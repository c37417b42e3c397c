"""What outlives the daemon: the lock of the state directory, the wish of each fleet, and the database.

The wishes are files of their own, written whole and renamed: a damaged database costs history, never a fleet, and the values of
environment variables stay out of the database. The database is SQLite in WAL mode, one connection in one thread: a change outlives us
once the method returns, and the machine's power a moment later (`writeback`). A wish does both at once: it has to outlive the
machine. While no daemon runs, `read_agents` and `read_wishes` read it.
"""

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fleetctl.errors import DaemonRunning, KeptByProgram, StateDirectoryError
from fleetctl.host.paths import Paths, file_identity
from fleetctl.host.writeback import CHECKPOINT_BYTES, Writeback
from fleetctl.models import Agent, Event, FleetSpec, ScalingDecision, agent_from_json, agent_to_json, to_json

log = logging.getLogger(__name__)
T = TypeVar("T")

KEPT_EVENTS, KEPT_DECISIONS = 20_000, 20_000
KEPT_SAMPLES = 500_000  # of all fleets: about 100 MB, two weeks of ten fleets at one each 30 s
_PRUNE_EVERY = 1_000
_ROOM = "free some space there and try again; what runs goes on meanwhile"
_LARGEST_WISH_BYTES = 16 * 1024 * 1024
_LOCK_TRIES, _LOCK_RETRY_SECONDS = 20, 0.01
_PROGRAM = "program\n"  # in the lock's file, behind the pid
_CHECK_SECONDS = 5.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS agents (id TEXT PRIMARY KEY, fleet TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS history (id INTEGER PRIMARY KEY, at REAL NOT NULL, fleet TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, at REAL NOT NULL, fleet TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples (id INTEGER PRIMARY KEY, at REAL NOT NULL, fleet TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scaling (fleet TEXT PRIMARY KEY, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spending (fleet TEXT PRIMARY KEY, data TEXT NOT NULL);
"""


class DirectoryLock:
    """Held by the one daemon of a state directory, or by the one program that embeds its fleet.

    The kernel lets go of it when its holder dies, so it is never stale. Raises DaemonRunning, KeptByProgram.
    """

    def __init__(self, paths: Paths, *, program: bool = False) -> None:
        self._path = paths.lock
        try:
            self._fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateDirectoryError(f"{paths.lock}: {error.strerror}") from error
        # A child that the last daemon was just starting has the lock too, until it executes its program: try for a moment.
        for tries in range(_LOCK_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries == _LOCK_TRIES - 1:
                    pid, by_program = _holder(self._fd)
                    os.close(self._fd)
                    if by_program:
                        raise KeptByProgram(f"a program (pid {pid}) keeps the fleets of {paths.root}") from None
                    raise DaemonRunning(f"another daemon (pid {pid or 'unknown'}) holds {paths.root}") from None
                time.sleep(_LOCK_RETRY_SECONDS)
        with contextlib.suppress(OSError):  # a full disk: the pid is only told to people
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n{_PROGRAM * program}".encode(), 0)

    def is_ours(self) -> bool:
        """Whether the file we hold is still the one that others would look at: not when the directory was removed or replaced."""
        try:
            there, held = os.stat(self._path), os.fstat(self._fd)
        except OSError:
            return False
        return os.path.samestat(there, held)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)  # the pid may be a stranger's one day
        os.close(self._fd)


def _holder(lock: int) -> tuple[int, bool]:
    """The pid in the lock's file, 0 for none, and whether it is of a program that embeds the fleet."""
    pid, _, rest = os.pread(lock, 32, 0).decode(errors="replace").partition("\n")
    return int(pid) if pid.isascii() and pid.isdigit() else 0, rest == _PROGRAM


def lock_holder(paths: Paths) -> int | None:
    """Pid of who holds the state directory; 0 where it is held by one that could not write it; None if free."""
    held, pid, _ = _looked_at(paths)
    return pid if held else None


def is_kept_by_program(paths: Paths) -> bool:
    """Whether it is not a daemon that holds the state directory, but a program that embeds its fleet."""
    held, _, by_program = _looked_at(paths)
    return held and by_program


def was_kept_by_program(paths: Paths) -> bool:
    """Whether nobody holds the state directory, and who did was a program that embedded its fleet and is gone."""
    held, pid, by_program = _looked_at(paths)
    return not held and by_program and pid != 0 and not os.path.exists(f"/proc/{pid}")


def _looked_at(paths: Paths) -> tuple[bool, int, bool]:
    """Whether the lock is held, the pid written in its file, and whether that is a program's."""
    try:
        fd = os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False, 0, False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, *_holder(fd)
    else:
        return False, *_holder(fd)
    finally:
        os.close(fd)


def read_wishes(paths: Paths) -> list[dict[str, Any]]:
    """The stored wishes, by name, as {"name": ..., "spec": ..., "down": ...}; what is no wish is reported in the log and left alone."""
    wishes = []
    try:
        names = sorted(name for name in os.listdir(paths.fleets) if name.endswith(".json"))
    except OSError:
        return []
    for name in names:
        try:
            data = json.loads(_regular_file(f"{paths.fleets}/{name}"))
            wishes.append({"name": name.removesuffix(".json"), "spec": dict(data["spec"]), "down": bool(data["down"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.error("the wish in %s/%s cannot be used: %s", paths.fleets, name, error)
    return wishes


def _regular_file(path: str) -> str:
    """The text of a file. Not of a pipe, on which we would wait for ever, and not without end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_WISH_BYTES:
            raise ValueError("not a file of reasonable size")
        return file.read().decode()


def read_agents(paths: Paths) -> list[Agent]:
    """The recorded agents, for reading while no daemon runs. Raises StateDirectoryError where the database cannot be read."""
    if not os.path.exists(paths.database):
        return []
    try:
        with contextlib.closing(sqlite3.connect(paths.database, timeout=2)) as db:
            rows = db.execute("SELECT data FROM agents ORDER BY fleet, id").fetchall()
    except sqlite3.Error as error:
        raise StateDirectoryError(f"{paths.database}: {error}") from error
    return _decoded(row[0] for row in rows)


def read_log(paths: Paths, table: str, fleet: str | None, limit: int) -> list[dict[str, Any]]:
    """The last events or history entries, oldest first, for reading while no daemon runs. Raises StateDirectoryError."""
    if not os.path.exists(paths.database):
        return []
    try:
        with contextlib.closing(sqlite3.connect(paths.database, timeout=2)) as db:
            return _last(db, table, fleet, limit)
    except sqlite3.Error as error:
        raise StateDirectoryError(f"{paths.database}: {error}") from error


def _decoded(rows: Iterable[str]) -> list[Agent]:
    agents = []
    for row in rows:
        try:
            agents.append(agent_from_json(json.loads(row)))
        except (KeyError, TypeError, ValueError) as error:
            log.error("a recorded agent cannot be read (%r); its process is looked for by its token", error)
    return agents


def _last(db: sqlite3.Connection, table: str, fleet: str | None, limit: int) -> list[dict[str, Any]]:
    assert table in ("events", "history", "samples")
    where, values = ("WHERE fleet = ?", [fleet]) if fleet else ("", [])
    rows = db.execute(f"SELECT id, data FROM {table} {where} ORDER BY id DESC LIMIT ?", [*values, limit]).fetchall()
    read = _event if table == "events" else _row
    return [read(*row) for row in reversed(rows)]


def _row(number: int, text: str) -> dict[str, Any]:
    return dict(json.loads(text))


def _event(number: int, text: str) -> dict[str, Any]:
    """Those of old versions have no id. A database that was begun anew counts from 1 again; the time tells its events from the others."""
    event = _row(number, text)
    return {"id": f"{round(float(event.get('at') or 0.0) * 1e6)}-{number}", **event}


class LocalStateManager:
    """`ports.StateManager` in the state directory. Work happens in two threads, for wishes wait for the disk and nothing else should;
    methods may be called from the loop."""

    def __init__(self, state_dir: Paths | str) -> None:
        self.paths = state_dir if isinstance(state_dir, Paths) else Paths(os.path.realpath(state_dir))
        self._thread, self._wishes = ThreadPoolExecutor(1, "state"), ThreadPoolExecutor(1, "wishes")
        self._writeback: Writeback | None = None
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # what the connection has open
        self._rows: dict[str, tuple[str, str]] = {}
        self._since_prune = 0
        self.trouble: str | None = None
        self.failures = 0  # changes and reads that the disk refused
        """What is wrong with the database, or was: the last one set aside. For people."""

    async def open(self) -> list[Agent]:
        """The recorded agents. A damaged database is set aside under another name, and an empty one takes its place."""
        return await self._run(self._open)

    async def save(
        self,
        agents: Iterable[Agent] = (),
        *,
        forget: Iterable[str] = (),
        events: Iterable[Event] = (),
        history: Iterable[tuple[str, ScalingDecision]] = (),
    ) -> None:
        rows = [(agent.id, agent.fleet, json.dumps(agent_to_json(agent))) for agent in agents]
        gone = [(agent_id,) for agent_id in forget]
        told = [(event.at, event.fleet, json.dumps(to_json(event))) for event in events]
        decided = [(one.at, fleet, json.dumps({**to_json(one), "fleet": fleet})) for fleet, one in history]
        await self._run(lambda: self._save(rows, gone, told, decided))

    async def save_wish(self, spec: FleetSpec, *, down: bool) -> None:
        text = json.dumps({"spec": to_json(spec), "down": down}, indent=1)
        await self._run(lambda: _replace_file(self.paths.wish(spec.name), text), self._wishes)

    async def read_wish(self, name: str) -> dict[str, Any] | None:
        """What is wished of a fleet, as {"name": ..., "spec": ..., "down": ...}; None where nothing usable is stored."""
        wishes = await self._run(lambda: read_wishes(self.paths), self._wishes)
        return next((wish for wish in wishes if wish["name"] == name == wish["spec"].get("name")), None)

    async def forget_wish(self, name: str) -> None:
        await self._run(lambda: self._forget_fleet(name))
        # The file last: as long as it is there, all of this is tried again.
        await self._run(lambda: _remove_file(self.paths.wish(name)), self._wishes)

    def _forget_fleet(self, fleet: str) -> None:
        with self._transaction() as db:
            for table in ("scaling", "spending"):
                db.execute(f"DELETE FROM {table} WHERE fleet = ?", (fleet,))

    async def save_scaling(self, fleet: str, memory: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        text, rows = json.dumps(memory), [(one["at"], fleet, json.dumps({**one, "fleet": fleet})) for one in samples]
        await self._run(lambda: self._save_scaling(fleet, text, rows))

    def _save_scaling(self, fleet: str, memory: str, samples: list[tuple[float, str, str]]) -> None:
        with self._transaction() as db:
            _put(db, "scaling", fleet, memory)
            db.executemany("INSERT INTO samples (at, fleet, data) VALUES (?, ?, ?)", samples)
            self._prune(db, len(samples))

    async def load_scaling(self, fleet: str) -> Mapping[str, Any] | None:
        return await self._run(lambda: _get(self._connected(), "scaling", fleet))

    async def save_spending(self, fleet: str, spending: Mapping[str, Any]) -> None:
        text = json.dumps(spending)
        await self._run(lambda: _put(self._connected(), "spending", fleet, text))

    async def load_spending(self, fleet: str) -> Mapping[str, Any] | None:
        return await self._run(lambda: _get(self._connected(), "spending", fleet))

    async def last(self, table: str, fleet: str | None, limit: int) -> list[dict[str, Any]]:
        """The last `limit` rows of "events", "history" or "samples", oldest first."""
        return await self._run(lambda: _last(self._connected(), table, fleet, limit))

    async def events_after(self, number: int, limit: int) -> tuple[int, list[tuple[int, dict[str, Any]]]]:
        """The number of the last event there is, 0 where there is none, and those behind `number`, each with its own."""

        def read() -> tuple[int, list[tuple[int, dict[str, Any]]]]:
            db = self._connected()
            last = db.execute("SELECT max(id) FROM events").fetchone()[0] or 0
            rows = db.execute("SELECT id, data FROM events WHERE id > ? ORDER BY id LIMIT ?", (number, limit)).fetchall()
            return last, [(row[0], _event(*row)) for row in rows]

        return await self._run(read)

    async def keep_there(self) -> None:
        """Write the database anew, with what is known, whenever somebody removed or replaced its file; never returns."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if self._was_replaced():
                with contextlib.suppress(StateDirectoryError):  # counted; tried again until it heals
                    await self._run(self._write_anew)

    def _was_replaced(self) -> bool:
        return self._file is not None and file_identity(self.paths.database) != self._file

    def _write_anew(self) -> None:
        if self._was_replaced():  # still: another write may have found it damaged
            self._put_aside()
            self.trouble = f"{self.paths.database} was removed or replaced; a new one holds what is known of the agents, but no history"
            log.error("%s", self.trouble)
            self._connected()

    async def close(self) -> None:
        if self._db is not None:
            await self._run(self._db.close)
        if self._writeback is not None:
            await self._run(self._writeback.close)
        self._thread.shutdown()
        self._wishes.shutdown()

    async def _run(self, work: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, self._guarded, work)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            try:
                return work()
            except sqlite3.OperationalError:  # full, locked, read-only: the database itself is whole
                raise
            except sqlite3.DatabaseError as error:
                self._set_aside(error)
                return work()
        except sqlite3.Error as error:
            self.failures += 1
            raise StateDirectoryError(f"{self.paths.database}: {error}", hint=_ROOM if _is_full(error) else None) from error
        except OSError as error:
            self.failures += 1
            where = error.filename or self.paths.root
            raise StateDirectoryError(f"{where}: {error.strerror}", hint=_ROOM if _is_full(error) else None) from error

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            os.close(os.open(self.paths.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            db = sqlite3.connect(self.paths.database, check_same_thread=False, isolation_level=None)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA wal_autocheckpoint = 0")
                db.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_BYTES}")  # what it grew beyond is cut off again
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
                # What was known when the last database was set aside; a full disk may have kept it from being written then.
                db.executemany("INSERT OR IGNORE INTO agents VALUES (?, ?, ?)", [(key, *row) for key, row in self._rows.items()])
                db.execute("COMMIT")
            except BaseException:
                db.close()
                raise
            self._db, self._file = db, file_identity(self.paths.database)
            self._writeback = self._writeback or Writeback(self.paths.database)
        return self._db

    def _open(self) -> list[Agent]:
        db = self._connected()
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        rows = db.execute("SELECT id, fleet, data FROM agents").fetchall()
        self._rows = {row[0]: (row[1], row[2]) for row in rows}
        return _decoded(row[2] for row in rows)

    def _save(
        self,
        rows: list[tuple[str, str, str]],
        gone: list[tuple[str]],
        events: list[tuple[float, str, str]],
        history: list[tuple[float, str, str]],
    ) -> None:
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO agents VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET fleet = excluded.fleet, data = excluded.data", rows
            )
            db.executemany("DELETE FROM agents WHERE id = ?", gone)
            db.executemany("INSERT INTO events (at, fleet, data) VALUES (?, ?, ?)", events)
            db.executemany("INSERT INTO history (at, fleet, data) VALUES (?, ?, ?)", history)
            self._prune(db, len(events) + len(history))
        self._rows.update({row[0]: (row[1], row[2]) for row in rows})
        for (agent_id,) in gone:
            self._rows.pop(agent_id, None)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._connected()
        assert self._writeback is not None, "made with the connection"
        self._writeback.finish(db)
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
            self._writeback.soon()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    def _prune(self, db: sqlite3.Connection, added: int) -> None:
        self._since_prune += added
        if self._since_prune >= _PRUNE_EVERY:
            self._since_prune = 0
            db.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (KEPT_EVENTS,))
            db.execute("DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - ?", (KEPT_DECISIONS,))
            db.execute("DELETE FROM samples WHERE id <= (SELECT max(id) FROM samples) - ?", (KEPT_SAMPLES,))

    def _set_aside(self, error: sqlite3.Error) -> None:
        aside = self._put_aside()
        self.trouble = f"the database was damaged ({error}) and set aside as {aside}; running agents were found again"
        log.error("%s", self.trouble)

    def _put_aside(self) -> str:
        """Put the database out of the way, under a name that says when; the next use makes a new one of what we know."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = self._file = None
        aside = f"{self.paths.database}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.paths.database + suffix, aside + suffix)
        return aside


def _put(db: sqlite3.Connection, table: str, fleet: str, text: str) -> None:
    db.execute(f"INSERT INTO {table} VALUES (?, ?) ON CONFLICT (fleet) DO UPDATE SET data = excluded.data", (fleet, text))


def _get(db: sqlite3.Connection, table: str, fleet: str) -> dict[str, Any] | None:
    row = db.execute(f"SELECT data FROM {table} WHERE fleet = ?", (fleet,)).fetchone()
    try:
        return None if row is None else dict(json.loads(row[0]))
    except (ValueError, TypeError) as error:
        log.error("what is stored of fleet %s in %s cannot be read: %r", fleet, table, error)
        return None


def _replace_file(path: str, text: str) -> None:
    """Write the file whole or not at all, and have it on disk."""
    staged = f"{path}.tmp"
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            with open(fd, "w", encoding="utf-8", closefd=False) as file:
                file.write(text)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(staged, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(staged)
        raise
    _sync_folder(path)


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    _sync_folder(path)


def _is_full(error: sqlite3.Error | OSError) -> bool:
    """Whether room is all that lacks: then another state directory is no way out, for what runs is in this one."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def _sync_folder(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
