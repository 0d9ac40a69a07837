"""delta_norms: how long a steering delta's vectors are, by layer and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from kvedit.plots.grid import Grid, draw, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvedit.memory import Delta

__all__ = ["delta_norms"]


def delta_norms(delta: Delta, *, title: str = "") -> Figure:
    """Returns a picture of a delta's L2 norms: a panel per site, a row per layer.

    Keys and values have a column per KV head, streams have one. Colours follow the logarithm, on a
    scale of each panel's own. What is zero, or isn't there, is grey.

    Args:
        delta: the delta.
        title: above the picture.

    Raises:
        MissingDependency: without matplotlib.
    """
    layers = delta.layers
    grids = [_grid(site, vectors, layers) for site, vectors in delta.vectors.items()]
    height = min(9.0, max(2.8, 1.6 + 0.14 * len(layers)))
    figure, axes = new_figure(max(4.0, 3.0 * len(grids)), height, len(grids))
    for one, grid in zip([axes] if len(grids) == 1 else axes, grids, strict=True):
        draw(one, grid)
    figure.suptitle(title or f"Norms of a delta: {delta.model.name}", fontsize="medium")
    return figure


def _grid(site: str, vectors: Mapping[int, torch.Tensor], layers: tuple[int, ...]) -> Grid:
    streams = site in ("residual", "attention")
    lines = {
        layer: torch.linalg.vector_norm(vector.float(), dim=-1).cpu().reshape(-1)
        for layer, vector in vectors.items()
    }
    heads = max(map(len, lines.values()))
    table = torch.full((len(layers), heads), torch.nan)
    for row, layer in enumerate(layers):
        line = lines.get(layer)
        if line is not None:
            table[row, : len(line)] = line.masked_fill(line == 0, torch.nan)
    return Grid(
        table,
        title=site,
        x="stream" if streams else "KV head",
        y="layer",
        colour="L2 norm",
        columns=[""] if streams else None,
        rows=[str(layer) for layer in layers],
        log=bool(table.isfinite().any()),
    )
