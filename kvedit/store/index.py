"""Index: names, versions and the place of every block, in SQLite; made from the log alone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from kvedit.store.catalogue import Catalogue
from kvedit.store.database import DamagedIndex, Database, transaction
from kvedit.store.journal import Journal, Position
from kvedit.store.layout import Layout
from kvedit.store.tables import SCHEMA, VERSION, apply_event

__all__ = ["Index", "PackRow"]

Result = TypeVar("Result")
PackRow = tuple[str, int, bool]
"""Digest of a pack, its bytes, and whether a tier below has it."""


class Index(Catalogue):
    """The index of one store. Losing it loses nothing: the log makes it again.

    Args:
        layout: the store's files.
        journal: its log.
    """

    def __init__(self, layout: Layout, journal: Journal) -> None:
        self._layout = layout
        self._journal = journal
        self._database = Database(layout, VERSION)

    # Packs

    def locate(self, blocks: Iterable[str]) -> dict[str, tuple[str, int, bool]]:
        """Returns, for each block that is stored, its pack: digest, bytes, whether pushed."""
        rows = self._rows(
            "SELECT b.digest AS digest, p.digest AS pack, p.bytes AS bytes, p.pushed AS pushed "
            "FROM json_each(?) AS j JOIN blocks AS b ON b.digest = j.value "
            "JOIN packs AS p ON p.id = b.pack",
            json.dumps(sorted(set(blocks))),
        )
        return {row["digest"]: (row["pack"], row["bytes"], bool(row["pushed"])) for row in rows}

    def manifest_pack(self, record: str) -> str | None:
        """Returns the pack that holds the manifest of a record, or None."""
        rows = self._rows(
            "SELECT p.digest AS pack FROM manifests AS m JOIN packs AS p ON p.id = m.pack "
            "WHERE m.record = ?",
            record,
        )
        return str(rows[0]["pack"]) if rows else None

    def packs(self) -> list[PackRow]:
        """Returns all packs."""
        rows = self._rows("SELECT digest, bytes, pushed FROM packs ORDER BY id")
        return [(row["digest"], row["bytes"], bool(row["pushed"])) for row in rows]

    def packs_of(self, digests: Iterable[str]) -> list[PackRow]:
        """Returns those of the packs that the index knows."""
        rows = self._rows(
            "SELECT p.digest, p.bytes, p.pushed FROM json_each(?) AS j "
            "JOIN packs AS p ON p.digest = j.value",
            json.dumps(sorted(digests)),
        )
        return [(row["digest"], row["bytes"], bool(row["pushed"])) for row in rows]

    def pushed_version(self, name: str) -> int:
        """Returns the newest version of a name that a tier below has, with its labels, or 0."""
        rows = self._rows("SELECT pushed FROM names WHERE name = ? AND NOT dirty", name)
        return int(rows[0]["pushed"]) if rows else 0

    def unpushed(self) -> list[str]:
        """Returns names with versions that no tier below has, and removed names it still has."""
        rows = self._rows(
            "SELECT name FROM names WHERE pushed < head OR dirty "
            "UNION SELECT name FROM removed ORDER BY 1"
        )
        return [row["name"] for row in rows]

    def removed(self) -> set[str]:
        """Returns removed names that a tier below still has."""
        return {row["name"] for row in self._rows("SELECT name FROM removed")}

    def contents(self) -> dict[str, tuple[set[str], set[str]]]:
        """Returns the blocks and the manifests that are to be found in each pack."""
        found: dict[str, tuple[set[str], set[str]]] = {}
        for column, table, digest in ((0, "blocks", "digest"), (1, "manifests", "record")):
            rows = self._rows(
                f"SELECT p.digest AS pack, t.{digest} AS one FROM {table} AS t "
                "JOIN packs AS p ON p.id = t.pack"
            )
            for row in rows:
                found.setdefault(row["pack"], (set(), set()))[column].add(row["one"])
        return found

    def knows_pack(self, digest: str) -> bool:
        """Returns whether the index has a pack."""
        return bool(self._rows("SELECT 1 AS yes FROM packs WHERE digest = ?", digest))

    # Changes; the caller holds the lock

    def is_behind(self) -> bool:
        """Returns whether the log has lines that the index has not seen."""
        rows = self._rows("SELECT bytes FROM applied")
        try:
            return bool(rows) and self._layout.log.stat().st_size > rows[0]["bytes"]
        except FileNotFoundError:
            return False

    def catch_up(self) -> Position:
        """Applies the log's new lines in one transaction; returns the end of the log."""

        def apply() -> Position:
            with self._database.session() as connection, transaction(connection):
                return self._apply_new(connection)

        return self._mended(apply)

    def rebuild(self) -> None:
        """Makes the index again from the log."""

        def fill(connection: sqlite3.Connection) -> None:
            for statement in SCHEMA:
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
        apply_event(connection, event, self._layout)

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
