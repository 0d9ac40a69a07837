"""Problems from a path: files in the shapes of GSM8K and of ARC. Nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path

from kvedit.errors import InvalidArgument
from kvedit.evals.recall.choices import arc_row
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.rows import expect, named_rows, reading_row
from kvedit.evals.steering.arithmetic import with_options

__all__ = ["read_arc", "read_gsm8k"]

_MARK = "####"


def read_gsm8k(path: str | Path, n: int | None = None, seed: int = 0) -> list[RecallQuestion]:
    """Returns word problems from a file in GSM8K's shape (Cobbe et al. 2021, arXiv 2110.14168).

    Rows ``{"question", "answer"}``, the number behind ``####`` in the answer.

    Args:
        path: a ``.jsonl`` file, or a JSON list.
        n: how many, drawn by the seed; None takes all, in the file's order.
        seed: seed of the draw.

    Raises:
        InvalidArgument: if a row has another shape, naming file and row; or there are fewer.
    """
    found = []
    for where, row in named_rows(path):
        with reading_row(where, f"question, and answer with {_MARK}"):
            question = expect(row["question"], str, "question").strip()
            _, mark, answer = expect(row["answer"], str, "answer").rpartition(_MARK)
            if not mark or not answer.strip():
                raise InvalidArgument(f"the answer has no number behind {_MARK}")
            gold = answer.strip().replace(",", "")
            found.append(RecallQuestion(question, (gold,), grading=("contains",)))
    return _some(found, n, seed, path)


def read_arc(path: str | Path, n: int | None = None, seed: int = 0) -> list[RecallQuestion]:
    """Returns multiple choice from a file in ARC's shape (Clark et al. 2018, arXiv 1803.05457).

    Rows ``{"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}``, or ``{"question",
    "choices": {"text": [...], "label": [...]}, "answerKey"}``. Options stand under letters behind
    the question, whatever their labels were, and no instruction with them: reasoning is allowed.

    Args:
        path: a ``.jsonl`` file, or a JSON list.
        n: how many, drawn by the seed; None takes all, in the file's order.
        seed: seed of the draw.

    Raises:
        InvalidArgument: if a row has another shape, naming file and row; or there are fewer.
    """
    found = []
    for where, row in named_rows(path):
        with reading_row(where, "question, choices with text and label, and answerKey"):
            question, options, correct = arc_row(row)
            found.append(with_options(question, options, correct))
    return _some(found, n, seed, path)


def _some(
    found: list[RecallQuestion], n: int | None, seed: int, path: str | Path
) -> list[RecallQuestion]:
    different = list({question.key: question for question in found}.values())
    if n is None:
        return different
    if not 1 <= n <= len(different):
        raise InvalidArgument(f"data file {path}: {len(different)} problems, asked for {n}")
    return [different[i] for i in sorted(random.Random(seed).sample(range(len(different)), n))]
