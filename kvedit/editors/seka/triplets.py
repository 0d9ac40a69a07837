"""Triplets: contexts with a question that they answer and one that they don't."""

from __future__ import annotations

import random
from typing import NamedTuple

from kvedit.errors import InvalidArgument

__all__ = ["Triplet", "synthetic_triplets"]


class Triplet(NamedTuple):
    """One context, read alone, after a question that it answers, and after one that it does not.

    Args:
        context: the text.
        relevant: a question that the context answers.
        irrelevant: a question about something else.
        answer: the answer, word by word as it stands in the context; its keys are compared. Where
            it stands there several times, the first counts.
    """

    context: str
    relevant: str
    irrelevant: str
    answer: str


# What is told of a person, how one asks for it, and what it may be; None is an invented town.
_FACTS: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    (
        "{name} works as a {value}.",
        "What does {name} do for a living?",
        ("glazier", "midwife", "carpenter", "botanist", "translator", "surveyor", "baker", "pilot"),
    ),
    ("{name} lives in {value}.", "Where does {name} live?", None),
    (
        "The front door of {name}'s house is {value}.",
        "Which colour has the front door of {name}'s house?",
        ("crimson", "turquoise", "yellow", "violet", "grey", "orange", "green", "white"),
    ),
    (
        "{name} keeps a {value} in the garden.",
        "Which animal does {name} keep?",
        ("goat", "tortoise", "parrot", "rabbit", "pony", "hedgehog", "goose", "lizard"),
    ),
    (
        "{name} plays the {value} on Sundays.",
        "Which instrument does {name} play?",
        ("cello", "trumpet", "harp", "accordion", "oboe", "banjo", "organ", "flute"),
    ),
    (
        "For guests, {name} always cooks {value}.",
        "What does {name} cook for guests?",
        ("lentil soup", "dumplings", "curry", "pancakes", "risotto", "roast duck", "noodles"),
    ),
    (
        "{name} was born in {value}.",
        "In which month was {name} born?",
        ("January", "March", "April", "June", "August", "October", "November", "December"),
    ),
    (
        "{name} collects {value}.",
        "What does {name} collect?",
        ("stamps", "old maps", "coins", "postcards", "clocks", "seashells", "buttons", "kites"),
    ),
    (
        "{name} drives a {value}.",
        "What does {name} drive?",
        ("tractor", "taxi", "motorcycle", "lorry", "minibus", "tram", "camper", "sledge"),
    ),
)
_FIRST = ("Anna", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Ines", "Jonas")
_LAST = ("Aldern", "Brisk", "Corvane", "Dellamar", "Estrup", "Falk", "Grunwald", "Hollis", "Ibsom")
_TOWNS = (
    ("Bren", "Cal", "Dor", "Fen", "Hal", "Mar", "Nor", "Sel"),
    ("bury", "dale", "mouth", "wick"),
)
_TOLD = 4  # facts per context: the answer, and others beside it


def synthetic_triplets(seed: int, n: int) -> list[Triplet]:
    """Returns triplets of invented people: four facts, a question for one, one about another.

    In place of the published training texts (Li et al. 2026, section 3), whose shape they have: two
    contexts and their questions, each irrelevant to the other context.

    Args:
        seed: equal seeds give equal triplets; more of them begin with the fewer.
        n: how many.

    Raises:
        InvalidArgument: if ``n`` is negative.
    """
    if n < 0:
        raise InvalidArgument(f"n: expected 0 or more triplets, found {n}")
    draw = random.Random(seed)
    return [_triplet(draw) for _ in range(n)]


def _triplet(draw: random.Random) -> Triplet:
    name, stranger = (f"{first} {draw.choice(_LAST)}" for first in draw.sample(_FIRST, 2))
    told = draw.sample(_FACTS, _TOLD)
    values = [_value(draw, kind) for _, _, kind in told]
    asked = draw.randrange(_TOLD)
    sentences = [
        fact.format(name=name, value=value)
        for (fact, _, _), value in zip(told, values, strict=True)
    ]
    other = draw.choice([fact for fact in _FACTS if fact not in told])
    return Triplet(
        context=" ".join(sentences),
        relevant=told[asked][1].format(name=name),
        irrelevant=other[1].format(name=stranger),
        answer=values[asked],
    )


def _value(draw: random.Random, kind: tuple[str, ...] | None) -> str:
    return "".join(map(draw.choice, _TOWNS)) if kind is None else draw.choice(kind)
