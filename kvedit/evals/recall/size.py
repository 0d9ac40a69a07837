"""Size: how long a memory is, and how much shorter than the whole context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from einops import rearrange

from kvedit.memory import KVMemory, LayerKV

__all__ = ["Size"]


@dataclass(frozen=True)
class Size:
    """Length of a memory.

    Args:
        tokens: tokens of the text that it stands for.
        slots: slots of its longest layer.
        kept: mean over layers and KV heads of the slots that attention can see: slots that a bias
            of -inf hides from all query heads of a KV head are not counted.
        nbytes: bytes of all of its tensors, hidden slots included.
        ratio: kept slots of the full context over those of the memory; None for nothing.
        byte_ratio: bytes of the full context over those of the memory; None for nothing.
    """

    tokens: float
    slots: float
    kept: float
    nbytes: float
    ratio: float | None
    byte_ratio: float | None

    @classmethod
    def of(cls, memory: KVMemory | None, full: KVMemory) -> Size:
        """Returns the size of a memory beside that of the full context."""
        if memory is None:
            return cls(0, 0, 0, 0, None, None)
        kept = _kept(memory)
        return cls(
            tokens=memory.tokens_count,
            slots=memory.slots,
            kept=kept,
            nbytes=memory.nbytes,
            ratio=_kept(full) / kept if kept else None,
            byte_ratio=full.nbytes / memory.nbytes,
        )

    @classmethod
    def mean(cls, sizes: Sequence[Size]) -> Size:
        """Returns the mean of sizes, for reports over several documents."""

        def over(name: str) -> float | None:
            known = [getattr(size, name) for size in sizes]
            return None if None in known else fmean(known)

        return cls(**{name: over(name) for name in asdict(sizes[0])})  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


def _kept(memory: KVMemory) -> float:
    return fmean(_seen(layer) for layer in memory.layers.values())


def _seen(layer: LayerKV) -> float:
    if layer.bias is None:
        return float(layer.slots)
    groups = rearrange(
        layer.bias > -torch.inf, "(head group) slot -> head group slot", head=layer.heads
    )
    return float(groups.any(dim=1).sum(dim=1).double().mean())
