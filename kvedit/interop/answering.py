"""What an evaluation harness asks of a model, answered behind a memory, or while it is steered.

Three questions: how likely is a continuation, how likely is a whole text, what comes next. The
memory stands in front of every request; nothing of one request is seen by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import ContextTooLong, InvalidArgument
from kvedit.memory import KVMemory, Source
from kvedit.models.inspection import inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.session import Session
from kvedit.runtime.text import empty_source, encode, encode_turn, extend_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answers", "Pair"]

Around = Callable[[], AbstractContextManager[Any]]
"""Makes the context within which every pass runs: ``lambda: steered(model, delta, 4.0)``."""


@dataclass(frozen=True)
class Pair:
    """Tokens to score, and what stands between the memory and them.

    Args:
        context: ids, one at least.
        continuation: ids, one at least.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """All ids but the last, which is only predicted."""
        return (self.context + self.continuation)[:-1]


class Answers:
    """A model that answers an evaluation harness behind a memory.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        memory: stands in front of every request; None asks the model alone.
        around: makes the context within which every pass runs; None for none.
        batch: requests per forward pass.
        chat: whether a context is the next user turn of a chat, with the generation prompt behind
            it, rather than text that goes on.
        prefix: stands for an empty context, since the first token needs something before it; None
            takes a line break behind a memory, and the tokenizer's BOS or EOS without one.
        max_length: tokens of a request at most; None takes the positions that the model has left.
        strict: whether the compatibility gate and the model's position limit hold.

    Raises:
        InvalidArgument: if a number makes no sense.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        memory: KVMemory | None = None,
        *,
        around: Around | None = None,
        batch: int = 8,
        chat: bool = False,
        prefix: str | None = None,
        max_length: int | None = None,
        strict: bool = True,
    ) -> None:
        """Opens a session once, so that a memory that does not fit is refused at once."""
        if batch < 1 or (max_length is not None and max_length < 2):
            raise InvalidArgument(f"batch={batch}, max_length={max_length}: nothing can be asked")
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self.batch, self.chat, self.strict = batch, chat, strict
        self._around = around or nullcontext
        self._inspection = inspect(model, tokenizer)
        self._prefix = prefix
        self.room = self._room(max_length)
        with self._sessions(1):
            pass

    # -- questions ---------------------------------------------------------------------------

    def likelihoods(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Returns log-probability (nats) of each continuation behind its context, and greediness.

        Args:
            requests: (context, continuation). Too long a context loses its beginning; the memory
                stays whole.
        """
        return self.scored([self.pair(*request) for request in requests])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Returns the log-probability (nats) of each whole text, as it would follow the memory.

        Every token is predicted once, from the memory, the prefix and the tokens before it. A
        text longer than the room is read in windows, each behind the memory anew; the last one
        reaches back as far as there is room. The prefix is one token: its last, if it has more.
        """
        windows = [self._windows(text) for text in texts]
        found = iter(self.scored([pair for each in windows for pair in each]))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def replies(
        self,
        contexts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> list[str]:
        """Returns what the model says behind the memory and each context, up to a stop string.

        Args:
            contexts: texts; too long a one loses its beginning.
            max_new_tokens: tokens at most.
            stop: strings that end a reply.
            **options: for transformers' ``generate``; greedy without any.

        Raises:
            ContextTooLong: if there is no room for a token of context and the reply.
        """
        room = self.room - max_new_tokens + 1  # the last token is not fed
        if room < 1:
            raise ContextTooLong(
                f"{max_new_tokens} new tokens do not fit into the {self.room} positions that are "
                "left behind the memory"
            )
        asked = [self._cut(self._context(text)[0], room) for text in contexts]
        found: dict[int, str] = {}
        for rows in self._batches([len(ids) for ids in asked]):
            with self._sessions(len(rows)) as session:
                prompts = [torch.tensor(asked[row]) for row in rows]
                answer = session.generate(
                    prompts, max_new_tokens=max_new_tokens, stop=list(stop) or None, **options
                )
            listed = answer if isinstance(answer, list) else [answer]
            found |= {row: reply.text for row, reply in zip(rows, listed, strict=True)}
        return [found[row] for row in range(len(asked))]

    # -- tokens ------------------------------------------------------------------------------

    def pair(self, context: str, continuation: str) -> Pair:
        """Returns the ids of a request, cut as they would be cut behind the memory.

        Spaces at the end of a context belong to the continuation, as the harness has it.

        Raises:
            InvalidArgument: if the continuation has no tokens.
            ContextTooLong: if it does not fit behind the memory.
        """
        if context.strip() and not self.chat:
            bare = context.rstrip()
            context, continuation = bare, context[len(bare) :] + continuation
        ids, grown = self._context(context)
        behind = encode_turn(self.tokenizer, grown, continuation, chat=False)
        told = behind.tokens[len(grown) :].tolist()
        if len(told) > self.room:
            raise ContextTooLong(
                f"a continuation of {len(told)} tokens does not fit into the {self.room} "
                "positions that are left behind the memory"
            )
        return Pair(tuple(self._cut(ids, self.room - len(told) + 1)), tuple(told))

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room and self.chat:
            raise ContextTooLong(
                f"a turn of {len(ids)} tokens does not fit into the {room} positions that are "
                "left behind the memory, and a turn can't lose its beginning"
            )
        return ids[-room:]

    def _context(self, text: str) -> tuple[list[int], Source]:
        source = None if self.memory is None else self.memory.source
        if not text:
            return self._empty(source)
        if source is None and self.memory is None and not self.chat:
            grown = encode(self.tokenizer, text)
            return grown.tokens.tolist(), grown
        grown = encode_turn(self.tokenizer, source, text, chat=self.chat)
        known = 0 if source is None else len(source)
        return grown.tokens[known:].tolist(), grown

    def _empty(self, source: Source | None) -> tuple[list[int], Source]:
        if self._prefix is not None or self.memory is not None:
            text = "\n" if self._prefix is None else self._prefix
            grown = encode_turn(self.tokenizer, source, text, chat=False)
        else:
            first = self.tokenizer.bos_token_id
            first = self.tokenizer.eos_token_id if first is None else first
            if first is None:
                raise InvalidArgument("the tokenizer has neither BOS nor EOS: pass prefix=")
            # A special token has no text, so what follows is cut as if it stood alone.
            grown = extend_source(empty_source(), torch.tensor([first]), None)
        known = 0 if source is None else len(source)
        return grown.tokens[known:].tolist(), grown

    def _windows(self, text: str) -> list[Pair]:
        source = None if self.memory is None else self.memory.source
        first, grown = self._empty(source)
        ids = encode_turn(self.tokenizer, grown, text, chat=False).tokens[len(grown) :].tolist()
        pairs = []
        for start in range(0, len(ids), self.room):
            end = min(start + self.room, len(ids))
            before = ids[max(0, end - self.room - 1) : start] if start else first[-1:]
            pairs.append(Pair(tuple(before), tuple(ids[start:end])))
        return pairs

    # -- passes ------------------------------------------------------------------------------

    def scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Returns log-probability of each continuation, and if all its tokens are the likeliest."""
        found: dict[int, tuple[float, bool]] = {}
        for rows in self._batches([len(pair.fed) for pair in pairs]):
            some = [pairs[row] for row in rows]
            with self._sessions(len(some)) as session:
                # Padding on the left: what is scored then stands at the end of every row.
                ids, valid = _padded([pair.fed for pair in some])
                keep = max(len(pair.continuation) for pair in some)
                logits = session.forward(ids, valid, keep).float()
            for row, pair, each in zip(rows, some, logits, strict=True):
                found[row] = _score(pair, each)
        return [found[row] for row in range(len(pairs))]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        # The longest first: what does not fit into RAM shows at once, and padding stays short.
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        for start in range(0, len(order), self.batch):
            yield order[start : start + self.batch]

    @contextmanager
    def _sessions(self, rows: int) -> Iterator[Session]:
        memories = [self.memory] * rows
        with (
            self._around(),
            open_session(
                self.model, self._inspection, memories, self.tokenizer, self.strict
            ) as session,
        ):
            yield session

    def _room(self, wanted: int | None) -> int:
        spec = self._inspection.spec
        start = 0 if self.memory is None else self.memory.next_position
        left = wanted if spec.max_position is None else spec.max_position - start
        room = min(one for one in (wanted, left, 2**30) if one is not None)
        if room < 1:
            raise ContextTooLong(f"the memory ends at {start}: no token fits behind it")
        return room


def _padded(lists: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, lists))
    ids = torch.zeros(len(lists), width, dtype=torch.int64)
    valid = torch.zeros(len(lists), width, dtype=torch.bool)
    for row, tokens in enumerate(lists):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        valid[row, width - len(tokens) :] = True
    return ids, valid


def _score(pair: Pair, logits: torch.Tensor) -> tuple[float, bool]:
    """Returns log-probability and greediness from logits ``[query, vocabulary]`` up to the end."""
    wanted = torch.tensor(pair.continuation, device=logits.device)
    own = logits[-len(wanted) :].log_softmax(dim=-1)
    greedy = bool((own.argmax(dim=-1) == wanted).all())
    return float(own.gather(1, wanted[:, None]).double().sum()), greedy
