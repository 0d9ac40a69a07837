"""Request: what to send to an engine so that it answers from a stored memory, and the check after.

An engine has one token per slot. A request begins with as many placeholders as the memory has
slots, and names the memory; the engine puts the memory's keys and values in their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, NotServed
from kvedit.memory import KVMemory
from kvedit.runtime.text import Context, encode_turn, is_messages
from kvedit.serving.outline import outline
from kvedit.serving.slots import servable_form
from kvedit.serving.template import placeholder, template_arguments
from kvedit.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Request", "request"]


@dataclass(frozen=True)
class Request:
    """One prompt behind one version of a stored memory.

    Args:
        memory: record digest of the memory, so that a name that moves changes nothing.
        slots: slots that the engine is to take from it.
        prompt_ids: one placeholder per slot, then the tokens of the prompt.
        turns: the prompt as chat messages; empty where it continues a text.
        template_arguments: what the server's chat template needs to know.
    """

    memory: str
    slots: int
    prompt_ids: tuple[int, ...]
    turns: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] | None = None

    @property
    def kv_transfer_params(self) -> dict[str, str]:
        """What names the memory, for the engine's ``kv_transfer_params``."""
        return {"memory": self.memory}

    @property
    def extra_args(self) -> dict[str, Any]:
        """The same for vLLM's ``SamplingParams(extra_args=…)``."""
        return {"kv_transfer_params": self.kv_transfer_params}

    def completion(self, **options: Any) -> dict[str, Any]:
        """Returns the body of ``POST /v1/completions``.

        Args:
            **options: further fields, such as ``max_tokens``.
        """
        ids = list(self.prompt_ids)
        return {**options, "prompt": ids, "kv_transfer_params": self.kv_transfer_params}

    def chat(self, **options: Any) -> dict[str, Any]:
        """Returns the body of ``POST /v1/chat/completions``.

        The server needs kvedit's chat template, see :func:`kvedit.serving.chat_template`.

        Args:
            **options: further fields, such as ``max_tokens``.

        Raises:
            InvalidArgument: if the request continues a text.
        """
        if not self.turns:
            raise InvalidArgument(
                "this request continues a text: make it with chat=True, or send completion()"
            )
        return {
            **options,
            "messages": [dict(turn) for turn in self.turns],
            "chat_template_kwargs": dict(self.template_arguments or {}),
            "kv_transfer_params": self.kv_transfer_params,
        }

    def check(self, output: Any) -> None:
        """Raises unless the engine answered from the memory.

        A whole answer carries a receipt with the memory's digest. The last piece of a stream
        carries usage alone: that it counts the slots as cached is the best there is, and a server
        without the connector may have seen the placeholders before.

        Args:
            output: a ``RequestOutput`` of vLLM, or what its HTTP endpoints answered, as an object
                or as JSON.

        Raises:
            NotServed: if it did not, or nothing says that it did.
        """
        receipt = _field(output, "kv_transfer_params")
        if receipt is not None:
            found = (_field(receipt, "memory"), _field(receipt, "slots"))
            if found == (self.memory, self.slots):
                return
            raise NotServed(
                f"asked for memory {self.memory[:12]} of {self.slots} slots; the engine's receipt "
                f"names {str(found[0])[:12]} of {found[1]}"
            )
        cached = _cached(output)
        if not _streamed(output) or cached is None or cached < self.slots:
            raise NotServed(
                f"nothing says that the engine answered from memory {self.memory[:12]}: expected a "
                f"receipt in kv_transfer_params, or {self.slots} cached tokens in the usage of a "
                f"stream, found {'none' if cached is None else cached}. Is the server started by "
                "kvedit serve --engine vllm (MemoryConnector, --enable-prompt-tokens-details)?"
            )


def request(
    store: Store,
    ref: str,
    prompt: Context,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat: bool | None = None,
) -> Request:
    """Returns what to send so that an engine continues a stored memory by a prompt.

    The prompt's tokens are those that ``kv.generate`` would feed.

    Args:
        store: the store that the server reads as well.
        ref: name, version or digest of the memory.
        prompt: a text, chat messages, or token ids.
        tokenizer: the model's; None for token ids, whose placeholders are then id 0 or 1.
        chat: True or False overrides how the context was captured.

    Raises:
        NotFound: if the store has no such memory.
        InvalidArgument: if the memory can't be served, or the prompt not be encoded.
        UnsupportedModel: if the memory's model can't be served.
        TemplateNotCuttable: if the chat template renders the longer chat differently.
    """
    record = store.show(ref).record
    memory = outline(store, record.record)
    slots = servable_form(memory).slots
    grown = encode_turn(tokenizer, memory.source, prompt, chat)
    ids = grown.tokens[memory.tokens_count :].tolist()
    turns = _turns(memory, prompt, chat)
    filler = placeholder(tokenizer, ids[0])[1] if tokenizer is not None else int(ids[0] == 0)
    return Request(
        memory=record.record,
        slots=slots,
        prompt_ids=(*[filler] * slots, *ids),
        turns=turns,
        template_arguments=template_arguments(memory.source, slots) if turns else None,
    )


def _turns(memory: KVMemory, prompt: Context, chat: bool | None) -> tuple[Mapping[str, Any], ...]:
    if is_messages(prompt):
        return tuple(prompt) if chat is not False else ()  # type: ignore[arg-type]
    started = memory.source is not None and memory.source.chat is not None
    if isinstance(prompt, str) and (started if chat is None else chat):
        return ({"role": "user", "content": prompt},)
    return ()


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _streamed(output: Any) -> bool:
    """Whether it is a piece of a stream: those can't carry a receipt."""
    return str(_field(output, "object") or "").endswith(".chunk") or _is_completion_piece(output)


def _is_completion_piece(output: Any) -> bool:
    # The usage piece of a completion stream has no choices, and the same object as an answer.
    choices = _field(output, "choices")
    return isinstance(choices, Sequence) and not choices


def _cached(output: Any) -> int | None:
    details = _field(_field(output, "usage"), "prompt_tokens_details")
    found = _field(details, "cached_tokens")
    return int(found) if found is not None else None
