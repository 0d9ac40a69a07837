"""When a bias acts: while the context reads itself, when later tokens read it, or both.

The two differ in more than time. A bias of the decode phase is kept beside the keys; every later
query sees it, the memory's own keys and values stay. In the prefill phase the context's tokens
read each other under the bias; what stays is in the keys and values of later context tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from kvedit.editors import REGISTRY, build
from kvedit.editors.base import Editor, Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.lineage import Reproducibility

__all__ = ["LayerBias", "Phase", "Phased", "bias_memory", "push"]

Phase = Literal["prefill", "decode", "both"]

LayerBias = Callable[[int, torch.Tensor], torch.Tensor]
"""``bias(layer, source)``: float32 ``[query_head, slot]`` for slots of the given tokens."""


@dataclass(frozen=True)
class Phased(Editor):
    """An editor whose bias acts in a phase that is always chosen by name.

    Args:
        phase: ``"prefill"``: the context reads itself anew under the bias, with the model, and
            keeps no bias. ``"decode"``: later tokens see the bias. ``"both"``: as the papers that
            steer a whole prompt do.
    """

    phase: Phase = field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks the phase."""
        if self.phase not in ("prefill", "decode", "both"):
            raise InvalidArgument(
                f"phase must be 'prefill', 'decode' or 'both', found {self.phase!r}"
            )

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """Whether the context is read anew."""
        return self.phase != "decode"

    @property
    def reproducibility(self) -> Reproducibility:  # type: ignore[override]
        """``"reader"`` if the context is read anew, which runs the model."""
        return "pure" if self.phase == "decode" else "reader"


def push(heads: torch.Tensor, slots: torch.Tensor, amount: float) -> torch.Tensor:
    """Returns float32 ``[query_head, slot]``: ``amount`` where both masks hold, zero elsewhere.

    Args:
        heads: bool ``[query_head]``.
        slots: bool ``[slot]``.
        amount: nats.
    """
    touched = heads[:, None] & slots.cpu()[None, :]
    return torch.zeros(touched.shape).masked_fill(touched, amount)


def bias_memory(memory: KVMemory, bias: LayerBias, phase: Phase, reader: Reader | None) -> KVMemory:
    """Returns the memory with a bias that acts in a phase.

    Bias and rules that the memory has already are of the decode phase and stay as they are.
    Reading anew starts from the tokens, so it can't follow an edit of keys or values.

    Args:
        memory: the memory.
        bias: what is added, by layer.
        phase: when.
        reader: the model; needed unless the phase is ``"decode"``.

    Raises:
        InvalidArgument: if the context is to be read anew and slots were dropped, moved or made
            by no token, or an earlier edit changed keys or values.
    """
    if phase != "decode":
        memory = _read_anew(memory, bias, reader)
    if phase == "prefill":
        return memory
    changed = {}
    for index, layer in memory.layers.items():
        added = bias(index, layer.source.cpu())
        if bool(added.any()):
            changed[index] = layer.add_bias(added.to(layer.keys.device))
    return memory.with_layers(changed)


def _read_anew(memory: KVMemory, bias: LayerBias, reader: Reader | None) -> KVMemory:
    if reader is None:
        raise InvalidArgument("the context is read anew with the model: pass reader=")
    _refuse_rewritten(memory)
    tokens = torch.arange(memory.tokens_count)
    found = {index: bias(index, tokens) for index in memory.layers}
    steered = {index: added for index, added in found.items() if bool(added.any())}
    read = reader.reread(memory, steered).to(memory.device, memory.dtype)
    kept = {
        index: replace(read.layers[index], bias=layer.bias)
        for index, layer in memory.layers.items()
    }
    return replace(memory, layers=kept)


def _refuse_rewritten(memory: KVMemory) -> None:
    for node in memory.lineage.nodes:
        if node.operation == "edit" and node.name in REGISTRY:
            editor = build(node.name, **json.loads(node.parameters))
            if editor.rewrites:
                raise InvalidArgument(
                    f"{type(editor).__name__} changed keys or values of this memory, which "
                    "reading its tokens anew would undo: let the edit that reads anew come first"
                )
