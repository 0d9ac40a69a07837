"""Tier: a place that holds whole memories by record digest; all tiers keep one contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvedit.memory import KVMemory

__all__ = ["Tier", "TierUsage"]


@dataclass(frozen=True)
class TierUsage:
    """What a tier holds.

    Args:
        records: how many memories.
        bytes: what they take.
        budget: bytes that it may take, or None for no limit of its own.
    """

    records: int
    bytes: int
    budget: int | None = None


class Tier(ABC):
    """A place for memories. ``kvedit.testing.TierContract`` is what every one must pass.

    - What :meth:`get` returns has the bits that were put, or it raises; it never returns another
      memory, whatever happened to the bytes.
    - A record that is not there, or no more, is None and no error.
    - Putting a record again changes nothing. Two records never meet, also over equal tokens.
    - A tier that can't be reached raises ``TierUnavailable`` in bounded time.
    """

    name: str = "tier"
    """For messages and counters."""

    durable: bool = False
    """Whether what was put survives the end of the process."""

    @abstractmethod
    def put(self, record: str, memory: KVMemory, paper: bytes) -> None:
        """Holds a memory from now on.

        Args:
            record: its record digest.
            memory: the memory.
            paper: the canonical bytes of its manifest, whose BLAKE3 is ``record``.

        Raises:
            CapacityExceeded: if it is bigger than the tier.
            TierUnavailable: if the tier can't be reached.
        """

    @abstractmethod
    def get(self, record: str) -> KVMemory | None:
        """Returns the memory of a record, or None.

        Raises:
            CorruptMemory: if its bytes are not those that were put.
            TierUnavailable: if the tier can't be reached.
        """

    @abstractmethod
    def discard(self, record: str) -> None:
        """Forgets a record; one that is not there is fine."""

    @abstractmethod
    def records(self) -> list[str]:
        """Returns the digests of what it holds, in order; empty where it can't tell."""

    @abstractmethod
    def usage(self) -> TierUsage:
        """Returns what it holds."""

    def __contains__(self, record: object) -> bool:
        """Whether it holds a record."""
        return record in self.records()

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Lets go of what it has open."""
