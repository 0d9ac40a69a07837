"""Needles: one sentence at a chosen depth of a long text, and a question that only it answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvedit.errors import InvalidArgument
from kvedit.evals.filler import filler
from kvedit.evals.tasks import Task

__all__ = ["needle_tasks"]

_PLACES = (
    "archive", "barn", "cellar", "chapel", "depot", "garage", "greenhouse", "laboratory",
    "library", "lighthouse", "museum", "observatory", "pantry", "school", "stable", "theatre",
)  # fmt: skip


def needle_tasks(
    n: int,
    seed: int = 0,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    words: int = 300,
    decoys: int = 2,
) -> list[Task]:
    """Returns ``n`` tasks per depth. The same key, value and filler stand at each depth.

    Args:
        n: number of keys.
        seed: seed of keys, values and filler.
        depths: where the needle stands, in sentences, as a fraction in [0, 1] of all.
        words: words of filler; a token is some three quarters of one.
        decoys: sentences of the same form with other keys and values, at drawn places.

    Raises:
        InvalidArgument: if a number is out of range.
    """
    if n < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InvalidArgument(f"expected n >= 1 and depths in [0, 1], found {n}, {depths}")
    if not 0 <= decoys < len(_PLACES):
        raise InvalidArgument(f"decoys: expected 0 to {len(_PLACES) - 1}, found {decoys}")
    drawn = random.Random(seed)
    tasks = []
    for _ in range(n):
        keys = drawn.sample(_PLACES, decoys + 1)
        codes = [str(code) for code in drawn.sample(range(1000, 10000), decoys + 1)]
        hay = filler(words, drawn.randrange(1 << 30))
        for key, code in zip(keys[1:], codes[1:], strict=True):
            hay.insert(drawn.randrange(len(hay) + 1), _sentence(key, code))
        tasks += [_task(hay, keys[0], codes[0], depth) for depth in depths]
    return tasks


def _sentence(key: str, code: str) -> str:
    return f"The code for the door of the {key} is {code}."


def _task(hay: list[str], key: str, code: str, depth: float) -> Task:
    at = round(depth * len(hay))
    needle = _sentence(key, code)
    return Task(
        kind="needle",
        context=" ".join([*hay[:at], needle, *hay[at:]]),
        span_text=needle,
        prompt=f" The code for the door of the {key} is",
        answers=(code,),
        facts=(("depth", depth), ("words", sum(len(sentence.split()) for sentence in hay))),
    )
