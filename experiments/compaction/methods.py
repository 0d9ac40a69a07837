"""What the compaction experiment compares: each method makes a smaller memory of a whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange

from kvedit import editors
from kvedit.editors.matching import AttentionMatching, reference_queries
from kvedit.editors.matching.budgets import by_mass
from kvedit.memory import KVMemory
from kvedit.runtime import ModelReader

__all__ = ["DEFAULT", "METHODS", "Method"]

DEFAULT = "AM"
"""Attention Matching as it comes."""


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        make: whole memory, reader, share of the slots and seed to the smaller memory.
        drawn: whether the seed changes anything; other methods run once.
        matching: whether it is Attention Matching.
    """

    make: Callable[[KVMemory, ModelReader, float, int], KVMemory]
    drawn: bool = False
    matching: bool = False


def _selection(name: str, **options: Any) -> Method:
    def make(full: KVMemory, reader: ModelReader, budget: float, seed: int) -> KVMemory:
        drawn = {"seed": seed} if name == "RandomKeep" else {}
        # Packed holds the same slots as masked, without those that no head keeps.
        editor = getattr(editors, name)(budget=budget, **{"layout": "packed"} | options | drawn)
        made: KVMemory = editor(full, reader=reader)
        return made

    return Method(make, drawn=name == "RandomKeep")


def _matching(heads: str = "", **options: Any) -> Method:
    def make(full: KVMemory, reader: ModelReader, budget: float, seed: int) -> KVMemory:
        weights = _HEADS[heads](full, reader, budget) if heads else {}
        return AttentionMatching(budget, seed=seed, **weights, **options)(full, reader=reader)

    return Method(make, matching=True)


def _by_kvzip(full: KVMemory, reader: ModelReader, budget: float) -> dict[str, Any]:
    """Returns as many slots per head as KVZip keeps there."""
    kept = editors.KVZip(budget=budget).select(full, reader)
    return {"allocate": {index: tuple(mask.sum(dim=1).tolist()) for index, mask in kept.items()}}


def _by_peak(full: KVMemory, reader: ModelReader, budget: float) -> dict[str, Any]:
    """Returns slots per head so that all kept slots have the highest peaks of all heads.

    A slot's peak is the most attention that any reference query pays to it, where
    ``allocate="mass"`` takes the mean; bounds per head are the same.
    """
    queries = reference_queries(full, AttentionMatching(budget), reader)
    peaks = {index: _peaks(full, index, states) for index, states in queries.items()}
    uniform = {index: max(1, int(budget * full.layers[index].slots)) for index in peaks}
    return {"allocate": by_mass(peaks, uniform, forced=0)}


def _by_layer_peak(full: KVMemory, reader: ModelReader, budget: float) -> dict[str, Any]:
    """Returns the mean of a layer's heads for all of them: no head is padded to the longest."""
    counts = _by_peak(full, reader, budget)["allocate"]
    return {"allocate": {i: (sum(row) / len(row),) * len(row) for i, row in counts.items()}}


def _peaks(full: KVMemory, index: int, queries: torch.Tensor) -> torch.Tensor:
    layer, spec = full.layers[index], full.model.layers[index]
    grouped = rearrange(queries, "(head group) query dim -> head group query dim", head=layer.heads)
    logits = einsum(
        grouped, layer.keys, "head group query dim, head slot dim -> head group query slot"
    )
    return (logits * spec.scale).softmax(dim=-1).amax(dim=(1, 2))


_HEADS: Mapping[str, Callable[[KVMemory, ModelReader, float], dict[str, Any]]] = {
    "kvzip": _by_kvzip,
    "layer peak": _by_layer_peak,
}

METHODS: Mapping[str, Method] = {
    "Truncate": _selection("Truncate"),
    "RandomKeep": _selection("RandomKeep"),
    "Knorm": _selection("Knorm"),
    "KeyDiff": _selection("KeyDiff"),
    # The paper counts positions within the cache.
    "StreamingLLM": _selection("StreamingLLM", rerotate=True),
    "TOVA": _selection("TOVA"),
    "SnapKV": _selection("SnapKV"),
    "ExpectedAttention": _selection("ExpectedAttention"),
    # Heads compete, so that they keep different numbers of slots: only masked can hold them.
    "KVZip": _selection("KVZip", layout="masked"),
    "KVZip, every head the same": _selection("KVZip", pool="head"),
    DEFAULT: _matching(),
    "AM, folded": _matching(fold_bias=True),
    "AM, omp_fast": _matching(keys="omp_fast"),
    "AM, omp": _matching(keys="omp"),
    "AM, chunks of 256": _matching(chunk=256),
    "AM, on policy": _matching(on_policy=True),
    "AM, on policy, omp_fast": _matching(on_policy=True, keys="omp_fast"),
    "AM, self-study": _matching(queries="self_study"),
    "AM, self-study and repeat": _matching(queries="self_study+repeat"),
    "AM, heads by mass": _matching(allocate="mass"),
    "AM, heads by KVZip": _matching("kvzip"),
    "AM, layers by peak": _matching("layer peak"),
    "AM, heads by peak": _matching(allocate="peak"),
    "AM, heads by peak, nothing fitted": _matching(allocate="peak", bias=False, values=False),
    "AM, heads by peak, omp_fast": _matching(allocate="peak", keys="omp_fast"),
}
