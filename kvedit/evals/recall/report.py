"""RecallReport: what several memories of one context recall of it, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.answering import TaskResult
from kvedit.evals.bootstrap import Difference, Mean, mean, paired_difference
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.scoring import METRICS
from kvedit.evals.recall.size import Size
from kvedit.evals.recall.table import table

__all__ = ["RecallReport"]


@dataclass(frozen=True)
class RecallReport:
    """What memories recall: teacher-forced and free-running, question by question.

    Questions of one document hang together; intervals are over questions, and so narrower than
    intervals over documents would be. :meth:`by` shows documents one by one.

    Args:
        questions: what was asked.
        results: memory to its results, one per question, in the same order.
        sizes: memory to its size.
        reference: the memory whose greedy answers are the reference.
        baseline: the memory that the others are compared with; None for none.
        seed: seed of the bootstrap.
    """

    questions: tuple[RecallQuestion, ...]
    results: Mapping[str, tuple[TaskResult, ...]]
    sizes: Mapping[str, Size]
    reference: str = "full"
    baseline: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that the baseline is there."""
        if self.baseline is not None and self.baseline not in self.results:
            raise UnknownName("baseline among memories", self.baseline, self.results)

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the memories, in their order."""
        return tuple(self.results)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that some question has, in the order of :data:`METRICS`."""
        there = {name for rows in self.results.values() for r in rows for name, _ in r.scores}
        return tuple(name for name in METRICS if name in there)

    def of(self, name: str) -> tuple[TaskResult, ...]:
        """Returns the results of a memory, one per question.

        Raises:
            UnknownName: if there is no such memory.
        """
        if name not in self.results:
            raise UnknownName("memory in this report", name, self.results)
        return self.results[name]

    def values(self, name: str, metric: str) -> dict[str, float]:
        """Returns a metric question by question, for the questions that have it.

        Raises:
            UnknownName: if there is no such memory, or no question has the metric.
        """
        if metric not in self.metrics:
            raise UnknownName("metric", metric, self.metrics)
        found = ((result.key, dict(result.scores)) for result in self.of(name))
        return {key: scores[metric] for key, scores in found if metric in scores}

    def mean(self, name: str, metric: str) -> Mean:
        """Returns a metric's mean over questions, with its 95 % bootstrap interval."""
        return mean(list(self.values(name, metric).values()), self.seed)

    def by(self, name: str, fact: str, metric: str) -> dict[Any, Mean]:
        """Returns the mean for each value of a fact of the questions, or of ``"document"``."""
        values, groups = self.values(name, metric), dict[Any, list[float]]()
        for question in self.questions:
            if question.key in values:
                group = question.document if fact == "document" else dict(question.facts).get(fact)
                groups.setdefault(group, []).append(values[question.key])
        return {group: mean(found, self.seed) for group, found in groups.items()}

    def difference(self, a: str, b: str | None = None, metric: str = "kl") -> Difference:
        """Returns the mean of ``a - b`` in a metric: a paired bootstrap over questions.

        Args:
            a: a memory.
            b: another one; None takes the baseline.
            metric: the metric.

        Raises:
            InvalidArgument: if neither ``b`` nor a baseline is given.
            UnknownName: if there is no such memory or metric.
        """
        other = b or self.baseline
        if other is None:
            raise InvalidArgument("name the memory to compare with, or give the report a baseline")
        return paired_difference(self.values(a, metric), self.values(other, metric), self.seed)

    def to_json(self, results: bool = False) -> dict[str, Any]:
        """Returns the report as plain data.

        Args:
            results: whether single results and answers are in it.
        """
        memories: dict[str, dict[str, Any]] = {}
        for name, size in self.sizes.items():
            memories[name] = {"size": size.to_json(), "metrics": self._means(name)}
            if self.baseline not in (None, name):
                memories[name]["differences"] = self._differences(name)
            if results:
                memories[name]["results"] = [
                    {"key": r.key, "scores": dict(r.scores), "answer": r.answer}
                    for r in self.of(name)
                ]
        head = {"n": self.n, "seed": self.seed, "reference": self.reference}
        return {**head, "baseline": self.baseline, "memories": memories}

    def _means(self, name: str) -> dict[str, Any]:
        found = {metric: self.mean(name, metric) for metric in self.metrics}
        return {metric: value.to_json() for metric, value in found.items() if value.n}

    def _differences(self, name: str) -> dict[str, Any]:
        return {metric: self.difference(name, metric=metric).to_json() for metric in self.metrics}

    def table(self, metrics: Sequence[str] | None = None, markdown: bool = False) -> str:
        """Returns a line per memory: its size, then means with their intervals.

        Args:
            metrics: columns; None takes the telling ones.
            markdown: whether to lay it out for Markdown.

        Raises:
            UnknownName: if there is no such metric.
        """
        return table(self, metrics, markdown)

    def __repr__(self) -> str:
        """The table, and what it is a table of."""
        documents = len({question.document for question in self.questions})
        about = f", {documents} documents" if documents > 1 else ""
        head = f"recall: n={self.n} questions{about}, reference {self.reference!r}"
        return f"{head}, 95 % intervals, seed {self.seed}\n{self.table()}"

    @classmethod
    def join(cls, reports: Sequence[RecallReport]) -> RecallReport:
        """Returns one report of several, over different documents with the same names.

        Sizes are means over the reports.

        Raises:
            InvalidArgument: if there is none, or they differ in memories, reference, baseline or
                seed, or share questions.
        """
        if not reports:
            raise InvalidArgument("expected reports to join, found none")
        first = reports[0]
        facts = {(r.names, r.reference, r.baseline, r.seed) for r in reports}
        if len(facts) > 1:
            raise InvalidArgument(
                f"reports differ in memories, reference, baseline or seed: {list(facts)}"
            )
        questions = tuple(question for report in reports for question in report.questions)
        if len({question.key for question in questions}) < len(questions):
            raise InvalidArgument(
                "reports share questions: questions of different documents differ in their document"
            )
        return cls(
            questions,
            {n: tuple(r for report in reports for r in report.of(n)) for n in first.names},
            {n: Size.mean([report.sizes[n] for report in reports]) for n in first.names},
            first.reference,
            first.baseline,
            first.seed,
        )
