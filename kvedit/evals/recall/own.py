"""Your own documents with questions, from a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.recall.choices import INSTRUCTION, choice_question
from kvedit.evals.recall.prompts import open_question
from kvedit.evals.recall.question import Document, RecallQuestion, task_name
from kvedit.evals.recall.rows import expect, named_rows, reading_row, texts

__all__ = ["read_documents"]

_SHAPE = (
    "document (a text) or path (of a text file), question, and answer, answers, or choices with "
    "correct"
)
_KNOWN = {"document", "path", "name", "question", "answer", "answers", "choices", "correct"}


def read_documents(
    path: str | Path, *, letters: bool = True, instruction: str = INSTRUCTION
) -> list[Document]:
    """Returns documents with questions from a JSON list or JSON lines of your own.

    A row is ``{"document": text}`` or ``{"path": file, relative to this one}``, with ``"question"``
    and ``"answer"`` or ``"answers"``; or with ``"choices"`` and ``"correct"``, the right one's text
    or its number from 0. Rows with the same text are one document, called by the first row's
    ``"name"``, or its file's name. Other fields must be texts or numbers: reports group by them.

    Args:
        path: the file.
        letters: whether options are listed under letters; see
            :func:`~kvedit.evals.recall.choices.choice_question`.
        instruction: what the prompt says where options are listed.

    Raises:
        InvalidArgument: if a row has another shape, naming file and row.
    """
    found: dict[str, list[RecallQuestion]] = {}
    names: dict[str, str] = {}
    for where, row in named_rows(path):
        with reading_row(where, _SHAPE):
            name, text = _document(Path(path).parent, row)
            found.setdefault(text, []).append(_question(row, letters, instruction))
            names.setdefault(text, name)
    taken = list(names.values())
    for name in taken:
        if taken.count(name) > 1:
            raise InvalidArgument(f"data file {path}: two documents are called {name!r}")
    return [Document(names[text], text, tuple(rows)) for text, rows in found.items()]


def _document(folder: Path, row: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the name and text of a row's document."""
    if ("document" in row) == ("path" in row):
        raise InvalidArgument("expected either document or path")
    if "document" in row:
        text = expect(row["document"], str, "document")
        name = row.get("name", task_name(text))
    else:
        file = folder / expect(row["path"], str, "path")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"document {file}: {error}") from error
        name = row.get("name", file.stem)
    if not text.strip():
        raise InvalidArgument("the document is empty")
    return expect(name, str, "name"), text


def _question(row: Mapping[str, Any], letters: bool, instruction: str) -> RecallQuestion:
    question = texts(row["question"], "question")[0]
    facts = tuple((key, row[key]) for key in row if key not in _KNOWN)
    for key, value in facts:
        if not isinstance(value, str | int | float):
            raise InvalidArgument(f"{key}: expected a text or a number, found {value!r}")
    if "choices" not in row:
        answers = texts(row["answers"] if "answers" in row else row["answer"], "answers")
        return RecallQuestion(open_question(question), answers, facts=facts)
    options = list(texts(row["choices"], "choices"))
    correct = row["correct"]
    if isinstance(correct, str):
        if correct.strip() not in options:
            raise InvalidArgument(f"correct {correct!r} is none of the choices {options}")
        correct = options.index(correct.strip())
    return choice_question(
        question, options, expect(correct, int, "correct"), letters, instruction, facts
    )
