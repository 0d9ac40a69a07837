"""Problems of reasoning-gym, a library of procedural tasks (Stojanovski et al. 2025).

arXiv 2505.24760; extra ``reasoning``. Nothing is downloaded: tasks are drawn by a seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from kvedit.errors import InvalidArgument, MissingDependency, UnknownName
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.steering.arithmetic import with_options

__all__ = ["gym_choices", "gym_problems"]

_NUMBERS = ("gsm_symbolic", "chain_sum", "leg_counting")
_WORDS = ("calendar_arithmetic", "family_relationships", "aiw")


def gym_problems(
    n: int, seed: int = 0, tasks: Sequence[str] = _NUMBERS, **options: Mapping[str, Any]
) -> list[RecallQuestion]:
    """Returns problems with free answers, the tasks in turn.

    Answers are graded as those of all questions are, by the number or the words that an answer
    comes to, not by the library's own scorers, which want the bare answer.

    Args:
        n: how many.
        seed: seed of every task.
        tasks: names of the library's tasks.
        **options: task name to its settings, such as ``chain_sum={"max_terms": 3}``.

    Raises:
        InvalidArgument: if ``n`` is below 1, or a task gives too few different problems.
        UnknownName: if there is no such task.
        MissingDependency: without reasoning-gym.
    """
    return [
        RecallQuestion(question, (answer,), grading=("contains",), facts=(("task", name),))
        for name, question, answer in _drawn(n, seed, tasks, options)[:n]
    ]


def gym_choices(
    n: int,
    seed: int = 0,
    tasks: Sequence[str] = _WORDS,
    choices: int = 4,
    **options: Mapping[str, Any],
) -> list[RecallQuestion]:
    """Returns problems with options under letters, the tasks in turn.

    Wrong options are answers to other problems of the same task.

    Args:
        n: how many.
        seed: seed of every task, and of the options.
        tasks: names of the library's tasks.
        choices: options of each, 2 to 26; fewer where a task has fewer different answers.
        **options: as for :func:`gym_problems`.

    Raises:
        InvalidArgument: if a number is out of range, or a task has one answer only.
        UnknownName: if there is no such task.
        MissingDependency: without reasoning-gym.
    """
    if not 2 <= choices <= 26:
        raise InvalidArgument(f"choices: expected 2 to 26, found {choices}")
    drawn = _drawn(n, seed, tasks, options, pool=8 * choices)
    answers: dict[str, dict[str, None]] = {}
    for name, _, answer in drawn:
        answers.setdefault(name, {})[answer] = None
    draw = random.Random(f"gym {seed}")
    found = []
    for name, question, answer in drawn[:n]:
        others = [text for text in answers[name] if text != answer]
        if not others:
            raise InvalidArgument(f"task {name!r} gave the answer {answer!r} alone: no options")
        wrong = draw.sample(others, min(choices - 1, len(others)))
        texts = draw.sample([answer, *wrong], 1 + len(wrong))
        facts = (("task", name),)
        found.append(with_options(question, texts, texts.index(answer), facts))
    return found


def _drawn(
    n: int,
    seed: int,
    tasks: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    pool: int = 0,
) -> list[tuple[str, str, str]]:
    """Returns task, question and answer: ``n`` with the tasks in turn, then what is left."""
    names = list(dict.fromkeys(tasks))
    if n < 1 or not names:
        raise InvalidArgument(f"expected n >= 1 and tasks, found {n} and {names}")
    each = -(-n // len(names))
    rows = [_task(name, each, pool, seed, options.get(name, {})) for name in names]
    turns = [rows[index % len(rows)][index // len(rows)] for index in range(n)]
    rest = [row for task in rows for row in task if row not in turns]
    return [*turns, *rest]


def _task(
    name: str, count: int, pool: int, seed: int, options: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingDependency("reasoning_gym", "reasoning", "Drawing its problems") from error
    if name not in DATASETS:
        raise UnknownName("task of reasoning-gym", name, DATASETS)
    size = 2 * count + pool
    entries = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    found = {str(entry["question"]).strip(): str(entry["answer"]).strip() for entry in entries}
    rows = [(name, question, answer) for question, answer in found.items() if question and answer]
    if len(rows) < count:
        raise InvalidArgument(f"task {name!r} gave {len(rows)} different problems, not {count}")
    return rows
