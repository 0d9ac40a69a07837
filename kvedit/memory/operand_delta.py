"""How a delta is laid out as an operand, so that stores, digests and tools need not know it.

Slot 0 of a layer holds the key vector before RoPE, at position 0, where both are the same, and the
value vector. Vectors of the residual stream are longer than a head: they fill the slots behind,
head by head, the last one with zeros at its end. Facts say which layers have which vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange

from kvedit.errors import CorruptMemory
from kvedit.memory.lineage import Lineage
from kvedit.memory.memory import KVMemory
from kvedit.memory.operand import make_operand, operand_facts
from kvedit.memory.spec import LayerSpec, ModelSpec

__all__ = ["DELTA", "pack_delta", "unpack_delta"]

DELTA = "delta"
"""The kind of operand."""

_STREAM = ("residual", "attention")


def pack_delta(
    vectors: Mapping[str, Mapping[int, torch.Tensor]],
    model: ModelSpec,
    facts: Mapping[str, Any],
    lineage: Lineage,
) -> KVMemory:
    """Returns vectors, by site and layer, as an operand of kind "delta".

    Args:
        vectors: site to layer to float32 vector.
        model: facts of the model.
        facts: plain data on how they were found.
        lineage: the steps that made them.
    """
    keys, values, hidden = {}, {}, 0
    for layer in sorted({index for layers in vectors.values() for index in layers}):
        spec = model.layers[layer]
        key = vectors.get("keys", {}).get(layer)
        first = torch.zeros(spec.kv_heads, spec.key_dim) if key is None else key
        slots = [first[:, None]]
        for site in _STREAM:
            vector = vectors.get(site, {}).get(layer)
            if vector is not None:
                hidden = vector.shape[0]
                slots.append(_folded(vector, spec))
        keys[layer] = torch.cat(slots, dim=1)
        value = vectors.get("values", {}).get(layer)
        if value is not None:
            rest = torch.zeros(spec.kv_heads, keys[layer].shape[1] - 1, spec.value_dim)
            values[layer] = torch.cat((value[:, None], rest), dim=1)
    sites = {site: sorted(layers) for site, layers in vectors.items()}
    return make_operand(
        DELTA, keys, model, lineage, slot_values=values,
        delta={"sites": sites, "hidden": hidden, "facts": dict(facts)},
    )  # fmt: skip


def unpack_delta(
    operand: KVMemory,
) -> tuple[dict[str, dict[int, torch.Tensor]], dict[str, Any]]:
    """Returns the vectors, by site and layer, and the facts of an operand of kind "delta".

    Raises:
        InvalidArgument: if it is no operand of that kind.
        CorruptMemory: if its facts and its slots do not fit each other.
    """
    found = operand_facts(operand, DELTA)["delta"]
    sites: Mapping[str, list[int]] = found["sites"]
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for site, layers in sites.items():
        for layer in layers:
            held = operand.layers.get(layer)
            if held is None:
                raise CorruptMemory(f"a delta names {site} of layer {layer}, which is missing")
            if site == "keys":
                vector = held.keys[:, 0]
            elif site == "values":
                vector = held.values[:, 0]
            else:
                vector = _stream(operand, sites, site, layer, int(found["hidden"]))
            vectors.setdefault(site, {})[layer] = vector
    return vectors, dict(found["facts"])


def _stream(
    operand: KVMemory, sites: Mapping[str, list[int]], site: str, layer: int, hidden: int
) -> torch.Tensor:
    spec, slots = operand.model.layers[layer], operand.layers[layer].keys
    count = _slots(hidden, spec)
    start = 1
    for other in _STREAM[: _STREAM.index(site)]:
        start += count if layer in sites.get(other, ()) else 0
    if slots.shape[1] < start + count:
        raise CorruptMemory(f"a delta's {site} of layer {layer} is cut short")
    part = slots[:, start : start + count]
    return rearrange(part, "kv_head slot dim -> (slot kv_head dim)")[:hidden]


def _slots(hidden: int, spec: LayerSpec) -> int:
    return -(-hidden // (spec.kv_heads * spec.key_dim))


def _folded(vector: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    count = _slots(vector.shape[0], spec)
    room = count * spec.kv_heads * spec.key_dim
    padded = torch.nn.functional.pad(vector, (0, room - vector.shape[0]))
    return rearrange(
        padded, "(slot kv_head dim) -> kv_head slot dim", slot=count, kv_head=spec.kv_heads
    )
