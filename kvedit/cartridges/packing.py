"""Packing: several samples in one row, none cut, and which samples share a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from kvedit.cartridges.sample import Sample
from kvedit.errors import InvalidArgument

__all__ = ["Batch", "Pack", "collate", "pack", "read_length"]

Pack = tuple[int, ...]
"""Numbers of the samples that share a row, in their order."""

PADDING = -2
"""Segment of padding; samples count from 0."""


def read_length(sample: Sample) -> int:
    """Returns how many tokens of a sample the model reads: nothing follows its last token."""
    return len(sample) - 1


def pack(lengths: Sequence[int], order: Sequence[int], tokens: int) -> list[Pack]:
    """Returns rows of at most ``tokens`` tokens, filled first fit in the given order.

    A sample that is longer than a row gets one of its own: an answer is never cut, since its end
    is what a cut would take.

    Args:
        lengths: tokens of every sample, by number.
        order: numbers of the samples to place.
        tokens: tokens of a row.

    Returns:
        Rows in the order in which they were opened.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        need = lengths[number]
        place = next((row for row, left in enumerate(room) if left >= need), None)
        if place is None:
            rows.append([])
            room.append(tokens)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= need
    return [tuple(row) for row in rows]


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows as one forward pass takes them.

    Args:
        ids: ``[row, token]`` int64 token ids; 0 where there is padding.
        offsets: ``[row, token]`` int64, place within the token's own sample.
        segments: ``[row, token]`` int64, number of the sample within its row, or ``PADDING``.
        rows: ``[query]`` int64, row of each supervised token.
        columns: ``[query]`` int64, its place in the row; what it predicts stands behind it.
        targets: ``[query]`` int64, the token that it should predict.
        top_ids: ``[query, choice]`` int64, the teacher's likeliest tokens. What pads a row names
            the row's first choice.
        top_logprobs: ``[query, choice]`` float32; ``-inf`` pads.
        tail: ``[query]`` float32, log of the teacher's mass on all other tokens.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    segments: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tail: torch.Tensor

    @property
    def supervised(self) -> int:
        """Tokens that have a loss."""
        return self.rows.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding left out."""
        return int((self.segments != PADDING).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate(rows: Sequence[Sequence[Sample]]) -> Batch:
    """Returns rows of samples as a batch, padded on the right to the longest.

    Raises:
        InvalidArgument: if there is no row, or an empty one.
    """
    if not rows or not all(rows):
        raise InvalidArgument("expected at least one row, with at least one sample in each")
    laid = [_laid(row) for row in rows]
    fill = {"ids": 0, "offsets": 0, "segments": PADDING}
    grid = {
        name: pad_sequence([parts[name] for parts in laid], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    samples = [sample for row in rows for sample in row]
    counts = torch.tensor([len(parts["columns"]) for parts in laid])
    choices = max(sample.top_ids.shape[1] for sample in samples)
    return Batch(
        **grid,
        rows=torch.arange(len(rows)).repeat_interleave(counts),
        columns=torch.cat([parts["columns"] for parts in laid]),
        targets=torch.cat([sample.tokens[sample.start :] for sample in samples]),
        top_ids=torch.cat([_choices(sample, choices) for sample in samples]),
        top_logprobs=torch.cat([_logprobs(sample, choices) for sample in samples]),
        tail=torch.cat([sample.tail.float() for sample in samples]),
    )


def _laid(row: Sequence[Sample]) -> dict[str, torch.Tensor]:
    lengths = [read_length(sample) for sample in row]
    starts = [sum(lengths[:n]) for n in range(len(row))]
    # Token i is predicted at place i - 1: the question's last token predicts the answer's first.
    columns = [
        torch.arange(sample.start - 1, length) + start
        for sample, length, start in zip(row, lengths, starts, strict=True)
    ]
    return {
        "ids": torch.cat([sample.tokens[:-1] for sample in row]),
        "offsets": torch.cat([torch.arange(length) for length in lengths]),
        "segments": torch.arange(len(row)).repeat_interleave(torch.tensor(lengths)),
        "columns": torch.cat(columns),
    }


def _choices(sample: Sample, choices: int) -> torch.Tensor:
    ids = pad(sample.top_ids, (0, choices - sample.top_ids.shape[1]))
    empty = _logprobs(sample, choices) == -torch.inf
    # A padded choice must not name a token of its own: that token would leave the tail.
    return torch.where(empty, ids[:, :1], ids)


def _logprobs(sample: Sample, choices: int) -> torch.Tensor:
    short = choices - sample.top_logprobs.shape[1]
    return pad(sample.top_logprobs.float(), (0, short), value=-torch.inf)
