"""Rotary position embedding by a layer's own convention: rotate, un-rotate, shift.

Su et al. 2021 (RoFormer), eq. 34: a pair of dims ``(x, y)`` at position m turns by
``m * inv_freq``.
Angles are computed in float64 from the frequencies in use, so an error of a shift is that of the
float32 angles at which the model rotated its keys, not ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange

from kvedit.errors import InvalidArgument

if TYPE_CHECKING:
    from kvedit.memory import RopeSpec

__all__ = ["angles", "rotate", "shift", "turn", "unrotate"]


def angles(rope: RopeSpec, positions: torch.Tensor) -> torch.Tensor:
    """Returns the angle of every pair.

    Args:
        rope: the layer's rotation.
        positions: ``[slot]`` integer positions or differences of positions.

    Returns:
        ``[slot, pair]`` float64, radians.
    """
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float64, device=positions.device)
    return positions.to(torch.float64)[..., None] * frequencies


def turn(states: torch.Tensor, rope: RopeSpec, positions: torch.Tensor) -> torch.Tensor:
    """Turns ``states`` by ``positions``, without the type's scaling factor.

    Args:
        states: ``[..., slot, dim]``; dims from ``rope.rotated`` on are left alone.
        rope: the layer's rotation.
        positions: ``[slot]`` integers; negative ones turn back.

    Returns:
        Same shape and dtype; computed in float32 at least.

    Raises:
        InvalidArgument: if the head size is below the number of rotated dims.
    """
    if states.shape[-1] < rope.rotated:
        raise InvalidArgument(
            f"RoPE rotates {rope.rotated} dims, found states of {states.shape[-1]} dims"
        )
    theta = angles(rope, positions.to(states.device))
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    cos, sin = theta.cos().to(wide), theta.sin().to(wide)
    rotated = states[..., : rope.rotated].to(wide)
    pattern = {"half": "(two pair)", "interleaved": "(pair two)"}[rope.layout]
    first, second = rearrange(rotated, f"... slot {pattern} -> two ... slot pair", two=2)
    turned = rearrange(
        torch.stack((first * cos - second * sin, second * cos + first * sin)),
        f"two ... slot pair -> ... slot {pattern}",
    ).to(states.dtype)
    return torch.cat((turned, states[..., rope.rotated :]), dim=-1)


def rotate(states: torch.Tensor, rope: RopeSpec | None, positions: torch.Tensor) -> torch.Tensor:
    """Returns pre-RoPE ``states`` ``[..., slot, dim]`` as the layer rotates them at ``positions``.

    ``rope=None`` is a layer without position encoding: states are returned as they are.
    """
    return states if rope is None else _scaled(turn(states, rope, positions), rope, rope.scaling)


def unrotate(states: torch.Tensor, rope: RopeSpec | None, positions: torch.Tensor) -> torch.Tensor:
    """Returns post-RoPE ``states`` ``[..., slot, dim]`` as they were before rotation."""
    if rope is None:
        return states
    return turn(_scaled(states, rope, 1.0 / rope.scaling), rope, -positions)


def shift(states: torch.Tensor, rope: RopeSpec | None, offset: torch.Tensor | int) -> torch.Tensor:
    """Returns post-RoPE ``states`` ``[..., slot, dim]`` moved by ``offset`` positions.

    Args:
        states: keys or queries as attention reads them.
        rope: the layer's rotation, or None.
        offset: one number, or ``[slot]`` of them.
    """
    if rope is None:
        return states
    steps = torch.as_tensor(offset, device=states.device).expand(states.shape[-2])
    return turn(states, rope, steps)


def _scaled(states: torch.Tensor, rope: RopeSpec, factor: float) -> torch.Tensor:
    if factor == 1.0:
        return states
    rotated = states[..., : rope.rotated] * factor
    return torch.cat((rotated.to(states.dtype), states[..., rope.rotated :]), dim=-1)
