"""Chunks: memories of chunks, each read once and kept as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvedit.cartridges.study.chunks import Chunk
from kvedit.cartridges.study.endings import QUESTION_STOP, Ending, ending_of
from kvedit.cartridges.study.seeds import SeedPrompt
from kvedit.cartridges.study.settings import StudySettings
from kvedit.cartridges.study.turns import context_of, question_turn, takes_chat
from kvedit.errors import ContextTooLong
from kvedit.memory import KVMemory, Source
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.capturing import capture
from kvedit.runtime.text import Context, encode, encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChunkMemories", "Student"]

PLAIN_TASK = "\n\nTask: {question}\nMessage:"
"""How a seed prompt follows a text; what comes next is the question, up to the end of its line."""

_SLACK = 16
"""Tokens that a question may have more than were generated, when its text is cut anew."""


class Student:
    """A model with its tokenizer and how it reads, asks and answers under some settings.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        settings: the settings.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: StudySettings
    ) -> None:
        """Looks at the model once."""
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.found: Inspection = inspect(model, tokenizer)
        self.chat = takes_chat(tokenizer, settings.chat)
        self.answer_ending: Ending = ending_of(model, tokenizer, self.chat)
        self.question_ending: Ending = ending_of(model, tokenizer, self.chat, QUESTION_STOP)

    def turn(self, memory: KVMemory, question: str) -> list[int]:
        """Returns the ids of a question's turn behind a chunk's memory."""
        ids: list[int] = question_turn(
            self.tokenizer, memory.source, question, chat=self.chat, plain=self.settings.plain
        ).tolist()
        return ids

    def asking(self, source: Source | None, prompt: SeedPrompt) -> tuple[list[int], list[int]]:
        """Returns the ids that lead to a question, and those with which it opens.

        The first are a user's turn, or a task behind a text.
        """
        words = "{question}" if self.chat else PLAIN_TASK
        shown = words.replace("{question}", prompt.text)
        known = 0 if source is None else len(source)
        grown = encode_turn(self.tokenizer, source, shown, chat=self.chat)
        opened = grown
        if prompt.opening:
            opening = prompt.opening if self.chat else f" {prompt.opening}"
            opened = encode_turn(self.tokenizer, grown, opening, chat=False)
        return grown.tokens[known:].tolist(), opened.tokens[len(grown) :].tolist()

    def context_limit(self, longest_prompt: SeedPrompt) -> int | None:
        """Returns how many tokens a chunk with its introduction may have; None is no limit.

        Args:
            longest_prompt: the seed prompt that takes most room.
        """
        limit = self.found.spec.max_position
        if limit is None:
            return None
        base = encode(self.tokenizer, self._context("x", "x"))
        asking = sum(map(len, self.asking(base, longest_prompt)))
        turn = len(
            question_turn(self.tokenizer, base, "x", chat=self.chat, plain=self.settings.plain)
        )
        question, answer = self.settings.question.max_tokens, self.settings.answer.max_tokens
        return limit - max(asking + question, turn + question + _SLACK + answer)

    def chunk_room(self, context_limit: int | None, longest_title: str) -> int | None:
        """Returns how many tokens of text fit beside the introduction; None is no limit."""
        if context_limit is None:
            return None
        words = len(encode(self.tokenizer, self._context(longest_title, "x")))
        # A text cut from the middle of a document may have a few more tokens when it stands alone.
        return context_limit - words - _SLACK

    def read(self, chunk: Chunk, context_limit: int | None) -> KVMemory:
        """Returns the memory of a chunk, shortened where its text has more tokens than expected.

        Raises:
            ContextTooLong: if its introduction alone is too long.
        """
        text = chunk.text
        source = encode(self.tokenizer, self._context(chunk.title, text))
        while context_limit is not None and len(source) > context_limit:
            keep = len(text) * context_limit // len(source) - 1
            if keep < 1:
                raise ContextTooLong(
                    f"the introduction of {chunk.title!r} leaves no room for its text"
                )
            text = text[:keep]
            source = encode(self.tokenizer, self._context(chunk.title, text))
        memory: KVMemory = capture(self.model, self.tokenizer, self._context(chunk.title, text))
        return memory

    def _context(self, title: str, text: str) -> Context:
        return context_of(self.tokenizer, title, text, chat=self.chat, intro=self.settings.intro)


class ChunkMemories:
    """Memories of the chunks read last.

    A chunk is read alone, not in a batch, so that its keys have the same bits whatever was read
    beside it; a resumed study then makes what an uninterrupted one would.

    Args:
        student: reads.
        context_limit: tokens of a context at most, or None.
        room: chunks that are kept.

    Attributes:
        reads: chunks that were prefilled so far.
    """

    def __init__(self, student: Student, context_limit: int | None, room: int) -> None:
        """Starts empty."""
        self.student, self.context_limit, self.room = student, context_limit, room
        self.reads = 0
        self._kept: OrderedDict[Chunk, KVMemory] = OrderedDict()

    def __getitem__(self, chunk: Chunk) -> KVMemory:
        """The memory of a chunk; it is read if it is not there."""
        if chunk not in self._kept:
            self._kept[chunk] = self.student.read(chunk, self.context_limit)
            self.reads += 1
        self._kept.move_to_end(chunk)
        while len(self._kept) > self.room:
            self._kept.popitem(last=False)
        return self._kept[chunk]
