"""chrF: how alike the characters of a translation and its reference are, by sacreBLEU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, MissingDependency

if TYPE_CHECKING:
    from kvedit.evals.recall.report import RecallReport

__all__ = ["corpus_chrf", "sentence_chrf"]


def sentence_chrf(answer: str, references: Sequence[str]) -> float:
    """Returns the chrF2 of one sentence in [0, 100], the best over its references.

    Popović (2015), *chrF: character n-gram F-score*: n-grams of 1 to 6 characters without white
    space, recall counted twice; computed by sacreBLEU (Post 2018) with its defaults.

    Raises:
        MissingDependency: without sacrebleu.
    """
    return float(_scorer().sentence_score(answer, list(references)).score)


def corpus_chrf(report: RecallReport, name: str) -> float:
    """Returns the chrF2 in [0, 100] of a memory's answers as one corpus.

    This is what papers print: n-grams are counted over all sentences, so that long ones weigh
    more. ``report.mean(name, "chrf")`` is the mean over sentences, which has an interval.

    Args:
        report: a report.
        name: a memory of it.

    Raises:
        InvalidArgument: if no question is graded by chrF.
        UnknownName: if the report has no such memory.
        MissingDependency: without sacrebleu.
    """
    pairs = [
        (result.answer, question.answers)
        for question, result in zip(report.questions, report.of(name), strict=True)
        if question.answers and "chrf" in question.grading
    ]
    if not pairs:
        raise InvalidArgument("no question of this report is graded by chrf")
    most = max(len(answers) for _, answers in pairs)
    # One list per reference number; sentences with fewer references have None there.
    columns = [[a[i] if i < len(a) else None for _, a in pairs] for i in range(most)]
    return float(_scorer().corpus_score([answer for answer, _ in pairs], columns).score)


def _scorer() -> Any:
    try:
        metrics = importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise MissingDependency("sacrebleu", "chrf", "chrF of translations") from error
    return metrics.CHRF()
