"""PoolTier: memories in the RAM of many machines, for as long as these keep them."""

from __future__ import annotations

from typing import Protocol

from kvedit.errors import CorruptMemory
from kvedit.memory import KVMemory
from kvedit.store.crypt import Cipher
from kvedit.store.sealed import open_buffer, read_sealed, seal
from kvedit.store.tiers.base import Tier, TierUsage

__all__ = ["Pool", "PoolTier"]


class Pool(Protocol):
    """Bytes under keys that come back whole or not at all, such as ``MooncakePool``."""

    def put(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Returns whether the pool holds exactly these bytes now."""
        ...

    def get(self, key: str, digest: str | None = None) -> bytearray | None:
        """Returns the bytes of a key, or None."""
        ...

    def contains(self, key: str) -> bool:
        """Returns whether the key is there, whole."""
        ...

    def delete(self, key: str) -> bool:
        """Returns whether the key is gone."""
        ...

    def close(self) -> None:
        """Leaves the pool."""
        ...


class PoolTier(Tier):
    """A shared pool as a tier. It may lose anything at any time, and never is the only place.

    Args:
        pool: the pool.
        cipher: seals and opens, or None.
    """

    def __init__(self, pool: Pool, cipher: Cipher | None = None) -> None:
        self.name = "pool"
        self._pool = pool
        self._cipher = cipher
        self._put: dict[str, int] = {}

    def put(self, record: str, memory: KVMemory, paper: bytes) -> None:
        """Holds a memory, if the pool has room; it may be gone the next moment."""
        pack = seal(memory, paper, self._cipher)
        data = bytearray().join(pack.chunks)
        if self._pool.put(record, data):
            self._put[record] = len(data)

    def get(self, record: str) -> KVMemory | None:
        """Returns the memory of a record, every byte checked, or None.

        Raises:
            CorruptMemory: if the pool holds other bytes under this record.
            TierUnavailable: if the pool can't be reached.
        """
        data = self._pool.get(record)
        if data is None:
            return None
        held = open_buffer(data, f"record {record} of the pool")
        if record not in held.pack.manifests:
            raise CorruptMemory(f"the pool holds another memory under record {record}")
        return read_sealed(held, record, "full", self._cipher)[0]

    def discard(self, record: str) -> None:
        """Forgets a record."""
        self._pool.delete(record)
        self._put.pop(record, None)

    def records(self) -> list[str]:
        """Returns the digests of what this client put and the pool still has, in order."""
        return sorted(record for record in list(self._put) if self._pool.contains(record))

    def usage(self) -> TierUsage:
        """Returns what this client put; a pool does not tell of others."""
        held = self.records()
        return TierUsage(len(held), sum(self._put[record] for record in held))

    def __contains__(self, record: object) -> bool:
        return isinstance(record, str) and self._pool.contains(record)

    def close(self) -> None:
        """Leaves the pool; what this client lent to it is gone then."""
        self._pool.close()
