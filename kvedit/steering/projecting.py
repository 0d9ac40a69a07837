"""output_maps: how each layer's attention heads are turned into what attention returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange

from kvedit.editors.base import Reader
from kvedit.errors import UnsupportedModel
from kvedit.memory import ModelSpec

__all__ = ["output_maps"]


def output_maps(reader: Reader, spec: ModelSpec, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Returns layer to the output projection ``[hidden, query_head, dim]`` float64, from one pass.

    It is found by showing it unit vectors in place of the heads' outputs, so no module of any
    family is named.

    Args:
        reader: the model.
        spec: its facts.
        layers: layers that are wanted.

    Raises:
        UnsupportedModel: if what attention returns is not linear in what its heads give.
    """
    widths = {layer: _width(spec, layer) for layer in layers}
    longest = max(widths.values())
    draw = torch.Generator().manual_seed(0)
    shown: dict[int, torch.Tensor] = {}

    def show(layer: int, outputs: torch.Tensor) -> torch.Tensor:
        if layer not in widths:
            return outputs
        width = widths[layer]
        rows = torch.zeros(longest + 2, width)
        rows[:width] = torch.eye(width)
        rows[longest + 1] = torch.randn(width, generator=draw)
        shown[layer] = rows
        return rows.to(outputs).reshape(outputs.shape)

    tokens = torch.zeros(longest + 2, dtype=torch.int64)
    seen = reader.read(None, tokens, ("attention_output",), {"output": show})["attention_output"]
    maps = {}
    for layer, width in widths.items():
        returned = seen[layer][0].double().cpu()
        offset = returned[longest]
        found = returned[:width] - offset
        expected = shown[layer][longest + 1].double() @ found + offset
        error = (returned[longest + 1] - expected).norm() / expected.norm()
        if float(error) > 0.05:  # of half precision at most
            raise UnsupportedModel(
                f"layer {layer}: what attention returns is not linear in its heads' outputs "
                "(a gate or a norm lies between), so no change of values can be fitted to it"
            )
        heads = spec.layers[layer].query_heads
        maps[layer] = rearrange(
            found, "(query_head dim) hidden -> hidden query_head dim", query_head=heads
        )
    return maps


def _width(spec: ModelSpec, layer: int) -> int:
    return spec.layers[layer].query_heads * spec.layers[layer].value_dim
