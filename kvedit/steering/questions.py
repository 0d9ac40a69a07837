"""Questions with a worked answer: given by the user, or small sums that are drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvedit.errors import InvalidArgument

__all__ = ["Question", "arithmetic_questions"]


@dataclass(frozen=True)
class Question:
    """A question, how to reason about it, and its answer.

    Args:
        question: the question.
        reasoning: steps that lead to the answer, in sentences.
        answer: the answer alone.

    Raises:
        InvalidArgument: if one is empty or no text.
    """

    question: str
    reasoning: str
    answer: str

    def __post_init__(self) -> None:
        """Checks that there are three texts."""
        for name in ("question", "reasoning", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InvalidArgument(f"{name}: expected a text that is not empty, found {value!r}")

    @classmethod
    def of(cls, value: Any) -> Question:
        """Returns a question, or makes one of three texts or a mapping with the three names.

        Raises:
            InvalidArgument: if it is something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and {"question", "reasoning", "answer"} <= set(value):
            return cls(value["question"], value["reasoning"], value["answer"])
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
            return cls(*value)
        raise InvalidArgument(
            f"expected (question, reasoning, answer) or a mapping of these, found {value!r}"
        )


_NAMES = ("Ada", "Ben", "Carla", "Dov", "Elin", "Faris", "Gita", "Henk", "Ines", "Jiro", "Kofi")
_THINGS = ("apples", "marbles", "stamps", "pencils", "shells", "tickets", "buttons", "postcards")


def _shop(draw: random.Random) -> tuple[str, list[str], int]:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    count, price, more = draw.randint(3, 9), draw.randint(2, 8), draw.randint(5, 20)
    cost = count * price
    text = (
        f"{name} buys {count} boxes of {thing} for {price} coins each and pays {more} coins for "
        "delivery. How many coins is that in all?"
    )
    steps = [
        f"the {count} boxes cost {count} times {price}, which is {cost} coins",
        f"the delivery adds {more} coins to {cost}, which gives {cost + more}",
    ]
    return text, steps, cost + more


def _gift(draw: random.Random) -> tuple[str, list[str], int]:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    start, given, found = draw.randint(20, 60), draw.randint(5, 18), draw.randint(3, 15)
    text = (
        f"{name} has {start} {thing}, gives {given} away and then finds {found} more. How many "
        f"{thing} are there now?"
    )
    steps = [
        f"giving {given} away leaves {start} minus {given}, which is {start - given}",
        f"finding {found} more makes {start - given} plus {found}, which is "
        f"{start - given + found}",
    ]
    return text, steps, start - given + found


def _share(draw: random.Random) -> tuple[str, list[str], int]:
    thing, friends, each = draw.choice(_THINGS), draw.randint(3, 8), draw.randint(4, 9)
    left = draw.randint(1, 6)
    total = friends * each + left
    text = (
        f"A jar holds {total} {thing}. {left} of them are broken, and {friends} friends share the "
        f"others equally. How many {thing} does each friend get?"
    )
    steps = [
        f"without the broken ones there are {total} minus {left}, which is {total - left}",
        f"{friends} friends share {total - left}, so each gets {total - left} divided by "
        f"{friends}, which is {each}",
    ]
    return text, steps, each


def _trip(draw: random.Random) -> tuple[str, list[str], int]:
    name, speed, hours = draw.choice(_NAMES), draw.randint(4, 18), draw.randint(2, 6)
    rest = draw.randint(3, 25)
    text = (
        f"{name} rides {hours} hours at {speed} kilometres an hour and walks another {rest} "
        "kilometres. How many kilometres is the whole way?"
    )
    steps = [
        f"riding covers {hours} times {speed}, which is {hours * speed} kilometres",
        f"walking adds {rest} to {hours * speed}, which gives {hours * speed + rest}",
    ]
    return text, steps, hours * speed + rest


def _rows(draw: random.Random) -> tuple[str, list[str], int]:
    rows, seats, empty = draw.randint(4, 12), draw.randint(5, 12), draw.randint(2, 15)
    text = (
        f"A hall has {rows} rows of {seats} seats, and {empty} seats stay empty. How many people "
        "are sitting in the hall?"
    )
    steps = [
        f"there are {rows} times {seats} seats, which is {rows * seats}",
        f"with {empty} empty ones, {rows * seats} minus {empty} people sit there, which is "
        f"{rows * seats - empty}",
    ]
    return text, steps, rows * seats - empty


_KINDS: tuple[Callable[[random.Random], tuple[str, list[str], int]], ...] = (
    _shop, _gift, _share, _trip, _rows,
)  # fmt: skip


def arithmetic_questions(n: int, seed: int = 0) -> list[Question]:
    """Returns word problems of two steps, all different, worked out "First, … Then, … Therefore".

    Args:
        n: how many.
        seed: equal seeds give equal questions; more of them begin with the fewer.

    Raises:
        InvalidArgument: if ``n`` is below 1.
    """
    if n < 1:
        raise InvalidArgument(f"n: expected 1 question at least, found {n}")
    draw = random.Random(seed)
    found: dict[str, Question] = {}
    while len(found) < n:
        text, steps, answer = draw.choice(_KINDS)(draw)
        reasoning = f"First, {steps[0]}. Then, {steps[1]}. Therefore, the answer is {answer}."
        found.setdefault(text, Question(text, reasoning, str(answer)))
    return list(found.values())
