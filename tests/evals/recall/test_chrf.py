"""chrF: sacreBLEU's, against the paper's formula in a few lines; and the error without it."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from typing import Any

import pytest

from kvedit.errors import InvalidArgument, MissingDependency, UnknownName
from kvedit.evals.answering import TaskResult
from kvedit.evals.recall import (
    RecallQuestion,
    RecallReport,
    Size,
    corpus_chrf,
    sentence_chrf,
)


def chrf2(pairs: list[tuple[str, str]]) -> float:
    """chrF2 of Popović (2015): F of beta 2 of precision and recall, both averaged over n."""
    precisions, recalls = [], []
    for n in range(1, 7):
        given, wanted, common = 0, 0, 0
        for answer, reference in pairs:
            grams = [
                Counter(text[i : i + n] for i in range(len(text) - n + 1))
                for text in ("".join(answer.split()), "".join(reference.split()))
            ]
            given += grams[0].total()
            wanted += grams[1].total()
            common += (grams[0] & grams[1]).total()
        if given and wanted:
            precisions.append(common / given)
            recalls.append(common / wanted)
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * p * r / (4 * p + r) if p + r else 0.0


def words(drawn: random.Random) -> str:
    return " ".join(
        "".join(drawn.choices("abcde", k=drawn.randrange(1, 7)))
        for _ in range(drawn.randrange(2, 8))
    )


def test_a_sentence_and_a_corpus_are_the_papers() -> None:
    pytest.importorskip("sacrebleu")
    drawn = random.Random(0)
    pairs = [(words(drawn), words(drawn)) for _ in range(20)]
    for answer, reference in pairs:
        assert sentence_chrf(answer, [reference]) == pytest.approx(chrf2([(answer, reference)]))
    assert sentence_chrf("the cat", ["the cat", "a dog"]) == pytest.approx(100)
    questions = tuple(
        RecallQuestion(f"{i}?", (reference,), grading=("chrf",))
        for i, (_, reference) in enumerate(pairs)
    )
    results = tuple(
        TaskResult(q.key, (), answer) for q, (answer, _) in zip(questions, pairs, strict=True)
    )
    report = RecallReport(questions, {"full": results}, {"full": Size(1, 1, 1, 1, 1, 1)})
    assert corpus_chrf(report, "full") == pytest.approx(chrf2(pairs))
    with pytest.raises(UnknownName):
        corpus_chrf(report, "absent")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependency, match=r"kvedit\[chrf\]"):
        sentence_chrf("a", ["b"])


def test_a_report_without_translations_has_no_corpus_score() -> None:
    asked = RecallQuestion("Who?", ("Ann",))
    report = RecallReport((asked,), {"full": (TaskResult(asked.key, (), "Ann"),)}, {})
    with pytest.raises(InvalidArgument, match="graded by chrf"):
        corpus_chrf(report, "full")
