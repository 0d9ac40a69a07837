"""Grading of free answers: against accepted answers, against options, against another answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from kvedit.evals.recall.chrf import sentence_chrf
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.tasks import exact_match, token_f1

__all__ = ["chosen", "contains", "grade", "overlap"]


def contains(answer: str, expected: str) -> float:
    """Returns 1 if ``answer`` holds ``expected`` as whole words, whatever case and white space."""
    given, wanted = (" ".join(text.lower().split()) for text in (answer, expected))
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", given) is not None)


_SCORES: Mapping[str, Callable[[str, str], float]] = {
    "em": exact_match,
    "f1": token_f1,
    "contains": contains,
}


def grade(question: RecallQuestion, answer: str) -> dict[str, float]:
    """Returns the scores of a free answer: the best over the accepted answers.

    ``em``, ``f1`` (SQuAD's), ``contains`` in [0, 1], ``chrf`` in [0, 100], as the question's
    ``grading`` asks; for options also ``choice_free``, 1 if the answer names the right one.
    """
    found: dict[str, float] = {}
    if question.answers:
        for name in question.grading:
            if name == "chrf":
                found[name] = sentence_chrf(answer, question.answers)
            else:
                found[name] = max(_SCORES[name](answer, text) for text in question.answers)
    if question.choices:
        found["choice_free"] = float(chosen(question, answer) == question.correct)
    return found


def chosen(question: RecallQuestion, answer: str) -> int | None:
    """Returns the option that a free answer names; None if it names none, or several.

    A letter counts where it begins the answer and a mark or the end follows it, or where it
    follows "answer", "option" or "choice"; otherwise the text of exactly one option must be there.
    """
    if question.letters:
        letters = question.continuations
        span = f"[{letters[0]}-{letters[-1]}]"
        begins = re.match(rf"[\s(\[*\"']*({span})(?=[.):,\]*\"']|\s*$|\s*\n)", answer)
        named = re.search(rf"(?i:answer|option|choice)(?i:\s+is)?[\s:(*]*({span})\b", answer)
        letter = begins or named
        if letter:
            return letters.index(letter[1])
    held = [index for index, text in enumerate(question.choices) if contains(answer, text)]
    # "renal failure" is no second answer in "acute renal failure".
    outer = [
        index
        for index in held
        if not any(
            other != index and contains(question.choices[other], question.choices[index])
            for other in held
        )
    ]
    return outer[0] if len(outer) == 1 else None


def overlap(given: Sequence[int], reference: Sequence[int]) -> float:
    """Returns how much of a reference answer another one has, in [0, 1], by tokens in order.

    ROUGE-L's F1 (Lin 2004): twice the longest common subsequence over the sum of lengths.
    """
    if not given or not reference:
        return float(len(given) == len(reference))
    row = [0] * (len(reference) + 1)
    for token in given:
        diagonal = 0
        for column, wanted in enumerate(reference, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == wanted else max(above, row[column - 1])
            diagonal = above
    return 2 * row[-1] / (len(given) + len(reference))
