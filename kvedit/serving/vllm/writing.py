"""Writing: slots into the engine's pages, through the function that its own layers use.

How keys and values lie in a page is the attention backend's own business, and differs between
backends and instruction sets. So no page is ever indexed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.serving.vllm.loading import Loaded

__all__ = ["layer_order", "write"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_order(names: Sequence[str]) -> list[str]:
    """Returns the names of attention layers in the order of the model's layers.

    Raises:
        InvalidArgument: if a name has no number, or the numbers are not 0 to n - 1.
    """
    numbers = {name: _NUMBER.findall(name) for name in names}
    unclear = [name for name, found in numbers.items() if len(found) != 1]
    if unclear or sorted(int(found[0]) for found in numbers.values()) != list(range(len(names))):
        raise InvalidArgument(
            f"can't tell which layer is which by their names: {', '.join(sorted(names)[:4])}, …"
        )
    return sorted(names, key=lambda name: int(numbers[name][0]))


def write(
    layers: Mapping[str, Any],
    order: Sequence[str],
    memory: Loaded,
    start: int,
    places: torch.Tensor,
) -> None:
    """Writes the slots of a memory, from ``start`` on, into pages.

    Everything is checked before the first layer is written.

    Args:
        layers: the engine's attention layers by name.
        order: their names in the order of the model's layers.
        memory: what to write.
        start: first slot to write.
        places: ``[slot]`` int64, where each of them goes: page times page size, plus offset.

    Raises:
        InvalidArgument: if the memory has other layers or shapes than the engine.
    """
    if len(order) != len(memory.keys) or memory.slots - start != len(places):
        raise InvalidArgument(
            f"the memory has {len(memory.keys)} layers and {memory.slots - start} slots to write; "
            f"the engine has {len(order)} layers and {len(places)} places"
        )
    parts = list(zip(order, memory.keys, memory.values, strict=True))
    for name, key, value in parts:
        _check_shape(layers[name], name, key, value)
    for name, key, value in parts:
        layer = layers[name]
        device = layer.kv_cache.device
        layer.impl.do_kv_cache_update(
            layer, key[start:].to(device), value[start:].to(device), layer.kv_cache,
            places.to(device),
        )  # fmt: skip


def _check_shape(layer: Any, name: str, key: torch.Tensor, value: torch.Tensor) -> None:
    expected = (layer.num_kv_heads, layer.head_size)
    if not tuple(key.shape[1:]) == tuple(value.shape[1:]) == expected:
        raise InvalidArgument(
            f"{name} has {expected[0]} KV heads of {expected[1]} dims, the memory "
            f"{tuple(key.shape[1:])} and {tuple(value.shape[1:])}"
        )
