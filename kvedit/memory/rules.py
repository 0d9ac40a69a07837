"""Run-time rules: what a memory asks of the runtime beyond static bias. A closed schema.

A rule is plain data in :attr:`~kvedit.memory.memory.KVMemory.rules`; nothing in it is imported or
run. Here it is checked and becomes a dataclass; ``kvedit.runtime`` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory.heads import HeadSet
from kvedit.memory.operand import OPERAND
from kvedit.memory.span import Span

__all__ = ["RULES", "GateRule", "MassRule", "Rule", "ScaleRule", "read_rules", "write_rule"]


@dataclass(frozen=True)
class MassRule:
    """Attention mass of a span, raised to a target per (layer, query head, query).

    ``"exact"`` adds ``logit(target) - logit(mass)`` to the span's logits, after which its mass is
    the target. ``"spotlight"`` adds ``log(target / mass)``, as SpotLight (arXiv 2505.12025) does;
    the mass becomes ``target / (target + 1 - mass)``. Mass is what remains after static bias.

    Args:
        span: the slots.
        target: mass in (0, 1).
        form: which of the two.
        raise_only: whether a mass that is above the target already is left alone.
        heads: query heads that it acts on; None means all.
    """

    name: ClassVar[str] = "mass"

    span: Span
    target: float
    form: Literal["exact", "spotlight"] = "exact"
    raise_only: bool = True
    heads: HeadSet | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        if not (isinstance(self.target, float) and 0 < self.target < 1):
            raise InvalidArgument(f"target must lie in (0, 1), found {self.target!r}")
        if self.form not in ("exact", "spotlight"):
            raise InvalidArgument(f"form must be 'exact' or 'spotlight', found {self.form!r}")


@dataclass(frozen=True)
class ScaleRule:
    """Logits of a span, multiplied by a factor before masks and bias: keys scaled at run time.

    Args:
        span: the slots.
        factor: finite; logits have a sign, so a factor above 1 does not always mean more attention.
        heads: query heads that it acts on; None means all.
    """

    name: ClassVar[str] = "scale"

    span: Span
    factor: float
    heads: HeadSet | None = None

    def __post_init__(self) -> None:
        """Checks the factor."""
        if not (isinstance(self.factor, float) and math.isfinite(self.factor)):
            raise InvalidArgument(f"factor must be a finite number, found {self.factor!r}")


@dataclass(frozen=True)
class GateRule:
    """Steering is taken back where it makes the model say what it finds implausible.

    Directer (arXiv 2603.06745): a steered step is kept if its most likely token has, unsteered, at
    least ``beta`` times the probability of the most likely one. Otherwise the layers that steer
    are halved, in the order of ``layers``, and the step is tried again; at last it is taken
    unsteered. Unsteered means without the memory's bias and other rules.

    Args:
        beta: in (0, 1].
        layers: all layers that steer, the most important first; None takes their own order.
    """

    name: ClassVar[str] = "gate"

    beta: float = 0.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        if not (isinstance(self.beta, float) and 0 < self.beta <= 1):
            raise InvalidArgument(f"beta must lie in (0, 1], found {self.beta!r}")


Rule = MassRule | ScaleRule | GateRule

RULES: tuple[type[Rule], ...] = (MassRule, ScaleRule, GateRule)
"""All rules that this version can apply."""


def write_rule(rule: Rule) -> dict[str, Any]:
    """Returns a rule as the plain data that a memory holds."""
    plain: dict[str, Any] = {"rule": rule.name, "version": 1}
    for field in fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, HeadSet):
            value = value.to_json()
        elif isinstance(value, Span):
            value = {"ranges": [list(pair) for pair in value.ranges], "unit": value.unit}
        elif isinstance(value, tuple):
            value = list(value)
        plain[field.name] = value
    return plain


def read_rules(rules: Iterable[Any]) -> tuple[Rule, ...]:
    """Returns rules as dataclasses.

    Raises:
        UnsupportedModel: if one is not known, or the memory is an operand of editors.
        InvalidArgument: if one is malformed.
    """
    return tuple(map(_read, rules))


def _read(rule: Any) -> Rule:
    if not isinstance(rule, Mapping):
        raise InvalidArgument(f"a run-time rule is a mapping with 'rule', found {rule!r}")
    name = rule.get("rule")
    if name == OPERAND:
        raise UnsupportedModel(
            f"this memory is an operand of editors (kind {rule.get('kind')!r}), no context: pass "
            "it to an editor beside the memory that is edited"
        )
    known = {kind.name: kind for kind in RULES}
    if name not in known or rule.get("version") != 1:
        version = f" version {rule.get('version')!r}" if name in known else ""
        raise UnsupportedModel(
            f"the memory has the run-time rule {name!r}{version}; this version of kvedit knows "
            f"{', '.join(known)} (version 1) and applies no memory without its rules"
        )
    parameters = {key: value for key, value in rule.items() if key not in ("rule", "version")}
    try:
        if parameters.get("heads") is not None:
            parameters["heads"] = HeadSet.of(parameters["heads"])
        if "span" in parameters:
            span = parameters["span"]
            parameters["span"] = Span(tuple(map(tuple, span["ranges"])), span["unit"])
        if isinstance(parameters.get("layers"), list):
            parameters["layers"] = tuple(parameters["layers"])
        return known[name](**parameters)
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidArgument(f"run-time rule {name!r} is malformed: {error}") from error
