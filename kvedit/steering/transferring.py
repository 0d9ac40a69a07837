"""transfer_report: a delta in another setting, and how much of what attention reads stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from kvedit.editors.base import Reader
from kvedit.editors.steering.edit import Steer
from kvedit.errors import InvalidArgument
from kvedit.memory import Delta, KVMemory

__all__ = ["Transfer", "transfer_report"]


@dataclass(frozen=True, eq=False)
class Transfer:
    """A moved delta, and what became of its effect.

    The effect in a layer is what an edit adds to the outputs of its heads, for all tokens of a
    prompt that follows; later layers include what earlier ones hand on.

    Args:
        delta: the delta as it is used in the new setting.
        error: layer to ``|there - here| / |here|``; 0 is the same effect.
        cosine: layer to the cosine between the two effects.
        length: layer to ``|there| / |here|``.
    """

    delta: Delta
    error: Mapping[int, float]
    cosine: Mapping[int, float]
    length: Mapping[int, float]

    @property
    def worst(self) -> float:
        """Largest error of all layers."""
        return max(self.error.values())


def transfer_report(
    reader: Reader,
    memory: KVMemory,
    delta: Delta,
    prompt: str | torch.Tensor,
    *,
    steer: Steer | None = None,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
    other: KVMemory | None = None,
) -> Transfer:
    """Returns a delta in another setting, with the relative error of what attention reads there.

    Moving to another position is exact and needs no report: keys are turned to where the slot is.

    Args:
        reader: the model.
        memory: a memory in the setting that the delta is known in.
        delta: keys and values.
        prompt: a text or ids that follow the memory; its queries read the edit.
        steer: how the delta is added; None takes all its sites at strength 1, at the last slot.
        layers: the subset of layers that is left, negative from the end; None leaves all.
        dtype: dtype that delta and edited memory are rounded to; None rounds nothing.
        other: another context in place of the memory, for example a longer one.

    Raises:
        InvalidArgument: if nothing changes, or the edit has no effect on the prompt here.
        IncompatibleModel: if memory, other context and delta are not of one model.
    """
    if layers is None and dtype is None and other is None:
        raise InvalidArgument("transfer to what? Pass layers=, dtype= or other=, or several")
    edit = steer or Steer(keys=float("keys" in delta.sites), values=float("values" in delta.sites))
    moved = delta if layers is None else delta.only(layers=layers)
    if dtype is not None:
        moved = moved.map(lambda s, i, v: v.to(dtype).float(), "round", dtype=str(dtype))
    tokens = reader.encode(prompt) if isinstance(prompt, str) else torch.as_tensor(prompt)
    here = _effect(reader, memory, edit, delta, tokens, None)
    there = _effect(reader, memory if other is None else other, edit, moved, tokens, dtype)
    known = {layer: effect for layer, effect in here.items() if float(effect.norm()) > 0}
    if not known:
        raise InvalidArgument("the edit has no effect on this prompt here: nothing to compare")
    error, cosine, length = {}, {}, {}
    for layer, effect in known.items():
        size = effect.norm()
        error[layer] = float((there[layer] - effect).norm() / size)
        length[layer] = float(there[layer].norm() / size)
        cosine[layer] = float(torch.cosine_similarity(there[layer], effect, dim=0))
    return Transfer(moved, error, cosine, length)


def _effect(
    reader: Reader, memory: KVMemory, edit: Steer, delta: Delta, tokens: torch.Tensor,
    dtype: torch.dtype | None,
) -> dict[int, torch.Tensor]:  # fmt: skip
    """Returns layer to what the edit adds to heads' outputs, flat, in float64."""
    own = memory.dtype
    base = memory if dtype is None else memory.to(dtype=dtype)
    edited = edit(base, delta.operand())
    both = [reader.read(m.to(dtype=own), tokens, ("output",))["output"] for m in (edited, base)]
    return {
        layer: (states.double() - both[1][layer].double()).flatten().cpu()
        for layer, states in both[0].items()
    }
