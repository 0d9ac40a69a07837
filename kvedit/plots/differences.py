"""comparison: where two memories differ, as one picture per kind of difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvedit.plots.grid import Grid, draw, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvedit.memory import Comparison

__all__ = ["comparison"]


def comparison(found: Comparison, title: str = "") -> Figure:
    """Returns three pictures: differences of keys, of values and of bias, by layer and head.

    Args:
        found: what :func:`kvedit.compare` returned.
        title: above all of them.

    Raises:
        MissingDependency: without matplotlib.
    """
    layers = [str(layer) for layer in found.layers]
    relative = "relative distance\n|a − b| / |a|"
    grids = [
        Grid(found.keys, "Keys", "KV head", "layer", relative, rows=layers, zero=True),
        Grid(found.values, "Values", "KV head", "", relative, rows=layers, zero=True),
        Grid(
            found.bias,
            "Bias",
            "query head",
            "",
            "largest difference\n(nats)",
            rows=layers,
            zero=True,
        ),
    ]
    figure, panels = new_figure(12.0, grids[0].inches()[1], len(grids))
    for axes, grid in zip(panels, grids, strict=True):
        draw(axes, grid)
    if title:
        figure.suptitle(title, fontsize="large", parse_math=False)
    return figure
