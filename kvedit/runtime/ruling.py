"""Mass and scale rules of one layer, applied to the logits of a batch whose rows may differ.

Order: all scale rules of a memory multiply the products of queries and keys; then come softcap,
masks, bias; then the mass rules, one after the other as the memory lists them. Each mass rule
measures what the earlier ones left, so where two want the same slots, or more than there is, the
last one is met exactly and the earlier ones are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import ModelSpec
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import GateRule, MassRule, Rule, ScaleRule
from kvedit.runtime.massing import MassStep
from kvedit.runtime.slots import LayerSlots

__all__ = ["Ruling", "check_rules", "rule_layer"]


def check_rules(rules: Sequence[Rule], spec: ModelSpec) -> None:
    """Raises InvalidArgument unless the rules fit the model: heads, layers, one gate at most."""
    for rule in rules:
        if isinstance(rule, GateRule):
            for layer in rule.layers or ():
                if not 0 <= layer < len(spec.layers):
                    raise InvalidArgument(
                        f"a gate names layer {layer}, the model has {len(spec.layers)}"
                    )
        elif rule.heads is not None:
            rule.heads.check(spec)
    gates = sum(isinstance(rule, GateRule) for rule in rules)
    if gates > 1:
        raise InvalidArgument(f"a memory has one gate at most, found {gates}")


@dataclass(frozen=True, eq=False)
class Ruling:
    """An :class:`~kvedit.models.attention_call.Adjustment` for one layer.

    Args:
        factors: float32 ``[batch, query_head, slot]`` on products, over the memories' slots; None
            where nothing is scaled.
        masses: mass rules in order.
    """

    factors: torch.Tensor | None
    masses: tuple[MassStep, ...]
    _placed: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    def products(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scaled products; new tokens' are left as they are."""
        if self.factors is None:
            return scores
        held = self.factors.shape[2]
        if not self._placed or self._placed[0].device != scores.device:
            self._placed[:] = [self.factors[:, :, None, :].to(scores)]
        return torch.cat((scores[..., :held] * self._placed[0], scores[..., held:]), dim=-1)

    def logits(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Returns the logits after all mass rules."""
        for step in self.masses:
            scores = step.apply(scores, sinks)
        return scores

    def acts_on(self, row: int) -> bool:
        """Whether a row has a rule that acts here."""
        scaled = self.factors is not None and bool((self.factors[row] != 1).any())
        return scaled or any(bool(step.heads[row].any()) for step in self.masses)

    def select_rows(self, rows: torch.Tensor) -> Ruling:
        """Returns the ruling whose row ``i`` is this one's row ``rows[i]``."""
        at = rows.cpu()
        factors = None if self.factors is None else self.factors[at]
        steps = tuple(step.select_rows(at) for step in self.masses)
        return Ruling(factors, tuple(step for step in steps if bool(step.heads.any())))

    def only(self, active: Sequence[bool]) -> Ruling | None:
        """Returns the ruling with other rows left alone; None if no row remains."""
        if all(active):
            return self
        if not any(active):
            return None
        rest = ~torch.tensor(active)
        factors = self.factors
        if factors is not None:
            factors = factors.masked_fill(rest[:, None, None], 1)
        masses = tuple(replace(step, heads=step.heads & ~rest[:, None]) for step in self.masses)
        return Ruling(factors, masses)


def rule_layer(
    spec: ModelSpec, layer: int, slots: LayerSlots, rules: Sequence[Sequence[Rule]]
) -> Ruling | None:
    """Returns what the rows' rules ask of a layer; None where they ask nothing.

    Args:
        spec: the model's facts.
        layer: index of the layer.
        slots: its slots; new tokens belong to no span.
        rules: each row's rules.
    """
    scales = [[rule for rule in row if isinstance(rule, ScaleRule)] for row in rules]
    masses = [[rule for rule in row if isinstance(rule, MassRule)] for row in rules]
    factors = _factors(spec, layer, slots, scales) if any(scales) else None
    steps = [
        _mass_step(spec, layer, slots, [row[i] if i < len(row) else None for row in masses])
        for i in range(max(map(len, masses), default=0))
    ]
    kept = tuple(step for step in steps if bool(step.heads.any()))
    return Ruling(factors, kept) if factors is not None or kept else None


def _factors(
    spec: ModelSpec, layer: int, slots: LayerSlots, rules: Sequence[Sequence[ScaleRule]]
) -> torch.Tensor | None:
    factors = torch.ones(len(rules), spec.layers[layer].query_heads, slots.held)
    for row, found in enumerate(rules):
        for rule in found:
            heads = _heads(rule.heads, spec, layer)
            inside = rule.span.inside(slots.source[row].cpu())
            factors[row][heads[:, None] & inside] *= rule.factor
    return factors if bool((factors != 1).any()) else None


def _mass_step(
    spec: ModelSpec, layer: int, slots: LayerSlots, rules: Sequence[MassRule | None]
) -> MassStep:
    rows, source = len(rules), slots.source.cpu()
    held = torch.ones_like(source, dtype=torch.bool) if slots.valid is None else slots.valid.cpu()
    inside = torch.zeros(rows, slots.held, dtype=torch.bool)
    heads = torch.zeros(rows, spec.layers[layer].query_heads, dtype=torch.bool)
    for row, rule in enumerate(rules):
        if rule is not None:
            inside[row] = rule.span.inside(source[row]) & held[row]
            heads[row] = _heads(rule.heads, spec, layer) & inside[row].any()
    return MassStep(
        inside,
        heads,
        target=torch.tensor([0.5 if r is None else r.target for r in rules], dtype=torch.float64),
        exact=torch.tensor([r is None or r.form == "exact" for r in rules]),
        raise_only=torch.tensor([r is None or r.raise_only for r in rules]),
    )


def _heads(heads: HeadSet | None, spec: ModelSpec, layer: int) -> torch.Tensor:
    if heads is None:
        return torch.ones(spec.layers[layer].query_heads, dtype=torch.bool)
    return heads.mask(spec, layer)
