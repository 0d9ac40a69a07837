"""Synthetic triplets: what their use needs of them."""

from __future__ import annotations

import itertools

import pytest

from kvedit.editors.seka import synthetic_triplets
from kvedit.errors import InvalidArgument

MANY = synthetic_triplets(seed=3, n=300)


def test_equal_seeds_give_equal_triplets_and_more_of_them_begin_alike() -> None:
    assert synthetic_triplets(3, 40) == MANY[:40]
    assert synthetic_triplets(4, 40) != MANY[:40]
    assert synthetic_triplets(3, 0) == []


def test_the_answer_stands_once_in_the_context_and_in_no_question() -> None:
    for one in MANY:
        assert one.context.count(one.answer) == 1
        assert one.answer not in one.relevant
        assert one.answer not in one.irrelevant


def test_one_question_is_about_the_context_and_the_other_is_not() -> None:
    for one in MANY:
        (person,), (stranger,) = people(one.relevant), people(one.irrelevant)
        assert person in one.context
        assert stranger not in one.context


def test_they_differ() -> None:
    assert len(set(MANY)) > 290
    assert len({one.answer for one in MANY}) > 40


def people(question: str) -> list[str]:
    """Pairs of words with capitals, the first word left out."""
    words = question.replace("'s", "").replace("?", "").split()
    pairs = itertools.pairwise(words[1:])
    return [f"{a} {b}" for a, b in pairs if a[0].isupper() and b[0].isupper()]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="0 or more triplets, found -1"):
        synthetic_triplets(0, -1)
