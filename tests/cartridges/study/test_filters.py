"""Filters and duplicates, against examples and a brute-force Jaccard."""

import random

import pytest

from kvedit.cartridges.study import REASONS, Filters
from kvedit.cartridges.study.decoding import Said
from kvedit.cartridges.study.duplicates import Duplicates, shingles
from kvedit.cartridges.study.filters import normalised, repetition, tidy_question
from kvedit.errors import InvalidArgument

QUESTION = "How many euros does the red lamp cost?"
LOOP = (1, 2, 3) * 12


def said(text="It costs 40 euros.", tokens=(1, 2, 3, 4, 5), ended=True):
    return Said(text, tuple(tokens), ended)


@pytest.mark.parametrize(
    ("text", "reply", "filters", "reason"),
    [
        (QUESTION, said(), Filters(), None),
        ("  ", said(), Filters(), "question empty"),
        ("Why?", said(), Filters(), "question short"),
        ("Why?", said(), Filters(min_question_chars=2), None),
        ("How many euros does the", said(ended=False), Filters(), "question cut"),
        ("How many euros does the", said(ended=False), Filters(cut_questions=False), None),
        (QUESTION, said(ended=False), Filters(), None),
        (QUESTION, said(tokens=LOOP), Filters(), "question loops"),
        (QUESTION, said(tokens=LOOP), Filters(repetition=1), None),
        ("What does the text above say?", said(), Filters(), None),
        ("What does the text above say?", said(), Filters(pointing=True), REASONS[4]),
        ("Sum up the provided document.", said(), Filters(pointing=True), REASONS[4]),
        ("What is said about textiles above ground?", said(), Filters(pointing=True), None),
    ],
)
def test_questions(text, reply, filters, reason):
    assert filters.question(text, reply) == reason


@pytest.mark.parametrize(
    ("reply", "filters", "reason"),
    [
        (said(), Filters(), None),
        (said(" \n"), Filters(), "answer empty"),
        (said("40", (4, 2)), Filters(), None),
        (said("40", (4, 2)), Filters(min_answer_tokens=2), "answer short"),
        (said(ended=False), Filters(), "answer cut"),
        (said(ended=False), Filters(cut_answers=False), None),
        (said(tokens=LOOP), Filters(), "answer loops"),
        (said("how many euros does the RED lamp cost"), Filters(), "answer copies the question"),
        (said(QUESTION), Filters(copied=1), None),
        (said("The red lamp does cost 40 euros, how nice."), Filters(), None),
    ],
)
def test_answers(reply, filters, reason):
    assert filters.answer(QUESTION, reply) == reason


def test_every_reason_has_a_name():
    assert len(set(REASONS)) == len(REASONS)
    assert {Filters().question("", said()), Filters().answer("x", said(""))} <= set(REASONS)


def test_repetition_counts_repeated_runs():
    assert repetition(range(50)) == 0
    assert repetition((1, 2)) == 0  # too short to tell
    assert repetition([7] * 40) == pytest.approx(1 - 1 / 37)
    assert repetition([*range(20), *range(20)]) == pytest.approx(1 - 20 / 37)


@pytest.mark.parametrize(
    ("raw", "ended", "tidy"),
    [
        (' Question: "Which lamp is red?" ', True, "Which lamp is red?"),
        ("Q1: Which?", True, "Which?"),
        ("**Which?**", True, "Which?"),
        ('"Red" or "blue"?', True, '"Red" or "blue"?'),
        ("Which lamp? And which", True, "Which lamp? And which"),
        ("Which lamp? It is 4.5 metres. And whi", False, "Which lamp? It is 4.5 metres."),
        ("Which lamp of all", False, "Which lamp of all"),
        ('"', True, '"'),
    ],
)
def test_tidy(raw, ended, tidy):
    assert tidy_question(raw, ended) == tidy


def test_normalised_texts_keep_letters_of_every_script():
    assert normalised("  Wie VIELE\tEuro?! ") == "wie viele euro"
    assert normalised("ﬁne Straße") == "fine strasse"
    assert normalised("हिन्दी में?") == "हिन्दी में"
    assert normalised("→ ?") == "→ ?"


def test_near_duplicates_are_those_of_a_brute_force_search():
    draw = random.Random(0)
    words = [
        "red",
        "lamp",
        "cost",
        "euros",
        "which",
        "what",
        "how",
        "many",
        "old",
        "blue",
        "made",
        "year",
        "room",
        "the",
    ]
    questions = [" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(130)]
    questions += [" ".join(q.split()[:-1]) + " x" for q in draw.choices(questions, k=80)]
    for threshold in (0.5, 0.8, 1.0):
        kept, seen, caught = [], Duplicates(threshold), 0
        for question in questions:
            own = shingles(question)
            near = any(
                len(own & shingles(other)) / len(own | shingles(other)) >= threshold
                for other in kept
            )
            assert (question in seen) == near, question
            caught += near
            if not near:
                kept.append(question)
                seen.add(question)
        assert 0 < caught < len(questions)


def test_equal_questions_are_found_whatever_the_threshold():
    seen = Duplicates(None)
    seen.add("Which lamp is red?")
    assert "which LAMP is red" in seen
    assert "which lamp is red now" not in seen


@pytest.mark.parametrize(
    "options", [{"repetition": 1.1}, {"copied": -0.1}, {"duplicates": 0}, {"min_answer_tokens": 0}]
)
def test_bad_filters_are_refused(options):
    with pytest.raises(InvalidArgument, match="found"):
        Filters(**options)
