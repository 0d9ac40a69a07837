"""Prefills: captured memories and what they answer, kept while methods and strengths change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runtime.capturing import capture

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Prefills"]


class Prefills:
    """A model, and the memories it made of contexts, the least recently used dropped first.

    Pass one to several :func:`~kvedit.evals.evaluate` calls: each context is captured once, and
    the unedited memory is asked once. A memory of SmolLM2-135M in float32 takes 46 kB a token.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        keep_bytes: bytes of tensors to keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        keep_bytes: int = 2 << 30,
    ) -> None:
        """Starts empty."""
        if keep_bytes < 0:
            raise InvalidArgument(f"keep_bytes must be 0 or above, found {keep_bytes}")
        self.model, self.tokenizer, self.keep_bytes = model, tokenizer, keep_bytes
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self.captures = 0

    def memory(self, context: str, role: str | None = None) -> KVMemory:
        """Returns the memory of a context, captured at most once while it is kept.

        Args:
            context: a text.
            role: captures it as the only message of a chat; None as plain text.
        """

        def make() -> tuple[KVMemory, int]:
            self.captures += 1
            given = context if role is None else [{"role": role, "content": context}]
            memory: KVMemory = capture(self.model, self.tokenizer, given)
            return memory, memory.nbytes

        found: KVMemory = self.once(("memory", context, role), make)
        return found

    def once(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """Returns what ``make`` returned for ``key``, making it if it is not kept.

        Args:
            key: what it is.
            make: gives it, and its bytes.
        """
        if key not in self._kept:
            value, size = make()
            self._kept[key] = (value, size)
            self._bytes += size
        self._kept.move_to_end(key)
        value = self._kept[key][0]
        while self._bytes > self.keep_bytes and self._kept:
            _, (_, size) = self._kept.popitem(last=False)
            self._bytes -= size
        return value

    def __repr__(self) -> str:
        """How much is kept."""
        return f"Prefills({len(self._kept)} kept, {self._bytes / 1e6:.1f} MB)"
