"""Repetition: how much of a text is said again."""

from __future__ import annotations

from collections.abc import Sequence

from kvedit.evals.fluency import words

__all__ = ["distinct", "longest_repeat"]


def distinct(text: str, size: int = 2) -> float | None:
    """Returns the share of a text's n-grams that are different; None if there is none.

    distinct-n of Li et al. (2016, arXiv 1510.03055): 1 says nothing twice. It falls with length
    by itself, so compare it with ``length`` beside it.

    Args:
        text: the text; words and marks are counted.
        size: n.
    """
    grams = _grams(words(text), size)
    return len(set(grams)) / len(grams) if grams else None


def longest_repeat(text: str) -> float | None:
    """Returns the length of the longest n-gram that comes twice, as a share of the text's words.

    Near 0 in ordinary text; above a half where the end is a loop, since the two places may
    overlap. None without words.
    """
    found = words(text)
    if not found:
        return None
    low, high = 0, len(found) - 1
    # What comes twice has beginnings that do: the longest length can be found by halving.
    while low < high:
        middle = (low + high + 1) // 2
        grams = _grams(found, middle)
        low, high = (middle, high) if len(set(grams)) < len(grams) else (low, middle - 1)
    return low / len(found)


def _grams(found: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(found[start : start + size]) for start in range(len(found) - size + 1)]
