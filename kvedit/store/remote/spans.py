"""Spans: which requests fetch a set of byte ranges of one object."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kvedit.errors import InvalidArgument

__all__ = ["GAP", "PIECE", "Fetch", "check_ranges", "fetch_spans", "plan_spans", "view_range"]

PIECE = 8 * 1024 * 1024
"""Bytes that one request fetches at most."""

GAP = 256 * 1024
"""Unwanted bytes between two ranges that are fetched rather than paid for with a request."""

_WORKERS = 8


class Fetch(Protocol):
    """Fetches the bytes [start, stop) of one object."""

    def __call__(self, start: int, stop: int) -> memoryview:
        """Returns exactly these bytes."""


def check_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns ``ranges`` as a list.

    Raises:
        InvalidArgument: if one begins before 0 or ends before it begins.
    """
    for start, stop in ranges:
        if not 0 <= start <= stop:
            raise InvalidArgument(f"a range of bytes is 0 <= start <= stop, found {start}:{stop}")
    return list(ranges)


def plan_spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns disjoint spans in ascending order that cover ``ranges``.

    Ranges nearer than ``GAP`` bytes share a span as long as it stays within ``PIECE`` bytes; a
    longer range is one span by itself. Empty ranges need none.
    """
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if spans and (start < spans[-1][1] or _joins(spans[-1], start, stop)):
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
    return spans


def _joins(span: tuple[int, int], start: int, stop: int) -> bool:
    """Returns whether a range that begins behind ``span`` is fetched along with it."""
    return start - span[1] <= GAP and stop - span[0] <= PIECE


def fetch_spans(spans: Sequence[tuple[int, int]], fetch: Fetch) -> list[memoryview]:
    """Returns the bytes of every span, fetched in pieces by several threads.

    Args:
        spans: [start, stop), none empty.
        fetch: one request; its first error is raised, what has not begun is dropped.
    """
    buffers = [bytearray(stop - start) for start, stop in spans]

    def fill(index: int, start: int, stop: int) -> None:
        base = spans[index][0]
        buffers[index][start - base : stop - base] = fetch(start, stop)

    pieces = [
        (index, at, min(at + PIECE, stop))
        for index, (start, stop) in enumerate(spans)
        for at in range(start, stop, PIECE)
    ]
    if len(pieces) == 1:
        fill(*pieces[0])
    elif pieces:
        with ThreadPoolExecutor(min(_WORKERS, len(pieces)), "kvedit-fetch") as pool:
            jobs = [pool.submit(fill, *piece) for piece in pieces]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    return [memoryview(buffer) for buffer in buffers]


def view_range(
    spans: Sequence[tuple[int, int]], buffers: Sequence[memoryview], start: int, stop: int
) -> memoryview:
    """Returns the bytes [start, stop) out of the fetched ``spans`` that cover them."""
    if start == stop:
        return memoryview(b"")
    index = bisect_right(spans, start, key=lambda span: span[0]) - 1
    base = spans[index][0]
    return buffers[index][start - base : stop - base]
