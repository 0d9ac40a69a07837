"""Grading of free answers: closed forms, and a brute-force longest common subsequence."""

from __future__ import annotations

import itertools
import random

import pytest

from kvedit.errors import InvalidArgument
from kvedit.evals import Task, needle_tasks
from kvedit.evals.recall import (
    Document,
    RecallQuestion,
    by_document,
    choice_question,
    chosen,
    contains,
    joined,
    overlap,
)
from kvedit.evals.recall.grading import grade

OPTIONS = ("renal failure", "acute renal failure", "Gout", "none of these")


def test_free_answers_are_graded_as_asked() -> None:
    asked = RecallQuestion("Who?", ("Ann Lee", "A. Lee"))
    assert grade(asked, "the Ann Lee!") == {"em": 1, "f1": 1, "contains": 1}
    # Words ann, bo, lee against ann, lee: 2 * 2 / 5.
    assert grade(asked, "Ann Bo Lee") == {"em": 0, "f1": pytest.approx(0.8), "contains": 0}
    assert grade(RecallQuestion("Who?", ("Ann",), grading=("contains",)), "x ann.") == {
        "contains": 1
    }
    assert grade(RecallQuestion("Who?"), "Ann") == {}


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("it is 60  days.", "60 Days", 1),
        ("it is 160 days", "60 days", 0),
        ("category", "cat", 0),
        ("(cat)", "cat", 1),
        ("costs $5.", "$5", 1),
        ("", "cat", 0),
    ],
)
def test_containing_is_by_whole_words(answer: str, expected: str, found: float) -> None:
    assert contains(answer, expected) == found


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", 1),
        (" b", None),
        ("B. acute renal failure", 1),
        ("(C) Gout", 2),
        ("**D**", 3),
        ("A man had gout", 2),  # the article is no letter
        ("A man", None),
        ("The answer is C.", 2),
        ("The correct option: (A)", 0),
        ("E. unknown", None),
        ("acute renal failure", 1),  # the shorter option within it is no second answer
        ("It was renal failure", 0),
        ("gout or renal failure", None),
        ("C\nBecause", 2),
        ("", None),
    ],
)
def test_the_option_that_a_free_answer_names(answer: str, option: int | None) -> None:
    asked = choice_question("What?", OPTIONS, 1)
    assert chosen(asked, answer) == option
    assert grade(asked, answer) == {"choice_free": float(option == 1)}


def test_without_letters_a_letter_says_nothing() -> None:
    asked = choice_question("What?", OPTIONS, 1, letters=False)
    assert chosen(asked, "B") is None
    assert chosen(asked, "Gout, surely") == 2
    assert asked.prompt == "\nQuestion: What?\nAnswer:" and asked.gold == OPTIONS[1]


def brute(a: list[int], b: list[int]) -> int:
    """Longest common subsequence: the largest choice of a's elements that b has in order."""
    for size in range(len(a), 0, -1):
        for picked in itertools.combinations(a, size):
            rest = iter(b)
            if all(token in rest for token in picked):
                return size
    return 0


def test_overlap_is_rouge_l() -> None:
    drawn = random.Random(0)
    for _ in range(60):
        a = [drawn.randrange(4) for _ in range(drawn.randrange(1, 9))]
        b = [drawn.randrange(4) for _ in range(drawn.randrange(1, 9))]
        assert overlap(a, b) == pytest.approx(2 * brute(a, b) / (len(a) + len(b)))
    assert (overlap([], []), overlap([1], []), overlap([], [1])) == (1, 0, 0)


def test_a_question_that_can_not_be_graded_is_refused() -> None:
    for changes, message in (
        ({"prompt": " "}, "empty"),
        ({"answers": ("a", " ")}, "empty"),
        ({"grading": ("bleu",)}, "bleu"),
        ({"correct": 0}, "no choices"),
        ({"choices": ("a",), "correct": 0}, "2 to 26"),
        ({"choices": ("a", "b")}, "index of 2"),
        ({"choices": ("a", "b"), "correct": 2}, "found 2"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            RecallQuestion(**{"prompt": "Who?", **changes})
    with pytest.raises(InvalidArgument, match="no text"):
        Document("d", " ", ())


def test_keys_tell_questions_and_documents_apart() -> None:
    asked = RecallQuestion("Who?", ("Ann",))
    one, two = (Document(name, "text", (asked,)).questions[0] for name in "ab")
    assert (one.document, two.document) == ("a", "b")
    assert len({asked.key, one.key, two.key, RecallQuestion("Who?", ("Bo",)).key}) == 4
    assert RecallQuestion("Who?", ("Ann",)).key == asked.key


def test_tasks_are_grouped_by_their_context() -> None:
    tasks = needle_tasks(2, words=20, depths=(0.0, 1.0))
    documents = by_document(tasks)
    assert len(documents) == len({task.context for task in tasks}) == 4
    (question,) = documents[0].questions
    assert question.grading == ("contains",) and question.answers == tasks[0].answers
    assert dict(question.facts)["depth"] == 0.0
    squad = [
        Task("qa", text, text, f"{text}?", ("x",), facts=(("title", "T"),))
        for text in ("one", "two", "one more", "one")
    ]
    again = Task("qa", "one", "one", "again?", ("y",), facts=(("title", "T"),))
    named = by_document([*squad[:3], again])
    assert [d.name for d in named] == ["T (1)", "T (2)", "T (3)"]
    assert [len(d.questions) for d in named] == [2, 1, 1]


def test_joined_documents_keep_where_questions_came_from() -> None:
    parts = [Document(n, f"text {n}", (RecallQuestion("Who?", (n,)),)) for n in "ab"]
    whole = joined(parts, "all")
    assert whole.text == "text a\n\ntext b"
    assert [dict(q.facts)["part"] for q in whole.questions] == ["a", "b"]
    assert {q.document for q in whole.questions} == {"all"}
    with pytest.raises(InvalidArgument, match="none"):
        joined([], "all")
