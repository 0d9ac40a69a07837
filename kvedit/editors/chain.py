"""Chain: editors one after the other, as one editor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvedit.editors.base import Editor, Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain(Editor):
    """Applies ``editors`` in order. An empty chain is the identity: it changes no bit.

    Lineage shows the chain as one step whose parameters hold every part.

    Args:
        editors: editors, or mappings with an ``editor`` name and its parameters.

    Raises:
        InvalidArgument: if one of them is neither.
    """

    editors: tuple[Editor, ...] = ()

    def __post_init__(self) -> None:
        """Builds editors from mappings."""
        from kvedit.editors import build

        given: Iterable[Any] = self.editors
        built = tuple(build(**part) if isinstance(part, Mapping) else part for part in given)
        for part in built:
            if not isinstance(part, Editor):
                raise InvalidArgument(f"a chain holds editors, found {type(part).__name__}")
        object.__setattr__(self, "editors", built)

    @property
    def reads(self) -> bool:
        """Whether any part needs a reader."""
        return any(part.reproducibility == "reader" for part in self.editors)

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns what the last editor makes."""
        memory = memories[0]
        for part in self.editors:
            if part.reproducibility == "reader" and reader is None:
                raise InvalidArgument(f"{type(part).__name__} reads with the model: pass reader=")
            memory = part.edit(memory, reader=reader)
        return memory
