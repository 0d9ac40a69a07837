"""Session: a model with memories attached; it grows, the memories never change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Message, Source
from kvedit.models.cache_argument import cache_argument
from kvedit.models.inspection import Inspection
from kvedit.runtime.cache import MemoryCache
from kvedit.runtime.grown import grown_memory
from kvedit.runtime.sampling import Stream, sample, sample_expanded
from kvedit.runtime.text import Context, cut_source, empty_source, encode_turn, extend_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Reply", "Session"]


@dataclass(frozen=True)
class Reply:
    """What the model said in one row.

    Args:
        text: without special tokens and without the stop string that ended it.
        tokens: ids as generated, an end token included.
    """

    text: str
    tokens: tuple[int, ...]


class Session:
    """Rows of a batch, each continuing its memory; :func:`kvedit.attach` makes it.

    It is no memory: it grows with every turn. :meth:`memory` takes a row out as one.

    Args:
        model: the live model.
        inspection: its facts.
        memories: one per row; None for a row that starts empty.
        tokenizer: for text prompts; may be None where ids are passed.
        limit: positions at which to stop, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inspection: Inspection,
        memories: Sequence[KVMemory | None],
        tokenizer: PreTrainedTokenizerBase | None,
        limit: int | None,
    ) -> None:
        """Makes the cache; nothing is copied before the first forward pass."""
        self.model, self.inspection, self.tokenizer = model, inspection, tokenizer
        self.memories = tuple(memories)
        self.cache = MemoryCache(inspection.spec, self.memories, limit)
        self._sources = [None if m is None else m.source for m in self.memories]
        self._pending: list[list[int]] = [[] for _ in self.memories]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.cache.rows

    def forward(
        self, ids: torch.Tensor, valid: torch.Tensor | None = None, keep: int | None = None
    ) -> torch.Tensor:
        """Feeds tokens to every row and returns their logits.

        Args:
            ids: ``[batch, query]`` token ids.
            valid: ``[batch, query]`` bool; False marks padding. None means no padding.
            keep: number of last positions whose logits are wanted; None wants all.

        Returns:
            Logits ``[batch, query or keep, vocabulary]``.
        """
        self.flush()
        return self._forward(ids, valid, keep)

    def _forward(
        self, ids: torch.Tensor, valid: torch.Tensor | None, keep: int | None
    ) -> torch.Tensor:
        self.cache.recover()
        device = self.model.device
        ids = ids.to(device)
        real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.to(device)
        starts = self.cache.next_positions.to(device)
        positions = (starts[:, None] + real.cumsum(dim=1) - 1).clamp_min(0)
        named = keep is not None and "logits_to_keep" in signature(self.model.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": keep} if named else {}
        with torch.no_grad():
            output = self.model(
                input_ids=ids,
                attention_mask=real.long(),
                position_ids=positions,
                **{cache_argument(self.model): self.cache},
                **options,
            )
        logits: torch.Tensor = output.logits
        return logits if keep is None else logits[:, -keep:]

    def feed(self, prompt: Context | Sequence[Context], chat: bool | None = None) -> torch.Tensor:
        """Feeds a prompt, as :meth:`generate` takes it, and generates nothing.

        Returns:
            The logits ``[batch, vocabulary]`` that follow.
        """
        with self._turn():
            ids, valid = self._encode(self._per_row(prompt), chat)
            return self._forward(ids, valid, keep=1)[:, -1]

    def generate(
        self,
        prompt: Context | Sequence[Context],
        *,
        max_new_tokens: int = 64,
        chat: bool | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Stream | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Reply | list[Reply]:
        """Continues every row by its prompt and a reply, and keeps both.

        Args:
            prompt: one prompt for the only row or for all rows, or a list of one per row. A
                string continues a text, or is the next user turn of a chat.
            max_new_tokens: tokens at most per row.
            chat: True or False overrides how the context was captured.
            stop: strings that end a reply.
            stream: called with each piece of text; one row only.
            seed: seed of sampling; the global random state is left as it was.
            **options: for transformers' ``generate``, for example ``temperature=0.7``.

        Returns:
            A reply for one row, a list of replies for several.

        Raises:
            InvalidArgument: if prompts and rows don't fit, or an option is not understood.
            ContextTooLong: if prompt and reply could run past the model's positions.
        """
        with self._turn():
            ids, valid = self._encode(self._per_row(prompt), chat)
            lists = sample(
                self.model,
                self.cache,
                ids,
                valid,
                tokenizer=self.tokenizer,
                max_new_tokens=max_new_tokens,
                stop=stop,
                stream=stream,
                seed=seed,
                **options,
            )
            replies = [self._take(row, tokens, stop) for row, tokens in enumerate(lists)]
        return replies[0] if self.rows == 1 else replies

    def generate_many(
        self,
        prompt: Context | Sequence[Context],
        *,
        max_new_tokens: int = 64,
        chat: bool | None = None,
        stop: str | Sequence[str] | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Beam search, or several samples per row. The session can't go on after it.

        Returns:
            ``num_return_sequences`` replies per row, row by row.
        """
        ids, valid = self._encode(self._per_row(prompt), chat)
        lists = sample_expanded(
            self.model,
            self.cache,
            ids,
            valid,
            tokenizer=self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stop,
            **options,
        )
        return [Reply(self._text(tokens, stop), tuple(tokens)) for tokens in lists]

    def memory(self, row: int = 0) -> KVMemory:
        """Returns a row, with all that it grew by, as a new memory."""
        self.flush()
        return grown_memory(self, row)

    def source(self, row: int = 0) -> Source | None:
        """Returns the tokens and text of a row so far."""
        self._sync()
        return self._sources[row]

    def flush(self) -> None:
        """Feeds tokens that were generated and not yet read, so that they have slots."""
        if any(self._pending):
            ids, valid = self._left_padded([[] for _ in range(self.rows)])
            self._forward(ids, valid, keep=1)
        self._sync()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        # A turn that fails leaves the session as it was: no half a prompt, no half a reply.
        self._sync()
        before, pending, fed = list(self._sources), list(self._pending), self.cache.fed
        try:
            yield
        except BaseException:
            self.cache.recover()
            self.cache.crop(fed - self.cache.fed)
            self._sources, self._pending = before, pending
            raise

    def _sync(self) -> None:
        """Brings sources up to date with tokens that were fed by forward or by raw calls."""
        self.cache.recover()
        for row, memory in enumerate(self.memories):
            fed = self.cache.ids[row][self.cache.valid[row]].cpu()
            fed = fed[fed >= 0]  # embeddings have no token
            source = self._sources[row] or empty_source()
            start = memory.tokens_count if memory is not None else 0
            missing = len(fed) - (len(source) - start - len(self._pending[row]))
            if missing == 0:
                continue
            # A raw call went on without the last generated token, which was never read; or the
            # cache was cropped.
            read = len(source) - len(self._pending[row])
            known = cut_source(source, read + min(missing, 0))
            self._sources[row] = extend_source(
                known, fed[len(fed) - max(missing, 0) :], self.tokenizer
            )
            self._pending[row] = []

    def _per_row(self, prompt: Context | Sequence[Context]) -> list[Context]:
        several = (
            isinstance(prompt, Sequence)
            and not isinstance(prompt, str)
            and bool(prompt)
            and (isinstance(prompt[0], str | torch.Tensor | list | tuple))
        )
        prompts: list[Any] = list(prompt) if several else [prompt] * self.rows
        if len(prompts) != self.rows:
            raise InvalidArgument(f"{len(prompts)} prompts for {self.rows} rows of this session")
        return prompts

    def _encode(
        self, prompts: Sequence[Context], chat: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sources = [
            encode_turn(self.tokenizer, source, prompt, chat)
            for source, prompt in zip(self._sources, prompts, strict=True)
        ]
        known = [0 if source is None else len(source) for source in self._sources]
        new = [s.tokens[count:].tolist() for s, count in zip(sources, known, strict=True)]
        self._sources = list(sources)
        return self._left_padded(new)

    def _left_padded(self, new: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        lists = [[*left, *ids] for left, ids in zip(self._pending, new, strict=True)]
        self._pending = [[] for _ in lists]
        width = max(map(len, lists))
        ids = torch.zeros(len(lists), width, dtype=torch.int64)
        valid = torch.zeros(len(lists), width, dtype=torch.bool)
        for row, tokens in enumerate(lists):
            if tokens:
                ids[row, width - len(tokens) :] = torch.tensor(tokens)
                valid[row, width - len(tokens) :] = True
        return ids, valid

    def _take(self, row: int, tokens: list[int], stop: str | Sequence[str] | None) -> Reply:
        # The last token was chosen and not fed; it goes in front of what comes next.
        self._pending[row] = tokens[-1:]
        source = self._sources[row] or empty_source()
        grown = extend_source(source, torch.tensor(tokens, dtype=torch.int64), self.tokenizer)
        if source.chat is not None and self.tokenizer is not None:
            content = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            start = len(source.text)
            message = Message("assistant", content, start, start + len(content))
            grown = replace(grown, messages=(*grown.messages, message))
        self._sources[row] = grown
        return Reply(self._text(tokens, stop), tuple(tokens))

    def _text(self, tokens: list[int], stop: str | Sequence[str] | None) -> str:
        if self.tokenizer is None:
            return ""
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        for end in [stop] if isinstance(stop, str) else stop or ():
            text = text.split(end, 1)[0]
        return text
