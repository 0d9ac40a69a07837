"""ExpectedAttention: slots that queries to come are expected to read (arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import einsum, rearrange

from kvedit.editors.base import Reader
from kvedit.editors.compacting.budget import as_count
from kvedit.editors.compacting.candidates import alive_slots, fixed_slots, slot_order
from kvedit.editors.compacting.compaction import Compaction
from kvedit.editors.compacting.knorm import wide
from kvedit.editors.compacting.observing import check_prompt, prompt_tokens
from kvedit.editors.target import as_number
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, RopeSpec
from kvedit.models.rope import rotate

__all__ = ["ExpectedAttention", "mean_rotation"]

_AT_ONCE = 64
"""Positions whose rotations are held at once."""


@dataclass(frozen=True)
class ExpectedAttention(Compaction):
    """Keeps the slots with the highest expected attention, times the norm of their values.

    Queries before RoPE are taken as Gaussian, with the mean and covariance that they have over
    the context (less its first ``sinks`` tokens), and rotated by the mean rotation over the next
    ``future`` positions. With ``q ~ N(μ, Σ)`` and the layer's scale s, usually ``1/√d``,

    ``E[exp(s q·k)] = exp(s μ·k + s²/2 kᵀΣk)``.

    A softmax over the head's slots (less its sinks) gives the expected attention, the mean over a
    KV head's query heads its own; the score is ``(attention + epsilon) · ||v||``, as in kvpress
    0.5. A bias that the memory has is added to the exponent; softcap and learned sinks are left
    out. Other parameters are those of :class:`Compaction`.

    Args:
        sinks: first slots, kept and left out of softmax and statistics.
        future: positions to come over which the rotation is averaged, from 1.
        epsilon: added to the expected attention before it meets the value's norm, from 0.
        covariance: whether Σ counts.
        value_norm: whether scores are multiplied by ``||v||``.
        prompt: a text, read behind the memory, whose queries are taken instead of the context's
            (query-aware).

    Raises:
        InvalidArgument: if a parameter is out of range, or there are no tokens to read.
    """

    reproducibility: ClassVar[Literal["reader"]] = "reader"

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    covariance: bool = True
    value_norm: bool = True
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        as_count("future", self.future, 1)
        object.__setattr__(self, "epsilon", as_number("epsilon", self.epsilon, low=0))
        for name in ("covariance", "value_norm"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(
                    f"{name} must be true or false, found {getattr(self, name)!r}"
                )
        check_prompt(self.prompt)

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns expected attention times the norm of values."""
        if reader is None:
            raise InvalidArgument("ExpectedAttention reads with the model: pass reader=")
        queries = self._queries(memory, reader)
        turns: dict[RopeSpec | None, torch.Tensor] = {}
        found = {}
        for index in layers:
            spec = memory.model.layers[index]
            states = wide(queries[index].to(memory.layers[index].keys.device))
            if spec.rope not in turns:
                at = memory.next_position + torch.arange(self.future)
                turns[spec.rope] = mean_rotation(spec.rope, at, spec.key_dim)
            found[index] = self._score(memory, index, states, turns[spec.rope].to(states))
        return found

    def _queries(self, memory: KVMemory, reader: Reader) -> dict[int, torch.Tensor]:
        """Returns queries before RoPE, layer to ``[query_head, query, dim]``."""
        if self.prompt is not None:
            tokens = prompt_tokens(reader, self.prompt)
            seen = reader.read(memory, tokens, ("queries_pre",))
            return {index: states[0] for index, states in seen["queries_pre"].items()}
        if memory.tokens is None or memory.tokens_count <= self.sinks:
            raise InvalidArgument(
                "the context is read again for its queries: expected a memory of more than "
                f"sinks={self.sinks} tokens, found {memory.tokens_count}; or give prompt="
            )
        seen = reader.read(None, memory.tokens, ("queries_pre",))
        return {index: states[0, :, self.sinks :] for index, states in seen["queries_pre"].items()}

    def _score(
        self, memory: KVMemory, index: int, queries: torch.Tensor, turned: torch.Tensor
    ) -> torch.Tensor:
        layer, spec = memory.layers[index], memory.model.layers[index]
        keys = wide(layer.keys).to(queries.dtype)
        mean = queries.mean(dim=1)
        exponent = spec.scale * _on_keys(mean @ turned, keys)
        if self.covariance:
            # kᵀRΣRᵀk is the mean square of the centred queries, rotated, on k.
            centred = (queries - mean[:, None]) @ turned
            spread = einsum(centred, centred, "head query a, head query b -> head a b")
            products = _on_keys(spread / centred.shape[1], keys)
            exponent = exponent + spec.scale**2 / 2 * products
        if layer.bias is not None:
            exponent = exponent + layer.bias.to(exponent)
        alive = alive_slots(memory, index)
        judged = alive & ~fixed_slots(alive, slot_order(layer), self.sinks, 0)
        by_head = rearrange(
            exponent, "(head group) slot -> head group slot", head=layer.heads
        ).masked_fill(~judged[:, None], -torch.inf)
        # A head of which nothing is judged has no softmax.
        expected = by_head.softmax(dim=-1).nan_to_num(0.0).mean(dim=1)
        if self.value_norm:
            expected = (expected + self.epsilon) * wide(layer.values).norm(dim=-1).to(
                expected.dtype
            )
        return expected


def _on_keys(form: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns a linear or quadratic form of each query head on its keys, ``[query_head, slot]``.

    Args:
        form: ``[query_head, dim]`` or ``[query_head, dim, dim]``.
        keys: ``[kv_head, slot, dim]``.
    """
    grouped = rearrange(form, "(head group) ... -> head group ...", head=keys.shape[0])
    if form.ndim == 2:
        found = einsum(grouped, keys, "head group dim, head slot dim -> head group slot")
    else:
        half = einsum(grouped, keys, "head group a b, head slot b -> head group slot a")
        found = einsum(half, keys, "head group slot a, head slot a -> head group slot")
    return rearrange(found, "head group slot -> (head group) slot")


def mean_rotation(rope: RopeSpec | None, positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the mean over positions of a layer's rotation, float64 ``[dim, dim]``.

    States before RoPE, as rows, are multiplied by it from the right. The scaling that a type
    folds into cos and sin is in it.

    Args:
        rope: the layer's rotation; None gives the identity.
        positions: int64 ``[position]``.
        dim: head size.
    """
    axes = torch.eye(dim, dtype=torch.float64)
    if rope is None:
        return axes
    total = torch.zeros_like(axes)
    for part in torch.split(positions, _AT_ONCE):
        every = axes[:, None].expand(dim, len(part), dim)
        total += rotate(every, rope, part).sum(dim=1)
    return total / len(positions)
