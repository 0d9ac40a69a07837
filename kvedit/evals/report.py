"""Report: the results of one method on a set of conflicts, with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.bootstrap import Difference, Mean, mean, paired_difference
from kvedit.evals.results import METRICS, CaseResult

__all__ = ["Report", "difference"]


@dataclass(frozen=True)
class Report:
    """What a method does to a set of conflicts.

    Args:
        name: the method.
        results: one per conflict, in the set's order.
        strength: the method's strength, in its own unit; None if it has none.
        seed: seed of the bootstrap.
        model: fingerprint of the model's weights.
    """

    name: str
    results: tuple[CaseResult, ...]
    strength: float | None = None
    seed: int = 0
    model: str = ""

    @property
    def n(self) -> int:
        """Number of conflicts."""
        return len(self.results)

    def values(self, metric: str) -> dict[str, float]:
        """Returns a metric case by case, for the cases that have it.

        Raises:
            UnknownName: if there is no such metric.
        """
        if metric not in METRICS:
            raise UnknownName("metric", metric, METRICS)
        found = ((result.key, METRICS[metric](result)) for result in self.results)
        return {key: value for key, value in found if value is not None}

    def mean(self, metric: str) -> Mean:
        """Returns a metric's mean over cases, with its 95 % bootstrap interval."""
        return mean(list(self.values(metric).values()), self.seed)

    @property
    def efficacy(self) -> Mean:
        """Share of cases with P(new) > P(old) at the first token, in [0, 1]."""
        return self.mean("efficacy")

    @property
    def kl(self) -> Mean:
        """Collateral: KL(unedited‖edited) of unrelated questions over the same memory, nats."""
        return self.mean("kl")

    def mass(self, after: bool = True) -> torch.Tensor:
        """Returns the mean attention on the span, ``[layer, query_head]`` float32.

        Args:
            after: edited, or unedited.

        Raises:
            InvalidArgument: if it was not measured.
        """
        tables = [r.mass_after if after else r.mass_before for r in self.results]
        known = [torch.tensor(table) for table in tables if table is not None]
        if not known:
            raise InvalidArgument("attention mass was not measured: call evaluate(mass=True)")
        return torch.stack(known).mean(dim=0)

    def to_json(self) -> dict[str, Any]:
        """Returns the summary as plain data; single results are in the journal."""
        metrics = {name: self.mean(name) for name in METRICS}
        known = {name: found.to_json() for name, found in metrics.items() if found.n}
        head = {"name": self.name, "strength": self.strength, "n": self.n}
        return {**head, "seed": self.seed, "model": self.model, "metrics": known}

    def __repr__(self) -> str:
        """One line per metric."""
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        lines = [f"{self.name}{strength}: n={self.n}, seed {self.seed}"]
        for name in METRICS:
            found = self.mean(name)
            if found.n:
                few = "" if found.n == self.n else f"  (n={found.n})"
                lines.append(f"  {name:26}{found}{few}")
        return "\n".join(lines)


def difference(a: Report, b: Report, metric: str = "efficacy") -> Difference:
    """Returns the mean of ``a - b`` in a metric over their common cases: a paired bootstrap.

    Args:
        a: one method.
        b: another one, on the same cases.
        metric: name of :data:`~kvedit.evals.results.METRICS`.

    Raises:
        InvalidArgument: if no case has the metric in both.
    """
    return paired_difference(a.values(metric), b.values(metric), a.seed)
