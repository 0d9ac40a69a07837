"""AdaSeka: experts' subspaces, weighted by how the question's query meets them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from einops import einsum, rearrange

from kvedit.editors.base import Reader, SpanLike
from kvedit.editors.phases import Phase, Phased
from kvedit.editors.seka.featuremaps import FeatureMapName, check_learned_with, named_map
from kvedit.editors.seka.keys import KeyEdit, edit_keys, held_masks
from kvedit.editors.seka.learning import EXPERTS
from kvedit.editors.seka.projectors import operand_layers, project
from kvedit.editors.target import as_indices, as_number, as_spans
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerSpec

__all__ = ["AdaSeka", "expert_weights"]


@dataclass(frozen=True)
class AdaSeka(Phased):
    """``k' = k + g P k`` with ``P = sum_m alpha_m U_m U_m^T``, alpha from the question's query.

    Li et al. 2026 (AdaSEKA, arXiv 2603.01281), section 4: ``alpha_m`` is ``sum_k (q.u_k) sigma_k``
    over the K leading columns of expert m, over the largest such absolute value. q is the query of
    the question's last token, read over the memory as it comes, before RoPE as the keys were
    learned; query
    heads that share a KV head are averaged, as in the published code. An expert that does not move
    a head enough has no weight there. Called with an operand of kind "experts"
    (:func:`~kvedit.editors.seka.learning.learn_experts`) and a reader.

    Args:
        spans: what to highlight: one span or several; their union is edited once.
        question: what will be asked, as it will follow the memory.
        gain: g; 1.0 in the published code.
        top: K, leading columns of each expert.
        layers: layers to touch; None means those of the operand.
        min_difference: which heads of an expert count; None takes the operand's own.
        feature_map: as for :class:`~kvedit.editors.seka.edit.Seka`; the query is not mapped.
        phase: as for :class:`~kvedit.editors.seka.edit.Seka`.

    Raises:
        InvalidArgument: if a parameter is out of range, the operand is of another kind, has fewer
            columns or was learned with another feature map, no head passes, or the context can't
            be read anew.
        IncompatibleModel: if another model made the operand.
        UnknownName: if there is no such feature map.
    """

    rewrites: ClassVar[bool] = True
    operands: ClassVar[tuple[str, ...]] = (EXPERTS,)
    reproducibility: ClassVar[Literal["pure", "reader", "trained"]] = "reader"

    spans: SpanLike | tuple[SpanLike, ...]
    question: str
    gain: float = 1.0
    top: int = 3
    layers: tuple[int, ...] | None = None
    min_difference: float | None = None
    feature_map: FeatureMapName = "none"
    phase: Phase = field(default="decode", kw_only=True)

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        super().__post_init__()
        named_map(self.feature_map)
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        object.__setattr__(self, "gain", as_number("gain", self.gain))
        if self.min_difference is not None:
            floor = as_number("min_difference", self.min_difference, low=0.0)
            object.__setattr__(self, "min_difference", floor)
        if not isinstance(self.question, str) or not self.question:
            raise InvalidArgument(f"question: expected a text, found {self.question!r}")
        if type(self.top) is not int or self.top < 1:
            raise InvalidArgument(f"top: expected 1 or more columns, found {self.top!r}")

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with the spans' keys amplified for the question."""
        memory, operand = memories
        if reader is None:
            raise InvalidArgument("AdaSeka reads with the model: pass reader=")
        chosen, entries, facts = operand_layers(memory, operand, EXPERTS, self.layers)
        if self.top > facts["rank"]:
            raise InvalidArgument(
                f"top: the experts hold {facts['rank']} columns, found {self.top}; learn them with "
                "a larger rank"
            )
        check_learned_with(self.feature_map, facts)
        masks = held_masks(memory, self.spans, chosen)
        if not self.gain:
            return memory
        floor = facts["min_difference"] if self.min_difference is None else self.min_difference
        queries = reader.read(memory, reader.encode(self.question), ("queries_pre",))
        edits = {}
        for index, slots in masks.items():
            spec = memory.model.layers[index]
            experts = self._experts(operand, entries[index], len(facts["names"]), floor)
            heads = (experts != 0).flatten(1).any(dim=1)
            if bool(heads.any()):
                query = _group_query(queries["queries_pre"][index], spec)
                weights = self.gain * expert_weights(query, experts.to(query))
                edits[index] = KeyEdit(spec, slots, heads, partial(self._change, experts, weights))
        if not edits:
            raise InvalidArgument(
                f"no head of the layers {chosen} moves by min_difference={floor} with the "
                "question: the edit would do nothing; lower it, or learn other layers"
            )
        return edit_keys(memory, edits, self.phase, reader)

    def _change(
        self, experts: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        added = partial(_combined, experts, weights)
        return named_map(self.feature_map).added(keys, added)

    def _experts(
        self, operand: KVMemory, entry: dict[str, Any], count: int, floor: float
    ) -> torch.Tensor:
        """Returns ``sigma_k u_k`` ``[kv_head, expert, top, dim]``; zero where one does not pass."""
        vectors = rearrange(
            operand.layers[int(entry["layer"])].keys,
            "kv_head (expert rank) dim -> kv_head expert rank dim",
            expert=count,
        )
        difference = torch.tensor(entry["difference"], dtype=torch.float64)
        passes = rearrange(difference >= floor, "expert kv_head -> kv_head expert 1 1")
        return vectors[:, :, : self.top] * passes.to(vectors)


def expert_weights(query: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Returns alpha ``[kv_head, expert]``: alignment with the query, over the largest in size.

    Args:
        query: ``[kv_head, dim]`` before RoPE. Its length does not count.
        experts: ``[kv_head, expert, column, dim]``, each column of length sigma.
    """
    aligned = einsum(
        query, experts, "kv_head dim, kv_head expert column dim -> kv_head expert column"
    ).sum(dim=-1)
    largest = aligned.abs().amax(dim=-1, keepdim=True)
    return aligned / torch.where(largest > 0, largest, torch.ones_like(largest))


def _group_query(queries: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """Returns the last token's query, averaged over each KV head's group, ``[kv_head, dim]``."""
    last = queries[0, :, -1].to(torch.promote_types(queries.dtype, torch.float32))
    grouped = rearrange(
        last, "(kv_head group) dim -> kv_head group dim", kv_head=spec.kv_heads, group=spec.group
    )
    return grouped.mean(dim=1)


def _combined(experts: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns ``P k`` of keys, or of their features, ``[kv_head, slot, dim]``."""
    wide = experts.to(keys)
    sizes = wide.norm(dim=-1, keepdim=True)
    bases = wide / torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    total = torch.zeros_like(keys)
    for expert, weight in enumerate(weights.to(keys).unbind(dim=1)):
        total = total + weight[:, None, None] * project(bases[:, expert], keys)
    return total
