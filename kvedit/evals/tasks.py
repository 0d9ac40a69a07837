"""Task: a context, a prompt, and how its free answer is graded."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from kvedit.errors import InvalidArgument
from kvedit.evals.checks import Rule
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Task", "exact_match", "grade", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Task:
    """Something to answer in free text.

    Args:
        kind: ``"instruction"`` is graded by its rule, ``"needle"`` by whether the answer holds
            one of the expected texts, ``"qa"`` as SQuAD is.
        context: the text that becomes the memory.
        span_text: what matters in it: the instruction, the needle, or the sentence with the
            answer. It is what an oracle would emphasise.
        prompt: what is asked.
        answers: accepted answers.
        rule: the rule that an answer must keep.
        facts: what reports group by, for example ``depth``.

    Raises:
        InvalidArgument: if there is nothing to grade by, or the span is not in the context.
    """

    kind: Literal["instruction", "needle", "qa"]
    context: str
    span_text: str
    prompt: str
    answers: tuple[str, ...] = ()
    rule: Rule | None = None
    facts: tuple[tuple[str, float | str], ...] = ()

    def __post_init__(self) -> None:
        """Checks that it can be asked and graded."""
        if self.kind not in ("instruction", "needle", "qa"):
            raise InvalidArgument(f"kind: expected instruction, needle or qa, found {self.kind!r}")
        if (self.rule is not None) != (self.kind == "instruction") or (
            self.kind != "instruction" and not self.answers
        ):
            raise InvalidArgument(f"a task of kind {self.kind!r} lacks its rule, or its answers")
        if not self.span_text or self.span_text not in self.context:
            raise InvalidArgument(f"the span {self.span_text!r} is not in the context")

    @cached_property
    def key(self) -> str:
        """Digest of the task: its name in reports."""
        return digest_bytes(canonical_json(asdict(self)))[:16]


def grade(task: Task, answer: str) -> dict[str, float]:
    """Returns the scores of an answer, each in [0, 1].

    ``passed`` for all kinds; for ``qa`` it is the exact match, and ``f1`` is there as well.
    """
    if task.rule is not None:
        return {"passed": float(task.rule.holds(answer))}
    if task.kind == "needle":
        return {"passed": float(any(text.strip() in answer for text in task.answers))}
    return {
        "passed": max(exact_match(answer, text) for text in task.answers),
        "f1": max(token_f1(answer, text) for text in task.answers),
    }


def exact_match(answer: str, expected: str) -> float:
    """Returns SQuAD's exact match: 1 if both are the same without case, marks and articles."""
    return float(_normal(answer) == _normal(expected))


def token_f1(answer: str, expected: str) -> float:
    """Returns SQuAD's F1 of the words that both have (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    given, wanted = _normal(answer), _normal(expected)
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def _normal(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", plain).split()


def group_by(tasks: Sequence[Task], fact: str) -> Mapping[Any, list[str]]:
    """Returns the keys of tasks by the value of a fact."""
    groups: dict[Any, list[str]] = {}
    for task in tasks:
        groups.setdefault(dict(task.facts).get(fact), []).append(task.key)
    return groups
