"""StreamingLLM: attention sinks and a recent window (Xiao et al. 2024, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvedit.editors.base import Reader
from kvedit.editors.compacting.candidates import slot_order
from kvedit.editors.compacting.compaction import Compaction, HeadChoice
from kvedit.memory import KVMemory

__all__ = ["StreamingLLM"]


@dataclass(frozen=True)
class StreamingLLM(Compaction):
    """Keeps the first ``sinks`` slots, four in the paper, and fills the budget with the last ones.

    All heads keep the same slots. The paper counts positions within the cache:
    ``rerotate=True``. Other parameters are those of :class:`Compaction`; ``recent`` adds nothing.
    """

    head_choices: ClassVar[tuple[HeadChoice, ...]] = ("shared",)

    sinks: int = 4
    heads: HeadChoice = "shared"

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns the place of each slot."""
        return {i: slot_order(memory.layers[i]).double()[None] for i in layers}
