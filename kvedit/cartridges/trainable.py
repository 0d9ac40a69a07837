"""TrainableMemory: a memory whose keys and values are parameters, and back to a memory."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import nn

from kvedit.cartridges.freezing import Freeze
from kvedit.cartridges.prefix import LayerStates, Prefix
from kvedit.memory import KVMemory, LayerKV

__all__ = ["Drift", "TrainableKV", "TrainableMemory"]


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far a layer's trained slots have moved, relative to where they started.

    Args:
        keys: Frobenius norm of the change of keys over that of the keys at the start.
        values: the same of values.
        bias: root mean square change of the bias, in nats.
    """

    keys: float
    values: float
    bias: float


class TrainableKV(nn.Module):
    """One layer: the start's tensors, and parameters in place of the slots that are trained.

    Args:
        start: the layer's slots at the start; never written to.
        slots: ``[trained]`` int64, which of them are trained.
        query_heads: query heads of the layer, for a bias where the start has none.
        freeze: which kinds stay.
        master: dtype of the parameters.
    """

    start_keys: torch.Tensor
    start_values: torch.Tensor
    start_bias: torch.Tensor | None
    slots: torch.Tensor

    def __init__(
        self,
        start: LayerKV,
        slots: torch.Tensor,
        query_heads: int,
        freeze: Freeze,
        master: torch.dtype,
    ) -> None:
        """Copies the trained slots into parameters."""
        super().__init__()
        bias = start.bias
        if bias is None and not freeze.bias:
            bias = torch.zeros(query_heads, start.slots, device=start.keys.device)
        for name, tensor in (("keys", start.keys), ("values", start.values), ("bias", bias)):
            # Of its own, not the memory's tensor: a write into this module must not reach it.
            kept = None if tensor is None else tensor.detach().to(master, copy=True)
            self.register_buffer(f"start_{name}", kept, persistent=False)
        self.register_buffer("slots", slots.to(start.keys.device), persistent=False)
        self.keys = None if freeze.keys else _parameter(self.start_keys, self.slots)
        self.values = None if freeze.values else _parameter(self.start_values, self.slots)
        self.bias = None
        if not freeze.bias and self.start_bias is not None:
            # A parameter at -inf would meet Adam's epsilon; the slot is put back when it is read.
            finite = self.start_bias.masked_fill(self.start_bias == -torch.inf, 0)
            self.bias = _parameter(finite, self.slots)

    def assembled(self, kind: str) -> torch.Tensor | None:
        """Returns all slots of ``"keys"``, ``"values"`` or ``"bias"``, with gradient."""
        start: torch.Tensor | None = getattr(self, f"start_{kind}")
        trained: torch.Tensor | None = getattr(self, kind)
        if trained is None or start is None:
            return start
        whole = start.index_copy(1, self.slots, trained)
        return torch.where(start == -torch.inf, start, whole) if kind == "bias" else whole

    def drift(self) -> Drift:
        """Returns how far the trained slots are from the start."""
        change = self._change("bias")
        return Drift(
            self._relative("keys"),
            self._relative("values"),
            0.0 if change is None else float(change.square().mean().sqrt()),
        )

    def _change(self, kind: str) -> torch.Tensor | None:
        trained: torch.Tensor | None = getattr(self, kind)
        if trained is None:
            return None
        start: torch.Tensor = getattr(self, f"start_{kind}").index_select(1, self.slots)
        change = trained.detach() - start
        return change[start.isfinite()] if kind == "bias" else change

    def _relative(self, kind: str) -> float:
        change = self._change(kind)
        if change is None:
            return 0.0
        start: torch.Tensor = getattr(self, f"start_{kind}").index_select(1, self.slots)
        return float(change.norm() / start.norm().clamp_min(torch.finfo(start.dtype).tiny))


class TrainableMemory(nn.Module):
    """A start memory with parameters in place of what is trained.

    It holds no model and computes nothing: :meth:`prefix` is what a forward pass puts in front
    of a batch. Positions and ``next_position`` never change.

    Args:
        start: the memory to start from; it never changes.
        freeze: what stays.
        master: dtype of the parameters, at least as wide as the memory's own is used. None takes
            the memory's own: an update of 2e-2 then rounds to 8 bits in bfloat16.
        device: where the parameters live; None leaves them where the memory is.

    Raises:
        InvalidArgument: if nothing is left to train, layers are missing, or it has rules.
        MutatedMemory: if the start was changed in place.
    """

    def __init__(
        self,
        start: KVMemory,
        freeze: Freeze | None = None,
        master: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes the parameters."""
        super().__init__()
        start.check_unmodified()
        moved = start if device is None else start.to(device)
        self.start, self.freeze = start, freeze or Freeze()
        fixed = Prefix.of(moved)
        self._fixed = fixed.layers
        self._next_position = fixed.next_position
        wide = start.dtype if master is None else torch.promote_types(master, start.dtype)
        self.layers = nn.ModuleDict(
            {
                str(index): TrainableKV(
                    moved.layers[index],
                    slots,
                    start.model.layers[index].query_heads,
                    self.freeze,
                    wide,
                )
                for index, slots in self.freeze.trained(start).items()
            }
        )

    def trained(self) -> dict[int, TrainableKV]:
        """Returns the layers that have parameters."""
        return {int(name): cast(TrainableKV, layer) for name, layer in self.layers.items()}

    def prefix(self) -> Prefix:
        """Returns all slots of all layers; trained ones carry the gradient."""
        found = list(self._fixed)
        for index, layer in self.trained().items():
            keys, values = layer.assembled("keys"), layer.assembled("values")
            found[index] = LayerStates(
                found[index].keys if keys is None else keys,
                found[index].values if values is None else values,
                found[index].positions,
                layer.assembled("bias"),
            )
        return Prefix(tuple(found), self._next_position)

    def drift(self) -> dict[int, Drift]:
        """Returns how far each trained layer has moved."""
        return {index: layer.drift() for index, layer in self.trained().items()}

    @torch.no_grad()
    def to_memory(self) -> KVMemory:
        """Returns what was trained as a memory, in the start's dtype and on its device.

        Layers of which nothing is trained, and kinds that stay, are shared with the start. The
        memory keeps the start's source; trained slots name no token any more (source -1). Its
        lineage is the start's: who trained adds the step.
        """
        changed = {
            index: self._layer(self.start.layers[index], layer)
            for index, layer in self.trained().items()
        }
        return self.start.with_layers(changed)

    def _layer(self, start: LayerKV, trained: TrainableKV) -> LayerKV:
        found = {
            kind: self._rounded(start, trained, kind)
            for kind in ("keys", "values", "bias")
            if getattr(trained, kind) is not None
        }
        source = start.source.clone()
        source[trained.slots.to(source.device)] = -1
        return dataclasses.replace(start, **found, source=source)

    def _rounded(self, start: LayerKV, trained: TrainableKV, kind: str) -> torch.Tensor:
        whole = cast(torch.Tensor, trained.assembled(kind))
        if kind == "bias":
            return whole.to(device=start.keys.device, dtype=torch.float32, copy=True)
        return whole.to(start.keys, copy=True)


def _parameter(start: torch.Tensor, slots: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(start.index_select(1, slots))
