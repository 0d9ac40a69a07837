"""Truncate: the first or the last slots, the plainest baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvedit.editors.base import Reader
from kvedit.editors.compacting.candidates import slot_order
from kvedit.editors.compacting.compaction import Compaction, HeadChoice
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Truncate"]


@dataclass(frozen=True)
class Truncate(Compaction):
    """Keeps the first slots of the context, or the last.

    The first p tokens are also the start that the Cartridges paper found best (arXiv 2506.06266).
    All heads keep the same slots; other parameters are those of :class:`Compaction`.

    Args:
        keep: ``"first"`` or ``"last"``.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    head_choices: ClassVar[tuple[HeadChoice, ...]] = ("shared",)

    heads: HeadChoice = "shared"
    keep: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        if self.keep not in ("first", "last"):
            raise InvalidArgument(f"keep must be 'first' or 'last', found {self.keep!r}")

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns the place of each slot, or how far it is from it."""
        sign = -1.0 if self.keep == "first" else 1.0
        return {i: sign * slot_order(memory.layers[i]).double()[None] for i in layers}
