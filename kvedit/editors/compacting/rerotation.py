"""rerotate: kept slots at positions 0, 1, 2, … and what follows behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from kvedit.editors.compacting.candidates import reachable
from kvedit.editors.compacting.layout import Laid
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory, LayerKV, LayerSpec
from kvedit.models.rope import turn

__all__ = ["check_rotatable", "rerotate"]


def check_rotatable(memory: KVMemory) -> None:
    """Raises unless every key's position is known and can be changed.

    Raises:
        UnsupportedModel: for learned absolute positions.
        InvalidArgument: if an earlier step packed the memory and left slots where they stood.
    """
    spec = memory.model
    if spec.positions == "learned":
        raise UnsupportedModel(
            f"{spec.name} has learned absolute positions: they are mixed into keys and values and "
            "can't be moved; take rerotate=False"
        )
    if any(_packs_in_place(json.loads(node.parameters)) for node in memory.lineage.nodes
           if node.operation == "edit"):  # fmt: skip
        raise InvalidArgument(
            "this memory was packed: its heads' slots stand at positions that it does not record; "
            "rerotate in the step that packs"
        )


def _packs_in_place(parameters: Any) -> bool:
    if isinstance(parameters, list):
        return any(map(_packs_in_place, parameters))
    if not isinstance(parameters, dict):
        return False
    packs = parameters.get("layout") == "packed" and parameters.get("rerotate") is False
    return packs or any(map(_packs_in_place, parameters.values()))


def rerotate(memory: KVMemory, laid: Mapping[int, Laid]) -> KVMemory:
    """Returns the memory with the given layers, all of its slots moved to the front.

    Layers without a window count their slots from 0, each KV head its own where they are packed;
    slots that stood at one position stay together. A layer with a window moves as a whole and
    keeps its distances to the next token, since windows are made of distances; what lies before
    the window is dropped. The next position is the smallest that has room for all.

    Args:
        memory: the memory before.
        laid: layers that changed, with their true positions.

    Raises:
        ContextTooLong: if the memory would move across a change of RoPE's frequencies.
    """
    whole = {
        index: laid.get(index) or Laid(layer, layer.positions)
        for index, layer in memory.layers.items()
    }
    targets: dict[int, torch.Tensor] = {}
    needed = 1
    for index, found in whole.items():
        spec = memory.model.layers[index]
        if spec.window is None:
            targets[index] = _ranks(found.at)
            needed = max(needed, int(targets[index].max()) + 1 if found.layer.slots else 0)
        else:
            whole[index] = found = _within_reach(found, spec, memory.next_position)
            first = int(found.at.min()) if found.layer.slots else memory.next_position
            needed = max(needed, memory.next_position - first)
    end = _end(memory, needed)
    _check_frequencies(memory, end)
    for index, found in whole.items():
        targets.setdefault(index, found.at - (memory.next_position - end))
    layers = {
        index: _moved(found, targets[index], memory.model.layers[index])
        for index, found in whole.items()
    }
    return dataclasses.replace(memory, layers=layers, next_position=end)


def _ranks(at: torch.Tensor) -> torch.Tensor:
    """Returns each position's place among the different ones of its row."""
    if at.ndim == 1:
        places: torch.Tensor = torch.unique(at, return_inverse=True)[1]
        return places
    return torch.stack([_ranks(row) for row in at])


def _within_reach(found: Laid, spec: LayerSpec, next_position: int) -> Laid:
    seen = reachable(found.at, spec, next_position)
    if bool(seen.all()):
        return found
    layer = found.layer.select(seen)
    return Laid(layer, layer.positions)


def _end(memory: KVMemory, needed: int) -> int:
    # Chunks start at multiples of their size, so chunked layers move by whole chunks.
    chunks = {s.window for s in memory.model.layers if s.kind == "chunked" and s.window}
    for size in chunks:
        needed += (memory.next_position - needed) % size
    return needed


def _check_frequencies(memory: KVMemory, end: int) -> None:
    for layer in memory.model.layers:
        switch = layer.rope.switch if layer.rope else None
        if switch is not None and (memory.next_position > switch) != (end > switch):
            raise ContextTooLong(
                f"{layer.rope.kind if layer.rope else ''} RoPE changes its frequencies at position "
                f"{switch}; a memory can't be moved across it: take rerotate=False"
            )


def _moved(found: Laid, target: torch.Tensor, spec: LayerSpec) -> LayerKV:
    layer, steps = found.layer, target - found.at
    nominal = target if target.ndim == 1 else target.amax(dim=0)
    if not bool(steps.any()) and torch.equal(nominal.cpu(), layer.positions.cpu()):
        return layer
    keys = layer.keys if spec.rope is None else turn(layer.keys, spec.rope, steps)
    return dataclasses.replace(layer, keys=keys, positions=nominal.to(layer.positions.device))
