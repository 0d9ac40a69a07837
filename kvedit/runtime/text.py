"""From text, chat messages or ids to tokens with their source; and on from where a source ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument, TemplateNotCuttable
from kvedit.memory import ChatState, Message, Source
from kvedit.models.fingerprint import template_digest
from kvedit.runtime.spelling import TAIL, following_ids, plain_ids, spell_behind, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Context",
    "cut_source",
    "empty_source",
    "encode",
    "encode_turn",
    "extend_source",
    "is_messages",
]

Context = str | Sequence[Mapping[str, Any]] | Sequence[int] | torch.Tensor
"""A text, chat messages, or token ids."""


def is_messages(context: Any) -> bool:
    """Whether ``context`` is a list of chat messages."""
    return isinstance(context, Sequence) and bool(context) and isinstance(context[0], Mapping)


def encode(tokenizer: PreTrainedTokenizerBase | None, context: Context) -> Source:
    """Returns the tokens of a context, BOS once if the tokenizer adds one.

    Raises:
        InvalidArgument: if it is empty, or a text without a tokenizer.
    """
    if isinstance(context, str) and not context:
        # A tokenizer's BOS alone would still make a memory, of nothing.
        raise InvalidArgument("the context is empty: expected a text, messages or token ids")
    if isinstance(context, torch.Tensor) or (
        isinstance(context, Sequence) and context and isinstance(context[0], int)
    ):
        source = _from_ids(tokenizer, torch.as_tensor(context, dtype=torch.int64))
    elif tokenizer is None:
        raise InvalidArgument("a text or chat needs a tokenizer; without one, pass token ids")
    elif isinstance(context, str):
        source = _from_text(tokenizer, context)
    elif is_messages(context):
        source = _from_messages(tokenizer, context)  # type: ignore[arg-type]
    elif not context:
        raise InvalidArgument("the context is empty: expected a text, messages or token ids")
    else:
        raise InvalidArgument(
            f"expected a text, chat messages or token ids, found {type(context).__name__}"
        )
    if len(source) == 0:
        raise InvalidArgument("the context is empty: it has no tokens")
    return source


def encode_turn(
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source | None,
    prompt: Context,
    chat: bool | None = None,
) -> Source:
    """Returns ``source`` with the prompt's tokens behind it, as the context would go on.

    A text goes on as text; chat messages go on with the next user turn and the generation prompt.

    Args:
        tokenizer: the tokenizer; may be None for ids.
        source: what is there so far; None or without tokens for a memory that no tokens made.
        prompt: a text, messages, or ids.
        chat: True or False overrides how the context was captured.

    Raises:
        TemplateNotCuttable: if the template renders the longer chat differently.
        InvalidArgument: if the prompt is empty or can't be encoded.
    """
    start = source or empty_source()
    if isinstance(prompt, torch.Tensor) or (
        isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], int)
    ):
        ids = torch.as_tensor(prompt, dtype=torch.int64).reshape(-1)
        grown = extend_source(start, ids, tokenizer)
    elif tokenizer is None:
        raise InvalidArgument("a text prompt needs a tokenizer; without one, pass token ids")
    elif chat if chat is not None else (start.chat is not None or is_messages(prompt)):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        grown = _encode_chat_turn(tokenizer, start, turns)  # type: ignore[arg-type]
    elif isinstance(prompt, str):
        ids = torch.tensor(following_ids(tokenizer, start, prompt), dtype=torch.int64)
        grown = extend_source(start, ids, tokenizer)
    else:
        raise InvalidArgument(f"expected a text, messages or ids, found {type(prompt).__name__}")
    if len(grown) == len(start):
        raise InvalidArgument("the prompt is empty: it has no tokens")
    return grown


def extend_source(
    source: Source, ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> Source:
    """Returns ``source`` with more tokens, and their text if there is a tokenizer."""
    if tokenizer is None:
        text, offsets = "", torch.zeros(len(ids), 2, dtype=torch.int64)
    else:
        text, offsets = spell_behind(tokenizer, source.tokens[-TAIL:], ids)
    return replace(
        source,
        tokens=torch.cat((source.tokens, ids)),
        text=source.text + text,
        offsets=torch.cat((source.offsets, offsets + len(source.text))),
    )


def cut_source(source: Source, tokens: int) -> Source:
    """Returns ``source`` with only its first ``tokens`` tokens, and the text that they spell."""
    if tokens == len(source):
        return source
    end = int(source.offsets[tokens - 1, 1]) if tokens else 0
    messages = tuple(message for message in source.messages if message.start < end)
    return replace(
        source,
        tokens=source.tokens[:tokens],
        text=source.text[:end],
        offsets=source.offsets[:tokens],
        messages=messages,
    )


def empty_source() -> Source:
    """Returns a source of no tokens."""
    return Source(torch.zeros(0, dtype=torch.int64), "", torch.zeros(0, 2, dtype=torch.int64))


def _from_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Source:
    bos = tokenizer.bos_token
    # A text that spells out BOS must not get a second one.
    plain = bool(bos and text.startswith(bos))
    ids, offsets = tokenize(tokenizer, text, special=not plain)
    return Source(ids, text, offsets)


def _from_ids(tokenizer: PreTrainedTokenizerBase | None, ids: torch.Tensor) -> Source:
    if ids.ndim != 1:
        raise InvalidArgument(f"expected token ids of one context [n], found {list(ids.shape)}")
    return extend_source(empty_source(), ids.cpu(), tokenizer)


def _from_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> Source:
    text = _render(tokenizer, messages, prompt=False)
    ids, offsets = tokenize(tokenizer, text, special=False)
    state = ChatState(template_digest(tokenizer), len(ids))
    return Source(ids, text, offsets, _locate(messages, text, 0), state)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise InvalidArgument("this tokenizer has no chat template: pass a text, or chat=False")
    for message in messages:
        if not isinstance(message.get("content"), str) or "role" not in message:
            raise InvalidArgument(f"a message needs a role and a text content, found {message!r}")
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt
        )
    )


def _locate(messages: Sequence[Mapping[str, Any]], text: str, cursor: int) -> tuple[Message, ...]:
    found = []
    for message in messages:
        content = message["content"]
        shown = content if content in text[cursor:] else content.strip()
        start = text.find(shown, cursor) if shown else -1
        if start >= 0:
            cursor = start + len(shown)
            found.append(Message(message["role"], content, start, cursor))
        else:
            found.append(Message(message["role"], content))
    return tuple(found)


def _encode_chat_turn(
    tokenizer: PreTrainedTokenizerBase, source: Source, turns: Sequence[Mapping[str, Any]]
) -> Source:
    if source.chat and source.chat.template != template_digest(tokenizer):
        raise TemplateNotCuttable(
            "the tokenizer's chat template is not the one that rendered this memory "
            f"(digests {source.chat.template[:12]}, {template_digest(tokenizer)[:12]})"
        )
    past = [{"role": message.role, "content": message.content} for message in source.messages]
    if not past and len(source):
        past, rest = [], _render(tokenizer, turns, prompt=True)
    else:
        full = _render(tokenizer, [*past, *turns], prompt=True)
        rest = _behind(tokenizer, source, full)
    ids = torch.tensor(plain_ids(tokenizer, rest), dtype=torch.int64)
    grown = extend_source(source, ids, tokenizer)
    messages = (*source.messages, *_locate(turns, grown.text, len(source.text)))
    state = source.chat or ChatState(template_digest(tokenizer), len(source))
    return replace(grown, messages=messages, chat=state)


def _behind(tokenizer: PreTrainedTokenizerBase, source: Source, full: str) -> str:
    """Returns what the longer rendering adds, if it begins with what is there."""
    cut = source.chat.cut if source.chat else 0
    captured = source.tokens[:cut].tolist()
    starts = full.startswith(source.text) and plain_ids(tokenizer, full)[:cut] == captured
    if not starts:
        raise TemplateNotCuttable(
            "the chat template renders the longer conversation differently from what this memory "
            "holds, so it can't be cut there. Capture the conversation up to a place where it can, "
            "or pass chat=False and the prompt's text with its markers"
        )
    return full[len(source.text) :]
