"""Off and on policy: whose memory the reference queries are read over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvedit.editors.base import Reader
from kvedit.editors.matching.budgets import COMPETING
from kvedit.editors.matching.fitting import HeadFit
from kvedit.editors.matching.layers import allocate, chosen_layers, match_layer
from kvedit.editors.matching.queries import (
    QuerySet,
    collect,
    read_passages,
    reference,
)
from kvedit.editors.matching.report import HeadMatch
from kvedit.editors.matching.study import passages, room
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV

if TYPE_CHECKING:
    from kvedit.editors.matching.editor import AttentionMatching

__all__ = ["match_memory"]

_LOGITS = 1 << 29
"""Logits of one layer at most that an on-policy pass may hold at once: 2 GiB in float32."""


def match_memory(
    memory: KVMemory, how: AttentionMatching, *, reader: Reader | None, operand: KVMemory | None
) -> tuple[KVMemory, list[HeadMatch], int]:
    """Returns the matched memory, each head's figures, and held-out queries per query head.

    Off policy, queries are read over the whole memory. On policy (arXiv 2602.16284) layer l's
    queries come from a reading whose layers before l are matched already: in one pass, where each
    layer is matched in the moment at which its queries come by and its attention goes on with what
    was kept; or in a pass for every ``layers_per_pass`` layers.

    Raises:
        InvalidArgument: if a reader is missing, or the budget does not fit.
    """
    layers = chosen_layers(memory, how)
    if how.on_policy and reader is None:
        raise InvalidArgument("AttentionMatching reads with the model: pass reader=")
    queries = None
    if not how.on_policy or how.allocate in COMPETING:
        queries = collect(memory, how, layers, reader=reader, operand=operand)
    counts = allocate(memory, how, layers, queries)
    if how.on_policy and reader is not None:
        texts = passages(memory, reader, how.queries, how.answer_tokens)
        if how.layers_per_pass:
            return _by_passes(memory, how, reader, texts, counts)
        return _OnTheWay(memory, how, counts).run(reader, texts)
    if queries is None:
        raise InvalidArgument("no queries")
    return _matched(memory, how, queries, counts)


def _matched(
    memory: KVMemory, how: AttentionMatching, queries: QuerySet, counts: Mapping[int, list[int]]
) -> tuple[KVMemory, list[HeadMatch], int]:
    changed, figures = {}, []
    for index, row in counts.items():
        changed[index], _, found = match_layer(memory, index, queries, row, how)
        figures += found
    return memory.with_layers(changed), figures, len(queries.held_out)


def _by_passes(
    memory: KVMemory,
    how: AttentionMatching,
    reader: Reader,
    texts: list[torch.Tensor],
    counts: Mapping[int, list[int]],
) -> tuple[KVMemory, list[HeadMatch], int]:
    layers, figures, held = list(counts), [], 0
    current = memory
    for start in range(0, len(layers), how.layers_per_pass):
        some = layers[start : start + how.layers_per_pass]
        queries = reference(memory, how, read_passages(current, reader, texts, some))
        current, found, held = _matched(current, how, queries, {i: counts[i] for i in some})
        figures += found
    return current, figures, held


class _OnTheWay:
    """One pass in which every layer is matched as it is reached.

    Within the pass a layer keeps its number of slots: the values of kept slots are replaced by
    fitted ones, and all other slots get logits of -inf. That is the attention over the packed
    layer, under the layer's own softcap, sinks and masks.
    """

    def __init__(
        self, memory: KVMemory, how: AttentionMatching, counts: Mapping[int, list[int]]
    ) -> None:
        self.memory, self.how, self.counts = memory, how, counts
        self.changed: dict[int, LayerKV] = {}
        self.fits: dict[int, list[HeadFit]] = {}
        self.figures: list[HeadMatch] = []
        self.held = 0
        self._queries: dict[int, torch.Tensor] = {}

    def run(
        self, reader: Reader, texts: list[torch.Tensor]
    ) -> tuple[KVMemory, list[HeadMatch], int]:
        """Returns what :func:`match_memory` does."""
        tokens = torch.cat(texts)[: room(self.memory)]
        self._check_size(len(tokens))
        swaps: dict[str, Any] = {
            "queries": self.see, "values": self.exchange, "scores": self.narrow,
        }  # fmt: skip
        reader.read(self.memory, tokens, (), replace=swaps)
        return self.memory.with_layers(self.changed), self.figures, self.held

    def _check_size(self, tokens: int) -> None:
        slots = self.memory.slots + tokens
        heads = max(spec.query_heads for spec in self.memory.model.layers)
        if heads * tokens * slots > _LOGITS:
            raise InvalidArgument(
                f"one pass of {tokens} tokens over {self.memory.slots} slots holds all logits of a "
                "layer at once, and these are too many: set layers_per_pass (8, say), or read less"
            )

    def see(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Notes a layer's queries ``[1, query_head, token, dim]``."""
        if layer in self.counts:
            self._queries[layer] = queries[0].clone()
        return queries

    def exchange(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Matches the layer, and returns its values with those of kept slots replaced."""
        if layer not in self.counts:
            return values
        queries = reference(self.memory, self.how, {layer: self._queries.pop(layer)})
        found = match_layer(self.memory, layer, queries, self.counts[layer], self.how)
        self.changed[layer], self.fits[layer], figures = found
        self.figures += figures
        self.held = len(queries.held_out)
        for head, fit in enumerate(self.fits[layer]):
            values[0, head, fit.index.to(values.device)] = fit.values.to(values)
        return values

    def narrow(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """Returns logits ``[1, query_head, query, slot]`` as the matched layer gives them."""
        if layer not in self.fits:
            return scores
        held, group = self.memory.layers[layer].slots, self.memory.model.layers[layer].group
        bias = self.memory.layers[layer].bias if self.how.fold_bias else None
        for head, fit in enumerate(self.fits[layer]):
            rows = slice(head * group, (head + 1) * group)
            index = fit.index.to(scores.device)
            kept = scores[0, rows][:, :, index] + fit.beta.to(scores)
            if bias is not None:
                kept = kept - bias[rows].to(scores)[:, None, index]
            scores[0, rows, :, :held] = -torch.inf
            scores[0, rows, :, index] = kept
        return scores
