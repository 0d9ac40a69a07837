"""Searches on effects that are known in advance."""

import itertools

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.profiling import Effects, HeadScore, contrast, join, single_heads, single_layers
from kvedit.evals.profiling.effects import interval
from kvedit.evals.profiling.search import coarse_to_fine, exhaustive, greedy
from kvedit.memory.heads import HeadSet


class World:
    """Gains add up over heads, and pairs may help or harm each other."""

    def __init__(self, alone, pairs=()):
        self.alone, self.pairs = alone, dict(pairs)
        self.tried = 0

    def gain(self, heads):
        total = sum(self.alone.get(pair, 0.0) for pair in heads.pairs)
        both = itertools.combinations(heads.pairs, 2)
        return total + sum(self.pairs.get(pair, 0.0) for pair in both)

    def __call__(self, sets):
        self.tried += len(sets)
        gains = torch.tensor([self.gain(one) for one in sets], dtype=torch.float64)
        base = torch.tensor([-1.0, -3.0], dtype=torch.float64)
        kl = torch.full((2, len(sets)), torch.nan, dtype=torch.float64)
        return Effects(tuple(sets), base, base[:, None] + gains, kl)


@pytest.fixture
def spec(tiny):
    model, tokenizer = tiny("llama")
    return kv.capture(model, tokenizer, "x").model


def test_every_head_is_a_candidate_once(spec):
    for kind, per_layer in (("query", 4), ("kv", 2)):
        found = single_heads(spec, kind)
        assert len(found) == len({one.pairs for one in found}) == per_layer * len(spec.layers)
        assert all(len(one) == 1 and one.kind == kind for one in found)
        assert [len(one) for one in single_layers(spec, kind)] == [per_layer] * len(spec.layers)
        assert {one.pairs[0][0] for one in single_heads(spec, kind, [2, 0, 2])} == {0, 2}


