"""SEKA for tests: operands learned from a few triplets, in two layers, and rows of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import KVMemory

__all__ = ["SEKA_ROWS", "make_experts", "make_projectors"]

_LAYERS = (1, -1)  # the first layer's keys don't depend on what was read before: no head passes

_NEAR, _SENTENCE = {"tokens": [-6, -2]}, {"sentence": "That is"}
_SPANS = [_NEAR, _SENTENCE]
_BOTH = {"spans": _SPANS, "gain_positive": -1.5, "min_difference": 0.0, "phase": "both"}
_TOP = {"spans": [_NEAR, "That"], "question": "wait", "gain": -2.0, "top": 5, "layers": [-1]}
_POSITIVE = {
    "spans": _SPANS,
    "gain_positive": 1.5,
    "gain_negative": None,
    "layers": [-1],
    "min_difference": 0.01,
}

_ZERO = {"spans": [_NEAR], "gain_positive": 0.0, "gain_negative": 0.0}
_STILL = {"spans": [_SENTENCE], "question": "wait", "gain": 0.0}

_CHANGES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ada-seka": ("ada_seka", {"spans": "you would", "question": " and who?"}),
    "ada-seka-top": ("ada_seka", _TOP),
    "ada-seka-both": ("ada_seka", {"spans": _SPANS, "question": " who?", "phase": "both"}),
    "seka": ("seka", {"spans": "you would"}),
    "seka-positive": ("seka", _POSITIVE),
    # A head of a layer below the last must pass: what the last one reads leaves no trace in keys.
    "seka-baked": ("seka", {"spans": _SPANS, "min_difference": 0.0, "phase": "prefill"}),
    "seka-both": ("seka", _BOTH),
}
_IDENTITIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ada-seka-zero": ("ada_seka", _STILL),
    "seka-zero": ("seka", _ZERO),
}

SEKA_ROWS: tuple[Mapping[str, Any], ...] = (
    *({"name": n, "editor": e, "parameters": p, "oracle": False} for n, (e, p) in _CHANGES.items()),
    *(
        {"name": n, "editor": e, "parameters": p, "identity": True}
        for n, (e, p) in _IDENTITIES.items()
    ),
)
"""Rows of :data:`~kvedit.testing.editor_cases.EDITOR_CASES`, as arguments of its dataclass."""


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
