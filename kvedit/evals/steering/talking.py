"""Prompt baselines: what can be had by saying it, an instruction or worked examples."""

from __future__ import annotations

from collections.abc import Sequence

from kvedit.errors import InvalidArgument
from kvedit.evals.steering.asker import Prompt, Transform

__all__ = ["with_examples", "with_instruction"]


def with_instruction(instruction: str) -> Transform:
    r"""Returns a transform that says an instruction behind the question, in a line of its own.

    In a chat it stands at the end of the last message.

    Raises:
        InvalidArgument: if it is empty.

    Example:
        >>> with_instruction("Think step by step.")("What is 2 + 2?")
        'What is 2 + 2?\nThink step by step.'
    """
    if not instruction.strip():
        raise InvalidArgument("the instruction is empty")
    said = f"\n{instruction.strip()}"

    def transform(prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return prompt + said
        *before, last = [dict(turn) for turn in prompt]
        return [*before, {**last, "content": f"{last['content']}{said}"}]

    return transform


def with_examples(examples: Sequence[tuple[str, str]]) -> Transform:
    """Returns a transform that puts questions with answers before the prompt.

    In a chat they are turns of user and assistant, behind a system message; in a text they are
    paragraphs.

    Args:
        examples: question and answer; leave out what is asked later.

    Raises:
        InvalidArgument: if there is none, or one is empty.
    """
    pairs = list(examples)
    if not pairs or not all(question.strip() and answer.strip() for question, answer in pairs):
        raise InvalidArgument(f"expected questions with answers, found {pairs!r}")

    def transform(prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return "\n\n".join([*(f"{q}\n{a}" for q, a in pairs), prompt])
        turns = [dict(turn) for turn in prompt]
        start = 1 if turns[0].get("role") == "system" else 0
        shown = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*turns[:start], *shown, *turns[start:]]

    return transform
