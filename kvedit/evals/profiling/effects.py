"""Effects: what was measured over many probes, and its bootstrap intervals.

Efron (1979), *Bootstrap methods*: percentile intervals of means over probes. All head sets share
the resampled probes, so differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.profiling.measuring import Case
from kvedit.memory.heads import HeadSet

__all__ = ["Effects", "HeadScore", "Interval", "interval", "resample"]

Interval = tuple[float, float] | None
"""95 % percentile-bootstrap interval; None where there is one probe only."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class HeadScore:
    """What emphasis in a set of heads does, as means over probes.

    Args:
        heads: the heads.
        gain: change of log p(wanted) - log p(rival), in nats.
        gain_interval: its interval.
        efficacy: fraction of probes in [0, 1] with wanted likelier than rival under steering.
        efficacy_interval: its interval.
        kl: KL(unsteered‖steered) of the token after the unrelated prompts, in nats; None where
            no probe has one.
        kl_interval: its interval.
    """

    heads: HeadSet
    gain: float
    gain_interval: Interval
    efficacy: float
    efficacy_interval: Interval
    kl: float | None = None
    kl_interval: Interval = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**asdict(self), "heads": self.heads.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadScore:
        """Returns the score that :meth:`to_json` wrote."""
        pairs = {key: tuple(data[key]) for key in data if key.endswith("interval") and data[key]}
        return cls(**{**data, **pairs, "heads": HeadSet.of(data["heads"])})


@dataclass(frozen=True, eq=False)
class Effects:
    """What every head set did on every probe.

    Args:
        sets: the head sets.
        base: ``[probe]`` float64 margins log p(wanted) - log p(rival) without steering, in nats.
        margins: ``[probe, set]`` float64 margins under steering.
        kl: ``[probe, set]`` float64 collateral in nats, NaN where a probe has no unrelated prompt.
    """

    sets: tuple[HeadSet, ...]
    base: torch.Tensor
    margins: torch.Tensor
    kl: torch.Tensor

    @classmethod
    def of(cls, sets: Sequence[HeadSet], cases: Sequence[Case]) -> Effects:
        """Returns the effects of measured cases, one per probe.

        Raises:
            InvalidArgument: if there is no case.
        """
        if not cases or not sets:
            raise InvalidArgument("expected at least one probe and one head set")
        none = (float("nan"),) * len(sets)
        return cls(
            tuple(sets),
            torch.tensor([case.base for case in cases], dtype=torch.float64),
            torch.tensor([case.margins for case in cases], dtype=torch.float64),
            torch.tensor([case.kl or none for case in cases], dtype=torch.float64),
        )

    @property
    def gains(self) -> torch.Tensor:
        """``[probe, set]`` changes of the margin, in nats."""
        return self.margins - self.base[:, None]

    def select(self, index: Sequence[int]) -> Effects:
        """Returns the effects of some of the sets, in the order of ``index``."""
        chosen = list(index)
        return Effects(
            tuple(self.sets[i] for i in chosen),
            self.base,
            self.margins[:, chosen],
            self.kl[:, chosen],
        )

    def beside(self, other: Effects) -> Effects:
        """Returns these effects with those of more sets on the same probes."""
        return Effects(
            (*self.sets, *other.sets),
            self.base,
            torch.cat((self.margins, other.margins), dim=1),
            torch.cat((self.kl, other.kl), dim=1),
        )

    def scores(self, seed: int) -> tuple[HeadScore, ...]:
        """Returns each head set's means and intervals, in the order of the sets."""
        known = ~self.kl[:, 0].isnan()
        parts: dict[str, torch.Tensor] = {
            "gain": self.gains,
            "efficacy": (self.margins > 0).double(),
        }
        if bool(known.any()):
            parts["kl"] = self.kl[known]
        columns: dict[str, list[Any]] = {}
        for name, values in parts.items():
            columns[name] = values.mean(dim=0).tolist()
            columns[f"{name}_interval"] = interval(values, seed)
        return tuple(
            HeadScore(heads, **{name: column[i] for name, column in columns.items()})
            for i, heads in enumerate(self.sets)
        )


def interval(values: torch.Tensor, seed: int) -> list[Interval]:
    """Returns the interval of every column's mean over rows.

    Args:
        values: ``[probe, column]`` float64.
        seed: of the resampling; the same probes are drawn for all columns.
    """
    if len(values) < 2:
        return [None] * values.shape[1]
    means = resample(len(values), torch.Generator().manual_seed(seed)) @ values
    bounds = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [(low, high) for low, high in bounds.T.tolist()]


def resample(count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns ``[resample, item]`` float64 weights, each row the shares of one bootstrap draw."""
    index = torch.randint(count, (_RESAMPLES, count), generator=generator)
    weights = torch.zeros(_RESAMPLES, count, dtype=torch.float64)
    weights.scatter_add_(1, index, torch.ones(index.shape, dtype=torch.float64))
    return weights / count
