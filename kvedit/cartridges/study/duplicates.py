"""Duplicates: questions that were asked before, word for word or nearly so."""

from __future__ import annotations

import math
from collections import defaultdict

from kvedit.cartridges.study.filters import normalised
from kvedit.memory.digest import digest_bytes

__all__ = ["Duplicates", "shingles"]

_CHARS = 5


def shingles(text: str) -> frozenset[str]:
    """Returns the runs of five characters of a normalised text; the text itself if it is shorter.

    Characters and not words, so that texts without spaces have some.
    """
    plain = normalised(text)
    runs = (plain[start : start + _CHARS] for start in range(len(plain) - _CHARS + 1))
    return frozenset(runs) or frozenset([plain])


class Duplicates:
    """Questions so far, found again by exact Jaccard similarity of their shingles.

    Two sets of similarity t share an element among the first ``s - ceil(t s) + 1`` of each, in any
    one order of all elements (prefix filtering: Chaudhuri et al. 2006). Only those are indexed, so
    a question is compared with few others.

    Args:
        threshold: similarity in (0, 1] from which a question counts as one that is there; None
            finds only questions that are equal once normalised.
    """

    def __init__(self, threshold: float | None) -> None:
        """Starts without questions."""
        self.threshold = threshold
        self._plain: set[str] = set()
        self._sets: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = defaultdict(list)

    def __contains__(self, question: str) -> bool:
        """Whether a question, or one that is nearly the same, was added."""
        if normalised(question) in self._plain:
            return True
        if self.threshold is None:
            return False
        own = shingles(question)
        near = {index for shingle in self._prefix(own) for index in self._index.get(shingle, ())}
        return any(self._similarity(own, index) >= self.threshold for index in near)

    def add(self, question: str) -> None:
        """Adds a question."""
        self._plain.add(normalised(question))
        if self.threshold is None:
            return
        own = shingles(question)
        for shingle in self._prefix(own):
            self._index[shingle].append(len(self._sets))
        self._sets.append(own)

    def _similarity(self, own: frozenset[str], index: int) -> float:
        shared = len(own & self._sets[index])
        return shared / (len(own) + len(self._sets[index]) - shared)

    def _prefix(self, own: frozenset[str]) -> list[str]:
        # Ordered by digest: alphabetical order would put common beginnings in front of all.
        ordered = sorted(own, key=lambda shingle: digest_bytes(shingle.encode()))
        threshold = self.threshold or 1.0
        # The small number keeps ceil(0.8 * 10) at 8 where rounding makes it 8.000000000000002.
        count = len(own) - math.ceil(threshold * len(own) - 1e-9) + 1
        return ordered[:count]
