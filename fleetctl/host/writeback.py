"""Has what the database was told reach the disk a moment later, beside whoever goes on writing to it.

What SQLite wrote to its log is the kernel's: it survives our death at any moment, which is what a record of agents is for. Only a
machine that loses its power loses what the disk does not have, and then the agents of that record are gone too. So nobody waits for
the disk, which under load takes a hundred times as long; what is lost with the power is the last moment.
"""

import contextlib
import logging
import os
import sqlite3
import threading

log = logging.getLogger(__name__)

_MOMENT_SECONDS = 0.05
CHECKPOINT_BYTES = 4 * 1024 * 1024  # SQLite's own choice, a thousand pages


class Writeback:
    """One thread, which sleeps while nothing is written. Made with the database's path; `close` has everything on disk."""

    def __init__(self, database: str) -> None:
        self._database, self._log = database, f"{database}-wal"
        self._written, self._closing = threading.Event(), threading.Event()
        self._nearly_empty = False
        self._thread = threading.Thread(target=self._run, name="writeback", daemon=True)
        self._thread.start()

    def soon(self) -> None:
        self._written.set()

    def finish(self, db: sqlite3.Connection) -> None:
        """To be called by the writer before it writes: the log starts anew only where the very last change has left it too.

        Most was taken out of it by us, and somebody would have waited for that; the writer waits for what has come since.
        """
        if self._nearly_empty:
            self._nearly_empty = False
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        self._closing.set()
        self._written.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._written.wait()
            self._closing.wait(_MOMENT_SECONDS)  # many changes, one write
            self._written.clear()
            try:
                self._write()
            except (OSError, sqlite3.Error) as error:
                log.error("%s: what was written may not outlive a loss of power: %s", self._database, error)

    def _write(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # set aside, or closed
            fd = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fdatasync(fd)
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if size > CHECKPOINT_BYTES:
                with contextlib.closing(sqlite3.connect(f"file:{self._database}?mode=rw", uri=True)) as db:
                    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                self._nearly_empty = True
