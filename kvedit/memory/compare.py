"""compare(a, b): how far two memories are apart, per layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

from kvedit.errors import IncompatibleModel
from kvedit.memory.layer import LayerKV
from kvedit.memory.memory import KVMemory

__all__ = ["Comparison", "align", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Differences over the slots that both memories have, aligned by source and position order.

    Args:
        layers: layer indices, in the order of the rows below.
        keys: ``[layer, head]`` relative distance ``‖a − b‖ / ‖a‖`` of keys.
        values: ``[layer, head]`` likewise for values.
        keys_cosine: ``[layer, head]`` cosine between the keys of a and b, all slots as one vector.
        values_cosine: ``[layer, head]`` likewise for values.
        bias: ``[layer, query_head]`` largest difference of bias; inf where one evicts a slot.
        only_a: slots that only a has, per layer.
        only_b: slots that only b has, per layer.
        moved: slots that both have, at different positions, per layer.
    """

    layers: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    keys_cosine: torch.Tensor
    values_cosine: torch.Tensor
    bias: torch.Tensor
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    moved: tuple[int, ...]

    @property
    def identical(self) -> bool:
        """Whether no slot differs: keys, values, positions, bias. Tokens and rules don't count."""
        distances = (self.keys, self.values, self.bias)
        counts = (*self.only_a, *self.only_b, *self.moved)
        return not any(counts) and not any(bool(distance.any()) for distance in distances)

    def __repr__(self) -> str:
        """One line per layer that differs."""
        lines = ["layer  keys  values  bias  only in a  only in b  moved"]
        for row, layer in enumerate(self.layers):
            worst = [float(part[row].max()) for part in (self.keys, self.values, self.bias)]
            counts = (self.only_a[row], self.only_b[row], self.moved[row])
            if any(worst) or any(counts):
                numbers = "  ".join(f"{value:.3g}" for value in worst)
                lines.append(f"{layer}  {numbers}  {'  '.join(map(str, counts))}")
        return "\n".join(lines) if len(lines) > 1 else "Comparison: no difference"


def compare(a: KVMemory, b: KVMemory) -> Comparison:
    """Returns how ``b`` differs from ``a``, per layer and head.

    Slots are matched by the token that made them; slots without a token by their order.

    Raises:
        IncompatibleModel: if the two come from models of different shape, or share no layer.
    """
    layers = tuple(index for index in a.layers if index in b.layers)
    shapes = [
        [(spec.query_heads, spec.kv_heads, spec.key_dim, spec.value_dim) for spec in m.model.layers]
        for m in (a, b)
    ]
    if not layers:
        raise IncompatibleModel(
            f"the memories have no layer in common: {list(a.layers)} and {list(b.layers)}"
        )
    if shapes[0] != shapes[1]:
        raise IncompatibleModel(
            f"can't compare memories of {a.model.name} and {b.model.name}: layers, heads or dims "
            "differ"
        )
    rows = [_layer_row(a.layers[i], b.layers[i], a.model.layers[i].query_heads) for i in layers]
    distances: dict[str, Any] = {
        name: torch.stack([row[name] for row, _ in rows]) for name in rows[0][0]
    }
    counts: dict[str, Any] = {name: tuple(row[name] for _, row in rows) for name in rows[0][1]}
    return Comparison(layers, **distances, **counts)


def _layer_row(
    a: LayerKV, b: LayerKV, query_heads: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    in_a, in_b = align(a, b)
    keys = [layer.keys[:, index].float().cpu() for layer, index in ((a, in_a), (b, in_b))]
    values = [layer.values[:, index].float().cpu() for layer, index in ((a, in_a), (b, in_b))]
    bias = [
        torch.zeros(query_heads, len(index)) if layer.bias is None else layer.bias[:, index].cpu()
        for layer, index in ((a, in_a), (b, in_b))
    ]
    # Slots that both evict differ by inf - inf; they are equal.
    gap = torch.where(bias[0] == bias[1], torch.zeros(()), (bias[0] - bias[1]).abs())
    worst = gap.amax(dim=1) if gap.shape[1] else torch.zeros(query_heads)
    positions = [layer.positions.cpu()[index] for layer, index in ((a, in_a), (b, in_b))]
    distances = {
        "keys": _distance(*keys),
        "values": _distance(*values),
        "keys_cosine": _cosine(*keys),
        "values_cosine": _cosine(*values),
        "bias": worst,
    }
    counts = {
        "only_a": a.slots - len(in_a),
        "only_b": b.slots - len(in_b),
        "moved": int((positions[0] != positions[1]).sum()),
    }
    return distances, counts


def align(a: LayerKV, b: LayerKV) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which slots of two layers the same token made: their indices, ``[slot]`` each."""
    keys = [_slot_keys(layer) for layer in (a, b)]
    where = {key: slot for slot, key in enumerate(keys[1])}
    pairs = [(slot, where[key]) for slot, key in enumerate(keys[0]) if key in where]
    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def _slot_keys(layer: LayerKV) -> list[tuple[int, int]]:
    # (token, how often it occurred before): duplicated slots stay apart.
    seen: dict[int, int] = {}
    keys = []
    for token in layer.source.tolist():
        keys.append((token, seen.get(token, 0)))
        seen[token] = seen.get(token, 0) + 1
    return keys


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    flat_a, flat_b = (rearrange(x, "head slot dim -> head (slot dim)") for x in (a, b))
    difference: torch.Tensor = (flat_a - flat_b).norm(dim=1)
    size: torch.Tensor = flat_a.norm(dim=1)
    return difference / size.clamp_min(1e-30)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    flat_a, flat_b = (rearrange(x, "head slot dim -> head (slot dim)") for x in (a, b))
    return torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1)
