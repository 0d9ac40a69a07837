"""Freeze: which part of a memory training leaves as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.cartridges.mappings import known_keys
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV

__all__ = ["Freeze"]


@dataclass(frozen=True)
class Freeze:
    """What stays. A layer of which nothing is trained is shared with the start, bit for bit.

    Slots at a context's beginning are attention sinks: a model that loses them forgets how to
    speak, so the first one is frozen unless told otherwise (Eyuboglu et al. 2025, Cartridges,
    arXiv 2506.06266, appendix on training stability). Keys say where attention goes and values
    what it brings; either may be frozen (Diaz 2025, arXiv 2508.17032).

    Args:
        sinks: leading slots of every layer that stay.
        positions: RoPE positions whose slots stay as well: the sinks of later parts of a composed
            memory (:func:`kvedit.cartridges.composing.sink_positions`).
        keys: whether all keys stay.
        values: whether all values stay.
        bias: whether the attention bias stays; a trained one starts from zero where there is none.
            Evicted slots (bias -inf) stay evicted either way.
        layers: layers that stay as a whole, negative numbers from the end.

    Raises:
        InvalidArgument: if a number is out of range.
    """

    sinks: int = 1
    positions: tuple[int, ...] = ()
    keys: bool = False
    values: bool = False
    bias: bool = True
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks ranges and makes lists hashable."""
        if type(self.sinks) is not int or self.sinks < 0:
            raise InvalidArgument(f"sinks: expected a whole number from 0, found {self.sinks!r}")
        for name in ("positions", "layers"):
            given = tuple(getattr(self, name))
            if not all(type(number) is int for number in given):
                raise InvalidArgument(f"{name}: expected whole numbers, found {given!r}")
            object.__setattr__(self, name, given)

    @classmethod
    def of(cls, given: Freeze | Mapping[str, Any]) -> Freeze:
        """Returns a mapping, as a config file holds it, as a Freeze."""
        return given if isinstance(given, Freeze) else cls(**known_keys("freeze", cls, given))

    def trained(self, memory: KVMemory) -> dict[int, torch.Tensor]:
        """Returns layer to trained slots, int64 ``[trained]``; layers that stay are missing.

        Raises:
            UnknownName: if a frozen layer does not exist.
            InvalidArgument: if nothing is left to train.
        """
        whole = set(memory.layer_indices(self.layers)) if self.layers else set()
        found = {
            index: self._slots(layer)
            for index, layer in memory.layers.items()
            if index not in whole
        }
        found = {index: slots for index, slots in found.items() if len(slots)}
        if not found or (self.keys and self.values and self.bias):
            raise InvalidArgument(
                f"nothing is left to train: {self} on a memory of {memory.slots} slots"
            )
        return found

    def _slots(self, layer: LayerKV) -> torch.Tensor:
        stays = torch.arange(layer.slots) < self.sinks
        if self.positions:
            stays |= torch.isin(layer.positions.cpu(), torch.tensor(self.positions))
        return (~stays).nonzero().squeeze(1)
