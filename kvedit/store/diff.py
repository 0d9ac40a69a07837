"""Diff: what two stored memories share, where they differ, and in which slots most."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.memory import KVMemory, LayerKV
from kvedit.memory.compare import Comparison, align, compare
from kvedit.memory.show import human_bytes
from kvedit.store.recipes import is_recipe
from kvedit.store.records import Record

if TYPE_CHECKING:
    from kvedit.store.store import Store

__all__ = ["BlockDiff", "MemoryDiff", "SlotChange", "diff_blocks", "diff_memories"]


@dataclass(frozen=True)
class BlockDiff:
    """Blocks of two memories; equal ones are stored once.

    Bytes are those of tensors, before any codec.

    Args:
        shared: blocks that both have.
        shared_bytes: their bytes.
        only_a: blocks that only a has.
        only_a_bytes: their bytes.
        only_b: blocks that only b has.
        only_b_bytes: their bytes.
    """

    shared: int
    shared_bytes: int
    only_a: int
    only_a_bytes: int
    only_b: int
    only_b_bytes: int

    def __str__(self) -> str:
        """One line."""
        return (
            f"blocks: {self.shared} shared ({human_bytes(self.shared_bytes)}), {self.only_a} only "
            f"in a ({human_bytes(self.only_a_bytes)}), {self.only_b} only in b "
            f"({human_bytes(self.only_b_bytes)})"
        )


@dataclass(frozen=True)
class SlotChange:
    """How one slot differs, over all heads.

    Args:
        layer: layer index.
        slot_a: its place among the layer's slots of a.
        slot_b: likewise of b.
        token: the source token that made it, or -1.
        text: what that token spells; empty where it is unknown.
        keys: L2 norm of the difference of its keys, over heads and dims.
        values: likewise of its values.
        relative: the larger of both as a share of a's own norm.
        bias: largest difference of its bias in nats; inf where one evicts it.
    """

    layer: int
    slot_a: int
    slot_b: int
    token: int
    text: str
    keys: float
    values: float
    relative: float
    bias: float


@dataclass(frozen=True, eq=False)
class MemoryDiff:
    """How two stored memories differ.

    Args:
        a: the first version.
        b: the second.
        blocks: what they share on the disk.
        comparison: distances per layer and head, over the slots that both have.
        slots: the slots that both have and that changed most, the largest change first.
        changed: how many slots changed, over all layers.
        steps_a: steps that only a's lineage has, the oldest first, one line each.
        steps_b: likewise of b.
    """

    a: Record
    b: Record
    blocks: BlockDiff
    comparison: Comparison
    slots: tuple[SlotChange, ...]
    changed: int
    steps_a: tuple[str, ...]
    steps_b: tuple[str, ...]

    def __repr__(self) -> str:
        """The blocks, a line per layer that differs, and the steps."""
        lines = [str(self.blocks), repr(self.comparison), f"{self.changed} slots changed"]
        lines += [f"only in a: {step}" for step in self.steps_a]
        lines += [f"only in b: {step}" for step in self.steps_b]
        return "\n".join(lines)


def diff_blocks(store: Store, a: str, b: str) -> BlockDiff:
    """Returns which blocks two stored memories share, from their manifests alone.

    A memory that is kept as a recipe has the blocks that it would have, for which it is rebuilt.

    Args:
        store: the store that has both.
        a: the first memory.
        b: the second.

    Raises:
        NotFound: if the store has no such memory.
        CorruptMemory: if a manifest is damaged.
    """
    return _block_diff(*(_sizes(store, store._resolve(ref)) for ref in (a, b)))


def diff_memories(store: Store, a: str, b: str, slots: int = 10) -> MemoryDiff:
    """Returns how ``b`` differs from ``a``: blocks, layers, slots and steps.

    Slots are matched as :func:`kvedit.memory.compare` matches them, and ordered by the larger of
    their relative change and their change of bias.

    Args:
        store: the store that has both.
        a: the first memory.
        b: the second.
        slots: how many changed slots to list at most.

    Raises:
        NotFound: if the store has no such memory.
        CorruptMemory: if stored bytes are not those that were put.
        IncompatibleModel: if the two come from models of different shape, or share no layer.
    """
    records = store._resolve(a), store._resolve(b)
    first, second = (store.get(record.record) for record in records)
    comparison = compare(first, second)
    found, changed = _slot_changes(first, second, comparison.layers, slots)
    return MemoryDiff(
        *records,
        blocks=_block_diff(*(_sizes(store, record) for record in records)),
        comparison=comparison,
        slots=found,
        changed=changed,
        steps_a=_steps(first, second),
        steps_b=_steps(second, first),
    )


def _sizes(store: Store, record: Record) -> dict[str, int]:
    if is_recipe(record):
        return {block.digest: block.tensor.nbytes for block in store.get(record.record).cut()}
    manifest = store._finder.manifest(record.record, record.content)
    parts = manifest.parts.values()
    return {block.digest: block.nbytes for part in parts for block in part.blocks}


def _block_diff(a: Mapping[str, int], b: Mapping[str, int]) -> BlockDiff:
    both, left, right = a.keys() & b.keys(), a.keys() - b.keys(), b.keys() - a.keys()
    return BlockDiff(
        shared=len(both),
        shared_bytes=sum(a[digest] for digest in both),
        only_a=len(left),
        only_a_bytes=sum(a[digest] for digest in left),
        only_b=len(right),
        only_b_bytes=sum(b[digest] for digest in right),
    )


def _steps(one: KVMemory, other: KVMemory) -> tuple[str, ...]:
    shared = {node.id for node in other.lineage.nodes}
    return tuple(node.describe() for node in one.lineage.nodes if node.id not in shared)


def _slot_changes(
    a: KVMemory, b: KVMemory, layers: Collection[int], most: int
) -> tuple[tuple[SlotChange, ...], int]:
    """Returns the slots that changed most, and how many changed."""
    found: list[SlotChange] = []
    changed = 0
    for index in layers:
        changes = _layer_changes(a.layers[index], b.layers[index])
        rank = torch.maximum(changes["relative"], changes["bias"])
        moved = rank > 0
        changed += int(moved.sum())
        # A slot that is not among a layer's largest is not among the largest of all.
        for row in rank.topk(min(most, int(moved.sum()))).indices.tolist():
            found.append(_slot_change(a, index, changes, row))
    found.sort(key=lambda one: (-max(one.relative, one.bias), one.layer, one.slot_a))
    return tuple(found[:most]), changed


def _layer_changes(a: LayerKV, b: LayerKV) -> dict[str, torch.Tensor]:
    """Returns tensors ``[slot]`` over the slots that both have."""
    in_a, in_b = align(a, b)
    found = {"slot_a": in_a, "slot_b": in_b, "token": a.source.cpu()[in_a]}
    relative = torch.zeros(len(in_a))
    for kind in ("keys", "values"):
        first, second = (
            tensor[:, index].detach().float().cpu()
            for tensor, index in ((getattr(a, kind), in_a), (getattr(b, kind), in_b))
        )
        norms, own = (first - second).norm(dim=(0, 2)), first.norm(dim=(0, 2))
        found[kind] = norms
        relative = torch.maximum(relative, norms / own.clamp_min(1e-30))
    return {**found, "relative": relative, "bias": _bias_change(a, b, in_a, in_b)}


def _bias_change(a: LayerKV, b: LayerKV, in_a: torch.Tensor, in_b: torch.Tensor) -> torch.Tensor:
    sides = [
        None if layer.bias is None else layer.bias.detach().cpu()[:, index]
        for layer, index in ((a, in_a), (b, in_b))
    ]
    given = [side for side in sides if side is not None]
    if not given:
        return torch.zeros(len(in_a))
    first, second = (torch.zeros_like(given[0]) if side is None else side for side in sides)
    # Slots that both evict differ by inf - inf; they are equal.
    gap = torch.where(first == second, torch.zeros(()), (first - second).abs())
    return gap.amax(dim=0) if gap.numel() else torch.zeros(len(in_a))


def _slot_change(
    a: KVMemory, layer: int, changes: Mapping[str, torch.Tensor], row: int
) -> SlotChange:
    whole = {name: int(changes[name][row]) for name in ("slot_a", "slot_b", "token")}
    real = {name: float(changes[name][row]) for name in ("keys", "values", "relative", "bias")}
    text = ""
    if a.source is not None and 0 <= whole["token"] < len(a.source):
        start, stop = a.source.offsets[whole["token"]].tolist()
        text = a.source.text[start:stop]
    return SlotChange(layer=layer, **whole, text=text, **real)  # type: ignore[arg-type]
