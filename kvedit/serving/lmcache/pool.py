"""Pool: the memory that an LMCache server shares with processes of its machine."""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kvedit.errors import TierUnavailable

__all__ = ["Pool"]

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"lmcache_l1_pool_[A-Za-z0-9_.-]+")


class Pool:
    """The server's shared memory, written and read at the places that it names.

    Args:
        name: its name, as the server says.
        size: its bytes.

    Raises:
        TierUnavailable: if it is not on this machine, or not of that size.
    """

    def __init__(self, name: str, size: int) -> None:
        if not _NAME.fullmatch(name.lstrip("/")):
            raise TierUnavailable(f"the server names {name[:80]!r}, which is no pool of LMCache's")
        path = _FOLDER / name.lstrip("/")
        try:
            with path.open("r+b") as file:
                found = os.fstat(file.fileno()).st_size
                if found < size:
                    raise TierUnavailable(f"{path}: expected {size} bytes, found {found}")
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise TierUnavailable(
                f"LMCache's shared memory {path} can't be opened ({error.strerror}): the server "
                "must run on this machine, as this user"
            ) from error
        self._size = size

    def __enter__(self) -> Pool:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the memory back."""
        self._map.close()

    def write(self, place: Mapping[str, Any], payload: torch.Tensor) -> None:
        """Writes a chunk.

        Args:
            place: what the server said: ``offset``, ``length``, ``shape`` and ``dtype``.
            payload: contiguous, on the CPU.

        Raises:
            TierUnavailable: if the place is not one for this chunk.
        """
        start, stop = self._span(place, payload)
        self._map[start:stop] = _bytes(payload)

    def holds(self, place: Mapping[str, Any], payload: torch.Tensor) -> bool:
        """Returns whether a place has this chunk, bit for bit.

        Raises:
            TierUnavailable: if the place is not one for this chunk.
        """
        start, stop = self._span(place, payload)
        return self._map[start:stop] == _bytes(payload)

    def _span(self, place: Mapping[str, Any], payload: torch.Tensor) -> tuple[int, int]:
        start, stop = int(place["offset"]), int(place["offset"]) + payload.nbytes
        dtype = str(payload.dtype).removeprefix("torch.")
        fits = math.prod(place["shape"]) == payload.numel() and place["dtype"] == dtype
        if not fits or int(place["length"]) < payload.nbytes or not 0 <= start < stop <= self._size:
            raise TierUnavailable(
                f"LMCache has a place of {place['dtype']} {list(place['shape'])}, {place['length']}"
                f" bytes at {start}, for a chunk of {dtype} {list(payload.shape)}: an engine with "
                "another layout is registered for this model"
            )
        return start, stop


def _bytes(payload: torch.Tensor) -> bytes:
    return payload.reshape(-1).view(torch.uint8).numpy().tobytes()
