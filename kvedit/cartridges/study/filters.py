"""Filters: questions and answers that are not worth training on, and the reason of each."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvedit.cartridges.study.decoding import Said
from kvedit.errors import InvalidArgument

__all__ = ["REASONS", "Filters", "normalised", "repetition", "tidy_question"]

REASONS = (
    "question empty",
    "question short",
    "question cut",
    "question loops",
    "question points at the text",
    "question duplicate",
    "answer empty",
    "answer short",
    "answer cut",
    "answer loops",
    "answer copies the question",
    "too long for the model",
)
"""Why a sample may be dropped."""

_POINTS = re.compile(
    r"\b(?:(?:text|passage|excerpt|document|article|paragraph|section)s?\s+(?:above|below)|"
    r"(?:above|below|following|given|provided)\s+(?:text|passage|excerpt|document|article|"
    r"paragraph|section)s?)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^(?:question|message|prompt|user|q)\s*(?:\d+\s*)?:\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"""[.?!。？！…]["'”’»)]*$""")
_SENTENCE = re.compile(r"""^.*[.?!。？！…]["'”’»)]*(?=\s|$)""", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "„": "“", "`": "`", "**": "**"}


@dataclass(frozen=True)
class Filters:
    """What is dropped.

    Args:
        min_question_chars: characters of a question at least.
        cut_questions: whether to drop questions that ran out of tokens within their first sentence;
            of longer ones the whole sentences stay.
        min_answer_tokens: tokens of an answer at least, the one that ends it aside.
        cut_answers: whether to drop answers that ran out of tokens; a student that learns from cut
            ones is never told to stop.
        repetition: share of n-grams of tokens that may be repeats, in [0, 1]; 1 keeps loops.
        copied: share of the answer's words that may be the question's, in their order, in [0, 1];
            1 keeps echoes.
        pointing: whether to drop questions that speak of "the text above" and the like, which a
            session over a cartridge has no text for.
        duplicates: Jaccard similarity of questions from which the later one is dropped, in (0, 1];
            None keeps near-duplicates. Questions that are equal but for case, white space and
            punctuation are dropped with any number.

    Raises:
        InvalidArgument: if a number is out of range.
    """

    min_question_chars: int = 8
    cut_questions: bool = True
    min_answer_tokens: int = 1
    cut_answers: bool = True
    repetition: float = 0.5
    copied: float = 0.9
    pointing: bool = False
    duplicates: float | None = 0.8

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("repetition", "copied"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgument(f"{name} must be in [0, 1], found {getattr(self, name)}")
        if self.min_question_chars < 1 or self.min_answer_tokens < 1:
            raise InvalidArgument(
                "min_question_chars and min_answer_tokens must be at least 1, found "
                f"{self.min_question_chars}, {self.min_answer_tokens}"
            )
        if self.duplicates is not None and not 0 < self.duplicates <= 1:
            raise InvalidArgument(f"duplicates must be in (0, 1] or None, found {self.duplicates}")

    def question(self, text: str, said: Said) -> str | None:
        """Returns why a question is dropped, or None.

        Args:
            text: the question, tidied.
            said: what the model said.
        """
        if not normalised(text):
            return "question empty"
        if len(text) < self.min_question_chars:
            return "question short"
        if self.cut_questions and not said.ended and not _SENTENCE_END.search(text):
            return "question cut"
        if repetition(said.tokens) > self.repetition:
            return "question loops"
        if self.pointing and _POINTS.search(text):
            return "question points at the text"
        return None

    def answer(self, question: str, said: Said) -> str | None:
        """Returns why an answer is dropped, or None."""
        if not normalised(said.text):
            return "answer empty"
        if len(said.tokens) - said.ended < self.min_answer_tokens:
            return "answer short"
        if self.cut_answers and not said.ended:
            return "answer cut"
        if repetition(said.tokens) > self.repetition:
            return "answer loops"
        if self.copied < 1 and _copied(question, said.text) > self.copied:
            return "answer copies the question"
        return None


def tidy_question(text: str, ended: bool = True) -> str:
    """Returns a question without a label in front, and without quotes around it.

    Args:
        text: what the model said.
        ended: whether it ended by itself; otherwise it is cut after its last whole sentence, if
            there is one.
    """
    text = _LABEL.sub("", text.strip()).strip()
    whole = None if ended else _SENTENCE.match(text)
    if whole is not None:
        text = whole.group()
    for left, right in _QUOTES.items():
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and left not in inner and inner.strip():
            return inner.strip()
    return text


def normalised(text: str) -> str:
    """Returns a text in one case, with one space between words, and no punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Letters, marks and numbers: a text of other signs only stays as it is.
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join(kept.split()) or folded.strip()


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Returns the share of n-grams that stood earlier in the same reply; 0 for short ones.

    It counts tokens and not words, so it needs no language. A loop of any period comes near 1.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    if len(grams) < 2 * n:
        return 0.0
    return 1 - len(set(grams)) / len(grams)


def _copied(question: str, answer: str) -> float:
    """Returns the share of the answer's words that are the question's, in the same order.

    Order is that of word pairs: an answer that uses a question's words in sentences of its own has
    few pairs in common with it. A single word has no pair and copies nothing.
    """
    asked, said = normalised(question).split(), normalised(answer).split()
    if said and said == asked:
        return 1.0
    pairs, known = list(pairwise(said)), set(pairwise(asked))
    return sum(pair in known for pair in pairs) / len(pairs) if pairs else 0.0
