"""Multiplicity: a bias that says "count this slot m times" becomes m slots.

An engine without bias can't add to a logit, but it can see a slot several times: ``e^s`` counted m
times is ``e^(s + log m)``. So a bias of log m is exact as m copies, one of zero as the slot itself,
and one of -inf as no slot.
"""

from __future__ import annotations

import dataclasses

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV

__all__ = ["MOST", "multiplied"]

MOST = 64
"""Times that a slot is held at most: a stronger bias would fill the engine's cache with copies."""

_NEAR = 1e-5  # nats by which a bias may miss log m; a float32 logarithm misses by far less


def multiplied(memory: KVMemory) -> KVMemory:
    """Returns a memory without bias that gives the same attention.

    Args:
        memory: its bias may be log m for whole numbers m, or -inf, the same for all query heads of
            a layer. Without bias it is returned as it is.

    Raises:
        InvalidArgument: if its bias is another.
    """
    biased = {i: layer for i, layer in memory.layers.items() if layer.bias is not None}
    if not biased:
        return memory
    return memory.with_layers({index: _held(index, layer) for index, layer in biased.items()})


def _held(index: int, layer: LayerKV) -> LayerKV:
    plain = dataclasses.replace(layer, bias=None)
    if layer.bias is None:
        return plain
    counts = _counts(index, layer.bias.detach().cpu().double())
    if bool((counts == 1).all()):
        return plain
    return plain.select(torch.arange(layer.slots).repeat_interleave(counts))


def _counts(index: int, bias: torch.Tensor) -> torch.Tensor:
    """Returns how often each slot is to be held, ``[slot]`` int64."""
    if not bool((bias == bias[:1]).all()):
        raise InvalidArgument(f"layer {index}: {_differs(bias)}")
    counts = bias[0].exp().round()
    off = (bias[0] - counts.log()).abs().nan_to_num(0.0)  # -inf, which is no slot, is off by nan
    wrong = (off > _NEAR) | (counts > MOST)
    if bool(wrong.any()):
        raise InvalidArgument(
            f"layer {index}: attention bias {float(bias[0, wrong][0]):.4g} is not log m for a "
            f"whole m up to {MOST}, so slots held several times can't stand for it: run the "
            "Compile editor, or serve with --engine hf"
        )
    return counts.long()


def _differs(bias: torch.Tensor) -> str:
    if bool(bias.isneginf().any()):
        return (
            "some heads lack slots that others have (a bias of -inf): compact with one choice for "
            "all heads, or with layout='packed'"
        )
    return (
        "attention bias differs between heads, which no engine takes: run the Compile editor, or "
        "serve with --engine hf"
    )
