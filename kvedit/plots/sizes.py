"""norms: how large keys or values are, by layer and head, or by layer and position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.plots.grid import heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvedit.memory import KVMemory, LayerKV

__all__ = ["norms"]


def norms(
    memory: KVMemory,
    kind: Literal["keys", "values"] = "keys",
    by: Literal["head", "position"] = "head",
) -> Figure:
    """Returns a picture of mean L2 norms.

    Args:
        memory: the memory.
        kind: whose norms.
        by: ``"head"`` averages over slots, ``"position"`` over heads, with a column per RoPE
            position; a position at which a layer has no slot stays grey.

    Raises:
        InvalidArgument: if kind or by is something else.
        MissingDependency: without matplotlib.
    """
    if kind not in ("keys", "values") or by not in ("head", "position"):
        raise InvalidArgument(
            f"expected kind 'keys' or 'values' and by 'head' or 'position', found {kind!r}, {by!r}"
        )
    lines = [_line(layer, kind, by, memory.next_position) for layer in memory.layers.values()]
    width = max(map(len, lines))
    table = torch.full((len(lines), width), torch.nan)
    for row, line in enumerate(lines):
        table[row, : len(line)] = line
    every = "slots" if by == "head" else "heads"
    return heatmap(
        table,
        title=f"Norms of {kind}, mean over {every}: {memory.model.name}",
        x="KV head" if by == "head" else "position (tokens)",
        y="layer",
        colour=f"L2 norm of {kind}",
        rows=[str(index) for index in memory.layers],
    )


def _line(layer: LayerKV, kind: str, by: str, positions: int) -> torch.Tensor:
    """Returns one row: a mean norm per head, or per position."""
    states = layer.keys if kind == "keys" else layer.values
    sizes: torch.Tensor = torch.linalg.vector_norm(states.detach().float(), dim=2).cpu()
    if by == "head":
        return sizes.mean(dim=1)
    # Slots may share a position, as merged ones do: then it is their mean.
    sums = torch.zeros(positions).index_add_(0, layer.positions.cpu(), sizes.mean(dim=0))
    counts = torch.bincount(layer.positions.cpu(), minlength=positions)
    return torch.where(counts > 0, sums / counts.clamp_min(1), torch.nan)
