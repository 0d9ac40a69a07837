"""FolderTier: another store's folder as a tier of whole memories."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kvedit.errors import NotFound
from kvedit.memory import KVMemory
from kvedit.store.tiers.base import Tier, TierUsage

if TYPE_CHECKING:
    from kvedit.store.store import Store

__all__ = ["FolderTier"]

_NAMES = "tier"


class FolderTier(Tier):
    """Memories in a folder, for example a slower and larger disk.

    Args:
        store: the folder's store; the tier keeps its memories under ``tier/`` there.
    """

    durable = True

    def __init__(self, store: Store) -> None:
        self.name = "folder"
        self.store = store

    def put(self, record: str, memory: KVMemory, paper: bytes = b"") -> None:
        """Holds a memory."""
        self.store.put(memory, _name(record), force=True)

    def get(self, record: str) -> KVMemory | None:
        """Returns the memory of a record, every byte checked, or None."""
        with suppress(NotFound):
            return self.store.get(_name(record))
        return None

    def discard(self, record: str) -> None:
        """Forgets a record; its bytes stay until the store's ``gc``."""
        with suppress(NotFound):
            self.store.rm(_name(record))

    def records(self) -> list[str]:
        """Returns the digests of what it holds, in order."""
        return sorted(entry.record for entry in self.store.ls(f"{_NAMES}/*"))

    def usage(self) -> TierUsage:
        """Returns what it holds."""
        found = self.store.ls(f"{_NAMES}/*")
        return TierUsage(len(found), sum(entry.bytes for entry in found))

    def close(self) -> None:
        """Closes the store."""
        self.store.close()


def _name(record: str) -> str:
    return f"{_NAMES}/r{record}"
