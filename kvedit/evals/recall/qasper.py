"""Questions over papers, from a file in QASPER's shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.readers import load_json
from kvedit.evals.recall.prompts import open_question
from kvedit.evals.recall.question import Document, RecallQuestion
from kvedit.evals.recall.rows import expect, reading_row

__all__ = ["UNANSWERABLE", "read_qasper"]

UNANSWERABLE = "Unanswerable"
"""The answer that QASPER's own scorer expects where the paper does not say."""

_SHAPE = (
    "title, abstract, full_text with section_name and paragraphs, and qas with question and answers"
)


def read_qasper(
    path: str | Path, *, instruction: str = "", answerable_only: bool = False
) -> list[Document]:
    """Returns one document per paper from a file in QASPER's shape (Dasigi et al. 2021).

    ``{paper: {"title", "abstract", "full_text": [{"section_name", "paragraphs"}], "qas":
    [{"question", "answers": [{"answer": {"unanswerable", "extractive_spans", "yes_no",
    "free_form_answer"}}]}]}}``. Every annotator's answer is accepted, spelled as QASPER's scorer
    spells it: spans joined by commas, yes and no as words. Answers are graded by F1. The fact
    ``type`` is the first annotator's kind of answer: extractive, abstractive, boolean or none.
    Questions without answers (as in a hidden test set) are left out, papers without questions too.

    Args:
        path: the JSON file.
        instruction: what the prompt says about how to answer, such as to say "Unanswerable".
        answerable_only: whether questions are left out that an annotator called unanswerable.

    Raises:
        InvalidArgument: if a paper or a question has another shape, naming file and place.
    """
    data = load_json(path)
    if not isinstance(data, Mapping) or not data:
        raise InvalidArgument(f"data file {path}: expected an object with a paper per key")
    found = [_paper(path, name, paper, instruction) for name, paper in data.items()]
    if answerable_only:
        found = [_answerable(document) for document in found]
    kept = [document for document in found if document.questions]
    if not kept:
        raise InvalidArgument(f"data file {path}: no question has an answer")
    return kept


def _answerable(document: Document) -> Document:
    kept = tuple(q for q in document.questions if UNANSWERABLE not in q.answers)
    return Document(document.name, document.text, kept)


def _paper(path: str | Path, name: str, paper: Mapping[str, Any], instruction: str) -> Document:
    where = f"data file {path}, paper {name}"
    with reading_row(where, _SHAPE):
        text = _text(paper)
        asked = expect(paper["qas"], list, "qas")
    questions = []
    for index, row in enumerate(asked):
        with reading_row(f"{where}, question {index}", _SHAPE):
            answers = [_answer(given["answer"]) for given in row["answers"]]
            if answers:
                questions.append(
                    RecallQuestion(
                        open_question(expect(row["question"], str, "question"), instruction),
                        tuple(dict.fromkeys(text for text, _ in answers)),
                        grading=("f1",),
                        facts=(("type", answers[0][1]),),
                    )
                )
    return Document(name, text, tuple(questions))


def _text(paper: Mapping[str, Any]) -> str:
    """Returns title, abstract and sections, with a blank line between."""
    parts = [expect(paper["title"], str, "title"), paper.get("abstract") or ""]
    for section in expect(paper["full_text"], list, "full_text"):
        parts += [section.get("section_name") or "", *section["paragraphs"]]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _answer(answer: Mapping[str, Any]) -> tuple[str, str]:
    """Returns an annotator's answer as text, and its kind."""
    if answer.get("unanswerable"):
        return UNANSWERABLE, "none"
    if answer.get("extractive_spans"):
        return ", ".join(answer["extractive_spans"]), "extractive"
    if (answer.get("free_form_answer") or "").strip():
        return answer["free_form_answer"].strip(), "abstractive"
    if answer.get("yes_no") is not None:
        return ("Yes" if answer["yes_no"] else "No"), "boolean"
    raise InvalidArgument("an answer is neither unanswerable, spans, free text nor yes or no")
