"""What any editor leaves of a context, as a start: a selection, a compaction, a match."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvedit.editors.base import Editor
from kvedit.memory import KVMemory
from kvedit.runtime import ModelReader, capture
from kvedit.runtime.text import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["edited"]


def edited(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    context: Context | KVMemory,
    editor: Editor,
) -> KVMemory:
    """Returns a context's memory after an edit, with a reader where the editor needs one.

    Args:
        model: the model.
        tokenizer: its tokenizer; may be None for a memory and an editor without texts.
        context: text, chat messages or token ids that fit the model's context, or their memory.
        editor: for example ``SnapKV(budget=64)`` or ``AttentionMatching(budget=64)``.

    Raises:
        InvalidArgument: if the editor refuses the memory.
    """
    memory = context if isinstance(context, KVMemory) else capture(model, tokenizer, context)
    return editor(memory, reader=ModelReader(model, tokenizer))
