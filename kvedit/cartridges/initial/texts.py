"""Starts that the model reads off a text: its first tokens, sampled chunks, or another text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from kvedit.cartridges.order import draws
from kvedit.editors.compacting.budget import as_budget, as_count
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV
from kvedit.runtime import capture
from kvedit.runtime.generic_text import generic_texts
from kvedit.runtime.text import Context, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["first_tokens", "sampled_chunks", "text_tokens"]


def first_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Context | KVMemory,
    slots: int | float,
) -> KVMemory:
    """Returns the memory of a corpus's first tokens: what a prompt cut short would be.

    Args:
        model: the model.
        tokenizer: its tokenizer; may be None for token ids or a memory.
        corpus: text, chat messages, token ids, or their captured memory. A memory keeps its
            source, so a chat goes on as the chat that it was.
        slots: number of slots, or a fraction of the corpus's tokens.

    Raises:
        InvalidArgument: if the corpus is empty or has fewer tokens, or a memory's first slots are
            not its first tokens.
    """
    if isinstance(corpus, KVMemory):
        return _first_slots(corpus, slots)
    tokens = encode(tokenizer, corpus).tokens
    memory: KVMemory = capture(model, tokenizer, tokens[: _count(slots, len(tokens))])
    return memory


def text_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    slots: int,
    text: str | None = None,
) -> KVMemory:
    """Returns the memory of the first tokens of a text that has nothing to do with the corpus.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        slots: number of slots.
        text: the text; None takes kvedit's generic text.

    Raises:
        InvalidArgument: if the text has fewer tokens.
    """
    given = "\n\n".join(map(str, generic_texts("fit", chat=False))) if text is None else text
    return first_tokens(model, tokenizer, given, as_count("slots", slots, 1))


def sampled_chunks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Context,
    slots: int | float,
    *,
    chunk: int = 64,
    seed: int = 0,
) -> KVMemory:
    """Returns the memory of chunks from all over a corpus, read as one text (SCI).

    Sampled Chunk Initialisation (Diaz 2025, arXiv 2508.17032): ``floor(p / c)`` chunks that don't
    overlap, all placements equally likely, in the corpus's order. A token that the tokenizer puts
    in front of every text stays in front and is none of a chunk. The corpus may be longer than
    the model's context; the result has up to ``chunk - 1`` slots less than asked for.

    Args:
        model: the model.
        tokenizer: its tokenizer; may be None for token ids.
        corpus: text, chat messages or token ids.
        slots: number of slots, or a fraction of the corpus's tokens.
        chunk: tokens of a chunk.
        seed: of the places.

    Raises:
        InvalidArgument: if the corpus has fewer tokens, or no chunk fits the slots.
    """
    as_count("chunk", chunk, 1)
    tokens = encode(tokenizer, corpus).tokens
    count = _count(slots, len(tokens))
    lead = _leading(tokenizer, tokens)
    body = tokens[lead:]
    chunks = (count - lead) // chunk
    if chunks < 1:
        raise InvalidArgument(
            f"{count} slots hold no chunk of {chunk} tokens: give more slots, or a smaller chunk"
        )
    free = len(body) - chunks * chunk
    # Sorted draws with repetition among the free tokens, pushed apart by the chunks before them.
    bars = torch.randint(free + 1, (chunks,), generator=draws(seed, "chunks", chunk)).sort().values
    starts = bars + chunk * torch.arange(chunks)
    places = (starts[:, None] + torch.arange(chunk)).reshape(-1)
    memory: KVMemory = capture(model, tokenizer, torch.cat((tokens[:lead], body[places])))
    return memory


def _count(slots: int | float, available: int) -> int:
    wanted = as_budget(slots)
    count = wanted if isinstance(wanted, int) else max(1, int(available * wanted + 1e-9))
    if count > available:
        raise InvalidArgument(
            f"{count} slots were asked for and the corpus has {available} tokens: ask for fewer, "
            "or train on the captured corpus itself"
        )
    return count


def _leading(tokenizer: PreTrainedTokenizerBase | None, tokens: torch.Tensor) -> int:
    bos = None if tokenizer is None else tokenizer.bos_token_id
    return int(bos is not None and len(tokens) > 0 and int(tokens[0]) == bos)


def _first_slots(memory: KVMemory, slots: int | float) -> KVMemory:
    count = _count(slots, memory.slots)
    layers = {index: _cut(index, layer, count) for index, layer in memory.layers.items()}
    # A context's first tokens have read nothing after them: this is a capture of them alone.
    return dataclasses.replace(memory, layers=layers, next_position=count)


def _cut(index: int, layer: LayerKV, count: int) -> LayerKV:
    first = layer.positions < count
    if layer.positions[first].tolist() != list(range(count)):
        raise InvalidArgument(
            f"layer {index} does not hold one slot for each of the first {count} positions: give "
            "the memory as it was captured, with window='whole'"
        )
    return layer.select(first)
