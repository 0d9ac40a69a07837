"""Template: a model's chat template with placeholders for a memory's slots in front.

An engine takes one token per slot. The template writes them, so that a chat goes through the
engine's own endpoint: ``memory_slots`` placeholders, then what the chat adds to the conversation
that the memory holds. Of a conversation that goes on, the whole is rendered and the beginning cut
off, as ``kv.generate`` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.memory import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_template", "placeholder", "template_arguments"]

_WRAPPED = """\
{{%- set memory_slots = memory_slots | default(0) | int -%}}
{{%- for _ in range(memory_slots) -%}}{{{{ {token} }}}}{{%- endfor -%}}
{{%- set messages = (memory_messages | default([])) + messages -%}}
{{%- set memory_rendered %}}{template}{{% endset -%}}
{{{{- memory_rendered[memory_characters | default(0) | int:] -}}}}"""

_PREFERRED = ("unk_token", "pad_token", "eos_token", "bos_token")


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the tokenizer's chat template with placeholders in front.

    Without ``memory_slots`` it renders what the tokenizer's own template renders.

    Raises:
        InvalidArgument: if the tokenizer has no chat template, or several.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str) or not own:
        kind = "several chat templates" if own else "no chat template"
        raise InvalidArgument(
            f"this tokenizer has {kind}: memories are served by /v1/completions only"
        )
    text, _ = placeholder(tokenizer)
    # Jinja drops a last newline of a template, but not of a block.
    return _WRAPPED.format(token=repr(text), template=own.removesuffix("\n"))


def placeholder(tokenizer: PreTrainedTokenizerBase, not_id: int | None = None) -> tuple[str, int]:
    """Returns a special token to stand for slots, as text and as id.

    Args:
        tokenizer: the tokenizer.
        not_id: an id that it must not have: that of the first token behind the slots.

    Raises:
        InvalidArgument: if there is none that is one token however often it is repeated.
    """
    named = [getattr(tokenizer, name, None) for name in _PREFERRED]
    for text in dict.fromkeys([*named, *tokenizer.all_special_tokens]):
        if not text:
            continue
        found = int(tokenizer.convert_tokens_to_ids(text))
        if found != not_id and tokenizer.encode(text * 3, add_special_tokens=False) == [found] * 3:
            return str(text), found
    raise InvalidArgument(
        "this tokenizer has no special token that can stand for a slot: one that is a single "
        "token also when repeated"
    )


def template_arguments(source: Source | None, slots: int) -> Mapping[str, Any]:
    """Returns ``chat_template_kwargs`` for a chat that goes on behind a memory.

    Args:
        source: the memory's tokens and messages, or None.
        slots: slots that are served.
    """
    messages = () if source is None else source.messages
    if source is None or not messages:
        return {"memory_slots": slots}
    past = [{"role": message.role, "content": message.content} for message in messages]
    cut = len(source.text)
    return {"memory_slots": slots, "memory_messages": past, "memory_characters": cut}
