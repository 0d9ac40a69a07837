"""table: a report in lines, a memory each, teacher-forced and free-running columns side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvedit.errors import UnknownName
from kvedit.evals.bootstrap import Mean

if TYPE_CHECKING:
    from kvedit.evals.recall.report import RecallReport

__all__ = ["table"]

_TELLING = (
    "kl",
    "agreement",
    "nll_gold",
    "choice",
    "em",
    "f1",
    "contains",
    "chrf",
    "choice_free",
    "overlap",
    "generation_gap",
    "choice_gap",
)


def table(report: RecallReport, metrics: Sequence[str] | None, markdown: bool) -> str:
    """Returns a report's table; :meth:`RecallReport.table` has the arguments.

    Raises:
        UnknownName: if there is no such metric.
    """
    columns = [m for m in _TELLING if m in report.metrics] if metrics is None else list(metrics)
    for metric in columns:
        if metric not in report.metrics:
            raise UnknownName("metric", metric, report.metrics)
    rows = [("memory", "tokens", "slots", "kept", "MB", "ratio", *columns)]
    for name in report.names:
        means = [_cell(report.mean(name, metric), report.n) for metric in columns]
        rows.append((name, *_size(report, name), *means))
    if markdown:
        rules = ["---", *["--:"] * (len(rows[0]) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _size(report: RecallReport, name: str) -> tuple[str, ...]:
    size = report.sizes[name]
    counts = f"{size.tokens:g}", f"{size.slots:g}", f"{size.kept:.4g}"
    ratio = "-" if size.ratio is None else f"{size.ratio:.3g}x"
    return (*counts, f"{size.nbytes / 1e6:.4g}", ratio)


def _cell(mean: Mean, n: int) -> str:
    if not mean.n:
        return "-"
    spread = "" if mean.low is None else f" [{mean.low:.3g}, {mean.high:.3g}]"
    few = "" if mean.n == n else f" (n={mean.n})"
    return f"{mean.value:.3g}{spread}{few}"
