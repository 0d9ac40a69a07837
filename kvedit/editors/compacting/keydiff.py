"""KeyDiff: keys that are least like the others are kept (Park et al. 2025, arXiv 2504.15364)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, normalize

from kvedit.editors.base import Reader
from kvedit.editors.compacting.candidates import alive_slots
from kvedit.editors.compacting.compaction import Compaction
from kvedit.editors.compacting.knorm import wide
from kvedit.memory import KVMemory

__all__ = ["KeyDiff"]


@dataclass(frozen=True)
class KeyDiff(Compaction):
    """Keeps the slots whose keys have the lowest cosine to the mean direction of the head's keys.

    The score is ``-cos(k_j, mean_i k_i / ||k_i||)``, over the slots that the head still has.
    Parameters are those of :class:`Compaction`.
    """

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns minus the cosine of each key to the head's anchor."""
        found = {}
        for index in layers:
            keys = wide(memory.layers[index].keys)
            alive = alive_slots(memory, index)[:, :, None]
            directions = normalize(keys, dim=-1).masked_fill(~alive, 0)
            anchor = directions.sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
            found[index] = -cosine_similarity(keys, anchor, dim=-1)
        return found
