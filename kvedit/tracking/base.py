"""Tracker: the one small protocol behind which every tracker stands."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

__all__ = ["RunFacts", "Tracker", "library_versions", "plain_number"]

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "hydra-core", "wandb")


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it begins.

    Args:
        task: name of the run.
        config: the resolved config, as plain data.
        versions: library versions, see :func:`library_versions`.
    """

    task: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Takes what a run measures. It decides nothing and gives nothing back to the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes numbers of one step.

        Args:
            step: number of the step, from 0, never smaller than the last.
            metrics: name to number; names are grouped by ``/``.
        """
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Notes a table; every row has as many cells as there are columns."""
        ...

    def artifact(self, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Notes that ``path`` (a file or folder) came out of the run; it is never moved."""
        ...

    def close(self) -> None:
        """Writes out what is left; calling it again does nothing."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries on which numbers depend."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def plain_number(value: float) -> float | str:
    """Returns a number that JSON can hold; NaN and the infinities are spelled out."""
    return value if math.isfinite(value) else str(value)
