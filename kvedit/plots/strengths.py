"""strength_map: what steering does in every layer at every strength."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.plots.grid import Grid, draw, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvedit.evals.steering import Sweep

__all__ = ["strength_map"]

_NUMBERS = 12  # rows and columns up to which cells have their numbers written in
_TITLES = {
    "marked": "share of answers with markers",
    "opening": "log P(opening), nats",
    "accuracy": "share of right answers",
    "length": "tokens",
    "repeat": "longest repeat, share of the answer",
    "kl": "KL on unrelated prompts, nats",
    "flipped": "share of unrelated tokens flipped",
}
_LOG = ("kl",)


def strength_map(
    found: Sweep, metrics: tuple[str, ...] = ("marked", "kl"), *, title: str = ""
) -> Figure:
    """Returns a picture of a sweep: a row per layer, a column per strength, a panel per metric.

    KL has colours by its logarithm. Cells hold their numbers where there are few.

    Args:
        found: the sweep.
        metrics: what is drawn, beside each other.
        title: above the picture.

    Raises:
        InvalidArgument: if there is no metric.
        UnknownName: if there is no such metric.
        MissingDependency: without matplotlib.
    """
    if not metrics:
        raise InvalidArgument("expected a metric at least")
    grids = [_grid(found, metric) for metric in metrics]
    rows, columns = grids[0].values.shape
    width = max(3.6, 2.2 + 0.5 * columns)
    height = min(11.0, max(2.8, 1.6 + 0.3 * rows))
    figure, axes = new_figure(width * len(grids), height, len(grids))
    for one, grid in zip([axes] if len(grids) == 1 else axes, grids, strict=True):
        draw(one, grid)
        one.tick_params(axis="x", labelrotation=0)  # strengths are short
        if max(rows, columns) <= _NUMBERS:
            _write(one, grid)
    figure.suptitle(title or f"n = {found.report.n} questions", fontsize="medium")
    return figure


def _grid(found: Sweep, metric: str) -> Grid:
    values = found.grid(metric)
    return Grid(
        values,
        title=metric,
        x="strength",
        y="layer",
        colour=_TITLES.get(metric, metric),
        columns=[f"{strength:g}" for strength in found.strengths],
        rows=[str(layer) for layer in found.layers],
        log=metric in _LOG and bool((values > 0).any()),
    )


def _write(axes: Axes, grid: Grid) -> None:
    image: Any = axes.images[0]
    for row, line in enumerate(grid.values):
        for column, value in enumerate(line.tolist()):
            if not torch.isfinite(line[column]):
                continue
            # Light letters on dark cells, dark ones on light cells.
            shade = sum(image.cmap(image.norm(max(value, image.norm.vmin)))[:3]) / 3
            axes.text(
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=7,
                color="white" if shade < 0.55 else "black",
            )  # fmt: skip
