"""Estimators against their definitions, written out another way."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName
from kvedit.steering import Estimator
from kvedit.steering.estimators import ESTIMATORS, clusters, lda, logistic, mean, pca

DIM = 12


def sides(pairs=40, seed=0, shift=1.5, dim=DIM):
    """Two classes that differ along dim 0, in noise that is long along dims 1 and 2."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.ones(dim, dtype=torch.float64)
    scale[1], scale[2] = 6.0, 4.0
    first, second = (
        torch.randn(pairs, dim, generator=draw, dtype=torch.float64) * scale + 3 for _ in range(2)
    )
    first[:, 0] += shift
    return first, second


def unit(vector):
    return vector / vector.norm()


def test_mean_is_the_difference_of_means():
    first, second = sides()
    expected = sum(first) / 40 - sum(second) / 40
    torch.testing.assert_close(mean(first, second), expected)
    torch.testing.assert_close(Estimator()(first, second), expected)


@pytest.mark.parametrize("centred", [False, True])
def test_pca_is_the_leading_eigenvector_towards_positive(centred):
    first, second = sides()
    apart = first - second
    rows = apart - apart.mean(dim=0) if centred else apart
    expected = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    found = pca(first, second, centred)
    assert float((found @ expected).abs()) == pytest.approx(1, abs=1e-10)
    assert float(found @ apart.mean(dim=0)) > 0
    torch.testing.assert_close(pca(second, first, centred), -found)
    swapped = pca(*(side.flip(0) for side in (first, second)), centred)
    torch.testing.assert_close(swapped, found)  # the sign does not hang on the order of pairs


def test_uncentred_pca_is_that_of_sides_moved_to_their_midpoint():
    first, second = sides()
    middle = (first + second) / 2
    rows = torch.cat((first - middle, second - middle))
    covariance = torch.cov(rows.T)  # centred, as scikit-learn does it
    expected = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    assert float((pca(first, second) @ expected).abs()) == pytest.approx(1, abs=1e-10)


def test_sign_of_directions_without_mean_is_fixed():
    draw = torch.randn(6, 3, dtype=torch.float64)
    rows = torch.cat((draw, -draw))  # differences that cancel
    found = pca(rows, torch.zeros_like(rows))
    assert float(found[found.abs().argmax()]) > 0


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_logistic_is_the_minimum_found_by_newton(l2):
    first, second = sides()
    x = torch.cat((first, second))
    x = x - x.mean(dim=0)
    x = x / x.square().mean().sqrt()
    design = torch.cat((x, torch.ones(80, 1, dtype=x.dtype)), dim=1)
    labels = torch.cat((torch.ones(40), torch.zeros(40))).to(x)
    penalty = torch.eye(DIM + 1, dtype=x.dtype) * l2
    penalty[-1, -1] = 0
    solution = torch.zeros(DIM + 1, dtype=x.dtype)
    for _ in range(50):
        chance = torch.sigmoid(design @ solution)
        gradient = design.T @ (chance - labels) + penalty @ solution
        curvature = (design.T * (chance * (1 - chance))) @ design + penalty
        solution = solution - torch.linalg.solve(curvature, gradient)
    assert float(gradient.norm()) < 1e-10
    torch.testing.assert_close(logistic(first, second, l2), unit(solution[:-1]), atol=1e-6, rtol=0)


def test_lda_is_fishers_with_the_shrinkage_given():
    first, second = sides()
    for share in (0.0, 0.3, 1.0):
        within = (
            sum(
                torch.outer(row - side.mean(dim=0), row - side.mean(dim=0))
                for side in (first, second)
                for row in side
            )
            / 80
        )
        shrunk = (1 - share) * within + share * within.trace() / DIM * torch.eye(DIM).double()
        expected = unit(torch.linalg.solve(shrunk, first.mean(dim=0) - second.mean(dim=0)))
        torch.testing.assert_close(lda(first, second, share), expected)
    # All of it: the direction of the mean.
    torch.testing.assert_close(lda(first, second, 1.0), unit(mean(first, second)))


def test_lda_estimates_its_shrinkage_as_ledoit_and_wolf():
    first, second = sides(pairs=9)
    within = torch.cat([side - side.mean(dim=0) for side in (first, second)])
    covariance = within.T @ within / 18
    level = covariance.trace() / DIM
    squared = (
        sum(  # b^2: how far single rows are from the covariance
            (torch.outer(row, row) - covariance).square().sum() for row in within
        )
        / 18**2
    )
    away = (covariance - level * torch.eye(DIM)).square().sum()
    share = float(min(squared / away, torch.tensor(1.0)))
    assert 0.02 < share < 0.98
    torch.testing.assert_close(lda(first, second), lda(first, second, share))


def test_more_dims_than_pairs():
    first, second = sides(pairs=5, dim=64)
    for name in ESTIMATORS:
        found = Estimator(name)(first, second)
        assert found.isfinite().all() and float(found.norm()) > 0, name
    found = lda(first, second, 0.0)  # singular without shrinkage
    assert found.isfinite().all()


