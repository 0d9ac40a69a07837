"""Sets from a path: files in the shapes of others, written here, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals import read_squad
from kvedit.evals.recall import (
    by_document,
    read_choices,
    read_documents,
    read_longhealth,
    read_mtob,
    read_qasper,
)


def written(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def question(number: int, correct: str = "four") -> dict[str, Any]:
    words = ("one", "two", "three", "four", "five")
    options = {f"answer_{letter}": word for letter, word in zip("abcde", words, strict=True)}
    return {"No": number, "question": f"How many {number}?", **options, "correct": correct}


PATIENTS = {
    "patient_01": {
        "name": "Ann Lee",
        "birthday": "1970-01-02",
        "diagnosis": "Gout",
        "texts": {"text_0": "First letter.", "text_1": "Second letter."},
        "questions": [question(0), question(1, "C")],
    },
    "patient_02": {"texts": {"text_0": "Other."}, "questions": [question(2)]},
}


def test_longhealth(tmp_path: Path) -> None:
    path = written(tmp_path / "longhealth.json", PATIENTS)
    first, second = read_longhealth(path)
    assert (first.name, second.name) == ("patient_01", "patient_02")
    assert first.text == (
        "name: Ann Lee, birthday: 1970-01-02, diagnosis: Gout\n\nFirst letter.\n\nSecond letter."
    )
    assert second.text == "Other."
    asked = first.questions[0]
    assert asked.prompt == (
        "\nQuestion: How many 0?\nA. one\nB. two\nC. three\nD. four\nE. five\n"
        "Answer with the letter of the right option.\nAnswer:"
    )
    assert (asked.correct, asked.gold, asked.continuations) == (3, "D", tuple("ABCDE"))
    assert (first.questions[1].correct, asked.document) == (2, "patient_01")
    bare = read_longhealth(path, patients=["patient_02"], letters=False)[0].questions[0]
    assert bare.prompt == "\nQuestion: How many 2?\nAnswer:" and bare.gold == "four"
    with pytest.raises(UnknownName, match="patient_02"):
        read_longhealth(path, patients=["patient_2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": [question(0), question(1, "six")]}, "question 1.*'six' is none of"),
        ({"questions": [{"question": "Who?"}]}, "question 0.*answer_a"),
        ({"questions": {}}, "questions: expected list, found dict"),
        ({"texts": {}}, "texts: expected a text"),
        ({"texts": {"a": 3}}, "texts: expected str, found int"),
    ],
)
def test_a_broken_patient_is_named(tmp_path: Path, change: Any, message: str) -> None:
    broken = {"patient_01": {**PATIENTS["patient_01"], **change}}
    path = written(tmp_path / "longhealth.json", broken)
    with pytest.raises(InvalidArgument, match=rf"longhealth.json, patient patient_01.*{message}"):
        read_longhealth(path)


def arc(**changes: Any) -> dict[str, Any]:
    labelled = [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}]
    row = {"question": {"stem": "Ice is?", "choices": labelled}, "answerKey": "B"}
    return {**row, "context": "A book.", **changes}


def test_arc_in_both_of_its_shapes(tmp_path: Path) -> None:
    flat = {"question": "Fire is?", "choices": {"text": ["hot", "cold"], "label": ["1", "2"]}}
    rows = [
        arc(),
        {**flat, "answerKey": "1", "documents": ["A book."]},
        {**flat, "answerKey": "2", "documents": ["One.", "Two."]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    one, two = read_choices(written(tmp_path / "arc.jsonl", lines))
    assert [q.correct for q in one.questions] == [1, 0]
    assert (one.text, two.text) == ("A book.", "One.\n\nTwo.")
    assert one.questions[0].choices == ("hot", "cold") and one.questions[0].grading == ()
    bare = [{key: value for key, value in rows[0].items() if key != "context"}]
    path = written(tmp_path / "arc.json", bare)
    assert read_choices(path, context="All.")[0].text == "All."
    with pytest.raises(InvalidArgument, match=r"arc.json, row 0.*context= in the call"):
        read_choices(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (arc(answerKey="C"), "'C' is none of the labels"),
        ({"context": "x"}, "KeyError: 'question'"),
        (arc(context=3), "context: expected list, found int"),
        (arc(context=["", "x"]), "none empty"),
        (arc(question={"stem": "x", "choices": [{"text": "a", "label": "C"}]}, answerKey="C"),
         "2 to 26"),
        (arc(question={"stem": "x", "choices": 3}), "TypeError"),
        ("text", "expected an object, found str"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = written(tmp_path / "arc.json", [arc(), row])
    with pytest.raises(InvalidArgument, match=rf"arc.json, row 1.*{message}"):
        read_choices(path)


def test_files_that_are_none_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"absent\.json"):
        read_choices(tmp_path / "absent.json")
    with pytest.raises(InvalidArgument, match=r"absent\.jsonl"):
        read_choices(tmp_path / "absent.jsonl")
    broken = written(tmp_path / "broken.jsonl", json.dumps(arc()) + "\n{")
    with pytest.raises(InvalidArgument, match=r"broken.jsonl, line 2"):
        read_choices(broken)
    for data in ({}, [], "[3"):
        path = written(tmp_path / "other.json", data)
        for read in (read_choices, read_documents, read_longhealth, read_qasper):
            with pytest.raises(InvalidArgument, match=r"other.json"):
                read(path)


def answer(**changes: Any) -> dict[str, Any]:
    blank = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}
    return {"answer": {**blank, **changes}}


def paper(*qas: Any) -> dict[str, Any]:
    sections = [
        {"section_name": "Methods", "paragraphs": ["We read.", ""]},
        {"section_name": None, "paragraphs": ["We wrote."]},
    ]
    return {"title": "A paper", "abstract": "Short.", "full_text": sections, "qas": list(qas)}


def test_qasper_accepts_every_annotators_answer(tmp_path: Path) -> None:
    asked = paper(
        {"question": "What?", "answers": [answer(extractive_spans=["a", "b c"]),
                                          answer(free_form_answer=" both ")]},
        {"question": "Is it?", "answers": [answer(yes_no=False), answer(yes_no=True)]},
        {"question": "Why?", "answers": [answer(unanswerable=True)]},
        {"question": "Hidden?", "answers": []},
    )  # fmt: skip
    path = written(tmp_path / "qasper.json", {"1909.1": asked, "empty": paper()})
    (document,) = read_qasper(path, instruction="Be short.")
    assert document.text == "A paper\n\nShort.\n\nMethods\n\nWe read.\n\nWe wrote."
    what, is_it, why = document.questions
    assert what.prompt == "\nQuestion: What?\nBe short.\nAnswer:"
    assert what.answers == ("a, b c", "both") and what.grading == ("f1",)
    assert is_it.answers == ("No", "Yes") and why.answers == ("Unanswerable",)
    types = [dict(q.facts)["type"] for q in document.questions]
    assert types == ["extractive", "boolean", "none"]
    assert len(read_qasper(path, answerable_only=True)[0].questions) == 2


def test_a_broken_paper_is_named(tmp_path: Path) -> None:
    good = {"question": "What?", "answers": [answer(yes_no=True)]}
    for asked, message in (
        (paper(good, {"question": "What?"}), "question 1.*KeyError: 'answers'"),
        (paper({"question": "What?", "answers": [answer()]}), "question 0.*neither unanswerable"),
        ({**paper(good), "full_text": "all"}, "full_text: expected list"),
        ({"qas": []}, "KeyError: 'title'"),
    ):
        path = written(tmp_path / "qasper.json", {"1909.1": asked})
        with pytest.raises(InvalidArgument, match=rf"qasper.json, paper 1909.1.*{message}"):
            read_qasper(path)
    hidden = written(tmp_path / "test.json", {"p": paper({"question": "W?", "answers": []})})
    with pytest.raises(InvalidArgument, match="no question has an answer"):
        read_qasper(hidden)


def test_mtob_leaves_out_its_canary(tmp_path: Path) -> None:
    book = written(tmp_path / "grammar.txt", "All about words.")
    pairs = [
        {"big-bench-canary": "x"},
        {"original": "mu bo", "ground_truth": "they go", "translation": "-----"},
        {"original": "an bo", "translation": "I go"},
    ]
    document = read_mtob(book, written(tmp_path / "pairs.json", pairs))
    assert (document.name, document.text) == ("grammar", "All about words.")
    assert [q.answers for q in document.questions] == [("they go",), ("I go",)]
    assert document.questions[0].prompt == (
        "\nTranslate this sentence from Kalamang to English.\nKalamang: mu bo\nEnglish:"
    )
    assert document.questions[0].grading == ("chrf",)
    for rows, message in (
        ([*pairs, {"original": "x"}], "row 3.*'translation'"),
        ([*pairs, {"ground_truth": "x"}], "row 3.*'original'"),
        ([{"canary": ""}], "no sentence pair"),
    ):
        path = written(tmp_path / "pairs.json", rows)
        with pytest.raises(InvalidArgument, match=rf"pairs.json.*{message}"):
            read_mtob(book, path)
    with pytest.raises(InvalidArgument, match="absent"):
        read_mtob(tmp_path / "absent.txt", path)


def test_your_own_documents(tmp_path: Path) -> None:
    written(tmp_path / "manual.txt", "The window is 60 days.")
    rows = [
        {"path": "manual.txt", "question": "How long?", "answer": "60 days", "hard": 1},
        {"path": "manual.txt", "question": "Long?", "answers": [" yes ", "it is"]},
        {"document": "Other.", "name": "other", "question": "Who?", "choices": ["Ann", "Bo"],
         "correct": "Bo"},
        {"document": "Other.", "question": "Whose?", "choices": ["Ann", "Bo"], "correct": 0},
    ]  # fmt: skip
    manual, other = read_documents(written(tmp_path / "mine.json", rows))
    assert (manual.name, other.name) == ("manual", "other")
    assert manual.text == "The window is 60 days."
    assert manual.questions[0].facts == (("hard", 1),)
    assert manual.questions[1].answers == ("yes", "it is")
    assert [q.correct for q in other.questions] == [1, 0]
    assert other.questions[0].letters and "A. Ann" in other.questions[0].prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "answer": "y"}, "either document or path"),
        ({"document": "x", "path": "y", "question": "x", "answer": "y"}, "either document or path"),
        ({"path": "absent.txt", "question": "x", "answer": "y"}, "absent.txt"),
        ({"document": " ", "question": "x", "answer": "y"}, "document is empty"),
        ({"document": "x", "question": "x"}, "'answer'"),
        ({"document": "x", "question": "x", "answer": ""}, "none empty"),
        ({"document": "x", "question": "x", "answer": 3}, "expected list, found int"),
        ({"document": "x", "question": "x", "choices": ["a", "b"], "correct": "c"}, "none of the"),
        ({"document": "x", "question": "x", "choices": ["a", "b"], "correct": 2}, "index of 2"),
        ({"document": "x", "question": "x", "choices": ["a", "b"]}, "'correct'"),
        ({"document": "x", "question": "x", "answer": "y", "tags": []}, "text or a number"),
    ],
)
def test_your_own_broken_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"document": "A text.", "question": "Who?", "answer": "Ann"}
    path = written(tmp_path / "mine.json", [good, row])
    with pytest.raises(InvalidArgument, match=rf"mine.json, row 1.*{message}"):
        read_documents(path)


def test_two_documents_of_one_name_are_refused(tmp_path: Path) -> None:
    rows = [{"document": t, "name": "n", "question": "W?", "answer": "x"} for t in ("a", "b")]
    with pytest.raises(InvalidArgument, match="called 'n'"):
        read_documents(written(tmp_path / "mine.json", rows))


def test_an_article_is_a_document_with_all_of_its_questions(tmp_path: Path) -> None:
    def paragraph(text: str, word: str) -> dict[str, Any]:
        given = [{"text": word, "answer_start": text.index(word)}]
        return {"context": text, "qas": [{"question": f"{word}?", "answers": given}]}

    paragraphs = [paragraph("Ann came first.", "Ann"), paragraph("Bo came last.", "Bo")]
    data = {"data": [{"title": "People", "paragraphs": paragraphs}]}
    path = written(tmp_path / "squad.json", data)
    (article,) = by_document(read_squad(path, context="article"))
    assert (article.name, article.text) == ("People", "Ann came first.\nBo came last.")
    assert [q.answers for q in article.questions] == [("Ann",), ("Bo",)]
    assert len(by_document(read_squad(path))) == 2
