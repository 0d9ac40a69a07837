"""Measures compiled keys against the exact bias, on held-out queries at several distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kvedit.editors.compiling.certificate import DistanceFigures, HeadFigures
from kvedit.editors.compiling.queries import QuerySample, reach
from kvedit.editors.compiling.softmax import Sets, group_bias
from kvedit.memory import KVMemory, LayerSpec

__all__ = ["attention_logits", "certified_distances", "measure", "seen"]

_NEAR = (0, 256, 1000)


def certified_distances(length: int) -> list[int]:
    """Returns the distances from a memory's end at which a layer is certified.

    0, 256, 1000, then twice as far each time, and the last position of the range where the
    others leave much of it out.
    """
    found = [d for d in _NEAR if d < length]
    while found[-1] >= _NEAR[-1] and 2 * found[-1] < length:
        found.append(2 * found[-1])
    # A short range, as a sliding layer's, ends between two of them.
    if length - 1 > 1.25 * found[-1]:
        found.append(length - 1)
    return found


def seen(positions: torch.Tensor, spec: LayerSpec, at: int) -> torch.Tensor:
    """Returns which slots ``[slot]`` a query at position ``at`` can see."""
    if spec.window is None:
        return torch.ones_like(positions, dtype=torch.bool)
    if spec.kind == "chunked":
        return positions // spec.window == at // spec.window
    return at - positions < spec.window


def attention_logits(
    queries: torch.Tensor, keys: torch.Tensor, spec: LayerSpec, visible: torch.Tensor
) -> torch.Tensor:
    """Returns logits ``[…, query, slot]`` as attention has them in float32, softcap included.

    Args:
        queries: ``[…, query, dim]``, scaled.
        keys: ``[slot, dim]``.
        spec: facts of the layer.
        visible: ``[slot]``; the others get -inf.
    """
    logits = queries.float() @ keys.float().mT
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return logits.double().masked_fill(~visible, -torch.inf)


@dataclass(frozen=True, eq=False)
class _Readings:
    """One KV head at one distance: all ``[group, query]``."""

    distance: int
    unit: torch.Tensor
    before: torch.Tensor
    exact: torch.Tensor
    compiled: torch.Tensor
    divergence: torch.Tensor


def measure(
    memory: KVMemory, stored: Mapping[int, torch.Tensor], queries: QuerySample, horizon: int
) -> Iterator[HeadFigures]:
    """Yields the figures of every query head whose KV head has bias and can be seen.

    The achieved bias of a query on a set of slots is the change of the set's log-mass: that
    uniform bias which would give the set the same share. It is measured with the keys as
    they come out of storage, against the keys as they were. Sets with several strengths give one
    figure per unit: the slope of achieved against wanted, ``sum_c B_c a_c / sum_c B_c^2``, with B
    the bias of the group's strongest head.

    Args:
        memory: the memory with its bias.
        stored: layer to keys ``[kv_head, slot, dim]``, compiled and as storage returns them.
        queries: the model's queries.
        horizon: positions after the memory that count.
    """
    for index, keys in stored.items():
        layer, spec = memory.layers[index], memory.model.layers[index]
        sample, bias = queries.layer(index, spec), group_bias(layer, spec.group)
        for head in bias.ne(0).flatten(1).any(dim=1).nonzero().flatten().tolist():
            pair = (layer.keys[head].detach().cpu(), keys[head].detach().cpu())
            sets = Sets.of(bias[head])
            readings = []
            for distance in certified_distances(reach(memory, index, horizon)):
                at = memory.next_position + distance
                visible = seen(layer.positions.cpu(), spec, at)
                if bool((bias[head].ne(0).any(dim=0) & visible).any()):
                    held = sample.held_out[head]
                    placed = sample.placed(held, torch.full((held.shape[1],), at))
                    logits = [attention_logits(placed, k, spec, visible) for k in pair]
                    readings.append(_read(distance, logits, bias[head], sets))
            if readings:
                yield from _figures(index, head, sets, readings)


def _read(distance: int, logits: list[torch.Tensor], bias: torch.Tensor, sets: Sets) -> _Readings:
    before, after = logits
    masses, reached = sets.log_mass(before), sets.log_mass(after)
    there = torch.isfinite(masses[0, 0])
    strong = _strongest(sets.bias).masked_fill(~there, 0)
    # Sets out of sight say nothing; what was asked for stays the unit, whichever are in sight.
    missed = (reached - masses - sets.bias[:, None]).masked_fill(~there, 0)
    unit = _asked(sets)[:, None] + missed @ strong / strong.square().sum()
    chosen = strong.ne(0)
    wanted = (before + bias[:, None]).log_softmax(dim=-1)
    found = after.log_softmax(dim=-1)
    gap = (wanted - found).nan_to_num(0.0)  # slots out of sight: -inf less -inf
    return _Readings(
        distance,
        unit,
        _share(masses, chosen),
        _share(masses + sets.bias[:, None], chosen),
        _share(reached, chosen),
        (wanted.exp() * gap).sum(dim=-1),
    )


def _share(masses: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return masses.softmax(dim=-1)[..., chosen].sum(dim=-1)


def _asked(sets: Sets) -> torch.Tensor:
    """Returns what each query head ``[group]`` was asked for, per unit of the strongest."""
    strong = _strongest(sets.bias)
    return sets.bias @ strong / strong.square().sum()


def _strongest(bias: torch.Tensor) -> torch.Tensor:
    """Returns per set the bias ``[set]`` of the head in ``[group, set]`` that has the most."""
    return bias.gather(0, bias.abs().argmax(dim=0, keepdim=True))[0]


def _figures(index: int, head: int, sets: Sets, readings: list[_Readings]) -> Iterator[HeadFigures]:
    strong = _strongest(sets.bias)
    strength = float(strong[strong.abs().argmax()])
    asked = _asked(sets).tolist()
    for member, wanted in enumerate(asked):
        rows = tuple(_summary([reading], member, wanted) for reading in readings)
        total = _summary(readings, member, wanted)
        number = head * len(asked) + member
        yield HeadFigures(index, number, head, strength, wanted, total, rows)


def _summary(readings: list[_Readings], member: int, wanted: float) -> DistanceFigures:
    unit = torch.cat([reading.unit[member] for reading in readings]).double()

    def mean(name: str) -> float:
        return float(torch.cat([getattr(r, name)[member] for r in readings]).double().mean())

    return DistanceFigures(
        readings[0].distance if len(readings) == 1 else None,
        mean=float(unit.mean()),
        spread=float(unit.std(correction=0)),
        worst=float((unit - wanted).abs().max()),
        mass_before=mean("before"),
        mass_exact=mean("exact"),
        mass_compiled=mean("compiled"),
        divergence=mean("divergence"),
    )
