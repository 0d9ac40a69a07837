"""Payload: the bytes of a put, from memory or from a file."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from kvedit.errors import InvalidArgument

__all__ = ["open_payload"]


@contextlib.contextmanager
def open_payload(data: bytes | memoryview | Path) -> Iterator[memoryview]:
    """Yields ``data`` as plain bytes; a file is mapped, not read.

    Raises:
        InvalidArgument: if it is neither contiguous bytes nor a file.
        FileNotFoundError: if there is no such file; garbage may have been collected meanwhile.
    """
    if not isinstance(data, Path):
        view = memoryview(data)
        if not view.c_contiguous:
            raise InvalidArgument("data must lie in one piece; found a memoryview with steps")
        yield view.cast("B") if view.nbytes else memoryview(b"")
        return
    if data.exists() and not data.is_file():
        raise InvalidArgument(f"{data} is no file")
    with data.open("rb") as file:
        if not data.stat().st_size:
            yield memoryview(b"")
            return
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Not closed here: obstore may hold the bytes a little longer; the last view unmaps them.
        yield memoryview(mapped)
