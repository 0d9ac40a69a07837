"""Baselines that change the text and not the memory: marks, repetition, examples.

Each takes a conflict and returns it with another context; questions and answers stay. They go
into ``evaluate(transform=…)``, which compares what should stay with the unchanged text. The
prompts to which PASTA is compared are of these kinds (Zhang et al. 2024, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvedit.errors import InvalidArgument
from kvedit.evals.conflicts import Conflict

__all__ = ["few_shot", "mark", "repeat_span"]


def mark(case: Conflict, sign: str = "*") -> Conflict:
    """Returns the conflict with ``sign`` before and behind the span: ``*``, ``"``, ``**``.

    Raises:
        InvalidArgument: if the sign is empty.
    """
    if not sign:
        raise InvalidArgument("the mark is empty")
    return replace(
        case, context=case.context.replace(case.span_text, f"{sign}{case.span_text}{sign}")
    )


def repeat_span(case: Conflict, times: int = 1) -> Conflict:
    """Returns the conflict with its span said again, ``times`` times, at the end of the context.

    An editor that is to act on it as well has to say which occurrence it means.

    Raises:
        InvalidArgument: if ``times`` is below 1.
    """
    if times < 1:
        raise InvalidArgument(f"times: expected at least 1, found {times}")
    said = case.span_text[:1].upper() + case.span_text[1:]
    return replace(case, context=" ".join([case.context, *[said] * times]))


def few_shot(examples: Sequence[Conflict]) -> Callable[[Conflict], Conflict]:
    """Returns a transform that puts solved conflicts, by the new answer, before the context.

    An example that asks what the case itself asks is left out.

    Args:
        examples: conflicts that are not evaluated.

    Raises:
        InvalidArgument: if there is none.
    """
    if not examples:
        raise InvalidArgument("few-shot needs at least one example")

    def with_examples(case: Conflict) -> Conflict:
        solved = [
            f"{one.context}{one.prompt}{one.new}." for one in examples if one.prompt != case.prompt
        ]
        return replace(case, context="\n\n".join([*solved, case.context]))

    return with_examples
