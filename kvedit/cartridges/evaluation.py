"""Evaluation: losses on held-out samples, and the best of a run so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvedit.cartridges.objective import Objective
from kvedit.cartridges.packed_model import PackedModel
from kvedit.cartridges.packing import collate, pack, read_length
from kvedit.cartridges.plan import TrainPlan
from kvedit.cartridges.prefix import Prefix
from kvedit.cartridges.sample import Sample
from kvedit.cartridges.workers import Workers

__all__ = ["HeldOut", "Record"]


class HeldOut:
    """Samples that training never sees, packed once.

    Args:
        samples: at least one.
        plan: for rows, objective and precision.
        workers: each process takes its share of the rows.
    """

    def __init__(self, samples: Sequence[Sample], plan: TrainPlan, workers: Workers) -> None:
        """Packs the samples in their order."""
        self.plan, self.workers = plan, workers
        lengths = [read_length(sample) for sample in samples]
        packed = pack(lengths, range(len(samples)), plan.pack)
        self.rows = [[samples[number] for number in row] for row in packed]
        self.tokens = sum(len(sample) - sample.start for sample in samples)

    @torch.no_grad()
    def losses(self, base: PackedModel, prefix: Prefix, teacher: Prefix | None) -> dict[str, float]:
        """Returns means per token: ``loss`` as the objective weighs them, ``kl``, ``nll``."""
        objective: Objective = self.plan.objective
        sums = torch.zeros(3, dtype=torch.float64)
        mine = self.rows[self.workers.index :: self.workers.count]
        for start in range(0, len(mine), self.plan.rows):
            batch = collate(mine[start : start + self.plan.rows]).to(self.workers.device)
            found = objective.losses(base, prefix, batch, teacher)
            sums += torch.stack((found.total, found.kl, found.nll)).double().cpu()
        whole = self.workers.sum(sums.to(self.workers.device, torch.float32)) / self.tokens
        return dict(zip(("loss", "kl", "nll"), whole.tolist(), strict=True))


@dataclass
class Record:
    """What evaluations said so far, and whether training should end.

    Args:
        best: lowest held-out loss, or None before the first evaluation.
        step: after how many steps it was measured.
        waiting: evaluations since then.
        stopped: whether patience ran out.
        tensors: parameters at that step, by name.
    """

    best: float | None = None
    step: int = 0
    waiting: int = 0
    stopped: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(
        self,
        loss: float,
        step: int,
        patience: int | None,
        parameters: Callable[[], dict[str, torch.Tensor]],
    ) -> None:
        """Notes an evaluation; keeps a copy of the parameters if it is the best."""
        if self.best is None or loss < self.best:
            self.best, self.step, self.waiting = loss, step, 0
            self.tensors = parameters()
        else:
            self.waiting += 1
        self.stopped = patience is not None and self.waiting >= patience

    def to_json(self) -> dict[str, Any]:
        """Returns all but the tensors as plain data."""
        names = ("best", "step", "waiting", "stopped")
        return {name: getattr(self, name) for name in names}
