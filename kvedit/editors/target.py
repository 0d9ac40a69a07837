"""What an edit touches: span, layers, heads. Query heads and KV heads are never mixed silently."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any, Protocol

import torch

from kvedit.editors.base import SpanLike
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.memory import KVMemory, Span, SpanQuery
from kvedit.memory.heads import HeadSet, Kind

__all__ = [
    "Targeted",
    "as_heads",
    "as_indices",
    "as_number",
    "as_spans",
    "freeze_target",
    "head_mask",
    "held_span",
    "held_union",
]


class Targeted(Protocol):
    """An editor that touches a span in chosen layers and heads."""

    @property
    def span(self) -> SpanLike:
        """What to touch."""
        ...

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers, or None for all."""
        ...

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Query heads, or None."""
        ...

    @property
    def kv_heads(self) -> tuple[int, ...] | None:
        """KV heads, or None."""
        ...


def freeze_target(editor: Targeted) -> None:
    """Makes an editor's target hashable, and equal for every way to write the same one.

    Raises:
        InvalidArgument: if a part is of the wrong kind, or both kinds of heads are given.
    """
    object.__setattr__(editor, "span", SpanQuery.of(editor.span))
    for name in ("layers", "heads", "kv_heads"):
        object.__setattr__(editor, name, as_indices(name, getattr(editor, name)))
    if editor.heads is not None and editor.kv_heads is not None:
        raise InvalidArgument("give heads (query heads) or kv_heads, not both")


def held_span(memory: KVMemory, editor: Targeted) -> Span:
    """Returns the editor's span in ``memory``.

    Raises:
        SpanNotFound: if it is not there, or no chosen layer holds a slot of it any more: the edit
            would do nothing.
    """
    span = memory.resolve(editor.span)
    chosen = memory.layer_indices(editor.layers)
    if not any(bool(span.mask(memory.layers[index]).any()) for index in chosen):
        raise SpanNotFound(_gone(chosen, span))
    return span


def _gone(chosen: list[int], span: Span) -> str:
    return (
        f"none of the layers {chosen} holds a slot of the span {span.text!r} any more (it was "
        "dropped, or lies before a window): the edit would do nothing"
    )


def as_spans(value: Any) -> tuple[SpanLike, ...]:
    """Returns one span, or a list of them, as a tuple of spans.

    Raises:
        InvalidArgument: if one of them is no span, or there is none.
    """
    several = value if isinstance(value, list | tuple) else (value,)
    if not several:
        raise InvalidArgument("spans: expected at least one span, found none")
    return tuple(map(SpanQuery.of, several))


def held_union(memory: KVMemory, spans: Iterable[SpanLike], layers: Iterable[int]) -> Span:
    """Returns the union of spans: a token that lies in several of them counts once.

    Args:
        memory: the memory.
        spans: what to find.
        layers: layers of which one at least must hold a slot of each span.

    Raises:
        SpanNotFound: if a span is not there, or no layer holds a slot of it any more.
        InvalidArgument: if some count tokens and others slots.
    """
    chosen = [index for index in layers if index in memory.layers]
    found = [memory.resolve(span) for span in spans]
    for span in found:
        if not any(bool(span.mask(memory.layers[index]).any()) for index in chosen):
            raise SpanNotFound(_gone(chosen, span))
    return reduce(or_, found)


def as_heads(value: Any, kind: Kind = "query") -> HeadSet | None:
    """Returns a head set, or None (all heads) for None; see :meth:`HeadSet.of`."""
    return None if value is None else HeadSet.of(value, kind)


def as_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a finite number between ``low`` and ``high``, both allowed.

    Raises:
        InvalidArgument: if it is something else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        limits = f" from {low:g} to {high:g}" if low > -math.inf or high < math.inf else ""
        raise InvalidArgument(f"{name}: expected a finite number{limits}, found {value!r}")
    return float(value) + 0.0  # -0.0 would be equal and be written differently


def as_indices(name: str, values: Iterable[int] | None) -> tuple[int, ...] | None:
    """Returns ``values`` as a tuple of ints, or None for None.

    Raises:
        InvalidArgument: if it is empty or holds something else.
    """
    if values is None:
        return None
    found = tuple(values) if isinstance(values, Iterable) else ()
    if not found or not all(type(value) is int for value in found):
        raise InvalidArgument(
            f"{name}: expected a list of numbers, or None for all, found {values!r}"
        )
    return found


def head_mask(
    memory: KVMemory,
    layer: int,
    heads: tuple[int, ...] | None,
    kv_heads: tuple[int, ...] | None,
) -> torch.Tensor:
    """Returns the query heads of a layer that are chosen, as a bool mask ``[query_head]``.

    Args:
        memory: the memory.
        layer: layer index.
        heads: query heads, or None.
        kv_heads: KV heads, each standing for its whole group of query heads, or None.

    Raises:
        InvalidArgument: if both are given, or a head does not exist.
    """
    spec = memory.model.layers[layer]
    if heads is not None and kv_heads is not None:
        raise InvalidArgument("give heads (query heads) or kv_heads, not both")
    chosen = torch.zeros(spec.query_heads, dtype=torch.bool)
    if kv_heads is not None:
        for head in kv_heads:
            first = _within("KV head", head, spec.kv_heads, layer) * spec.group
            chosen[first : first + spec.group] = True
    elif heads is not None:
        for head in heads:
            chosen[_within("query head", head, spec.query_heads, layer)] = True
    else:
        chosen[:] = True
    return chosen


def _within(kind: str, head: int, total: int, layer: int) -> int:
    found = head + total if head < 0 else head
    if not 0 <= found < total:
        raise InvalidArgument(f"layer {layer} has {total} {kind}s, found {kind} {head}")
    return found
