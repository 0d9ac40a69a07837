"""Estimators: from the vectors of both sides of a contrast set to one direction.

All take float ``[pair, dim]`` of the positive and of the negative side and return ``[dim]`` that
points towards the positive one. :func:`mean` has its natural length: what the pairs differ by. The
others find a direction, of length 1; :class:`Estimator` gives it the length of the mean difference,
so that a strength means the same for all of them, or leaves it at 1 (``unit=True``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName
from kvedit.steering.clustering import clusters

__all__ = ["ESTIMATORS", "Estimator", "clusters", "lda", "logistic", "mean", "pca"]

_NOISE = 1e-5
"""Differences below this share of the vectors' own length are rounding: their direction is none."""


def mean(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Returns the mean of the differences."""
    return (positive - negative).mean(dim=0)


def pca(positive: torch.Tensor, negative: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """Returns the direction along which the differences are longest, of length 1.

    Args:
        positive: ``[pair, dim]``.
        negative: ``[pair, dim]``.
        centred: takes the mean difference out before, so that what varies from pair to pair is
            found, and not what all share. Differences as they are give the same as both sides of
            each pair moved to their midpoint (repeng's ``pca_center``); scikit-learn's PCA of
            differences (its ``pca_diff``) is the centred one.
    """
    apart = positive - negative
    rows = apart - apart.mean(dim=0) if centred else apart
    direction: torch.Tensor = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    return _towards_positive(direction, apart)


def logistic(positive: torch.Tensor, negative: torch.Tensor, l2: float = 1.0) -> torch.Tensor:
    """Returns the normal of the logistic regression that tells the sides apart, of length 1.

    Minimises ``sum log(1 + exp(-y (w x + b))) + l2/2 |w|^2`` with LBFGS, where x are the vectors
    less their mean and divided by one number, their root mean square per dim; b is free. ``l2=1``
    is scikit-learn's default ``C=1``.

    Raises:
        InvalidArgument: if ``l2`` is not above 0: separable sides would have no finite answer.
    """
    if not l2 > 0 or not math.isfinite(l2):
        raise InvalidArgument(f"l2: expected a number above 0, found {l2!r}")
    x = torch.cat((positive, negative)).double()
    x = x - x.mean(dim=0)
    x = x / x.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    y = torch.cat((torch.ones(len(positive)), -torch.ones(len(negative)))).to(x)
    solution = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    steps = torch.optim.LBFGS(
        [solution], max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        steps.zero_grad()
        weights, offset = solution[:-1], solution[-1]
        margins = y * (x @ weights + offset)
        total = torch.nn.functional.softplus(-margins).sum() + l2 / 2 * weights.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        steps.step(loss)  # type: ignore[no-untyped-call]
    return _unit(solution.detach()[:-1]).to(positive)


def lda(
    positive: torch.Tensor, negative: torch.Tensor, shrinkage: float | None = None
) -> torch.Tensor:
    """Returns Fisher's linear discriminant, of length 1: ``S^-1`` times the difference of means.

    S is the covariance within the sides, drawn towards a multiple of the identity; there are
    mostly fewer pairs than dims, and S alone has no inverse then.

    Args:
        positive: ``[pair, dim]``.
        negative: ``[pair, dim]``.
        shrinkage: share of the identity in [0, 1]. None takes Ledoit and Wolf's estimate (2004,
            "A well-conditioned estimator for large-dimensional covariance matrices", section 3.3).

    Raises:
        InvalidArgument: if the shrinkage is out of range.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise InvalidArgument(f"shrinkage: expected a share in [0, 1], found {shrinkage!r}")
    within = torch.cat((positive - positive.mean(dim=0), negative - negative.mean(dim=0))).double()
    count, dim = within.shape
    covariance = within.T @ within / count
    level = covariance.trace() / dim
    share = _ledoit_wolf(within, covariance, level) if shrinkage is None else shrinkage
    identity = torch.eye(dim, dtype=torch.float64)
    shrunk = (1 - share) * covariance + share * level * identity
    apart = (positive.double() - negative.double()).mean(dim=0)
    # The pseudo-inverse: with no shrinkage, or sides without spread, S is singular.
    return _unit(torch.linalg.pinv(shrunk, hermitian=True) @ apart if level > 0 else apart).to(
        positive
    )


ESTIMATORS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "mean": (mean, ()),
    "pca": (pca, ("centred",)),
    "logistic": (logistic, ("l2",)),
    "lda": (lda, ("shrinkage",)),
}
"""Name to function, and the options that it takes."""


