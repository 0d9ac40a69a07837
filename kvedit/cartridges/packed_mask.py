"""PackedMask: who sees whom in packed rows behind a prefix, by the model's own rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kvedit.cartridges.packing import PADDING
from kvedit.cartridges.prefix import LayerStates
from kvedit.errors import UnsupportedModel
from kvedit.memory import LayerSpec
from kvedit.models.attention_call import AttentionCall, MaskRule

__all__ = ["PackedMask"]

PREFIX = -1
"""Segment of prefix slots: all samples see them, as far as the layer's rule lets them."""


class PackedMask:
    """Masks of one forward pass, made once for layers that share slots, kind and window.

    A token sees a slot if the slot is of the prefix or of its own sample, and the model's rule
    (causal, sliding, chunked) allows it at the two RoPE positions.

    Args:
        segments: ``[row, token]`` number of the sample, or ``PADDING``.
        positions: ``[row, token]`` RoPE positions.
    """

    def __init__(self, segments: torch.Tensor, positions: torch.Tensor) -> None:
        """Makes nothing yet."""
        self.segments, self.positions = segments, positions
        self._made: dict[tuple[Any, ...], Any] = {}

    def seen(self, rule: MaskRule, states: LayerStates, spec: LayerSpec) -> torch.Tensor:
        """Returns bool ``[row, 1, token, slot]`` over prefix and tokens."""
        key = ("dense", id(states.positions), spec.window, spec.kind)
        if key not in self._made:
            at, of = self._slots(states)
            mine = self.segments[:, None, :, None]
            same = (of == PREFIX)[:, None, None, :] | (of[:, None, None, :] == mine)
            # Padding sees padding: a softmax over nothing is NaN.
            allowed = rule.allows(self.positions, at) | (mine == PADDING)
            self._made[key] = same & allowed
        found: torch.Tensor = self._made[key]
        return found

    def as_block_mask(
        self, call: AttentionCall, rule: MaskRule, states: LayerStates, spec: LayerSpec
    ) -> AttentionCall:
        """Returns the call with the same mask as flex_attention takes it: block-sparse.

        Raises:
            UnsupportedModel: if the model adds a rule that is no function of positions.
        """
        key = ("blocks", id(states.positions), spec.window, spec.kind)
        if key not in self._made:
            if rule.arguments.get("use_vmap"):
                raise UnsupportedModel("this model's attention mask is no function of positions")
            self._made[key] = self._blocks(rule, states)
        return dataclasses.replace(call, mask=self._made[key], causal=False)

    def _blocks(self, rule: MaskRule, states: LayerStates) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        at, of = self._slots(states)
        positions, segments = self.positions, self.segments

        def sees(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, slot: torch.Tensor
        ) -> torch.Tensor:
            mine, its = segments[batch, query], of[batch, slot]
            allowed = rule.rule(batch, head, positions[batch, query], at[batch, slot])
            return ((its == PREFIX) | (its == mine)) & (allowed | (mine == PADDING))

        rows, tokens = segments.shape
        return create_block_mask(
            sees, B=rows, H=None, Q_LEN=tokens, KV_LEN=at.shape[1], device=str(segments.device)
        )

    def _slots(self, states: LayerStates) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns positions and segments ``[row, slot]`` of prefix and tokens."""
        rows = self.segments.shape[0]
        held = states.positions.to(self.segments.device).expand(rows, -1)
        at = torch.cat((held, self.positions), dim=1)
        of = torch.cat((torch.full_like(held, PREFIX), self.segments), dim=1)
        return at, of
