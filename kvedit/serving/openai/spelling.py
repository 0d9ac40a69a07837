"""Speller: the text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Speller", "cut"]

_OPEN = "\ufffd"  # what decoders write for a character whose last bytes are still to come


class Speller:
    """Says what is certain: no half character, and nothing that may become a stop string.

    Args:
        tokenizer: the tokenizer.
        stop: texts that end the answer.

    Attributes:
        said: what was said so far.
        length: characters that all tokens so far spell.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        """No token has come yet."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self.said = ""
        self.length = 0

    def feed(self, token: int) -> str:
        """Returns what the text grew by for certain; may be empty."""
        self._tokens.append(token)
        whole = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        self.length = len(whole)
        text = cut(whole, self._stop)
        certain = text[: len(text) - self._doubtful(text)]
        return self._grow(certain)

    def finish(self, text: str) -> str:
        """Returns what of the whole answer was not said yet."""
        return self._grow(text)

    def _grow(self, text: str) -> str:
        if not text.startswith(self.said):
            return ""
        piece, self.said = text[len(self.said) :], text
        return piece

    def _doubtful(self, text: str) -> int:
        """Returns how many last characters may yet change or be cut away."""
        solid = text.rstrip(_OPEN)
        for count in range(min(len(solid), max(map(len, self._stop), default=0)), 0, -1):
            if any(stop.startswith(solid[-count:]) for stop in self._stop):
                return len(text) - len(solid) + count
        return len(text) - len(solid)


def cut(text: str, stop: Sequence[str]) -> str:
    """Returns a text up to the first stop string, as a session's reply is cut."""
    for end in stop:
        text = text.split(end, 1)[0]
    return text
