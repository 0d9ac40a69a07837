"""SpotLight: a span's attention mass, raised to a target as it is needed (arXiv 2505.12025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.target import as_heads, as_number, as_spans, held_union
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import MassRule, write_rule

__all__ = ["SpotLight"]


@dataclass(frozen=True)
class SpotLight(Editor):
    """Keeps a rule in the memory: wherever a head gives spans less mass than ``target``, more.

    How much depends on each query, so this is no static bias: the runtime measures the mass of
    every layer, query head and query of later tokens, and adds to the spans' logits. The paper
    measures one mass for a whole sample, over all heads and queries; here each is measured alone.

    Args:
        spans: what to keep in sight, one span or several; a token in several counts once.
        target: mass in (0, 1); the paper's code takes 0.2 to 0.3.
        form: ``"exact"`` adds ``logit(target) - logit(mass)``: the mass becomes the target.
            ``"spotlight"`` adds ``log(target / mass)``, as the paper does: it becomes
            ``target / (target + 1 - mass)``.
        raise_only: whether mass above the target is left alone, as in the paper.
        heads: query or KV heads; None means all, as in the paper.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    spans: tuple[SpanLike, ...]
    target: float
    form: Literal["exact", "spotlight"] = "exact"
    raise_only: bool = True
    heads: HeadSet | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "heads", as_heads(self.heads))
        target = as_number("target", self.target)
        if not 0 < target < 1:
            raise InvalidArgument(f"target must lie in (0, 1), found {self.target!r}")
        object.__setattr__(self, "target", target)
        if self.form not in ("exact", "spotlight"):
            raise InvalidArgument(f"form must be 'exact' or 'spotlight', found {self.form!r}")
        if not isinstance(self.raise_only, bool):
            raise InvalidArgument(f"raise_only must be true or false, found {self.raise_only!r}")

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with the rule added."""
        memory = memories[0]
        heads = self.heads or HeadSet.all(memory.model)
        heads.check(memory.model)
        span = held_union(memory, self.spans, [layer for layer, _ in heads.heads])
        chosen = None if self.heads is None else self.heads.to_query(memory.model)
        rule = MassRule(span, self.target, self.form, self.raise_only, chosen)
        return replace(memory, rules=(*memory.rules, write_rule(rule)))
