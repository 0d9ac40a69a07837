"""Paired times: two things in turn in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Pair", "Seconds", "Timed", "alternate", "timed"]


@dataclass(frozen=True)
class Seconds:
    """How long something took.

    Args:
        wall: on the clock.
        cpu: of this process's threads together; other load on the machine hardly moves it.
    """

    wall: float
    cpu: float


Timed = Callable[[], Seconds]
"""Does something and returns how long the part that counts took."""


@dataclass(frozen=True)
class Pair:
    """Times of both sides, taken one right after the other."""

    a: Seconds
    b: Seconds


def alternate(a: Timed, b: Timed, pairs: int, tick: Callable[[], None]) -> list[Pair]:
    """Returns times of ``a`` and ``b`` taken in the order a b, b a, a b and so on.

    Args:
        a: one side.
        b: the other side.
        pairs: how many of each.
        tick: called after each time, for a progress bar.
    """

    def take(side: Timed) -> Seconds:
        found = side()
        tick()
        return found

    found = []
    for number in range(pairs):
        if number % 2 == 0:
            first, second = take(a), take(b)
        else:
            second, first = take(b), take(a)
        found.append(Pair(first, second))
    return found


def timed(action: Callable[[], object], settle: Callable[[], None]) -> Seconds:
    """Returns how long ``action`` took.

    Args:
        action: what is timed.
        settle: waits for the device, before and after.
    """
    settle()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    settle()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
