"""ReplayReport: how far a memory that was made again is from the stored one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvedit.memory import KVMemory, LayerKV, LineageNode

__all__ = ["Deviation", "ReplayReport", "compare_replay"]

_CLASSES = ("pure", "reader", "trained")


@dataclass(frozen=True)
class Deviation:
    """The distance between two tensors of one kind, over all layers.

    Args:
        max_abs: largest absolute difference; inf where one side has other slots, or evicts a slot.
        relative: largest ``‖stored − again‖ / ‖stored‖`` of a layer; inf likewise.
    """

    max_abs: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True)
class ReplayReport:
    """What a replay came to.

    Args:
        bit_equal: whether all tensors have the same bits: keys, values, positions, source, bias,
            tokens and their offsets; and whether next position and rules are equal.
        digest_equal: whether the content digests are equal; covers text, messages and model, too.
        lineage_equal: whether the steps are the same.
        reproducibility: class of the head: ``"pure"``, ``"reader"`` or ``"trained"``; ``""``
            without a lineage.
        weakest: the class that promises least among all steps of the lineage.
        deviations: by kind: ``keys``, ``values``, ``positions``, ``source``, ``bias``.
        environment: ``(step, entry, stored, again)`` for every entry that differs, for example
            ``("edit drop", "threads", "1", "2")``; ``""`` where a side has no such entry.
    """

    bit_equal: bool
    digest_equal: bool
    lineage_equal: bool
    reproducibility: str
    weakest: str
    deviations: dict[str, Deviation]
    environment: tuple[tuple[str, str, str, str], ...]

    def __repr__(self) -> str:
        """A few lines: equality, class, distances, what ran elsewhere."""
        answers = {
            "bit-equal": self.bit_equal,
            "content digest equal": self.digest_equal,
            "lineage equal": self.lineage_equal,
        }
        said = ", ".join(f"{name}: {'yes' if fact else 'no'}" for name, fact in answers.items())
        lines = [f"ReplayReport: {said}"]
        lines.append(f"class {self.reproducibility or 'unknown'}, weakest step {self.weakest}")
        for kind, found in self.deviations.items():
            if found.max_abs:
                lines.append(f"{kind}: max {found.max_abs:.3g}, relative {found.relative:.3g}")
        lines += [f"{step}: {entry} {a} -> {b}" for step, entry, a, b in self.environment]
        return "\n".join(lines)


def compare_replay(stored: KVMemory, again: KVMemory) -> ReplayReport:
    """Returns how far ``again`` is from ``stored``, slot by slot, and what ran elsewhere.

    Raises:
        MutatedMemory: if a tensor was written in place.
    """
    classes = [node.reproducibility for node in stored.lineage.nodes]
    head = stored.lineage.head
    return ReplayReport(
        bit_equal=_bit_equal(stored, again),
        digest_equal=stored.digest == again.digest,
        lineage_equal=_ids(stored) == _ids(again),
        reproducibility=head.reproducibility if head else "",
        weakest=max(classes, key=_rank, default=""),
        deviations={
            kind: _deviation(kind, stored, again)
            for kind in ("keys", "values", "positions", "source", "bias")
        },
        environment=tuple(_environments(stored, again)),
    )


def _rank(name: str) -> int:
    return _CLASSES.index(name) if name in _CLASSES else len(_CLASSES)


def _ids(memory: KVMemory) -> list[str]:
    return [node.id for node in memory.lineage.nodes]


def _tensors(memory: KVMemory) -> dict[tuple[int, str], torch.Tensor]:
    found = {(i, k): t for i, layer in memory.layers.items() for k, t in layer.tensors()}
    if memory.source is not None:
        found.update({(-1, name): tensor for name, tensor in memory.source.tensors()})
    return found


def _bit_equal(stored: KVMemory, again: KVMemory) -> bool:
    first, second = _tensors(stored), _tensors(again)
    facts = [(m.next_position, m.rules) for m in (stored, again)]
    same = facts[0] == facts[1] and first.keys() == second.keys()
    return same and all(_same_bits(first[name], second[name]) for name in first)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes: NaN is equal to itself, 0.0 and -0.0 differ.
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _deviation(kind: str, stored: KVMemory, again: KVMemory) -> Deviation:
    if stored.layers.keys() != again.layers.keys():
        return Deviation(math.inf, math.inf)
    heads = {index: stored.model.layers[index].query_heads for index in stored.layers}
    found = [
        _distance(*(_part(kind, memory.layers[index], heads[index]) for memory in (stored, again)))
        for index in stored.layers
    ]
    return Deviation(max(one.max_abs for one in found), max(one.relative for one in found))


def _part(kind: str, layer: LayerKV, query_heads: int) -> torch.Tensor:
    tensor: torch.Tensor | None = getattr(layer, kind)
    return torch.zeros(query_heads, layer.slots) if tensor is None else tensor.detach().cpu()


def _distance(a: torch.Tensor, b: torch.Tensor) -> Deviation:
    if a.shape != b.shape:
        return Deviation(math.inf, math.inf)
    first, second = a.double(), b.double()
    # Slots that both evict differ by inf - inf; they are equal.
    same = (first == second) | (first.isnan() & second.isnan())
    gap = torch.where(same, torch.zeros(()).double(), (first - second).abs())
    gap = gap.nan_to_num(nan=math.inf, posinf=math.inf)
    if not bool(gap.any()):
        return Deviation()
    size = float(torch.where(first.isfinite(), first, 0.0).norm())
    return Deviation(float(gap.max()), float(gap.norm()) / size if size else math.inf)


def _environments(stored: KVMemory, again: KVMemory) -> Iterator[tuple[str, str, str, str]]:
    others = {node.id: node for node in again.lineage.nodes}
    seen = set()
    for node in stored.lineage.nodes:
        for entry, a, b in _changes(node, others.get(node.id, node)):
            line = (f"{node.operation} {node.name}", entry, a, b)
            if line not in seen:
                seen.add(line)
                yield line


def _changes(stored: LineageNode, again: LineageNode) -> Iterator[tuple[str, str, str]]:
    first, second = dict(stored.environment), dict(again.environment)
    for entry in sorted(first.keys() | second.keys()):
        pair = first.get(entry, ""), second.get(entry, "")
        if pair[0] != pair[1]:
            yield entry, *pair
