"""Steering, timed: once in the memory, and by hooks while the model runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from kvedit.editors import Steer
from kvedit.memory import Delta, ModelSpec
from kvedit.runs.bench.pairs import Timed
from kvedit.steering.continuous import steered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvedit.runs.bench.sides import Sides

__all__ = ["any_delta", "steered_sides"]

_SIZE = 1e-3  # of a vector: small, so that the same tokens are decoded with it and without


def steered_sides(sides: Sides) -> tuple[Timed, Timed]:
    """Returns timers of decoding over a memory that was steered once, and under hooks.

    Hooks stand in every layer and act on every token that is decoded, the KV cache on.
    """
    # Time does not depend on where a direction points.
    delta = any_delta(sides.model, sides.memory.model)
    once = Steer(keys=1.0, values=1.0)(sides.memory, delta.operand())
    stream = delta.only(sites="residual")

    def hooks() -> AbstractContextManager[None]:
        return steered(sides.model, stream, 1.0, scope="generation")

    return sides.decoding(once), sides.decoding(sides.memory, hooks)


def any_delta(model: PreTrainedModel, spec: ModelSpec) -> Delta:
    """Returns a small random delta: keys, values and the residual stream of every layer.

    Args:
        model: the live model, for the size of its residual stream.
        spec: its facts.
    """
    drawn = torch.Generator().manual_seed(0)
    hidden = model.get_input_embeddings().weight.shape[-1]
    sites: dict[str, dict[int, torch.Tensor]] = {"keys": {}, "values": {}, "residual": {}}
    for index, layer in enumerate(spec.layers):
        shapes = {
            "keys": (layer.kv_heads, layer.key_dim),
            "values": (layer.kv_heads, layer.value_dim),
            "residual": (hidden,),
        }
        for site, shape in shapes.items():
            sites[site][index] = _SIZE * torch.randn(shape, generator=drawn)
    return Delta(sites, spec)
