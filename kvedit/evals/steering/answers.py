"""Answers: the number or the option that a free, reasoned answer comes to."""

from __future__ import annotations

import re
from fractions import Fraction

from kvedit.evals.recall.grading import chosen, contains
from kvedit.evals.recall.question import RecallQuestion

__all__ = ["answered", "extract_choice", "extract_number", "is_right"]

# A minus behind a digit or a letter is a subtraction or a dash, not a sign.
_NUMBER = r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+(?!\d|\.\d))?"
_SAID = re.compile(r"####|\banswer\b", re.IGNORECASE)
_NEAR = 3  # words between "answer" and the number that is meant, such as "in dollars is"


def extract_number(answer: str) -> Fraction | None:
    """Returns the number that an answer comes to; None if it holds none.

    The one that follows the last ``####`` or "answer" within a few words; else the last number
    of the text. Thousands may have commas; ``a/b`` is a fraction; currency and percent signs are
    left out.
    """
    said = list(_SAID.finditer(answer))
    if said:
        behind = answer[said[-1].end() :]
        found = re.search(_NUMBER, behind)
        if found and len(re.findall(r"\w+", behind[: found.start()])) <= _NEAR:
            return _as_number(found.group())
    every = re.findall(_NUMBER, answer)
    return _as_number(every[-1]) if every else None


def _as_number(text: str) -> Fraction | None:
    try:
        return Fraction(re.sub(r"[,$\s]", "", text))
    except (ValueError, ZeroDivisionError):
        return None


def extract_choice(question: RecallQuestion, answer: str) -> int | None:
    """Returns the option that an answer comes to; None if it names none, or several.

    A letter behind the last "answer", "option" or "choice" counts first, then a letter at the
    beginning, then the text of the only option that is there: at the end, behind the last
    "answer" or "therefore", or anywhere.
    """
    if question.letters:
        letters = question.continuations
        span = f"[{letters[0]}-{letters[-1]}]"
        named = rf"(?i:answer|option|choice)(?i:\s+is)?[\s:(*\"']*({span})(?![\w'])"
        found = re.findall(named, answer)
        if found:
            return letters.index(found[-1])
    ends = re.split(r"(?i)\banswer(?:\s+is)?\b|\btherefore\b|\bthus\b", answer)
    for part in (ends[-1], answer) if len(ends) > 1 else (answer,):
        option = chosen(question, part)
        if option is not None:
            return option
    return None


def answered(question: RecallQuestion, answer: str) -> bool:
    """Whether an answer holds something of the kind that is asked for: a number, an option."""
    if question.choices:
        return extract_choice(question, answer) is not None
    if question.gold is not None and _is_number(question.gold):
        return extract_number(answer) is not None
    return bool(answer.strip())


def is_right(question: RecallQuestion, answer: str) -> float | None:
    """Returns 1 if an answer is right, 0 if not; None if no right answer is known.

    Options by :func:`extract_choice`, numbers by :func:`extract_number`; other answers if the text
    holds an accepted one as whole words.
    """
    if question.choices:
        return float(extract_choice(question, answer) == question.correct)
    if not question.answers:
        return None
    found = extract_number(answer)
    return max(_same(found, answer, text) for text in question.answers)


def _same(number: Fraction | None, answer: str, expected: str) -> float:
    if not _is_number(expected):
        return contains(answer, expected)
    wanted = _as_number(expected.strip())
    # What was rounded to two places is still the number.
    if number is None or wanted is None:
        return 0.0
    exact = wanted.denominator == 1
    return float(number == wanted if exact else abs(number - wanted) <= abs(wanted) / 200)


def _is_number(text: str) -> bool:
    return re.fullmatch(_NUMBER, text.strip()) is not None
