"""Tensors that must not change: their version counters are noted, and compared later.

torch counts in-place writes per storage, through views as well. It does not count writes through
``tensor.data``, or through a numpy array that shares the memory; those go unseen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kvedit.errors import MutatedMemory

__all__ = ["check_versions", "note_versions"]


def note_versions(holder: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Notes the version counters of a frozen dataclass's tensors.

    Args:
        holder: the object; an inference tensor in it is replaced by a copy, since it has no
            counter.
        tensors: field names and tensors.
    """
    versions = {}
    for name, given in tensors:
        kept = given
        if given.is_inference():
            with torch.inference_mode(False):
                kept = given.clone()
            object.__setattr__(holder, name, kept)
        versions[name] = kept._version
    object.__setattr__(holder, "_versions", versions)


def check_versions(holder: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises MutatedMemory if a tensor was written in place since :func:`note_versions`."""
    for name, tensor in tensors:
        if tensor._version != holder._versions[name]:
            raise MutatedMemory(
                f"the memory's {name} were changed in place; memories are immutable: clone "
                "the tensor and build a new memory with dataclasses.replace"
            )
