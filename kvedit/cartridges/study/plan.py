"""Plan: what every attempt reads and is asked, as a function of its number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvedit.cartridges.study.chunks import Chunk, Chunker
from kvedit.cartridges.study.corpus import Corpus
from kvedit.cartridges.study.drawing import drawer, sub_seed
from kvedit.cartridges.study.reading import Student
from kvedit.cartridges.study.seeds import FORMATS, KINDS, SeedPrompt, draw_prompt

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Attempt", "Plan"]


@dataclass(frozen=True)
class Attempt:
    """One sample to be made.

    Args:
        number: its number, from 0.
        chunk: what is read.
        prompt: what the model is asked to ask.
        asking: seed of the question's draws.
        answering: seed of the answer's draws.
    """

    number: int
    chunk: Chunk
    prompt: SeedPrompt
    asking: int
    answering: int


class Plan:
    """Attempts by number. They don't depend on how many there will be, nor on each other.

    Args:
        student: the model with the settings.
        corpus: the documents.
        seed: of all draws.

    Attributes:
        context_limit: tokens that a chunk with its introduction may have, or None.

    Raises:
        ContextTooLong: if chunks can't fit into the model's context; see
            :meth:`~kvedit.cartridges.study.Chunking.fitted`.
    """

    def __init__(self, student: Student, corpus: Corpus, seed: int) -> None:
        """Fits the chunks to the model's context."""
        self.settings, self.seed = student.settings, seed
        longest = max(_prompts(student), key=lambda prompt: len(prompt.text + prompt.opening))
        self.context_limit = student.context_limit(longest)
        title = max((document.title for document in corpus), key=len)
        room = student.chunk_room(self.context_limit, title)
        tokens = _longest(corpus, student)
        chunking = self.settings.chunking
        # Short documents are read as a whole whatever max_tokens says.
        if room is None or tokens > room:
            chunking = chunking.fitted(room)
        self.chunker = Chunker(student.tokenizer, corpus, chunking, seed)

    def attempt(self, number: int) -> Attempt:
        """Returns attempt ``number``."""
        chunk = self.chunker.visit(number // self.settings.per_chunk)
        drawn = drawer(self.seed, "prompt", number)
        return Attempt(
            number,
            chunk,
            draw_prompt(self.settings.kinds, self.settings.prompts, drawn),
            sub_seed(self.seed, "question", number),
            sub_seed(self.seed, "answer", number),
        )


def _prompts(student: Student) -> Iterable[SeedPrompt]:
    longest = max(FORMATS, key=len)
    own = student.settings.prompts
    library = (SeedPrompt(k, text) for k in student.settings.kinds for text in KINDS[k])
    for prompt in (*library, *own):
        yield replace(prompt, text=prompt.text.replace("{format}", longest))


def _longest(corpus: Corpus, student: Student) -> int:
    text = max((document.text for document in corpus), key=len)
    return len(student.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
