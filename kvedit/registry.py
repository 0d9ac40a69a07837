"""Lazy names: a registry maps a name to ``module:attribute`` and imports it when asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from kvedit.errors import UnknownName

__all__ = ["Registry"]


@dataclass(frozen=True)
class Registry:
    """Names and where they live. Nothing is imported before :meth:`load`.

    Other packages add names through the entry point group ``kvedit.<kind>s``; a built-in name
    can't be replaced by one.

    Args:
        kind: what the names are, in the singular, for messages and the entry point group.
        targets: name to ``"package.module:attribute"``.
    """

    kind: str
    targets: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freezes the mapping."""
        object.__setattr__(self, "targets", MappingProxyType(dict(self.targets)))

    def __iter__(self) -> Iterator[str]:
        """Iterates over all known names, sorted."""
        return iter(sorted(self._all()))

    def __contains__(self, name: object) -> bool:
        """Whether the name is known."""
        return name in self._all()

    def load(self, name: str) -> Any:
        """Returns what ``name`` stands for; it is imported now.

        Raises:
            UnknownName: if nothing has that name; near names are in the message.
        """
        targets = self._all()
        if name not in targets:
            raise UnknownName(self.kind, name, targets)
        module, _, attribute = targets[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def _all(self) -> dict[str, str]:
        found = {point.name: point.value for point in entry_points(group=f"kvedit.{self.kind}s")}
        return {**found, **self.targets}
