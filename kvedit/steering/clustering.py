"""clusters: which pairs of a contrast set differ in the same way, by k-means."""

from __future__ import annotations

import torch

from kvedit.errors import InvalidArgument

__all__ = ["clusters"]


def clusters(
    differences: torch.Tensor, count: int, seed: int = 0, restarts: int = 10
) -> torch.Tensor:
    """Returns each pair's cluster ``[pair]`` by k-means of the differences.

    Seeded by k-means++ (Arthur and Vassilvitskii 2007); the best of several starts counts.
    Clusters are numbered by size, the largest first, and by their first pair among equals.

    Args:
        differences: ``[pair, dim]``.
        count: number of clusters.
        seed: of the starts.
        restarts: number of starts.

    Raises:
        InvalidArgument: if there are more clusters than different pairs, or numbers below 1.
    """
    rows = differences.double()
    if not 1 <= count <= len(torch.unique(rows, dim=0)) or restarts < 1:
        raise InvalidArgument(
            f"clusters: expected 1 to {len(torch.unique(rows, dim=0))} (different pairs) and "
            f"restarts of 1 or more, found {count} and {restarts}"
        )
    generator = torch.Generator().manual_seed(seed)
    runs = [_k_means(rows, count, generator) for _ in range(restarts)]
    labels = min(runs, key=lambda run: run[1])[0]
    members = [(labels == one).nonzero().squeeze(1) for one in range(count)]
    order = sorted(range(count), key=lambda one: (-len(members[one]), int(members[one][0])))
    renamed = torch.empty_like(labels)
    for name, one in enumerate(order):
        renamed[members[one]] = name
    return renamed


def _k_means(
    rows: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Returns labels ``[pair]`` and the sum of squared distances of one start."""
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centres) < count:
        nearest = torch.cdist(rows, centres).square().amin(dim=1)
        chosen = torch.multinomial(nearest, 1, generator=generator)
        centres = torch.cat((centres, rows[chosen]))
    labels = torch.full((len(rows),), -1)
    for _ in range(100):
        distances = torch.cdist(rows, centres).square()
        found = distances.argmin(dim=1)
        for empty in range(count):
            if not bool((found == empty).any()):
                # An empty cluster takes the pair that is farthest from its own centre.
                own = distances.gather(1, found[:, None]).squeeze(1)
                crowded = torch.bincount(found, minlength=count)[found] > 1
                found[own.masked_fill(~crowded, -1).argmax()] = empty
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack([rows[labels == one].mean(dim=0) for one in range(count)])
    return labels, float((rows - centres[labels]).square().sum())
