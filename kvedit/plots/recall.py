"""recall_curves: what memories recall against how much smaller they are, a curve per method."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.plots.grid import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvedit.evals.bootstrap import Mean
    from kvedit.evals.recall import RecallReport

__all__ = ["recall_curves"]

_MARKS = "osD^vP*X"
_ASIDE = 1.02  # of the ratio
_SHARES = ("agreement", "gold_top1", "choice", "choice_norm", "em", "f1", "contains")
_FREE = ("choice_free", "same", "overlap")


def recall_curves(
    report: RecallReport,
    metrics: Sequence[str] = ("kl", "f1"),
    *,
    methods: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Returns a picture of metrics against the compression ratio, with 95 % intervals.

    A panel per metric, the same methods in the same colours. The ratio's scale is logarithmic;
    points of one ratio are drawn up to some per cent beside each other.
    The full context and what has no size, such as no context at all, are lines across, since they
    stand at no ratio of their own; their intervals are shaded.

    Args:
        report: a report.
        metrics: names of its metrics.
        methods: method to the names of its memories; None takes what stands before the last ``@``
            of a name, as in ``"truncate@8"``, so that a name without one is a method by itself.
        title: above the picture.

    Raises:
        InvalidArgument: if there is no metric, or no memory with a ratio.
        UnknownName: if the report lacks a metric or a memory.
        MissingDependency: without matplotlib.
    """
    if not metrics:
        raise InvalidArgument("expected a metric at least")
    for metric in metrics:
        if metric not in report.metrics:
            raise UnknownName("metric", metric, report.metrics)
    level, curves = _sorted_out(report, methods)
    if not curves:
        raise InvalidArgument(f"none of {list(report.names)} has a compression ratio")
    figure, found = new_figure(5.2 * len(metrics) + 1.6, 4.4, len(metrics))
    panels = [found] if len(metrics) == 1 else list(found)
    for axes, metric in zip(panels, metrics, strict=True):
        _panel(axes, report, metric, level, curves)
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(
        title or f"n = {report.n} questions, 95 % bootstrap intervals",
        fontsize="medium",
        parse_math=False,
    )
    return figure


def _sorted_out(
    report: RecallReport, methods: Mapping[str, Sequence[str]] | None
) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the memories that are lines across, and each method's in the order of their ratio."""
    given = methods if methods is not None else _by_name(report)
    for name in (name for names in given.values() for name in names):
        if name not in report.sizes:
            raise UnknownName("memory in this report", name, report.sizes)
    level = [n for n in report.names if n == "full" or report.sizes[n].ratio is None]
    curves = {
        method: sorted(
            (name for name in names if name not in level),
            key=lambda name: report.sizes[name].ratio or 0.0,
        )
        for method, names in given.items()
    }
    return level, {method: names for method, names in curves.items() if names}


def _by_name(report: RecallReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in report.names:
        found.setdefault(name.rpartition("@")[0] or name, []).append(name)
    return found


def _panel(
    axes: Axes, report: RecallReport, metric: str, level: list[str], curves: dict[str, list[str]]
) -> None:
    from kvedit.evals.recall import METRICS  # not above: evals load transformers

    for index, name in enumerate(level):
        mean = report.mean(name, metric)
        if not mean.n:
            continue
        shade, dash = str(0.25 + 0.3 * (index % 2)), ("--", ":")[index % 2]
        axes.axhline(mean.value, color=shade, linestyle=dash, linewidth=1.2, label=name)
        if mean.low is not None and mean.high is not None:
            axes.axhspan(mean.low, mean.high, color=shade, alpha=0.1, linewidth=0)
    for index, (method, names) in enumerate(curves.items()):
        points = [(report.sizes[n].ratio, report.mean(n, metric)) for n in names]
        # Methods at the same ratio stand side by side, or their intervals would hide each other.
        aside = _ASIDE ** (index - (len(curves) - 1) / 2)
        known = [((ratio or 1) * aside, mean) for ratio, mean in points if mean.n]
        if known:
            _curve(axes, method, known, f"C{index % 10}", _MARKS[index % len(_MARKS)])
    axes.set_xscale("log")
    _label_ratios(axes, sorted({report.sizes[n].ratio or 1 for ns in curves.values() for n in ns}))
    axes.set_xlabel("compression ratio (full context / memory, kept slots)")
    axes.set_ylabel(textwrap.fill(METRICS[metric], 44), fontsize="small")
    if metric in (*_SHARES, *_FREE):
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(metric, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.25)


def _curve(axes: Axes, method: str, points: list[Any], colour: str, mark: str) -> None:
    means: list[Mean] = [mean for _, mean in points]
    below = [0.0 if m.low is None else max(0.0, m.value - m.low) for m in means]
    above = [0.0 if m.high is None else max(0.0, m.high - m.value) for m in means]
    axes.errorbar(
        [ratio for ratio, _ in points], [m.value for m in means], yerr=[below, above],
        fmt=mark, linestyle="-" if len(points) > 1 else "", color=colour, label=method,
        markersize=5, linewidth=1.5, elinewidth=0.8, capsize=2,
    )  # fmt: skip


def _label_ratios(axes: Axes, ratios: list[float]) -> None:
    # Ticks at round powers say little between 2x and 50x: the ratios themselves are the ticks.
    ticks: list[float] = []
    for ratio in ratios:
        if not ticks or ratio / ticks[-1] > 1.2:
            ticks.append(ratio)
    axes.set_xticks(ticks, [f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x" for ratio in ticks])
    axes.minorticks_off()
    axes.set_xlim(ratios[0] / 1.15, ratios[-1] * 1.15)
