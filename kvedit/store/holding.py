"""Holding: a pack whose bytes are at hand, mapped from its file or read from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from kvedit.errors import CorruptMemory
from kvedit.store.pack import Pack

__all__ = ["FetchedPack", "HeldPack", "MappedPack"]


class HeldPack(Protocol):
    """A pack and a way to its bytes."""

    @property
    def pack(self) -> Pack:
        """What its header says."""
        ...

    def data(self, offset: int, size: int) -> torch.Tensor:
        """Returns bytes of the file, ``[byte]`` uint8; a view, never written to."""
        ...


@dataclass
class MappedPack:
    """A pack in a file. Its bytes are mapped: nothing is copied before it is used.

    The mapping is private: a write into it changes memory, and no file. It stays valid when the
    file is unlinked. Packs are never changed in place; a file that somebody cuts off all the same
    while it is mapped ends the process (SIGBUS).

    Args:
        pack: what its header says.
        path: the file.
    """

    pack: Pack
    path: Path
    _bytes: torch.Tensor | None = field(default=None, repr=False)

    def data(self, offset: int, size: int) -> torch.Tensor:
        """Returns bytes of the file, ``[byte]`` uint8.

        Raises:
            FileNotFoundError: if the file is gone, by a collection of garbage for example.
            CorruptMemory: if it is shorter or longer than its header says.
        """
        if self._bytes is None:
            self._bytes = self._map()
        return self._bytes[offset : offset + size]

    def _map(self) -> torch.Tensor:
        found = self.path.stat().st_size
        if found != self.pack.size:
            raise CorruptMemory(
                f"{self.path} should have {self.pack.size} bytes and has {found}: it was cut off "
                "or extended"
            )
        try:
            storage: Any = torch.UntypedStorage.from_file(str(self.path), False, found)
        except RuntimeError as error:
            # It may be there again by now: fetched from below, say.
            if "No such file" in str(error) or not self.path.exists():
                raise FileNotFoundError(self.path) from error
            raise OSError(f"can't map {self.path}: {error}") from error
        return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class FetchedPack:
    """Parts of a pack that were read from elsewhere.

    Args:
        pack: what its header says.
        parts: first byte to the bytes from there on.
    """

    pack: Pack
    parts: Mapping[int, bytes]

    def data(self, offset: int, size: int) -> torch.Tensor:
        """Returns bytes of the file, ``[byte]`` uint8.

        Raises:
            CorruptMemory: if they were not read, or fewer came than were asked for.
        """
        found = self.parts.get(offset, b"")
        if len(found) != size:
            raise CorruptMemory(
                f"pack {self.pack.digest}: {size} bytes were asked for and {len(found)} came"
            )
        return (
            torch.frombuffer(bytearray(found), dtype=torch.uint8)
            if size
            else torch.empty(0, dtype=torch.uint8)
        )
