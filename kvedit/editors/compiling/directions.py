"""Least squares from queries to directions: which key delta acts as a bias of one nat.

A delta d on a key adds ``scale * q . d`` to the logit of every query q. For a bias b_h per query
head h of the group, the wanted delta is the minimiser of

    sum_h E_q[(q . d - b_h)^2] / group + balance * sum_m (m . d - b_m)^2 / M + ridge * |d|^2

over queries q (scaled, at the positions where they will stand) and mean queries m, one per head,
text and distance. Without the second sum this is the ridge solution ``(S + ridge I)^-1 mu``. The
sum makes the bias right on average in each kind of text and at each distance, and not only over
all of them, at the price of a somewhat larger spread. All of it is linear in b, so it is solved
once per query head: ``d = sum_h b_h U_h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce

from kvedit.editors.compiling.queries import LayerQueries, spread

__all__ = ["Normal", "gather"]

COPIES = 4
"""Positions per sampled query: RoPE turns the same query to several."""

NODES = 7
"""Distances at which mean queries are balanced."""


@dataclass(frozen=True, eq=False)
class Normal:
    """Normal equations of one layer.

    Args:
        queries: ``[kv_head, group, query, dim]``, scaled, at their positions.
        matrix: ``[kv_head, dim, dim]``, ridge included.
        right: ``[kv_head, group, dim]``: right side for a bias of 1 on each query head.
    """

    queries: torch.Tensor
    matrix: torch.Tensor
    right: torch.Tensor

    def directions(self) -> torch.Tensor:
        """Returns U ``[kv_head, group, dim]``: the delta for 1 nat on one query head of a group."""
        solved: torch.Tensor = torch.linalg.solve(self.matrix, self.right.mT).mT
        return solved


def gather(
    sample: LayerQueries, start: int, length: int, ridge: float, balance: float, own: bool = False
) -> Normal:
    """Returns a layer's normal equations.

    Args:
        sample: the layer's queries.
        start: position of the first token after the memory.
        length: positions over which queries are spread.
        ridge: lambda as a share of the mean eigenvalue of S.
        balance: weight of the mean queries against the plain ones; 0 leaves them out.
        own: True leaves queries at the positions at which calibration read them.
    """
    if own:
        queries = sample.placed(sample.fit, sample.positions)
    else:
        repeated = sample.fit.repeat(1, 1, COPIES, 1)
        queries = sample.placed(repeated, start + spread(repeated.shape[2], length))
    matrix, right = _moments(queries)
    if balance:
        second, first = _moments(_means(sample, start, length))
        matrix, right = matrix + balance * second, right + balance * first
    size = reduce(matrix.diagonal(dim1=1, dim2=2), "kv_head dim -> kv_head 1 1", "mean")
    # A head whose queries are all zero has no direction; the floor makes it zero, not NaN.
    floor = ridge * size + torch.finfo(torch.float64).tiny ** 0.5
    return Normal(queries, matrix + floor * torch.eye(matrix.shape[-1]).double(), right)


def _moments(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``[kv_head, dim, dim]`` and, a head's share of it, ``[kv_head, group, dim]``."""
    group, count = queries.shape[1:3]
    flat = rearrange(queries, "kv_head group query dim -> kv_head (group query) dim")
    return flat.mT @ flat / (group * count), queries.mean(dim=2) / group


def _means(sample: LayerQueries, start: int, length: int) -> torch.Tensor:
    """Returns mean queries ``[kv_head, group, (text node), dim]``, scaled, at their positions."""
    means = reduce(
        sample.fit,
        "kv_head group (text sample) dim -> kv_head group text dim",
        "mean",
        text=sample.texts,
    )
    places = start + spread(NODES, length, ends=True)
    return sample.placed(means.repeat_interleave(NODES, dim=2), places.repeat(sample.texts))
