"""Matches one layer: budgets and forced slots by chunk, fits, packing, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvedit.editors.matching.budgets import COMPETING, by_mass, by_weights, proportional, slots_of
from kvedit.editors.matching.fitting import HeadFit, fit_block
from kvedit.editors.matching.keys import score
from kvedit.editors.matching.logits import Block, by_group, look
from kvedit.editors.matching.packing import join, pack
from kvedit.editors.matching.queries import QuerySet
from kvedit.editors.matching.report import HeadMatch, measure
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory, LayerKV

if TYPE_CHECKING:
    from kvedit.editors.matching.editor import AttentionMatching

__all__ = ["allocate", "chosen_layers", "match_layer"]

_AT_ONCE = 1 << 25


def chosen_layers(memory: KVMemory, how: AttentionMatching) -> list[int]:
    """Returns the layers to match: those with full attention, or the ones that were named.

    Raises:
        UnsupportedModel: if a named layer sees only a window or a chunk.
        InvalidArgument: if no layer has full attention.
    """
    named = memory.layer_indices(how.layers)
    windowed = [index for index in named if memory.model.layers[index].window is not None]
    if windowed and how.layers is not None:
        kind = memory.model.layers[windowed[0]].kind
        raise UnsupportedModel(
            f"layer {windowed[0]} has {kind} attention: its slots go out of sight one by one, and "
            "packed slots have no place of their own. Such layers are small already; leave them out"
        )
    found = [index for index in named if index not in windowed]
    if not found:
        raise InvalidArgument(
            f"{memory.model.name} has no layer with full attention: windows keep its memory small"
        )
    return found


def allocate(
    memory: KVMemory, how: AttentionMatching, layers: Sequence[int], queries: QuerySet | None
) -> dict[int, list[int]]:
    """Returns how many slots each KV head of each layer keeps.

    Args:
        memory: the memory.
        how: the options.
        layers: layers that are matched.
        queries: needed where heads compete by attention.

    Raises:
        InvalidArgument: if a layer has fewer slots than the budget, or the budget is less than
            what is kept in any case.
    """
    uniform = {i: slots_of(how.budget, memory.layers[i].slots, f"layer {i}") for i in layers}
    forced = how.sinks + how.recent
    for index, count in uniform.items():
        if count < min(forced, memory.layers[index].slots):
            raise InvalidArgument(
                f"layer {index}: a budget of {count} slots is less than the {forced} that sinks "
                "and recent keep"
            )
    heads = {i: memory.model.layers[i].kv_heads for i in layers}
    if how.allocate == "uniform":
        return {i: [count] * heads[i] for i, count in uniform.items()}
    if how.allocate in COMPETING:
        if queries is None:
            raise InvalidArgument(f"allocate={how.allocate!r} needs queries")
        attention = {
            i: _attention(
                memory, i, queries, forced_slots(memory.layers[i], how), COMPETING[how.allocate]
            )
            for i in layers
        }
        return by_mass(attention, uniform, forced)
    given = {layer: row for layer, row in how.allocate if not isinstance(layer, str)}
    slots = {i: memory.layers[i].slots for i in layers}
    return by_weights(given, uniform, slots, heads, forced)


def forced_slots(layer: LayerKV, how: AttentionMatching) -> torch.Tensor:
    """Returns the slots ``[forced]`` that sinks and recent keep, in ascending order."""
    order = layer.positions.argsort(stable=True)
    last = order[max(how.sinks, layer.slots - how.recent) :]
    return torch.cat((order[: how.sinks], last)).sort().values.to(layer.keys.device)


def _attention(
    memory: KVMemory, index: int, queries: QuerySet, forced: torch.Tensor, how: str
) -> torch.Tensor:
    spec = memory.model.layers[index]
    block = Block.of(memory.layers[index], spec)
    grouped = by_group(queries.layers[index][:, queries.fitted].to(block.keys.device), spec)
    rows = grouped.shape[1] * grouped.shape[2] * block.keys.shape[1]
    step = max(1, _AT_ONCE // rows)
    found = [
        score(look(block.of_heads(some), grouped[some]), how)
        for some in (
            list(range(start, min(start + step, spec.kv_heads)))
            for start in range(0, spec.kv_heads, step)
        )
    ]
    scores = torch.cat(found)
    scores[:, forced] = torch.inf  # kept whatever they get
    return scores


def match_layer(
    memory: KVMemory,
    index: int,
    queries: QuerySet,
    counts: Sequence[int],
    how: AttentionMatching,
) -> tuple[LayerKV, list[HeadFit], list[HeadMatch]]:
    """Returns a layer matched for its queries, what each head kept, and how well that does.

    A layer that keeps all it has is returned as it is.
    """
    layer, spec = memory.layers[index], memory.model.layers[index]
    states = queries.layers[index].to(layer.keys.device)
    grouped = by_group(states[:, queries.fitted], spec)
    checked = queries.checked.to(layer.keys.device)
    block, forced = Block.of(layer, spec), forced_slots(layer, how)
    size = how.chunk or layer.slots
    starts = range(0, layer.slots, size)
    shares = _by_chunk(layer.slots, size, counts, forced)
    parts: list[list[tuple[int, HeadFit]]] = [[] for _ in counts]
    for number, start in enumerate(starts):
        inside = forced[(forced >= start) & (forced < start + size)] - start
        wanted = [row[number] for row in shares]
        piece = block.cut(slice(start, start + size))
        seed = how.seed + 7919 * index + number
        fits = fit_block(piece, grouped, checked, wanted, inside, how, seed)
        for head, fit in enumerate(fits):
            parts[head].append((start, fit))
    joined = [join(row) for row in parts]
    folds = how.fold_bias and layer.bias is not None
    if all(len(fit.index) == layer.slots for fit in joined) and not folds:
        packed = layer
    else:
        _check_plain(index, joined, how)
        packed = pack(layer, spec, joined, how.fold_bias)
    held = states[:, queries.held_out]
    return packed, joined, measure(index, layer, packed, spec, held, joined)


def _by_chunk(
    slots: int, size: int, counts: Sequence[int], forced: torch.Tensor
) -> list[list[int]]:
    """Returns how many slots each head keeps in each chunk."""
    sizes = [min(size, slots - start) for start in range(0, slots, size)]
    fixed = torch.bincount(forced.cpu() // size, minlength=len(sizes)).tolist()
    if len(sizes) > 1 and min(counts) < len(forced) + len(sizes):
        raise InvalidArgument(
            f"{len(sizes)} chunks of {size} slots need at least one slot each beside sinks and "
            f"recent; a head's budget is {min(counts)}: raise chunk or the budget"
        )
    low = [min(n, f + (len(sizes) > 1)) for n, f in zip(sizes, fixed, strict=True)]
    return [proportional(count, sizes, low, sizes) for count in counts]


def _check_plain(index: int, fits: Sequence[HeadFit], how: AttentionMatching) -> None:
    kept = {len(fit.index) for fit in fits}
    if how.fold_bias and len(kept) > 1:
        raise InvalidArgument(
            f"layer {index}: fold_bias needs as many slots in every KV head, and evicted slots "
            f"leave {sorted(kept)}: lower the budget to {min(kept)}"
        )
