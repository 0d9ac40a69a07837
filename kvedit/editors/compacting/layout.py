"""How slots that differ by head are held: masked or packed. Both give the same attention.

Masked, a layer holds the union of its heads' slots, and a bias of -inf where a head lacks one:
exact, reversible, and spans still resolve. Packed, each head's own slots stand side by side: the
i-th slot of two heads is of two tokens, so ``source`` is -1 and the layer's positions are nominal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV

__all__ = ["Laid", "Layout", "lay_out"]

Layout = Literal["masked", "packed"]


@dataclass(frozen=True, eq=False)
class Laid:
    """A layer after selection, and where its keys really stand.

    Args:
        layer: the layer.
        at: int64 ``[slot]``, or ``[head, slot]`` where heads hold slots of different tokens:
            positions at which keys are rotated.
    """

    layer: LayerKV
    at: torch.Tensor


def lay_out(memory: KVMemory, index: int, kept: torch.Tensor, layout: Layout) -> Laid:
    """Returns a layer with the kept slots.

    Args:
        memory: the memory.
        index: of the layer.
        kept: bool ``[kv_head, slot]``.
        layout: how heads that keep different slots are held; if all keep the same, both are one.

    Raises:
        InvalidArgument: if the layer can't be packed.
    """
    layer = memory.layers[index]
    if bool((kept == kept[:1]).all()):
        alone = layer.select(kept[0])
        return Laid(alone, alone.positions)
    if layout == "packed":
        _check_packable(memory, index, kept)
        return _packed(layer, kept, memory.model.layers[index].group)
    return _masked(layer, kept, memory.model.layers[index].group)


def _masked(layer: LayerKV, kept: torch.Tensor, group: int) -> Laid:
    union = kept.any(dim=0)
    held = layer.select(union)
    lacking = repeat(~kept[:, union], "head slot -> (head group) slot", group=group)
    bias = torch.zeros(lacking.shape, device=lacking.device).masked_fill(lacking, -torch.inf)
    return Laid(held.add_bias(bias), held.positions)


def _packed(layer: LayerKV, kept: torch.Tensor, group: int) -> Laid:
    count = int(kept[0].sum())
    slots = kept.nonzero()[:, 1].reshape(layer.heads, count)
    at = layer.positions.to(slots.device)[slots]
    bias = None
    if layer.bias is not None:
        wide = repeat(slots, "head slot -> (head group) slot", group=group)
        bias = layer.bias.gather(1, wide.to(layer.bias.device))
        bias = bias if bool(bias.any()) else None
    held = LayerKV(
        keys=torch.take_along_dim(layer.keys, slots[:, :, None], dim=1),
        values=torch.take_along_dim(layer.values, slots[:, :, None], dim=1),
        positions=_nominal(at).to(layer.positions.device),
        source=torch.full((count,), -1, device=layer.source.device),
        bias=bias,
    )
    return Laid(held, at)


def _nominal(at: torch.Tensor) -> torch.Tensor:
    """Returns for each slot the last of its heads' positions ``[head, slot]``.

    Full layers read them for nothing but causality, which any position of the past satisfies.
    """
    return at.amax(dim=0)


def _check_packable(memory: KVMemory, index: int, kept: torch.Tensor) -> None:
    counts = kept.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise InvalidArgument(
            f"layer {index}: its KV heads keep {counts} slots, and packed slots need equal "
            "counts: take layout='masked', or a budget that is one for all heads"
        )
    if memory.model.layers[index].window is not None:
        raise InvalidArgument(
            f"layer {index} attends within a window of positions, and a packed slot has another "
            "position in every head: take layout='masked' or heads='shared', or leave it alone"
        )
    if memory.rules:
        raise InvalidArgument(
            "this memory has run-time rules that name tokens, and packed slots are of no token: "
            "take layout='masked'"
        )
