"""Tables: what the index holds, and how each event of the log changes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from typing import Any

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.store.layout import Layout
from kvedit.store.pack import Pack
from kvedit.store.parsing import SHAPE_ERRORS

__all__ = ["COLUMNS", "FACTS", "SCHEMA", "VERSION", "apply_event"]

_SHAPE_ERRORS = (
    *SHAPE_ERRORS,
    OverflowError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)

VERSION = 3
"""Of these tables; an index of another version is made again."""

SCHEMA = (
    "CREATE TABLE applied (bytes INTEGER, sequence INTEGER, checksum TEXT)",
    "INSERT INTO applied VALUES (0, 0, '')",
    "CREATE TABLE packs (id INTEGER PRIMARY KEY, digest TEXT UNIQUE, bytes INTEGER,"
    " pushed INTEGER DEFAULT 0)",
    "CREATE TABLE blocks (digest TEXT PRIMARY KEY, pack INTEGER) WITHOUT ROWID",
    "CREATE INDEX blocks_pack ON blocks (pack)",
    "CREATE TABLE manifests (record TEXT PRIMARY KEY, pack INTEGER) WITHOUT ROWID",
    "CREATE INDEX manifests_pack ON manifests (pack)",
    """CREATE TABLE names (
        name TEXT PRIMARY KEY, head INTEGER, last INTEGER, versions INTEGER,
        fixed INTEGER DEFAULT 0, pinned INTEGER DEFAULT 0, pushed INTEGER DEFAULT 0,
        dirty INTEGER DEFAULT 0) WITHOUT ROWID""",
    "CREATE TABLE removed (name TEXT PRIMARY KEY) WITHOUT ROWID",
    """CREATE TABLE versions (
        name TEXT, version INTEGER, record TEXT, content TEXT, created TEXT, message TEXT,
        tags TEXT, bytes INTEGER, slots INTEGER, tokens INTEGER, layers INTEGER, dtype TEXT,
        model TEXT, source TEXT, licence TEXT, metrics TEXT, codec TEXT, expires TEXT,
        signature TEXT, base TEXT, sequence INTEGER, PRIMARY KEY (name, version)) WITHOUT ROWID""",
    "CREATE INDEX versions_record ON versions (record)",
    "CREATE INDEX versions_content ON versions (content)",
    "CREATE INDEX versions_expires ON versions (expires) WHERE expires IS NOT NULL",
    "CREATE INDEX versions_source ON versions (source) WHERE source IS NOT NULL",
    # Of every put, also of names that are gone: recipes may still need what was signed.
    "CREATE TABLE signatures (record TEXT PRIMARY KEY, signature TEXT) WITHOUT ROWID",
    "CREATE TABLE nodes (node TEXT, record TEXT, head INTEGER, PRIMARY KEY (node, record))"
    " WITHOUT ROWID",
    "CREATE INDEX nodes_record ON nodes (record)",
)
"""Statements that make the tables."""

COLUMNS = (
    "name, version, record, content, created, message, tags, bytes, slots, tokens, layers, dtype,"
    " model, source, licence, metrics, codec, expires, signature"
)
"""Columns of a version that make a Record."""

FACTS = ("bytes", "slots", "tokens", "layers", "dtype", "model")
"""What a put says of a memory for listings."""


def apply_event(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    """Changes the tables as one event says.

    Args:
        connection: inside a transaction.
        event: a line of the log.
        layout: where the packs are.

    Raises:
        InvalidArgument: if a newer version of the library wrote the event.
        CorruptMemory: if it is no event.
    """
    try:
        _apply(connection, event, layout)
    except _SHAPE_ERRORS as error:
        if isinstance(error, InvalidArgument):
            raise
        raise CorruptMemory(
            f"{layout.log}: line {event.get('sequence')} is no event: {error!r}"
        ) from error


def _apply(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    for part in event["events"] if event["event"] == "batch" else [event]:
        if not isinstance(part.get("name", ""), str):
            raise TypeError("its name is no text")
        action = _ACTIONS.get(part["event"])
        if action is None:
            raise InvalidArgument(
                f"{layout.log}: line {event['sequence']} is a {part['event']!r}; this kvedit knows "
                f"{', '.join(sorted(_ACTIONS))}: use a newer kvedit"
            )
        action(connection, {"sequence": event["sequence"], **part}, layout)


def _put(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    for pack in event["packs"]:
        _add_pack(connection, pack, layout)
    row = connection.execute(
        "INSERT INTO names (name, head, last, versions) VALUES (?, 1, 1, 1) ON CONFLICT (name) DO "
        "UPDATE SET head = last + 1, last = last + 1, versions = versions + 1 RETURNING last",
        (event["name"],),
    ).fetchone()
    connection.execute("DELETE FROM removed WHERE name = ?", (event["name"],))
    if event.get("fixed"):
        connection.execute("UPDATE names SET fixed = 1 WHERE name = ?", (event["name"],))
    connection.execute(
        f"INSERT INTO versions ({COLUMNS}, base, sequence) VALUES ({', '.join('?' * 21)})",
        (
            event["name"],
            row[0],
            event["record"],
            event["content"],
            event["time"],
            event["message"],
            json.dumps(event["tags"]),
            *(event["facts"][name] for name in FACTS),
            event.get("source"),
            event.get("licence"),
            json.dumps(event.get("metrics", {})),
            event.get("codec", "raw"),
            event.get("expires"),
            json.dumps(event["signature"]) if event.get("signature") else None,
            event.get("base"),
            event["sequence"],
        ),
    )
    if event.get("signature"):
        connection.execute(
            "INSERT OR REPLACE INTO signatures VALUES (?, ?)",
            (event["record"], json.dumps(event["signature"])),
        )
    nodes = event.get("nodes", [])
    connection.executemany(
        "INSERT OR IGNORE INTO nodes VALUES (?, ?, ?)",
        ((node, event["record"], node == nodes[-1]) for node in nodes),
    )


def _remove(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO removed SELECT name FROM names "
        "WHERE name = ? AND (pushed > 0 OR dirty)",
        (event["name"],),
    )
    records = _records(connection, event["name"])
    connection.execute("DELETE FROM versions WHERE name = ?", (event["name"],))
    connection.execute("DELETE FROM names WHERE name = ?", (event["name"],))
    _forget_nodes(connection, records)


def _drop(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    """Takes single versions away; a name without any goes as well."""
    name = event["name"]
    records = _records(connection, name)
    connection.executemany(
        "DELETE FROM versions WHERE name = ? AND version = ?",
        ((name, version) for version in event["versions"]),
    )
    connection.execute(
        "UPDATE names SET versions = (SELECT COUNT(*) FROM versions AS v WHERE v.name = ?1), "
        "head = (SELECT MAX(version) FROM versions AS v WHERE v.name = ?1) WHERE name = ?1",
        (name,),
    )
    connection.execute("DELETE FROM names WHERE name = ? AND versions = 0", (name,))
    _forget_nodes(connection, records)


def _note(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    values = {
        "tags": json.dumps(event["tags"]),
        "message": event["message"],
        "source": event["source"],
        "licence": event["licence"],
        "metrics": json.dumps(event["metrics"]),
        "expires": event["expires"],
    }
    assignments = ", ".join(f"{column} = ?" for column in values)
    connection.execute(
        f"UPDATE versions SET {assignments} WHERE name = ? AND version = ?",
        (*values.values(), event["name"], event["version"]),
    )
    connection.execute("UPDATE names SET dirty = 1 WHERE name = ?", (event["name"],))


def _pin(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    connection.execute(
        "UPDATE names SET pinned = ? WHERE name = ?", (int(event["pinned"]), event["name"])
    )


def _collect(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    """Garbage was collected: some packs are gone, others hold what was still needed of them."""
    for digest in event["gone"]:
        row = connection.execute("SELECT id FROM packs WHERE digest = ?", (digest,)).fetchone()
        if row is not None:
            connection.execute("DELETE FROM blocks WHERE pack = ?", (row[0],))
            connection.execute("DELETE FROM manifests WHERE pack = ?", (row[0],))
            connection.execute("DELETE FROM packs WHERE id = ?", (row[0],))
    for digest in event["packs"]:
        _add_pack(connection, digest, layout)


def _pushed(connection: sqlite3.Connection, event: dict[str, Any], layout: Layout) -> None:
    connection.executemany(
        "UPDATE packs SET pushed = 1 WHERE digest = ?", ((pack,) for pack in event["packs"])
    )
    for name, version in event.get("names", {}).items():
        connection.execute("UPDATE names SET pushed = ?, dirty = 0 WHERE name = ?", (version, name))
        connection.execute("DELETE FROM removed WHERE name = ?", (name,))


def _add_pack(connection: sqlite3.Connection, digest: str, layout: Layout) -> None:
    pack = _open(digest, layout)
    if pack is None:
        return  # reading one of its blocks says so; the other memories stay readable
    connection.execute(
        "INSERT INTO packs (digest, bytes) VALUES (?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET bytes = excluded.bytes",
        (digest, pack.size),
    )
    row = connection.execute("SELECT id FROM packs WHERE digest = ?", (digest,)).fetchone()
    _fill(connection, "blocks", pack.entries, row[0])
    _fill(connection, "manifests", pack.manifests, row[0])


def _open(digest: str, layout: Layout) -> Pack | None:
    for path, header_only in ((layout.pack(digest), False), (layout.header(digest), True)):
        try:
            return Pack.open(path, header_only)
        except (CorruptMemory, FileNotFoundError):
            continue
    return None


def _fill(connection: sqlite3.Connection, table: str, digests: Iterable[str], pack: int) -> None:
    connection.executemany(
        f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", ((digest, pack) for digest in digests)
    )


def _forget_nodes(connection: sqlite3.Connection, records: Iterable[str]) -> None:
    """Forgets the steps of records that no version has any more."""
    connection.executemany(
        "DELETE FROM nodes WHERE record = ?1 AND NOT EXISTS "
        "(SELECT 1 FROM versions WHERE record = ?1)",
        ((record,) for record in records),
    )


def _records(connection: sqlite3.Connection, name: str) -> list[str]:
    rows = connection.execute("SELECT DISTINCT record FROM versions WHERE name = ?", (name,))
    return [row[0] for row in rows]


_ACTIONS = {
    "put": _put,
    "remove": _remove,
    "drop": _drop,
    "note": _note,
    "pin": _pin,
    "collect": _collect,
    "pushed": _pushed,
}
