"""A quick operand of queries for tests of the bias compiler on tiny models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import KVMemory

__all__ = ["make_queries"]

_FIT = (
    "A letter came on Monday. It said that the house by the river was for sale, and that the owner "
    "would be glad to show it to anyone who could pay. Nobody in the village could, of course.",
    "First, wash the beans. Second, cook them for an hour. Third, add salt, oil and a bay leaf. "
    "Wait until the kitchen smells of summer. Serve with bread; it feeds four, or two twins.",
)
_HELD = (
    "The train was late again, so they played cards on a suitcase and ate what was left of the "
    "cake. At half past nine the lamps went out. Someone laughed, and then everyone did, for once.",
)


def make_queries(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    """Returns a small sample of a tiny model's queries."""
    from kvedit.runtime import calibrate

    return calibrate(model, tokenizer, texts=_FIT, held_out=_HELD, samples=24)
