"""drift: what a memory does to questions that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.evals.bootstrap import Difference, Mean
from kvedit.evals.prefills import Prefills
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.recalling import FULL, recall
from kvedit.evals.recall.report import RecallReport
from kvedit.memory import KVMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NOTHING", "Drift", "drift"]

NOTHING = "nothing"
"""Name of the model without any context."""


@dataclass(frozen=True)
class Drift:
    """How far answers to unrelated questions move, measured from two sides.

    Args:
        from_full: the full context is the reference: what the memory does in its place.
        from_nothing: no context is the reference: what loading the memory does at all. The row
            ``"full"`` is the yardstick: a context in the prompt moves unrelated answers as well.
    """

    from_full: RecallReport
    from_nothing: RecallReport

    def kl(self, name: str, since: str = FULL) -> Mean:
        """Returns KL(reference‖memory) per token of the reference's answers, in nats."""
        return self._from(since).mean(name, "kl")

    def flipped(self, name: str, since: str = FULL) -> Mean:
        """Returns the share of greedy answers that are not the reference's, in [0, 1]."""
        same = self._from(since).mean(name, "same")
        low, high = (None if end is None else 1 - end for end in (same.high, same.low))
        return Mean(1 - same.value, low, high, same.n)

    def excess(self, name: str, metric: str = "kl") -> Difference:
        """Returns how much further from nothing a memory is than the full context: paired."""
        return self.from_nothing.difference(name, FULL, metric)

    def _from(self, since: str) -> RecallReport:
        if since not in (FULL, NOTHING):
            raise InvalidArgument(f"since: expected {FULL!r} or {NOTHING!r}, found {since!r}")
        return self.from_full if since == FULL else self.from_nothing

    def to_json(self) -> dict[str, Any]:
        """Returns both reports as plain data."""
        return {"from_full": self.from_full.to_json(), "from_nothing": self.from_nothing.to_json()}

    def __repr__(self) -> str:
        """A line per memory: KL and flips from both sides."""
        rows: list[tuple[str, ...]] = [
            ("memory", "KL full‖·", "flipped", "KL nothing‖·", "flipped")
        ]
        for name in self.from_full.names:
            sides = [f(name, since) for since in (FULL, NOTHING) for f in (self.kl, self.flipped)]
            rows.append((name, *(f"{found}" for found in sides)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        head = f"drift: n={self.from_full.n} unrelated questions, seed {self.from_full.seed}"
        return "\n".join([head, *lines])


def drift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memories: Mapping[str, KVMemory | None],
    prompts: Sequence[str | RecallQuestion],
    *,
    full: KVMemory,
    path: str | Path | None = None,
    prefills: Prefills | None = None,
    **options: Any,
) -> Drift:
    """Returns how unrelated answers move under each memory, against the full context and nothing.

    Args:
        model: the model that made the memories.
        tokenizer: its tokenizer.
        memories: names and memories.
        prompts: questions that have nothing to do with the context; questions with answers or
            options are graded too, as general knowledge would be.
        full: the memory of the whole context.
        path: a folder for the two journals; see :func:`recall`.
        prefills: as for :func:`recall`. Free answers are shared between both sides.
        **options: ``max_new_tokens``, ``stop``, ``batch_size``, ``seed``, ``progress`` and
            ``strict`` of :func:`recall`.

    Raises:
        InvalidArgument: if there is no prompt, or one comes twice.
    """
    if isinstance(prompts, str):
        raise InvalidArgument(f"expected a list of prompts, found {prompts!r}")
    asked = [RecallQuestion(p) if isinstance(p, str) else p for p in prompts]
    kept = prefills or Prefills(model, tokenizer, keep_bytes=64 << 20)
    sides: dict[str, KVMemory | None] = {NOTHING: None, **memories}

    def read(reference: str) -> RecallReport:
        journal = None if path is None else Path(path) / f"from-{reference}.jsonl"
        return recall(
            model, tokenizer, sides, asked,
            full=full, reference=reference, path=journal, prefills=kept, **options,
        )  # fmt: skip

    return Drift(read(FULL), read(NOTHING))
