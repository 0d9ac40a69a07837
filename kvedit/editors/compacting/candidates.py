"""Candidates: the slots of one layer that a head may keep, those it must, and how many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange

from kvedit.memory import KVMemory, LayerKV, LayerSpec

__all__ = ["Candidates", "alive_slots", "fixed_slots", "reachable", "slot_order", "top_slots"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """What one layer has to choose from; the head axis is 1 where heads choose together.

    Args:
        alive: bool ``[head, slot]``, slots that the head still has.
        fixed: bool ``[head, slot]``, slots that it keeps whatever their score.
        counts: int64 ``[head]``, how many it keeps in all.
    """

    alive: torch.Tensor
    fixed: torch.Tensor
    counts: torch.Tensor

    @property
    def full(self) -> bool:
        """Whether every head keeps all that it has."""
        return bool((self.counts >= self.alive.sum(dim=1)).all())


def alive_slots(memory: KVMemory, index: int) -> torch.Tensor:
    """Returns the slots that a later token can read, bool ``[kv_head, slot]``.

    A slot is gone for a KV head if all of its query heads have a bias of -inf on it, and for a
    layer with a window if it lies before the window of the next token.
    """
    layer, spec = memory.layers[index], memory.model.layers[index]
    alive = reachable(layer.positions, spec, memory.next_position).expand(layer.heads, -1)
    if layer.bias is None:
        return alive.to(layer.keys.device)
    held = rearrange(
        layer.bias > -torch.inf, "(head group) slot -> head group slot", group=spec.group
    ).any(dim=1)
    return (alive.to(held.device) & held).to(layer.keys.device)


def reachable(positions: torch.Tensor, spec: LayerSpec, next_position: int) -> torch.Tensor:
    """Returns which slots the token at ``next_position`` can see in this layer, bool ``[slot]``."""
    if spec.window is None:
        return torch.ones_like(positions, dtype=torch.bool)
    if spec.kind == "chunked":
        return positions >= next_position // spec.window * spec.window
    return positions > next_position - spec.window


def slot_order(layer: LayerKV) -> torch.Tensor:
    """Returns each slot's place when slots are sorted by position, int64 ``[slot]``.

    Slots at one position keep the order in which they are stored.
    """
    order: torch.Tensor = layer.positions.argsort(stable=True)
    return order.argsort().to(layer.keys.device)


def fixed_slots(alive: torch.Tensor, order: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
    """Returns each head's first ``sinks`` and last ``recent`` slots, bool ``[head, slot]``.

    Args:
        alive: bool ``[head, slot]``; slots that a head lacks are not counted.
        order: int64 ``[slot]``, see :func:`slot_order`.
        sinks: first slots to keep.
        recent: last slots to keep.
    """
    nth = alive[:, order.argsort()].to(torch.int64).cumsum(dim=1)
    total = nth[:, -1:] if nth.shape[1] else nth
    return alive & ((nth <= sinks) | (nth > total - recent))[:, order]


def top_slots(scores: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """Returns the slots with the highest scores, head by head; among equals, earlier ones.

    Args:
        scores: ``[head, slot]``, finite where a slot is alive.
        candidates: of the layer.

    Returns:
        Bool ``[head, slot]``.
    """
    ranked = scores.masked_fill(~candidates.alive, -torch.inf)
    ranked = ranked.masked_fill(candidates.fixed, torch.inf)
    place = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (place < candidates.counts[:, None]) & candidates.alive
