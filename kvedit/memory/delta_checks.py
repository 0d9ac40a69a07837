"""Checks of a delta's vectors, and of the layers and heads that a part of it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName
from kvedit.memory.digest import canonical_json
from kvedit.memory.heads import HeadSet
from kvedit.memory.spec import ModelSpec

__all__ = [
    "SITES",
    "Vectors",
    "finite_number",
    "frozen_vectors",
    "head_masks",
    "layer_indices",
    "part_of",
    "plain_facts",
]

SITES: Mapping[str, str] = MappingProxyType(
    {
        "keys": "[kv_head, dim] before RoPE, as the memory holds them after it",
        "values": "[kv_head, dim]",
        "residual": "[hidden] what a layer's block hands on",
        "attention": "[hidden] what a layer's attention adds to the residual stream",
    }
)
"""Sites of a delta, with the axes of their vectors; float32."""

Vectors = Mapping[str, Mapping[int, torch.Tensor]]
"""Site to layer to vector."""


def frozen_vectors(given: Vectors, model: ModelSpec) -> Vectors:
    """Returns vectors in the order of sites and layers, float32 copies on the CPU, read-only.

    Raises:
        UnknownName: if a site or layer does not exist.
        ShapeMismatch: if a vector does not fit the model.
        InvalidArgument: if there is no vector, or one is not finite.
    """
    unknown = sorted(set(given) - set(SITES))
    if unknown:
        raise UnknownName("site of a delta", unknown[0], SITES)
    # Copies: a tensor that its owner goes on writing to must not change the delta.
    kept = {
        site: MappingProxyType(
            {
                i: given[site][i].detach().to("cpu", torch.float32).clone().contiguous()
                for i in sorted(given[site])
            }
        )
        for site in SITES
        if given.get(site)
    }
    if not kept:
        raise InvalidArgument("a delta needs a vector at least")
    _check(kept, model)
    return MappingProxyType(kept)


def _check(vectors: Vectors, model: ModelSpec) -> None:
    widths = [v.shape for s in ("residual", "attention") for v in vectors.get(s, {}).values()]
    for site, layers in vectors.items():
        for layer, vector in layers.items():
            if not 0 <= layer < len(model.layers):
                raise UnknownName("layer", str(layer), map(str, range(len(model.layers))))
            wanted = _shape(model, site, layer, widths)
            if tuple(vector.shape) != wanted:
                raise ShapeMismatch(
                    f"{site} of layer {layer}: expected shape {list(wanted)}, found "
                    f"{list(vector.shape)}"
                )
            if not bool(vector.isfinite().all()):
                raise InvalidArgument(f"{site} of layer {layer} holds NaN or infinity")


def _shape(model: ModelSpec, site: str, layer: int, widths: list[torch.Size]) -> tuple[int, ...]:
    facts = model.layers[layer]
    if site == "keys":
        return facts.kv_heads, facts.key_dim
    if site == "values":
        return facts.kv_heads, facts.value_dim
    return (widths[0][-1] if widths[0] else 1,)


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns facts as a store gives them back: tuples are lists, keys are text.

    Raises:
        InvalidArgument: if they are no plain data.
    """
    try:
        return dict(json.loads(canonical_json(dict(facts))))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"facts of a delta must be plain data: {error}") from error


def part_of(
    vectors: Vectors,
    sites: Iterable[str],
    layers: Iterable[int],
    masks: Mapping[int, torch.Tensor] | None,
) -> dict[str, dict[int, torch.Tensor]]:
    """Returns the vectors of some sites and layers.

    Args:
        vectors: what to take from.
        sites: sites to keep.
        layers: layers to keep.
        masks: layer to ``[kv_head]``, which keys and values are multiplied with; they are left out
            of layers that have none. None keeps all heads.
    """
    kept = set(layers)
    found: dict[str, dict[int, torch.Tensor]] = {}
    for site in sites:
        for layer, vector in vectors.get(site, {}).items():
            by_head = masks is not None and site in ("keys", "values")
            if layer not in kept or (by_head and layer not in (masks or {})):
                continue
            part = vector * masks[layer][:, None] if masks is not None and by_head else vector
            found.setdefault(site, {})[layer] = part
    return found


def finite_number(name: str, value: Any) -> float:
    """Returns a number, or raises InvalidArgument if it is none, or not finite."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not -float("inf") < value < float("inf"):
        raise InvalidArgument(f"{name}: expected a finite number, found {value!r}")
    return float(value)


def layer_indices(layers: Iterable[int], total: int) -> tuple[int, ...]:
    """Returns layer numbers in order, each once; negative ones count from the end.

    Raises:
        UnknownName: if the model lacks one.
    """
    found = [index + total if index < 0 else index for index in layers]
    for index in found:
        if not 0 <= index < total:
            raise UnknownName("layer", str(index), map(str, range(total)))
    return tuple(sorted(set(found)))


def head_masks(heads: HeadSet, model: ModelSpec) -> dict[int, torch.Tensor]:
    """Returns layer to ``[kv_head]``, 1 for heads of the set and 0 for others.

    Raises:
        InvalidArgument: if they are query heads, or the model lacks one.
    """
    if heads.kind != "kv":
        raise InvalidArgument(
            "keys and values belong to KV heads, found query heads: HeadSet.to_kv(spec) gives "
            "those whose groups hold them"
        )
    heads.check(model)
    masks = {}
    for layer, numbers in heads.heads:
        masks[layer] = torch.zeros(model.layers[layer].kv_heads)
        masks[layer][list(numbers)] = 1.0
    return masks
