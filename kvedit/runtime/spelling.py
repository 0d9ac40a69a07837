"""Between text and ids: cut a text behind a context, spell ids with their places in the text."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from kvedit.memory import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TAIL", "following_ids", "plain_ids", "spell_behind", "tokenize"]

_AS_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}

TAIL = 12
"""Tokens of context that are tokenised again with what follows, to see where the border falls."""


def following_ids(tokenizer: PreTrainedTokenizerBase, source: Source, prompt: str) -> list[int]:
    """Returns the prompt's ids as the tokenizer would cut them behind the context.

    Tokenisers that mark word starts would put a space before a text that stands alone, so the
    context's last tokens are cut again with the prompt; if they stay as they are, what follows
    them is the prompt's. If the border would move into a token, the prompt is cut alone.
    """
    last, ranges = source.tokens[-TAIL:], source.offsets[-TAIL:]
    spelled = ranges[:, 1] > ranges[:, 0]  # a BOS that the text lacks has no characters
    tail = last[spelled].tolist()
    if tail:
        first = int(ranges[spelled][0, 0])
        joined = plain_ids(tokenizer, source.text[first:] + prompt)
        if joined[: len(tail)] == tail:
            return joined[len(tail) :]
    return plain_ids(tokenizer, prompt)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of ``text`` without special tokens of the tokenizer's own."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids ``[n]`` and character ranges ``[n, 2]``; ``special`` adds a BOS."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        spelled, offsets = _spell(tokenizer, torch.tensor(ids, dtype=torch.int64))
        exact = spelled == text
        return torch.tensor(ids), offsets if exact else torch.zeros_like(offsets)
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    return ids, torch.tensor(found["offset_mapping"], dtype=torch.int64).reshape(-1, 2)


def spell_behind(
    tokenizer: PreTrainedTokenizerBase, tail: torch.Tensor, ids: torch.Tensor
) -> tuple[str, torch.Tensor]:
    """Returns the text of ids that stand behind others, and each token's range in it.

    Decoders that mark word starts drop the first space of what they are given, so the ids are
    spelled together with what stands before them.
    """
    text, offsets = _spell(tokenizer, ids)
    before = str(tokenizer.decode(tail.tolist(), **_AS_IS))
    joined = str(tokenizer.decode([*tail.tolist(), *ids.tolist()], **_AS_IS))
    if not joined.startswith(before) or joined[len(before) :] == text:
        return text, offsets
    spelled = joined[len(before) :]
    moved = max(0, len(spelled) - len(text))
    return spelled, (offsets + moved).clamp_max(len(spelled))


def _spell(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Returns the text of ids, and each token's range in it."""
    text = str(tokenizer.decode(ids.tolist(), **_AS_IS))
    if tokenizer.is_fast:
        again = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        if again["input_ids"] == ids.tolist():
            return text, torch.tensor(again["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    # Another segmentation than the tokenizer's own, as generated text may have: spell prefixes.
    ends = [0]
    for stop in range(1, len(ids) + 1):
        prefix = str(tokenizer.decode(ids[max(0, stop - TAIL) : stop].tolist(), **_AS_IS))
        before = str(tokenizer.decode(ids[max(0, stop - TAIL) : stop - 1].tolist(), **_AS_IS))
        ends.append(min(len(text), ends[-1] + max(0, len(prefix) - len(before))))
    return text, torch.tensor(list(pairwise(ends)), dtype=torch.int64)
