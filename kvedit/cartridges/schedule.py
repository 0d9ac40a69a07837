"""The learning rate of every step, as a function of the step: right from the first one on."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["SCHEDULES", "Schedule", "rate"]

Schedule = Literal["constant", "linear", "cosine"]
"""How the rate falls after its warm-up."""

SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def rate(
    schedule: Schedule, step: int, steps: int, peak: float, warmup: int = 0, final: float = 0.0
) -> float:
    """Returns the learning rate with which step number ``step`` is made.

    The rate is set before the step. Warm-up rises by equal parts and reaches the peak in its
    last step, so the first of ``w`` steps is made with ``peak / w`` and not with the peak.

    Args:
        schedule: shape after the warm-up: constant, or down to ``final`` in the last step.
        step: number of the step, from 1.
        steps: steps in all.
        peak: highest rate.
        warmup: steps of the warm-up.
        final: fraction of the peak in the last step; a constant schedule has none.

    Example:
        >>> [rate("linear", step, 4, 1.0, warmup=2) for step in (1, 2, 3, 4)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    # Without warm-up the first step stands at the peak; with it, the warm-up's last step does.
    first = max(warmup, 1)
    done = (step - first) / max(steps - first, 1)
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (final + (1.0 - final) * left)
