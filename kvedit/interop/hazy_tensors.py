"""The tensors of a cartridge by the names that HazyResearch/cartridges gives them, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange

from kvedit.axes import BATCHED_TO_MEMORY, MEMORY_TO_BATCHED
from kvedit.errors import InvalidArgument, ShapeMismatch
from kvedit.interop.prefix import Prefix, check_frozen
from kvedit.memory import ModelSpec

__all__ = ["listed", "named", "to_prefix"]

_NAMES = {f"{part}_{kind}" for part in ("trainable", "frozen") for kind in ("keys", "values")}


def named(prefix: Prefix) -> dict[str, torch.Tensor]:
    """Returns tensors ``[1, head, slot, dim]`` by name: ``trainable_keys.0`` and so on."""
    found = {}
    for kind, layers in (("keys", prefix.keys), ("values", prefix.values)):
        for index, layer in enumerate(layers):
            states = rearrange(layer, MEMORY_TO_BATCHED)
            if prefix.frozen:
                found[f"frozen_{kind}.{index}"] = states[:, :, : prefix.frozen]
            found[f"trainable_{kind}.{index}"] = states[:, :, prefix.frozen :]
    return found


def listed(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, list[torch.Tensor]]:
    """Returns lists of tensors by name, one per layer, from names like ``trainable_keys.0``.

    Raises:
        InvalidArgument: if a name is none of these, or a layer is missing.
    """
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, index = key.partition(".")
        if not (index.isascii() and index.isdecimal()):
            raise InvalidArgument(f"{where}: {key!r} is no tensor of a cartridge")
        found.setdefault(name, {})[int(index)] = tensor
    for name, layers in found.items():
        if set(layers) != set(range(len(layers))):
            raise InvalidArgument(f"{where}: {name} lacks layers; found {sorted(layers)[:8]}")
    return {name: [layers[i] for i in sorted(layers)] for name, layers in found.items()}


def _ours(name: str) -> str:
    # Tokasaurus calls frozen slots fixed.
    return name.replace("fixed_", "frozen_", 1) if name.startswith("fixed_") else name


def to_prefix(found: Mapping[str, Sequence[torch.Tensor]], spec: ModelSpec, where: str) -> Prefix:
    """Returns the plain keys and values that lists of tensors by name make.

    Args:
        found: name to one tensor ``[1, head, slot, dim]`` per layer; an empty list for none.
        spec: facts of the model.
        where: the file, for messages.

    Raises:
        InvalidArgument: if these are no tensors of a cartridge.
        ShapeMismatch: if they do not fit the model.
    """
    lists = {_ours(name): tensors for name, tensors in found.items()}
    if not set(lists) <= _NAMES or not (lists.get("trainable_keys") or lists.get("frozen_keys")):
        raise InvalidArgument(
            f"{where} is no cartridge: expected {sorted(_NAMES)}, found {sorted(lists)[:6]}"
        )
    for name, tensors in lists.items():
        if tensors and len(tensors) != len(spec.layers):
            raise ShapeMismatch(
                f"{where}: {name} has {len(tensors)} layers, {spec.name} has {len(spec.layers)}: "
                "it was made for another model"
            )
        for index, tensor in enumerate(tensors):
            _check(tensor, spec, index, f"{where}, {name}[{index}]")
    frozen = lists.get("frozen_keys") or []
    # size(2), the slots: size(1) would be the KV heads.
    count = frozen[0].size(2) if frozen else 0
    keys, values = (_joined(lists, kind, len(spec.layers), where) for kind in ("keys", "values"))
    check_frozen(count, keys[0].shape[1])
    return Prefix(keys, values, frozen=count)


def _check(tensor: torch.Tensor, spec: ModelSpec, index: int, where: str) -> None:
    layer = spec.layers[index]
    wanted = (1, layer.kv_heads, layer.key_dim)
    if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != wanted:
        raise ShapeMismatch(
            f"{where} has shape {list(tensor.shape)}; layer {index} of {spec.name} needs "
            f"[1, {layer.kv_heads}, slots, {layer.key_dim}]: it was made for another model"
        )


def _joined(
    lists: Mapping[str, Sequence[torch.Tensor]], kind: str, layers: int, where: str
) -> tuple[torch.Tensor, ...]:
    """Returns frozen slots, then trainable ones, per layer."""
    parts: list[Any] = [lists.get(f"{part}_{kind}") or [] for part in ("frozen", "trainable")]
    found = []
    for index in range(layers):
        pieces = [part[index] for part in parts if part]
        if not pieces or len({piece.dtype for piece in pieces}) != 1:
            raise InvalidArgument(f"{where}: frozen and trainable {kind} do not fit together")
        found.append(rearrange(torch.cat(pieces, dim=2), BATCHED_TO_MEMORY))
    return tuple(found)
