"""ModelReader: the runtime as editors may use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.memory import KVMemory
from kvedit.runtime.attaching import attach
from kvedit.runtime.tapping import tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelReader"]


@dataclass(frozen=True, eq=False)
class ModelReader:
    """Runs tokens over memories of one model and hands back what was asked for.

    Args:
        model: the model that made the memories.
    """

    model: PreTrainedModel

    def read(
        self, memory: KVMemory, tokens: torch.Tensor, sites: Iterable[str]
    ) -> dict[str, dict[int, torch.Tensor]]:
        """Returns the tensors, by site and layer, of one pass of ``tokens`` over ``memory``.

        Args:
            memory: the memory; it does not change.
            tokens: ``[query]`` token ids.
            sites: names of :data:`~kvedit.runtime.tapping.SITES`.
        """
        names = list(sites)
        with attach(self.model, memory) as session, tap(self.model, names) as tapped:
            session.forward(tokens[None], keep=1)
        return {site: {layer: tapped[site, layer] for layer in tapped.layers} for site in names}
