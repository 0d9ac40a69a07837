"""Index: names, versions and the place of every block, in SQLite; made from the log alone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.store.database import DamagedIndex, Database, transaction
from kvedit.store.journal import Journal, Position
from kvedit.store.layout import Layout
from kvedit.store.pack import Pack
from kvedit.store.records import Entry, Record

__all__ = ["Index"]

Result = TypeVar("Result")

_VERSION = 1

_SCHEMA = (
    "CREATE TABLE applied (bytes INTEGER, sequence INTEGER, checksum TEXT)",
    "INSERT INTO applied VALUES (0, 0, '')",
    "CREATE TABLE packs (id INTEGER PRIMARY KEY, digest TEXT UNIQUE, bytes INTEGER)",
    "CREATE TABLE blocks (digest TEXT PRIMARY KEY, pack INTEGER) WITHOUT ROWID",
    """CREATE TABLE versions (
        name TEXT, version INTEGER, record TEXT, content TEXT, created TEXT, message TEXT,
        tags TEXT, bytes INTEGER, slots INTEGER, tokens INTEGER, layers INTEGER, dtype TEXT,
        model TEXT, sequence INTEGER, PRIMARY KEY (name, version)) WITHOUT ROWID""",
    "CREATE INDEX versions_record ON versions (record)",
    "CREATE INDEX versions_content ON versions (content)",
)
_COLUMNS = (
    "name, version, record, content, created, message, tags, bytes, slots, tokens, layers, dtype,"
    " model"
)
_FACTS = ("bytes", "slots", "tokens", "layers", "dtype", "model")


class Index:
    """The index of one store. Losing it loses nothing: the log makes it again.

    Args:
        layout: the store's files.
        journal: its log.
    """

    def __init__(self, layout: Layout, journal: Journal) -> None:
        self._layout = layout
        self._journal = journal
        self._database = Database(layout, _VERSION)

    # Questions

    def versions(self, name: str) -> list[Record]:
        """Returns the versions of a name, the newest first; empty if there is no such name."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM versions WHERE name = ? ORDER BY version DESC", name
        )
        return [Record(**_plain(row)) for row in rows]

    def newest(self, name: str, back: int = 0) -> Record | None:
        """Returns the version that is ``back`` before the newest, or None."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM versions WHERE name = ? ORDER BY version DESC "
            "LIMIT 1 OFFSET ?",
            name,
            back,
        )
        return Record(**_plain(rows[0])) if rows else None

    def entries(self) -> list[Entry]:
        """Returns every name with its newest version."""
        rows = self._rows(
            f"SELECT {_COLUMNS}, (SELECT COUNT(*) FROM versions AS w WHERE "
            "w.name = v.name) AS versions FROM versions AS v WHERE version = (SELECT MAX(version)"
            " FROM versions AS w WHERE w.name = v.name) ORDER BY name"
        )
        return [Entry(**_plain(row), versions=row["versions"]) for row in rows]

    def names(self) -> list[str]:
        """Returns all names in order."""
        return [row["name"] for row in self._rows("SELECT DISTINCT name FROM versions ORDER BY 1")]

    def digests(self, prefix: str, limit: int = 9) -> list[str]:
        """Returns the record and content digests of named versions that begin so."""
        bounds = (prefix, prefix + "g")
        rows = self._rows(
            "SELECT record AS digest FROM versions WHERE record >= ? AND record < ? UNION "
            "SELECT content FROM versions WHERE content >= ? AND content < ? LIMIT ?",
            *bounds,
            *bounds,
            limit,
        )
        return [row["digest"] for row in rows]

    def by_digest(self, digest: str) -> Record | None:
        """Returns the newest version with that record or content digest."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM versions WHERE record = ? OR content = ? "
            "ORDER BY sequence DESC LIMIT 1",
            digest,
            digest,
        )
        return Record(**_plain(rows[0])) if rows else None

    def locate(self, blocks: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Returns, for each block that is stored, its pack and that pack's size in bytes."""
        rows = self._rows(
            "SELECT b.digest AS digest, p.digest AS pack, p.bytes AS bytes FROM json_each(?) AS j "
            "JOIN blocks AS b ON b.digest = j.value JOIN packs AS p ON p.id = b.pack",
            json.dumps(sorted(set(blocks))),
        )
        return {row["digest"]: (row["pack"], row["bytes"]) for row in rows}

    # Changes; the caller holds the lock

    def catch_up(self) -> Position:
        """Applies the log's new lines in one transaction; returns the end of the log."""

        def apply() -> Position:
            with self._database.session() as connection, transaction(connection):
                return self._apply_new(connection)

        return self._mended(apply)

    def rebuild(self) -> None:
        """Makes the index again from the log."""

        def fill(connection: sqlite3.Connection) -> None:
            for statement in _SCHEMA:
                connection.execute(statement)
            self._apply_new(connection)

        self._database.replace(fill)

    def close(self) -> None:
        """Closes the file; the next question opens it again."""
        self._database.close()

    # Inside

    def _apply_new(self, connection: sqlite3.Connection) -> Position:
        row = connection.execute("SELECT bytes, sequence, checksum FROM applied").fetchone()
        start = end = Position(*row)
        for event, after in self._journal.read(start):
            self._apply(connection, event)
            end = after
        if end != start:
            connection.execute(
                "UPDATE applied SET bytes = ?, sequence = ?, checksum = ?",
                (end.offset, end.sequence, end.checksum),
            )
        return end

    def _apply(self, connection: sqlite3.Connection, event: dict[str, Any]) -> None:
        if event["event"] == "remove":
            connection.execute("DELETE FROM versions WHERE name = ?", (event["name"],))
        elif event["event"] == "put":
            for pack in event["packs"]:
                self._apply_pack(connection, pack)
            facts = [event["facts"][name] for name in _FACTS]
            connection.execute(
                f"INSERT INTO versions ({_COLUMNS}, sequence) VALUES (?, (SELECT COUNT(*) + 1 "
                "FROM versions WHERE name = ?), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    event["name"],
                    event["name"],
                    event["record"],
                    event["content"],
                    event["time"],
                    event["message"],
                    json.dumps(event["tags"]),
                    *facts,
                    event["sequence"],
                ),
            )
        else:
            raise InvalidArgument(
                f"{self._layout.log}: line {event['sequence']} is a {event['event']!r}; this "
                "kvedit knows 'put' and 'remove': use a newer kvedit"
            )

    def _apply_pack(self, connection: sqlite3.Connection, digest: str) -> None:
        try:
            pack = Pack.open(self._layout.pack(digest))
        except CorruptMemory:
            return  # reading one of its blocks says so; the other memories stay readable
        connection.execute(
            "INSERT INTO packs (digest, bytes) VALUES (?, ?) "
            "ON CONFLICT (digest) DO UPDATE SET bytes = excluded.bytes",
            (digest, pack.size),
        )
        row = connection.execute("SELECT id FROM packs WHERE digest = ?", (digest,)).fetchone()
        connection.executemany(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?)",
            ((block, row[0]) for block in pack.entries),
        )

    def _rows(self, query: str, *values: Any) -> Sequence[sqlite3.Row]:
        if not self._layout.exists():
            return []

        def ask() -> Sequence[sqlite3.Row]:
            with self._database.session() as connection:
                return connection.execute(query, values).fetchall()

        return self._mended(ask)

    def _mended(self, action: Callable[[], Result]) -> Result:
        """Returns what the action returns, with the index made again where it can't be read."""
        try:
            return action()
        except DamagedIndex:
            # Under the lock nobody else is just making it.
            with self._layout.lock:
                try:
                    return action()
                except DamagedIndex:
                    self.rebuild()
                return action()


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    values = {name.strip(): row[name.strip()] for name in _COLUMNS.split(",")}
    try:
        created, tags = datetime.fromisoformat(values["created"]), json.loads(values["tags"])
        return {**values, "created": created, "tags": tuple(tags)}
    except (ValueError, TypeError) as error:
        raise CorruptMemory(
            f"the index is damaged at {values['name']}: Store.rebuild_index() makes it again from "
            "the log"
        ) from error