def test_a_ranking_is_by_gain_and_ties_keep_their_order(spec):
    world = World({(1, 1): 2.0, (0, 1): 0.5, (2, 0): 0.5})
    found = exhaustive(world, single_heads(spec, "kv"))
    order = [one.pairs[0] for one in found.sets]
    assert order == [(1, 1), (0, 1), (2, 0), (0, 0), (1, 0), (2, 1)]
    assert found.gains.mean(dim=0).tolist() == [2.0, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_coarse_to_fine_looks_inside_the_best_layers_only(spec):
    world = World({(0, 0): 3.0, (0, 1): -9.0, (1, 0): 1.0, (2, 1): 2.0})
    found = coarse_to_fine(world, spec, "kv", layers=2)
    assert [one.pairs[0] for one in found.sets] == [(2, 1), (1, 0), (1, 1), (2, 0)]
    assert world.tried == 3 + 4
    with pytest.raises(InvalidArgument, match="3 layers"):
        coarse_to_fine(world, spec, "kv", layers=4)


def test_greedy_sees_what_heads_do_together(spec):
    # the second best alone says the same as the best; another helps beside it
    world = World(
        {(0, 0): 2.0, (0, 1): 1.9, (1, 0): 0.3, (2, 0): -1.0},
        {((0, 0), (0, 1)): -2.0, ((0, 0), (1, 0)): 1.0},
    )
    found = greedy(world, single_heads(spec, "kv"), count=6)
    assert [one.pairs for one in found.sets] == [((0, 0),), ((0, 0), (1, 0))]
    assert found.gains.mean(dim=0).tolist() == [2.0, pytest.approx(3.3)]
    assert found.base.tolist() == [-1.0, -3.0]


def test_greedy_stays_in_its_pool_and_count(spec):
    gains = {pair: 1.0 + i for i, pair in enumerate(itertools.product(range(3), range(2)))}
    world = World(gains)
    found = greedy(world, single_heads(spec, "kv"), count=5, pool=3)
    assert [one.pairs for one in found.sets][-1] == ((1, 1), (2, 0), (2, 1))
    assert world.tried == 6 + 2 + 1
    assert len(greedy(world, single_heads(spec, "kv"), count=2).sets) == 2
    with pytest.raises(InvalidArgument, match="at least 1"):
        greedy(world, single_heads(spec, "kv"), count=0)


def test_sets_of_two_kinds_are_not_joined():
    a, b = HeadSet.of([(0, 1)], "kv"), HeadSet.of([(0, 1), (3, 2)])
    assert join((b, HeadSet.of([(0, 0)]))).pairs == ((0, 0), (0, 1), (3, 2))
    with pytest.raises(InvalidArgument, match="one kind"):
        join((a, b))


def test_scores_are_means_with_paired_bootstrap_intervals():
    base = torch.randn(40, dtype=torch.float64) - 1
    margins = base[:, None] + torch.randn(40, 2, dtype=torch.float64) + torch.tensor([0.0, 2.0])
    margins = torch.cat((margins, margins[:, 1:] + 5.0), dim=1)
    kl = torch.rand(40, 3, dtype=torch.float64)
    kl[3:] = torch.nan  # three probes have an unrelated prompt
    sets = tuple(HeadSet.of([(0, i)]) for i in range(3))
    low, high, far = Effects(sets, base, margins, kl).scores(seed=3)
    assert high.gain == pytest.approx(float((margins[:, 1] - base).mean()))
    assert high.efficacy == float((margins[:, 1] > 0).double().mean())
    assert low.kl == pytest.approx(float(kl[:3, 0].mean()))
    # an interval of a mean is near the normal one, and a shift by 5 shifts it exactly
    error = float((margins[:, 1] - base).std() / 40**0.5)
    assert high.gain_interval[0] == pytest.approx(high.gain - 1.96 * error, abs=0.4 * error)
    assert high.gain_interval[1] == pytest.approx(high.gain + 1.96 * error, abs=0.4 * error)
    assert far.gain_interval == pytest.approx([bound + 5 for bound in high.gain_interval])
    assert HeadScore.from_json(high.to_json()) == high


def test_one_probe_has_no_interval():
    assert interval(torch.ones(1, 2, dtype=torch.float64), seed=0) == [None, None]
    one = torch.ones(1, dtype=torch.float64)
    found = Effects((HeadSet.of([(0, 0)]),), one, one[:, None], one[:, None] * torch.nan)
    (score,) = found.scores(0)
    assert (score.gain, score.gain_interval, score.kl, score.kl_interval) == (0, None, None, None)


def test_a_contrast_pairs_probes_and_counts_the_spread_of_draws():
    hard = 10 * torch.randn(50, 1, dtype=torch.float64)
    sets = tuple(HeadSet.of([(0, i)]) for i in range(4))

    def of(shifts):
        margins = hard + torch.tensor(shifts, dtype=torch.float64)
        return contrast(Effects(sets, hard[:, 0], margins, margins), [0], [1, 2, 3], seed=1)

    same = of([3.0, 1.0, 1.0, 1.0])
    assert same.gain == pytest.approx(2.0)
    assert same.gain_interval == pytest.approx((2.0, 2.0))  # probes are paired
    spread = of([3.0, 0.0, 1.0, 2.0])
    assert spread.gain == pytest.approx(2.0)
    assert spread.gain_interval[0] < 1.6 and spread.gain_interval[1] > 2.4
    # a gain that half of the probes have is as unsure as a coin: 0.5 +- 1.96 * 0.5 / sqrt(50)
    half = torch.zeros(50, 4, dtype=torch.float64)
    half[::2, 0] = 1.0
    found = contrast(Effects(sets, hard[:, 0], hard + half, half), [0], [1, 2, 3], seed=1)
    assert found.gain_interval == pytest.approx((0.5 - 0.139, 0.5 + 0.139), abs=0.03)
