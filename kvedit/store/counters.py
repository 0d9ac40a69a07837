"""Counters: what one store object did since it was opened."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from threading import Lock

__all__ = ["Counters"]


@dataclass(eq=False)
class Counters:
    """What one store object did since it was opened.

    Args:
        hits: memories that ``get`` returned.
        misses: references that ``get`` did not find.
        bytes_read: bytes of blocks and manifests that were read.
        bytes_verified: of these, bytes whose digest was checked.
        bytes_written: bytes of packs and log lines.
        live_hits: memories that a tier of live memories (RAM, device) returned.
        read_ns: nanoseconds in which blocks were read and checked.
        fetched: packs that came from a tier below.
        bytes_fetched: their bytes.
        fetch_ns: nanoseconds in which they came, checks included.
        pushed: packs that went to a tier below.
        evicted: memories and packs that made room.
        degraded: times that a tier failed and the others did its work.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_verified: int = 0
    bytes_written: int = 0
    live_hits: int = 0
    read_ns: int = 0
    fetched: int = 0
    bytes_fetched: int = 0
    fetch_ns: int = 0
    pushed: int = 0
    evicted: int = 0
    degraded: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, **amounts: int) -> None:
        """Adds to the named counters, from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def to_json(self) -> dict[str, int]:
        """Returns all counters by name."""
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}
