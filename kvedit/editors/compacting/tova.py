"""TOVA: slots that the last token attends to (Oren et al. 2024, arXiv 2401.06104)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange

from kvedit.editors.base import Reader
from kvedit.editors.compacting.compaction import Compaction, HeadChoice
from kvedit.editors.compacting.observing import check_prompt, observe_last, observe_prompt
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["TOVA"]


@dataclass(frozen=True)
class TOVA(Compaction):
    """Keeps the slots with the highest attention of the last token, averaged over a layer's heads.

    The paper evicts one slot per decoded token; here the whole budget is met at once, by the
    token that was read last, whose own slot competes by the attention that it pays to itself.
    ``heads="each"`` averages over the query heads of each KV head instead. Other parameters are
    those of :class:`Compaction`.

    Args:
        prompt: a text whose last token observes instead (query-aware).

    Raises:
        InvalidArgument: if a parameter is out of range, or the memory's last token can't be read
            again.
    """

    reproducibility: ClassVar[Literal["reader"]] = "reader"

    heads: HeadChoice = "shared"
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        check_prompt(self.prompt)

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns the last token's attention, averaged over query heads."""
        if reader is None:
            raise InvalidArgument("TOVA reads with the model: pass reader=")
        if self.prompt is None:
            seen = observe_last(memory, layers, reader, 1)
        else:
            seen = observe_prompt(memory, layers, reader, self.prompt, 1)
        found = {}
        for index, weights in seen.items():
            heads = 1 if self.heads == "shared" else memory.layers[index].heads
            grouped = rearrange(weights[:, 0], "(head group) slot -> head group slot", head=heads)
            found[index] = grouped.mean(dim=1)
        return found
