"""Maker: attempts of one batch, from chunk to sample or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from kvedit.cartridges.sample import Sample
from kvedit.cartridges.study.decoding import Said, decode
from kvedit.cartridges.study.duplicates import Duplicates
from kvedit.cartridges.study.filters import Filters, tidy_question
from kvedit.cartridges.study.plan import Attempt, Plan
from kvedit.cartridges.study.reading import ChunkMemories, Student
from kvedit.cartridges.study.rows import Row
from kvedit.cartridges.study.teacher import Columns
from kvedit.cartridges.study.turns import Turns
from kvedit.memory import KVMemory
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Maker", "Outcome", "sample_key", "sample_with"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of an attempt.

    Args:
        number: its number.
        row: the sample, or None.
        reason: why there is none.
    """

    number: int
    row: Row | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes attempts.

    Args:
        student: the model with the settings.
        plan: what each attempt is.
        memories: of chunks.
        turns: of questions behind what the cartridge stands for.
    """

    student: Student
    plan: Plan
    memories: ChunkMemories
    turns: Turns

    @property
    def filters(self) -> Filters:
        """What is dropped."""
        return self.student.settings.filters

    def make(self, numbers: Iterable[int], seen: Duplicates, keys: set[str]) -> Iterable[Outcome]:
        """Returns what becomes of a batch of attempts, in order.

        Args:
            numbers: their numbers.
            seen: questions that were kept before; those that are kept now are added.
            keys: keys of samples that were kept before, likewise.
        """
        attempts = [self.plan.attempt(number) for number in numbers]
        read = [self.memories[attempt.chunk] for attempt in attempts]
        asked = self._ask(attempts, read)
        reasons = [
            self._refused(*pair, memory, seen) for pair, memory in zip(asked, read, strict=True)
        ]
        live = [row for row, reason in enumerate(reasons) if reason is None]
        answers = self._answer([attempts[i] for i in live], [read[i] for i in live],
                               [asked[i][0] for i in live])  # fmt: skip
        said = dict(zip(live, answers, strict=True))
        return [
            self._outcome(attempt, asked[row][0], reasons[row], said.get(row), seen, keys)
            for row, attempt in enumerate(attempts)
        ]

    def _ask(self, attempts: Sequence[Attempt], read: Sequence[KVMemory]) -> list[tuple[str, Said]]:
        student = self.student
        pairs = zip(attempts, read, strict=True)
        leads = [student.asking(memory.source, attempt.prompt) for attempt, memory in pairs]
        said = decode(
            student.model,
            student.tokenizer,
            student.found,
            read,
            [[*turn, *opening] for turn, opening in leads],
            [attempt.asking for attempt in attempts],
            student.settings.question,
            student.question_ending,
            openings=[opening for _, opening in leads],
        )
        return [(tidy_question(reply.text, reply.ended), reply) for reply in said]

    def _refused(self, text: str, said: Said, memory: KVMemory, seen: Duplicates) -> str | None:
        """Returns why a question is not worth an answer, or None."""
        reason = self.filters.question(text, said)
        if reason is not None:
            return reason
        if text in seen:
            return "question duplicate"
        limit = self.student.found.spec.max_position
        turn = len(self.student.turn(memory, text))
        answer = self.student.settings.answer.max_tokens
        if limit is not None and memory.next_position + turn + answer > limit:
            return "too long for the model"
        return None

    def _answer(
        self, attempts: Sequence[Attempt], read: Sequence[KVMemory], questions: Sequence[str]
    ) -> list[Said]:
        if not attempts:
            return []
        student = self.student
        return decode(
            student.model,
            student.tokenizer,
            student.found,
            read,
            [student.turn(memory, text) for memory, text in zip(read, questions, strict=True)],
            [attempt.answering for attempt in attempts],
            student.settings.answer,
            student.answer_ending,
            student.settings.keep,
        )

    def _outcome(
        self,
        attempt: Attempt,
        question: str,
        reason: str | None,
        said: Said | None,
        seen: Duplicates,
        keys: set[str],
    ) -> Outcome:
        if reason is None and said is not None:
            # Again, since a question of the same batch may have been kept meanwhile.
            reason = "question duplicate" if question in seen else None
            reason = reason or self.filters.answer(question, said)
        if reason is not None or said is None or said.columns is None:
            return Outcome(attempt.number, None, reason or "answer empty")
        sample = sample_with(
            attempt.chunk.title, attempt.chunk.key, attempt.prompt.kind, question, said.text,
            self.turns.tokens(question).tolist(), said.tokens, said.columns,
        )  # fmt: skip
        if sample.key in keys:
            return Outcome(attempt.number, None, "question duplicate")
        seen.add(question)
        keys.add(sample.key)
        return Outcome(attempt.number, Row(sample, attempt.chunk.key, attempt.number))


def sample_key(document: str, chunk: str, turn: Sequence[int], answer: Sequence[int]) -> str:
    """Returns the identity of a sample: what was read, asked and answered."""
    return digest_bytes(canonical_json([document, chunk, list(turn), list(answer)]))[:32]


def sample_with(
    document: str,
    chunk: str,
    kind: str,
    question: str,
    answer: str,
    turn: Sequence[int],
    tokens: Sequence[int],
    columns: Columns,
) -> Sample:
    """Returns a sample of a question's turn, an answer's tokens and the teacher's columns."""
    return Sample(
        key=sample_key(document, chunk, turn, tokens),
        document=document,
        kind=kind,
        question=question,
        answer=answer.strip(),
        tokens=torch.tensor([*turn, *tokens], dtype=torch.int64),
        start=len(turn),
        top_ids=columns.top_ids,
        top_logprobs=columns.top_logprobs,
        tail=columns.tail,
    )
