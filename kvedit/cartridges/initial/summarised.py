"""A summary that the model writes of its context, as a start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvedit.editors.compacting.budget import as_count
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runtime import capture, generate
from kvedit.runtime.text import Context, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROMPT", "summary"]

PROMPT = (
    "Summarize the text above. Keep every name, number, date and rule that somebody could ask "
    "about, and leave out everything else."
)
"""What the model is asked for."""


def summary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Context | KVMemory,
    slots: int,
    *,
    prompt: str = PROMPT,
) -> KVMemory:
    """Returns the memory of a greedy summary of a corpus, read as a text of its own.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        corpus: text, chat messages or token ids that fit the model's context, or their memory.
        slots: number of slots at most; a short summary has fewer.
        prompt: what the model is asked for, as a chat turn where there is a template.

    Raises:
        InvalidArgument: if the corpus is empty, or the model writes nothing.
        ContextTooLong: if corpus and summary don't fit the model's context.
    """
    as_count("slots", slots, 2)
    memory = corpus if isinstance(corpus, KVMemory) else capture(model, tokenizer, corpus)
    chat = bool(tokenizer.chat_template)
    asked = prompt if chat else f"\n\n{prompt}\n\n"
    text = generate(
        model, tokenizer, memory, asked, max_new_tokens=slots, chat=chat, do_sample=False
    )
    if not text.strip():
        raise InvalidArgument("the model wrote an empty summary: give another prompt or start")
    made: KVMemory = capture(model, tokenizer, encode(tokenizer, text.strip()).tokens[:slots])
    return made
