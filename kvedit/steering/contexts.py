"""From one side of a pair to tokens, and to those tokens whose vectors are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import Source, Span, SpanQuery
from kvedit.runtime.spelling import tokenize
from kvedit.runtime.text import encode
from kvedit.steering.contrast import Side, plain_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Read", "plain_read", "read_tokens", "side_source"]

Read = str | int | SpanQuery | Mapping[str, Any]
"""Which tokens are read: ``"last"``, ``"mean"``, a number below 0 that counts from the end (-1 is
the last), or a text or query of tokens, whose vectors are averaged."""


def side_source(
    tokenizer: PreTrainedTokenizerBase | None, side: Side, prompt: bool | None
) -> Source:
    """Returns the tokens of a text, chat or ids.

    Args:
        tokenizer: the tokenizer; may be None for ids.
        side: the context.
        prompt: for chats, see :class:`~kvedit.steering.contrast.Contrast`.

    Raises:
        InvalidArgument: if the tokenizer has no chat template, or it does not fit the messages.
    """
    if isinstance(side, str) or isinstance(side[0], int):
        return encode(tokenizer, plain_side(side))
    messages = plain_side(side)
    if tokenizer is None or not tokenizer.chat_template:
        raise InvalidArgument("a chat needs a tokenizer with a chat template: pass texts instead")
    goes_on = messages[-1]["role"] == "assistant" and prompt is None
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=bool(prompt is None and not goes_on) or bool(prompt),
                continue_final_message=goes_on,
            )
        )
    except Exception as error:  # templates raise errors of Jinja and their own
        raise InvalidArgument(
            f"the chat template does not take these messages, whose roles are "
            f"{[message['role'] for message in messages]}: {error}"
        ) from error
    ids, offsets = tokenize(tokenizer, text, special=False)
    return Source(ids, text, offsets)


def read_tokens(
    source: Source, read: Read, tokenizer: PreTrainedTokenizerBase | None
) -> torch.Tensor:
    """Returns the indices ``[token]`` of the tokens whose vectors are averaged.

    ``"mean"`` leaves out special tokens and the first token: attention sinks have keys and hidden
    states of another size, whose share would change with the length of the text (Xiao et al. 2024,
    StreamingLLM, arXiv 2309.17453).

    Raises:
        InvalidArgument: if the context has no such token.
        SpanNotFound: if nothing fits the text or query.
        AmbiguousSpan: if several places do, and none was chosen.
    """
    total = len(source)
    if isinstance(read, int) or read == "last":
        offset = -1 if isinstance(read, str) else read
        if isinstance(read, bool) or not -total <= offset < 0:
            raise InvalidArgument(
                f"read: a number counts from the end and is below 0; found {read!r} for a context "
                f"of {total} tokens"
            )
        return torch.tensor([total + offset])
    if read == "mean":
        special = [] if tokenizer is None else list(tokenizer.all_special_ids)
        plain = ~torch.isin(source.tokens, torch.tensor(special, dtype=torch.int64))
        plain[0] = total == 1
        found = plain.nonzero().squeeze(1)
        return found if len(found) else torch.tensor([total - 1])
    query = SpanQuery.of(read)
    span = query.find(source) if isinstance(query, SpanQuery) else query
    return span.inside(torch.arange(total)).nonzero().squeeze(1)


def plain_read(read: Read) -> Any:
    """Returns how tokens are chosen as plain data, for facts and lineage.

    Raises:
        InvalidArgument: if it is nothing that can be read, or a span found in one memory.
    """
    if isinstance(read, int) or read in ("last", "mean"):
        if isinstance(read, bool) or (isinstance(read, int) and read >= 0):
            raise InvalidArgument(f"read: a number counts from the end, found {read!r}")
        return read
    query = SpanQuery.of(read)
    if isinstance(query, Span):
        raise InvalidArgument("read: contexts differ, so pass a text or SpanQuery and no Span")
    fields = ("text", "regex", "role", "sentence", "tokens", "slots", "occurrence")
    given = {name: getattr(query, name) for name in fields}
    return {name: value for name, value in given.items() if value is not None}
