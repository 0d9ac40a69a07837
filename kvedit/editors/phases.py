"""When an edit acts: while the context reads itself, when later tokens read it, or both.

The two differ in more than time. A bias of the decode phase is kept beside the keys; every later
query sees it, the memory's own keys and values stay. In the prefill phase the context's tokens
read each other under the bias; what stays is in the keys and values of later context tokens. The
same holds of keys that are changed: for later queries, for the context, or for both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from kvedit.editors import REGISTRY, build
from kvedit.editors.base import Editor, KeyChange, Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.lineage import Reproducibility

__all__ = ["LayerBias", "Phase", "Phased", "bias_memory", "push", "read_anew"]

Phase = Literal["prefill", "decode", "both"]

LayerBias = Callable[[int, torch.Tensor], torch.Tensor]
"""``bias(layer, source)``: float32 ``[query_head, slot]`` for slots of the given tokens."""


@dataclass(frozen=True)
class Phased(Editor):
    """An editor that acts in a phase, which is always chosen by name unless a subclass says more.

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
        tokens = torch.arange(memory.tokens_count)
        memory = read_anew(memory, reader, bias={i: bias(i, tokens) for i in memory.layers})
    if phase == "prefill":
        return memory
    changed = {}
    for index, layer in memory.layers.items():
        added = bias(index, layer.source.cpu())
        if bool(added.any()):
            changed[index] = layer.add_bias(added.to(layer.keys.device))
    return memory.with_layers(changed)


def read_anew(
    memory: KVMemory,
    reader: Reader | None,
    *,
    bias: Mapping[int, torch.Tensor] | None = None,
    keys: Mapping[int, KeyChange] | None = None,
) -> KVMemory:
    """Returns the memory as it is when its tokens read each other under bias or changed keys.

    Its own bias and rules, which are of the decode phase, stay; what is given here is not kept.

    Args:
        memory: the memory.
        reader: the model.
        bias: layer to float32 ``[query_head, token]``; one of zeros counts for none.
        keys: layer to what turns its keys into those that the context reads.

    Raises:
        InvalidArgument: without a reader, if slots were dropped, moved or made by no token, or an
            earlier edit changed keys or values.
    """
    if reader is None:
        raise InvalidArgument("the context is read anew with the model: pass reader=")
    _refuse_rewritten(memory)
    steered = {index: added for index, added in (bias or {}).items() if bool(added.any())}
    read = reader.reread(memory, steered, keys or {}).to(memory.device, memory.dtype)
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
