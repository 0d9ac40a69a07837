"""Questions over documents, from a file in SQuAD's shape."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kvedit.errors import InvalidArgument
from kvedit.evals.readers import load_json
from kvedit.evals.tasks import Task

__all__ = ["read_squad"]


def read_squad(
    path: str | Path,
    n: int | None = None,
    seed: int = 0,
    context: Literal["paragraph", "article"] = "paragraph",
) -> list[Task]:
    """Returns questions from a file in the shape of SQuAD 1.1 (Rajpurkar et al. 2016).

    ``{"data": [{"title", "paragraphs": [{"context", "qas": [{"question", "answers": [{"text",
    "answer_start"}]}]}]}]}``. Questions without an answer are left out. The span is the sentence
    that holds the first answer.

    Args:
        path: the JSON file.
        n: number of questions; None takes all, in the file's order.
        seed: seed of the draw of ``n``.
        context: whether a memory is one paragraph or the whole article.

    Raises:
        InvalidArgument: if the file has another shape, or fewer questions.
    """
    if context not in ("paragraph", "article"):
        raise InvalidArgument(f"context: expected 'paragraph' or 'article', found {context!r}")
    data = load_json(path)
    try:
        tasks = [task for article in data["data"] for task in _article(article, context)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidArgument(
            f"data file {path}: expected SQuAD's shape, data/paragraphs/qas/answers; "
            f"{type(error).__name__}: {error}"
        ) from error
    # Annotators may have asked the same twice.
    tasks = list({task.key: task for task in tasks}.values())
    if n is None:
        return tasks
    if not 1 <= n <= len(tasks):
        raise InvalidArgument(f"data file {path}: {len(tasks)} questions, asked for {n}")
    return random.Random(seed).sample(tasks, n)


def _article(article: Mapping[str, Any], context: str) -> list[Task]:
    paragraphs = article["paragraphs"]
    whole = "\n".join(str(paragraph["context"]) for paragraph in paragraphs)
    return [
        _task(whole if context == "article" else paragraph["context"], paragraph, asked, article)
        for paragraph in paragraphs
        for asked in paragraph["qas"]
        if asked["answers"]
    ]


def _task(
    context: str, paragraph: Mapping[str, Any], asked: Mapping[str, Any], article: Mapping[str, Any]
) -> Task:
    start = int(asked["answers"][0]["answer_start"])
    return Task(
        kind="qa",
        context=context,
        span_text=_sentence(paragraph["context"], start),
        prompt=f"\nQuestion: {asked['question'].strip()}\nAnswer:",
        answers=tuple(dict.fromkeys(str(answer["text"]) for answer in asked["answers"])),
        facts=(("title", str(article.get("title", ""))),),
    )


def _sentence(text: str, at: int) -> str:
    """Returns the sentence around a character: from full stop and space to full stop and space."""
    before = text.rfind(". ", 0, at)
    behind = text.find(". ", at)
    begin = 0 if before < 0 else before + 2
    return text[begin : len(text) if behind < 0 else behind + 1].strip()
