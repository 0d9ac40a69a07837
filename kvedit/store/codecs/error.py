"""CodecError: how far a lossy codec moved keys and values, and whether an edit survives that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV
from kvedit.store.codecs.tensors import as_float32

__all__ = ["CodecError", "PartError", "check_against_edit", "measure"]

_BAR = 0.1

Floats = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PartError:
    """The error of one layer's keys or values.

    Args:
        max_abs: largest absolute difference.
        error: norm of the difference.
        norm: norm of what was given.
        slots: ``[slot]`` norm of the difference per slot.
    """

    max_abs: float
    error: float
    norm: float
    slots: Floats = field(repr=False, compare=False)

    @property
    def relative(self) -> float:
        """``error / norm``; 0 where nothing changed."""
        return self.error / self.norm if self.error else 0.0


@dataclass(frozen=True)
class CodecError:
    """What a codec did to a memory. Empty for a lossless one.

    Args:
        codec: name of the codec.
        parts: error by layer and kind (``"keys"`` or ``"values"``).
    """

    codec: str
    parts: Mapping[tuple[int, str], PartError] = field(default_factory=dict)

    @property
    def max_abs(self) -> dict[str, float]:
        """Largest absolute difference over all layers, for keys and values."""
        return {kind: max(p.max_abs for p in found) for kind, found in self._kinds()}

    @property
    def relative(self) -> dict[str, float]:
        """``‖difference‖ / ‖given‖`` in the layer where it is largest, for keys and values."""
        return {kind: max(p.relative for p in found) for kind, found in self._kinds()}

    def to_json(self) -> dict[str, Any]:
        """Returns codec, ``max_abs`` and ``relative`` as plain data."""
        return {"codec": self.codec, "max_abs": self.max_abs, "relative": self.relative}

    def _kinds(self) -> Iterator[tuple[str, list[PartError]]]:
        for kind in ("keys", "values"):
            found = [part for (_, name), part in self.parts.items() if name == kind]
            if found:
                yield kind, found


def measure(given: torch.Tensor, approximated: torch.Tensor) -> PartError:
    """Returns how far two tensors ``[head, slot, dim]`` are apart."""
    before = as_float32(given).astype(np.float64)
    difference = as_float32(approximated) - before
    slots = _slot_norms(difference)
    return PartError(
        max_abs=float(np.abs(difference).max(initial=0.0)),
        error=float(np.linalg.norm(slots)),
        norm=float(np.linalg.norm(_slot_norms(before))),
        slots=slots,
    )


def check_against_edit(
    error: CodecError, before: KVMemory | None, memory: KVMemory, force: bool
) -> None:
    """Raises if a codec's error could hide an edit of keys or values.

    An edit that is smaller than the rounding of the codec that stores it is lost. Per layer, and
    for keys and values, the norm of the error over the slots that the edit changed must be at most
    a tenth of the norm of the edit. Slots are matched by the token that made them; where they are
    the same in both, by their place. Edits of bias, positions or slots are kept by every codec.

    Args:
        error: from :func:`~kvedit.store.codecs.approximate`.
        before: the memory that was edited, or None if there is none to compare with.
        memory: the edited memory that was approximated, not the approximation.
        force: True accepts any error.

    Raises:
        InvalidArgument: if an edit would be lost, or the two memories are of different shape.
    """
    if before is None or force:
        return
    lost = list(_lost(error, before, memory))
    if lost:
        layer, kind, ratio, slots = max(lost, key=lambda item: item[2])
        raise InvalidArgument(
            f"codec {error.codec!r} would hide an edit: in {len(lost)} of the parts that the edit "
            f"changed its error is more than {_BAR} of the edit, at worst {ratio:.2g} of it "
            f"(layer {layer}, {kind}, {slots} slots). Use a finer codec, or force=True to keep it "
            "so"
        )


def _lost(
    error: CodecError, before: KVMemory, memory: KVMemory
) -> Iterator[tuple[int, str, float, int]]:
    for (index, kind), part in error.parts.items():
        if index not in before.layers or index not in memory.layers:
            continue
        old, new = before.layers[index], memory.layers[index]
        in_old, in_new = _matched(old, new)
        given, edited = (getattr(layer, kind) for layer in (old, new))
        if given.shape[::2] != edited.shape[::2] or part.slots.shape[0] != new.slots:
            raise InvalidArgument(
                f"layer {index} {kind}: {list(given.shape)} before the edit, "
                f"{list(edited.shape)} after it, {part.slots.shape[0]} slots in the error; pass "
                "the memory that was edited and the one that was approximated"
            )
        # A memory in another dtype was not edited: its numbers are compared in the same dtype.
        moved = as_float32(edited)[:, in_new].astype(np.float64)
        moved -= as_float32(given.to(edited.dtype))[:, in_old]
        edit = _slot_norms(moved)
        changed = edit > 0
        size = float(np.linalg.norm(edit[changed]))
        hidden = float(np.linalg.norm(part.slots[in_new][changed]))
        if hidden > _BAR * size:
            yield index, kind, hidden / size if size else math.inf, int(changed.sum())


def _matched(old: LayerKV, new: LayerKV) -> tuple[Any, Any]:
    source_old, source_new = (layer.source.detach().cpu().numpy() for layer in (old, new))
    if np.array_equal(source_old, source_new):
        return slice(None), slice(None)
    # A token in several slots is compared at its first.
    tokens, left, right = np.intersect1d(source_old, source_new, return_indices=True)
    named = tokens >= 0
    return left[named], right[named]


def _slot_norms(numbers: Floats) -> Floats:
    result: Floats = np.sqrt(np.einsum("hsd,hsd->s", numbers, numbers))
    return result
