"""Starts: where training may begin, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from material import Material  # beside this file

from kvedit.cartridges import initial
from kvedit.editors.compacting import KVZip
from kvedit.editors.matching import AttentionMatching
from kvedit.memory import KVMemory

Start = Callable[[Material, float, int], KVMemory]
"""Makes a memory of a document, so many times smaller, with a seed."""


def first(text: Material, ratio: float, seed: int) -> KVMemory:
    """Returns the first tokens' slots."""
    return initial.first_tokens(text.model, text.tokenizer, text.full, text.slots(ratio))


def chunks(text: Material, ratio: float, seed: int) -> KVMemory:
    """Returns four chunks from all over the document, read as one text."""
    made = initial.sampled_chunks(
        text.model, text.tokenizer, text.context, text.slots(ratio),
        chunk=text.chunk(ratio), seed=seed,
    )  # fmt: skip
    return initial.stand_for(made, text.full)


def other_text(text: Material, ratio: float, seed: int) -> KVMemory:
    """Returns the slots of a text that has nothing to do with the document."""
    made = initial.text_tokens(text.model, text.tokenizer, text.slots(ratio))
    return initial.stand_for(made, text.full)


def summary(text: Material, ratio: float, seed: int) -> KVMemory:
    """Returns the slots of the model's own summary."""
    made = initial.summary(text.model, text.tokenizer, text.full, text.slots(ratio))
    return initial.stand_for(made, text.full)


def noise(text: Material, ratio: float, seed: int) -> KVMemory:
    """Returns random vectors with the model's own statistics."""
    made = initial.random_vectors(text.model, text.tokenizer, text.slots(ratio), seed=seed)
    return initial.stand_for(made, text.full)


def kvzip(text: Material, ratio: float, seed: int) -> KVMemory:
    """Returns the slots that KVZip keeps."""
    editor = KVZip(text.slots(ratio))
    return initial.edited(text.model, text.tokenizer, text.full, editor)


def matched(**options: Any) -> Start:
    """Returns a start that attention matching makes."""

    def start(text: Material, ratio: float, seed: int) -> KVMemory:
        editor = AttentionMatching(text.slots(ratio), **options)
        return initial.edited(text.model, text.tokenizer, text.full, editor)

    return start


STARTS: dict[str, Start] = {
    "first-p": first,
    "random": noise,
    "other text": other_text,
    "sampled chunks": chunks,
    "summary": summary,
    "KVZip": kvzip,
    "matched: keys": matched(bias=False, values=False),
    "matched: keys, values": matched(bias=False),
    "matched: keys, values, β": matched(),
    "matched by self-study": matched(queries="self_study+repeat"),
}
"""Matched starts read the document once more for their queries; the last also answers the
editor's own six prompts (a summary, JSON, groups, three questions), none of which is a probe."""
