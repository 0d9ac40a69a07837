"""prompted and go_on: a prompt that is in memory to its last token, and what follows behind it.

A token's keys and values are written when it is processed, and its logits come of the same pass.
To steer the slot of the prompt's last token, that token must have been read, and something must
be read behind it to see the edit: a neutral offset token (Belitsky et al. 2025, KV cache steering,
arXiv 2507.08799, take a line break).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.models.inspection import inspect
from kvedit.runtime.attaching import attach, open_session
from kvedit.runtime.capturing import capture
from kvedit.runtime.spelling import plain_ids
from kvedit.runtime.text import is_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.runtime.session import Reply

__all__ = ["go_on", "offset_ids", "prompted"]


def prompted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: KVMemory | None,
    prompt: Any,
    *,
    chat: bool | None = None,
    strict: bool = True,
) -> Any:
    """Returns the memory of a context and a whole prompt: its last token has a slot, too.

    A chat's prompt ends with the generation prompt, so the last slot is where the assistant's turn
    begins. :meth:`kvedit.editors.Steer` with ``at="last"`` edits that slot, :func:`go_on`
    continues behind it.

    Args:
        model: the model.
        tokenizer: its tokenizer; may be None for token ids.
        memory: what stands before the prompt; None for nothing.
        prompt: a text, chat messages or token ids; or a list of texts, of chats or of id lists,
            read as a batch.
        chat: True or False overrides how the context was captured.
        strict: whether the compatibility gate holds.

    Returns:
        A memory, or a list of them for a list of prompts.

    Raises:
        InvalidArgument: if a prompt is empty.
        TemplateNotCuttable: if the chat template can't go on behind the memory.
    """
    several = _several(prompt)
    prompts = list(prompt) if several else [prompt]
    if memory is None and not chat and not any(map(is_messages, prompts)):
        # From nothing, a text begins as captured texts do: with BOS where the tokenizer adds one.
        made = capture(model, tokenizer, prompts)
    else:
        rows = [memory] * len(prompts)
        found = inspect(model, tokenizer)
        with open_session(model, found, rows, tokenizer, strict) as session:
            session.feed(prompts, chat)
            made = [session.memory(row) for row in range(len(prompts))]
    return made if several else made[0]


def go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: KVMemory | Sequence[KVMemory],
    offset: str | Sequence[int] = "\n",
    *,
    strict: bool = True,
    **options: Any,
) -> Any:
    """Returns the text by which the model goes on behind a memory, after an offset token.

    Nothing is rendered: what the memory ends with is what the model continues. The offset is
    spelled by itself, so that no tokenizer joins it with what stands before; it is not part of
    the text.

    Args:
        model: the model that made the memory.
        tokenizer: its tokenizer; without it the offset must be ids, and ids come back.
        memory: one memory, or a list: one per row of a batch.
        offset: what is fed behind each memory: a text, or token ids.
        strict: whether the compatibility gate holds.
        **options: see :meth:`~kvedit.runtime.session.Session.generate`; greedy unless they sample.

    Returns:
        A text (or ids), or a list of them for a list of memories.

    Raises:
        InvalidArgument: if the offset has no token.
    """
    ids = offset_ids(tokenizer, offset)
    rows = 1 if isinstance(memory, KVMemory) else len(memory)
    with attach(model, memory, tokenizer, strict=strict) as session:
        found = session.generate([ids] * rows, **options)
    replies: list[Reply] = found if isinstance(found, list) else [found]
    texts = [list(r.tokens) if tokenizer is None else r.text for r in replies]
    return texts[0] if isinstance(memory, KVMemory) else texts


def offset_ids(tokenizer: PreTrainedTokenizerBase | None, offset: str | Sequence[int]) -> list[int]:
    """Returns the ids of an offset, spelled by itself.

    Raises:
        InvalidArgument: if it has no token, or is a text and there is no tokenizer.
    """
    if isinstance(offset, str) and tokenizer is None:
        raise InvalidArgument("an offset text needs a tokenizer; without one, pass token ids")
    if isinstance(offset, str) and tokenizer is not None:
        ids = plain_ids(tokenizer, offset)
    else:
        ids = [int(token) for token in offset]
    if not ids:
        raise InvalidArgument(
            f"the offset {offset!r} has no token; a token must be read behind the memory, since "
            "the pass that wrote its last slot came before the edit"
        )
    return ids


def _several(prompt: Any) -> bool:
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return not is_messages(prompt) and not isinstance(prompt[0], int)
