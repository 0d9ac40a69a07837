"""ScaleKeys and ScaleValues: the controls that steering is told apart from.

A scaled key multiplies a logit, whose sign it keeps: positive ones grow, negative ones sink. A
scaled value changes what is read and not how much: it equals ``C_i * T(A) V`` of PASTA up to the
normaliser (steering form G).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.target import as_heads, as_number, as_spans, held_union
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.heads import HeadSet

__all__ = ["ScaleKeys", "ScaleValues"]


@dataclass(frozen=True)
class _Scaled(Editor):
    rewrites: ClassVar[bool] = True

    spans: tuple[SpanLike, ...]
    factor: float
    kv_heads: HeadSet | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "factor", as_number("factor", self.factor))
        object.__setattr__(self, "kv_heads", as_heads(self.kv_heads, "kv"))
        if self.kv_heads is not None and self.kv_heads.kind != "kv":
            raise InvalidArgument(
                "keys and values belong to KV heads, found query heads: HeadSet.to_kv(spec) gives "
                "those whose groups hold them"
            )

    def _factors(self, memory: KVMemory) -> dict[int, torch.Tensor]:
        """Returns factors ``[head, slot]`` of the layers in which one is not 1."""
        heads = self.kv_heads or HeadSet.all(memory.model).to_kv(memory.model)
        heads.check(memory.model)
        span = held_union(memory, self.spans, [layer for layer, _ in heads.heads])
        found = {}
        for index, numbers in heads.heads:
            layer = memory.layers.get(index)
            if layer is None or self.factor == 1:
                continue
            chosen = torch.zeros(layer.heads, dtype=torch.bool)
            chosen[list(numbers)] = True
            touched = chosen[:, None] & span.mask(layer).cpu()[None, :]
            if bool(touched.any()):
                found[index] = torch.where(touched, self.factor, 1.0)
        return found


@dataclass(frozen=True)
class ScaleKeys(_Scaled):
    """Multiplies keys of spans, and so the logits of all queries on them, by a factor.

    Args:
        spans: what to scale, one span or several; a token in several counts once.
        factor: finite; 1 changes nothing.
        kv_heads: KV heads by layer; None means all.

    Raises:
        InvalidArgument: if a parameter is out of range, or query heads are given.
    """

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with keys scaled."""
        memory = memories[0]
        changed = {}
        for index, factors in self._factors(memory).items():
            keys = memory.layers[index].keys
            changed[index] = replace(memory.layers[index], keys=keys * factors[:, :, None].to(keys))
        return memory.with_layers(changed)


@dataclass(frozen=True)
class ScaleValues(_Scaled):
    """Multiplies values of spans by a factor; attention weights stay.

    Args:
        spans: what to scale, one span or several; a token in several counts once.
        factor: finite; 1 changes nothing.
        kv_heads: KV heads by layer; None means all.

    Raises:
        InvalidArgument: if a parameter is out of range, or query heads are given.
    """

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with values scaled."""
        memory = memories[0]
        changed = {}
        for index, factors in self._factors(memory).items():
            values = memory.layers[index].values
            changed[index] = replace(
                memory.layers[index], values=values * factors[:, :, None].to(values)
            )
        return memory.with_layers(changed)
