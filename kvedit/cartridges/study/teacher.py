"""Columns: what a teacher says next, as its likeliest tokens and the mass of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.models.inspection import Inspection
from kvedit.runtime.attaching import open_session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Columns", "left_padded", "teacher_columns", "teacher_pass"]


@dataclass(frozen=True, eq=False)
class Columns:
    """Next-token distributions, cut to their likeliest tokens.

    Args:
        top_ids: int64 ``[..., k]``, most likely first; 0 where ``top_logprobs`` is ``-inf``.
        top_logprobs: float32 ``[..., k]``, nats; ``-inf`` behind the cut.
        tail: float32 ``[...]``, log of the mass of all other tokens.
    """

    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tail: torch.Tensor

    def row(self, index: int, count: int) -> Columns:
        """Returns the first ``count`` tokens of one row."""
        return Columns(
            self.top_ids[index, :count], self.top_logprobs[index, :count], self.tail[index, :count]
        )


def teacher_columns(logits: torch.Tensor, k: int, min_mass: float | None = None) -> Columns:
    """Returns the ``k`` likeliest tokens of every distribution, and the log of the rest's mass.

    The tail is summed over the other tokens themselves; log(1 - sum) would lose all digits where
    the teacher is sure.

    Args:
        logits: ``[..., vocabulary]``.
        k: tokens that are kept at most.
        min_mass: keep only so many that their mass reaches this; where ``k`` tokens don't reach
            it, because the teacher is uncertain, all ``k`` are kept. None keeps ``k`` everywhere.

    Raises:
        InvalidArgument: if ``k`` or ``min_mass`` is out of range.
    """
    if k < 1 or (min_mass is not None and not 0 < min_mass <= 1):
        raise InvalidArgument(f"expected k >= 1 and 0 < min_mass <= 1, found {k}, {min_mass}")
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    logprobs = top - total
    kept = torch.ones_like(ids, dtype=torch.bool)
    if min_mass is not None:
        masses = logprobs.exp()
        # A token is needed while those before it fall short; the first one always is.
        kept = masses.cumsum(dim=-1) - masses < min_mass
        kept[..., 0] = True
    others = logits.scatter(-1, ids, top.masked_fill(kept, -torch.inf))
    tail = others.logsumexp(dim=-1) - total.squeeze(-1)
    return Columns(
        ids.masked_fill(~kept, 0).cpu(), logprobs.masked_fill(~kept, -torch.inf).cpu(), tail.cpu()
    )


def left_padded(lists: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids ``[batch, query]`` that end together, and which of them are no padding."""
    width = max(map(len, lists))
    ids = torch.zeros(len(lists), width, dtype=torch.int64)
    valid = torch.zeros(len(lists), width, dtype=torch.bool)
    for row, tokens in enumerate(lists):
        ids[row, width - len(tokens) :] = torch.as_tensor(tokens, dtype=torch.int64)
        valid[row, width - len(tokens) :] = True
    return ids, valid


def teacher_pass(
    model: PreTrainedModel,
    found: Inspection,
    memories: Sequence[KVMemory],
    turns: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    k: int,
    min_mass: float | None = None,
) -> list[Columns]:
    """Returns the teacher's columns at every answer token, by one pass over memories.

    Args:
        model: the model.
        found: its facts.
        memories: what the teacher has read, one per row.
        turns: token ids of the questions' turns behind their memories.
        answers: token ids of the answers.
        k: likeliest tokens that are kept.
        min_mass: see :func:`teacher_columns`.
    """
    fed = [[*turn, *answer[:-1]] for turn, answer in zip(turns, answers, strict=True)]
    ids, valid = left_padded(fed)
    keep = max(map(len, answers))
    with open_session(model, found, memories, None, strict=True) as session:
        session.cache.reserve(ids.shape[1])
        logits = session.forward(ids, valid, keep=keep)
    return [
        teacher_columns(logits[row, -len(answer) :], k, min_mass)
        for row, answer in enumerate(answers)
    ]
