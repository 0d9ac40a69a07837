"""What an editor is: a frozen dataclass that turns memories into a new memory."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Lineage, LineageNode, Span, SpanQuery
from kvedit.memory.digest import canonical_json
from kvedit.memory.lineage import environment
from kvedit.memory.operand import operand_kind

__all__ = ["Editor", "KeyChange", "Reader", "Replacement", "SpanLike", "registered_name"]

SpanLike = str | Span | SpanQuery
"""A text to find, a query, or a span that was found already."""

KeyChange = Callable[[torch.Tensor], torch.Tensor]
"""From keys after RoPE ``[kv_head, token, dim]``, of the first tokens, to those that are read."""

Replacement = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and what attention would read there to what it reads."""


@runtime_checkable
class Reader(Protocol):
    """The runtime as an editor may use it: run tokens over a memory and get tensors back."""

    def read(
        self,
        memory: KVMemory | None,
        tokens: torch.Tensor,
        sites: Iterable[str],
        replace: Mapping[str, Replacement] | None = None,
    ) -> dict[str, dict[int, torch.Tensor]]:
        """Runs ``tokens`` ``[n]`` over ``memory``, or over nothing.

        ``replace`` changes what attention reads at a site, as :func:`kvedit.tap` does.

        Returns:
            Per site and layer its tensor, batch axis included. Sites are those of
            :func:`kvedit.tap`, and ``"attention_input"`` and ``"attention_output"``: hidden states
            ``[batch, query, hidden]`` that a layer's attention takes and returns.
        """
        ...

    def reread(
        self,
        memory: KVMemory,
        bias: Mapping[int, torch.Tensor],
        keys: Mapping[int, KeyChange] | None = None,
    ) -> KVMemory:
        """Reads a memory's tokens anew while its own tokens are biased, or read changed keys.

        The result keeps no bias, and keys as they were before they were changed.

        Args:
            memory: a memory with tokens, one slot each.
            bias: layer to float32 ``[query_head, token]``, seen by every later token.
            keys: layer to what turns its keys into those that every later token reads.
        """
        ...

    def grow(self, memory: KVMemory, tokens: torch.Tensor) -> KVMemory:
        """Returns the memory after ``tokens`` ``[n]`` were read behind it."""
        ...

    def encode(self, text: str) -> torch.Tensor:
        """Returns the token ids ``[n]`` of a text, without special tokens."""
        ...

    def turn(self, memory: KVMemory, prompt: str) -> torch.Tensor:
        """Returns the token ids ``[n]`` by which a prompt goes on behind a memory, as a chat's."""
        ...

    def ask(self, memory: KVMemory, prompt: str, max_new_tokens: int) -> str:
        """Returns the greedy answer to a prompt over a memory."""
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

    rewrites: ClassVar[bool] = False
    """Whether keys or values change; a context that is read anew afterwards would lose that."""

    operands: ClassVar[tuple[str, ...]] = ()
    """Kinds of operands (:mod:`kvedit.memory.operand`) that follow the edited memory."""

    def __call__(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the edited memory, with this edit in its lineage.

        Args:
            *memories: one memory for most editors, then its operands.
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
        """Checks that there is one memory, and the operands that are needed.

        Editors of several memories override this.

        Raises:
            InvalidArgument: if there are others.
        """
        found = [_kind(memory) for memory in memories]
        if found != ["KVMemory", *self.operands]:
            wanted = "".join(f", then an operand of kind {kind!r}" for kind in self.operands)
            raise InvalidArgument(
                f"{type(self).__name__} edits one KVMemory{wanted}, found {found}"
            )

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


def _kind(memory: Any) -> str:
    if not isinstance(memory, KVMemory):
        return type(memory).__name__
    return operand_kind(memory) or "KVMemory"


def registered_name(editor: type[Editor]) -> str:
    """Returns the name of an editor in configs and the registry: its class in snake case."""
    # A run of capitals is one word: LLMSteer is llm_steer.
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", editor.__name__).lower()


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
