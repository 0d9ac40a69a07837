"""Sample: one question and answer about a corpus, with what a teacher that read it would say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvedit.axes import expect_axes
from kvedit.errors import InvalidArgument

__all__ = ["Sample"]


@dataclass(frozen=True, eq=False)
class Sample:
    """What follows a memory, and the teacher's next-token distribution at every answer token.

    Token ``tokens[i]``, ``i >= start``, is what the model says after ``tokens[:i]``; row
    ``i - start`` of the teacher's columns is the distribution from which it was taken.

    Args:
        key: identity of the sample; equal keys are one sample.
        document: name or digest of the document that it is about.
        kind: kind of the seed prompt that led to the question.
        question: text of the question.
        answer: text of the answer.
        tokens: int64 ``[n]``, the question's turn, then the answer, its end token included.
        start: index in ``tokens`` of the answer's first token; at least 1.
        top_ids: int64 ``[n - start, k]``, the teacher's likeliest tokens, most likely first.
        top_logprobs: float32 ``[n - start, k]``, nats; ``-inf`` pads rows that hold fewer.
        tail: float32 ``[n - start]``, log of the mass of all other tokens; ``-inf`` for none.

    Raises:
        ShapeMismatch: if columns disagree.
        InvalidArgument: if there is no question, or no answer.
    """

    key: str
    document: str
    kind: str
    question: str
    answer: str
    tokens: torch.Tensor
    start: int
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tail: torch.Tensor

    def __post_init__(self) -> None:
        """Checks that columns fit together."""
        expect_axes("tokens", self.tokens, "token")
        if not 1 <= self.start < len(self.tokens):
            raise InvalidArgument(
                f"start must leave a question and an answer of one token each at least, in 1 to "
                f"{len(self.tokens) - 1}, found {self.start}"
            )
        count = len(self.tokens) - self.start
        expect_axes("top_ids", self.top_ids, "token choice", token=count)
        choices = self.top_ids.shape[1]
        expect_axes("top_logprobs", self.top_logprobs, "token choice", token=count, choice=choices)
        expect_axes("tail", self.tail, "token", token=count)

    def __len__(self) -> int:
        """Tokens, question and answer."""
        return len(self.tokens)
