"""KVZip: slots that the model needs to repeat the context (Kim et al. 2025, arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvedit.editors.base import Reader
from kvedit.editors.compacting.budget import as_count
from kvedit.editors.compacting.candidates import Candidates
from kvedit.editors.compacting.compaction import Compaction
from kvedit.editors.compacting.repeating import Repeat, reconstruction_scores
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["KVZip"]


@dataclass(frozen=True)
class KVZip(Compaction):
    """Keeps the slots that are read most while the model repeats the context; no query is needed.

    The context is repeated behind the memory in chunks, each after an instruction. A slot's score
    is the highest attention that any token of its chunk's pass, in any query head of its KV head,
    pays to it (:func:`~kvedit.editors.compacting.repeating.reconstruction_scores`). Heads compete
    for one budget, so they keep different numbers of slots, one at least. With
    ``heads="shared"``, a slot's score is the highest of its heads'. Other parameters are those of
    :class:`Compaction`.

    Args:
        sinks: first slots, kept and seen in every chunk's softmax.
        pool: who shares a budget: ``"model"``: all heads of all compacted layers, as the authors
            do; ``"layer"``: the heads of a layer; ``"head"``: nobody, every head keeps its own
            number (their uniform variant).
        chunk: tokens that are repeated at once.
        overlap: tokens before a chunk that its instruction ends with, from the second chunk on.
        instruction: what the first chunk is asked for with.
        continuation: what others are asked for with.
        suffix: between instruction and chunk. A chat template is not applied: give its turn
            markers here, where they matter.

    Raises:
        InvalidArgument: if a parameter is out of range, or the memory has no tokens.
        ContextTooLong: if the repeated chunk would run past the model's positions.
    """

    reproducibility: ClassVar[Literal["reader"]] = "reader"

    sinks: int = 4
    pool: Literal["model", "layer", "head"] = "model"
    chunk: int = 2048
    overlap: int = 8
    instruction: str = "\n\nRepeat the previous context exactly."
    continuation: str = "\n\nRepeat the part of the previous context exactly, starting with"
    suffix: str = "\n"

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        if self.pool not in ("model", "layer", "head"):
            raise InvalidArgument(f"pool must be 'model', 'layer' or 'head', found {self.pool!r}")
        as_count("chunk", self.chunk, 1)
        as_count("overlap", self.overlap)
        for name in ("instruction", "continuation", "suffix"):
            if not isinstance(getattr(self, name), str):
                raise InvalidArgument(f"{name}: expected a text, found {getattr(self, name)!r}")

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns the highest attention to each slot while the context is repeated."""
        if reader is None:
            raise InvalidArgument("KVZip reads with the model: pass reader=")
        asked = Repeat(self.chunk, self.overlap, self.instruction, self.continuation, self.suffix)
        return reconstruction_scores(memory, layers, reader, asked, self.sinks)

    def merged(self, scores: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Returns the highest score of the heads ``[1, slot]``."""
        return scores.masked_fill(~alive, -torch.inf).amax(dim=0, keepdim=True)

    def choose(
        self, scores: Mapping[int, torch.Tensor], places: Mapping[int, Candidates]
    ) -> dict[int, torch.Tensor]:
        """Returns the slots that are kept, heads and layers competing as ``pool`` says."""
        if self.pool == "head":
            return super().choose(scores, places)
        if self.pool == "layer":
            return {index: _compete([found], [places[index]])[0] for index, found in scores.items()}
        order = list(scores)
        kept = _compete([scores[i] for i in order], [places[i] for i in order])
        return dict(zip(order, kept, strict=True))


def _compete(scores: list[torch.Tensor], places: list[Candidates]) -> list[torch.Tensor]:
    """Returns the slots with the highest scores of several layers, bool ``[head, slot]`` each.

    Every head keeps its fixed slots, or its best one if it has none.
    """
    ranked = []
    for found, place in zip(scores, places, strict=True):
        one = found.cpu().masked_fill(~place.alive.cpu(), -torch.inf)
        best = torch.zeros_like(one, dtype=torch.bool)
        best.scatter_(1, one.argmax(dim=1, keepdim=True), value=True)
        fixed = place.fixed.cpu()
        fixed = fixed | (best & place.alive.cpu() & ~fixed.any(dim=1, keepdim=True))
        ranked.append(one.masked_fill(fixed, torch.inf))
    flat = torch.cat([one.flatten() for one in ranked])
    count = sum(int(place.counts.sum()) for place in places)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(kept, [one.numel() for one in ranked])
    return [
        part.reshape(place.alive.shape).to(place.alive.device) & place.alive
        for part, place in zip(parts, places, strict=True)
    ]
