"""SampleSet: samples in a folder, read one at a time."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from kvedit.cartridges.sample import Sample
from kvedit.cartridges.study.drawing import sub_seed
from kvedit.cartridges.study.filters import normalised
from kvedit.cartridges.study.rows import Row, row_digest, sample_of
from kvedit.cartridges.study.shards import Shards
from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["SampleSet"]


class SampleSet(Sequence[Sample]):
    """Samples of a folder, or some of them, in a fixed order.

    Nothing is read but the files' ends until a sample is asked for; a file's bytes are checked
    when it is first read. It does not grow: a study that goes on gives a new one.

    Args:
        folder: a folder that :func:`synthesize`, :func:`save_samples` or :func:`merge` wrote; or
            its shards.
        indices: numbers of the samples that belong to the set; None takes all.

    Raises:
        NotFound: if the folder is no set of samples.
        CorruptMemory: if something in it is damaged or missing.
    """

    def __init__(self, folder: str | Path | Shards, indices: Sequence[int] | None = None) -> None:
        """Reads the manifest and the shards' ends."""
        self._shards = folder if isinstance(folder, Shards) else Shards(folder)
        self._stops = list(accumulate(shard.rows for shard in self._shards.files))
        total = self._stops[-1] if self._stops else 0
        self._indices: Sequence[int] = range(total) if indices is None else indices

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._shards.folder

    @property
    def facts(self) -> dict[str, Any]:
        """What the samples depend on: model, tokenizer, corpus, settings, seed."""
        return self._shards.facts

    @property
    def k(self) -> int:
        """Width of the teacher's columns."""
        return self._shards.k

    @property
    def attempts(self) -> int:
        """Attempts that were made for the whole folder."""
        return self._shards.attempts

    @property
    def dropped(self) -> Counter[str]:
        """Reason to number of attempts without a sample, in the whole folder."""
        return self._shards.dropped

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> SampleSet: ...

    def __getitem__(self, index: int | slice) -> Sample | SampleSet:
        """A sample, or the set of a slice."""
        if isinstance(index, slice):
            return SampleSet(self._shards, list(self._indices[index]))
        return sample_of(*self._place(index), self.k)

    def __iter__(self) -> Iterator[Sample]:
        """Samples in order."""
        for index in range(len(self)):
            yield self[index]

    def row(self, index: int) -> Row:
        """Returns a sample with its chunk and the number of its attempt."""
        table, place = self._place(index)
        chunk, attempt = (table.column(name)[place].as_py() for name in ("chunk", "attempt"))
        return Row(sample_of(table, place, self.k), chunk, attempt)

    def column(self, name: str) -> list[Any]:
        """Returns one column's values, such as ``"question"``, without making samples.

        Raises:
            InvalidArgument: if there is no such column.
        """
        whole: list[Any] = []
        for number in range(len(self._shards.files)):
            table = self._shards.table(number)
            if name not in table.column_names:
                raise InvalidArgument(f"no column {name!r}; there are {table.column_names}")
            whole += table.column(name).to_pylist()
        return [whole[index] for index in self._indices]

    def select(self, indices: Iterable[int]) -> SampleSet:
        """Returns the set of some samples, in the order given.

        Raises:
            IndexError: if one does not exist.
        """
        return SampleSet(self._shards, [self._indices[operator.index(i)] for i in indices])

    def split(self, held_out: float, seed: int = 0) -> tuple[SampleSet, SampleSet]:
        """Returns samples for training and samples that are held out; they share no question.

        Questions that are equal but for case, white space and punctuation count as one. Each
        question's place is drawn from the seed and its own text, so it does not depend on others.

        Args:
            held_out: share of samples that is held out, in (0, 1); one on each side at least.
            seed: of the draw.

        Raises:
            InvalidArgument: if the share is out of range, or there are not two questions.
        """
        if not 0 < held_out < 1:
            raise InvalidArgument(f"held_out must be in (0, 1), found {held_out}")
        groups: dict[str, list[int]] = {}
        for index, question in enumerate(self.column("question")):
            groups.setdefault(normalised(question), []).append(index)
        if len(groups) < 2:
            raise InvalidArgument(
                f"a split needs two different questions, found {len(groups)}: make more samples, "
                "or hold out none"
            )
        order = sorted(groups, key=lambda question: sub_seed(seed, question, 0))
        wanted, held = max(1, round(held_out * len(self))), set[int]()
        for question in order[:-1]:
            if len(held) >= wanted:
                break
            held.update(groups[question])
        train = [index for index in range(len(self)) if index not in held]
        return self.select(train), self.select(sorted(held))

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of all that the samples say, in order; cutting into files does not count."""
        return digest_bytes(canonical_json([row_digest(sample) for sample in self]))

    def _place(self, index: int) -> tuple[Any, int]:
        """Returns the table and the row of a sample."""
        number = self._indices[operator.index(index)]
        shard = bisect_right(self._stops, number)
        return self._shards.table(shard), number - (self._stops[shard - 1] if shard else 0)

    def __repr__(self) -> str:
        """Number of samples and where they are."""
        return f"SampleSet({len(self)} samples in {str(self.folder)!r})"
