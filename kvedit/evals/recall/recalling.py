"""recall: what memories of one context still know of it, and what they say when left to speak."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.answering import TaskResult
from kvedit.evals.journal import Journal
from kvedit.evals.prefills import Prefills
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.reading import Ids, Listener
from kvedit.evals.recall.report import RecallReport
from kvedit.evals.recall.scoring import forced_scores, free_scores, gaps
from kvedit.evals.recall.size import Size
from kvedit.evals.recall.spelling import Spelled, spell
from kvedit.memory import KVMemory
from kvedit.models.inspection import inspect
from kvedit.runtime.session import Reply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["recall"]

FULL = "full"
"""Name of the full context's memory in every report."""


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memories: Mapping[str, KVMemory | None],
    questions: Sequence[RecallQuestion],
    *,
    full: KVMemory,
    reference: str = FULL,
    baseline: str | None = None,
    max_new_tokens: int = 32,
    stop: str | None = None,
    path: str | Path | None = None,
    prefills: Prefills | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    strict: bool = True,
) -> RecallReport:
    r"""Returns what each memory recalls, teacher-forced and free-running, on the same questions.

    Every question is asked of every memory with the same tokens, all questions of a batch as
    rows. The reference memory answers greedily; along its answer, and along the gold answer, every
    memory's next-token distributions are compared with the reference's. Each memory then answers
    greedily by itself, and that answer is graded. Low loss does not mean right answers: look at
    both. The reference is read once per batch for all memories.

    Args:
        model: the model that made the memories.
        tokenizer: its tokenizer.
        memories: names and what stands in for the full context; None is no context at all.
        questions: different questions, all about the context.
        full: the memory of the whole context; it is in the report as ``"full"``, first.
        reference: name of the memory whose greedy answers and distributions are the reference.
        baseline: name of the memory that others are compared with in the report.
        max_new_tokens: tokens of a free answer, and so of the reference answer.
        stop: text that ends an answer, such as ``"\n"`` where answers are one line of a text.
        path: journal of results, JSON lines. A run that was cut goes on where it stopped; further
            memories of the same context may be added to it. A memory is known by its digest.
        prefills: where the reference's distributions and free answers are kept for further calls
            within its bound of bytes; None keeps them for one batch only.
        batch_size: questions side by side, and rows per forward pass. Logits are in memory for all
            answers of a batch, of the reference and one other memory.
        seed: seed of the bootstrap.
        progress: whether to show a bar.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if there is no question, one comes twice, or the journal is another's.
        UnknownName: if the reference or the baseline is none of the memories.
        IncompatibleModel: if a memory does not fit the model.
    """
    keys = [question.key for question in questions]
    if not keys or len(set(keys)) < len(keys) or batch_size < 1 or max_new_tokens < 1:
        raise InvalidArgument(
            f"expected different questions, batch_size and max_new_tokens >= 1, found {len(keys)} "
            f"of which {len(set(keys))} differ, {batch_size} and {max_new_tokens}"
        )
    if FULL in memories:
        raise InvalidArgument(f"the name {FULL!r} is that of the full context: pass it as full=")
    sides: dict[str, KVMemory | None] = {FULL: full, **memories}
    for role, name in (("reference", reference), ("baseline", baseline or FULL)):
        if name not in sides:
            raise UnknownName(f"{role} among memories", name, sides)
    inspection = inspect(model, tokenizer)
    listener = Listener(model, inspection, tokenizer, batch_size, strict)
    options = {"max_new_tokens": max_new_tokens, "stop": stop}
    facts = {
        "model": str(inspection.spec.identity()["fingerprint"]),
        "full": full.digest,
        "reference": _identity(sides[reference]),
    }
    journal = Journal(path, {"kind": "recall", **facts, **options})
    kept = prefills or Prefills(model, tokenizer, keep_bytes=0)
    run = _Run(listener, kept, journal, full, sides, reference, options)
    for batch in _batches(questions, batch_size, progress):
        run.ask(batch)
    return RecallReport(
        tuple(questions),
        {name: tuple(run.result(name, q) for q in questions) for name in sides},
        {name: Size.of(memory, full) for name, memory in sides.items()},
        reference,
        baseline,
        seed,
    )


def _identity(memory: KVMemory | None) -> str:
    return "nothing" if memory is None else memory.digest


