"""Multiple choice from a path: files in the shapes of ARC and of LongHealth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.readers import load_json
from kvedit.evals.recall.prompts import multiple_choice, open_question
from kvedit.evals.recall.question import Document, RecallQuestion, task_name
from kvedit.evals.recall.rows import expect, named_rows, reading_row, texts

__all__ = ["INSTRUCTION", "arc_row", "choice_question", "read_choices", "read_longhealth"]

INSTRUCTION = "Answer with the letter of the right option."

_ARC = "question, choices with text and label, answerKey, and context or documents"
_LONGHEALTH = "texts and questions, each with question, answer_a to answer_e and correct"


def choice_question(
    question: str,
    options: Sequence[str],
    correct: int,
    letters: bool = True,
    instruction: str = INSTRUCTION,
    facts: tuple[tuple[str, float | str], ...] = (),
) -> RecallQuestion:
    """Returns a question with options, listed under letters or known to the scorer alone.

    Args:
        question: the question.
        options: texts of the options.
        correct: index of the right one.
        letters: True lists options in the prompt and compares letters; False asks the bare
            question and compares the options' own texts.
        instruction: what the prompt says about how to answer, where options are listed.
        facts: what reports group by.
    """
    prompt = multiple_choice(question, options, instruction) if letters else open_question(question)
    return RecallQuestion(
        prompt, choices=tuple(options), correct=correct, letters=letters, grading=(), facts=facts
    )


def read_choices(
    path: str | Path,
    *,
    context: str | None = None,
    letters: bool = True,
    instruction: str = INSTRUCTION,
) -> list[Document]:
    """Returns documents from a file in ARC's shape (Clark et al. 2018), with contexts.

    A JSON list or JSON lines, a row being ``{"question": {"stem", "choices": [{"text", "label"}]},
    "answerKey"}``, or ``{"question", "choices": {"text": [...], "label": [...]}, "answerKey"}``.
    What it is asked about stands in ``"context"`` (a text) or ``"documents"`` (a list of texts),
    which ARC itself lacks; rows with the same context make one document.

    Args:
        path: the file.
        context: the text that all rows are asked about which bring none.
        letters: see :func:`choice_question`.
        instruction: see :func:`choice_question`.

    Raises:
        InvalidArgument: if a row has another shape, naming file and row.
    """
    found: dict[str, list[RecallQuestion]] = {}
    for where, row in named_rows(path):
        with reading_row(where, _ARC):
            text = _context(row, context)
            question, options, correct = arc_row(row)
            asked = choice_question(question, options, correct, letters, instruction)
            found.setdefault(text, []).append(asked)
    return [Document(task_name(text), text, tuple(rows)) for text, rows in found.items()]


def _context(row: Mapping[str, Any], default: str | None) -> str:
    given = row.get("context", row.get("documents", default))
    if given is None:
        raise InvalidArgument("expected context or documents in the row, or context= in the call")
    return "\n\n".join(texts(given, "context"))


def arc_row(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Returns the question, the options and the index of the right one."""
    asked = row["question"]
    question = asked["stem"] if isinstance(asked, Mapping) else asked
    choices = asked["choices"] if isinstance(asked, Mapping) else row["choices"]
    if isinstance(choices, Mapping):
        options, labels = list(choices["text"]), list(choices["label"])
    else:
        options = [choice["text"] for choice in choices]
        labels = [choice["label"] for choice in choices]
    if len(options) != len(labels):
        raise InvalidArgument(f"{len(options)} options with {len(labels)} labels")
    answer = row["answerKey"]
    if answer not in labels:
        raise InvalidArgument(f"answerKey {answer!r} is none of the labels {labels}")
    given = [expect(option, str, "option") for option in options]
    return expect(question, str, "question"), given, labels.index(answer)


def read_longhealth(
    path: str | Path,
    *,
    patients: Sequence[str] | None = None,
    letters: bool = True,
    instruction: str = INSTRUCTION,
) -> list[Document]:
    """Returns one document per patient from a file in LongHealth's shape (Adams et al. 2024).

    ``{patient: {"name", "birthday", "diagnosis", "texts": {id: text}, "questions": [{"No",
    "question", "answer_a", ..., "answer_e", "correct"}]}}``. ``correct`` is the right option's
    text, or its letter. Join patients by :func:`~kvedit.evals.recall.joined` for longer contexts.

    Args:
        path: the JSON file.
        patients: ids of the patients wanted, in this order; None takes all.
        letters: see :func:`choice_question`.
        instruction: see :func:`choice_question`.

    Raises:
        InvalidArgument: if the file or a question has another shape, naming both.
        UnknownName: if there is no such patient.
    """
    data = load_json(path)
    if not isinstance(data, Mapping) or not data:
        raise InvalidArgument(f"data file {path}: expected an object with a patient per key")
    wanted = list(data) if patients is None else list(patients)
    for name in wanted:
        if name not in data:
            raise UnknownName(f"patient in {path}", name, data)
    return [_patient(path, name, data[name], letters, instruction) for name in wanted]


def _patient(
    path: str | Path, name: str, record: Mapping[str, Any], letters: bool, instruction: str
) -> Document:
    where = f"data file {path}, patient {name}"
    questions = []
    with reading_row(where, _LONGHEALTH):
        facts = ", ".join(
            f"{key}: {record[key]}" for key in ("name", "birthday", "diagnosis") if record.get(key)
        )
        notes = "\n\n".join(texts(list(record["texts"].values()), "texts"))
        asked = expect(record["questions"], list, "questions")
    for index, row in enumerate(asked):
        with reading_row(f"{where}, question {index}", _LONGHEALTH):
            question, options, correct = _longhealth(row)
            questions.append(choice_question(question, options, correct, letters, instruction))
    return Document(name, f"{facts}\n\n{notes}" if facts else notes, tuple(questions))


def _longhealth(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    options = [expect(row[f"answer_{letter}"], str, "option").strip() for letter in "abcde"]
    correct = expect(row["correct"], str, "correct").strip()
    if correct in options:
        return row["question"], options, options.index(correct)
    if len(correct) == 1 and correct.lower() in "abcde":
        return row["question"], options, "abcde".index(correct.lower())
    raise InvalidArgument(f"correct {correct!r} is none of the options {options}")
