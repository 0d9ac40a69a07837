"""Budgets: how many slots each KV head keeps, as a ratio or as a number."""

from __future__ import annotations

import torch

from kvedit.errors import InvalidArgument

__all__ = ["as_budget", "as_count", "slots_kept"]

_FUZZ = 1e-9
"""So that 0.29 of 100 slots are 29, though 0.29 * 100 is 28.999999999999996."""


def as_budget(value: object) -> int | float:
    """Returns a ratio in (0, 1] or a number of slots from 2.

    The number 1 is refused: it would be equal to the ratio 1.0 and mean something else, and in a
    config file it is more often a ratio that lost its point.

    Raises:
        InvalidArgument: if it is something else.
    """
    if type(value) is float and 0 < value <= 1:
        return value
    if type(value) is int and value >= 2:
        return value
    raise InvalidArgument(
        "budget: expected a ratio in (0, 1] (a float; 1.0 keeps all) or a number of slots per KV "
        f"head (a whole number from 2), found {value!r}"
    )


def as_count(name: str, value: object, low: int = 0) -> int:
    """Returns a whole number from ``low``.

    Raises:
        InvalidArgument: if it is something else.
    """
    if type(value) is not int or value < low:
        raise InvalidArgument(f"{name}: expected a whole number from {low}, found {value!r}")
    return value


def slots_kept(budget: int | float, alive: torch.Tensor) -> torch.Tensor:
    """Returns how many slots each head keeps.

    A ratio is one of the slots that the head has, rounded down, one at least. A head that has
    fewer slots than a number keeps what it has.

    Args:
        budget: see :func:`as_budget`.
        alive: int64 ``[head]``, slots that each head has.

    Returns:
        int64 ``[head]``.
    """
    if isinstance(budget, int):
        return alive.clamp_max(budget)
    wanted = (alive.double() * budget + _FUZZ).floor().to(torch.int64)
    return torch.minimum(wanted.clamp_min(1), alive)
