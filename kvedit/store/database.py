"""Database: the index's SQLite file, opened when needed and again when another process made it."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

from kvedit.errors import CorruptMemory
from kvedit.store.layout import Layout

__all__ = ["DamagedIndex", "Database", "transaction"]

_SYNCHRONOUS = {"full": "FULL", "process": "NORMAL", "none": "OFF"}
_BUSY_SECONDS = 60.0
_DAMAGE = (
    sqlite3.SQLITE_ERROR,  # a table or column is not there
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_NOTADB,
)
_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the latter: a damaged name in SQLite's message
_FOREIGN: list[sqlite3.Connection] = []  # opened before a fork: not ours to close


class DamagedIndex(CorruptMemory):
    """The index can't be read; it can be made again from the log."""


class Database:
    """One connection that all threads share. It knows no tables.

    Args:
        layout: the store's files.
        version: version of the tables; a file of another one is not usable.
    """

    def __init__(self, layout: Layout, version: int) -> None:
        self._layout = layout
        self._path = layout.index
        self._version = version
        self._guard = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        # SQLite must not have a file open across a fork: the child would believe to hold the locks
        # of its parent, also for a connection of its own. The next question opens it again.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=partial(_close, weakref.ref(self)))
        self._identity: tuple[int, int, int] | None = None

    @contextmanager
    def session(self) -> Iterator[sqlite3.Connection]:
        """Yields the connection, to one thread at a time.

        Raises:
            DamagedIndex: if there is no usable file, or it turns out to be damaged.
        """
        with self._guard:
            if not self.usable() or self._connection is None:
                raise DamagedIndex(f"{self._path} is missing or no index of this version")
            try:
                yield self._connection
            except _ERRORS as error:
                if self._identity == self._found():
                    _check_damage(error)
                # Else another process put a new file in place meanwhile: ask that one.
                raise DamagedIndex(f"{self._path} is damaged: {error}") from error

    def usable(self) -> bool:
        """Returns whether the file is there and is an index of this version; opens it."""
        with self._guard:
            # Another process may have replaced the file: the one that is open is a dead one then.
            if self._connection is not None and self._identity == self._found():
                return True
            self.close()
            if not self._path.exists():
                return False
            try:
                connection = self._connect()
            except _ERRORS as error:
                _check_damage(error)
                return False
            if self._version != _version_of(connection):
                connection.close()
                return False
            self._connection, self._identity = connection, self._found()
            return True

    def replace(self, fill: Callable[[sqlite3.Connection], object]) -> None:
        """Makes the tables anew; the caller holds the lock.

        A readable file is emptied and filled in one transaction, so that readers beside it see the
        old or the new tables. Only an unreadable one is put out of the way.

        Args:
            fill: makes the tables and what is in them.
        """
        with self._guard:
            try:
                if self.usable() and self._connection is not None:
                    self._refill(self._connection, fill)
                    return
            except _ERRORS as error:
                _check_damage(error)
            self.close()
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    self._path.with_name(self._path.name + suffix).unlink()
            # Until the transaction is through, or if it never is, the file has version 0 and is
            # not usable.
            with closing(self._connect()) as connection:
                self._refill(connection, fill)

    def _refill(
        self, connection: sqlite3.Connection, fill: Callable[[sqlite3.Connection], object]
    ) -> None:
        with transaction(connection):
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for (name,) in tables.fetchall():
                quoted = name.replace('"', '""')
                connection.execute(f'DROP TABLE "{quoted}"')
            fill(connection)
            connection.execute(f"PRAGMA user_version = {self._version:d}")

    def close(self) -> None:
        """Closes the file."""
        with self._guard:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            if self._identity and self._identity[0] == os.getpid():
                connection.close()
            else:
                _FOREIGN.append(connection)

    def _found(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return (os.getpid(), status.st_dev, status.st_ino)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        try:
            _use_wal(connection)
            connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[self._layout.durability]}")
        except _ERRORS:
            connection.close()
            raise
        return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """Turns to write-ahead logging, as often as it takes.

    SQLite waits for locks up to its timeout, but not for this one: where several processes turn a
    new file at once, all but one are told at once that it is locked.

    Raises:
        OperationalError: if it stays locked, or something else is wrong.
    """
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.005)


def _close(reference: weakref.ref[Database]) -> None:
    database = reference()
    if database is not None:
        database.close()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits what is done inside, or none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version_of(connection: sqlite3.Connection) -> int:
    try:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except _ERRORS as error:
        connection.close()
        _check_damage(error)
        return -1
    return version


def _check_damage(error: Exception) -> None:
    """Raises the error unless it says that the file is damaged: then it is a lock or the disk."""
    # Python's own errors, of a text that is not UTF-8, have no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    if code & 0xFF not in _DAMAGE and code != sqlite3.SQLITE_IOERR_SHORT_READ:
        raise error
