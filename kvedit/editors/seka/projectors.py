"""Projectors: what SEKA learns, as an operand of kind "projectors".

Slots of a layer are first the columns of U+ that span P+, then the leading columns of U-, whose
complement is P-: both bases are small, where U- itself would be as large as a matrix per head.
Heads with fewer columns than others are filled up with zeros, which project nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum

from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.digest import canonical_json
from kvedit.memory.lineage import environment
from kvedit.memory.operand import make_operand, operand_facts

__all__ = [
    "PROJECTORS",
    "LayerProjectors",
    "dense_projectors",
    "operand_layers",
    "pack_bases",
    "project",
    "random_projectors",
    "read_projectors",
    "require_same_model",
]

PROJECTORS = "projectors"
"""The kind of operand."""


@dataclass(frozen=True, eq=False)
class LayerProjectors:
    """The projectors of one layer.

    Args:
        positive: ``[kv_head, rank, dim]``, rows that span P+.
        lead: ``[kv_head, rank, dim]``, rows that span what P- leaves out.
        passes: bool ``[kv_head]``, heads whose keys move enough with the question.
    """

    positive: torch.Tensor
    lead: torch.Tensor
    passes: torch.Tensor

    def split(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``P+ k`` and ``P- k`` of keys or features ``[kv_head, slot, dim]``."""
        positive, lead = (basis.to(keys) for basis in (self.positive, self.lead))
        return project(positive, keys), keys - project(lead, keys)


def project(basis: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns ``B^T B k`` for orthonormal (or zero) rows ``B`` ``[kv_head, rank, dim]``."""
    parts = einsum(basis, keys, "kv_head rank dim, kv_head slot dim -> kv_head slot rank")
    return einsum(parts, basis, "kv_head slot rank, kv_head rank dim -> kv_head slot dim")


def pack_bases(bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns rows ``[rank, dim]`` of several heads as ``[kv_head, largest rank, dim]``."""
    largest = max(basis.shape[0] for basis in bases)
    filled = [
        torch.nn.functional.pad(basis, (0, 0, 0, largest - basis.shape[0])) for basis in bases
    ]
    return torch.stack(filled)


def operand_layers(
    memory: KVMemory, operand: KVMemory, kind: str, layers: Sequence[int] | None
) -> tuple[list[int], dict[int, dict[str, Any]], dict[str, Any]]:
    """Returns the chosen layers, the operand's facts of each, and its other facts.

    Args:
        memory: the memory that is edited.
        operand: an operand of the same model.
        kind: its kind.
        layers: layers of the memory; None means all that the operand has.

    Raises:
        IncompatibleModel: if another model made the operand.
        UnknownName: if the operand lacks a layer.
    """
    require_same_model(memory, operand)
    facts = operand_facts(operand, kind)
    known = {int(entry["layer"]): entry for entry in facts["layers"]}
    chosen = memory.layer_indices(known if layers is None else layers)
    for index in chosen:
        if index not in known:
            raise UnknownName(f"layer of the {kind}", str(index), map(str, known))
    return chosen, known, facts


def require_same_model(memory: KVMemory, operand: KVMemory) -> None:
    """Raises IncompatibleModel, with both values, unless one model made both."""
    differs = memory.model.fingerprint.differences(operand.model.fingerprint)
    if differs:
        pairs = (f"{name} {a[:18]} and {b[:18]}" for name, (a, b) in differs.items())
        raise IncompatibleModel(
            f"the memory is of {memory.model.name}, the operand of {operand.model.name}: their "
            f"fingerprints differ in {'; '.join(pairs)}. Learn the operand with the memory's model"
        )


def read_projectors(
    operand: KVMemory, entry: dict[str, Any], min_difference: float
) -> LayerProjectors:
    """Returns the projectors of the layer that ``entry`` of the facts is about."""
    vectors = operand.layers[int(entry["layer"])].keys
    first = max(entry["positive"])
    difference = torch.tensor(entry["difference"], dtype=torch.float64)
    return LayerProjectors(vectors[:, :first], vectors[:, first:], difference >= min_difference)


def dense_projectors(operand: KVMemory, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns P+ and P- as matrices ``[kv_head, dim, dim]``, whether a head passes or not.

    With a feature map they act on mapped keys.

    Raises:
        InvalidArgument: if it is no operand of kind "projectors".
        UnknownName: if the operand lacks the layer.
    """
    facts = operand_facts(operand, PROJECTORS)
    known = {int(entry["layer"]): entry for entry in facts["layers"]}
    if layer not in known:
        raise UnknownName(f"layer of the {PROJECTORS}", str(layer), map(str, known))
    found = read_projectors(operand, known[layer], facts["min_difference"])
    heads, _, dim = found.positive.shape
    return found.split(torch.eye(dim).expand(heads, dim, dim))


def random_projectors(projectors: KVMemory, seed: int) -> KVMemory:
    """Returns the control: random subspaces with the ranks and the heads of ``projectors``.

    What it leaves of an effect is due to the choice of heads and to keys that grow, not to what
    was learned.

    Args:
        projectors: an operand of kind "projectors".
        seed: of the directions.

    Raises:
        InvalidArgument: if it is another kind of memory.
    """
    facts = operand_facts(projectors, PROJECTORS)
    draw = torch.Generator().manual_seed(seed)
    vectors = {}
    for entry in facts["layers"]:
        old = projectors.layers[int(entry["layer"])].keys
        parts = [
            pack_bases([_random_basis(rank, old.shape[-1], draw) for rank in entry[name]])
            for name in ("positive", "negative_lead")
        ]
        vectors[int(entry["layer"])] = torch.cat(parts, dim=1).to(old.dtype)
    head = projectors.lineage.head
    node = LineageNode(
        operation="edit",
        name="random_projectors",
        version=1,
        parameters=canonical_json({"seed": seed}).decode(),
        inputs=(head.id if head else projectors.digest,),
        seed=seed,
        environment=environment(torch.float64),
    )
    kept = {name: facts[name] for name in facts if name not in ("rule", "version", "kind")}
    return make_operand(
        PROJECTORS, vectors, projectors.model, Lineage.join([projectors.lineage], node),
        **{**kept, "origin": "random"},
    )  # fmt: skip


def _random_basis(rank: int, dim: int, draw: torch.Generator) -> torch.Tensor:
    if rank > dim:
        raise InvalidArgument(f"rank: expected at most {dim}, found {rank}")
    noise = torch.randn(dim, rank, generator=draw, dtype=torch.float64)
    basis: torch.Tensor = torch.linalg.qr(noise).Q.T
    return basis
