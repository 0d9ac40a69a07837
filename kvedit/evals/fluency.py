"""Fluency: how varied a text is, as the entropy of its pairs and triples of words.

Zhang et al. (2018, arXiv 1809.05972), as Meng et al. (2022, arXiv 2202.05262, ROME) use it for
edited models: low values tell repetition. Words are cut by a regular expression here, not by
nltk, so figures are near theirs and not equal to them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

__all__ = ["ngram_entropy", "words"]

_WORD = re.compile(r"\w+|[^\w\s]")
_WEIGHTS = ((2, 2 / 3), (3, 4 / 3))


def words(text: str) -> list[str]:
    """Returns words and marks of punctuation, in order."""
    return _WORD.findall(text)


def ngram_entropy(text: str) -> float | None:
    """Returns ``(2/3 H_2 + 4/3 H_3) / 2`` in bits; None below three words.

    ``H_n = -sum_k f(k) log2 f(k)`` with the relative frequencies ``f`` of the text's n-grams.
    """
    found = words(text)
    if len(found) < 3:
        return None
    total = sum(weight * _entropy(found, size) for size, weight in _WEIGHTS)
    return total / len(_WEIGHTS)


def _entropy(found: list[str], size: int) -> float:
    grams = pairwise(found) if size == 2 else zip(found, found[1:], found[2:], strict=False)
    counts = Counter(grams)
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0
