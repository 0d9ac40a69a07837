"""Knorm: keys of a low norm are kept (Devoto et al. 2024, arXiv 2406.11430)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvedit.editors.base import Reader
from kvedit.editors.compacting.compaction import Compaction
from kvedit.memory import KVMemory

__all__ = ["Knorm", "wide"]


@dataclass(frozen=True)
class Knorm(Compaction):
    """Keeps the slots whose keys have the smallest L2 norm, head by head.

    The score is ``-||k||``: the paper found that keys of a small norm receive much attention. It
    leaves the first two layers of its models alone (``layers=``). With QK norm all keys of a head
    have nearly one norm, and little is left to tell. Parameters are those of :class:`Compaction`.
    """

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns minus the norm of each key."""
        return {index: -wide(memory.layers[index].keys).norm(dim=-1) for index in layers}


def wide(states: torch.Tensor) -> torch.Tensor:
    """Returns states in float32 at least, in which scores are computed."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
