"""random_like: the control of every direction, another one of the same size."""

from __future__ import annotations

import zlib

import torch

from kvedit.memory import Delta

__all__ = ["random_like"]


def random_like(delta: Delta, seed: int = 0) -> Delta:
    """Returns a random delta with the same norm at each site, layer and head.

    Directions are uniform on the sphere: normal numbers, scaled. A part of the delta, by layers
    or sites, gets the same vectors there as the whole.

    Args:
        delta: whose norms are taken; heads that are zero stay zero.
        seed: seed of the draw.
    """

    def drawn(site: str, layer: int, vector: torch.Tensor) -> torch.Tensor:
        own = zlib.crc32(f"{seed}/{site}/{layer}".encode())
        noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(own))
        # Keys and values are [kv_head, dim]: each head keeps its own norm. [hidden] is one vector.
        made: torch.Tensor = noise * (
            vector.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        )
        return made

    return delta.map(drawn, "random_like", seed=seed)
