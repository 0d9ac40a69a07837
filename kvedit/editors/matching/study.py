"""What the model is asked to read over a memory, so that its queries look at all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvedit.editors.base import Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Source

__all__ = ["REPEAT", "STUDY", "passages", "room"]

REPEAT = "Repeat the previous context verbatim."
"""The instruction of repeat-prefill (arXiv 2602.16284)."""

STUDY = (
    "Summarise the context above, keeping every name, number and date.",
    "Write down all facts of the context above as JSON.",
    "Gather what belongs together in the context above: list for each topic all that is said.",
    "Ask a question about a detail of the context above that few readers notice, and answer it.",
    "Ask a question that needs two distant parts of the context above, and answer it.",
    "Ask what somebody who has to act on the context above would ask first, and answer it.",
)
"""Prompts of ``"self_study"``: a summary, structure, aggregation, and three questions."""

_ON = "Repeat the previous context verbatim, from where it goes on after these words: "
_PIECE = 2048
_OVERLAP = 8


def passages(
    memory: KVMemory, reader: Reader, queries: str | Sequence[str], answer_tokens: int
) -> list[torch.Tensor]:
    """Returns the texts, as token ids ``[token]``, whose queries are the reference.

    Args:
        memory: the memory that they are read over.
        reader: the model.
        queries: ``"repeat"``, ``"self_study"``, ``"self_study+repeat"`` or a list of prompts.
        answer_tokens: tokens at most of the greedy answer that follows a prompt; 0 for none.

    Raises:
        InvalidArgument: if the memory has no tokens to repeat, or no position is left.
    """
    found: list[torch.Tensor] = []
    prompts = STUDY if isinstance(queries, str) else queries
    if not isinstance(queries, str) or queries.startswith("self_study"):
        found += [_answered(memory, reader, prompt, answer_tokens) for prompt in prompts]
    if isinstance(queries, str) and queries.endswith("repeat"):
        found += _repeated(memory, reader)
    left = room(memory)
    if left is not None and left < 1:
        raise InvalidArgument(
            f"the memory ends at position {memory.next_position}, where the model's positions do: "
            "nothing can be read over it. Take queries='context', 'calibrated' or 'random'"
        )
    return [tokens[:left] for tokens in found]


def room(memory: KVMemory) -> int | None:
    """Returns how many positions follow the memory under the same frequencies; None: no end."""
    ends = [spec.rope.switch for spec in memory.model.layers if spec.rope and spec.rope.switch]
    ends = [end for end in ends if end >= memory.next_position]
    if memory.model.max_position is not None:
        ends.append(memory.model.max_position)
    return max(0, min(ends) - memory.next_position) if ends else None


def _answered(memory: KVMemory, reader: Reader, prompt: str, tokens: int) -> torch.Tensor:
    asked = reader.turn(memory, _set_off(memory, prompt))
    if not tokens:
        return asked
    answer = reader.encode(reader.ask(memory, _set_off(memory, prompt), tokens))
    return torch.cat((asked, answer))


def _repeated(memory: KVMemory, reader: Reader) -> list[torch.Tensor]:
    context = torch.cat(list(_context(memory, reader)))
    left = room(memory)
    size = _PIECE if left is None else max(1, min(_PIECE, left - _OVERLAP))
    found = []
    for start in range(0, len(context), size):
        prompt = REPEAT if start == 0 else _ON
        tokens = reader.turn(memory, _set_off(memory, prompt))
        # A piece from within the context is announced by the words before it.
        before = context[max(0, start - _OVERLAP) : start]
        found.append(torch.cat((tokens, before, context[start : start + size])))
    return found


def _context(memory: KVMemory, reader: Reader) -> Iterator[torch.Tensor]:
    """Yields the tokens to repeat: of a text without its BOS, of a chat its messages."""
    source = _source(memory)
    if source.messages:
        for message in source.messages:
            yield reader.encode(message.content + "\n")
        return
    spelled = (source.offsets[:, 1] > source.offsets[:, 0]).nonzero()
    yield source.tokens[int(spelled[0]) if len(spelled) else 0 :].cpu()


def _source(memory: KVMemory) -> Source:
    if memory.source is None:
        raise InvalidArgument(
            "queries='repeat' has the model repeat the context's tokens; this memory has none. "
            "Take queries='self_study', 'calibrated', 'random' or a list of prompts"
        )
    return memory.source


def _set_off(memory: KVMemory, prompt: str) -> str:
    """Returns a prompt as its own paragraph, where the context is no chat."""
    chat = memory.source is not None and memory.source.chat is not None
    return prompt if chat else f"\n\n{prompt}\n\n"
