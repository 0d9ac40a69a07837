"""Catalogue: what the index says of names, versions, digests and steps."""

from __future__ import annotations

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kvedit.errors import CorruptMemory
from kvedit.store.records import Entry, Record
from kvedit.store.tables import COLUMNS, FACTS

__all__ = ["Catalogue", "now"]

_ALIVE = (
    "(v.expires IS NULL OR v.expires > ? OR "
    "EXISTS (SELECT 1 FROM names AS p WHERE p.name = v.name AND p.pinned))"
)
_HEAD = (
    "(SELECT MAX(w.version) FROM versions AS w WHERE w.name = n.name AND "
    "(w.expires IS NULL OR w.expires > ? OR n.pinned))"
)
_ENTRIES = (
    "SELECT v.*, n.versions AS versions, n.pinned AS pinned, n.fixed AS fixed FROM names AS n "
    "JOIN versions AS v ON v.name = n.name AND v.version = "
)


class Catalogue(ABC):
    """Questions about names, digests and lineage; a subclass has the tables."""

    @abstractmethod
    def _rows(self, query: str, *values: Any) -> Sequence[sqlite3.Row]:
        """Returns what SQL finds."""

    # Names

    def versions(self, name: str) -> list[Record]:
        """Returns the versions of a name, the newest first; empty if there is no such name."""
        rows = self._rows(
            f"SELECT {COLUMNS} FROM versions AS v WHERE name = ? AND {_ALIVE} "
            "ORDER BY version DESC",
            name,
            now(),
        )
        return [_record(row) for row in rows]

    def newest(self, name: str, back: int = 0) -> Record | None:
        """Returns the version that is ``back`` before the newest, or None."""
        rows = self._rows(
            f"SELECT {COLUMNS} FROM versions AS v WHERE name = ? AND {_ALIVE} "
            "ORDER BY version DESC LIMIT 1 OFFSET ?",
            name,
            now(),
            back,
        )
        return _record(rows[0]) if rows else None

    def entries(
        self,
        condition: str = "1",
        values: Sequence[Any] = (),
        after: str = "",
        limit: int = -1,
    ) -> list[Entry]:
        """Returns names with their newest versions, in order of the names.

        Args:
            condition: SQL over the columns of a version, from ``Where.sql``.
            values: its parameters.
            after: only names behind this one.
            limit: how many at most; -1 for all.
        """
        rows = self._rows(
            f"SELECT * FROM ({_ENTRIES}{_HEAD}) AS v WHERE v.name > ? AND ({condition}) "
            "ORDER BY v.name LIMIT ?",
            now(),
            after,
            *values,
            limit,
        )
        return [_entry(row) for row in rows]

    def entry(self, name: str) -> Entry | None:
        """Returns a name with its newest version, or None; also where it has expired."""
        rows = self._rows(f"{_ENTRIES}n.head WHERE n.name = ?", name)
        return _entry(rows[0]) if rows else None

    def names(self, limit: int = -1) -> list[str]:
        """Returns names in order, all or the first ones."""
        rows = self._rows(
            f"SELECT n.name AS name FROM names AS n WHERE {_HEAD} IS NOT NULL ORDER BY n.name "
            "LIMIT ?",
            now(),
            limit,
        )
        return [row["name"] for row in rows]

    def totals(self) -> tuple[int, int]:
        """Returns how many names there are, and the bytes of their newest versions."""
        row = self._rows(f"SELECT COUNT(*) AS n, TOTAL(bytes) AS b FROM ({_ENTRIES}n.head)")
        return (row[0]["n"], int(row[0]["b"])) if row else (0, 0)

    def expired(self) -> list[tuple[str, int]]:
        """Returns name and version of what has expired and is not pinned."""
        rows = self._rows(
            "SELECT v.name, v.version FROM versions AS v JOIN names AS n ON n.name = v.name "
            "WHERE v.expires IS NOT NULL AND v.expires <= ? AND NOT n.pinned",
            now(),
        )
        return [(row["name"], row["version"]) for row in rows]

    # Digests and steps

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
            f"SELECT {COLUMNS} FROM versions AS v WHERE (record = ? OR content = ?) AND {_ALIVE} "
            "ORDER BY sequence DESC LIMIT 1",
            digest,
            digest,
            now(),
        )
        return _record(rows[0]) if rows else None

    def bases(self) -> dict[str, str]:
        """Returns, for every recipe, the record that it is rebuilt from."""
        rows = self._rows("SELECT record, base FROM versions WHERE base IS NOT NULL")
        return {row["record"]: row["base"] for row in rows}

    def records(self) -> list[str]:
        """Returns the record digests of all versions, and of what recipes are rebuilt from."""
        rows = self._rows("SELECT record AS r FROM versions UNION SELECT base FROM versions")
        return [row["r"] for row in rows if row["r"]]

    def signature(self, record: str) -> dict[str, Any] | None:
        """Returns the signature that came with a record, as plain data, or None."""
        rows = self._rows("SELECT signature FROM signatures WHERE record = ?", record)
        return dict(json.loads(rows[0]["signature"])) if rows else None

    def event(self, record: str) -> dict[str, Any]:
        """Returns what a put of this record says of it, whatever its name."""
        rows = self._rows("SELECT * FROM versions WHERE record = ? LIMIT 1", record)
        return self._event(rows[0], ("record", "content", "codec"))

    def events(self, name: str) -> list[dict[str, Any]]:
        """Returns the puts of a name, the oldest first, as the log has them, without packs."""
        rows = self._rows(
            "SELECT v.*, n.fixed AS fixed FROM versions AS v JOIN names AS n ON n.name = v.name "
            f"WHERE v.name = ? AND {_ALIVE} ORDER BY v.version",
            name,
            now(),
        )
        kept = ("record", "content", "codec", "name", "message", "source", "licence", "expires")
        found = []
        for row in rows:
            event = {"event": "put", **self._event(row, kept), "time": row["created"]}
            event |= {"tags": json.loads(row["tags"]), "metrics": json.loads(row["metrics"])}
            found.append({**event, "fixed": bool(row["fixed"])})
        return found

    def _event(self, row: sqlite3.Row, kept: Sequence[str]) -> dict[str, Any]:
        query = "SELECT node FROM nodes WHERE record = ? ORDER BY head, node"
        nodes = [node["node"] for node in self._rows(query, row["record"])]
        found: dict[str, Any] = {name: row[name] for name in kept}
        if row["base"]:
            found["base"] = row["base"]
        if row["signature"]:
            found["signature"] = json.loads(row["signature"])
        return {**found, "facts": {name: row[name] for name in FACTS}, "nodes": nodes}

    def made_of(self, node: str, head: bool = False) -> list[Record]:
        """Returns the versions that have a step in their lineage, the newest first.

        Args:
            node: id of the step.
            head: whether it must be their last one.
        """
        rows = self._rows(
            f"SELECT {COLUMNS} FROM versions AS v WHERE record IN (SELECT record FROM nodes WHERE "
            f"node = ? AND head >= ?) AND {_ALIVE} ORDER BY sequence DESC",
            node,
            int(head),
            now(),
        )
        return [_record(row) for row in rows]

    def of_source(self, source: str) -> list[Record]:
        """Returns the versions that were put with this source, the newest first."""
        rows = self._rows(
            f"SELECT {COLUMNS} FROM versions AS v WHERE source = ? AND {_ALIVE} "
            "ORDER BY sequence DESC",
            source,
            now(),
        )
        return [_record(row) for row in rows]


def now() -> str:
    """Returns the time as the log writes it: UTC, always with microseconds, so that it sorts."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    values = {name.strip(): row[name.strip()] for name in COLUMNS.split(",")}
    try:
        signature = values.pop("signature")
        expires = values["expires"]
        return {
            **values,
            "created": datetime.fromisoformat(values["created"]),
            "tags": tuple(json.loads(values["tags"])),
            "source": values["source"] or "",
            "licence": values["licence"] or "",
            "metrics": json.loads(values["metrics"]),
            "expires": datetime.fromisoformat(expires) if expires else None,
            "signed_by": json.loads(signature)["key"] if signature else "",
        }
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptMemory(
            f"the index is damaged at {values['name']}: Store.rebuild_index() makes it again from "
            "the log"
        ) from error


def _record(row: sqlite3.Row) -> Record:
    return Record(**_plain(row))


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        **_plain(row),
        versions=row["versions"],
        pinned=bool(row["pinned"]),
        fixed=bool(row["fixed"]),
    )
