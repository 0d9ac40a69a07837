"""Prefix: the keys and values that stand in front of a batch, as tensors that may have a gradient.

A :class:`~kvedit.memory.KVMemory` is data with history, and checked when it is made; a prefix is
what a forward pass needs of one, made anew for every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV, ModelSpec
from kvedit.models.rope import shift

__all__ = ["LayerStates", "Prefix", "join", "padded_bias"]


@dataclass(frozen=True, eq=False)
class LayerStates:
    """One layer's slots. Nothing is checked: they come from a memory.

    Args:
        keys: ``[head, slot, dim]``, post-RoPE.
        values: ``[head, slot, dim]``.
        positions: ``[slot]`` int64. Layers whose slots stand at equal positions share one tensor,
            so that they can share a mask.
        bias: ``[query_head, slot]`` in nats, or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Slots of this layer."""
        return self.keys.shape[1]


@dataclass(frozen=True, eq=False)
class Prefix:
    """What every token of a batch sees before its own sample.

    Args:
        layers: one entry per layer of the model.
        next_position: RoPE position at which each sample begins.
    """

    layers: tuple[LayerStates, ...]
    next_position: int

    @classmethod
    def of(cls, memory: KVMemory, device: torch.device | str | None = None) -> Prefix:
        """Returns a memory as a prefix without gradient.

        Raises:
            InvalidArgument: if layers are missing, or the memory has run-time rules, which act
                on what a session reads and have no gradient here.
        """
        if not memory.complete:
            raise InvalidArgument(
                f"the memory has layers {list(memory.layers)} of {len(memory.model.layers)}: "
                "training needs all of them"
            )
        if memory.rules:
            raise InvalidArgument(
                "the memory has run-time rules, which training does not follow: train first, "
                "apply them to the result"
            )
        places = _shared_positions(memory, device)
        states = (
            LayerStates(
                layer.keys.to(device),
                layer.values.to(device),
                place,
                None if layer.bias is None else layer.bias.to(device),
            )
            for layer, place in zip(memory.layers.values(), places, strict=True)
        )
        return cls(tuple(states), memory.next_position)


def _shared_positions(
    memory: KVMemory, device: torch.device | str | None = None
) -> list[torch.Tensor]:
    """Returns each layer's positions; equal ones are one tensor."""
    different: list[torch.Tensor] = []
    found = []
    for layer in memory.layers.values():
        found.append(_known(layer, different))
    moved = {id(tensor): tensor.to(device) for tensor in different}
    return [moved[id(tensor)] for tensor in found]


def _known(layer: LayerKV, different: list[torch.Tensor]) -> torch.Tensor:
    for other in different:
        if other is layer.positions or torch.equal(other, layer.positions):
            return other
    different.append(layer.positions)
    return layer.positions


def join(parts: Sequence[Prefix], spec: ModelSpec, rotate: bool = True) -> Prefix:
    """Returns prefixes behind each other as one; the gradient goes through.

    Args:
        parts: at least one.
        spec: facts of the model, for its rotations.
        rotate: whether each part moves behind the one before it, keys turned by each layer's
            RoPE. Without it, parts stand where they stood, one over the other.
    """
    if len(parts) == 1:
        return parts[0]
    starts = [sum(part.next_position for part in parts[:n]) for n in range(len(parts))]
    offsets = starts if rotate else [0] * len(parts)
    places: dict[tuple[int, ...], torch.Tensor] = {}
    layers = []
    for index, rows in enumerate(zip(*(part.layers for part in parts), strict=True)):
        rope = spec.layers[index].rope
        key = tuple(id(row.positions) for row in rows)
        if key not in places:
            moved = [row.positions + by for row, by in zip(rows, offsets, strict=True)]
            places[key] = torch.cat(moved)
        keys = [
            shift(row.keys, rope, by) if by else row.keys
            for row, by in zip(rows, offsets, strict=True)
        ]
        layers.append(
            LayerStates(
                torch.cat([key.to(keys[0]) for key in keys], dim=1),
                torch.cat([row.values.to(rows[0].values) for row in rows], dim=1),
                places[key],
                _joined_bias(rows),
            )
        )
    return Prefix(tuple(layers), sum(part.next_position for part in parts))


def _joined_bias(rows: Sequence[LayerStates]) -> torch.Tensor | None:
    known = [row.bias for row in rows if row.bias is not None]
    if not known:
        return None
    heads = known[0].shape[0]
    pieces = [known[0].new_zeros(heads, r.slots) if r.bias is None else r.bias for r in rows]
    return torch.cat(pieces, dim=1)


def padded_bias(states: LayerStates, tokens: int, like: torch.Tensor) -> torch.Tensor | None:
    """Returns the bias ``[1, query_head, slot]`` with zeros for ``tokens`` new ones, or None."""
    if states.bias is None:
        return None
    return pad(states.bias.to(like), (0, tokens))[None]
