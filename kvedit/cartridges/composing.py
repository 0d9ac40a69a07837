"""Compose cartridges: several in one memory, in any order, with their sinks kept frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import factorial

import torch

from kvedit.cartridges.order import draws
from kvedit.editors.concat import Concat
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["compose", "orders", "sink_positions"]

_LISTED = 720
"""Orders up to which all are listed and drawn from; more are drawn one by one."""


def compose(
    memories: Sequence[KVMemory], *, rotate: bool = True, order: Sequence[int] | None = None
) -> KVMemory:
    """Returns several memories as one: :class:`~kvedit.editors.concat.Concat` as a function.

    Args:
        memories: at least one, all of one model.
        rotate: whether positions are moved so that none meet; False does as PEFT does.
        order: which of them stands first, second, …; None keeps the given order.

    Raises:
        IncompatibleModel: if they are of different models.
        InvalidArgument: if they can't stand together.
        UnsupportedModel: if the model's positions can't be moved.
        ContextTooLong: if they don't fit the model's positions.
    """
    return Concat(rotate=rotate, order=None if order is None else tuple(order))(*memories)


def sink_positions(
    memories: Sequence[KVMemory], sinks: int = 1, *, rotate: bool = True
) -> tuple[int, ...]:
    """Returns the RoPE positions of each part's leading slots in their composition.

    ``Freeze(positions=sink_positions(parts))`` keeps every part's sinks frozen when the
    composition is trained on; ``Freeze(sinks=1)`` alone would keep the first part's.

    Args:
        memories: the parts, in the order in which they stand.
        sinks: leading slots of each part.
        rotate: as they were composed.
    """
    found: set[int] = set()
    start = 0
    for memory in memories:
        for layer in memory.layers.values():
            found.update((layer.positions[:sinks] + start).tolist())
        start += memory.next_position if rotate else 0
    return tuple(sorted(found))


def orders(count: int, limit: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Returns different orders of ``count`` memories, the given one first.

    A composition whose answers change with the order has parts that are not independent; compare
    ``compose(parts, order=…)`` over these.

    Args:
        count: number of memories, at least 1.
        limit: orders at most; fewer where there are not so many.
        seed: of the choice.

    Raises:
        InvalidArgument: if a number is below 1.
    """
    if count < 1 or limit < 1:
        raise InvalidArgument(f"count and limit must be at least 1, found {count}, {limit}")
    natural = tuple(range(count))
    wanted = min(limit, factorial(count))
    found = dict.fromkeys([natural])
    for order in _drawn(count, seed):
        if len(found) >= wanted:
            break
        found.setdefault(order)
    return list(found)


def _drawn(count: int, seed: int) -> Iterator[tuple[int, ...]]:
    generator = draws(seed, "orders", count)
    if factorial(count) <= _LISTED:
        listed = list(permutations(range(count)))
        for number in torch.randperm(len(listed), generator=generator).tolist():
            yield listed[number]
        return
    while True:
        yield tuple(torch.randperm(count, generator=generator).tolist())
