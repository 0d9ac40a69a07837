"""Checks and scores as pure functions: answers that keep a rule, and answers that nearly do."""

from __future__ import annotations

import math

import pytest

from kvedit.evals import Rule, Task, ngram_entropy
from kvedit.evals.checks import RULES
from kvedit.evals.fluency import words
from kvedit.evals.tasks import exact_match, grade, token_f1

KEPT = {
    "json": ['{"a": 1}', " [1, 2]\n", '```json\n{"a": [true]}\n```', "```\n[]\n```"],
    "uppercase": ["YES.", "ÄÖ 12, OK!"],
    "lowercase": ["yes.", "no 12!"],
    "no_commas": ["one; two", "x"],
    "bullets": ["* a\n* b", "Here:\n - a\n - b", "• a\ntext\n• b"],
    "ends_with": ["So it is. The End", '"It was the END"', "the end  \n"],
}
BROKEN = {
    "json": ["{'a': 1}", '{"a": 1', "5", "true", '{"a": 1} done', "", '"text"'],
    "uppercase": ["Yes", "12", "", "YEs"],
    "lowercase": ["Yes", "12", ""],
    "no_commas": ["a, b", "", "  "],
    "bullets": ["* a", "* a\n* b\n* c", "a * b\n- \n* x", "*a\n*b"],
    "ends_with": ["the end.", "the end of it", ""],
}


def rule(name: str) -> Rule:
    return Rule(name, number=2, phrase="the end")


def test_every_rule_has_answers_of_both_kinds() -> None:
    assert set(KEPT) == set(BROKEN) == set(RULES)


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, texts in KEPT.items() for a in texts])
def test_rules_that_are_kept(name: str, answer: str) -> None:
    assert rule(name).holds(answer)


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, texts in BROKEN.items() for a in texts])
def test_rules_that_are_broken(name: str, answer: str) -> None:
    assert not rule(name).holds(answer)


def test_instructions_name_their_number_and_phrase() -> None:
    assert "2 bullet points" in rule("bullets").instruction
    assert rule("ends_with").instruction.endswith("the end")


def test_squad_scores_by_hand() -> None:
    assert exact_match("The Panthers!", "panthers") == 1
    assert exact_match("the panther", "panthers") == 0
    # words: carolina panthers won | carolina panthers -> precision 2/3, recall 1
    assert token_f1("Carolina Panthers won", "the Carolina Panthers") == pytest.approx(0.8)
    # one common "a b" each: b twice given, once wanted -> 1 common of 2 and 1
    assert token_f1("blue blue", "blue") == pytest.approx(2 / 3)
    assert token_f1("red", "blue") == 0
    assert token_f1("", "blue") == 0


def test_grades_take_the_best_answer() -> None:
    task = Task("qa", "a b", "a", "?", answers=("red", "dark blue"))
    assert grade(task, " Blue") == {"passed": 0.0, "f1": pytest.approx(2 / 3)}
    assert grade(task, "the dark blue.") == {"passed": 1.0, "f1": 1.0}
    needle = Task("needle", "a b", "a", "?", answers=("4821",))
    assert grade(needle, " it is 4821, sir") == {"passed": 1.0}
    assert grade(needle, " 4812") == {"passed": 0.0}
    ruled = Task("instruction", "a b", "a", "?", rule=Rule("json"))
    assert grade(ruled, "{}") == {"passed": 1.0}


def test_entropy_by_hand() -> None:
    assert words("It's 60 days, ok") == ["It", "'", "s", "60", "days", ",", "ok"]
    # Four different pairs and three different triples: log2 4 and log2 3.
    expected = (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2
    assert ngram_entropy("a b c d e") == pytest.approx(expected)
    assert ngram_entropy("no no no no no no") == 0
    # "a b a b a": pairs ab x2, ba x2; triples aba x2, bab x1.
    third = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * third) / 2)
    assert ngram_entropy("two words") is None
