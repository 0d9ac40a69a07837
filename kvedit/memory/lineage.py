"""Lineage: the graph of captures and edits that made a memory."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Lineage", "LineageNode", "environment"]

Reproducibility = Literal["pure", "reader", "trained"]


def environment(dtype: torch.dtype | None = None) -> tuple[tuple[str, str], ...]:
    """Returns the versions, dtype and threads that a replay would need to be bit-equal."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("kvedit", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    found["threads"] = str(torch.get_num_threads())
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return tuple(sorted(found.items()))


@dataclass(frozen=True)
class LineageNode:
    """One step. Its :attr:`id` says what was done to what, and leaves out where it ran.

    Args:
        operation: ``"capture"``, ``"edit"``, ``"grow"`` or ``"import"``.
        name: the editor's name, or the operation's.
        version: version of the editor's meaning; it changes when equal parameters mean something
            else.
        parameters: canonical JSON of all parameters.
        inputs: ids of the steps that made the inputs.
        reproducibility: ``"pure"`` (bit-equal replay), ``"reader"`` (ran a model), ``"trained"``.
        seed: seed of any randomness, or None.
        environment: versions, dtype and threads, as pairs; not part of the id.
    """

    operation: str
    name: str
    version: int
    parameters: str
    inputs: tuple[str, ...] = ()
    reproducibility: Reproducibility = "pure"
    seed: int | None = None
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def make(
        cls,
        operation: str,
        name: str,
        parameters: Mapping[str, Any],
        inputs: tuple[str, ...] = (),
        *,
        reproducibility: Reproducibility = "pure",
        seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> LineageNode:
        """Returns version 1 of a step that ran here, of plain parameters."""
        return cls(
            operation=operation, name=name, version=1,
            parameters=canonical_json(dict(parameters)).decode(), inputs=inputs,
            reproducibility=reproducibility, seed=seed, environment=environment(dtype),
        )  # fmt: skip

    @cached_property
    def id(self) -> str:
        """BLAKE3 (hex) of everything but the environment."""
        data = asdict(self)
        data.pop("environment")
        return digest_bytes(canonical_json(data))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**asdict(self), "environment": dict(self.environment)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LineageNode:
        """Returns the node that :meth:`to_json` wrote."""
        pairs = tuple(sorted(data["environment"].items()))
        return cls(**{**data, "inputs": tuple(data["inputs"]), "environment": pairs})

    def describe(self) -> str:
        """Returns the step in one line."""
        shown = self.parameters if len(self.parameters) <= 100 else self.parameters[:99] + "…"
        return f"{self.id[:12]} {self.operation} {self.name} v{self.version} {shown}"


@dataclass(frozen=True)
class Lineage:
    """The steps behind a memory, inputs before what was made of them; the last made it.

    Args:
        nodes: the steps, each once.
    """

    nodes: tuple[LineageNode, ...] = ()

    @property
    def head(self) -> LineageNode | None:
        """The step that made the memory, or None where nothing is known."""
        return self.nodes[-1] if self.nodes else None

    @classmethod
    def join(cls, parents: Sequence[Lineage], node: LineageNode) -> Lineage:
        """Returns the lineage of what ``node`` made of the memories of ``parents``."""
        nodes = {step.id: step for parent in parents for step in parent.nodes}
        nodes.pop(node.id, None)
        return cls((*nodes.values(), node))

    def describe(self) -> str:
        """Returns one line per step, the newest first."""
        return "\n".join(node.describe() for node in reversed(self.nodes))
