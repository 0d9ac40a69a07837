"""Asker: how prompts are put to a model, the same way for every kind of steering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.recall.reading import Ids
from kvedit.evals.steering.entering import Change
from kvedit.memory import KVMemory, Source
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.saying import saying
from kvedit.runtime.session import Reply, Session
from kvedit.runtime.text import encode, encode_turn, extend_source
from kvedit.steering.prompting import offset_ids, prompted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Asker", "Place", "Prompt", "Transform"]

_Item = TypeVar("_Item")

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages."""

Transform = Callable[[Prompt], Prompt]
"""From a prompt to one that says more, such as an instruction or examples."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where an answer begins.

    Args:
        memory: what is in memory; None for nothing.
        ids: tokens that are read behind it, the offset included.
        source: all tokens up to the answer, for spelling what may follow.
    """

    memory: KVMemory | None
    ids: Ids
    source: Source


@dataclass(frozen=True, eq=False)
class Asker:
    r"""A model, and how it is asked.

    With ``hold="context"`` the prompt is read while steering is on, over the (steered) context or
    over nothing. With ``hold="prompt"`` the whole prompt is in memory, as the unedited model read
    it, and an edit finds the slot of its last token; the offset is then what is read. Both ways
    the model sees the same tokens, so that one-shot and continuous steering can be compared.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        context: a memory that prompts stand behind; None for none.
        hold: what is in memory before the answer: ``"context"`` or ``"prompt"``.
        offset: text between prompt and answer, spelled by itself; ``hold="prompt"`` needs one,
            such as ``"\n"``.
        chat: True asks a text as a user turn, False as plain text; None does as the context.
        max_new_tokens: tokens of an answer.
        stop: text that ends an answer.
        batch_size: prompts side by side.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if a number is below 1, or the offset is missing.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: KVMemory | None = None
    hold: Literal["context", "prompt"] = "context"
    offset: str = ""
    chat: bool | None = None
    max_new_tokens: int = 32
    stop: str | None = None
    batch_size: int = 8
    strict: bool = True

    def __post_init__(self) -> None:
        """Checks numbers and the offset."""
        if self.hold not in ("context", "prompt"):
            raise InvalidArgument(f"hold: expected 'context' or 'prompt', found {self.hold!r}")
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise InvalidArgument(
                "expected batch_size and max_new_tokens >= 1, found "
                f"{self.batch_size} and {self.max_new_tokens}"
            )
        if self.hold == "prompt" and not self.offset:
            raise InvalidArgument(
                'hold="prompt" needs an offset, such as "\\n": the pass that wrote the prompt\'s '
                "last slot came before the edit, so a token must be read behind it"
            )

    @cached_property
    def inspection(self) -> Inspection:
        """Facts of the model."""
        return inspect(self.model, self.tokenizer)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What answers depend on, as plain data: for journals."""
        return {
            "model": str(self.inspection.spec.identity()["fingerprint"]),
            "context": None if self.context is None else self.context.digest,
            **{name: getattr(self, name) for name in ("hold", "offset", "chat", "stop")},
            "max_new_tokens": self.max_new_tokens,
        }

    def as_turns(self, prompt: Prompt) -> Prompt:
        """Returns a prompt as chat messages where it is asked as a chat, else as it is."""
        source = None if self.context is None else self.context.source
        told = source is not None and source.chat is not None
        chat = told if self.chat is None else self.chat
        if isinstance(prompt, str) and chat:
            return [{"role": "user", "content": prompt}]
        return prompt

    def places(self, prompts: Sequence[Prompt]) -> list[Place]:
        """Returns where the answer to each prompt begins, unedited."""
        offset = offset_ids(self.tokenizer, self.offset) if self.offset else []
        turns = [self.as_turns(prompt) for prompt in prompts]
        behind = torch.tensor(offset, dtype=torch.int64)
        if self.hold == "context":
            return [self._read_now(prompt, behind) for prompt in turns]
        memories: list[KVMemory] = []
        for start in range(0, len(turns), self.batch_size):
            memories += prompted(
                self.model, self.tokenizer, self.context, turns[start : start + self.batch_size],
                chat=self.chat, strict=self.strict,
            )  # fmt: skip
        return [Place(memory, tuple(offset), self._grown(memory, behind)) for memory in memories]

    def _read_now(self, prompt: Prompt, offset: torch.Tensor) -> Place:
        known = 0 if self.context is None else self.context.tokens_count
        if self.context is None and isinstance(prompt, str):
            # From nothing, a text begins as captured texts do, with BOS.
            source = encode(self.tokenizer, prompt)
        else:
            before = None if self.context is None else self.context.source
            source = encode_turn(self.tokenizer, before, prompt, self.chat)
        whole = extend_source(source, offset, self.tokenizer)
        return Place(self.context, tuple(whole.tokens[known:].tolist()), whole)

    def _grown(self, memory: KVMemory, offset: torch.Tensor) -> Source:
        if memory.source is None:
            raise InvalidArgument("the context has no source tokens: prompts can't be spelled")
        return extend_source(memory.source, offset, self.tokenizer)

    def spell(self, place: Place, text: str) -> Ids:
        """Returns the ids of a text as an answer's beginning.

        Raises:
            InvalidArgument: if it has no tokens.
        """
        grown = encode_turn(self.tokenizer, place.source, text, chat=False)
        return tuple(grown.tokens[len(place.source) :].tolist())

    def reply(self, places: Sequence[Place], change: Change) -> list[Reply]:
        """Returns the greedy answer at each place."""
        found: list[Reply] = []
        for batch in self._batches(places):
            memories = [change(place.memory) for place in batch]
            prompts = [torch.tensor(place.ids) for place in batch]
            with self._session(memories) as session:
                replies: Any = session.generate(
                    prompts, max_new_tokens=self.max_new_tokens, stop=self.stop, do_sample=False
                )
            found += replies if isinstance(replies, list) else [replies]
        return found

    def along(
        self, places: Sequence[Place], answers: Sequence[Ids], change: Change
    ) -> list[torch.Tensor]:
        """Returns the distributions from which each token of given answers would be drawn.

        The prompt is read as a prompt and the answer as what the model said, in a pass of its
        own: steering of either one is then what it is in generation.

        Args:
            places: where answers begin.
            answers: ids of an answer per place, none empty.
            change: what becomes of each memory.

        Returns:
            ``[token, vocabulary]`` float32 log-probabilities per place.
        """
        found: list[torch.Tensor] = []
        for batch in self._batches(list(zip(places, answers, strict=True))):
            memories = [change(place.memory) for place, _ in batch]
            with self._session(memories) as session:
                found += _read(session, [p.ids for p, _ in batch], [ids for _, ids in batch])
        return found

    def _batches(self, items: Sequence[_Item]) -> list[Sequence[_Item]]:
        starts = range(0, len(items), self.batch_size)
        return [items[start : start + self.batch_size] for start in starts]

    def _session(self, memories: list[KVMemory | None]) -> AbstractContextManager[Session]:
        return open_session(self.model, self.inspection, memories, self.tokenizer, self.strict)


def _read(session: Session, prompts: list[Ids], answers: list[Ids]) -> list[torch.Tensor]:
    logits = session.forward(*_padded(prompts, left=True), keep=1)
    # The last token of an answer predicts nothing that is asked for.
    fed = [ids[:-1] for ids in answers]
    if any(fed):
        with saying():
            rest = session.forward(*_padded(fed, left=False))
        logits = torch.cat((logits, rest), dim=1)
    logprobs = logits.float().log_softmax(dim=-1)
    return [logprobs[row, : len(ids)] for row, ids in enumerate(answers)]


def _padded(rows: list[Ids], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and their validity ``[batch, query]``, padded on one side."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens, dtype=torch.int64)
        valid[row, place] = True
    return ids, valid
