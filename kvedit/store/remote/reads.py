"""Reads: whole objects, slices and many ranges of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvedit.errors import CorruptMemory
from kvedit.store.remote.connection import Connection
from kvedit.store.remote.spans import check_ranges, fetch_spans, plan_spans, view_range

__all__ = ["Reads"]

Views = list[memoryview]


class Reads(Connection):
    """The reading half of :class:`Objects`."""

    def size(self, key: str) -> int | None:
        """Returns the bytes of an object, or None if there is none.

        Raises:
            InvalidArgument: if the key can't be one.
            TierUnavailable: if the place can't be reached.
        """
        path = self._path(key)
        return self._run(f"look up {key}", lambda _: self._head(path))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns the object's bytes ``[start:stop]``, as a slice: what lies outside is left out.

        One request; for large objects there is :meth:`read_whole`.

        Raises:
            InvalidArgument: if the key can't be one, or the range is negative.
            NotFound: if there is no such object.
            TierUnavailable: if the place can't be reached.
        """
        path = self._path(key)
        check_ranges([(start, start if stop is None else stop)])
        if start == stop:
            self._exists(key, self.size(key))
            return b""
        wanted: Any = {"offset": start} if stop is None else (start, stop)
        if stop is None and not start:
            wanted = None  # no range at all: servers refuse every range of an empty object
        return self._run(f"read {key}", lambda _: bytes(self._get(key, path, wanted)[0]))

    def read_many(self, key: str, ranges: Sequence[tuple[int, int]]) -> Views:
        """Returns the bytes [start, stop) of each range, in their order.

        Near ranges share a request, long ones are cut, requests run in parallel. Views of one
        request share memory: keeping a small one keeps its neighbours.

        Raises:
            CorruptMemory: if a range runs past the end of the object.
            InvalidArgument: if the key can't be one, or a range is negative.
            NotFound: if there is no such object.
            TierUnavailable: if the place can't be reached.
        """
        path, wanted = self._path(key), check_ranges(ranges)
        spans = plan_spans(wanted)
        if not spans:
            self._exists(key, self.size(key))
        buffers = fetch_spans(spans, lambda a, b: self._piece(key, path, a, b, None))
        return [view_range(spans, buffers, start, stop) for start, stop in wanted]

    def read_whole(self, key: str, size: int) -> memoryview:
        """Returns all bytes of an object in one writable buffer, fetched in parallel.

        Args:
            key: the object.
            size: its bytes, known from where the key is from.

        Raises:
            CorruptMemory: if the object has another size.
            InvalidArgument: if the key can't be one, or size is negative.
            NotFound: if there is no such object.
            TierUnavailable: if the place can't be reached.
        """
        path = self._path(key)
        if check_ranges([(0, size)]) == [(0, 0)]:
            found = self._exists(key, self.size(key))
            self._compare(key, found, 0)
            return memoryview(bytearray())
        return fetch_spans([(0, size)], lambda a, b: self._piece(key, path, a, b, size))[0]

    def _piece(self, key: str, path: str, start: int, stop: int, size: int | None) -> memoryview:
        """Returns exactly the bytes [start, stop) of an object of ``size`` bytes."""
        task = f"read {key} {start}:{stop}"
        data, whole = self._run(task, lambda _: self._get(key, path, (start, stop)))
        self._compare(key, whole, whole if size is None else size)
        if len(data) != stop - start:
            raise CorruptMemory(
                f"{self.name}: {key} has {whole} bytes, expected {stop} or more: it was cut off"
            )
        return data

    def _compare(self, key: str, found: int, size: int) -> None:
        if found != size:
            raise CorruptMemory(
                f"{self.name}: {key} has {found} bytes, expected {size}: it is another content, "
                "or was cut off or extended"
            )
