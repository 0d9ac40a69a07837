"""LayerFit: one layer's least squares from changes of keys and values to attention's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat

from kvedit.errors import InvalidArgument
from kvedit.memory import LayerSpec
from kvedit.models.rope import unrotate

__all__ = ["LayerFidelity", "LayerFit", "Seen", "fidelity_of", "solve", "unfolded"]

Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights ``[query_head, query, slot]`` on the memory's slots, queries ``[query_head, query, dim]``
after RoPE, and heads' outputs ``[query, query_head, dim]``."""

_REACH = 64  # held-out queries that the reach is taken over


@dataclass(frozen=True)
class LayerFidelity:
    """How well a layer's compiled change is its residual vector, over held-out queries.

    Args:
        layer: the layer.
        explained: 1 - |error|^2 / |vector|^2, with one change for all queries; 1 is exact, 0 is
            nothing, below 0 worse than nothing.
        reach: the same, were each query given a change of its own: what grouped heads leave.
        cosine: mean cosine between what is added and the vector.
        length: mean length of what is added, over the vector's.
        mass: mean attention on the chosen slots.
        change: length of the change of values, over the mean length of the slots' values.
        queries: held-out queries.
    """

    layer: int
    explained: float
    reach: float
    cosine: float
    length: float
    mass: float
    change: float
    queries: int


@dataclass(frozen=True, eq=False)
class LayerFit:
    """One layer's least squares, and what it needs of the memory.

    Args:
        spec: facts of the layer.
        values: ``[kv_head, slot, dim]`` float64 of the chosen slots.
        positions: ``[slot]`` where they stand.
        slots: ``[slot]`` which they are.
        projection: ``[hidden, query_head, dim]``, see :func:`.projecting.output_maps`.
        target: ``[hidden]``, what attention should return besides.
        keys: whether keys are fitted as well.
    """

    spec: LayerSpec
    values: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    projection: torch.Tensor
    target: torch.Tensor
    keys: bool

    def design(self, pattern: torch.Tensor, queries: torch.Tensor, output: torch.Tensor
               ) -> torch.Tensor:  # fmt: skip
        """Returns ``[query, hidden, unknown]``: what unit changes add to attention's output.

        Args:
            pattern: ``[query_head, query, slot]`` weights on the memory's slots.
            queries: ``[query_head, query, dim]`` after RoPE.
            output: ``[query, query_head, dim]`` of the heads.
        """
        seen = pattern[..., self.slots].double()
        wide = rearrange(
            self.projection, "hidden (kv_head group) dim -> kv_head group hidden dim",
            group=self.spec.group,
        )  # fmt: skip
        mass = rearrange(seen.sum(-1), "(kv_head group) query -> kv_head group query",
                         group=self.spec.group)  # fmt: skip
        parts = [rearrange(
            einsum(mass, wide, "kv_head group query, kv_head group hidden dim "
                               "-> query hidden kv_head dim"),
            "query hidden kv_head dim -> query hidden (kv_head dim)",
        )]  # fmt: skip
        if self.keys:
            parts.append(self._key_design(seen, queries.double(), output.double(), wide))
        return torch.cat(parts, dim=-1)

    def _key_design(
        self, seen: torch.Tensor, queries: torch.Tensor, output: torch.Tensor, wide: torch.Tensor
    ) -> torch.Tensor:
        group = self.spec.group
        values = repeat(self.values, "kv_head slot dim -> (kv_head group) slot dim", group=group)
        outputs = rearrange(output, "query query_head dim -> query_head query dim")
        moved = torch.zeros(
            len(queries), queries.shape[1], values.shape[-1], queries.shape[-1], dtype=torch.float64
        )
        for place, position in enumerate(self.positions.tolist()):
            # q . R(p) s = (R(-p) q) . s
            at = torch.full((queries.shape[1],), position)
            turned = unrotate(queries, self.spec.rope, at) * self.spec.scale
            if self.spec.rope is not None and self.spec.rope.scaling != 1.0:
                rotated, factor = self.spec.rope.rotated, self.spec.rope.scaling**2
                turned = torch.cat((turned[..., :rotated] * factor, turned[..., rotated:]), dim=-1)
            gap = values[:, None, place] - outputs
            moved += seen[..., place, None, None] * gap[..., :, None] * turned[..., None, :]
        split = rearrange(moved, "(kv_head group) query dim key -> kv_head group query dim key",
                          group=group)  # fmt: skip
        found = einsum(split, wide, "kv_head group query dim key, kv_head group hidden dim "
                                    "-> query hidden kv_head key")  # fmt: skip
        return rearrange(found, "query hidden kv_head key -> query hidden (kv_head key)")


def solve(designs: Iterator[torch.Tensor], target: torch.Tensor, share: float) -> torch.Tensor:
    """Returns ``argmin sum_q |M_q x - r|^2 + rho |x|^2`` by normal equations in float64."""
    gram: torch.Tensor | None = None
    aim = torch.zeros(0)
    for design in designs:
        flat = rearrange(design, "query hidden unknown -> (query hidden) unknown")
        here = target.repeat(len(design)) @ flat
        gram, aim = (flat.T @ flat, here) if gram is None else (gram + flat.T @ flat, aim + here)
    if gram is None:
        raise InvalidArgument("no reference queries")
    rho = max(share, 1e-12) * gram.diagonal().mean()
    solution: torch.Tensor = torch.linalg.solve(
        gram + rho * torch.eye(len(gram), dtype=gram.dtype), aim
    )
    return solution


def unfolded(solution: torch.Tensor, spec: LayerSpec, keys: bool) -> dict[str, torch.Tensor]:
    """Returns a solution as vectors ``[kv_head, dim]`` by site."""
    count = spec.kv_heads * spec.value_dim
    pattern = "(kv_head dim) -> kv_head dim"
    found = {"values": rearrange(solution[:count], pattern, kv_head=spec.kv_heads)}
    if keys:
        found["keys"] = rearrange(solution[count:], pattern, kv_head=spec.kv_heads)
    return found


def fidelity_of(
    layer: int, fit: LayerFit, solution: torch.Tensor,
    held: Sequence[Seen],
) -> LayerFidelity:  # fmt: skip
    """Returns how well a solution does on held-out queries."""
    design = torch.cat([fit.design(*one) for one in held])
    added = design @ solution
    size = fit.target.square().sum()
    some = design[:: -(-len(design) // _REACH)]
    best = torch.linalg.lstsq(some, fit.target[None, :, None].expand(len(some), -1, 1),
                              driver="gelsd").solution  # fmt: skip
    left = fit.target - (some @ best)[..., 0]
    mass = torch.cat([one[0][..., fit.slots].sum(-1).flatten() for one in held]).mean()
    values = unfolded(solution, fit.spec, fit.keys)["values"]
    return LayerFidelity(
        layer=layer,
        explained=float(1 - (added - fit.target).square().sum(-1).mean() / size),
        reach=float(1 - left.square().sum(-1).mean() / size),
        cosine=float(torch.cosine_similarity(added, fit.target[None], dim=-1).mean()),
        length=float(added.norm(dim=-1).mean() / size.sqrt()),
        mass=float(mass),
        change=float(values.norm(dim=-1).mean() / fit.values.norm(dim=-1).mean()),
        queries=len(design),
    )
