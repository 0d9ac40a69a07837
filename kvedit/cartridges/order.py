"""Order: which rows make which step, known before the first one and from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvedit.cartridges.packing import Pack, pack, read_length
from kvedit.cartridges.plan import TrainPlan
from kvedit.cartridges.sample import Sample
from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["draws", "step_rows"]


def step_rows(samples: Sequence[Sample], plan: TrainPlan) -> list[tuple[Pack, ...]]:
    """Returns the packed rows of every step.

    Each epoch is shuffled, packed and cut into steps anew. All processes get the same list, and a
    resumed run gets it again: there is no state to keep.

    Args:
        samples: all samples.
        plan: epochs or steps, tokens per row, rows per step, seed.

    Raises:
        InvalidArgument: if there are no samples.
    """
    if not samples:
        raise InvalidArgument("there are no samples to train on")
    lengths = [read_length(sample) for sample in samples]
    found: list[tuple[Pack, ...]] = []
    epoch = 0
    while True:
        order = torch.randperm(len(samples), generator=draws(plan.seed, "order", epoch)).tolist()
        rows = pack(lengths, order, plan.pack)
        found += [
            tuple(rows[start : start + plan.packs]) for start in range(0, len(rows), plan.packs)
        ]
        epoch += 1
        if plan.steps is not None and len(found) >= plan.steps:
            return found[: plan.steps]
        if plan.steps is None and epoch >= (plan.epochs or 1):
            return found


def draws(seed: int, purpose: str, number: int) -> torch.Generator:
    """Returns random numbers for one purpose in one step or epoch: equal for equal arguments."""
    name = digest_bytes(canonical_json([seed, purpose, number]))
    return torch.Generator().manual_seed(int(name[:15], 16))
