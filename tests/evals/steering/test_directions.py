"""Random directions: equal norms per site, layer and head, and nothing else in common."""

from __future__ import annotations

import torch

from kvedit.evals import random_like


def test_norms_are_kept_head_by_head(delta) -> None:
    found = random_like(delta, seed=1)
    assert found.sites == delta.sites and found.layers == delta.layers
    for site, layers in delta.vectors.items():
        for layer, vector in layers.items():
            other = found.vectors[site][layer]
            torch.testing.assert_close(other.norm(dim=-1), vector.norm(dim=-1))
            cosine = torch.cosine_similarity(other, vector, dim=-1).abs()
            assert bool((cosine < 0.75).all())
    assert random_like(delta, seed=1).digest == found.digest != random_like(delta, 2).digest


def test_a_part_gets_what_the_whole_gets_and_zero_heads_stay_zero(delta) -> None:
    part = delta.only(sites="values", layers=[2])
    same = random_like(part, 1).vectors["values"][2]
    assert torch.equal(same, random_like(delta, 1).vectors["values"][2])
    pruned = part.map(lambda site, layer, vector: vector * torch.tensor([[1.0], [0.0]]), "prune")
    found = random_like(pruned, 1).vectors["values"][2]
    assert torch.equal(found[0], same[0]) and not bool(found[1].any())


def test_directions_are_spread_evenly(delta) -> None:
    part = delta.only(sites="residual")
    drawn = torch.stack([random_like(part, s).vectors["residual"][1] for s in range(300)])
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    # The mean of 300 independent unit vectors has a length of about 1 / sqrt(300).
    assert float(unit.mean(dim=0).norm()) < 0.12
