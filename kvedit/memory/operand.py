"""Operands: memories that hold vectors for editors, such as query samples or projectors.

A slot need not be a token: an operand's slots are vectors in the key space of each layer's heads.
So operands are stored, digested, versioned and sent like any memory, and an editor that takes one
gets it as a further input, by which the lineage names it. They carry a rule that says what they
are, so that attach refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory.layer import LayerKV
from kvedit.memory.lineage import Lineage
from kvedit.memory.memory import KVMemory
from kvedit.memory.spec import ModelSpec

__all__ = ["OPERAND", "make_operand", "operand_facts", "operand_kind"]

OPERAND = "operand"
"""Name of the rule that marks an operand."""


def make_operand(
    kind: str,
    vectors: Mapping[int, torch.Tensor],
    model: ModelSpec,
    lineage: Lineage,
    slot_values: Mapping[int, torch.Tensor] | None = None,
    **facts: Any,
) -> KVMemory:
    """Returns an operand.

    Args:
        kind: what it is, for example ``"queries"``; editors ask for it by this name.
        vectors: layer to ``[head, slot, dim]``: KV heads, as many vectors as the kind needs, the
            keys' head size.
        model: facts of the model.
        lineage: how it was made.
        slot_values: layer to ``[head, slot, dim]``, of the values' head size. Where there is none,
            values are zero: equal blocks cost a store nothing.
        **facts: plain data that readers of the kind need.
    """
    rule = {"rule": OPERAND, "version": 1, "kind": kind, **facts}
    layers = {}
    for index, keys in vectors.items():
        heads, slots, _ = keys.shape
        values = (slot_values or {}).get(index)
        if values is None:
            values = torch.zeros(heads, slots, model.layers[index].value_dim, dtype=keys.dtype)
        layers[index] = LayerKV(
            keys=keys.contiguous(),
            values=values.contiguous(),
            positions=torch.zeros(slots, dtype=torch.int64),
            source=torch.full((slots,), -1, dtype=torch.int64),
        )
    return KVMemory(layers, model, 1, None, lineage, (rule,))


def operand_kind(memory: KVMemory) -> str | None:
    """Returns the kind of an operand, or None for a memory of a context."""
    facts = [rule for rule in memory.rules if isinstance(rule, Mapping)]
    return next((str(rule["kind"]) for rule in facts if rule.get("rule") == OPERAND), None)


def operand_facts(memory: KVMemory, kind: str) -> dict[str, Any]:
    """Returns the facts of an operand.

    Raises:
        InvalidArgument: if it is no operand of that kind.
    """
    for rule in memory.rules:
        if isinstance(rule, Mapping) and rule.get("rule") == OPERAND and rule.get("kind") == kind:
            return dict(rule)
    found = operand_kind(memory)
    raise InvalidArgument(
        f"expected an operand of kind {kind!r}, found "
        + (f"one of kind {found!r}" if found else "the memory of a context")
    )
