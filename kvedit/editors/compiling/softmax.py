"""Refinement against the true softmax: queries count by how much their attention can move.

Least squares in the logit treats all queries alike. What a reader gets is attention, and it hardly
moves for a query that gives the slots almost nothing, or almost everything. For a set of slots with
log-odds l(q) against the rest of the memory, an exact bias b gives them ``sigmoid(l + b)``, a delta
``sigmoid(l + q . d)``. The cross-entropy between the two is a logistic regression in d with these
targets and the offset l. Its stationary point is that of least squares with the secant weights

    w(q) = (sigmoid(l + q.d) - sigmoid(l + b)) / (q.d - b)  ->  sigmoid'(l + b)  as q.d -> b

so it is solved by iterating least squares. Weights are levelled by a share of the unweighted
equations, without which a set that no query looks at would have no solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange

from kvedit.editors.compiling.directions import Normal
from kvedit.memory import LayerKV

__all__ = ["Sets", "group_bias", "log_odds", "refine"]

FLOOR = 0.1
"""Share of the unweighted equations, times the mean weight."""

_BATCH = 16  # sets whose weighted matrices are made at once


def group_bias(layer: LayerKV, group: int) -> torch.Tensor:
    """Returns a layer's bias ``[kv_head, group, slot]`` in float64 on the CPU; zero without any."""
    if layer.bias is None:
        return torch.zeros(layer.heads, group, layer.slots, dtype=torch.float64)
    pattern = "(kv_head group) slot -> kv_head group slot"
    return rearrange(layer.bias.cpu().double(), pattern, group=group)


@dataclass(frozen=True, eq=False)
class Sets:
    """Slots of one KV head, partitioned into sets of one bias.

    Args:
        members: ``[slot]`` index of each slot's set.
        bias: ``[group, set]`` nats.
    """

    members: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, bias: torch.Tensor) -> Sets:
        """Returns the sets of slots with equal bias ``[group, slot]``."""
        columns, members = torch.unique(bias, dim=1, return_inverse=True)
        return cls(members, columns)

    @classmethod
    def each(cls, bias: torch.Tensor) -> Sets:
        """Returns a set per biased slot, and one of all others."""
        chosen = bias.ne(0).any(dim=0)
        members = torch.where(chosen, chosen.cumsum(0), 0)
        columns = torch.cat((torch.zeros_like(bias[:, :1]), bias[:, chosen]), dim=1)
        return cls(members, columns)

    def log_mass(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the log-sum-exp of each set: ``[…, slot]`` to ``[…, set]``."""
        count = self.bias.shape[1]
        index = self.members.expand(logits.shape)
        top = torch.full((*logits.shape[:-1], count), -torch.inf, dtype=logits.dtype)
        top = top.scatter_reduce(-1, index, logits, "amax")
        # Sets without a slot have no top; exp(-inf - 0) counts nothing.
        safe = top.clamp_min(torch.finfo(logits.dtype).min)
        parts = (logits - safe.gather(-1, index)).exp()
        return safe + torch.zeros_like(top).scatter_add(-1, index, parts).log()


def log_odds(masses: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns each set's log-odds, itself without bias against all others under theirs.

    Args:
        masses: ``[group, query, set]`` log-masses without bias.
        bias: ``[group, set]`` nats.
    """
    biased = masses + bias[:, None]
    total = biased.logsumexp(dim=-1, keepdim=True)
    share = (biased - total).exp().clamp_max(1 - 1e-12)
    return masses - total - torch.log1p(-share)


def refine(normal: Normal, head: int, odds: torch.Tensor, sets: Sets, rounds: int) -> torch.Tensor:
    """Returns the deltas of a KV head's sets, ``[set, dim]``.

    Args:
        normal: the layer's equations; its solution is where the iteration starts.
        head: KV head.
        odds: ``[group, query, set]`` log-odds at the queries of ``normal``.
        sets: the sets and their bias.
        rounds: least-squares solves; with one, weights are those of the exact target.
    """
    queries, matrix = normal.queries[head], normal.matrix[head]
    aim = sets.bias[:, None].expand(odds.shape)
    fallback = sets.bias.mT @ normal.right[head]
    now = aim
    deltas = torch.zeros_like(fallback)
    for _ in range(rounds):
        deltas = _weighted(queries, _secant(odds, aim, now), aim, matrix, fallback)
        now = queries @ deltas.mT
    return deltas


def _secant(odds: torch.Tensor, aim: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    gap = now - aim
    near = gap.abs() < 1e-4
    wanted = (odds + aim).sigmoid()
    slope = wanted * (1 - wanted)
    return torch.where(near, slope, ((odds + now).sigmoid() - wanted) / gap.masked_fill(near, 1))


def _weighted(
    queries: torch.Tensor,
    weights: torch.Tensor,
    aim: torch.Tensor,
    matrix: torch.Tensor,
    fallback: torch.Tensor,
) -> torch.Tensor:
    """Solves ``(E[w q q'] + f S) d = E[w b q] + f r`` per set, f = FLOOR times the mean weight."""
    flat = queries.flatten(0, 1)
    count = len(flat)
    weight, target = weights.flatten(0, 1).mT, aim.flatten(0, 1).mT
    floor = FLOOR * weight.mean(dim=1)[:, None] + 1e-300
    right = (weight * target) @ flat / count + floor * fallback
    solved = []
    for start in range(0, len(weight), _BATCH):
        part = slice(start, start + _BATCH)
        left = (weight[part, :, None] * flat).mT @ flat / count + floor[part, :, None] * matrix
        solved.append(torch.linalg.solve(left, right[part]))
    return torch.cat(solved)
