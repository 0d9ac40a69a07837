"""composition: what is left of each document when several memories stand in one, in any order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.bootstrap import Mean, mean
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.recalling import FULL, recall
from kvedit.evals.recall.report import RecallReport
from kvedit.memory import KVMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Composition", "composition"]

Compose = Callable[[Sequence[KVMemory]], KVMemory]
"""Makes one memory of several, in the order given."""


@dataclass(frozen=True)
class Composition:
    """Questions about several documents over their memories, composed in several orders.

    Args:
        report: memories ``"A + B"`` per order, ``"A alone"`` per part, and the full context.
        orders: the composed memories' names.
        parts: the documents' names.
    """

    report: RecallReport
    orders: tuple[str, ...]
    parts: tuple[str, ...]

    def spread(self, metric: str = "nll_gold") -> Mean:
        """Returns the mean over questions of the largest less the smallest value of all orders.

        0 if the order makes no difference to any question.
        """
        values = [self.report.values(order, metric) for order in self.orders]
        return mean(
            [max(v[key] for v in values) - min(v[key] for v in values) for key in values[0]],
            self.report.seed,
        )

    def flipped(self) -> Mean:
        """Returns the share of questions whose free answers are not the same in all orders."""
        answers = zip(*(self.report.of(order) for order in self.orders), strict=True)
        return mean(
            [float(len({result.answer for result in row}) > 1) for row in answers],
            self.report.seed,
        )

    def place(self, metric: str = "nll_gold") -> dict[int, Mean]:
        """Returns the mean by where a question's document stands: 0 is first."""
        found: dict[int, list[float]] = {}
        for order in self.orders:
            names, values = order.split(_JOIN), self.report.values(order, metric)
            for question in self.report.questions:
                if question.key in values:
                    at = names.index(question.document)
                    found.setdefault(at, []).append(values[question.key])
        return {at: mean(found[at], self.report.seed) for at in sorted(found)}

    def cost(self, metric: str = "nll_gold") -> dict[str, float]:
        """Returns, per document, the metric over compositions less that over its own memory."""
        found = {}
        for part in self.parts:
            alone = self.report.by(f"{part} alone", "document", metric)[part].value
            composed = [self.report.by(o, "document", metric)[part].value for o in self.orders]
            found[part] = fmean(composed) - alone
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: the report, and the spread of every metric over orders."""
        spread = {name: self.spread(name).to_json() for name in self.report.metrics}
        facts = {"orders": list(self.orders), "parts": list(self.parts)}
        flipped = self.flipped().to_json()
        return {**self.report.to_json(), **facts, "spread": spread, "flipped": flipped}

    def __repr__(self) -> str:
        """The report's table, and what the order does."""
        metric = "nll_gold" if "nll_gold" in self.report.metrics else "kl"
        order = f"orders: {len(self.orders)}, spread of {metric} {self.spread(metric)}"
        return f"{self.report!r}\n{order}, answers that the order flips {self.flipped()}"


_JOIN = " + "


def composition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Mapping[str, KVMemory],
    compose: Compose,
    questions: Sequence[RecallQuestion],
    *,
    full: KVMemory,
    others: Mapping[str, KVMemory | None] | None = None,
    most_orders: int = 6,
    seed: int = 0,
    **options: Any,
) -> Composition:
    """Returns how questions about each document fare over the composed memory, in shuffled orders.

    Args:
        model: the model that made the memories.
        tokenizer: its tokenizer.
        parts: document to its memory: a capture, a compacted or a trained one.
        compose: makes one memory of several.
        questions: questions whose ``document`` names a part.
        full: a capture of all documents' texts one after the other: the reference.
        others: further memories to ask, for example None as ``"nothing"``.
        most_orders: orders at most; beyond that they are drawn, the given order among them.
        seed: seed of that draw and of the bootstrap.
        **options: for :func:`recall`.

    Raises:
        InvalidArgument: if there are fewer than two parts, a name holds ``" + "``, or a part has
            no question.
        UnknownName: if a question is about none of the parts.
    """
    names = tuple(parts)
    _check(names, questions, most_orders)
    every = list(itertools.permutations(names)) if len(names) < 7 else None
    orders = _orders(names, every, most_orders, random.Random(seed))
    memories: dict[str, KVMemory | None] = {
        _JOIN.join(order): compose([parts[name] for name in order]) for order in orders
    }
    memories |= {f"{name} alone": parts[name] for name in names}
    report = recall(
        model, tokenizer, {**memories, **(others or {})}, questions,
        full=full, seed=seed, **options,
    )  # fmt: skip
    return Composition(report, tuple(_JOIN.join(order) for order in orders), names)


def _check(names: Sequence[str], questions: Sequence[RecallQuestion], most: int) -> None:
    if len(names) < 2 or most < 2 or any(_JOIN in name or name == FULL for name in names):
        raise InvalidArgument(
            f"expected two parts at least, names without {_JOIN!r}, and most_orders >= 2, found "
            f"{list(names)} and {most}"
        )
    asked = {question.document for question in questions}
    for document in asked - set(names):
        raise UnknownName("document of a question", document, names)
    if missing := set(names) - asked:
        raise InvalidArgument(f"there is no question about {sorted(missing)}")


def _orders(
    names: tuple[str, ...], every: list[tuple[str, ...]] | None, most: int, drawn: random.Random
) -> list[tuple[str, ...]]:
    if every is not None and len(every) <= most:
        return every
    found: dict[tuple[str, ...], None] = {names: None}
    while len(found) < most:
        found[tuple(drawn.sample(names, len(names)))] = None
    return list(found)
