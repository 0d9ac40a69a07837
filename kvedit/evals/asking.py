"""Reading: what a model says next after each of several prompts over one memory.

All prompts are rows of one session, so a memory is laid out once. Rows are padded on the left,
which puts the logits that matter into the last columns; no other logits are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Span
from kvedit.runtime.attaching import attach
from kvedit.runtime.tapping import tap
from kvedit.runtime.text import encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "Question", "Reading", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A prompt and answers to be scored behind it.

    Args:
        prompt: the prompt.
        answers: texts, as they stand behind the prompt.
    """

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """How likely an answer is, in nats.

    Args:
        token: id of its first token.
        first: log-probability of the first token.
        whole: log-probability of all of its tokens, not divided by their number.
    """

    token: int
    first: float
    whole: float


@dataclass(frozen=True, eq=False)
class Reading:
    """What follows each prompt.

    Args:
        logprobs: ``[question, vocabulary]`` float32 log-probabilities of the next token.
        answers: per question, one per given answer.
        mass: ``[question, layer, query_head]`` float32 share of the last prompt token's attention
            that falls on the span; None if no span was given.
    """

    logprobs: torch.Tensor
    answers: tuple[tuple[Answer, ...], ...]
    mass: torch.Tensor | None = None


@dataclass(frozen=True)
class _Row:
    """A prompt with one answer behind it, or with none: ``length`` logits at its end matter."""

    question: int
    ids: tuple[int, ...]
    length: int
    answer: int | None


def read_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: KVMemory,
    questions: Sequence[Question],
    *,
    span: Span | None = None,
    batch_size: int = 32,
    strict: bool = True,
) -> Reading:
    """Returns what the model says next after each prompt over a memory.

    Args:
        model: the model that made the memory.
        tokenizer: its tokenizer.
        memory: the memory; it does not change.
        questions: prompts, each with answers to score.
        span: tokens whose attention mass is wanted.
        batch_size: rows per forward pass: one per question, and one per further answer of
            several tokens.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if there is no question, or a text is empty.
    """
    if not questions or batch_size < 1:
        raise InvalidArgument(
            f"expected questions and batch_size >= 1, found {len(questions)}, {batch_size}"
        )
    answers = [_encode(tokenizer, memory, question) for question in questions]
    rows = [row for index, (ids, ends) in enumerate(answers) for row in _rows(index, ids, ends)]
    tails: list[torch.Tensor] = []
    masses: list[torch.Tensor] = []
    for start in range(0, len(rows), batch_size):
        found, mass = _forward(model, memory, rows[start : start + batch_size], span, strict)
        tails += found
        masses += mass
    return _collect(rows, tails, masses, [ends for _, ends in answers])


def _encode(
    tokenizer: PreTrainedTokenizerBase | None, memory: KVMemory, question: Question
) -> tuple[list[int], list[list[int]]]:
    grown = encode_turn(tokenizer, memory.source, question.prompt, chat=False)
    ends = [
        encode_turn(tokenizer, grown, answer, chat=False).tokens[len(grown) :].tolist()
        for answer in question.answers
    ]
    return grown.tokens[memory.tokens_count :].tolist(), ends


def _rows(question: int, ids: list[int], ends: list[list[int]]) -> list[_Row]:
    # An answer of one token is read off any row of its prompt; a longer one needs its own.
    rows = [
        _Row(question, (*ids, *end[:-1]), len(end), index)
        for index, end in enumerate(ends)
        if len(end) > 1
    ]
    return rows or [_Row(question, tuple(ids), 1, None)]


def _forward(
    model: PreTrainedModel, memory: KVMemory, rows: Sequence[_Row], span: Span | None, strict: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns per row its log-probabilities ``[length, vocabulary]`` and mass ``[layer, head]``."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row.ids) :] = torch.tensor(row.ids)
        valid[index, width - len(row.ids) :] = True
    keep = max(row.length for row in rows)
    watched = nullcontext() if span is None else tap(model, ("mass",), groups={"span": span})
    with attach(model, memory, rows=len(rows), strict=strict) as session, watched as tapped:
        logits = session.forward(ids, valid, keep=keep)
    logprobs = logits.float().log_softmax(dim=-1).cpu()
    tails = [logprobs[index, keep - row.length :] for index, row in enumerate(rows)]
    if tapped is None:
        return tails, []
    by_layer = [tapped["mass", layer][0].cpu() for layer in tapped.layers]
    # Layers may differ in query heads; a head that a layer lacks has no mass.
    most = max(mass.shape[1] for mass in by_layer)
    padded = [torch.nn.functional.pad(m, (0, 0, 0, most - m.shape[1])) for m in by_layer]
    stacked = torch.stack(padded, dim=1)  # [row, layer, query_head, query]
    return tails, [stacked[index, ..., -row.length] for index, row in enumerate(rows)]


def _collect(
    rows: Sequence[_Row],
    tails: Sequence[torch.Tensor],
    masses: Sequence[torch.Tensor],
    ends: Sequence[list[list[int]]],
) -> Reading:
    first: dict[int, int] = {}
    own: dict[tuple[int, int | None], int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.question, index)
        own[row.question, row.answer] = index
    following = torch.stack([tails[first[question]][0] for question in range(len(ends))])
    answers = []
    for question, texts in enumerate(ends):
        scored = []
        for number, tokens in enumerate(texts):
            tail = tails[own.get((question, number), first[question])]
            each = tail[: len(tokens)].gather(1, torch.tensor(tokens)[:, None])
            at = float(following[question, tokens[0]])
            scored.append(Answer(tokens[0], at, at + float(each[1:].sum())))
        answers.append(tuple(scored))
    mass = torch.stack([masses[first[q]] for q in range(len(ends))]) if masses else None
    return Reading(following, tuple(answers), mass)
