"""heatmap: a matrix as a picture; and the grid that the other plots are drawn with."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvedit.axes import expect_axes
from kvedit.errors import InvalidArgument, MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Grid", "draw", "draw_bars", "heatmap", "new_figure"]

_MISSING = "0.88"  # light grey: cells without a value
_MOST_TICKS = 64  # labels that fit under a picture of the largest width
_MOST_CHARACTERS = 14  # of one label; longer ones would squeeze the picture
_LOG_DECADES = 4  # below the largest value; what is smaller looks alike
_INCHES_PER_ROW = 0.24


@dataclass(frozen=True, eq=False)
class Grid:
    """A matrix and how to draw it.

    Args:
        values: ``[row, column]`` float; NaN marks a cell without a value, inf one beyond the scale.
        title: above the picture.
        x: what columns are, with the unit.
        y: what rows are, with the unit.
        colour: what values are, with the unit.
        columns: a label per column; None numbers them.
        rows: a label per row; None numbers them.
        log: whether colours follow the logarithm.
        zero: whether the scale of colours begins at zero.
    """

    values: torch.Tensor
    title: str
    x: str
    y: str
    colour: str
    columns: Sequence[str] | None = None
    rows: Sequence[str] | None = None
    log: bool = False
    zero: bool = False

    def __post_init__(self) -> None:
        """Checks shape and labels."""
        object.__setattr__(self, "values", self.values.detach().float().cpu())
        expect_axes("values", self.values, "row column")
        if self.values.numel() == 0:
            raise InvalidArgument(f"there is nothing to draw: values are {list(self.values.shape)}")
        for name, size in zip(("rows", "columns"), self.values.shape, strict=True):
            labels = getattr(self, name)
            if labels is not None and len(labels) != size:
                raise InvalidArgument(f"expected {size} labels of {name}, found {len(labels)}")

    def inches(self) -> tuple[float, float]:
        """Returns a size at which labels can be read."""
        rows, columns = self.values.shape
        width = 7.0 if self.columns is None else min(14.0, max(5.0, 2.5 + 0.22 * columns))
        labels = 0.0 if self.columns is None else 0.7
        return width, min(9.0, max(2.6, 1.3 + labels + _INCHES_PER_ROW * rows))


def heatmap(
    values: torch.Tensor,
    *,
    title: str = "",
    x: str = "column",
    y: str = "row",
    colour: str = "value",
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    log: bool = False,
) -> Figure:
    """Returns a picture of a matrix, with a colour bar.

    Args:
        values: ``[row, column]``; NaN leaves a cell grey.
        title: above the picture.
        x: what columns are, with the unit.
        y: what rows are, with the unit.
        colour: what values are, with the unit.
        columns: a label per column; None numbers them.
        rows: a label per row; None numbers them.
        log: whether colours follow the logarithm.

    Raises:
        ShapeMismatch: if values are no matrix.
        InvalidArgument: if there are no values, or labels don't fit them.
        MissingDependency: without matplotlib.
    """
    grid = Grid(values, title, x, y, colour, columns, rows, log)
    figure, axes = new_figure(*grid.inches())
    draw(axes, grid)
    return figure


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """Returns a figure and its axes, one or an array; sizes are inches.

    No window and no global list of figures: it is a plain object, and notebooks can show it.

    Raises:
        MissingDependency: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib", "plots", "Drawing") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    # Notebooks learn to show figures when pyplot is imported, which nothing here does.
    vars(figure)["_repr_png_"] = lambda: _png(figure)
    return figure, figure.subplots(1, panels)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def draw(axes: Axes, grid: Grid) -> None:
    """Draws a grid into axes, with its colour bar."""
    finite = grid.values[grid.values.isfinite()]
    norm = _scale(finite, grid)
    # Zero has no logarithm; it takes the lowest colour instead of none. An infinite cell would
    # stay empty; twice the largest value is off the scale as well, and has a colour.
    values = grid.values.clamp_min(norm.vmin) if grid.log else grid.values
    values = values.masked_fill(values.isposinf(), 2 * abs(norm.vmax) + 1)
    image = axes.imshow(values.numpy(), aspect="auto", cmap=_colours(), norm=norm)
    axes.set_facecolor(_MISSING)
    axes.set_title(grid.title, fontsize="medium", parse_math=False)
    axes.set_xlabel(grid.x)
    axes.set_ylabel(grid.y)
    _ticks(axes.xaxis, grid.columns, rotation=90, verticalalignment="top")
    _ticks(axes.yaxis, grid.rows)
    if grid.zero and not bool(grid.values.any()):
        axes.text(0.5, 0.5, "no difference", color="white", ha="center", transform=axes.transAxes)
        return
    above = bool(grid.values.isposinf().any())
    bar = axes.figure.colorbar(image, ax=axes, extend="max" if above else "neither", pad=0.02)
    bar.set_label(f"{grid.colour}\n(red: infinite)" if above else grid.colour)
    if grid.log:
        bar.formatter = bar.minorformatter = _plain_numbers()
        bar.update_ticks()


def draw_bars(axes: Axes, grid: Grid) -> None:
    """Draws the first row of a grid as bars; their height is what colours would tell."""
    heights = grid.values[0].numpy()
    axes.bar(range(len(heights)), heights, width=0.8)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    if grid.log:
        axes.set_yscale("log")
    axes.set_title(grid.title, fontsize="medium", parse_math=False)
    axes.set_xlabel(grid.x)
    axes.set_ylabel(grid.colour)
    _ticks(axes.xaxis, grid.columns, rotation=90, verticalalignment="top")


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"].with_extremes(over="crimson")


def _plain_numbers() -> Any:
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """0.5 in place of five times ten to the minus one, where a tick has a label at all."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    # Less than a decade has few powers of ten; then ticks between them are labelled as well.
    return Plain(labelOnlyBase=False)


def _scale(finite: torch.Tensor, grid: Grid) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if grid.log and high > 0:
        positive = float(finite[finite > 0].min())
        # A little below the smallest value: a scale of one value has no width.
        # And a little above the largest: drawing rounds, and what is beyond would look infinite.
        return LogNorm(max(positive, high / 10**_LOG_DECADES) * 0.999, high * 1.001)
    low = min(low, 0.0) if grid.zero else low
    return Normalize(low, high if high > low else low + 1.0)


def _ticks(axis: Any, labels: Sequence[str] | None, **look: Any) -> None:
    if labels is None:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        return
    step = math.ceil(len(labels) / _MOST_TICKS)
    shown = range(0, len(labels), step)
    # Tokens may hold a dollar sign, which would start a formula.
    axis.set_ticks(
        list(shown),
        labels=[_short(labels[index]) for index in shown],
        fontsize=8,
        parse_math=False,
        **look,
    )


def _short(label: str) -> str:
    return label if len(label) <= _MOST_CHARACTERS else f"{label[: _MOST_CHARACTERS - 1]}…"
