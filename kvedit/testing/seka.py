"""Operands of SEKA for tests: learned from a few triplets, in two layers of a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import KVMemory

__all__ = ["make_experts", "make_projectors"]

_LAYERS = (1, -1)  # the first layer's keys don't depend on what was read before: no head passes


def make_projectors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    """Returns an operand of kind "projectors"."""
    from kvedit.editors.seka import learn_projectors, synthetic_triplets
    from kvedit.models.inspection import inspect
    from kvedit.runtime import ModelReader

    spec, reader = inspect(model, tokenizer).spec, ModelReader(model, tokenizer)
    return learn_projectors(reader, spec, synthetic_triplets(seed=0, n=5), layers=_LAYERS)


def make_experts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    """Returns an operand of kind "experts", of two experts."""
    from kvedit.editors.seka import learn_experts, synthetic_triplets
    from kvedit.models.inspection import inspect
    from kvedit.runtime import ModelReader

    spec, reader = inspect(model, tokenizer).spec, ModelReader(model, tokenizer)
    sets = {f"draw-{seed}": synthetic_triplets(seed=seed, n=4) for seed in (1, 2)}
    return learn_experts(reader, spec, sets, layers=_LAYERS)
