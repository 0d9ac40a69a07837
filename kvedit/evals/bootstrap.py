"""Bootstrap: how sure a mean over cases is, and a difference of two means over the same cases.

Efron (1979), *Bootstrap methods: another look at the jackknife*. Cases are drawn whole: prompts of
one case hang together, so a case's mean is one observation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from kvedit.errors import InvalidArgument

__all__ = ["Difference", "Mean", "mean", "mean_interval", "paired_difference"]

_RESAMPLES = 2000
_AT_ONCE = 1 << 22  # drawn indices held in memory
_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Mean:
    """A mean over cases.

    Args:
        value: the mean; NaN without cases.
        low: lower end of the 95 % percentile-bootstrap interval; None below two cases.
        high: its upper end.
        n: number of cases.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; JSON has no NaN, so a mean of nothing is None."""
        return {**asdict(self), "value": None if math.isnan(self.value) else self.value}

    def __str__(self) -> str:
        """The mean, with its interval behind it."""
        spread = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{spread}"


@dataclass(frozen=True)
class Difference(Mean):
    """The mean of case-by-case differences ``a - b``.

    Args:
        value: the mean difference.
        low: lower end of its 95 % interval; None below two cases.
        high: its upper end.
        n: number of cases that both have.
    """

    @property
    def clear(self) -> bool:
        """Whether the interval is there and does not hold zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def mean(values: Sequence[float], seed: int = 0) -> Mean:
    """Returns the mean of ``values``, one per case, and its interval."""
    if not values:
        return Mean(math.nan, None, None, 0)
    low, high = mean_interval(values, seed) or (None, None)
    return Mean(fmean(values), low, high, len(values))


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Returns the 95 % percentile-bootstrap interval of a mean; None below two values.

    Args:
        values: one number per case.
        seed: seed of the 2,000 resamples.
    """
    if len(values) < 2:
        return None
    drawn = torch.Generator().manual_seed(seed)
    data = torch.tensor(values, dtype=torch.float64)
    rows = max(1, _AT_ONCE // len(values))
    means = []
    for start in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - start), len(values))
        means.append(data[torch.randint(len(values), shape, generator=drawn)].mean(dim=1))
    low, high = torch.cat(means).quantile(torch.tensor(_LEVELS, dtype=torch.float64)).tolist()
    return low, high


def paired_difference(a: Mapping[str, float], b: Mapping[str, float], seed: int = 0) -> Difference:
    """Returns the mean of ``a - b`` over the cases that both have, and its interval.

    Pairing takes out how hard each case is, which is the same for both.

    Args:
        a: case to its number.
        b: case to its number.
        seed: seed of the resamples.

    Raises:
        InvalidArgument: if they have no case in common.
    """
    common = [key for key in a if key in b]
    if not common:
        raise InvalidArgument(
            f"a paired difference needs cases that both sides have, found none among {len(a)} "
            f"and {len(b)}: evaluate both on the same cases"
        )
    found = mean([a[key] - b[key] for key in common], seed)
    return Difference(found.value, found.low, found.high, found.n)
