"""What an editor is: a frozen dataclass that turns memories into a new memory."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Lineage, LineageNode, Span, SpanQuery
from kvedit.memory.digest import canonical_json
from kvedit.memory.lineage import environment

__all__ = ["Editor", "Reader", "SpanLike", "registered_name"]

SpanLike = str | Span | SpanQuery
"""A text to find, a query, or a span that was found already."""


@runtime_checkable
class Reader(Protocol):
    """The runtime as an editor may use it: run tokens over a memory and get tensors back."""

    def read(
        self, memory: KVMemory, tokens: torch.Tensor, sites: Iterable[str]
    ) -> dict[str, dict[int, torch.Tensor]]:
        """Runs ``tokens`` ``[n]`` over ``memory`` and returns, per site and layer, its tensor."""
        ...


@dataclass(frozen=True)
class Editor(ABC):
    """Base of all editors. Equal configuration means equal identity; inputs are never changed.

    A subclass is a frozen dataclass and implements :meth:`edit`. Its fields are plain values,
    spans, or other editors, so that they can stand in a config file and in a lineage.
    """

    version: ClassVar[int] = 1
    """Raised when equal parameters come to mean something else."""

    reproducibility: ClassVar[Literal["pure", "reader", "trained"]] = "pure"
    """Whether a replay is bit-equal (pure), runs a model (reader) or trains."""

    def __call__(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the edited memory, with this edit in its lineage.

        Args:
            *memories: one memory for most editors.
            reader: the model, for editors that read with it.

        Raises:
            InvalidArgument: if the number of memories does not fit, or a reader is missing.
            MutatedMemory: if an input was changed in place.
        """
        self.check_inputs(memories)
        for memory in memories:
            memory.check_unmodified()
        if self.reproducibility == "reader" and reader is None:
            raise InvalidArgument(f"{type(self).__name__} reads with the model: pass reader=")
        edited = self.edit(*memories, reader=reader)
        lineage = Lineage.join([memory.lineage for memory in memories], self._node(memories))
        return dataclasses.replace(edited, lineage=lineage)

    @abstractmethod
    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the edited memory; its lineage is added by the caller."""

    def check_inputs(self, memories: tuple[KVMemory, ...]) -> None:
        """Raises InvalidArgument unless there is one memory; editors of several override this."""
        if len(memories) != 1 or not isinstance(memories[0], KVMemory):
            found = [type(memory).__name__ for memory in memories]
            raise InvalidArgument(f"{type(self).__name__} edits one KVMemory, found {found}")

    def parameters(self) -> dict[str, Any]:
        """Returns the configuration as plain data: a replay can build the editor from it."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def _node(self, memories: tuple[KVMemory, ...]) -> LineageNode:
        # A memory without history is named by what is in it.
        inputs = tuple(m.lineage.head.id if m.lineage.head else m.digest for m in memories)
        return LineageNode(
            operation="edit",
            name=registered_name(type(self)),
            version=self.version,
            parameters=canonical_json(self.parameters()).decode(),
            inputs=inputs,
            reproducibility=self.reproducibility,
            environment=environment(memories[0].dtype if memories else None),
        )


def registered_name(editor: type[Editor]) -> str:
    """Returns the name of an editor in configs and the registry: its class in snake case."""
    name = editor.__name__
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


def _plain(value: Any) -> Any:
    if isinstance(value, Editor):
        named: dict[str, Any] = {"editor": registered_name(type(value))}
        # Left out where it is 1: lineages that were written before keep their ids.
        if value.version != 1:
            named["version"] = value.version
        return {**named, **value.parameters()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {key: item for key, item in fields.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise InvalidArgument(f"an editor's parameter must be plain data, found {type(value).__name__}")
