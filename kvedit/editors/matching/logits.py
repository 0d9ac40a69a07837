"""What reference queries see of one block of slots: logits, local attention and mass.

Zweiger, Fu, Guo and Kim 2026 (Attention Matching, arXiv 2602.16284) match a block by itself: with
logits ``S``, the local output ``softmax(S) V`` and the mass ``sum_j exp(S_ij)`` say all that the
block adds to an attention in which other keys compete as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange

from kvedit.memory import LayerKV, LayerSpec

__all__ = ["Block", "Seen", "by_group", "look"]


@dataclass(frozen=True, eq=False)
class Block:
    """Slots of some KV heads of one layer, in the dtype that is computed in.

    Args:
        keys: ``[kv_head, slot, dim]``, post-RoPE.
        values: ``[kv_head, slot, dim]``.
        bias: ``[kv_head, group, slot]``, or None. It is part of the logits; -inf is no slot.
        spec: facts of the layer: scale and softcap.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None
    spec: LayerSpec

    @classmethod
    def of(cls, layer: LayerKV, spec: LayerSpec) -> Block:
        """Returns a layer's slots; half precision becomes float32, a wider dtype stays."""
        wide = torch.promote_types(layer.keys.dtype, torch.float32)
        bias = None if layer.bias is None else by_group(layer.bias, spec).to(layer.keys.device)
        return cls(
            layer.keys.detach().to(wide),
            layer.values.detach().to(wide),
            None if bias is None else bias.to(wide),
            spec,
        )

    def cut(self, slots: slice) -> Block:
        """Returns the block with only some slots."""
        bias = None if self.bias is None else self.bias[..., slots]
        return Block(self.keys[:, slots], self.values[:, slots], bias, self.spec)

    def of_heads(self, heads: list[int]) -> Block:
        """Returns the block with only some KV heads."""
        bias = None if self.bias is None else self.bias[heads]
        return Block(self.keys[heads], self.values[heads], bias, self.spec)

    def pick(self, index: torch.Tensor) -> Block:
        """Returns the block with, for each head, the slots ``index`` ``[kv_head, pick]``."""
        bias = self.bias
        if bias is not None:
            bias = bias.gather(2, index[:, None].expand(-1, bias.shape[1], -1))
        keys, values = (
            states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))
            for states in (self.keys, self.values)
        )
        return Block(keys, values, bias, self.spec)

    def plain(self) -> Block:
        """Returns the block without its bias."""
        return Block(self.keys, self.values, None, self.spec)

    def available(self) -> torch.Tensor:
        """Returns which slots some query head of the group can see, bool ``[kv_head, slot]``."""
        if self.bias is None:
            return torch.ones(self.keys.shape[:2], dtype=torch.bool, device=self.keys.device)
        return (self.bias > -torch.inf).any(dim=1)

    def logits(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns logits as attention has them, softcap and bias included.

        Args:
            queries: ``[kv_head, group, token, dim]``, post-RoPE, not scaled.

        Returns:
            ``[kv_head, (group token), slot]``.
        """
        group = queries.shape[1]
        rows = rearrange(queries, "kv_head group token dim -> kv_head (group token) dim")
        scores = (rows.to(self.keys) * self.spec.scale) @ self.keys.mT
        if self.spec.softcap is not None:
            scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
        if self.bias is None:
            return scores
        apart = rearrange(
            scores, "kv_head (group token) slot -> kv_head group token slot", group=group
        )
        return rearrange(
            apart + self.bias[:, :, None],
            "kv_head group token slot -> kv_head (group token) slot",
        )


@dataclass(frozen=True, eq=False)
class Seen:
    """A block as queries see it.

    Args:
        weights: ``E = exp(S - m)`` ``[kv_head, query, slot]``, with ``m`` each query's largest
            logit: what the paper fits, so that every query is weighted by its own scale.
        mass: ``y`` ``[kv_head, query]``, the row sums of ``weights``; 0 where a query sees nothing.
        output: ``[kv_head, query, dim]``, the local attention output.
    """

    weights: torch.Tensor
    mass: torch.Tensor
    output: torch.Tensor

    @property
    def inverse(self) -> torch.Tensor:
        """``1 / y`` ``[kv_head, query]``; 0 where a query sees nothing."""
        return torch.where(self.mass > 0, 1 / self.mass, 0.0)


def look(block: Block, queries: torch.Tensor) -> Seen:
    """Returns what ``queries`` ``[kv_head, group, token, dim]`` see of a block."""
    scores = block.logits(queries)
    top = scores.amax(dim=-1, keepdim=True)
    # A query whose head lost every slot of the block sees no mass; -inf less -inf would be NaN.
    weights = scores.sub_(top.masked_fill(top.isinf(), 0)).exp_()
    mass = weights.sum(dim=-1)
    seen = Seen(weights, mass, weights @ block.values)
    return Seen(weights, mass, seen.output * seen.inverse[..., None])


def by_group(tensor: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """Returns ``[query_head, …]`` as ``[kv_head, group, …]``."""
    return rearrange(
        tensor, "(kv_head group) ... -> kv_head group ...", kv_head=spec.kv_heads, group=spec.group
    )
