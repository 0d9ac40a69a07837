"""HeadSet: attention heads, layer by layer; query heads and KV heads are never mixed silently."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory.spec import ModelSpec

__all__ = ["HeadSet"]

Kind = Literal["query", "kv"]


@dataclass(frozen=True)
class HeadSet:
    """Heads of chosen layers, as plain data: it can be a parameter of an editor.

    Args:
        heads: ``(layer, (head, …))`` pairs; kept in order, each head once. Numbers count from 0.
        kind: whether they are query heads, as papers that steer single heads mean, or KV heads,
            each of which stands for its whole group of query heads.

    Raises:
        InvalidArgument: if a number is negative or no number, or there is no head.
    """

    heads: tuple[tuple[int, tuple[int, ...]], ...]
    kind: Kind = "query"

    def __post_init__(self) -> None:
        """Brings the pairs into one form."""
        if self.kind not in ("query", "kv"):
            raise InvalidArgument(f"kind must be 'query' or 'kv', found {self.kind!r}")
        found: dict[int, set[int]] = {}
        for layer, heads in self.heads:
            for number in (layer, *heads):
                if type(number) is not int or number < 0:
                    raise InvalidArgument(f"layers and heads count from 0, found {number!r}")
            found.setdefault(layer, set()).update(heads)
        pairs = tuple((layer, tuple(sorted(found[layer]))) for layer in sorted(found))
        object.__setattr__(self, "heads", tuple(pair for pair in pairs if pair[1]))
        if not self.heads:
            raise InvalidArgument("a head set needs at least one head")

    @classmethod
    def of(cls, value: Any, kind: Kind = "query") -> HeadSet:
        """Returns ``value`` as a head set.

        Args:
            value: a head set; a mapping of layer to heads, as pastalib writes it (keys may be
                strings); a mapping ``{heads: …, kind: …}``; or a list of ``(layer, head)``.
            kind: what plain numbers mean.

        Raises:
            InvalidArgument: if it is something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and "heads" in value:
            return cls.of(value["heads"], value.get("kind", kind))
        try:
            if isinstance(value, Mapping):
                pairs = [(int(layer), tuple(heads)) for layer, heads in value.items()]
            else:
                pairs = [(a, (b,) if isinstance(b, int) else tuple(b)) for a, b in value]
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                f"expected heads as {{layer: [head, …]}} or [[layer, head], …], found {value!r}"
            ) from error
        return cls(tuple(pairs), kind)

    @classmethod
    def all(cls, spec: ModelSpec, layers: Iterable[int] | None = None) -> HeadSet:
        """Returns every query head of the given layers, or of all."""
        chosen = range(len(spec.layers)) if layers is None else layers
        return cls(tuple((i, tuple(range(spec.layers[i].query_heads))) for i in chosen))

    @classmethod
    def random(cls, spec: ModelSpec, count: int, seed: int, kind: Kind = "query") -> HeadSet:
        """Returns ``count`` heads drawn without replacement, the control of every head choice."""
        sizes = [(s.query_heads if kind == "query" else s.kv_heads) for s in spec.layers]
        every = [(layer, head) for layer, size in enumerate(sizes) for head in range(size)]
        if not 1 <= count <= len(every):
            raise InvalidArgument(f"the model has {len(every)} {kind} heads, asked for {count}")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        return cls.of([every[i] for i in order[:count].tolist()], kind)

    def __len__(self) -> int:
        """Number of heads."""
        return sum(len(heads) for _, heads in self.heads)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All heads as ``(layer, head)``."""
        return tuple((layer, head) for layer, heads in self.heads for head in heads)

    def to_query(self, spec: ModelSpec) -> HeadSet:
        """Returns the query heads; a KV head becomes its whole group."""
        self.check(spec)
        if self.kind == "query":
            return self
        wide = [
            (layer, head * spec.layers[layer].group + i)
            for layer, head in self.pairs
            for i in range(spec.layers[layer].group)
        ]
        return HeadSet.of(wide)

    def to_kv(self, spec: ModelSpec) -> HeadSet:
        """Returns the KV heads whose group holds one of the heads, if only in part."""
        self.check(spec)
        if self.kind == "kv":
            return self
        return HeadSet.of([(i, head // spec.layers[i].group) for i, head in self.pairs], "kv")

    def mask(self, spec: ModelSpec, layer: int) -> torch.Tensor:
        """Returns which query heads of a layer are in the set, bool ``[query_head]``."""
        chosen = torch.zeros(spec.layers[layer].query_heads, dtype=torch.bool)
        for index, heads in self.to_query(spec).heads:
            if index == layer:
                chosen[list(heads)] = True
        return chosen

    def check(self, spec: ModelSpec) -> None:
        """Raises InvalidArgument if the model lacks one of the heads."""
        for layer, heads in self.heads:
            if layer >= len(spec.layers):
                raise InvalidArgument(f"the model has {len(spec.layers)} layers, found {layer}")
            facts = spec.layers[layer]
            total = facts.query_heads if self.kind == "query" else facts.kv_heads
            if heads[-1] >= total:
                raise InvalidArgument(
                    f"layer {layer} has {total} {self.kind} heads, found head {heads[-1]}"
                )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data that :meth:`of` reads."""
        return {
            "heads": {str(layer): list(heads) for layer, heads in self.heads},
            "kind": self.kind,
        }

    @classmethod
    def read_pasta(cls, path: str | Path) -> HeadSet:
        """Returns the query heads of a pastalib head file, JSON ``{"layer": [head, …]}``.

        Raises:
            InvalidArgument: if the file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"head file {path}: {error}") from error
        if not isinstance(data, dict):
            raise InvalidArgument(f"head file {path}: expected {{layer: [head, …]}}")
        return cls.of(data)

    def write_pasta(self, path: str | Path) -> None:
        """Writes pastalib's head file; query heads only.

        Raises:
            InvalidArgument: for KV heads: call :meth:`to_query` first.
        """
        if self.kind != "query":
            raise InvalidArgument("pastalib's files hold query heads: call to_query(spec) first")
        data = {str(layer): list(heads) for layer, heads in self.heads}
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")