def test_noise_along_other_dims_is_told_from_the_difference():
    """Mean and PCA are drawn along the long noise; the discriminants look past it."""
    first, second = sides(pairs=200)
    axis = torch.eye(DIM, dtype=torch.float64)[0]
    along = {name: float(unit(Estimator(name)(first, second)) @ axis) for name in ESTIMATORS}
    assert along["lda"] > 0.95 and along["logistic"] > 0.95
    assert along["pca"] < 0.5


def test_directions_have_the_length_of_the_mean_difference():
    first, second = sides()
    size = float(mean(first, second).norm())
    for name in ESTIMATORS:
        assert float(Estimator(name)(first, second).norm()) == pytest.approx(size)
        assert float(Estimator(name, unit=True)(first, second).norm()) == pytest.approx(1)
        scaled = Estimator(name)(first * 10, second * 10)
        torch.testing.assert_close(scaled, Estimator(name)(first, second) * 10)
        moved = Estimator(name)(first + 5, second + 5)
        torch.testing.assert_close(moved, Estimator(name)(first, second))


def test_rounding_has_no_direction():
    first = torch.randn(6, DIM, dtype=torch.float64)
    for second in (first.clone(), first * (1 + 1e-7)):
        for name in ESTIMATORS:
            assert not Estimator(name, unit=True)(first, second).any()
        assert not Estimator()(first, second).any()
    one = first.clone()
    one[0] += 1  # a single pair that differs is a difference
    torch.testing.assert_close(Estimator()(one, first), torch.full((DIM,), 1 / 6).double())
    zero = torch.zeros(6, DIM)
    assert not Estimator("lda")(zero, zero).any()


def test_one_pair_is_enough_for_a_direction():
    first, second = torch.randn(1, DIM), torch.randn(1, DIM)
    for name in ("mean", "pca", "lda", "logistic"):
        found = Estimator(name)(first.double(), second.double())
        torch.testing.assert_close(found, (first - second)[0].double(), atol=1e-6, rtol=1e-5)


def test_estimators_as_plain_data():
    given = {"name": "pca", "centred": True, "unit": True}
    assert Estimator.of(given) == Estimator("pca", unit=True, centred=True)
    assert Estimator.of(given).parameters() == given
    assert Estimator.of("lda").parameters() == {"name": "lda", "unit": False, "shrinkage": None}
    assert Estimator.of(Estimator()) == Estimator.of("mean")
    with pytest.raises(UnknownName, match=r"estimator 'pcs'.*pca"):
        Estimator("pcs")
    for wrong in ({"name": "mean", "l2": 2.0}, {"name": "pca", "shrinkage": 0.1},
                  {"name": "lda", "centred": True}):  # fmt: skip
        with pytest.raises(InvalidArgument, match="takes no"):
            Estimator.of(wrong)
    with pytest.raises(InvalidArgument, match="a mapping of name"):
        Estimator.of({"name": "pca", "center": True})
    first, second = sides(4)
    for estimator in (Estimator("logistic", l2=0.0), Estimator("lda", shrinkage=1.5)):
        with pytest.raises(InvalidArgument, match=r"l2|shrinkage"):
            estimator(first, second)
    for shapes in ((first, second[:3]), (first[0], second[0]), (first[:0], second[:0])):
        with pytest.raises(ShapeMismatch, match="equal shape"):
            Estimator()(*shapes)


# -- clusters ----------------------------------------------------------------------------------


def spread(rows, labels):
    total = 0.0
    for one in set(labels):
        members = rows[[i for i, label in enumerate(labels) if label == one]]
        total += float((members - members.mean(dim=0)).square().sum())
    return total


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_the_best_division(seed):
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = clusters(rows, 2, seed=0, restarts=20)
    best = min(
        spread(rows, labels) for labels in product((0, 1), repeat=9) if len(set(labels)) == 2
    )
    assert spread(rows, found.tolist()) == pytest.approx(best)


def test_clusters_are_named_by_size_and_drawn_by_seed():
    centres = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]).double()
    truth = [2] * 6 + [0] * 4 + [1] * 5
    draw = torch.Generator().manual_seed(0)
    rows = centres[truth] + torch.randn(15, 3, generator=draw, dtype=torch.float64)
    found = clusters(rows, 3, seed=1)
    assert found.tolist() == [0] * 6 + [2] * 4 + [1] * 5
    assert torch.equal(found, clusters(rows, 3, seed=1))
    assert clusters(rows, 1).tolist() == [0] * 15
    assert sorted(clusters(rows, 15).tolist()) == list(range(15))
    same = rows[:1].expand(4, 3)
    for count in (0, 2, 5):
        with pytest.raises(InvalidArgument, match="1 to 1"):
            clusters(same, count)
