"""Shift: move a memory along the positions, keys re-rotated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kvedit.editors.base import Editor, Reader
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory, LayerKV, LayerSpec
from kvedit.models.rope import shift

__all__ = ["Shift"]


@dataclass(frozen=True)
class Shift(Editor):
    """Moves all slots by ``offset`` positions, by each layer's own RoPE.

    A shifted memory equals one captured at the offset (up to rounding), since RoPE only tells
    differences of positions. Layers without position encoding keep their keys.

    Args:
        offset: positions to move by; negative moves back.

    Raises:
        UnsupportedModel: for learned absolute positions, which are in every layer's keys and
            values and can't be moved.
        InvalidArgument: if a position would become negative, or a model with chunked attention
            would see its slots in other chunks.
        ContextTooLong: if positions would pass the model's limit, or the place where its RoPE
            changes its frequencies.
    """

    offset: int

    def __post_init__(self) -> None:
        """Checks the type."""
        if isinstance(self.offset, bool) or not isinstance(self.offset, int):
            raise InvalidArgument(f"offset must be a whole number, found {self.offset!r}")

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the moved memory."""
        memory = memories[0]
        if self.offset == 0:
            return memory
        self._check(memory)
        changed = {
            index: self._moved(layer, memory.model.layers[index])
            for index, layer in memory.layers.items()
        }
        # With the new positions comes the new end, or the checks in between would fail.
        return dataclasses.replace(
            memory, layers=changed, next_position=memory.next_position + self.offset
        )

    def _check(self, memory: KVMemory) -> None:
        spec = memory.model
        if spec.positions != "rope":
            raise UnsupportedModel(
                f"{spec.name} has {spec.positions} absolute positions: they are mixed into keys "
                "and values and can't be moved"
            )
        filled = [layer for layer in memory.layers.values() if layer.slots]
        lowest = min((int(layer.positions.min()) for layer in filled), default=0)
        end = memory.next_position + self.offset
        if lowest + self.offset < 0:
            raise InvalidArgument(f"offset {self.offset} would move position {lowest} below 0")
        if spec.max_position is not None and end > spec.max_position:
            raise ContextTooLong(
                f"{spec.name} has {spec.max_position} positions; the memory would end at {end}"
            )
        for layer in spec.layers:
            if layer.kind == "chunked" and layer.window and self.offset % layer.window:
                raise InvalidArgument(
                    f"{spec.name} attends in chunks of {layer.window} positions: a memory moves by "
                    f"whole chunks, found offset {self.offset}"
                )
            switch = layer.rope.switch if layer.rope else None
            if switch is not None and (memory.next_position > switch) != (end > switch):
                raise ContextTooLong(
                    f"{layer.rope.kind if layer.rope else ''} RoPE changes its frequencies at "
                    f"position {switch}; a memory can't be moved across it"
                )

    def _moved(self, layer: LayerKV, spec: LayerSpec) -> LayerKV:
        return dataclasses.replace(
            layer,
            keys=shift(layer.keys, spec.rope, self.offset),
            positions=layer.positions + self.offset,
        )