def _batches(
    questions: Sequence[RecallQuestion], size: int, shown: bool
) -> Iterable[Sequence[RecallQuestion]]:
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    if not shown:
        return batches
    from tqdm.auto import tqdm

    bar: Iterable[Sequence[RecallQuestion]] = tqdm(
        batches, desc="recall", unit="batch", disable=None
    )
    return bar


@dataclass(frozen=True, eq=False)
class _Teacher:
    """The reference's answers to a batch, and its distributions along all answers."""

    answers: list[Ids]
    along: list[Mapping[Ids, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of :func:`recall`."""

    listener: Listener
    prefills: Prefills
    journal: Journal
    full: KVMemory
    sides: Mapping[str, KVMemory | None]
    reference: str
    options: dict[str, Any]

    def ask(self, batch: Sequence[RecallQuestion]) -> None:
        """Journals what is missing of a batch."""
        waiting = [n for n in self.sides if any(not self._done(n, q) for q in batch)]
        if not waiting:
            return
        spelled = [spell(self.listener.tokenizer, self.full, question) for question in batch]
        teacher = self._teacher(batch, spelled)
        for name in waiting:
            # A batch is read whole even if a part of it is known: its rows are then the same
            # whether or not a run was cut, and so are the numbers, to the last bit.
            found = (
                teacher.along
                if name == self.reference
                else self._along(name, spelled, teacher.answers)
            )
            replies = self._replies(name, batch, spelled)
            for index, question in enumerate(batch):
                if self._done(name, question):
                    continue
                answer, reply = teacher.answers[index], replies[index]
                forced = forced_scores(
                    question, spelled[index], answer, teacher.along[index], found[index]
                )
                scores = {**forced, **free_scores(question, reply, answer)}
                record = {"scores": {**scores, **gaps(scores)}, "answer": reply.text}
                self.journal.add(
                    {"key": self._key(name, question), **record, "tokens": list(reply.tokens)}
                )

    def result(self, name: str, question: RecallQuestion) -> TaskResult:
        """Returns a journaled result."""
        record = self.journal.done[self._key(name, question)]
        return TaskResult(question.key, tuple(sorted(record["scores"].items())), record["answer"])

    def _key(self, name: str, question: RecallQuestion) -> str:
        return f"{_identity(self.sides[name])[:16]}:{question.key}"

    def _done(self, name: str, question: RecallQuestion) -> bool:
        return self._key(name, question) in self.journal.done

    def _along(
        self, name: str, spelled: Sequence[Spelled], answers: Sequence[Ids]
    ) -> list[Mapping[Ids, torch.Tensor]]:
        memory = self.sides[name]
        wanted = [
            [ids for ids in (answer, one.gold, *one.choices) if ids]
            for one, answer in zip(spelled, answers, strict=True)
        ]
        return self.listener.read(memory, [one.behind(memory) for one in spelled], wanted)

    def _teacher(self, batch: Sequence[RecallQuestion], spelled: Sequence[Spelled]) -> _Teacher:
        def make() -> tuple[_Teacher, int]:
            answers = [reply.tokens for reply in self._replies(self.reference, batch, spelled)]
            along: list[Mapping[Ids, torch.Tensor]] = [
                {ids: tail.cpu() for ids, tail in found.items()}
                for found in self._along(self.reference, spelled, answers)
            ]
            size = sum(tail.nbytes for found in along for tail in found.values())
            return _Teacher(answers, along), size

        key = ("recall teacher", *self._about(self.reference, batch))
        teacher: _Teacher = self.prefills.once(key, make)
        return teacher

    def _replies(
        self, name: str, batch: Sequence[RecallQuestion], spelled: Sequence[Spelled]
    ) -> list[Reply]:
        def make() -> tuple[list[Reply], int]:
            memory = self.sides[name]
            prompts = [one.behind(memory) for one in spelled]
            replies = self.listener.reply(memory, prompts, **self.options)
            return replies, sum(8 * len(reply.tokens) + len(reply.text) for reply in replies)

        if all(self._done(name, question) for question in batch):
            records = [self.journal.done[self._key(name, question)] for question in batch]
            return [Reply(record["answer"], tuple(record["tokens"])) for record in records]
        replies: list[Reply] = self.prefills.once(
            ("recall replies", *self._about(name, batch)), make
        )
        return replies

    def _about(self, name: str, batch: Sequence[RecallQuestion]) -> tuple[Any, ...]:
        options = tuple(self.options.values())
        return (
            self.full.digest, _identity(self.sides[name]), tuple(q.key for q in batch), options,
            self.listener.batch_size,
        )  # fmt: skip
