"""Packs what each head kept side by side into one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange

from kvedit.editors.matching.fitting import HeadFit
from kvedit.memory import LayerKV, LayerSpec

__all__ = ["join", "pack"]


def join(parts: Sequence[tuple[int, HeadFit]]) -> HeadFit:
    """Returns one head's fits of several chunks as one.

    Args:
        parts: each chunk's first slot, and its fit, in ascending order.
    """
    fits = [fit for _, fit in parts]
    conditions = [fit.condition for fit in fits if fit.condition is not None]
    ridges = [fit.ridge for fit in fits if fit.ridge is not None]
    return HeadFit(
        torch.cat([fit.index + first for first, fit in parts]),
        torch.cat([fit.beta for fit in fits]),
        torch.cat([fit.values for fit in fits]),
        sum(fit.coverage for fit in fits) / len(fits),
        max(conditions, default=None),
        max(ridges, default=None),
        sum(fit.clamped for fit in fits),
    )


def pack(layer: LayerKV, spec: LayerSpec, fits: Sequence[HeadFit], fold_bias: bool) -> LayerKV:
    """Returns the layer with only what its heads kept.

    Slot n holds each head's n-th kept slot. It is no token (source -1); its position is nominal,
    the middle one of those that its heads' keys were rotated at. Layers with full attention see
    every slot, so positions there are for whoever looks. A head that kept fewer slots than
    another ends in slots with a bias of -inf.
    """
    size = max(len(fit.index) for fit in fits)
    keys = layer.keys.new_zeros(len(fits), size, spec.key_dim)
    values = layer.values.new_zeros(len(fits), size, spec.value_dim)
    bias = torch.full((len(fits), spec.group, size), -torch.inf, device=layer.keys.device)
    before = None if layer.bias is None or fold_bias else layer.bias.to(layer.keys.device)
    places = layer.positions.new_full((len(fits), size), int(layer.positions[-1]))
    for head, fit in enumerate(fits):
        kept = slice(0, len(fit.index))
        keys[head, kept] = layer.keys[head, fit.index]
        values[head, kept] = fit.values.to(values)
        bias[head, :, kept] = fit.beta.to(bias)
        if before is not None:
            rows = slice(head * spec.group, (head + 1) * spec.group)
            bias[head, :, kept] += before[rows][:, fit.index]
        places[head, kept] = layer.positions[fit.index.to(layer.positions.device)]
    flat = rearrange(bias, "kv_head group slot -> (kv_head group) slot")
    return LayerKV(
        keys,
        values,
        places.sort(dim=0).values[(len(fits) - 1) // 2].cummax(dim=0).values,
        layer.source.new_full((size,), -1),
        flat.contiguous() if before is not None or bool(flat.any()) else None,
    )
