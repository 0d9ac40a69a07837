"""Replies: the bodies of answers, in the formats of OpenAI's two endpoints."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvedit.serving.openai.events import Chosen, Finished, Piece
from kvedit.serving.openai.probabilities import chat_logprobs, text_logprobs

__all__ = ["ChatFormat", "CompletionFormat", "Format", "usage"]


@dataclass(frozen=True)
class Format(ABC):
    """How one answer is written down.

    Args:
        model: the model, as the client named it.
        fingerprint: which memory answered.
        id: of the answer.
        created: seconds since 1970.
    """

    model: str
    fingerprint: str
    id: str
    created: int

    @classmethod
    def of(cls, model: str, record: str) -> Format:
        """Returns the format of a new answer.

        Args:
            model: the model, as the client named it.
            record: record digest of the memory; empty for the plain model.
        """
        name = f"kv_{record[:16]}" if record else "plain"
        return cls(model, name, f"{cls.prefix()}-{uuid.uuid4().hex}", int(time.time()))

    @classmethod
    @abstractmethod
    def prefix(cls) -> str:
        """Returns how ids begin."""

    @abstractmethod
    def body(self, answers: Sequence[Finished]) -> dict[str, Any]:
        """Returns the whole answer."""

    def opening(self) -> list[dict[str, Any]]:
        """Returns chunks before the first token."""
        return []

    @abstractmethod
    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the chunk of one more token."""

    @abstractmethod
    def closing(self, index: int, finished: Finished) -> dict[str, Any]:
        """Returns the chunk that ends a choice."""

    @abstractmethod
    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns a chunk with these choices."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class CompletionFormat(Format):
    """``/v1/completions``."""

    @classmethod
    def prefix(cls) -> str:
        """Returns how ids begin."""
        return "cmpl"

    def body(self, answers: Sequence[Finished]) -> dict[str, Any]:
        """Returns the whole answer."""
        choices = [
            _text_choice(index, one.text, one.chosen, one.reason)
            for index, one in enumerate(answers)
        ]
        return {**self.chunk(choices), "usage": usage(answers)}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the chunk of one more token."""
        chosen = None if piece.chosen is None else (piece.chosen,)
        return self.chunk([_text_choice(index, piece.text, chosen, None)])

    def closing(self, index: int, finished: Finished) -> dict[str, Any]:
        """Returns the chunk that ends a choice."""
        return self.chunk([_text_choice(index, finished.rest, None, finished.reason)])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns a chunk with these choices."""
        return {**self._head("text_completion"), "choices": choices}


class ChatFormat(Format):
    """``/v1/chat/completions``."""

    @classmethod
    def prefix(cls) -> str:
        """Returns how ids begin."""
        return "chatcmpl"

    def body(self, answers: Sequence[Finished]) -> dict[str, Any]:
        """Returns the whole answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": chat_logprobs(one.chosen),
                "finish_reason": one.reason,
            }
            for index, one in enumerate(answers)
        ]
        return {
            **self._head("chat.completion"), "choices": choices, "usage": usage(answers),
        }  # fmt: skip

    def opening(self) -> list[dict[str, Any]]:
        """Returns the chunk that says who speaks."""
        return [self.chunk([_delta(0, {"role": "assistant", "content": ""}, None, None)])]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the chunk of one more token."""
        chosen = None if piece.chosen is None else (piece.chosen,)
        return self.chunk([_delta(index, {"content": piece.text}, chosen, None)])

    def closing(self, index: int, finished: Finished) -> dict[str, Any]:
        """Returns the chunk that ends a choice."""
        delta = {"content": finished.rest} if finished.rest else {}
        return self.chunk([_delta(index, delta, None, finished.reason)])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns a chunk with these choices."""
        return {**self._head("chat.completion.chunk"), "choices": choices}


def usage(answers: Sequence[Finished]) -> dict[str, Any]:
    """Returns the counts; a memory's slots are prompt tokens that were not computed."""
    held = sum(one.memory for one in answers)
    prompt = held + sum(one.prompt for one in answers)
    made = sum(one.tokens for one in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": held},
    }


def _text_choice(
    index: int, text: str, chosen: Sequence[Chosen] | None, reason: str | None
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": text_logprobs(chosen),
        "finish_reason": reason,
    }


def _delta(
    index: int, delta: dict[str, Any], chosen: Sequence[Chosen] | None, reason: str | None
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(chosen),
        "finish_reason": reason,
    }
