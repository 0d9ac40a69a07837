"""StyleReport: what each method does to style, answers and bystanders, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvedit.errors import UnknownName
from kvedit.evals.answering import TaskResult
from kvedit.evals.bootstrap import Difference, Mean, mean, paired_difference
from kvedit.evals.frontier import Point
from kvedit.evals.steering.markers import Markers
from kvedit.evals.steering.scores import METRICS, SHARES

__all__ = ["StyleReport", "StyleRow"]

_TELLING = ("marked", "opening", "accuracy", "length", "distinct_2", "repeat", "kl", "flipped")


@dataclass(frozen=True)
class StyleRow:
    """One method.

    Args:
        strength: its strength; None if it has none.
        answers: one result per question.
        moved: one per bystander: ``kl`` and ``flipped``, and no answer.
    """

    strength: float | None
    answers: tuple[TaskResult, ...]
    moved: tuple[TaskResult, ...]


@dataclass(frozen=True)
class StyleReport:
    """Style, correctness, length, repetition and drift, method by method.

    Args:
        rows: method to its results.
        markers: what told the style.
        baseline: the method that others are compared with.
        seed: seed of the bootstrap.
    """

    rows: Mapping[str, StyleRow]
    markers: Markers
    baseline: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that the baseline is there."""
        if self.baseline not in self.rows:
            raise UnknownName("baseline among methods", self.baseline, self.rows)

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.rows[self.baseline].answers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, in their order."""
        return tuple(self.rows)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that some answer has, in the order of :data:`~scores.METRICS`."""
        every = (r for row in self.rows.values() for r in (*row.answers, *row.moved))
        there = {name for result in every for name, _ in result.scores}
        return tuple(name for name in METRICS if name in there)

    def of(self, name: str) -> StyleRow:
        """Returns a method's results.

        Raises:
            UnknownName: if there is no such method.
        """
        if name not in self.rows:
            raise UnknownName("method in this report", name, self.rows)
        return self.rows[name]

    def values(self, name: str, metric: str) -> dict[str, float]:
        """Returns a metric case by case, for the questions or bystanders that have it.

        Raises:
            UnknownName: if there is no such method or metric.
        """
        row = self.of(name)
        if metric not in self.metrics:
            raise UnknownName("metric", metric, self.metrics)
        found = ((result.key, dict(result.scores)) for result in (*row.answers, *row.moved))
        return {key: scores[metric] for key, scores in found if metric in scores}

    def mean(self, name: str, metric: str) -> Mean:
        """Returns a metric's mean with its 95 % bootstrap interval.

        Where every case of a share is 0, or every one is 1, resamples are all alike and say
        nothing; the interval is then Wilson's (1927).
        """
        values = list(self.values(name, metric).values())
        if metric in SHARES and len(values) > 1 and len(set(values)) == 1:
            return _wilson(values[0], len(values))
        return mean(values, self.seed)

    def difference(self, a: str, b: str | None = None, metric: str = "marked") -> Difference:
        """Returns the mean of ``a - b`` in a metric: a paired bootstrap over cases.

        Args:
            a: a method.
            b: another one; None takes the baseline.
            metric: the metric.
        """
        other = b or self.baseline
        return paired_difference(self.values(a, metric), self.values(other, metric), self.seed)

    def points(self, gain: str = "marked", cost: str = "kl") -> list[Point]:
        """Returns a point per method, for :func:`~kvedit.evals.pareto` and the frontier plot."""
        return [
            Point(name, row.strength, self.mean(name, gain), self.mean(name, cost))
            for name, row in self.rows.items()
        ]

    def to_json(self, results: bool = False) -> dict[str, Any]:
        """Returns the report as plain data.

        Args:
            results: whether single results and answers are in it.
        """
        methods = {}
        for name, row in self.rows.items():
            one: dict[str, Any] = {"strength": row.strength, "metrics": self._means(name)}
            if name != self.baseline:
                one["differences"] = {
                    metric: self.difference(name, metric=metric).to_json()
                    for metric in self._common(name)
                }
            if results:
                one["results"] = [
                    {"key": r.key, "scores": dict(r.scores), "answer": r.answer}
                    for r in (*row.answers, *row.moved)
                ]
            methods[name] = one
        head = {"n": self.n, "seed": self.seed, "baseline": self.baseline}
        return {**head, "markers": self.markers.to_json(), "methods": methods}

    def _means(self, name: str) -> dict[str, Any]:
        found = {metric: self.mean(name, metric) for metric in self.metrics}
        return {metric: value.to_json() for metric, value in found.items() if value.n}

    def _common(self, name: str) -> list[str]:
        def shared(metric: str) -> bool:
            return bool(self.values(name, metric).keys() & self.values(self.baseline, metric))

        return [metric for metric in self.metrics if shared(metric)]

    def table(self, metrics: Sequence[str] | None = None, markdown: bool = False) -> str:
        """Returns a line per method: strength, then means with their intervals.

        Args:
            metrics: columns; None takes the telling ones.
            markdown: whether to lay it out for Markdown.

        Raises:
            UnknownName: if there is no such metric.
        """
        chosen = [m for m in _TELLING if m in self.metrics] if metrics is None else list(metrics)
        rows = [("method", "strength", *chosen)]
        for name, row in self.rows.items():
            strength = "-" if row.strength is None else f"{row.strength:.4g}"
            rows.append((name, strength, *(_cell(self.mean(name, m)) for m in chosen)))
        if markdown:
            rules = ("---", *["--:"] * (len(rows[0]) - 1))
            return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join("  ".join(row).rstrip() for row in padded)

    def __repr__(self) -> str:
        """The table, with what was asked above it."""
        moved = len(self.rows[self.baseline].moved)
        head = f"{self.markers.name}: n={self.n} questions, {moved} bystanders, seed {self.seed}"
        return f"{head}\n{self.table()}"


def _cell(found: Mean) -> str:
    if not found.n:
        return "-"
    spread = "" if found.low is None else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.value:.3g}{spread}"


def _wilson(share: float, n: int) -> Mean:
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 one end is the share itself, which rounding would miss by 1e-17.
    low = 0.0 if share == 0 else middle - half
    high = 1.0 if share == 1 else middle + half
    return Mean(share, low, high, n)
