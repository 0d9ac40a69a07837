"""Steer: a delta's values, and its keys turned to where each slot stands, added once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, repeat

from kvedit.editors.base import Editor, Reader
from kvedit.editors.steering.slots import At, as_at, check_own_positions, slot_masks
from kvedit.editors.target import as_heads, as_indices, as_number
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory import Delta, HeadSet, KVMemory, LayerKV, LayerSpec
from kvedit.memory.delta import DELTA
from kvedit.models.rope import rotate

__all__ = ["Steer"]


@dataclass(frozen=True)
class Steer(Editor):
    """``v_j += c_v s_v`` and ``k_j += c_k R(p_j) s_k`` at chosen slots, once: no hook is needed.

    Belitsky et al. 2025 (KV cache steering, arXiv 2507.08799), where the slot is that of the
    prompt's last token. Keys of a delta are kept before RoPE, so each slot gets the key turned to
    its own position by its layer's own RoPE (there they are added as averaged after it). Called
    with an operand of kind "delta" (``delta.operand()``) behind the memory.

    ``source``, ``positions``, ``next_position``, dtype and bias stay. Edits add up, unless norms
    are preserved. Heads for which a slot is masked (bias -inf) keep it as it is. A layer that no
    longer holds a slot, as sliding ones do, is skipped; if none holds it, that is refused.

    Args:
        keys: c_k, with sign; 0 leaves keys alone.
        values: c_v, with sign; 0 leaves values alone.
        at: ``"last"``: the slot of the last token. A number below 0: as many tokens from the end.
            ``"all"``: every slot. Spans: one or several; the text "last" or "all" is found by
            ``{"text": "last"}``.
        layers: layers to touch, negative from the end; None means all that the delta has. The
            paper leaves out the first.
        kv_heads: KV heads by layer; None means all.
        preserve_norm: whether a changed key or value is scaled back to the length that it had.

    Raises:
        InvalidArgument: if a parameter is out of range, query heads are given, the delta has no
            vector at a site that is steered, or keys of packed slots are.
        SpanNotFound: if no chosen layer holds a chosen slot.
        UnknownName: if the delta lacks a layer that is named.
        IncompatibleModel: if another model made the delta.
    """

    rewrites: ClassVar[bool] = True
    operands: ClassVar[tuple[str, ...]] = (DELTA,)

    keys: float = 0.0
    values: float = 1.0
    at: At = "last"
    layers: tuple[int, ...] | None = None
    kv_heads: HeadSet | None = None
    preserve_norm: bool = False

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        for name in ("keys", "values"):
            object.__setattr__(self, name, as_number(name, getattr(self, name)))
        object.__setattr__(self, "at", as_at(self.at))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        object.__setattr__(self, "kv_heads", as_heads(self.kv_heads, "kv"))
        if self.kv_heads is not None and self.kv_heads.kind != "kv":
            raise InvalidArgument(
                "keys and values belong to KV heads, found query heads: HeadSet.to_kv(spec) gives "
                "those whose groups hold them"
            )
        if not isinstance(self.preserve_norm, bool):
            raise InvalidArgument(f"preserve_norm: expected a bool, found {self.preserve_norm!r}")

    def check_inputs(self, memories: tuple[KVMemory, ...]) -> None:
        """Checks that there is one memory, then an operand of kind "delta"."""
        if any(isinstance(memory, Delta) for memory in memories):
            raise InvalidArgument("Steer takes a delta as an operand: pass delta.operand()")
        super().check_inputs(memories)

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the steered memory."""
        memory, operand = memories
        delta = Delta.of(operand)
        delta.require_same_model(memory.model)
        masks = slot_masks(memory, self.at, self._layers(memory, delta))
        if self.keys:
            check_own_positions(memory, masks)
        if not self.keys and not self.values:
            return memory
        changed = {}
        for index, slots in masks.items():
            heads = self._heads(memory, index)
            layer, spec = memory.layers[index], memory.model.layers[index]
            touched = heads[:, None] & slots[None, :] & ~_masked(layer, spec)
            if bool(touched.any()):
                changed[index] = self._steered(layer, spec, delta, index, touched)
        return memory.with_layers(changed)

    def _layers(self, memory: KVMemory, delta: Delta) -> list[int]:
        """Returns the layers that are steered: those of the delta, or the named ones."""
        if not set(delta.sites) & {"keys", "values"}:
            raise InvalidArgument(
                f"this delta has only {' and '.join(delta.sites)}, which no slot holds. "
                "Add it while the model runs (kvedit.steering.steered), or fit keys and values "
                "that do alike (kvedit.steering.compile_residual)"
            )
        sites = [site for site in ("keys", "values") if getattr(self, site)]
        for site in sites:
            if site not in delta.sites:
                raise InvalidArgument(
                    f"{site}={getattr(self, site):g}, and this delta has no {site} (it has "
                    f"{', '.join(delta.sites)}): pass {site}=0, or extract them"
                )
        steered = sites or ("keys", "values")
        known = sorted({i for site in steered for i in delta.vectors.get(site, {})})
        if self.layers is None:
            return [index for index in known if index in memory.layers]
        chosen = sorted(set(memory.layer_indices(self.layers)))
        for index in chosen:
            if index not in known:
                raise UnknownName("layer of the delta", str(index), map(str, known))
        return chosen

    def _heads(self, memory: KVMemory, index: int) -> torch.Tensor:
        """Returns the KV heads of a layer that are steered, bool ``[kv_head]``."""
        if self.kv_heads is None:
            return torch.ones(memory.model.layers[index].kv_heads, dtype=torch.bool)
        self.kv_heads.check(memory.model)
        chosen = torch.zeros(memory.model.layers[index].kv_heads, dtype=torch.bool)
        for layer, numbers in self.kv_heads.heads:
            if layer == index:
                chosen[list(numbers)] = True
        return chosen

    def _steered(
        self, layer: LayerKV, spec: LayerSpec, delta: Delta, index: int, touched: torch.Tensor
    ) -> LayerKV:
        """Returns the layer with vectors added where ``touched`` ``[kv_head, slot]`` holds."""
        slots = touched.any(dim=0).nonzero().squeeze(1)
        changed = {}
        for site, strength in (("keys", self.keys), ("values", self.values)):
            vector = delta.vectors.get(site, {}).get(index)
            if not strength or vector is None:
                continue
            states: torch.Tensor = getattr(layer, site)
            wide = torch.promote_types(states.dtype, torch.float32)
            added = repeat(vector.to(states.device, wide), "kv_head dim -> kv_head slot dim",
                           slot=len(slots))  # fmt: skip
            if site == "keys":
                at = layer.positions[slots.to(layer.positions.device)]
                added = rotate(added, spec.rope, at)
            changed[site] = self._added(states, strength * added, touched, slots)
        return dataclasses.replace(layer, **changed)

    def _added(
        self, states: torch.Tensor, added: torch.Tensor, touched: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        index = slots.to(states.device)
        old = states[:, index]
        new = old.to(added.dtype) + added
        if self.preserve_norm:
            length = new.norm(dim=-1, keepdim=True)
            scale = old.to(added.dtype).norm(dim=-1, keepdim=True) / length
            new = torch.where(length > 0, new * scale, new)
        chosen = touched[:, slots].to(states.device)[:, :, None]
        changed = states.clone()
        changed[:, index] = torch.where(chosen, new.to(old.dtype), old)
        return changed


def _masked(layer: LayerKV, spec: LayerSpec) -> torch.Tensor:
    """Returns the slots that no query head of a KV head sees, bool ``[kv_head, slot]``."""
    if layer.bias is None:
        return torch.zeros(layer.heads, layer.slots, dtype=torch.bool)
    grouped = rearrange(
        layer.bias.cpu(), "(kv_head group) slot -> kv_head group slot", group=spec.group
    )
    return (grouped == -torch.inf).all(dim=1)
