"""Served: a memory as an engine has it that knows neither bias, rules nor positions.

The engine counts slots: the memory's are 0 to p - 1, and the first query stands at p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.interop.prefix import prefix_of
from kvedit.interop.refusals import check_plain
from kvedit.memory import KVMemory, ModelSpec
from kvedit.memory.operand import operand_kind
from kvedit.serving.multiplicity import multiplied

__all__ = ["Served", "check_layers", "servable_form", "served"]


@dataclass(frozen=True, eq=False)
class Served:
    """Plain keys and values of every layer, for an engine that counts slots.

    Args:
        keys: per layer ``[head, slot, dim]``, head counts KV heads; turned so that the first query
            stands at ``slots``.
        values: per layer ``[head, slot, dim]``.
        digest: content digest of the memory that they came from.
        moved: positions by which the keys were turned.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    digest: str
    moved: int = 0

    @property
    def slots(self) -> int:
        """Slots per layer."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def served(
    memory: KVMemory, dtype: torch.dtype | str | None = None, digest: str | None = None
) -> Served:
    """Returns a memory's keys and values as an engine takes them.

    Args:
        memory: the memory.
        dtype: of the result; None keeps the memory's.
        digest: its content digest, where it is known already.

    Raises:
        InvalidArgument: if plain keys and values can't do what the memory does; the message says
            why and what would help.
        UnsupportedModel: if an engine that counts slots can't follow the model's layers.
        MutatedMemory: if its tensors were changed in place.
    """
    memory.check_unmodified()
    prefix = prefix_of(servable_form(memory), dtype)
    return Served(prefix.keys, prefix.values, digest or memory.digest, prefix.moved)


def servable_form(memory: KVMemory) -> KVMemory:
    """Returns the memory without bias, after every check that :func:`served` makes.

    No key is read, so the memory may be an outline of one.

    Raises:
        InvalidArgument: as :func:`served`.
        UnsupportedModel: as :func:`served`.
    """
    check_layers(memory.model)
    if (kind := operand_kind(memory)) is not None:
        raise InvalidArgument(f"it is an operand of editors ({kind}), no context")
    if memory.rules:
        names = [str(rule.get("rule")) for rule in memory.rules if isinstance(rule, dict)]
        raise InvalidArgument(
            f"it has run-time rules ({', '.join(names)}), which only kvedit's runtime applies: "
            "edit without them, or serve with --engine hf"
        )
    plain = multiplied(memory)
    check_plain(plain)
    return plain


def check_layers(spec: ModelSpec) -> None:
    """Raises UnsupportedModel unless slots counted from zero mean the same to every layer."""
    for index, layer in enumerate(spec.layers):
        where = f"layer {index} of {spec.name}"
        if layer.kind != "full":
            raise UnsupportedModel(
                f"{where} is a {layer.kind} layer over {layer.window} positions; only layers that "
                "see the whole context are served. Use --engine hf"
            )
        if layer.rope is not None and layer.rope.switch is not None:
            raise UnsupportedModel(
                f"{where}: {layer.rope.kind} RoPE changes its frequencies at position "
                f"{layer.rope.switch}, so keys can't be moved exactly and engines differ in which "
                "they use. Use --engine hf"
            )
        if layer.rope is None and spec.positions == "rope":
            raise UnsupportedModel(
                f"{where} has no RoPE while others have; such models are not served. "
                "Use --engine hf"
            )
