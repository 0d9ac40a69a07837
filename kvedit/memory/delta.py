"""Delta: a steering delta, vectors by site and layer that are added to what a model remembers.

Keys are kept before RoPE. A key after it is turned by its position, so keys of prompts of different
length can't be averaged: most of such a mean is the rotation's own noise. Before RoPE a vector has
no position, and turning it to a slot's position is exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument, UnknownName
from kvedit.memory.delta_checks import (
    SITES,
    Vectors,
    finite_number,
    frozen_vectors,
    head_masks,
    layer_indices,
    part_of,
    plain_facts,
)
from kvedit.memory.delta_file import read_delta, write_delta
from kvedit.memory.heads import HeadSet
from kvedit.memory.lineage import Lineage, LineageNode
from kvedit.memory.memory import KVMemory
from kvedit.memory.operand_delta import DELTA, pack_delta, unpack_delta
from kvedit.memory.spec import ModelSpec

__all__ = ["DELTA", "SITES", "Delta", "Vectors"]


@dataclass(frozen=True, eq=False)
class Delta:
    """Vectors by site and layer, of one model. Arithmetic returns new deltas.

    Args:
        vectors: site to layer to float32 tensor; see :data:`SITES` for the axes.
        model: facts of the model.
        facts: plain data on how it was found: estimator, token read, number of pairs, digest of
            the contrast set. They are part of its identity.
        lineage: the steps that made it.

    Raises:
        UnknownName: if a site or layer does not exist.
        ShapeMismatch: if a vector does not fit the model.
        InvalidArgument: if there is no vector, one is not finite, or facts are no plain data.
    """

    vectors: Vectors
    model: ModelSpec
    facts: Mapping[str, Any] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)

    def __post_init__(self) -> None:
        """Checks shapes, and makes everything read-only, float32 and sorted."""
        object.__setattr__(self, "vectors", frozen_vectors(self.vectors, self.model))
        object.__setattr__(self, "facts", MappingProxyType(plain_facts(self.facts)))

    @property
    def hidden(self) -> int:
        """Size of the residual stream, or 0 without vectors in it."""
        for site in ("residual", "attention"):
            for vector in self.vectors.get(site, {}).values():
                return vector.shape[-1]
        return 0

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that it has vectors of."""
        return tuple(self.vectors)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it has vectors in."""
        return tuple(sorted({layer for layers in self.vectors.values() for layer in layers}))

    @cached_property
    def digest(self) -> str:
        """BLAKE3 (hex) of vectors, model and facts: its identity by content."""
        return self.operand().digest

    def norms(self) -> dict[str, dict[int, float]]:
        """Returns site to layer to Euclidean norm, over all heads."""
        return {
            s: {i: float(v.norm()) for i, v in each.items()} for s, each in self.vectors.items()
        }

    def __add__(self, other: Delta) -> Delta:
        """Returns the sum; a vector that one of them lacks counts as zero there."""
        if not isinstance(other, Delta):
            return NotImplemented
        self.require_same_model(other)
        total: dict[str, dict[int, torch.Tensor]] = {s: dict(v) for s, v in self.vectors.items()}
        for site, layers in other.vectors.items():
            mine = total.setdefault(site, {})
            for layer, vector in layers.items():
                mine[layer] = mine[layer] + vector if layer in mine else vector
        return self._made(total, "add", (other,))

    def __sub__(self, other: Delta) -> Delta:
        """Returns the difference; a vector that one of them lacks counts as zero there."""
        return self + -1.0 * other if isinstance(other, Delta) else NotImplemented

    def __mul__(self, factor: float) -> Delta:
        """Returns all vectors times a finite number."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        times = finite_number("factor", factor)
        return self.map(lambda site, layer, vector: vector * times, "scale", factor=times)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Delta:
        """Returns all vectors divided by a number other than 0."""
        if isinstance(divisor, bool) or not isinstance(divisor, int | float):
            return NotImplemented
        return self * (1.0 / divisor if divisor else float("inf"))

    def __neg__(self) -> Delta:
        """Returns the opposite direction."""
        return self * -1.0

    def normalized(self, norm: float = 1.0) -> Delta:
        """Returns every layer's vector of every site with this Euclidean norm; zeros stay.

        Raises:
            InvalidArgument: if it is no number above 0.
        """
        if finite_number("norm", norm) <= 0:
            raise InvalidArgument(f"norm: expected a number above 0, found {norm!r}")

        def scaled(site: str, layer: int, vector: torch.Tensor) -> torch.Tensor:
            size = float(vector.norm())
            return vector if size == 0 else vector * (norm / size)

        return self.map(scaled, "normalize", norm=float(norm))

    def project_out(self, other: Delta) -> Delta:
        """Returns the part orthogonal to another delta, per site and layer (heads together)."""
        self.require_same_model(other)

        def rest(site: str, layer: int, vector: torch.Tensor) -> torch.Tensor:
            away = other.vectors.get(site, {}).get(layer)
            if away is None or float(away.norm()) == 0:
                return vector
            unit = away / away.norm()
            left: torch.Tensor = vector - (vector * unit).sum() * unit
            return left

        return self.map(rest, "project_out", others=(other,))

    def at_norms_of(self, other: Delta) -> Delta:
        """Returns this direction, each vector as long as the other's there; the other's sites."""
        self.require_same_model(other)
        part = self.only(sites=other.sites, layers=other.layers)

        def scaled(site: str, layer: int, vector: torch.Tensor) -> torch.Tensor:
            wanted = other.vectors[site].get(layer)
            size = vector.norm()
            if wanted is None or float(size) == 0:
                return torch.zeros_like(vector)
            scaled_to: torch.Tensor = vector * (wanted.norm() / size)
            return scaled_to

        return part.map(scaled, "at_norms_of", others=(other,))

    def only(
        self,
        *,
        sites: str | Iterable[str] | None = None,
        layers: Iterable[int] | None = None,
        heads: HeadSet | None = None,
    ) -> Delta:
        """Returns a part of it.

        Args:
            sites: sites to keep; None keeps all.
            layers: layers to keep, negative ones from the end; None keeps all.
            heads: KV heads whose keys and values are kept, others become zero; layers that the set
                does not name lose both. The residual stream has no heads and stays.

        Raises:
            UnknownName: if there is no such site or layer.
            InvalidArgument: if nothing is left, or query heads are given.
        """
        named = (
            (sites,) if isinstance(sites, str) else tuple(self.sites if sites is None else sites)
        )
        for site in named:
            if site not in SITES:
                raise UnknownName("site of a delta", site, SITES)
        kept = self.layers if layers is None else layer_indices(layers, len(self.model.layers))
        masks = None if heads is None else head_masks(heads, self.model)
        found = part_of(self.vectors, named, kept, masks)
        parameters: dict[str, Any] = {"sites": list(named), "layers": list(kept)}
        if heads is not None:
            parameters["heads"] = heads.to_json()
        return self._made(found, "only", (), **parameters)

    def map(
        self,
        change: Callable[[str, int, torch.Tensor], torch.Tensor],
        name: str,
        others: tuple[Delta, ...] = (),
        **parameters: Any,
    ) -> Delta:
        """Returns every vector changed by ``change(site, layer, vector)``, named in the lineage."""
        changed = {
            site: {layer: change(site, layer, vector) for layer, vector in layers.items()}
            for site, layers in self.vectors.items()
        }
        return self._made(changed, name, others, **parameters)

    def _made(
        self,
        vectors: Mapping[str, Mapping[int, torch.Tensor]],
        name: str,
        others: tuple[Delta, ...],
        **parameters: Any,
    ) -> Delta:
        deltas = (self, *others)
        inputs = tuple(d.lineage.head.id if d.lineage.head else d.digest for d in deltas)
        node = LineageNode.make("delta", name, parameters, inputs)
        lineage = Lineage.join([delta.lineage for delta in deltas], node)
        return replace(self, vectors=vectors, lineage=lineage)

    def require_same_model(self, other: Delta | ModelSpec) -> None:
        """Raises IncompatibleModel, with both fingerprints, if another model made the other."""
        theirs = other.model if isinstance(other, Delta) else other
        different = self.model.fingerprint.differences(theirs.fingerprint)
        if different:
            shown = "; ".join(f"{k}: {a[:12]} and {b[:12]}" for k, (a, b) in different.items())
            raise IncompatibleModel(
                f"this delta was made by {self.model.name}, the other side is {theirs.name}, and "
                f"their fingerprints differ ({shown}): extract it from that model"
            )

    def operand(self) -> KVMemory:
        """Returns it as an operand: what a store keeps, and what editors take."""
        return pack_delta(self.vectors, self.model, dict(self.facts), self.lineage)

    @classmethod
    def of(cls, operand: KVMemory | Delta) -> Delta:
        """Returns an operand that a store gave as a delta.

        Raises:
            InvalidArgument: if it is no operand of kind "delta".
        """
        if isinstance(operand, Delta):
            return operand
        vectors, facts = unpack_delta(operand)
        return cls(vectors, operand.model, facts, operand.lineage)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Returns the path of the safetensors file that it wrote, whole or not at all.

        Tensors are named ``keys.3`` and so on (site and layer); model, facts, lineage and digest
        are JSON in the header. A file that is there is replaced.
        """
        return write_delta(path, self.vectors, self.model, self.facts, self.lineage, self.digest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Returns the delta that :meth:`save` wrote.

        Raises:
            InvalidArgument: if there is no such file, or it holds something else.
            CorruptMemory: if it is damaged, or does not have the digest that it names.
        """
        vectors, model, facts, lineage, digest = read_delta(path)
        try:
            found = cls(vectors, model, facts, lineage)
        except (UnknownName, ValueError) as error:
            raise CorruptMemory(f"{path} is damaged: {error}") from error
        if found.digest != digest:
            raise CorruptMemory(
                f"{path} was changed: it names the digest {digest[:12]}, its content has "
                f"{found.digest[:12]}"
            )
        return found

    def __repr__(self) -> str:
        """Sites, layers and norms in a line."""
        parts = []
        for site, layers in self.vectors.items():
            norms = [float(vector.norm()) for vector in layers.values()]
            parts.append(f"{site} of {len(layers)} layers, norms {min(norms):.3g}-{max(norms):.3g}")
        return f"Delta({'; '.join(parts)}; {self.model.name})"
