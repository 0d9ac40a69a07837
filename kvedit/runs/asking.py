"""Asking: the ``recall`` section of a config, and answers that a second process must repeat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.cartridges.study import PLAIN_TURN
from kvedit.errors import InvalidArgument
from kvedit.evals.recall import RecallQuestion
from kvedit.memory import KVMemory
from kvedit.runs.steps import Answer, Loaded, answer
from kvedit.runs.targets import fill

__all__ = ["Asked", "ask", "read_recall"]

_LINE = "\n"


@dataclass(frozen=True)
class Asked:
    """What memories are asked.

    Args:
        pairs: question, accepted answers, and the document that it is about.
        max_new_tokens: tokens of an answer.
        stop: text that ends an answer, or None.
        batch_size: rows side by side.
        again: questions that a second process answers as well.
    """

    pairs: tuple[tuple[str, tuple[str, ...], str], ...]
    max_new_tokens: int
    stop: str | None
    batch_size: int
    again: int

    def questions(self, full: KVMemory) -> list[RecallQuestion]:
        """Returns them as they follow a context: turns of a chat, or lines of a text."""
        return [
            RecallQuestion(_prompt(full, text), answers, document=document)
            for text, answers, document in self.pairs
        ]

    def options(self, full: KVMemory) -> dict[str, Any]:
        """Returns options for :func:`kvedit.evals.recall.recall`."""
        # A text has no end of turn: the line's end is where an answer stops.
        stop = self.stop or (None if _is_chat(full) else _LINE)
        return {
            "max_new_tokens": self.max_new_tokens,
            "stop": stop,
            "batch_size": self.batch_size,
        }

    def prompts(self, full: KVMemory) -> list[str]:
        """Returns what the second process is asked."""
        return [question.prompt for question in self.questions(full)[: self.again]]


def read_recall(
    questions: Sequence[Mapping[str, Any]] = (),
    path: str | None = None,
    max_new_tokens: int = 24,
    stop: str | None = None,
    batch_size: int = 8,
    again: int = 3,
) -> Asked:
    """Returns a checked ``recall`` section.

    Args:
        questions: mappings with ``question``, ``answer`` (a text, or a list of accepted ones; may
            be missing) and ``document`` (for a composition: the part that it is about).
        path: a JSON file with a list of the same, in their place.
        max_new_tokens: tokens of an answer.
        stop: text that ends an answer; None is the end of the turn, or of the line behind a text.
        batch_size: rows side by side.
        again: questions that a second process answers as well, from 1 on.

    Raises:
        InvalidArgument: if there are no questions, one comes twice, or the file can't be read.
        UnknownName: if a question has another key.
    """
    rows = _rows(path) if path is not None else list(questions)
    pairs = tuple(fill(f"recall.questions[{i}]", _pair, row) for i, row in enumerate(rows))
    if not pairs or len({text for text, _, _ in pairs}) < len(pairs):
        raise InvalidArgument(
            f"recall.questions: expected different questions, found {len(pairs)}; set "
            "recall.questions, or recall.path to a JSON file with them"
        )
    if min(max_new_tokens, batch_size, again) < 1:
        raise InvalidArgument(
            f"recall: expected max_new_tokens, batch_size and again from 1, found {max_new_tokens}"
            f", {batch_size} and {again}"
        )
    return Asked(pairs, max_new_tokens, stop, batch_size, again)


def ask(
    loaded: Loaded, memory: KVMemory, prompts: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Answer]:
    """Returns the greedy answer to each prompt, as the second process gives it."""
    return {text: answer(loaded, memory, text, **options) for text in prompts}


def _pair(
    question: str, answer: str | Sequence[str] = (), document: str = ""
) -> tuple[str, tuple[str, ...], str]:
    if not isinstance(question, str) or not question.strip():
        raise InvalidArgument(f"recall.questions: expected a question, found {question!r}")
    answers = (answer,) if isinstance(answer, str) else tuple(map(str, answer))
    return question, answers, document


def _rows(path: str) -> list[Mapping[str, Any]]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"recall.path={path}: {error}") from error
    if not isinstance(found, list):
        raise InvalidArgument(f"recall.path={path}: expected a list of questions")
    return found


def _is_chat(memory: KVMemory) -> bool:
    return memory.source is not None and memory.source.chat is not None


def _prompt(full: KVMemory, question: str) -> str:
    return question if _is_chat(full) else PLAIN_TURN.replace("{question}", question)
