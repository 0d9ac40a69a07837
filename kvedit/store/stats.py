"""StoreStats: what a store holds, tier by tier, and what this object did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvedit.memory.show import human_bytes
from kvedit.store.counters import Counters
from kvedit.store.tiers import TierUsage

__all__ = ["StoreStats"]


@dataclass(frozen=True, eq=False)
class StoreStats:
    """What a store holds and did.

    Args:
        names: how many names there are.
        packs: how many packs.
        bytes: of all packs, wherever they are.
        local: of these, in the folder.
        tiers: what the live tiers hold, by name.
        counters: what this object did.
    """

    names: int
    packs: int
    bytes: int
    local: int
    tiers: Mapping[str, TierUsage]
    counters: Counters

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        tiers = {
            name: {"records": one.records, "bytes": one.bytes, "budget": one.budget}
            for name, one in self.tiers.items()
        }
        return {
            "names": self.names,
            "packs": self.packs,
            "bytes": self.bytes,
            "local": self.local,
            "tiers": tiers,
            "counters": self.counters.to_json(),
        }

    def __repr__(self) -> str:
        """A line for what is held, one per live tier, one for what was done."""
        lines = [
            f"{self.names} names in {self.packs} packs: {human_bytes(self.bytes)}, of which "
            f"{human_bytes(self.local)} here"
        ]
        for name, one in self.tiers.items():
            budget = "" if one.budget is None else f" of {human_bytes(one.budget)}"
            lines.append(f"{name}: {one.records} memories, {human_bytes(one.bytes)}{budget}")
        done = ", ".join(f"{name} {value}" for name, value in self.counters.to_json().items())
        return "\n".join([*lines, done])
