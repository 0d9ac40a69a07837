"""Prefix: a memory as an engine has it that knows neither bias, rules nor positions.

Such engines count slots: the slots of the memory are positions 0 to p - 1, the first query stands
at p. RoPE only tells differences of positions, so a memory whose next position is n is the same
memory after all its keys were turned by ``p - n`` positions, gaps between them included
(RoFormer, arXiv 2104.09864, eq. 34).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvedit.errors import InvalidArgument
from kvedit.interop.refusals import check_plain
from kvedit.memory import KVMemory
from kvedit.models.loading import as_dtype
from kvedit.models.rope import shift

__all__ = ["DTYPES", "Prefix", "Refit", "check_frozen", "file_dtype", "prefix_of"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that exported keys and values may have."""

Refit = Callable[[KVMemory], KVMemory]
"""Makes a memory without bias of one with bias, its values fitted anew on reference queries."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Plain keys and values of every layer.

    Args:
        keys: per layer ``[head, slot, dim]``, turned so that the first query stands at ``slots``.
        values: per layer ``[head, slot, dim]``.
        moved: positions by which the keys were turned.
        frozen: leading slots that a trainer leaves alone.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    moved: int = 0
    frozen: int = 0

    @property
    def slots(self) -> int:
        """Slots per layer."""
        return self.keys[0].shape[1]


def prefix_of(
    memory: KVMemory,
    dtype: torch.dtype | str | None = None,
    refit: Refit | None = None,
    frozen: int = 0,
) -> Prefix:
    """Returns a memory as plain keys and values, first query behind the last slot.

    Args:
        memory: the memory.
        dtype: of the result; None keeps the memory's, or float32 where the formats lack that.
        refit: called where the memory has bias, which the formats can't say.
        frozen: leading slots that a trainer leaves alone.

    Raises:
        InvalidArgument: if the memory can't be written without a change of what it does.
        UnsupportedModel: if its positions can't be moved, and would have to.
        MutatedMemory: if its tensors were changed in place.
    """
    memory.check_unmodified()
    if refit is not None and any(layer.bias is not None for layer in memory.layers.values()):
        memory = refit(memory)
    check_plain(memory)
    check_frozen(frozen, memory.slots)
    kind, moved = file_dtype(memory.dtype, dtype), memory.slots - memory.next_position
    keys = []
    for index, layer in memory.layers.items():
        # Turned before it is rounded to the file's dtype, and not turned in half precision.
        wide = layer.keys if layer.keys.dtype == torch.float64 else layer.keys.float()
        turned = shift(wide, memory.model.layers[index].rope, moved) if moved else layer.keys
        keys.append(turned.to(kind))
    values = tuple(layer.values.to(kind) for layer in memory.layers.values())
    return Prefix(tuple(keys), values, moved, frozen)


def file_dtype(found: torch.dtype, wanted: torch.dtype | str | None) -> torch.dtype:
    """Returns the dtype that a file gets.

    Args:
        found: the memory's.
        wanted: the user's; None keeps the memory's where the formats have it.

    Raises:
        InvalidArgument: if the formats lack the one that is wanted.
    """
    if wanted is None:
        return found if found in DTYPES else torch.float32
    chosen = as_dtype(wanted)
    if chosen not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise InvalidArgument(f"dtype of the file: expected {names}, found {wanted}")
    return chosen


def check_frozen(frozen: int, slots: int) -> None:
    """Raises InvalidArgument unless so many leading slots can be frozen."""
    if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= slots:
        raise InvalidArgument(
            f"frozen slots: expected a whole number from 0 to {slots}, found {frozen!r}"
        )
