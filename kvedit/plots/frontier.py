"""frontier: efficacy against collateral, one curve per method, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.plots.grid import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvedit.evals.bootstrap import Mean
    from kvedit.evals.frontier import Point
    from kvedit.evals.report import Report

__all__ = ["frontier"]

_INSIDE = 8  # methods whose legend leaves room for their curves
_MARKS = "osD^vP*X"
_TITLES = {
    "efficacy": "efficacy: share of P(new) > P(old)",
    "kl": "collateral: KL of unrelated answers (nats)",
    "marked": "share of answers with style markers",
    "accuracy": "share of right answers",
    "opening": "log P(the style's opening), nats",
}


def frontier(
    reports: Iterable[Report | Point],
    *,
    gain: str = "efficacy",
    cost: str = "kl",
    title: str = "",
) -> Figure:
    """Returns a picture of what each method gains, and at what cost to everything else.

    One curve per method, its strengths in order, with 95 % intervals both ways. The dashed line
    joins the points that no other one dominates. The scale of the cost is logarithmic; what costs
    nothing, as the unedited memory, has no place on it and stands at the left edge, as "(at 0)".

    Args:
        reports: evaluations, at several strengths of several methods; or points, as
            :meth:`Sweep.points <kvedit.evals.steering.Sweep.points>` gives them, of these metrics.
        gain: metric on the y axis, of which more is better.
        cost: metric on the x axis, of which less is better.
        title: above the picture.

    Raises:
        InvalidArgument: if there is no report, or none has both metrics.
        MissingDependency: without matplotlib.
    """
    from kvedit.evals.frontier import as_points, pareto  # not above: evals load transformers

    every = as_points(reports, gain, cost)
    points = [point for point in every if point.gain.n and point.cost.n]
    if not points:
        raise InvalidArgument(f"none of {len(every)} reports has both {gain!r} and {cost!r}")
    many = len({point.name for point in points}) > _INSIDE
    figure, axes = new_figure(11.0 if many else 8.0, 6.0 if many else 5.0)
    costs = [point.cost.value for point in points if point.cost.value > 0]
    edge = min(costs, default=1.0) / 3
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point.name, []).append(point)
    for index, (name, curve) in enumerate(curves.items()):
        _curve(axes, name, curve, edge, f"C{index % 10}", _MARKS[index % len(_MARKS)])
    front = pareto(points)
    axes.step(
        [max(point.cost.value, edge) for point in front],
        [point.gain.value for point in front],
        where="post", color="0.6", linestyle="--", linewidth=1, zorder=1, label="undominated",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(_TITLES.get(cost, cost))
    axes.set_ylabel(_TITLES.get(gain, gain))
    counts = sorted({point.gain.n for point in points})
    axes.set_title(
        title or f"n = {', '.join(map(str, counts))} cases, 95 % bootstrap intervals",
        fontsize="medium", parse_math=False,
    )  # fmt: skip
    axes.grid(alpha=0.25)
    outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}
    axes.legend(fontsize="small", **outside)
    return figure


def _curve(axes: Axes, name: str, curve: list[Point], edge: float, colour: str, mark: str) -> None:
    # A method without strengths is a point, not a curve.
    ordered = sorted(curve, key=lambda p: -math.inf if p.strength is None else p.strength)
    x = [max(point.cost.value, edge) for point in ordered]
    y = [point.gain.value for point in ordered]
    joined: Any = "-" if all(point.strength is not None for point in ordered) else ""
    axes.errorbar(
        x, y,
        xerr=_spread([point.cost for point in ordered], edge),
        yerr=_spread([point.gain for point in ordered], -math.inf),
        fmt=mark, linestyle=joined, color=colour, label=name, markersize=5, linewidth=1.5,
        elinewidth=0.8, capsize=2, zorder=2,
    )  # fmt: skip
    for point, left, height in zip(ordered, x, y, strict=True):
        strength = "" if point.strength is None else f"{point.strength:g}"
        label = " ".join(filter(None, (strength, "" if point.cost.value > 0 else "(at 0)")))
        if not label:
            continue
        axes.annotate(
            label, (left, height), xytext=(4, -9), color=colour, textcoords="offset points",
            fontsize="x-small",
        )  # fmt: skip


def _spread(means: list[Mean], edge: float) -> list[list[float]]:
    """Returns lengths of error bars below and above; none where there is no interval."""
    below, above = [], []
    for mean in means:
        low = mean.value if mean.low is None else mean.low
        high = mean.value if mean.high is None else mean.high
        at = max(mean.value, edge)
        below.append(max(0.0, at - max(low, edge)))
        above.append(max(0.0, high - at))
    return [below, above]
