"""Parallel: one function over many items in a few threads; for work that lets go of the lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["run_all", "threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8


def threads() -> int:
    """Returns how many threads are worth starting: processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST)
    return min(os.cpu_count() or 1, _MOST)


def run_all(
    function: Callable[[Item], Result], items: Sequence[Item], parallel: bool = True
) -> list[Result]:
    """Returns ``function`` of every item, in order; the first error is raised.

    Args:
        function: what reads, hashes or writes without holding the interpreter.
        items: the work; neighbours go to different threads.
        parallel: False where there is too little to share.
    """
    count = min(threads(), len(items)) if parallel else 1
    if count <= 1:
        return [function(item) for item in items]

    def share(first: int) -> list[Result]:
        return [function(item) for item in items[first::count]]

    # One task per thread: a task per item costs more than many an item.
    with ThreadPoolExecutor(count) as pool:
        shares = list(pool.map(share, range(count)))
    return [shares[at % count][at // count] for at in range(len(items))]
