"""Chain: editors one after the other, as one editor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvedit.editors.base import Editor, Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.lineage import Reproducibility

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain(Editor):
    """Applies ``editors`` in order. An empty chain is the identity: it changes no bit.

    Lineage shows the chain as one step whose parameters hold every part.

    Args:
        editors: editors, or mappings with an ``editor`` name and its parameters; ``version`` may
            say which version of the editor they are for.

    Raises:
        InvalidArgument: if one of them is neither, or is for another version of its editor.
    """

    editors: tuple[Editor, ...] = ()

    def __post_init__(self) -> None:
        """Builds editors from mappings."""
        given: Any = self.editors
        if not isinstance(given, Iterable):
            raise InvalidArgument(f"a chain holds a list of editors, found {given!r}")
        object.__setattr__(self, "editors", tuple(map(_built, given)))

    @property
    def reproducibility(self) -> Reproducibility:  # type: ignore[override]
        """What a replay of the weakest part can promise."""
        order: list[Reproducibility] = ["pure", "reader", "trained"]
        kinds = [part.reproducibility for part in self.editors]
        return max(kinds, key=order.index, default="pure")

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """Whether some part changes keys or values."""
        return any(part.rewrites for part in self.editors)

    @property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        """Operands that some part needs, each kind once."""
        return tuple(dict.fromkeys(kind for part in self.editors for kind in part.operands))

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns what the last editor makes."""
        memory, *others = memories
        given = dict(zip(self.operands, others, strict=True))
        for part in self.editors:
            # Called, not only its edit: each part sees in the lineage what was done before it.
            memory = part(memory, *(given[kind] for kind in part.operands), reader=reader)
        return memory


def _built(part: Any) -> Editor:
    from kvedit.editors import build

    if isinstance(part, Mapping):
        if "editor" not in part:
            raise InvalidArgument(f"a part of a chain names its editor, found {dict(part)!r}")
        parameters = dict(part)
        wanted = parameters.pop("version", None)
        part = build(**parameters)
        if wanted not in (None, part.version):
            raise InvalidArgument(
                f"a part of a chain is for version {wanted!r} of {parameters['editor']}, here it "
                f"is version {part.version}: equal parameters mean something else"
            )
    if not isinstance(part, Editor):
        raise InvalidArgument(f"a chain holds editors, found {type(part).__name__}")
    return part
