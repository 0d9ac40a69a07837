"""LayerKV: the keys and values of one layer, their positions, their bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvedit.axes import expect_axes
from kvedit.errors import InvalidArgument
from kvedit.memory.frozen import check_versions, note_versions

__all__ = ["LayerKV"]


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One layer's slots. Immutable: edits build a new one that shares what they leave alone.

    Args:
        keys: ``[head, slot, dim]``, post-RoPE, as attention reads them; head counts KV heads.
        values: ``[head, slot, dim]``.
        positions: ``[slot]`` int64, the RoPE position at which each key is rotated.
        source: ``[slot]`` int64, index into the memory's tokens, or -1 for a slot that no token
            made.
        bias: ``[query_head, slot]`` float32, added to attention logits; ``-inf`` evicts the slot
            for that head; None means no bias.

    Raises:
        ShapeMismatch: if axes disagree.
        InvalidArgument: if a dtype is wrong or the bias holds NaN or +inf.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    source: torch.Tensor
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Checks axes and dtypes, and notes the tensors' version counters."""
        note_versions(self, self.tensors())
        expect_axes("keys", self.keys, "head slot dim")
        expect_axes("values", self.values, "head slot dim", head=self.heads, slot=self.slots)
        expect_axes("positions", self.positions, "slot", slot=self.slots)
        expect_axes("source", self.source, "slot", slot=self.slots)
        if self.positions.dtype != torch.int64 or self.source.dtype != torch.int64:
            raise InvalidArgument(
                f"positions and source must be int64, found {self.positions.dtype}, "
                f"{self.source.dtype}"
            )
        if self.bias is not None:
            self._check_bias(self.bias)

    def _check_bias(self, bias: torch.Tensor) -> None:
        expect_axes("bias", bias, "query_head slot", slot=self.slots)
        if bias.dtype != torch.float32:
            raise InvalidArgument(f"bias must be float32, found {bias.dtype}")
        if bias.shape[0] % self.heads:
            raise InvalidArgument(
                f"bias has {bias.shape[0]} query heads, no multiple of {self.heads} KV heads"
            )
        if bool((bias.isnan() | (bias == torch.inf)).any()):
            raise InvalidArgument("bias holds NaN or +inf; use finite values, or -inf to evict")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the name and tensor of every part that is there."""
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys.shape[0]

    @property
    def slots(self) -> int:
        """Slots of this layer; layers of one memory may differ."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def select(self, slots: torch.Tensor) -> LayerKV:
        """Returns the layer with only the given slots.

        Args:
            slots: bool mask ``[slot]`` or int64 indices in their new order.
        """
        index = slots.nonzero().squeeze(1) if slots.dtype == torch.bool else slots
        return LayerKV(
            keys=self.keys.index_select(1, index.to(self.keys.device)),
            values=self.values.index_select(1, index.to(self.values.device)),
            positions=self.positions[index.to(self.positions.device)],
            source=self.source[index.to(self.source.device)],
            bias=None if self.bias is None else self.bias[:, index.to(self.bias.device)],
        )

    def add_bias(self, bias: torch.Tensor) -> LayerKV:
        """Returns the layer with ``bias`` ``[query_head, slot]`` added; biases add up."""
        total = bias if self.bias is None else self.bias + bias.to(self.bias.device)
        return dataclasses.replace(self, bias=total)

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> LayerKV:
        """Returns the layer on another device, keys and values in another dtype."""
        moved = {name: tensor.to(device=device) for name, tensor in self.tensors()}
        moved["keys"] = self.keys.to(device=device, dtype=dtype)
        moved["values"] = self.values.to(device=device, dtype=dtype)
        return LayerKV(**moved)

    def check_unmodified(self) -> None:
        """Raises MutatedMemory if a tensor was written in place since this object was made."""
        check_versions(self, self.tensors())
