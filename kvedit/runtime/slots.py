"""LayerSlots: one layer's growing keys and values for a batch, behind transformers' cache API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvedit.errors import InvalidArgument
from kvedit.memory import LayerKV, LayerSpec

__all__ = ["LayerSlots"]

_SPARE = 64
"""Slots of room that a layer gets beyond its memory before it has to grow."""


class LayerSlots(CacheLayerMixin):
    """Memory slots of each row, then the new tokens of all rows, in one preallocated buffer.

    Rows whose memory is shorter have invalid slots between their memory and the new tokens.
    New tokens' positions and validity are the same in every layer and are kept by the cache.

    Args:
        spec: facts of the layer.
        memories: each row's slots, or None for a row without a memory.

    Attributes:
        coming: bias ``[query_head, token]`` of new tokens in the order in which they come, for
            contexts that read themselves under bias; None for none.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, spec: LayerSpec, memories: Sequence[LayerKV | None]) -> None:
        """Pads positions, validity and bias; keys and values are copied at first use."""
        super().__init__()
        self.spec = spec
        self.memories: list[LayerKV | None] = list(memories)
        counts = [0 if layer is None else layer.slots for layer in memories]
        self.held = max(counts)
        rows = len(counts)
        self.positions = torch.zeros(rows, self.held, dtype=torch.int64)
        self.source = torch.full((rows, self.held), -1, dtype=torch.int64)
        valid = torch.zeros(rows, self.held, dtype=torch.bool)
        for row, layer in enumerate(memories):
            if layer is not None:
                self.positions[row, : layer.slots] = layer.positions
                self.source[row, : layer.slots] = layer.source
                valid[row, : layer.slots] = True
        self.valid: torch.Tensor | None = None if bool(valid.all()) else valid
        self.bias = _padded_bias(spec, memories, self.held)
        self.coming: torch.Tensor | None = None
        self.fed = 0
        self._room = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._bias_buffer: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Slots in use, invalid ones included."""
        return self.held + self.fed

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Copies the memories into a buffer on the device and in the dtype of the first tokens."""
        room = max(self._room, self.length + key_states.shape[2])
        self._buffers = tuple(
            self._filled(kind, states, room)
            for kind, states in (("keys", key_states), ("values", value_states))
        )  # type: ignore[assignment]
        self.positions = self.positions.to(key_states.device)
        self.valid = None if self.valid is None else self.valid.to(key_states.device)
        self.memories = []
        self.is_initialized = True

    def _filled(self, kind: str, states: torch.Tensor, room: int) -> torch.Tensor:
        batch, heads, _, dim = states.shape
        buffer = states.new_empty(batch, heads, room, dim)
        for row, layer in enumerate(self.memories):
            slots = 0 if layer is None else layer.slots
            if layer is not None:
                buffer[row, :, :slots] = getattr(layer, kind)
            # A masked slot must still hold numbers: 0 * NaN is NaN.
            buffer[row, :, slots : self.held] = 0
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new tokens ``[batch, head, query, dim]`` and returns all slots, as views."""
        start, stop = self.length, self.length + key_states.shape[2]
        if self._buffers is None:
            # Without a wish for room there will be more tokens, whose number nobody knows.
            self.reserve(stop if self._room else stop + _SPARE)
            self.lazy_initialization(key_states, value_states)
        self.reserve(stop)
        for buffer, states in zip(self._stored, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.fed += key_states.shape[2]
        return tuple(buffer[:, :, :stop] for buffer in self._stored)  # type: ignore[return-value]

    def reserve(self, slots: int) -> None:
        """Makes room for ``slots`` slots in all; grows by half at least, to copy seldom."""
        if self._buffers is None:
            self._room = max(self._room, slots)
            return
        if slots <= self._stored[0].shape[2]:
            return
        room = max(slots, self._stored[0].shape[2] * 3 // 2)
        grown = []
        for buffer in self._stored:
            larger = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
            larger[:, :, : self.length] = buffer[:, :, : self.length]
            grown.append(larger)
        self._buffers = (grown[0], grown[1])

    @property
    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is None:
            raise InvalidArgument("this layer has seen no tokens yet")
        return self._buffers

    @property
    def full(self) -> bool:
        """Whether one row fills its buffer to the last slot, so that it can be handed over."""
        keys = self._stored[0]
        return keys.shape[0] == 1 and keys.shape[2] == self.length

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values ``[batch, head, slot, dim]``, as views."""
        keys, values = self._stored
        return keys[:, :, : self.length], values[:, :, : self.length]

    def biased(self, row: int) -> bool:
        """Whether a row's memory has a static bias that is not zero."""
        if self.bias is None:
            return False
        return bool(self.bias[row if self.bias.shape[0] > 1 else 0].any())

    def recent(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of the last ``tokens`` new tokens, as views."""
        keys, values = self.states()
        return keys[:, :, -tokens:], values[:, :, -tokens:]

    def bias_at(
        self, like: torch.Tensor, active: Sequence[bool] | None = None
    ) -> torch.Tensor | None:
        """Returns the bias ``[batch or 1, query_head, slot]`` over all slots.

        It is zero for new tokens, unless ``coming`` holds theirs.

        Args:
            like: a tensor with the wanted dtype and device.
            active: whether a row's bias acts, for each row; None means that all do.
        """
        if self.bias is None and self.coming is None:
            return None
        if active is not None and not any(active):
            return None
        kept = self._bias_buffer
        if kept is None or kept.shape[2] < self.length or kept.dtype != like.dtype:
            kept = self._bias_buffer = self._laid_out(like)
        bias = kept[:, :, : self.length]
        if active is None or all(active):
            return bias
        silent = ~torch.tensor(active, device=bias.device)
        return bias.masked_fill(silent[:, None, None], 0)

    def _laid_out(self, like: torch.Tensor) -> torch.Tensor:
        coming = 0 if self.coming is None else self.coming.shape[1]
        room = max(self.length + _SPARE, self.length * 3 // 2, self.held + coming)
        rows = 1 if self.bias is None else self.bias.shape[0]
        laid = like.new_zeros(rows, self.spec.query_heads, room)
        if self.bias is not None:
            laid[:, :, : self.held] = self.bias.to(laid)
        if self.coming is not None:
            laid[:, :, self.held : self.held + coming] = self.coming.to(laid)
        return laid

    def drop_last(self, tokens: int) -> None:
        """Forgets the last ``tokens`` new tokens."""
        self.fed -= tokens

    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``rows[i]`` the i-th row."""
        if self._buffers is not None:
            device_rows = rows.to(self._stored[0].device)
            keys, values = (buffer.index_select(0, device_rows) for buffer in self._stored)
            self._buffers = (keys, values)
        else:
            self.memories = [self.memories[row] for row in rows.tolist()]
        at = rows.to(self.positions.device)
        self.positions = self.positions[at]
        self.source = self.source[rows.to(self.source.device)]
        self.valid = None if self.valid is None else self.valid[at]
        if self.bias is not None and self.bias.shape[0] > 1:
            self.bias = self.bias[rows.to(self.bias.device)]
        self._bias_buffer = None

    # What transformers asks of a layer.

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots after ``query_length`` more, and the offset of the first."""
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders rows for beam search."""
        self.select_rows(beam_idx)


def _padded_bias(
    spec: LayerSpec, memories: Sequence[LayerKV | None], held: int
) -> torch.Tensor | None:
    rows = [None if layer is None else layer.bias for layer in memories]
    if all(bias is None for bias in rows):
        return None
    shared = all(layer is memories[0] for layer in memories)
    padded = torch.zeros(1 if shared else len(rows), spec.query_heads, held)
    for row in range(padded.shape[0]):
        bias = rows[row]
        if bias is not None:
            padded[row, :, : bias.shape[1]] = bias
    return padded
