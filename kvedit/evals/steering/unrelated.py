"""Unrelated prompts: ordinary questions and small requests that no style is asked of."""

from __future__ import annotations

import random

from kvedit.errors import InvalidArgument
from kvedit.evals.facts import facts, relations

__all__ = ["unrelated_prompts"]

_ASKED = {
    "capital": ("What is the capital of {}?", "Write a sentence about the history of {}."),
    "currency": ("Which currency is used in {}?", "What can a traveller buy in {}?"),
    "language": ("Which language is spoken in {}?", "How do people in {} greet each other?"),
    "symbol": ("What is the chemical symbol of {}?", "Where is {} found in everyday life?"),
    "author": ("Who wrote {}?", "What is the book {} about?"),
}


def unrelated_prompts(n: int, seed: int = 0) -> list[str]:
    """Returns different questions about countries, elements and books, drawn by a seed.

    Half of them have one right answer, half are open. The facts are those of
    :func:`~kvedit.evals.fact_conflicts`.

    Args:
        n: how many, at most all there are.
        seed: seed of the draw.

    Raises:
        InvalidArgument: if there are not as many.
    """
    every = [
        text.format(fact.subject)
        for name in relations()
        for fact in facts(name)
        for text in _ASKED.get(name, ())
    ]
    if not 1 <= n <= len(every):
        raise InvalidArgument(f"there are {len(every)} unrelated prompts, asked for {n}")
    return random.Random(f"unrelated {seed}").sample(every, n)
