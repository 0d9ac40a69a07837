"""KVMemory: one context's keys and values, with positions, bias and lineage. Immutable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from kvedit.axes import expect_axes
from kvedit.errors import InvalidArgument, SpanNotFound, UnknownName
from kvedit.memory.blocks import Block, blocks, content_document
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.layer import LayerKV
from kvedit.memory.lineage import Lineage
from kvedit.memory.source import Source
from kvedit.memory.span import Span, SpanQuery
from kvedit.memory.spec import ModelSpec

__all__ = ["KVMemory", "Servable"]


@dataclass(frozen=True)
class Servable:
    """Whether an engine without bias and rules can serve a memory, and what would make it so.

    Args:
        ok: whether it can.
        reasons: what stands in the way, each with the way out.
    """

    ok: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Same as ``ok``."""
        return self.ok


@dataclass(frozen=True, eq=False)
class KVMemory:
    """One context as a model remembers it. An edit returns a new memory that shares tensors.

    It is no batch, and it does not grow: a session copies it into a cache that does. A write into
    its tensors is found at the next edit, digest, put or attach, unless it went through
    ``tensor.data`` or a numpy array on the same bytes.

    Args:
        layers: layer index to that layer's slots. A memory with only some layers can be looked
            at and compared, and not attached.
        model: facts of the model that made it.
        next_position: RoPE position of the first token that follows; above all positions.
        source: the tokens, or None for a memory that no tokens made.
        lineage: the steps that made it.
        rules: run-time rules, as plain data; attach refuses a rule that it does not know.
        verified: False if it was read from a store without checking its bytes.

    Raises:
        InvalidArgument: if layers, positions or sources disagree with each other or the model.
    """

    layers: Mapping[int, LayerKV]
    model: ModelSpec
    next_position: int
    source: Source | None = None
    lineage: Lineage = field(default_factory=Lineage)
    rules: tuple[Any, ...] = ()
    verified: bool = True

    def __post_init__(self) -> None:
        """Checks that the parts fit together."""
        ordered = {index: self.layers[index] for index in sorted(self.layers)}
        object.__setattr__(self, "layers", MappingProxyType(ordered))
        if not ordered:
            raise InvalidArgument("a memory needs at least one layer")
        ranges: dict[int, tuple[int, int]] = {}
        for index, layer in ordered.items():
            self._check_layer(index, layer, ranges)

    def _check_layer(self, index: int, layer: LayerKV, ranges: dict[int, tuple[int, int]]) -> None:
        if not 0 <= index < len(self.model.layers):
            raise UnknownName("layer", str(index), map(str, range(len(self.model.layers))))
        spec = self.model.layers[index]
        where = f"layer {index}"
        expect_axes(
            f"{where} keys", layer.keys, "head slot dim", head=spec.kv_heads, dim=spec.key_dim
        )
        expect_axes(f"{where} values", layer.values, "head slot dim", dim=spec.value_dim)
        if layer.bias is not None:
            heads = spec.query_heads
            expect_axes(f"{where} bias", layer.bias, "query_head slot", query_head=heads)
        if layer.slots == 0:
            return
        first, last = _range(layer.positions, ranges)
        if last >= self.next_position or first < 0:
            raise InvalidArgument(
                f"{where}: positions {first} to {last} must lie in 0 to next_position - 1 = "
                f"{self.next_position - 1}"
            )
        lowest, highest = _range(layer.source, ranges)
        if lowest < -1 or highest >= self.tokens_count:
            raise InvalidArgument(
                f"{where}: source names tokens {lowest} to {highest}; expected 0 to "
                f"{self.tokens_count - 1}, or -1 for a slot that no token made"
            )

    @property
    def tokens(self) -> torch.Tensor | None:
        """Source token ids ``[n]``, or None."""
        return None if self.source is None else self.source.tokens

    @property
    def tokens_count(self) -> int:
        """Number of source tokens."""
        return 0 if self.source is None else len(self.source)

    @property
    def slots(self) -> int:
        """Slots of the longest layer."""
        return max(layer.slots for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of all layers."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys."""
        return next(iter(self.layers.values())).keys.dtype

    @property
    def device(self) -> torch.device:
        """Device of the first layer."""
        return next(iter(self.layers.values())).keys.device

    @property
    def complete(self) -> bool:
        """Whether every layer of the model is there."""
        return len(self.layers) == len(self.model.layers)

    def find(self, text: str | None = None, **query: Any) -> Span:
        """Returns the span of a text, regex, role, sentence, token range or slot range.

        Args:
            text: literal text to find.
            **query: see :class:`~kvedit.memory.span.SpanQuery`.

        Raises:
            SpanNotFound: if nothing matches.
            AmbiguousSpan: if several places match and no ``occurrence`` is given.
        """
        return SpanQuery(text=text, **query).resolve(self)

    def resolve(self, span: str | Mapping[str, Any] | Span | SpanQuery) -> Span:
        """Returns ``span`` as a :class:`Span` of this memory, whatever way it is given.

        Raises:
            SpanNotFound: if nothing matches, or a ready span reaches past the memory's end.
            AmbiguousSpan: if several places match and no ``occurrence`` is given.
            InvalidArgument: if it is no span.
        """
        query = SpanQuery.of(span)
        if isinstance(query, SpanQuery):
            return query.resolve(self)
        size = self.tokens_count if query.unit == "token" else self.slots
        if query.ranges[-1][1] > size:
            raise SpanNotFound(
                f"the span reaches {query.unit} {query.ranges[-1][1] - 1}; this memory has {size} "
                f"{query.unit}s"
            )
        return query

    def layer_indices(self, layers: Iterable[int] | None) -> list[int]:
        """Returns ``layers`` with negative numbers counted from the end; None means all.

        Raises:
            UnknownName: if the memory lacks one of them.
        """
        if layers is None:
            return list(self.layers)
        total = len(self.model.layers)
        wanted = {index: index + total if index < 0 else index for index in layers}
        for index, found in wanted.items():
            if found not in self.layers:
                raise UnknownName("layer", str(index), map(str, self.layers))
        return list(wanted.values())

    def with_layers(self, changed: Mapping[int, LayerKV], **fields: Any) -> KVMemory:
        """Returns the memory with some layers (and other fields) replaced, the rest shared."""
        return dataclasses.replace(self, layers={**self.layers, **changed}, **fields)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KVMemory:
        """Returns the memory on another device or in another dtype.

        Another device keeps the content digest, another dtype changes it.
        """
        self.check_unmodified()  # new layers note the counters anew
        layers = {index: layer.to(device, dtype) for index, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers)

    def check_unmodified(self) -> None:
        """Raises MutatedMemory if a tensor was written in place since it was made."""
        for layer in self.layers.values():
            layer.check_unmodified()
        if self.source is not None:
            self.source.check_unmodified()

    def cut(self) -> list[Block]:
        """Returns all blocks with their digests; the store writes these."""
        self.check_unmodified()
        return blocks(self)

    @cached_property
    def _content(self) -> str:
        return digest_bytes(canonical_json(content_document(self, self.cut())))

    @property
    def digest(self) -> str:
        """Content digest (BLAKE3, hex): tensors, positions, bias, rules, tokens and model.

        Raises:
            MutatedMemory: if a tensor was written in place.
        """
        self.check_unmodified()
        return self._content

    def servable(self) -> Servable:
        """Returns whether an engine without bias and rules can serve this memory."""
        reasons = []
        if not self.complete:
            reasons.append("some layers are missing: capture all layers")
        if any(layer.bias is not None for layer in self.layers.values()):
            reasons.append("it has attention bias: an engine needs it compiled into the keys")
        if self.rules:
            reasons.append("it has run-time rules: resolve them into static bias first")
        if len({layer.slots for layer in self.layers.values()}) > 1:
            reasons.append("layers differ in slots: drop the same slots in every layer")
        return Servable(not reasons, tuple(reasons))

    def __repr__(self) -> str:
        """A few lines: size, model, bias, lineage."""
        from kvedit.memory.show import describe

        return describe(self)

    def _repr_html_(self) -> str:
        from kvedit.memory.show import describe_html

        return describe_html(self)


def _range(tensor: torch.Tensor, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Returns the smallest and largest element; layers often share one tensor."""
    if id(tensor) not in known:
        low, high = torch.aminmax(tensor)
        known[id(tensor)] = (int(low), int(high))
    return known[id(tensor)]