@dataclass(frozen=True)
class Estimator:
    """An estimator with its options, as plain data.

    Args:
        name: one of :data:`ESTIMATORS`.
        unit: whether vectors have length 1; otherwise that of the mean difference.
        centred: of ``pca``.
        l2: of ``logistic``.
        shrinkage: of ``lda``, in [0, 1]; None estimates it.

    Raises:
        UnknownName: if there is no such estimator.
        InvalidArgument: if an option is set that the estimator does not take.
    """

    name: str = "mean"
    unit: bool = False
    centred: bool = False
    l2: float = 1.0
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        """Checks the name, and that options belong to it."""
        if self.name not in ESTIMATORS:
            raise UnknownName("estimator", self.name, ESTIMATORS)
        taken = ESTIMATORS[self.name][1]
        for option, default in (("centred", False), ("l2", 1.0), ("shrinkage", None)):
            if option not in taken and getattr(self, option) != default:
                raise InvalidArgument(f"the estimator {self.name!r} takes no {option}")

    @classmethod
    def of(cls, value: str | Estimator | Mapping[str, Any]) -> Estimator:
        """Returns an estimator of a name, or of a mapping of name and options.

        Raises:
            InvalidArgument: if it is something else, or has another option.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        try:
            return cls(**value)  # type: ignore[arg-type]
        except TypeError as error:
            raise InvalidArgument(
                f"expected an estimator's name, or a mapping of name, unit and its options; "
                f"found {value!r}"
            ) from error

    def parameters(self) -> dict[str, Any]:
        """Returns name, scale and the options that count."""
        options = {option: getattr(self, option) for option in ESTIMATORS[self.name][1]}
        return {"name": self.name, "unit": self.unit, **options}

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Returns the vector ``[dim]`` of ``[pair, dim]``, with its length.

        Where the sides do not differ beyond the rounding of float32 there is no direction, and the
        vector is zero: the first layer's keys and values of equal last tokens, for example, which
        a delta of length 1 would blow up otherwise.

        Raises:
            ShapeMismatch: if the sides have other axes, or not the same shape.
        """
        if positive.ndim != 2 or positive.shape != negative.shape or not len(positive):
            raise ShapeMismatch(
                f"an estimator takes two [pair, dim] of equal shape, found {list(positive.shape)} "
                f"and {list(negative.shape)}"
            )
        apart = mean(positive, negative)
        size = (positive - negative).square().mean().sqrt()
        if float(size) <= _NOISE * float(torch.cat((positive, negative)).square().mean().sqrt()):
            return torch.zeros_like(apart)
        if self.name == "mean" and not self.unit:
            return apart
        function, names = ESTIMATORS[self.name]
        direction = _unit(function(positive, negative, **{n: getattr(self, n) for n in names}))
        return direction if self.unit else direction * apart.norm()


def _unit(vector: torch.Tensor) -> torch.Tensor:
    size = vector.norm()
    return vector / size if float(size) > 0 else vector


def _towards_positive(direction: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Fixes the sign of an eigenvector: most of the differences' sum goes along it."""
    scores = apart @ direction
    along = scores.sum()
    if float(along.abs()) <= 1e-9 * float(scores.abs().sum()):
        # The mean difference is orthogonal to it up to rounding, which must not choose the sign.
        along = direction[direction.abs().argmax()]
    return direction if float(along) > 0 else -direction


def _ledoit_wolf(rows: torch.Tensor, covariance: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    count, dim = rows.shape
    identity = torch.eye(dim, dtype=rows.dtype)
    away = (covariance - level * identity).square().sum()
    # sum_k |x_k x_k^T - S|^2 / n^2 = (mean_k |x_k|^4 - |S|^2) / n
    noise = (rows.square().sum(dim=1).square().mean() - covariance.square().sum()) / count
    return (
        (noise.clamp_min(0) / away).clamp_max(1.0) if float(away) > 0 else torch.ones(()).to(rows)
    )
