"""Operators: what becomes of a hidden state that is steered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["OPERATORS", "Change", "change_of"]

Change = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states ``[..., hidden]`` to steered ones, of the same dtype."""


def _add(vector: torch.Tensor, strength: float) -> Change:
    step = strength * vector
    return lambda states: states + step


def _ablate(vector: torch.Tensor, strength: float) -> Change:
    size = vector.norm()
    unit = vector / size if float(size) > 0 else vector
    return lambda states: states - strength * (states @ unit)[..., None] * unit


def _ablate_add(vector: torch.Tensor, strength: float) -> Change:
    ablate, add = _ablate(vector, 1.0), _add(vector, strength)
    return lambda states: add(ablate(states))


OPERATORS: Mapping[str, Callable[[torch.Tensor, float], Change]] = {
    "add": _add,
    "ablate": _ablate,
    "ablate_add": _ablate_add,
}
"""``"add"``: ``h + c v``. ``"ablate"``: ``h - c (h.u) u`` with ``u = v / |v|``; c = 1 projects the
direction out. ``"ablate_add"``: the direction projected out, then ``c v`` added: its component is
c times |v| for every token."""


def change_of(
    operator: str,
    vector: torch.Tensor,
    strength: float,
    preserve_norm: bool,
    like: torch.Tensor,
) -> Change:
    """Returns an operator with its vector, computed in float32 at least.

    Args:
        operator: a key of :data:`OPERATORS`.
        vector: ``[hidden]``.
        strength: c, with sign.
        preserve_norm: whether each state keeps its length.
        like: states whose dtype and device count.

    Raises:
        UnknownName: if there is no such operator.
        InvalidArgument: if the vector is of another size.
    """
    if operator not in OPERATORS:
        raise UnknownName("steering operator", operator, OPERATORS)
    if vector.shape[0] != like.shape[-1]:
        raise InvalidArgument(
            f"the delta's vectors have {vector.shape[0]} dims, this model's hidden states "
            f"{like.shape[-1]}"
        )
    wide = torch.promote_types(like.dtype, torch.float32)
    change = OPERATORS[operator](vector.to(like.device, wide), strength)
    if wide == like.dtype and not preserve_norm:
        return change

    def changed(states: torch.Tensor) -> torch.Tensor:
        given = states.to(wide)
        made = change(given)
        if preserve_norm:
            size = made.norm(dim=-1, keepdim=True)
            made = torch.where(size > 0, made * (given.norm(dim=-1, keepdim=True) / size), made)
        return made.to(states.dtype)

    return changed
