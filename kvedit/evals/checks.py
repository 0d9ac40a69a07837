"""Rule: an instruction about an answer's form that a few lines of code can check.

After the verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["RULES", "Rule", "count_bullets", "ends_with", "is_json", "is_lower", "is_upper"]

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)
_BULLET = re.compile(r"^\s*[*\-•]\s+\S", re.MULTILINE)


def is_json(answer: str) -> bool:
    """Whether an answer is one JSON object or list, with or without a fence around it."""
    text = answer.strip()
    fenced = _FENCE.match(text)
    try:
        return isinstance(json.loads(fenced.group(1) if fenced else text), dict | list)
    except ValueError:
        return False


def is_upper(answer: str) -> bool:
    """Whether an answer has letters and none is small."""
    return answer.isupper()


def is_lower(answer: str) -> bool:
    """Whether an answer has letters and none is a capital."""
    return answer.islower()


def has_no_commas(answer: str) -> bool:
    """Whether an answer says something, without a comma."""
    return bool(answer.strip()) and "," not in answer


def count_bullets(answer: str) -> int:
    """Returns the number of lines that begin with ``*``, ``-`` or ``•`` and say something."""
    return len(_BULLET.findall(answer))


def ends_with(answer: str, phrase: str) -> bool:
    """Whether an answer ends with a phrase, in any case, white space and quotes aside."""
    return answer.strip().strip('"').lower().endswith(phrase.strip().lower())


@dataclass(frozen=True)
class Rule:
    """A rule for answers.

    Args:
        name: a name of :data:`RULES`.
        number: how many bullets.
        phrase: the ending phrase.

    Raises:
        UnknownName: if there is no such rule.
        InvalidArgument: if it lacks its number or phrase.
    """

    name: str
    number: int = 0
    phrase: str = ""

    def __post_init__(self) -> None:
        """Checks that the rule is whole."""
        if self.name not in RULES:
            raise UnknownName("rule", self.name, RULES)
        if (self.name == "bullets" and self.number < 1) or (
            self.name == "ends_with" and not self.phrase.strip()
        ):
            raise InvalidArgument(f"the rule {self.name!r} needs its number or phrase: {self}")

    @property
    def instruction(self) -> str:
        """The rule in words."""
        return RULES[self.name][0].format(number=self.number, phrase=self.phrase)

    def holds(self, answer: str) -> bool:
        """Whether an answer keeps the rule."""
        return RULES[self.name][1](self, answer)


RULES: Mapping[str, tuple[str, Callable[[Rule, str], bool]]] = {
    "json": ("Give the whole answer in JSON format.", lambda rule, text: is_json(text)),
    "uppercase": (
        "Write the whole answer in capital letters only.",
        lambda rule, text: is_upper(text),
    ),
    "lowercase": (
        "Write the whole answer in lowercase letters only.",
        lambda rule, text: is_lower(text),
    ),
    "no_commas": ("Do not use any commas in the answer.", lambda rule, text: has_no_commas(text)),
    "bullets": (
        "Give the answer as exactly {number} bullet points that begin with '* '.",
        lambda rule, text: count_bullets(text) == rule.number,
    ),
    "ends_with": (
        "End the answer with the exact words: {phrase}",
        lambda rule, text: ends_with(text, rule.phrase),
    ),
}
"""Name of a rule to its instruction and its check."""
