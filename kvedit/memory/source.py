"""Source: the tokens behind a memory, with the text they spell and the chat they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvedit.axes import expect_axes
from kvedit.memory.frozen import check_versions, note_versions

__all__ = ["ChatState", "Message", "Source"]


@dataclass(frozen=True)
class Message:
    """One chat message and where its content stands in the rendered text.

    Args:
        role: for example ``"system"`` or ``"user"``.
        content: the message's text.
        start: first character of the content in ``Source.text``, or -1 if it wasn't found there.
        stop: one past its last character.
    """

    role: str
    content: str
    start: int = -1
    stop: int = -1


@dataclass(frozen=True)
class ChatState:
    """What is needed to go on with a chat.

    Args:
        template: digest of the chat template that rendered the messages.
        cut: number of tokens at which the rendering was cut: all that the memory has.
    """

    template: str
    cut: int


@dataclass(frozen=True, eq=False)
class Source:
    """Tokens of a memory. With it, spans resolve without a tokenizer.

    Args:
        tokens: ``[n]`` int64 token ids, special tokens included.
        text: the text that the tokens spell.
        offsets: ``[n, 2]`` int64, each token's character range in ``text``; a token without
            characters (a BOS that the text lacks) has an empty range.
        messages: the chat messages, empty for a text.
        chat: how to continue as a chat; None for a text.
    """

    tokens: torch.Tensor
    text: str
    offsets: torch.Tensor
    messages: tuple[Message, ...] = ()
    chat: ChatState | None = None

    def __post_init__(self) -> None:
        """Checks that every token has its offsets, and notes the tensors' version counters."""
        note_versions(self, self.tensors())
        expect_axes("tokens", self.tokens, "token")
        expect_axes("offsets", self.offsets, "token range", token=len(self), range=2)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.tokens.shape[0]

    def tensors(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """Returns the tensors with their names."""
        return ("tokens", self.tokens), ("offsets", self.offsets)

    def check_unmodified(self) -> None:
        """Raises MutatedMemory if a tensor was written in place since this object was made."""
        check_versions(self, self.tensors())

    def token_range(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the tokens that touch characters ``start`` to ``stop``; empty as (0, 0)."""
        touch = (self.offsets[:, 0] < stop) & (self.offsets[:, 1] > start)
        index = touch.nonzero().squeeze(1)
        return (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)

    def to_json(self) -> dict[str, Any]:
        """Returns all but the tensors as plain data."""
        return {
            "text": self.text,
            "messages": [asdict(message) for message in self.messages],
            "chat": asdict(self.chat) if self.chat else None,
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], tokens: torch.Tensor, offsets: torch.Tensor
    ) -> Source:
        """Returns the source that :meth:`to_json` wrote, with its tensors."""
        messages = tuple(Message(**message) for message in data["messages"])
        chat = ChatState(**data["chat"]) if data["chat"] else None
        return cls(tokens, data["text"], offsets, messages, chat)
