"""Salvage: what can be saved of a damaged log, from its good lines, the index and the packs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import Any

from kvedit.errors import CorruptMemory
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.draft import Labels
from kvedit.store.finder import Finder
from kvedit.store.layout import Layout
from kvedit.store.manifest import Manifest
from kvedit.store.pack import Pack
from kvedit.store.sealed import read_paper
from kvedit.store.shelf import Shelf

__all__ = ["chain", "good_lines", "lost_events", "salvage_log"]


def good_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Returns the events whose own checksum holds, and how many lines are damaged.

    Args:
        data: the bytes of the log.
    """
    events, bad = [], 0
    for line in data.split(b"\n"):
        if not line:
            continue
        try:
            event = json.loads(line)
            checksum = event.pop("checksum")
            whole = digest_bytes(canonical_json(event)) == checksum
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole = False
        if whole:
            events.append(event)
        else:
            bad += 1
    return events, bad


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

    Good lines stay. Memories whose lines are lost but whose manifests lie in the packs get names
    under ``recovered/``, unless the index, which may have seen the lost lines, knows better: then
    it says what was there. The damaged log is kept in ``quarantine``.
    """
    layout = shelf.layout
    data = layout.log.read_bytes() if layout.log.exists() else b""
    events, bad = good_lines(data)
    said = [f"{bad} lines of the log are damaged, {len(events)} are good"]
    known = _from_index(layout, len(events) + bad)
    if known is not None:
        said.append("the index has seen them all: the log is made again from it")
        events = known
    else:
        found = lost_events(shelf, finder, events)
        said.append(f"{len(found)} memories without a line: see recovered/")
        events = [*events, *found]
    layout.quarantine.mkdir(exist_ok=True)
    if data:
        kept = layout.quarantine / f"log-{digest_bytes(data)[:16]}.jsonl"
        layout.publish(kept, [data])
    layout.publish(layout.log, [chain(events)])
    shelf.index.rebuild()
    return said


def lost_events(shelf: Shelf, finder: Finder, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns events that bring packs and memories back which no event names.

    Args:
        shelf: the store's parts.
        finder: opens the packs.
        events: what is known.
    """
    parts = [part for event in events for part in event.get("events", [event])]
    records = {part.get("record") for part in parts}
    gone = {pack for part in parts for pack in part.get("gone", [])}
    named = {pack for part in parts for pack in part.get("packs", [])} - gone
    found = []
    strays = []
    for path in sorted(shelf.layout.packs.glob("*.safetensors")):
        with suppress(CorruptMemory, FileNotFoundError, ValueError):
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


def _from_index(layout: Layout, lines: int) -> list[dict[str, Any]] | None:
    """Returns events that make the index as it is, or None if it has seen fewer lines."""
    try:
        with closing(sqlite3.connect(f"file:{layout.index}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            if connection.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                return None
            row = connection.execute("SELECT sequence FROM applied").fetchone()
            if row is None or row["sequence"] < lines:
                return None
            return _events_of(connection)
    except (sqlite3.Error, ValueError, TypeError):
        return None


def _events_of(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    packs = [row["digest"] for row in connection.execute("SELECT digest FROM packs ORDER BY id")]
    pushed = [
        row["digest"] for row in connection.execute("SELECT digest FROM packs WHERE pushed = 1")
    ]
    events: list[dict[str, Any]] = [
        {"event": "collect", "gone": [], "packs": packs, "time": _EPOCH},
        {"event": "pushed", "packs": pushed, "time": _EPOCH},
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
    return events
