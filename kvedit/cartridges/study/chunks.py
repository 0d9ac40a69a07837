"""Chunkers: the pieces of a corpus that are read one at a time.

A corpus may be longer than the model's context, a chunk may not: :meth:`Chunking.fitted` says what
happens to one that would be.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

import torch

from kvedit.cartridges.study.corpus import Corpus, Document
from kvedit.cartridges.study.drawing import drawer
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.memory.span import sentence_ranges
from kvedit.runtime.spelling import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chunk", "Chunker", "Chunking"]


@dataclass(frozen=True)
class Chunk:
    """A piece of one document.

    Args:
        title: the document's title.
        start: first character in the document's text.
        stop: one past its last character.
        text: the piece.
    """

    title: str
    start: int
    stop: int
    text: str

    @property
    def key(self) -> str:
        """Where the piece stands: ``start:stop``, characters of its document."""
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True)
class Chunking:
    """How documents are cut.

    Args:
        mode: ``"random"``: every visit reads another span, of a random length at a random place;
            documents come up in proportion to their tokens (Cartridges, section 4.1). ``"cover"``:
            consecutive pieces that end where sentences end and together are the whole corpus, in
            a new random order each time round; a sentence longer than ``max_tokens`` is cut.
        min_tokens: tokens of the shortest span. A document that is shorter is read as a whole;
            with ``"cover"`` the last two pieces share their sentences evenly if need be.
        max_tokens: tokens of the longest.
        overlong: what to do if the model's context can't hold such a chunk with question and
            answer: ``"refuse"`` raises before anything is made, ``"clip"`` makes chunks shorter.

    Raises:
        InvalidArgument: if a mode is unknown or the bounds are not 1 <= min <= max.
    """

    mode: Literal["random", "cover"] = "random"
    min_tokens: int = 512
    max_tokens: int = 1024
    overlong: Literal["refuse", "clip"] = "refuse"

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.mode not in ("random", "cover") or self.overlong not in ("refuse", "clip"):
            raise InvalidArgument(
                "mode must be 'random' or 'cover' and overlong 'refuse' or 'clip', found "
                f"{self.mode!r}, {self.overlong!r}"
            )
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise InvalidArgument(
                f"expected 1 <= min_tokens <= max_tokens, found {self.min_tokens}, "
                f"{self.max_tokens}"
            )

    def fitted(self, room: int | None) -> Chunking:
        """Returns the options with chunks of at most ``room`` tokens; None is no limit.

        Raises:
            ContextTooLong: if chunks may be longer and are not to be clipped, or nothing fits.
        """
        if room is None or self.max_tokens <= room:
            return self
        if room < 1 or self.overlong == "refuse":
            raise ContextTooLong(
                f"chunks of {self.max_tokens} tokens don't fit into the model's context with a "
                f"question and an answer: {max(room, 0)} tokens are left; lower max_tokens, or the "
                "tokens of questions and answers, or pass overlong='clip'"
            )
        return replace(self, max_tokens=room, min_tokens=min(self.min_tokens, room))


@dataclass(frozen=True, eq=False)
class Chunker:
    """The chunk of every visit: a function of corpus, options, seed and the visit's number.

    Args:
        tokenizer: cuts texts into tokens.
        corpus: the documents.
        chunking: the options.
        seed: of lengths, places and orders.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    chunking: Chunking
    seed: int = 0

    def visit(self, number: int) -> Chunk:
        """Returns the chunk that is read at visit ``number``, from 0."""
        if self.chunking.mode == "random":
            return self._random(drawer(self.seed, "chunk", number))
        turn, place = divmod(number, len(self.cover))
        order = list(range(len(self.cover)))
        drawer(self.seed, "order", turn).shuffle(order)
        return self.cover[order[place]]

    @cached_property
    def cover(self) -> tuple[Chunk, ...]:
        """Consecutive chunks of all documents in order; together they are the whole text."""
        found: list[Chunk] = []
        for document, offsets in zip(self.corpus, self._offsets, strict=True):
            cuts = _cover(document.text, offsets, self.chunking)
            found += [_chunk(document, start, stop) for start, stop in pairwise(cuts)]
        return tuple(found)

    @cached_property
    def _offsets(self) -> list[torch.Tensor]:
        return [_token_offsets(self.tokenizer, document) for document in self.corpus]

    @cached_property
    def _weights(self) -> list[int]:
        return list(accumulate(len(offsets) for offsets in self._offsets))

    def _random(self, drawn: random.Random) -> Chunk:
        index = bisect_right(self._weights, drawn.randrange(self._weights[-1]))
        offsets = self._offsets[index]
        longest = min(self.chunking.max_tokens, len(offsets))
        length = drawn.randint(min(self.chunking.min_tokens, longest), longest)
        first = drawn.randint(0, len(offsets) - length)
        start, stop = int(offsets[first, 0]), int(offsets[first + length - 1, 1])
        return _chunk(self.corpus.documents[index], start, stop)


def _chunk(document: Document, start: int, stop: int) -> Chunk:
    return Chunk(document.title, start, stop, document.text[start:stop])


def _token_offsets(tokenizer: PreTrainedTokenizerBase, document: Document) -> torch.Tensor:
    _, offsets = tokenize(tokenizer, document.text, special=False)
    if not len(offsets) or int(offsets[-1, 1]) == 0:
        raise UnsupportedModel(
            f"the tokenizer does not tell where the tokens of {document.title!r} stand, so it "
            "can't be cut into chunks: use the tokenizer's fast version"
        )
    return offsets


def _cover(text: str, offsets: torch.Tensor, chunking: Chunking) -> list[int]:
    """Returns the characters at which a text is cut, its ends included."""
    starts = offsets[:, 0].tolist()
    units = [0, *(start for start, _ in sentence_ranges(text)[1:]), len(text)]

    def tokens(start: int, stop: int) -> int:
        return bisect_right(starts, stop - 1) - bisect_right(starts, start - 1)

    fine: list[int] = []
    for start, stop in pairwise(units):
        fine += _within(start, stop, starts, chunking.max_tokens)
    fine.append(len(text))
    cuts = [0]
    for before, after in pairwise(fine):
        if before > cuts[-1] and tokens(cuts[-1], after) > chunking.max_tokens:
            cuts.append(before)
    cuts.append(len(text))
    if len(cuts) > 2 and tokens(*cuts[-2:]) < chunking.min_tokens:
        inner = [cut for cut in fine if cuts[-3] < cut < cuts[-1]]
        halves = {cut: (tokens(cuts[-3], cut), tokens(cut, cuts[-1])) for cut in inner}
        cuts[-2] = min(inner, key=lambda cut: abs(halves[cut][0] - halves[cut][1]))
    return cuts


def _within(start: int, stop: int, starts: list[int], most: int) -> list[int]:
    """Returns where a sentence begins, and where it is cut if it is too long."""
    first, last = bisect_right(starts, start - 1), bisect_right(starts, stop - 1)
    inner = [starts[index] for index in range(first + most, last, most)]
    return [start, *(cut for cut in inner if start < cut < stop)]
