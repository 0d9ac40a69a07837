"""Problems: drawn by a seed, of reasoning-gym, and from files in others' shapes."""

from __future__ import annotations

import builtins
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from kvedit.errors import InvalidArgument, MissingDependency, UnknownName
from kvedit.evals.steering import (
    choice_problems,
    gym_choices,
    gym_problems,
    is_right,
    read_arc,
    read_gsm8k,
    unrelated_prompts,
    word_problems,
)
from kvedit.steering import arithmetic_questions

# Each story solved again, from its numbers in order.
SOLVED = {
    "bakery": lambda trays, each, sold: trays * each - sold,
    "savings": lambda start, week, weeks: start + week * weeks,
    "twice": lambda count: 3 * count,
    "boxes": lambda total, each: total // each,
    "ages": lambda age, older, years: age + older + years,
    "garden": lambda long, wide: 2 * (long + wide),
}


def solved(question) -> int:
    numbers = map(int, re.findall(r"\d+", question.prompt.split("\n")[0]))
    return SOLVED[dict(question.facts)["story"]](*numbers)


def test_word_problems_are_right_different_and_drawn_by_the_seed() -> None:
    found = word_problems(200, seed=1)
    assert len({q.key for q in found}) == 200
    assert {dict(q.facts)["story"] for q in found} == set(SOLVED)
    for question in found:
        assert question.answers == (str(solved(question)),)
        assert is_right(question, f"So the answer is {solved(question)}.") == 1
    assert word_problems(50, seed=1) == found[:50] and word_problems(50, seed=2) != found[:50]
    theirs = {q.question for q in arithmetic_questions(300)}
    assert not theirs & {q.prompt for q in found}
    with pytest.raises(InvalidArgument):
        word_problems(0)


@pytest.mark.parametrize("options", [2, 4, 6])
def test_choices_hold_the_right_answer_once(options: int) -> None:
    found = choice_problems(80, seed=3, options=options)
    for question in found:
        assert len(set(question.choices)) == options
        assert question.choices[question.correct] == str(solved(question))
        assert question.prompt.splitlines()[1 + question.correct].endswith(f". {solved(question)}")
        assert all(int(choice) > 0 for choice in question.choices)
    assert len({question.correct for question in found}) == options
    with pytest.raises(InvalidArgument):
        choice_problems(3, options=7)


def test_unrelated_prompts_differ() -> None:
    found = unrelated_prompts(400)
    assert len(set(found)) == 400 and "{" not in "".join(found)
    assert unrelated_prompts(400, 1) != found == unrelated_prompts(400)
    with pytest.raises(InvalidArgument, match="unrelated prompts"):
        unrelated_prompts(10_000)


def test_gsm8k_and_arc_are_read(tmp_path) -> None:
    rows = [
        {"question": " How many? ", "answer": "3 * 4 = <<3*4=12>>12\n#### 1,200"},
        {"question": "How old?", "answer": "#### -3"},
    ]
    path = tmp_path / "gsm.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_gsm8k(path)
    assert [(q.prompt, q.answers) for q in found] == [
        ("How many?", ("1200",)),
        ("How old?", ("-3",)),
    ]
    assert read_gsm8k(path, 1, seed=4) == read_gsm8k(path, 1, seed=4)
    with pytest.raises(InvalidArgument, match="2 problems"):
        read_gsm8k(path, 3)
    path.write_text(json.dumps({"question": "a", "answer": "b"}))
    with pytest.raises(InvalidArgument, match=r"row 0.*####"):
        read_gsm8k(path)
    old = {
        "question": {"stem": "Which?", "choices": [{"text": t, "label": n} for t, n in
                                                    (("ice", "1"), ("fire", "2"))]},
        "answerKey": "2",
    }  # fmt: skip
    new = {
        "question": "What?",
        "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    path.write_text("\n".join(map(json.dumps, (old, new))))
    first, second = read_arc(path)
    assert first.prompt == "Which?\nA. ice\nB. fire" and (first.correct, second.correct) == (1, 0)
    assert is_right(first, "Fire is hot, so the answer is B.") == 1
    path.write_text(json.dumps({**new, "answerKey": "C"}))
    with pytest.raises(InvalidArgument, match="row 0"):
        read_arc(path)


@pytest.fixture
def stand_in(monkeypatch):
    """A library of the shape of reasoning-gym, so that the reading is tested without it."""

    def create_dataset(name, size, seed, **options):
        words = ["red", "green", "blue", "grey", "pink"]
        kinds = {
            "sums": lambda i: str(i + seed),
            "words": lambda i: words[i % 5],
            "same": lambda i: "x",
        }
        # A question may come twice.
        return [
            {
                "question": f"{name} {max(i, 1)} {options.get('unit', '')}".strip(),
                "answer": kinds[name](i),
            }
            for i in range(size)
        ]

    library = ModuleType("reasoning_gym")
    library.create_dataset = create_dataset
    factory = SimpleNamespace(DATASETS={"sums": 1, "words": 1, "same": 1})
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def test_gym_problems_come_in_turn(stand_in) -> None:
    found = gym_problems(7, seed=2, tasks=("sums", "words"), sums={"unit": "coins"})
    assert [dict(q.facts)["task"] for q in found] == ["sums", "words"] * 3 + ["sums"]
    assert len({q.prompt for q in found}) == 7
    assert found[0].prompt == "sums 1 coins" and found[0].answers == ("3",)
    with pytest.raises(UnknownName, match="sums"):
        gym_problems(2, tasks=("sum",))
    with pytest.raises(InvalidArgument):
        gym_problems(0)


def test_gym_options_are_answers_of_the_same_task(stand_in) -> None:
    for question in gym_choices(9, tasks=("words", "sums")):
        assert len(set(question.choices)) == 4 and question.letters
        numbers = [choice.isdigit() for choice in question.choices]
        assert all(numbers) == (dict(question.facts)["task"] == "sums") == any(numbers)
    right = {
        q.prompt.splitlines()[0]: q.choices[q.correct] for q in gym_choices(5, tasks=("words",))
    }
    assert right["words 2"] == "blue"
    with pytest.raises(InvalidArgument, match="alone"):
        gym_choices(2, tasks=("same",))


def test_a_missing_library_names_the_extra(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    load = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "reasoning_gym":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"kvedit\[reasoning\]"):
        gym_problems(1)


def test_the_library_itself() -> None:
    pytest.importorskip("reasoning_gym")
    found = gym_problems(9, seed=1)
    assert len({q.key for q in found}) == 9 and found == gym_problems(9, seed=1)
    assert all(is_right(q, f"The answer is {q.gold}.") == 1 for q in found)
    for question in gym_choices(6, seed=1):
        assert is_right(question, f"The answer is {'ABCD'[question.correct]}.") == 1
