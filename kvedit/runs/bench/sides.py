"""The two sides of every ratio: what kvedit does, and what the plain model does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.memory import KVMemory
from kvedit.models.cache_argument import cache_argument
from kvedit.runs.bench.pairs import Seconds, Timed, timed
from kvedit.runs.bench.plan import PROMPT
from kvedit.runtime import attach, capture
from kvedit.runtime.saying import saying
from kvedit.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Sides"]

_NAME = "context"


@dataclass(frozen=True, eq=False)
class Sides:
    """One context, and everything that is timed on it.

    Args:
        model: the live model.
        tokenizer: its tokenizer.
        text: the context.
        memory: its memory.
        folder: of a store that holds the memory.
        decode: tokens per decoding time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    memory: KVMemory
    folder: Path
    decode: int

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        folder: Path,
        decode: int,
    ) -> Sides:
        """Returns the sides of a context; its memory is captured and stored."""
        memory = capture(model, tokenizer, text)
        with Store(folder) as store:
            store.put(memory, _NAME)
        return cls(model, tokenizer, text, memory, folder, decode)

    def settle(self) -> None:
        """Waits until the device has done what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def time_capture(self) -> Seconds:
        """Capture of the text, its tokenisation included."""
        return timed(lambda: capture(self.model, self.tokenizer, self.text), self.settle)

    def time_prefill(self) -> Seconds:
        """One forward pass of the plain model over the same ids."""
        ids = self._ids(self.text)
        return timed(lambda: self._forward(ids, self._empty()), self.settle)

    def time_reuse(self) -> Seconds:
        """Open the store, read and check the memory, attach it, first token of a prompt."""

        def reuse() -> int:
            with Store(self.folder) as store:
                memory = store.get(_NAME, device=self.model.device)
            with attach(self.model, memory, self.tokenizer) as session:
                return int(session.feed([PROMPT]).argmax())

        return timed(reuse, self.settle)

    def time_first_token(self) -> Seconds:
        """The plain model over context and prompt, to its first token."""
        ids = self._ids(self.text + PROMPT)

        def first() -> int:
            return int(self._forward(ids, self._empty()).argmax())

        return timed(first, self.settle)

    def decoding(
        self, memory: KVMemory, within: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Timed:
        """Returns a timer of greedy decoding over ``memory``; attaching is left out.

        Args:
            memory: the memory.
            within: makes what the model runs in, such as continuous steering; entering it is left
                out as well.
        """

        def decode() -> Seconds:
            with within(), attach(self.model, memory, self.tokenizer) as session:
                first = session.feed([PROMPT]).argmax(dim=-1, keepdim=True)
                session.cache.reserve(self.decode)
                step = session.forward
                with saying():
                    return timed(
                        lambda: self._greedy(first, lambda ids: step(ids, keep=1)), self.settle
                    )

        return decode

    def plain_decoding(self) -> Timed:
        """Returns a timer of greedy decoding by the plain model over its own cache."""
        cache = self._empty()
        first = self._forward(self._ids(self.text + PROMPT), cache).argmax(dim=-1)

        def decode() -> Seconds:
            seconds = timed(
                lambda: self._greedy(first, lambda ids: self._forward(ids, cache)), self.settle
            )
            cache.crop(-self.decode)
            return seconds

        return decode

    def _greedy(self, first: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        token = first
        for _ in range(self.decode):
            token = step(token)[:, -1].argmax(dim=-1, keepdim=True)

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        with torch.no_grad():
            given = {cache_argument(self.model): cache}
            output = self.model(ids, use_cache=True, logits_to_keep=1, **given)
        logits: torch.Tensor = output.logits
        return logits

    def _ids(self, text: str) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()
