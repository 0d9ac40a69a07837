"""What a store says about what it holds: Record, Entry, Details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TypeVar

from kvedit.memory.show import human_bytes

__all__ = ["Details", "Entry", "Listing", "Record", "one_of"]

Item = TypeVar("Item")


class Listing(list[Item]):
    """A list that prints one item per line."""

    def __repr__(self) -> str:
        """All items in their short form."""
        return "\n".join(map(str, self)) or "nothing"


@dataclass(frozen=True)
class Record:
    """One version of a name.

    Args:
        name: the name.
        version: number of the version, from 1 on.
        record: record digest: content, lineage and codec.
        content: content digest; equals ``KVMemory.digest``.
        created: when it was put, in UTC.
        message: what was said about it.
        tags: its tags.
        bytes: size of its tensors, before anything is shared.
        slots: slots of its longest layer.
        tokens: its source tokens.
        layers: how many layers it holds.
        dtype: of its keys.
        model: what the model that made it was loaded as.
        source: where its text came from, as the user said.
        licence: of its text, as the user said.
        metrics: evaluation results by name.
        codec: how its blocks are stored; ``"recipe"`` where they are rebuilt when read.
        expires: when it goes by itself, in UTC, or None.
        signed_by: public key that signed it, or empty.
    """

    name: str
    version: int
    record: str
    content: str
    created: datetime
    message: str
    tags: tuple[str, ...]
    bytes: int
    slots: int
    tokens: int
    layers: int
    dtype: str
    model: str
    source: str = ""
    licence: str = ""
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    codec: str = "raw"
    expires: datetime | None = None
    signed_by: str = ""

    def __str__(self) -> str:
        """One line."""
        parts = (
            f"{self.name} v{self.version}  {self.record[:12]}  {self.created:%Y-%m-%d %H:%M:%S}",
            f"{self.slots} slots  {human_bytes(self.bytes)}  {self.model}",
            "" if self.codec == "raw" else self.codec,
            " ".join(f"#{tag}" for tag in self.tags),
            " ".join(f"{name}={value:.4g}" for name, value in self.metrics.items()),
            self.message,
        )
        return "  ".join(part for part in parts if part)


@dataclass(frozen=True)
class Entry(Record):
    """A name with its newest version.

    Args:
        versions: how many versions it has.
        pinned: whether it is kept out of eviction and expiry.
        fixed: whether it is a tag, which does not move.
    """

    versions: int = 1
    pinned: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Details:
    """One version, with what its manifest says.

    Args:
        record: the version.
        codec: how its blocks are stored.
        blocks: how many different blocks it has.
        stored: bytes of these blocks; other memories may share them.
        packs: the packs that hold them.
        next_position: RoPE position of the first token that follows.
        rules: number of its run-time rules.
        biased: layers that have a bias.
        text: its source text, or None.
        lineage: one line per step that made it, the newest first.
    """

    record: Record
    codec: str
    blocks: int
    stored: int
    packs: tuple[str, ...]
    next_position: int
    rules: int
    biased: tuple[int, ...]
    text: str | None
    lineage: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines: the version, its contents, its lineage."""
        record = self.record
        rows = [
            str(record),
            f"  record:  {record.record}",
            f"  content: {record.content}",
            f"  {record.layers} layers, {record.slots} slots, {record.tokens} tokens, "
            f"{record.dtype}, next position {self.next_position}",
            f"  {self.blocks} blocks, {human_bytes(self.stored)}, in {len(self.packs)} packs, "
            f"codec {self.codec}",
        ]
        if self.biased:
            rows.append(f"  bias in {len(self.biased)} layers")
        if self.rules:
            rows.append(f"  {self.rules} run-time rules")
        if self.text is not None:
            text = self.text.replace("\n", " ")
            rows.append(f"  text: {text if len(text) <= 72 else text[:71] + '…'}")
        return "\n".join([*rows, *(f"  {line}" for line in self.lineage)])


def one_of(names: Sequence[str], limit: int = 8) -> str:
    """Returns names for an error message, shortened where there are many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
