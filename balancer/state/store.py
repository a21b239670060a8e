"""Values by space and key in an SQLite file, which one process has for itself.

It is in WAL mode: a commit appends to `FILE-wal` and waits for no disk (30 us instead of 22 ms), and neither a process
that is killed nor a machine that loses its power damages the file; the latter takes what the system has not written
yet. Nobody else can open it meanwhile, which also keeps us from SQLite's error with two connections that write the log
at the same moment (3.7.0 to 3.51.2, sqlite.org/wal.html#walresetbug).
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

OURS = 0x6C622D31  # in files of ours, as their application_id
LOCK_SECONDS = 1.0  # for a predecessor that ends just now
# What brings a file from one version to the next; user_version says how many are done.
MIGRATIONS = (
    "CREATE TABLE kept (space TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (space, key)) "
    "STRICT, WITHOUT ROWID",
)
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

Changes = Mapping[str, Mapping[str, str | None]]


class StoreError(Exception):
    """In words. `is_damaged`: what is in the file cannot be read any more."""

    def __init__(self, message: str, is_damaged: bool = False) -> None:
        super().__init__(message)
        self.is_damaged = is_damaged

    @classmethod
    def of(cls, error: sqlite3.Error | OSError) -> StoreError:
        if isinstance(error, OSError):
            return cls(error.strerror or str(error))
        # The extended codes have more in their higher bytes: sqlite.org/rescode.html.
        return cls(str(error), getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED)


class Store:
    """Not for two threads at once. Every method raises StoreError alone; `open` comes first, and anything but `close`
    and `set_aside` only if it was good."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_writable = True  # once it is open
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Make the file if there is none, bring an old one up to date, and lock it. One that may only be read is read
        as it was when its last writer ended."""
        try:
            self._open()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise StoreError.of(error) from None
        except StoreError:
            self.close()
            raise

    def _open(self) -> None:
        path, is_new = self.path, not self.path.exists()
        if not is_new and not path.is_file():
            raise StoreError("is no regular file")
        if is_new:  # SQLite would let everybody read it
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self.is_writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
        uri = path.absolute().as_uri() + ("" if self.is_writable else "?immutable=1")
        self._connection = connection = sqlite3.connect(
            uri, timeout=LOCK_SECONDS, uri=True, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise StoreError(found.replace("\n", " "), is_damaged=True)
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and owner != OURS:
            raise StoreError("is another program's")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreError(f"a newer version of the balancer has written it ({version}, not {len(MIGRATIONS)})")
        if self.is_writable:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                connection.execute("BEGIN EXCLUSIVE")
                for statement in MIGRATIONS[version:]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {OURS}")
                connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def load(self, space: str) -> dict[str, str]:
        try:
            return dict(self._connected.execute("SELECT key, value FROM kept WHERE space = ?", (space,)))
        except sqlite3.Error as error:
            raise StoreError.of(error) from None

    def save(self, changes: Changes) -> None:
        """All of it or nothing; None removes."""
        rows = [(space, key, value) for space, values in changes.items() for key, value in values.items()]
        gone = [(space, key) for space, key, value in rows if value is None]
        try:
            with self._connected as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany("DELETE FROM kept WHERE space = ? AND key = ?", gone)
                connection.executemany(
                    "REPLACE INTO kept VALUES (?, ?, ?)", [row for row in rows if row[2] is not None]
                )
        except sqlite3.Error as error:
            raise StoreError.of(error) from None

    @property
    def _connected(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    @property
    def is_here(self) -> bool:
        """Open, and where it was: in a file that somebody has removed nothing would be kept."""
        return self._connection is not None and self.path.exists()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def set_aside(self) -> Path:
        """Give the file another name, and its log with it, which must never meet another file. Returns that name."""
        self.close()
        name = Path(f"{self.path}.damaged-{time.time_ns()}")
        try:
            for more in ("-wal", "-journal", ""):
                if (part := Path(f"{self.path}{more}")).exists():
                    part.rename(f"{name}{more}")
        except OSError as error:
            raise StoreError.of(error) from None
        return name
