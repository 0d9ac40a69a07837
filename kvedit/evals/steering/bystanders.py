"""Bystanders: unrelated prompts, by which it is told how far steering reaches too far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.divergence import token_divergence
from kvedit.evals.recall.reading import Ids
from kvedit.evals.steering.asker import Asker, Place, Prompt, Transform
from kvedit.evals.steering.entering import Entry, Steering
from kvedit.evals.steering.keeping import Keep
from kvedit.evals.steering.parting import draw_parts
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Bystanders", "Moved"]


@dataclass(frozen=True)
class Moved:
    """How far steering moved one prompt's answer, along the unedited model's own answer.

    Args:
        kl: KL(base‖steered) per token of that answer, nats.
        flipped: share of its tokens that are no longer the most likely ones.
    """

    kl: float
    flipped: float

    def to_json(self) -> dict[str, float]:
        """Returns plain data."""
        return asdict(self)


class Bystanders:
    """Prompts that steering should leave alone, and the unedited model's own answers to them.

    Answers, distributions and memories are made once and kept within a bound of bytes, for all
    methods and strengths. A prompt's KL is a mean over the tokens of its answer; prompts count
    the same, however long.

    Args:
        asker: the model, and how it is asked.
        prompts: different prompts.
        keep_bytes: bytes of distributions and memories to keep: a token of SmolLM2's takes 197 kB.

    Raises:
        InvalidArgument: if there is no prompt, or one comes twice.
    """

    def __init__(self, asker: Asker, prompts: Sequence[Prompt], keep_bytes: int = 2 << 30) -> None:
        """Reads nothing yet."""
        if isinstance(prompts, str) or not prompts:
            raise InvalidArgument(f"expected a list of prompts, found {prompts!r}")
        self.asker, self.prompts = asker, tuple(prompts)
        self.keys = tuple(_key(prompt) for prompt in prompts)
        if len(set(self.keys)) < len(self.keys):
            raise InvalidArgument(f"of {len(self.keys)} prompts {len(set(self.keys))} differ")
        self._kept = Keep(keep_bytes)

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @cached_property
    def digest(self) -> str:
        """Digest of prompts, model and settings: what a journal depends on."""
        return digest_bytes(canonical_json({"keys": list(self.keys), **self.asker.facts}))

    @cached_property
    def answers(self) -> tuple[Ids, ...]:
        """The unedited model's own greedy answer to each prompt, an end token included."""
        found: list[Ids] = []
        with Entry().on() as change:
            for batch in self._batches(range(self.n)):
                found += [r.tokens for r in self.asker.reply(self._places(batch), change)]
        return tuple(found)

    @cached_property
    def entropy(self) -> tuple[float, ...]:
        """Mean entropy of the unedited model along its answer to each prompt, nats."""
        found: list[float] = []
        for batch in self._batches(range(self.n)):
            base = self._base(batch, self._places(batch))
            found += [float(-(p.exp() * p).nansum(dim=-1).mean()) for p in base]
        return tuple(found)

    def moved(
        self,
        make: Callable[[], Steering | None] | None,
        indices: Sequence[int] | None = None,
        transform: Transform | None = None,
    ) -> dict[str, Moved]:
        """Returns how far each prompt's answer moves.

        Args:
            make: makes what steers; None for nothing. It is called once, or once a batch where it
                makes a context manager: the unedited model is read between.
            indices: which prompts; None takes all.
            transform: what is done to prompts as well, such as an instruction: their answers are
                then compared with those to the bare prompts.
        """
        wanted = range(self.n) if indices is None else indices
        if make is None and transform is None:
            # Exactly: reading it again would give the noise of another batch.
            return {self.keys[index]: Moved(0.0, 0.0) for index in wanted}
        found: dict[str, Moved] = {}
        entry = Entry(make)
        for batch in self._batches(wanted):
            answers = [self.answers[index] for index in batch]
            places = self._places(batch)
            base = self._base(batch, places)
            asked = places if transform is None else self._transformed(batch, transform)
            with entry.on() as change:
                steered = self.asker.along(asked, answers, change)
            for index, p, q in zip(batch, base, steered, strict=True):
                kl, same = token_divergence(p.to(q.device), q)
                flipped = 1 - float(same.double().mean())
                found[self.keys[index]] = Moved(float(kl.mean()), flipped)
        return found

    def split(
        self,
        share: float,
        seed: int = 0,
        by: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Returns indices of two parts that are alike: one to choose by, one to report.

        Prompts are put in order by a number that the method which is measured has no part in, and
        each run of neighbours gives its share to the first part, by lot. Answers that are open
        move further than those that are certain, so this takes luck out of the split. With a list
        of such numbers the means of the parts are then brought together in all of them.

        Args:
            share: fraction of the first part, in (0, 1).
            seed: seed of the draw.
            by: key to number; None takes the unedited model's entropy. Or several of these, such
                as the KLs of other kinds of steering (:meth:`moved`).

        Raises:
            InvalidArgument: if a part would be empty, or there is nothing to split by.
        """
        count = round(self.n * share)
        if not 0 < share < 1 or not 1 <= count < self.n:
            raise InvalidArgument(
                f"{self.n} prompts can't be split into {share:g} of them and a rest"
            )
        if by is None:
            return draw_parts([self.entropy], count, seed, balance=False)
        several = [by] if isinstance(by, Mapping) else list(by)
        if not several:
            raise InvalidArgument("by: expected numbers to split by, found an empty list")
        columns = [[numbers[key] for key in self.keys] for numbers in several]
        return draw_parts(columns, count, seed, balance=not isinstance(by, Mapping))

    def _batches(self, indices: Sequence[int]) -> list[tuple[int, ...]]:
        # Batches are cut from the whole set, not from the part that is asked for, so that what is
        # kept of one call serves the next.
        wanted, size = set(indices), self.asker.batch_size
        cut = (range(start, min(start + size, self.n)) for start in range(0, self.n, size))
        parts = (tuple(index for index in batch if index in wanted) for batch in cut)
        return [part for part in parts if part]

    def _places(self, batch: Sequence[int]) -> list[Place]:
        def make(missing: list[tuple[str, int]]) -> list[Place]:
            return self.asker.places([self.prompts[index] for _, index in missing])

        return self._kept.all([("place", index) for index in batch], make, self._size)

    def _size(self, place: Place) -> int:
        own = place.memory is not None and place.memory is not self.asker.context
        return place.memory.nbytes if own and place.memory is not None else 0

    def _transformed(self, batch: Sequence[int], transform: Transform) -> list[Place]:
        prompts = [self.asker.as_turns(self.prompts[index]) for index in batch]
        return self.asker.places([transform(prompt) for prompt in prompts])

    def _base(self, batch: Sequence[int], places: Sequence[Place]) -> list[torch.Tensor]:
        """Returns the unedited model's log-probabilities along its answers."""
        at = dict(zip(batch, places, strict=True))

        def make(missing: list[tuple[str, int]]) -> list[torch.Tensor]:
            answers = [self.answers[index] for _, index in missing]
            with Entry().on() as change:
                read = self.asker.along([at[index] for _, index in missing], answers, change)
            return [tensor.cpu() for tensor in read]

        keys = [("base", index) for index in batch]
        return self._kept.all(keys, make, lambda tensor: int(tensor.nbytes))


def _key(prompt: Prompt) -> str:
    said: Any = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    return digest_bytes(canonical_json(said))[:16]
