"""Sets: what every case must offer, whoever drew it; files of others, and files that are wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals import (
    Conflict,
    Rule,
    Task,
    capitals,
    fact_conflicts,
    instruction_tasks,
    needle_tasks,
    read_counterfact,
    read_known_facts,
    read_squad,
)
from kvedit.evals.facts import facts, relations
from kvedit.evals.filler import filler


def test_the_table_has_each_subject_once_and_enough_facts() -> None:
    for name in relations():
        subjects = [fact.subject for fact in facts(name)]
        assert len(set(subjects)) == len(subjects)
        assert all(fact.value.strip() == fact.value != "" for fact in facts(name))
    assert sum(len(facts(name)) for name in relations()) >= 300
    known = {fact.subject: fact.value for fact in facts("capital")}
    assert (known["France"], known["Japan"]) == ("Paris", "Tokyo")
    with pytest.raises(UnknownName, match="capital"):
        facts("capitals")


@pytest.mark.parametrize("seed", [0, 1])
def test_conflicts_offer_all_kinds_of_questions(seed: int) -> None:
    cases = fact_conflicts(240, seed)
    assert len({case.key for case in cases}) == 240
    for case in cases:
        assert case.context.count(case.span_text) == 1
        assert case.span_text == f"t{case.prompt[2:]}{case.new}."
        assert case.context.endswith(".") and "Currently, " + case.span_text in case.context
        assert case.old != case.new and case.old.startswith(" ")
        assert f"{case.old}. Currently" in case.context
        assert len(case.paraphrases) == 3 and len(set(case.questions)) == 4
        assert len(case.unrelated) == 2 and len(case.neighbourhood) == 2
        for prompt in case.unrelated:
            assert prompt.strip() in case.context
            stated = case.context.split(prompt.strip())[1].split(".")[0]
            assert stated not in (case.new, case.old)
        for prompt in case.neighbourhood:
            assert prompt.strip() not in case.context
            assert prompt[:8] == case.prompt[:8]


def test_a_draw_is_the_seeds_and_capitals_are_capitals() -> None:
    assert fact_conflicts(20, 3) == fact_conflicts(20, 3)
    assert fact_conflicts(20, 3) != fact_conflicts(20, 4)
    assert all(case.prompt.startswith(" The capital of") for case in capitals(30))
    with pytest.raises(InvalidArgument, match="facts"):
        capitals(1000)


def test_a_conflict_survives_json_and_refuses_nonsense() -> None:
    case = fact_conflicts(1)[0]
    assert Conflict.from_json(json.loads(json.dumps(case.to_json()))) == case
    with pytest.raises(InvalidArgument, match="not in the context"):
        Conflict("a b", "c", " p", " x", " y")
    with pytest.raises(InvalidArgument, match="no conflict"):
        Conflict("a b", "a", " p", " x", "x ")
    with pytest.raises(InvalidArgument, match="empty"):
        Conflict("a b", "a", " p", " x", " y", paraphrases=("",))
    with pytest.raises(InvalidArgument, match="expected the keys"):
        Conflict.from_json({"context": "a"})


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def record(subject: str, new: str, true: str) -> dict[str, Any]:
    return {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
        },
        "paraphrase_prompts": [f"Rain fell. {subject}, a native", f"{subject} spoke the language"],
        "neighborhood_prompts": ["Montesquieu is a native speaker of", "Rabelais spoke", "x y"],
    }


def test_counterfact_is_put_in_context(tmp_path: Path) -> None:
    data = [record("Darrieux", "English", "French"), record("Goethe", "Czech", "German")]
    cases = read_counterfact(write(tmp_path / "cf.json", data))
    assert cases[0].context == (
        "The mother tongue of Goethe is German. Previously, The mother tongue of Darrieux is "
        "French. Currently, The mother tongue of Darrieux is English."
    )
    assert cases[0].span_text == "The mother tongue of Darrieux is English."
    assert (cases[0].new, cases[0].old) == (" English", " French")
    assert cases[0].paraphrases[1] == " Darrieux spoke the language"
    assert cases[0].unrelated == (" The mother tongue of Goethe is",)
    assert cases[0].neighbourhood == (" Montesquieu is a native speaker of", " Rabelais spoke")
    assert read_counterfact(tmp_path / "cf.json", 1, seed=1)[0] in cases


def test_known_facts_are_paired_within_their_relation(tmp_path: Path) -> None:
    rows = [
        ("Rome", "Italy", "Rome, in", "P17"),
        ("Oslo", "Norway", "Oslo, in", "P17"),
        ("Lima", "Peru", "Lima, in", "P17"),
        ("Cusco", "Peru", "Cusco, in", "P17"),
        ("Chopin", "piano", "Chopin played the", "P1303"),
        ("Bach", "organ", "Bach played the", "P1303"),
        ("Nobody", "alone", "Nobody is", "P1"),
    ]
    keys = ("subject", "attribute", "prompt", "relation_id")
    data = [dict(zip(keys, row, strict=True)) for row in rows]
    cases = read_known_facts(write(tmp_path / "known.json", data))
    assert len(cases) == 6
    known = {f" {prompt}": f" {value}" for _, value, prompt, _ in rows}
    for case in cases:
        country = "in" in case.prompt.split()
        values = {" Italy", " Norway", " Peru"} if country else {" piano", " organ"}
        assert {case.new, case.old} <= values
        assert case.unrelated[0].strip() in case.context
        for prompt in case.neighbourhood:
            assert known[prompt] not in (case.new, case.old)
    assert read_known_facts(tmp_path / "known.json", 3, 5) == read_known_facts(
        tmp_path / "known.json", 3, 5
    )


@pytest.mark.parametrize("read", [read_counterfact, read_known_facts, read_squad])
def test_files_of_another_shape_are_refused_by_name(read: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"absent\.json"):
        read(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('[{"a": ')
    with pytest.raises(InvalidArgument, match=r"torn\.json"):
        read(tmp_path / "torn.json")
    with pytest.raises(InvalidArgument, match=r"odd\.json"):
        read(write(tmp_path / "odd.json", [{"subject": "x"}]))
    with pytest.raises(InvalidArgument, match=r"odd\.json"):
        read(write(tmp_path / "odd.json", {"rows": 3}))


def squad() -> dict[str, Any]:
    first = "Tom sells lamps. The window is 60 days. Keep it."
    second = "Ann sells clocks."
    asked = [
        {"id": "1", "question": "How long? ", "answers": [
            {"text": "60 days", "answer_start": first.index("60")},
            {"text": "60 days", "answer_start": first.index("60")},
        ]},
        {"id": "2", "question": "Unanswerable?", "answers": []},
    ]  # fmt: skip
    other = [{"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}]
    paragraphs = [{"context": first, "qas": asked}, {"context": second, "qas": other}]
    return {"data": [{"title": "Shops", "paragraphs": paragraphs}]}


def test_squad_gives_the_sentence_with_the_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "squad.json", squad())
    first, second = read_squad(path)
    assert first.span_text == "The window is 60 days."
    assert first.answers == ("60 days",)
    assert first.prompt == "\nQuestion: How long?\nAnswer:"
    assert (second.span_text, second.context) == ("Ann sells clocks.", "Ann sells clocks.")
    whole = read_squad(path, context="article")
    assert whole[1].context.startswith("Tom sells") and whole[1].context.endswith("clocks.")
    assert len(read_squad(path, 1)) == 1
    with pytest.raises(InvalidArgument, match="2 questions"):
        read_squad(path, 3)


def test_instructions_stand_amid_other_text() -> None:
    tasks = instruction_tasks(24, seed=2)
    assert len({task.key for task in tasks}) == 24
    assert set(Counter(task.rule.name for task in tasks).values()) == {4}
    for task in tasks:
        before, _, behind = task.context.partition(task.rule.instruction)
        assert task.span_text == task.rule.instruction
        assert before and task.context.count(task.rule.instruction) == 1
        assert len((before + behind).split()) > 60
    with pytest.raises(UnknownName, match="uppercase"):
        instruction_tasks(1, rules=["upper"])
    with pytest.raises(InvalidArgument, match="number or phrase"):
        Rule("bullets")


def test_needles_differ_in_depth_only() -> None:
    depths = (0.0, 0.5, 1.0)
    tasks = needle_tasks(4, seed=1, depths=depths, words=200, decoys=3)
    assert len(tasks) == 12
    for start in range(0, 12, 3):
        group = tasks[start : start + 3]
        assert len({(task.prompt, task.answers) for task in group}) == 1
        places = [task.context.index(task.span_text) / len(task.context) for task in group]
        assert places[0] == 0 and 0.35 < places[1] < 0.65
        assert group[2].context.endswith(group[2].span_text)
        assert (
            len({task.context.replace(task.span_text, "").replace(" ", "") for task in group}) == 1
        )
        for task in group:
            assert task.context.count(task.answers[0]) == 1
            assert task.context.count("The code for the door") == 4
    with pytest.raises(InvalidArgument, match="depths"):
        needle_tasks(1, depths=[1.5])


def test_filler_is_long_enough_and_repeats_only_when_used_up() -> None:
    assert filler(0) == []
    sentences = filler(200, 3)
    assert sum(len(s.split()) for s in sentences) >= 200
    assert len(set(sentences)) == len(sentences)
    assert filler(200, 3) == sentences != filler(200, 4)
    assert len(filler(2000)) > 100


def test_a_task_that_cannot_be_graded_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="lacks"):
        Task("needle", "a b", "a", "?")
    with pytest.raises(InvalidArgument, match="lacks"):
        Task("qa", "a b", "a", "?", answers=("b",), rule=Rule("json"))
    with pytest.raises(InvalidArgument, match="not in the context"):
        Task("qa", "a b", "c", "?", answers=("b",))
