"""The names and the order of tensor axes, and the checks that hold them.

One order everywhere: ``layer, batch, head, slot, dim``. Other layouts are converted at the edge
with :func:`einops.rearrange` and the full names.
"""

from __future__ import annotations

import torch

from kvedit.errors import ShapeMismatch

__all__ = ["BATCHED_TO_MEMORY", "MEMORY_TO_BATCHED", "expect_axes"]

MEMORY_TO_BATCHED = "head slot dim -> 1 head slot dim"
"""einops pattern from one memory's layer to a batch of one, as a transformers cache holds it."""

BATCHED_TO_MEMORY = "1 head slot dim -> head slot dim"
"""einops pattern from a transformers cache of one row to a memory's layer."""


def expect_axes(name: str, tensor: torch.Tensor, axes: str, **sizes: int) -> None:
    """Raises unless ``tensor`` has the named axes and the sizes that are given for them.

    Args:
        name: what the tensor is, for the message.
        tensor: the tensor to check.
        axes: axis names in order, separated by spaces, for example ``"head slot dim"``.
        **sizes: the expected size of some of the axes.

    Raises:
        ShapeMismatch: if the number of axes or a size differs.
    """
    names = axes.split()
    found = tuple(tensor.shape)
    agrees = len(names) == len(found) and all(
        size == sizes.get(axis, size) for axis, size in zip(names, found, strict=True)
    )
    if not agrees:
        wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in names)
        raise ShapeMismatch(f"{name}: expected axes [{wanted}], found shape {list(found)}")
