"""Emphasize and Suppress: additive attention bias on a span.

Multiplying a group's attention by ``e^b`` and renormalising equals adding ``b`` to its logits, for
every query, since softmax is invariant to shifts. PASTA (Zhang et al. 2024, arXiv 2311.02262,
eq. 2) scales all tokens but the span by alpha and renormalises: ``b = -log alpha`` on the span.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.target import freeze_target, head_mask, held_span
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Emphasize", "Suppress"]


@dataclass(frozen=True)
class Emphasize(Editor):
    """More attention to a span, in chosen layers and query heads (all by default).

    The bias acts whenever later tokens read the memory: on prompts and on generated tokens.

    Args:
        span: what to emphasise: a text, a mapping for :class:`~kvedit.memory.span.SpanQuery`, or
            a span.
        strength: bias in nats; attention odds against the reference grow by ``e**strength``.
        alpha: PASTA's factor on what is not emphasised, in (0, 1]; ``strength = -log(alpha)``.
            One of ``strength`` and ``alpha`` is given.
        layers: layers to touch; negative numbers count from the end; None means all.
        heads: query heads to touch in those layers.
        kv_heads: KV heads to touch, each with its whole group of query heads.
        reference: against what attention is moved. ``"all_others"``: every other key, so
            bias is added to the span. ``"rest_of_memory"``: only the memory's other slots, so
            they are biased by ``-strength`` and later tokens keep their logits, as PASTA
            leaves generated tokens.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    span: SpanLike
    strength: float | None = None
    alpha: float | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    reference: Literal["all_others", "rest_of_memory"] = "all_others"

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        freeze_target(self)
        strength = _strength(self.strength, self.alpha)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "alpha", None)
        if self.reference not in ("all_others", "rest_of_memory"):
            raise InvalidArgument(
                f"reference must be 'all_others' or 'rest_of_memory', found {self.reference!r}"
            )

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with bias added."""
        strength = self.strength or 0.0
        if self.reference == "rest_of_memory":
            return _biased(memories[0], self, -strength, inside=False)
        return _biased(memories[0], self, strength, inside=True)


@dataclass(frozen=True)
class Suppress(Editor):
    """Less attention to a span; ``Emphasize`` with the sign turned, and ``inf`` for none at all.

    Args:
        span: what to suppress.
        strength: nats to take off; attention odds shrink by ``e**strength``; ``inf`` evicts the
            span for the chosen heads.
        alpha: factor on the span's attention, in (0, 1]; ``strength = -log(alpha)``.
        layers: layers to touch; None means all.
        heads: query heads to touch.
        kv_heads: KV heads to touch, each with its whole group of query heads.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    span: SpanLike
    strength: float | None = None
    alpha: float | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        freeze_target(self)
        strength = _strength(self.strength, self.alpha, infinite=True)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "alpha", None)

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with bias taken off."""
        return _biased(memories[0], self, -(self.strength or 0.0), inside=True)

    def parameters(self) -> dict[str, Any]:
        """Returns the configuration; JSON has no infinity, so it is spelled out."""
        found = super().parameters()
        return {**found, "strength": "inf"} if self.strength == math.inf else found


def _strength(strength: float | str | None, alpha: float | None, infinite: bool = False) -> float:
    if (strength is None) == (alpha is None):
        raise InvalidArgument(
            "expected one of strength (nats) and alpha (PASTA's factor), found "
            f"strength={strength}, alpha={alpha}"
        )
    if alpha is not None:
        factor = _number("alpha", alpha)
        if not 0 < factor <= 1:
            raise InvalidArgument(f"alpha must lie in (0, 1], found {alpha}")
        return -math.log(factor) + 0.0
    value = _number("strength", strength)
    if math.isnan(value) or value < 0 or (math.isinf(value) and not infinite):
        limit = "0 or above, inf allowed" if infinite else "finite and 0 or above"
        raise InvalidArgument(f"strength must be {limit}, in nats; found {strength}")
    return value


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value) + 0.0  # -0.0 would be equal and be written differently
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name}: expected a number, found {value!r}") from error


def _biased(
    memory: KVMemory, editor: Emphasize | Suppress, amount: float, inside: bool
) -> KVMemory:
    span = held_span(memory, editor)
    changed = {}
    for index in memory.layer_indices(editor.layers):
        layer = memory.layers[index]
        slots = span.mask(layer).cpu()
        chosen = head_mask(memory, index, editor.heads, editor.kv_heads)
        touched = chosen[:, None] & (slots if inside else ~slots)[None, :]
        bias = torch.zeros(touched.shape).masked_fill(touched, amount)
        if amount and bool(touched.any()):
            changed[index] = layer.add_bias(bias.to(layer.keys.device))
    return memory.with_layers(changed)
