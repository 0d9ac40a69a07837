"""Ordinary English of a wanted length, the same on every machine."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["prose"]

_WHO = ("The clerk", "A visitor", "The manager", "Our driver", "The new owner", "Every guest")
_DOES = ("keeps", "checks", "forgets", "repairs", "orders", "describes", "returns", "remembers")
_WHAT = ("the blue boxes", "a long letter", "the old map", "two wooden chairs", "the morning list")
_WHERE = ("by the window", "in the back office", "near the harbour", "at the front desk")
_WHEN = ("before noon", "on Fridays", "after the storm", "every other week", "without a word")


def prose(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Returns the longest beginning, in whole words, of one fixed text that fits ``tokens``.

    Args:
        tokenizer: what counts the tokens, its BOS included.
        tokens: tokens at most.
    """
    words = _sentences(tokens)
    fits, over = 0, len(words) + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        short = _count(tokenizer, words[:middle]) <= tokens
        fits, over = (middle, over) if short else (fits, middle)
    return " ".join(words[:fits])


def _count(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> int:
    return len(tokenizer(" ".join(words), verbose=False)["input_ids"])


def _sentences(words: int) -> list[str]:
    """Returns at least ``words`` words, since a word is at least one token."""
    draw = random.Random(0)
    found: list[str] = []
    while len(found) < words:
        parts = [draw.choice(part) for part in (_WHO, _DOES, _WHAT, _WHERE, _WHEN)]
        found += f"{' '.join(parts)}.".split()
    return found
