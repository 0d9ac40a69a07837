"""Small problems drawn by a seed: sums in words, and the same with options.

None of the stories is one of :func:`kvedit.steering.arithmetic_questions`: a delta that was found
on those is tested on others here.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence

from kvedit.errors import InvalidArgument
from kvedit.evals.recall.question import RecallQuestion

__all__ = ["choice_problems", "listed", "with_options", "word_problems"]

_WHO = ("Lena", "Omar", "Priya", "Tomas", "Yuki", "Zora", "Nils", "Amara", "Ravi", "Sofia")
_WHAT = ("lemons", "bricks", "candles", "bottles", "coins", "tiles", "eggs", "cards", "plums")


def _bakery(draw: random.Random) -> tuple[str, int]:
    who, trays, each = draw.choice(_WHO), draw.randint(3, 9), draw.randint(6, 12)
    sold = draw.randint(5, trays * each - 5)
    return (
        f"{who} bakes {trays} trays of {each} rolls and sells {sold} rolls. How many rolls are "
        "left?"
    ), trays * each - sold


def _savings(draw: random.Random) -> tuple[str, int]:
    who, week, weeks = draw.choice(_WHO), draw.randint(4, 15), draw.randint(3, 9)
    start = draw.randint(5, 40)
    return (
        f"{who} has {start} dollars and saves {week} dollars every week. How many dollars does "
        f"{who} have after {weeks} weeks?"
    ), start + week * weeks


def _twice(draw: random.Random) -> tuple[str, int]:
    (one, other), count = draw.sample(_WHO, 2), draw.randint(4, 25)
    what = draw.choice(_WHAT)
    return (
        f"{one} has {count} {what}. {other} has twice as many {what} as {one}. How many {what} "
        "do they have together?"
    ), 3 * count


def _boxes(draw: random.Random) -> tuple[str, int]:
    each, boxes, what = draw.randint(4, 12), draw.randint(4, 12), draw.choice(_WHAT)
    return (
        f"A worker packs {each * boxes} {what} into boxes of {each} {what} each. How many boxes "
        "are needed?"
    ), boxes


def _ages(draw: random.Random) -> tuple[str, int]:
    (one, other), age = draw.sample(_WHO, 2), draw.randint(6, 20)
    older, years = draw.randint(2, 9), draw.randint(3, 12)
    return (
        f"{one} is {age} years old, and {other} is {older} years older than {one}. How old will "
        f"{other} be in {years} years?"
    ), age + older + years


def _garden(draw: random.Random) -> tuple[str, int]:
    long, wide = draw.randint(5, 20), draw.randint(3, 12)
    return (
        f"A garden is {long} metres long and {wide} metres wide. How many metres of fence go "
        "around it?"
    ), 2 * (long + wide)


_STORIES: Sequence[Callable[[random.Random], tuple[str, int]]] = (
    _bakery, _savings, _twice, _boxes, _ages, _garden,
)  # fmt: skip


def word_problems(n: int, seed: int = 0) -> list[RecallQuestion]:
    """Returns sums in words with one number as the answer, all different.

    Args:
        n: how many.
        seed: equal seeds give equal problems; more of them begin with the fewer.

    Raises:
        InvalidArgument: if ``n`` is below 1.
    """
    return [
        RecallQuestion(text, (str(answer),), grading=("contains",), facts=(("story", story),))
        for text, answer, story in _drawn(n, random.Random(f"words {seed}"))
    ]


def choice_problems(n: int, seed: int = 0, options: int = 4) -> list[RecallQuestion]:
    """Returns sums in words with options under letters, all different.

    Wrong options are near the right one, or a likely slip, and never equal to it.

    Args:
        n: how many.
        seed: as for :func:`word_problems`; the problems are others.
        options: options of each, 2 to 6.

    Raises:
        InvalidArgument: if a number is out of range.
    """
    if not 2 <= options <= 6:
        raise InvalidArgument(f"options: expected 2 to 6, found {options}")
    draw = random.Random(f"choices {seed}")
    found = []
    for text, answer, story in _drawn(n, draw):
        near = {answer + step for step in (-10, -3, -2, -1, 1, 2, 3, 10)} | {2 * answer}
        wrong = draw.sample(
            sorted(value for value in near if value > 0 and value != answer), options - 1
        )
        texts = [str(value) for value in draw.sample([answer, *wrong], options)]
        facts = (("story", story),)
        found.append(with_options(text, texts, texts.index(str(answer)), facts))
    return found


def with_options(
    question: str,
    options: Sequence[str],
    correct: int,
    facts: tuple[tuple[str, float | str], ...] = (),
) -> RecallQuestion:
    """Returns a question with its options under letters, graded by the one that is named.

    Args:
        question: the question.
        options: texts of the options.
        correct: index of the right one.
        facts: what reports group by.
    """
    return RecallQuestion(
        listed(question, options),
        choices=tuple(options),
        correct=correct,
        letters=True,
        grading=(),
        facts=facts,
    )


def listed(question: str, options: Sequence[str]) -> str:
    """Returns a question with its options under letters, and nothing that hinders reasoning.

    Example:
        >>> print(listed("Which is even?", ["3", "4"]))
        Which is even?
        A. 3
        B. 4
    """
    lines = zip(string.ascii_uppercase, options, strict=False)
    return "\n".join([question.strip(), *(f"{letter}. {option}" for letter, option in lines)])


def _drawn(n: int, draw: random.Random) -> list[tuple[str, int, str]]:
    if n < 1:
        raise InvalidArgument(f"n: expected 1 problem at least, found {n}")
    found: dict[str, tuple[str, int, str]] = {}
    while len(found) < n:
        story = _STORIES[draw.randrange(len(_STORIES))]
        text, answer = story(draw)
        found.setdefault(text, (text, answer, story.__name__.strip("_")))
    return list(found.values())
