"""Styling: the ``style`` section of a config, what a steered model is asked and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.steering import (
    STEP_BY_STEP,
    Asker,
    Baselines,
    Bystanders,
    Markers,
    Steering,
    read_arc,
    read_gsm8k,
    unrelated_prompts,
    with_examples,
    with_instruction,
    word_problems,
)
from kvedit.memory import Delta
from kvedit.runs.steps import Loaded
from kvedit.runs.targets import fill
from kvedit.steering.questions import arithmetic_questions

__all__ = ["Style", "read_style"]

_READERS = {"arc": read_arc, "gsm8k": read_gsm8k}
_NAMED = {"step_by_step": STEP_BY_STEP}
_EXAMPLE_SEED = 7  # other questions than those that a contrast begins with


@dataclass(frozen=True)
class Style:
    """A checked section.

    Args:
        questions: what is asked.
        bystanders: unrelated prompts, on which drift is measured.
        instruction: the prompt baseline.
        examples: of the few-shot baseline, ``(question, answer)``.
        random: seeds of random directions.
        markers: what tells the style.
        chat: whether prompts are user turns.
        max_new_tokens: of an answer.
        bystander_tokens: of an answer to an unrelated prompt.
        batch_size: prompts side by side.
        again: questions that a second process answers as well.
        seed: of the bootstrap, and of the choice of prompts by which a strength is found.
    """

    questions: tuple[RecallQuestion, ...]
    bystanders: tuple[str, ...]
    instruction: str
    examples: tuple[tuple[str, str], ...]
    random: tuple[int, ...]
    markers: Markers
    chat: bool
    max_new_tokens: int
    bystander_tokens: int
    batch_size: int
    again: int
    seed: int

    def asker(
        self, loaded: Loaded, hold: Literal["context", "prompt"], offset: str, rows: int = 0
    ) -> Asker:
        """Returns how questions are asked, ``rows`` side by side; 0 is as the section says."""
        return Asker(
            loaded.model, loaded.tokenizer, hold=hold, offset=offset, chat=self.chat,
            max_new_tokens=self.max_new_tokens, batch_size=rows or self.batch_size,
        )  # fmt: skip

    def unrelated(self, loaded: Loaded, hold: Literal["context", "prompt"], offset: str
                  ) -> Bystanders:  # fmt: skip
        """Returns the unrelated prompts, asked in the same way."""
        asker = Asker(
            loaded.model, loaded.tokenizer, hold=hold, offset=offset, chat=self.chat,
            max_new_tokens=self.bystander_tokens, batch_size=self.batch_size,
        )  # fmt: skip
        return Bystanders(asker, self.bystanders)

    def baselines(
        self, steer: Callable[[Delta, float], Steering], part: Delta, strength: float
    ) -> Baselines:
        """Returns what steering is compared with."""
        return Baselines.of(
            steer, part, strength, instruction=self.instruction, examples=self.examples,
            seeds=self.random,
        )  # fmt: skip


def read_style(section: Any) -> Style:
    """Returns a checked ``style`` section.

    Raises:
        InvalidArgument: if a value can't be used, or a file can't be read.
        UnknownName: if a key, a form or a style does not exist.
    """
    return fill("style", _style, section)


def _style(
    questions: Any = 8,
    path: str | None = None,
    form: str = "gsm8k",
    seed: int = 0,
    bystanders: Any = 12,
    instruction: str = "Think step by step.",
    examples: Any = 2,
    random: Any = (0,),
    markers: Any = "step_by_step",
    chat: bool = True,
    max_new_tokens: int = 48,
    bystander_tokens: int = 16,
    batch_size: int = 8,
    again: int = 2,
) -> Style:
    """Returns the section's values as they are used; keys as ``conf/style/default.yaml`` tells."""
    if form not in _READERS:
        raise UnknownName("form of a file of problems", form, _READERS)
    numbers = {"bystander_tokens": bystander_tokens, "batch_size": batch_size, "again": again,
               "max_new_tokens": max_new_tokens}  # fmt: skip
    for name, number in numbers.items():
        if number < 1:
            raise InvalidArgument(f"style.{name}: expected 1 or more, found {number}")
    with_instruction(instruction)
    return Style(
        questions=_questions(questions, path, form, seed),
        bystanders=_bystanders(bystanders, seed),
        instruction=instruction,
        examples=_examples(examples),
        random=_seeds(random),
        markers=_markers(markers),
        chat=chat,
        max_new_tokens=max_new_tokens,
        bystander_tokens=bystander_tokens,
        batch_size=batch_size,
        again=again,
        seed=seed,
    )


def _questions(given: Any, path: str | None, form: str, seed: int) -> tuple[RecallQuestion, ...]:
    if path is not None:
        return tuple(_READERS[form](path, _number("style.questions", given), seed))
    if not isinstance(given, list | tuple):
        return tuple(word_problems(_number("style.questions", given), seed))
    rows = [{"question": row} if isinstance(row, str) else row for row in given]
    found = [fill(f"style.questions[{i}]", _question, row) for i, row in enumerate(rows)]
    if not found or len({question.key for question in found}) < len(found):
        raise InvalidArgument(f"style.questions: expected different questions, found {given!r}")
    return tuple(found)


def _question(question: str, answer: str | None = None) -> RecallQuestion:
    return RecallQuestion(question, () if answer is None else (answer,), grading=("contains",))


def _bystanders(given: Any, seed: int) -> tuple[str, ...]:
    listed = isinstance(given, list | tuple)
    count = len(given) if listed else _number("style.bystanders", given)
    if count < 2 or (listed and not all(isinstance(text, str) and text for text in given)):
        raise InvalidArgument(
            "style.bystanders: expected two or more, one part to find a strength by and one to "
            f"report; found {given!r}"
        )
    return tuple(given) if listed else tuple(unrelated_prompts(count, seed))


def _number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name}: expected a number from 1, or a list, found {value!r}")
    return value


def _examples(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        drawn = arithmetic_questions(value, _EXAMPLE_SEED)
        return tuple((q.question, f"{q.reasoning}\nAnswer: {q.answer}") for q in drawn)
    pairs = value if isinstance(value, list | tuple) else ()
    two = [isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs]
    if not pairs or not all(two) or not all(isinstance(t, str) for pair in pairs for t in pair):
        raise InvalidArgument(
            f"style.examples: expected a number from 1, or a list of [question, answer], found "
            f"{value!r}"
        )
    found = tuple((pair[0], pair[1]) for pair in pairs)
    with_examples(found)
    return found


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or any(type(v) is not int for v in value):
        raise InvalidArgument(f"style.random: expected a list of seeds, found {value!r}")
    return tuple(value)


def _markers(value: Any) -> Markers:
    if isinstance(value, Mapping):
        return fill("style.markers", Markers, value)
    if value not in _NAMED:
        raise UnknownName("style", str(value), _NAMED)
    return _NAMED[value]
