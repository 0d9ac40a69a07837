"""kv.generate and kv.score: one question to one or several memories, and nothing kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runtime.attaching import attach
from kvedit.runtime.saying import saying
from kvedit.runtime.session import Reply, Session
from kvedit.runtime.text import Context, encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Score", "generate", "score"]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: KVMemory | Sequence[KVMemory],
    prompt: Any,
    *,
    strict: bool = True,
    **options: Any,
) -> Any:
    """Returns the text that the model continues a memory and a prompt with.

    Args:
        model: the model that made the memory.
        tokenizer: its tokenizer.
        memory: one memory, or a list: one per row.
        prompt: one prompt, or a list of prompts over one memory, or one per memory.
        strict: whether the compatibility gate holds.
        **options: see :meth:`~kvedit.runtime.session.Session.generate`; also ``num_beams`` and
            ``num_return_sequences``, of which the latter gives a list per prompt, row by row.

    Returns:
        A string, or a list of strings if memories or prompts are a list. Without a tokenizer,
        ids in place of strings.

    Raises:
        InvalidArgument: if memories and prompts differ in number.
    """
    expanded = any(int(options.get(n) or 1) > 1 for n in ("num_beams", "num_return_sequences"))
    single = isinstance(memory, KVMemory) and not _several(prompt)
    rows = len(prompt) if isinstance(memory, KVMemory) and _several(prompt) else 1
    with attach(model, memory, tokenizer, rows=rows, strict=strict) as session:
        replies = (session.generate_many if expanded else session.generate)(prompt, **options)
    listed = [replies] if isinstance(replies, Reply) else replies
    texts = [list(r.tokens) if tokenizer is None else r.text for r in listed]
    return texts[0] if single and len(texts) == 1 else texts


def _several(prompt: Any) -> bool:
    return (
        isinstance(prompt, list | tuple)
        and bool(prompt)
        and isinstance(prompt[0], str | list | tuple | torch.Tensor)
    )


@dataclass(frozen=True, eq=False)
class Score:
    """How likely the model finds a continuation.

    Args:
        text: the continuation, as given.
        tokens: its ids.
        logprobs: ``[token]`` float32 natural-log probabilities.
        logits: ``[token, vocabulary]`` logits that they come from.
    """

    text: Any
    tokens: tuple[int, ...]
    logprobs: torch.Tensor
    logits: torch.Tensor

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return float(self.logprobs.sum())

    def __repr__(self) -> str:
        """Text and log-probability."""
        return f"Score({self.text!r}, logprob={self.logprob:.4f}, tokens={len(self.tokens)})"


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: KVMemory,
    prompt: Context,
    continuations: Sequence[Context],
    *,
    chat: bool | None = None,
    strict: bool = True,
) -> list[Score]:
    """Returns the log-probability of each continuation after a memory and a prompt.

    Args:
        model: the model that made the memory.
        tokenizer: its tokenizer.
        memory: the memory.
        prompt: a text, messages or ids, of at least one token.
        continuations: texts or ids, each taken as it would be cut behind the prompt.
        chat: True or False overrides how the context was captured.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if there are no continuations, or one is empty.
    """
    if isinstance(continuations, str) or not continuations:
        raise InvalidArgument(f"expected a list of continuations, found {continuations!r}")
    with attach(model, memory, tokenizer, strict=strict) as session:
        first = session.feed(prompt, chat)
        return [_score_one(session, first, text) for text in continuations]


def _score_one(session: Session, first: torch.Tensor, text: Context) -> Score:
    source = session.source()
    known = 0 if source is None else len(source)
    # A continuation is never the next chat turn: it is what the assistant would say.
    ids = encode_turn(session.tokenizer, source, text, chat=False).tokens[known:]
    logits = first
    if len(ids) > 1:
        with saying():
            rest = session.forward(ids[None, :-1])
        session.cache.crop(1 - len(ids))
        logits = torch.cat((first, rest[0]))
    logits = logits.float().cpu()
    logprobs = logits.log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1)
    return Score(text, tuple(ids.tolist()), logprobs, logits)
