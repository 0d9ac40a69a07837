"""Markers: expressions that tell a style, written down before anything is generated."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["STEP_BY_STEP", "Markers"]


@dataclass(frozen=True)
class Markers:
    """Regular expressions that tell a style, and how an answer in that style begins.

    Args:
        name: the style.
        patterns: expressions, in any case (``re.IGNORECASE``), ``^`` being a line's beginning.
        least: different patterns that an answer must hold to count as marked.
        opening: text with which such an answer begins; its log-probability is measured.

    Raises:
        InvalidArgument: if there is no pattern, one is no regular expression or matches nothing
            at all, or ``least`` can't be met.
    """

    name: str
    patterns: tuple[str, ...]
    least: int = 1
    opening: str = ""

    def __post_init__(self) -> None:
        """Checks patterns, and makes them hashable."""
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not 1 <= self.least <= len(self.patterns):
            raise InvalidArgument(
                f"least: expected 1 to {len(self.patterns)} patterns, found {self.least}"
            )
        for pattern in self.patterns:
            try:
                empty = _compiled(pattern).search("") is not None
            except re.error as error:
                raise InvalidArgument(f"pattern {pattern!r}: {error}") from error
            if empty:
                raise InvalidArgument(f"pattern {pattern!r} is found in every text, also in none")

    @property
    def digest(self) -> str:
        """Digest of all that is in it: journals of other markers are refused."""
        return digest_bytes(canonical_json(asdict(self)))

    def count(self, answer: str) -> int:
        """Returns how many different patterns an answer holds."""
        return sum(_compiled(pattern).search(answer) is not None for pattern in self.patterns)

    def marked(self, answer: str) -> bool:
        """Whether an answer holds enough of them."""
        return self.count(answer) >= self.least

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE)


# A sentence or a line begins. Not a clause: "if it rains, then" and ", so he has" are no style.
_BEGINS = r"(?:^|(?<=[.!?:;])\s+)\W*"


def _opens(words: str) -> str:
    return rf"{_BEGINS}(?:{words})\b"


STEP_BY_STEP = Markers(
    "step by step",
    patterns=(
        _opens("first|firstly|to begin|to start"),
        _opens("second|secondly|third|thirdly"),
        _opens("then|next|after that|afterwards"),
        _opens("finally|lastly"),
        _opens("therefore|thus|hence"),
        r"\bstep\s*(?:\d+|one|two|three)\b|\bstep[ -]by[ -]step\b",
    ),
    opening="First",
)
"""Words of order and conclusion where a sentence or a line begins, and steps that are numbered or
named. "The first day" and "if so, then" are none."""
