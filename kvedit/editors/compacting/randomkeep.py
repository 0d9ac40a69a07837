"""RandomKeep: slots drawn without replacement, the control of every selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvedit.editors.base import Reader
from kvedit.editors.compacting.budget import as_count
from kvedit.editors.compacting.compaction import Compaction
from kvedit.memory import KVMemory

__all__ = ["RandomKeep"]

_LAYERS = 1 << 16
"""Above the number of layers of any model: seeds of two layers differ."""


@dataclass(frozen=True)
class RandomKeep(Compaction):
    """Keeps slots at random; the global random state is neither read nor changed.

    A layer's draw depends on the seed, its index, its heads and its slots, not on which other
    layers are compacted. Other parameters are those of :class:`Compaction`.

    Args:
        seed: a whole number from 0.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        as_count("seed", self.seed)

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns uniform draws."""
        found = {}
        for index in layers:
            layer = memory.layers[index]
            draw = torch.Generator().manual_seed((self.seed * _LAYERS + index) % (1 << 63))
            heads = layer.heads if self.heads == "each" else 1
            drawn = torch.rand(heads, layer.slots, generator=draw, dtype=torch.float64)
            found[index] = drawn.to(layer.keys.device)
        return found
