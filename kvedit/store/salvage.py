"""Salvage: what can be saved of a damaged log, from its good lines, the index and the packs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing, suppress
from typing import Any

from kvedit.errors import CorruptMemory, KVEditError
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.draft import Labels
from kvedit.store.finder import Finder
from kvedit.store.journal import Position
from kvedit.store.layout import Layout
from kvedit.store.manifest import Manifest
from kvedit.store.pack import Pack
from kvedit.store.parsing import SHAPE_ERRORS
from kvedit.store.sealed import read_paper
from kvedit.store.shelf import Shelf
from kvedit.store.tables import SCHEMA, VERSION, apply_event

__all__ = ["chain", "differs", "good_lines", "lost_events", "salvage_log", "unreadable"]


def good_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Returns the events whose own checksum holds, in order, and how many lines are damaged.

    Args:
        data: the bytes of the log.
    """
    events: dict[int, dict[str, Any]] = {}
    bad = 0
    for line in data.split(b"\n"):
        if not line:
            continue
        try:
            event = json.loads(line)
            checksum = event.pop("checksum")
            whole = digest_bytes(canonical_json(event)) == checksum
            number = int(event["sequence"]) if whole else 0
        except SHAPE_ERRORS:
            whole = False
        if whole:
            events.setdefault(number, event)  # a line that is there twice happened once
        else:
            bad += 1
    return [events[number] for number in sorted(events)], bad


def chain(events: Iterable[dict[str, Any]]) -> bytes:
    """Returns the bytes of a log that holds these events, numbered and chained anew."""
    lines = []
    checksum = ""
    for sequence, event in enumerate(events, 1):
        body = {k: v for k, v in event.items() if k not in ("sequence", "previous", "checksum")}
        line = {**body, "sequence": sequence, "previous": checksum}
        checksum = digest_bytes(canonical_json(line))
        lines.append(canonical_json({**line, "checksum": checksum}) + b"\n")
    return b"".join(lines)


def salvage_log(shelf: Shelf, finder: Finder) -> list[str]:
    """Returns what it did to make a damaged log whole; the caller holds the lock.

    What the index has seen it says, lost lines and removals with it; good lines behind that stay.
    Without an index all good lines stay. Memories whose lines are lost but whose manifests lie in
    packs that neither knows get names under ``recovered/``. The damaged log is kept in
    ``quarantine``.
    """
    layout = shelf.layout
    data = layout.log.read_bytes() if layout.log.exists() else b""
    events, bad = good_lines(data)
    said = [f"{bad} lines of the log are damaged, {len(events)} are good"]
    seen, packs, known = _from_index(layout)
    if known:
        events = [*known, *(event for event in events if event["sequence"] > seen)]
        said.append(f"its first {seen} lines are made again from the index")
    events = _applicable(events, layout)
    found = lost_events(shelf, finder, events, packs)
    names = sum(event["event"] == "put" for event in found)
    if names:
        said.append(f"{names} memories without a line: see recovered/")
    for folder in (layout.temporary, layout.quarantine):
        folder.mkdir(exist_ok=True)
    if data:
        kept = layout.quarantine / f"log-{digest_bytes(data)[:16]}.jsonl"
        layout.publish(kept, [data])
    layout.publish(layout.log, [chain([*events, *found])])
    shelf.index.rebuild()
    return said


def _applicable(events: Iterable[dict[str, Any]], layout: Layout) -> list[dict[str, Any]]:
    """Returns the events that an index can be made of: a line may be whole, and no event."""
    found = []
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        for statement in SCHEMA:
            connection.execute(statement)
        for event in events:
            with suppress(CorruptMemory):
                apply_event(connection, {"sequence": 0, **event}, layout)
                found.append(event)
    return found


