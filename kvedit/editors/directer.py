"""Directer: keys of a span scaled hard, and taken back where that is implausible.

Directer (ICLR 2026, arXiv 2603.06745) multiplies the keys of the instruction by 100 at each step,
and accepts the step's token if the unsteered model finds it at least half as probable as its own
first choice. Otherwise it steers half as many layers and tries again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.ranking import rank_for_prompt
from kvedit.editors.target import as_indices, as_number, as_spans, held_union
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.heads import HeadSet
from kvedit.memory.lineage import Reproducibility
from kvedit.memory.rules import GateRule, Rule, ScaleRule, write_rule

__all__ = ["Directer", "Gate"]


@dataclass(frozen=True)
class Directer(Editor):
    """Keeps two rules in the memory: scaled logits of spans, and the gate that takes them back.

    The paper ranks layers once per prompt, by how much scaling one of them changes the others
    (:func:`~kvedit.editors.ranking.rank_for_prompt`). With a ``prompt`` that is done here, and
    needs a reader; without one the order is given.

    Args:
        spans: what to steer to, one span or several; a token in several counts once.
        factor: factor on the spans' keys, so on their logits; the paper's is 100.
        beta: share of the most likely token's unsteered probability that the steered choice must
            have, in (0, 1]; the paper's is 0.5.
        layers: layers that steer, the most important first; None means all in their own order.
            With a prompt they are the ones to rank, and their order says nothing.
        prompt: what will be asked, as it will follow the memory; layers are ranked at its last
            token. The order then serves this prompt.

    Raises:
        InvalidArgument: if a parameter is out of range, the memory has a gate already, or there is
            a prompt and no reader.
    """

    spans: tuple[SpanLike, ...]
    factor: float = 100.0
    beta: float = 0.5
    layers: tuple[int, ...] | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "factor", as_number("factor", self.factor))
        object.__setattr__(self, "beta", _share(self.beta))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        if self.prompt is not None and (not isinstance(self.prompt, str) or not self.prompt):
            raise InvalidArgument(f"prompt: expected a text or None, found {self.prompt!r}")

    @property
    def reproducibility(self) -> Reproducibility:  # type: ignore[override]
        """``"reader"`` if layers are ranked, which runs the model."""
        return "pure" if self.prompt is None else "reader"

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with both rules added."""
        memory = memories[0]
        _refuse_gate(memory)
        order = memory.layer_indices(self.layers)
        span = held_union(memory, self.spans, order)
        heads = None if self.layers is None else HeadSet.all(memory.model, order)
        if self.prompt is not None:
            if reader is None:
                raise InvalidArgument("Directer ranks layers with the model: pass reader=")
            order = rank_for_prompt(reader, memory, span, self.prompt, self.factor, order)
        named = self.layers is not None or self.prompt is not None
        gate = GateRule(self.beta, tuple(order) if named else None)
        return _with_rules(memory, ScaleRule(span, self.factor, heads), gate)


@dataclass(frozen=True)
class Gate(Editor):
    """Adds Directer's plausibility gate to whatever steers a memory: its bias and its rules.

    It covers bias and rules that come later, too; where nothing steers it changes nothing.

    Args:
        beta: share of the most likely token's unsteered probability that the steered choice must
            have, in (0, 1].
        layers: all layers that steer, the most important first, halved at each refusal; None
            takes their own order.

    Raises:
        InvalidArgument: if a parameter is out of range, or the memory has a gate already.
    """

    beta: float = 0.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        object.__setattr__(self, "beta", _share(self.beta))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with the gate added."""
        memory = memories[0]
        order = None if self.layers is None else tuple(memory.layer_indices(self.layers))
        return _with_rules(memory, GateRule(self.beta, order))


def _share(beta: Any) -> float:
    found = as_number("beta", beta)
    if not 0 < found <= 1:
        raise InvalidArgument(f"beta must lie in (0, 1], found {beta!r}")
    return found


def _refuse_gate(memory: KVMemory) -> None:
    if _has_gate(memory.rules):
        raise InvalidArgument("this memory has a gate already; one takes back all that steers")


def _with_rules(memory: KVMemory, *rules: Rule) -> KVMemory:
    _refuse_gate(memory)
    return replace(memory, rules=(*memory.rules, *map(write_rule, rules)))


def _has_gate(rules: Iterable[Any]) -> bool:
    return any(isinstance(rule, Mapping) and rule.get("rule") == GateRule.name for rule in rules)
