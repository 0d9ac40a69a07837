"""decode: replies of several rows over their memories, each drawn from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.cartridges.study.endings import Ending
from kvedit.cartridges.study.teacher import Columns, left_padded, teacher_columns
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.models.inspection import Inspection
from kvedit.runtime.attaching import open_session
from kvedit.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Decoding", "Keep", "Said", "decode"]


@dataclass(frozen=True)
class Decoding:
    """How a reply is made.

    Args:
        max_tokens: tokens at most.
        temperature: 0 takes the likeliest token, otherwise tokens are drawn at this temperature.
        top_p: draw from the likeliest tokens that together have this mass; None draws from all.

    Raises:
        InvalidArgument: if a number is out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.max_tokens < 1 or self.temperature < 0:
            raise InvalidArgument(
                f"expected max_tokens >= 1 and temperature >= 0, found {self.max_tokens}, "
                f"{self.temperature}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p must be in (0, 1], found {self.top_p}")


@dataclass(frozen=True, eq=False)
class Said:
    """One reply.

    Args:
        text: without special tokens and without the stop text.
        tokens: ids as generated, the one that ended it included.
        ended: whether it ended by itself, and not by running out of tokens.
        columns: the distributions that its tokens were taken from, if they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    columns: Columns | None = None


@dataclass(frozen=True)
class Keep:
    """What is kept of the distributions: see :func:`~kvedit.cartridges.study.teacher_columns`.

    Args:
        k: likeliest tokens.
        min_mass: mass at which they suffice.
    """

    k: int
    min_mass: float | None = None


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Inspection,
    memories: Sequence[KVMemory],
    turns: Sequence[Sequence[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    ending: Ending,
    keep: Keep | None = None,
    openings: Sequence[Sequence[int]] | None = None,
) -> list[Said]:
    """Returns one reply per row, each over its own memory.

    A row's draws come from its own seed, by the Gumbel trick: the token is the argmax of
    ``logits / temperature`` plus noise that depends on the row's seed and the step only. So a
    row's reply does not depend on which rows stand beside it, but where two tokens are closer than
    the rounding of logits.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        found: the model's facts.
        memories: one per row.
        turns: token ids that each row is fed first.
        seeds: one per row.
        decoding: how tokens are chosen.
        ending: what ends a row.
        keep: what to keep of the distributions; None keeps nothing.
        openings: last ids of each turn that are the beginning of the reply's text.
    """
    drawers = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = _Rows(tokenizer, ending, len(turns))
    columns: list[Columns] = []
    ids, valid = left_padded(turns)
    with open_session(model, found, memories, None, strict=True) as session:
        session.cache.reserve(ids.shape[1] + decoding.max_tokens)
        for step in range(decoding.max_tokens):
            logits = _last(session, ids, valid)
            if keep is not None:
                columns.append(teacher_columns(logits, keep.k, keep.min_mass))
            rows.add(_choose(logits, decoding, drawers))
            if not any(rows.alive) or step + 1 == decoding.max_tokens:
                break
            ids = torch.tensor([[tokens[-1]] for tokens in rows.tokens])
            valid = torch.tensor(rows.alive)[:, None]
    joined = _stacked(columns) if columns else None
    first = openings or [()] * len(turns)
    return [rows.said(row, joined, first[row]) for row in range(len(turns))]


class _Rows:
    """Tokens of each row so far, and which rows go on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ending: Ending, count: int) -> None:
        self.tokenizer, self.ending = tokenizer, ending
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.alive = [True] * count

    def add(self, chosen: list[int]) -> None:
        for row, token in enumerate(chosen):
            if not self.alive[row]:
                continue
            self.tokens[row].append(token)
            self.alive[row] = not (token in self.ending.ids or self._stopped(row))

    def _stopped(self, row: int) -> bool:
        stop = self.ending.stop
        if stop is None:
            return False
        # A token has a byte at least, so the stop lies within this many tokens.
        recent = self.tokens[row][-len(stop.encode()) - 1 :]
        return stop in str(self.tokenizer.decode(recent, skip_special_tokens=False))

    def said(self, row: int, columns: Columns | None, opening: Sequence[int]) -> Said:
        tokens = self.tokens[row]
        text = str(self.tokenizer.decode([*opening, *tokens], skip_special_tokens=True))
        if self.ending.stop is not None:
            text = text.split(self.ending.stop, 1)[0]
        kept = None if columns is None else columns.row(row, len(tokens))
        return Said(text, tuple(tokens), not self.alive[row], kept)


def _last(session: Session, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return session.forward(ids, valid, keep=1)[:, -1]


def _stacked(columns: Sequence[Columns]) -> Columns:
    return Columns(
        torch.stack([c.top_ids for c in columns], dim=1),
        torch.stack([c.top_logprobs for c in columns], dim=1),
        torch.stack([c.tail for c in columns], dim=1),
    )


def _choose(
    logits: torch.Tensor, decoding: Decoding, drawers: Sequence[torch.Generator]
) -> list[int]:
    """Returns one token per row from logits ``[batch, vocabulary]``."""
    scores = logits.float()
    if decoding.temperature > 0:
        scores = scores / decoding.temperature
        if decoding.top_p is not None:
            scores = _nucleus(scores, decoding.top_p)
        # Drawn on the CPU, so that the same seed gives the same noise on every device.
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in drawers])
        tiny = torch.finfo(torch.float32).tiny
        noise = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
        scores = scores + noise.to(scores.device)
    chosen: list[int] = scores.argmax(dim=-1).tolist()
    return chosen


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Returns scores with all but the likeliest tokens of mass ``top_p`` at minus infinity."""
    ordered, order = scores.sort(dim=-1, descending=True)
    masses = ordered.softmax(dim=-1)
    ordered = ordered.masked_fill(masses.cumsum(dim=-1) - masses >= top_p, -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ordered)