def lost_events(
    shelf: Shelf, finder: Finder, events: list[dict[str, Any]], known: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Returns events that bring packs and memories back which no event names.

    Args:
        shelf: the store's parts.
        finder: opens the packs.
        events: what is known.
        known: packs to leave alone: what they hold and no event names was removed.
    """
    parts = [part for event in events for part in event.get("events", [event])]
    records = {part.get("record") for part in parts}
    gone = {pack for part in parts for pack in part.get("gone", [])}
    named = {pack for part in parts for pack in part.get("packs", [])} - gone
    found = []
    strays = []
    for path in sorted(shelf.layout.packs.glob("*.safetensors")):
        if path.stem in known:
            continue
        with suppress(KVEditError, OSError):
            pack = Pack.open(path)
            if pack.digest not in named:
                strays.append(pack.digest)
            for record in pack.manifests:
                if record not in records:
                    records.add(record)
                    found.append(_recovered(shelf, finder, pack, record))
    if strays:
        found.insert(0, {"event": "collect", "gone": [], "packs": strays, "time": _EPOCH})
    return [event for event in found if event]


def unreadable(layout: Layout) -> str:
    """Returns why the index can't be read, or nothing."""
    try:
        with closing(_open(layout)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                return f"{layout.index} is damaged"
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                return f"{layout.index} is of another version"
    except (sqlite3.Error, ValueError) as error:
        return f"{layout.index} can't be read: {error}"
    return ""


def differs(shelf: Shelf, broken: Collection[str] = ()) -> str:
    """Returns in what the index differs from one made of the log, or nothing.

    Args:
        shelf: the store's parts.
        broken: packs whose header can't be read now, and could be when they were put.
    """
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.row_factory = sqlite3.Row
        for statement in SCHEMA:
            fresh.execute(statement)
        for event, _ in shelf.journal.read(Position()):
            apply_event(fresh, event, shelf.layout)
        shelf.index.catch_up()
        with closing(_open(shelf.layout)) as own:
            for table, query in _COMPARED.items():
                ours, theirs = ([tuple(row) for row in c.execute(query)] for c in (own, fresh))
                if table in _OF_PACKS:
                    ignored = {row[1] for row in (*ours, *theirs) if row[0] in broken}
                    ours, theirs = (
                        [row for row in rows if row[1] not in ignored] for rows in (ours, theirs)
                    )
                if ours != theirs:
                    return f"{shelf.layout.index}: table {table} is not what the log says"
    return ""


_OF_PACKS = ("packs", "blocks", "manifests")
_COMPARED = {
    "packs": "SELECT digest, digest, bytes, pushed FROM packs ORDER BY 1",
    "blocks": "SELECT p.digest, t.digest FROM blocks AS t JOIN packs AS p ON p.id = t.pack "
    "ORDER BY 2",
    "manifests": "SELECT p.digest, t.record FROM manifests AS t JOIN packs AS p ON p.id = t.pack "
    "ORDER BY 2",
    "names": "SELECT * FROM names ORDER BY 1",
    "removed": "SELECT * FROM removed ORDER BY 1",
    "versions": "SELECT * FROM versions ORDER BY 1, 2",
    "nodes": "SELECT * FROM nodes ORDER BY 1, 2",
}
_EPOCH = "1970-01-01T00:00:00.000000+00:00"


def _recovered(shelf: Shelf, finder: Finder, pack: Pack, record: str) -> dict[str, Any]:
    held = finder.open(pack.digest)
    data = read_paper(held, record, shelf.cipher)
    if b'"kvedit.recipe.' in data[:400]:
        return {}
    manifest = Manifest.parse(data, record, f"manifest {record}")
    layers = manifest.layers
    keys = [manifest.parts[layer, "keys"] for layer in layers]
    facts = {
        "bytes": sum(block.nbytes for part in manifest.parts.values() for block in part.blocks),
        "slots": max(part.shape[1] for part in keys),
        "tokens": manifest.parts[-1, "tokens"].shape[0] if (-1, "tokens") in manifest.parts else 0,
        "layers": len(layers),
        "dtype": keys[0].dtype,
        "model": manifest.model.name,
    }
    return {
        "event": "put",
        "name": f"recovered/{record[:12]}",
        **Labels("its line in the log was lost").to_json(),
        "record": record,
        "content": manifest.content,
        "codec": manifest.codec,
        "facts": facts,
        "nodes": [node.id for node in manifest.lineage.nodes],
        "packs": [],
        "time": _EPOCH,
    }


def _open(layout: Layout) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{layout.index.as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    return connection


def _from_index(layout: Layout) -> tuple[int, list[str], list[dict[str, Any]]]:
    """Returns how many lines the index has seen, its packs, and events that make it as it is."""
    if unreadable(layout):
        return 0, [], []
    try:
        with closing(_open(layout)) as connection:
            seen = connection.execute("SELECT sequence FROM applied").fetchone()[0]
            rows = connection.execute("SELECT digest FROM packs ORDER BY id")
            packs = [row["digest"] for row in rows]
            return int(seen), packs, _events_of(connection, packs)
    except (sqlite3.Error, ValueError, TypeError):
        return 0, [], []


def _events_of(connection: sqlite3.Connection, packs: list[str]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"event": "collect", "gone": [], "packs": packs, "time": _EPOCH}
    ]
    for row in connection.execute("SELECT * FROM versions ORDER BY sequence, version"):
        nodes = connection.execute(
            "SELECT node FROM nodes WHERE record = ? ORDER BY head", (row["record"],)
        )
        fixed, pinned = connection.execute(
            "SELECT fixed, pinned FROM names WHERE name = ?", (row["name"],)
        ).fetchone()
        event = {
            "event": "put",
            **{k: row[k] for k in ("name", "record", "content", "codec", "message")},
            **{k: row[k] for k in ("source", "licence", "expires", "base")},
            "tags": json.loads(row["tags"]),
            "metrics": json.loads(row["metrics"]),
            "facts": {k: row[k] for k in ("bytes", "slots", "tokens", "layers", "dtype", "model")},
            "nodes": [node["node"] for node in nodes],
            "signature": json.loads(row["signature"]) if row["signature"] else None,
            "fixed": bool(fixed),
            "packs": [],
            "time": row["created"],
        }
        events.append(event)
        if pinned:
            events.append({"event": "pin", "name": row["name"], "pinned": True, "time": _EPOCH})
    return [*events, _pushed(connection)]


def _pushed(connection: sqlite3.Connection) -> dict[str, Any]:
    packs = connection.execute("SELECT digest FROM packs WHERE pushed = 1 ORDER BY id")
    # Versions are counted anew, from 1.
    names = connection.execute(
        "SELECT n.name, COUNT(*) FROM names AS n JOIN versions AS v ON v.name = n.name AND "
        "v.version <= n.pushed GROUP BY n.name"
    )
    found = {"packs": [row[0] for row in packs], "names": {row[0]: row[1] for row in names}}
    return {"event": "pushed", **found, "time": _EPOCH}
