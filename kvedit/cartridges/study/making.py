"""samples_from: samples of given questions, with a teacher that has read a given memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvedit.cartridges.sample import Sample
from kvedit.cartridges.study.batches import sample_with
from kvedit.cartridges.study.decoding import Decoding, Keep, decode
from kvedit.cartridges.study.drawing import sub_seed
from kvedit.cartridges.study.endings import Ending, answer_tokens, ending_of
from kvedit.cartridges.study.teacher import teacher_pass
from kvedit.cartridges.study.turns import PLAIN_TURN, Turns, grown_by_question, takes_chat
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Source
from kvedit.models.inspection import Inspection, inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Pair", "samples_from"]

Pair = tuple[str, str | None]
"""A question and its answer; None lets the model answer over the memory."""


def samples_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    memory: KVMemory,
    *,
    document: str = "",
    kind: str = "given",
    source: Source | None = None,
    chat: bool | None = None,
    plain: str = PLAIN_TURN,
    top_k: int = 20,
    min_mass: float | None = None,
    answer: Decoding | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Sample]:
    """Returns one sample per pair; the teacher is the model over ``memory``.

    A given answer is closed by the token that ends the assistant's turn, or by a blank line behind
    a text, so that a student learns to stop.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pairs: questions with their answers, or with None.
        memory: what the teacher has read: as a rule the captured context in full.
        document: what the samples are about; empty takes the memory's digest.
        kind: kind of all samples.
        source: source of the memory that the cartridge will stand for; None takes ``memory``'s.
        chat: True or False overrides whether questions are turns of a chat.
        plain: words around a question behind a text.
        top_k: likeliest tokens of the teacher that are kept.
        min_mass: see :func:`~kvedit.cartridges.study.teacher_columns`.
        answer: how missing answers are made; None is greedy, 256 tokens at most.
        seed: seed of missing answers.
        batch_size: rows that are computed side by side.
        progress: whether to show a bar.

    Raises:
        InvalidArgument: if there is no pair, a question or an answer is empty, or a chat is asked
            for and the tokenizer has no template.
        ContextTooLong: if memory, question and answer run past the model's positions.
    """
    if not pairs or batch_size < 1:
        raise InvalidArgument(
            f"expected pairs and batch_size >= 1, found {len(pairs)} and {batch_size}"
        )
    as_chat = chat if chat is not None else memory.source is not None and bool(memory.source.chat)
    takes_chat(tokenizer, as_chat)  # refuses a chat where there is no template
    maker = _Maker(
        model, tokenizer, memory, inspect(model, tokenizer), ending_of(model, tokenizer, as_chat),
        as_chat, plain, Keep(top_k, min_mass), answer or Decoding(256), seed,
    )  # fmt: skip
    student = Turns(tokenizer, source or memory.source, chat=chat, plain=plain)
    name = document or memory.digest
    made: list[Sample] = []
    for start in _steps(len(pairs), batch_size, progress):
        part = pairs[start : start + batch_size]
        answered = maker.answered(part, start)
        for (question, _), (text, tokens, columns) in zip(part, answered, strict=True):
            turn = student.tokens(question).tolist()
            made.append(sample_with(name, "", kind, question, text, turn, tokens, columns))
    return made


class _Maker:
    """Answers of pairs, and the teacher's columns."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        memory: KVMemory,
        found: Inspection,
        ending: Ending,
        chat: bool,
        plain: str,
        keep: Keep,
        decoding: Decoding,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.memory, self.found = model, tokenizer, memory, found
        self.ending, self.chat, self.plain, self.keep = ending, chat, plain, keep
        self.decoding, self.seed = decoding, seed

    def answered(self, pairs: Sequence[Pair], first: int) -> list[tuple[str, list[int], Any]]:
        """Returns text, ids and columns of every answer."""
        asked = [
            grown_by_question(
                self.tokenizer, self.memory.source, question, chat=self.chat, plain=self.plain
            )
            for question, _ in pairs
        ]
        known = self.memory.tokens_count
        turns = [source.tokens[known:].tolist() for source in asked]
        answers = self._said(pairs, turns, first)
        for row, (_, text) in enumerate(pairs):
            if text is not None:
                ids = answer_tokens(self.tokenizer, asked[row], text, self.ending)
                answers[row] = (text, ids)
        memories = [self.memory] * len(pairs)
        given = [answers[row][1] for row in range(len(pairs))]
        columns = teacher_pass(
            self.model, self.found, memories, turns, given, self.keep.k, self.keep.min_mass
        )
        return [(*answers[row], columns[row]) for row in range(len(pairs))]

    def _said(
        self, pairs: Sequence[Pair], turns: Sequence[list[int]], first: int
    ) -> dict[int, tuple[str, list[int]]]:
        """Returns the answers that the model gives where there is none."""
        open_rows = [row for row, (_, text) in enumerate(pairs) if text is None]
        answers: dict[int, tuple[str, list[int]]] = dict.fromkeys(range(len(pairs)), ("", []))
        if open_rows:
            said = decode(
                self.model, self.tokenizer, self.found, [self.memory] * len(open_rows),
                [turns[row] for row in open_rows],
                [sub_seed(self.seed, "answer", first + row) for row in open_rows],
                self.decoding, self.ending,
            )  # fmt: skip
            for row, reply in zip(open_rows, said, strict=True):
                answers[row] = (reply.text, list(reply.tokens))
        return answers


def _steps(total: int, size: int, shown: bool) -> Iterator[int]:
    steps = range(0, total, size)
    if not shown:
        yield from steps
        return
    from tqdm.auto import tqdm

    yield from tqdm(steps, desc="samples", unit="batch", disable=None)
