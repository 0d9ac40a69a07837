"""Prompts: how the adapters ask, as a text that follows a context."""

from __future__ import annotations

import string
from collections.abc import Sequence

__all__ = ["multiple_choice", "open_question"]


def open_question(question: str, instruction: str = "") -> str:
    r"""Returns a question as it stands behind a text, an instruction between it and the answer.

    Example:
        >>> open_question("Who?")
        '\nQuestion: Who?\nAnswer:'
    """
    said = f"\n{instruction.strip()}" if instruction.strip() else ""
    return f"\nQuestion: {question.strip()}{said}\nAnswer:"


def multiple_choice(question: str, options: Sequence[str], instruction: str) -> str:
    """Returns a question with its options under letters.

    Example:
        >>> print(multiple_choice("Who?", ["Ann", "Bob"], "Name the letter."))
        <BLANKLINE>
        Question: Who?
        A. Ann
        B. Bob
        Name the letter.
        Answer:
    """
    lines = zip(string.ascii_uppercase, options, strict=False)
    listed = "\n".join(f"{letter}. {option}" for letter, option in lines)
    return open_question(f"{question.strip()}\n{listed}", instruction)
