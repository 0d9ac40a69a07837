"""synthesize: the model asks itself about a corpus, answers, and what it would say is kept.

Self-study (Cartridges, Eyuboglu et al. 2025, section 4.1): a chunk is read, one voice is led by a
seed prompt to a question, another answers it, and the answerer's next-token distributions are what
a cartridge is trained to reproduce. Both voices speak over the same captured memory of the chunk.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.cartridges.study.batches import Maker, Outcome
from kvedit.cartridges.study.corpus import Corpus
from kvedit.cartridges.study.duplicates import Duplicates
from kvedit.cartridges.study.plan import Plan
from kvedit.cartridges.study.reading import ChunkMemories, Student
from kvedit.cartridges.study.rows import Row
from kvedit.cartridges.study.sample_set import SampleSet
from kvedit.cartridges.study.settings import StudySettings
from kvedit.cartridges.study.shards import Shards, write_shard
from kvedit.cartridges.study.turns import Turns, corpus_context
from kvedit.cartridges.study.writing import open_shards
from kvedit.errors import InvalidArgument
from kvedit.memory import Source
from kvedit.models.fingerprint import template_digest
from kvedit.runtime.text import encode
from kvedit.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["synthesize"]

_log = logging.getLogger(__name__)


def synthesize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    folder: str | Path,
    settings: StudySettings | None = None,
    n: int = 256,
    seed: int = 0,
    *,
    source: Source | None = None,
    batch_size: int = 8,
    shard_size: int = 64,
    kept_chunks: int = 16,
    progress: bool = False,
    tracker: Tracker | None = None,
) -> SampleSet:
    """Returns ``n`` samples about a corpus; what the folder holds already is not made again.

    The folder can be left at any moment, by a kill as well: called again with the same arguments,
    the study goes on behind the last file that was written, and ends with the same samples, bit by
    bit on the same machine and batch size. With a larger ``n`` it goes on further.

    Args:
        model: the model, which asks, answers and teaches.
        tokenizer: its tokenizer.
        corpus: the documents.
        folder: where samples are, or shall be.
        settings: what is made; None takes the defaults.
        n: samples that are wanted.
        seed: of all draws.
        source: source of the memory that the cartridge will stand for; samples' questions follow
            it. None takes that of :func:`corpus_context`.
        batch_size: rows that are generated side by side. It moves what is computed by no more
            than rounding.
        shard_size: attempts per file, about; a kill costs the work of one file at most.
        kept_chunks: memories of chunks that are kept for later visits.
        progress: whether to show a bar.
        tracker: is told counts and rates at every file.

    Returns:
        The first ``n`` samples of the folder; fewer if ``settings.tries * n`` attempts did not
        give that many, which is logged.

    Raises:
        InvalidArgument: if a number is out of range, or the folder holds something else.
        IncompatibleModel: if the folder's samples are of another model, corpus, seed or settings.
        ContextTooLong: if chunks don't fit into the model's context.
        CorruptMemory: if a file of the folder is damaged.
        MissingDependency: without pyarrow (extra ``study``).
    """
    chosen = settings or StudySettings()
    for name, value in (("n", n), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise InvalidArgument(f"{name} must be at least 1, found {value}")
    student = Student(model, tokenizer, chosen)
    plan = Plan(student, corpus, seed)
    if source is None:
        source = encode(
            tokenizer, corpus_context(tokenizer, corpus, chat=student.chat, intro=chosen.intro)
        )
    turns = Turns(tokenizer, source, plain=chosen.plain)
    memories = ChunkMemories(student, plan.context_limit, max(1, kept_chunks))
    maker = Maker(student, plan, memories, turns)
    width = min(chosen.top_k, student.found.spec.vocabulary)
    with open_shards(folder, _facts(student, corpus, seed, turns), width) as shards:
        study = _Study(shards, maker, n, chosen.tries * n, progress, tracker)
        for outcome in study.outcomes(batch_size):
            study.take(outcome, shard_size)
        study.close()
    return SampleSet(folder)[:n]


def _facts(student: Student, corpus: Corpus, seed: int, turns: Turns) -> dict[str, Any]:
    identity = student.found.spec.identity()
    return {
        "made": "study",
        "model": {
            **identity["fingerprint"],
            "template": template_digest(student.tokenizer),
            "dtype": str(student.model.dtype).removeprefix("torch."),
        },
        "corpus": corpus.digest,
        "settings": student.settings.to_json(),
        "seed": seed,
        "turn": turns.probe,
    }


class _Study:
    """A run: what was kept and dropped so far, and what is not yet in a file."""

    def __init__(
        self,
        shards: Shards,
        maker: Maker,
        n: int,
        most: int,
        progress: bool,
        tracker: Tracker | None,
    ) -> None:
        self.shards, self.maker, self.n, self.most = shards, maker, n, most
        self.tracker = tracker
        self.rows: list[Row] = []
        self.dropped: Counter[str] = Counter()
        self.kept = sum(shard.rows for shard in shards.files)
        self.next = self.begun = shards.attempts
        self.started = time.perf_counter()
        self.bar = _bar(n, min(self.kept, n)) if progress else None

    def outcomes(self, batch_size: int) -> Iterator[Outcome]:
        """Yields attempts that are not in a file, in order, until there are enough samples.

        Batches begin at multiples of their size, so a run that goes on computes each attempt
        beside the same others as one that was never cut.
        """
        seen = Duplicates(self.maker.filters.duplicates)
        first = self.next // batch_size * batch_size
        keys = self._asked(seen, first)
        for start in range(first, self.most, batch_size):
            if self.kept >= self.n:
                return
            for outcome in self.maker.make(range(start, start + batch_size), seen, keys):
                if self.kept >= self.n or outcome.number >= self.most:
                    return
                if outcome.number >= self.next:
                    yield outcome

    def _asked(self, seen: Duplicates, first: int) -> set[str]:
        """Adds the questions of files, of attempts before ``first``, and returns their keys."""
        there = SampleSet(self.shards)
        columns = [there.column(name) for name in ("attempt", "question", "key")]
        keys = set()
        for attempt, question, key in zip(*columns, strict=True):
            if attempt < first:
                seen.add(question)
                keys.add(key)
        return keys

    def take(self, outcome: Outcome, shard_size: int) -> None:
        """Notes an attempt, and writes a file when there are enough."""
        self.next = outcome.number + 1
        if outcome.row is not None:
            self.rows.append(outcome.row)
            self.kept += 1
            if self.bar is not None:
                self.bar.update(1)
        else:
            self.dropped[outcome.reason] += 1
        if self.next - self.shards.attempts >= shard_size:
            self._write()

    def close(self) -> None:
        """Writes what is left."""
        if self.next > self.shards.attempts:
            self._write()
        if self.bar is not None:
            self.bar.close()
        if self.kept < self.n:
            _log.warning(
                "%d of %d samples after %d attempts; dropped: %s. Loosen the filters, add seed "
                "prompts or documents, or raise tries.",
                self.kept, self.n, self.shards.attempts, dict(self.shards.dropped),
            )  # fmt: skip

    def _write(self) -> None:
        write_shard(self.shards, self.next, self.rows, self.dropped)
        self.rows, self.dropped = [], Counter()
        if self.tracker is not None:
            self.tracker.log(len(self.shards.files) - 1, self._metrics())

    def _metrics(self) -> dict[str, float]:
        minutes = (time.perf_counter() - self.started) / 60
        dropped = self.shards.dropped
        return {
            "study/attempts": float(self.shards.attempts),
            "study/kept": float(self.kept),
            "study/chunks_read": float(self.maker.memories.reads),
            "study/attempts_per_minute": (self.shards.attempts - self.begun) / max(minutes, 1e-9),
            **{f"study/dropped/{reason}": float(count) for reason, count in dropped.items()},
        }


def _bar(total: int, initial: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=initial, desc="study", unit="sample", disable=None)
