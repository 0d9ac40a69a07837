"""Rows of samples: which share a row, and where what stands."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvedit.cartridges import TrainPlan, collate
from kvedit.cartridges.order import draws, step_rows
from kvedit.cartridges.packing import pack, read_length
from kvedit.errors import InvalidArgument


def test_first_fit_fills_rows_in_order_and_cuts_nothing():
    rows = pack([4, 3, 6, 2, 9, 1], range(6), 7)
    # 9 is longer than a row and stands alone; 2 doesn't fit behind 4 and 3, nor 6 behind it
    assert rows == [(0, 1), (2, 5), (3,), (4,)]


def test_a_batch_names_the_place_that_predicts_each_supervised_token(sample_of):
    a, b, c = sample_of(0, 5, 2), sample_of(1, 4, 1, choices=3), sample_of(2, 3, 2)
    batch = collate([[a, b], [c]])
    assert batch.ids.tolist() == [
        [*a.tokens[:-1].tolist(), *b.tokens[:-1].tolist()],
        [*c.tokens[:-1].tolist(), 0, 0, 0, 0, 0],
    ]
    assert batch.offsets[0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, -2, -2, -2, -2, -2]]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 1)
    ]  # fmt: skip
    expected = [*a.tokens[2:].tolist(), *b.tokens[1:].tolist(), *c.tokens[2:].tolist()]
    assert batch.targets.tolist() == expected
    assert (batch.supervised, batch.tokens) == (7, 9)


def test_padded_choices_repeat_a_choice_and_carry_no_mass(sample_of):
    short, long = sample_of(0, 4, 2, choices=2), sample_of(1, 4, 2, choices=5)
    inside = long.top_logprobs.clone()
    inside[0, 3:] = -torch.inf
    long = dataclasses.replace(long, top_logprobs=inside)
    batch = collate([[short, long]])
    assert batch.top_ids[:2, 2:].tolist() == short.top_ids[:, :1].expand(2, 3).tolist()
    assert batch.top_ids[2, 3:].tolist() == [int(long.top_ids[0, 0])] * 2
    assert (batch.top_logprobs[:2, 2:] == -torch.inf).all()


@pytest.mark.parametrize("rows", [[], [[]]])
def test_an_empty_batch_is_refused(rows):
    with pytest.raises(InvalidArgument, match="at least one"):
        collate(rows)


def test_every_epoch_holds_every_sample_once_in_another_order(samples):
    lengths = [read_length(sample) for sample in samples]
    steps = step_rows(samples, TrainPlan(epochs=2, pack=24, packs=2))
    numbers = [[n for row in step for n in row] for step in steps]
    flat = [n for step in numbers for n in step]
    half = len(samples)
    assert sorted(flat[:half]) == sorted(flat[half:]) == list(range(half))
    assert flat[:half] != flat[half:]
    assert all(sum(lengths[n] for n in row) <= 24 for step in steps for row in step)
    assert all(len(step) <= 2 for step in steps)


def test_order_depends_on_the_seed_alone_and_steps_end_where_asked(samples):
    plan = TrainPlan(steps=7, pack=24, seed=3)
    assert step_rows(samples, plan) == step_rows(samples, plan)
    assert len(step_rows(samples, plan)) == 7
    assert step_rows(samples, plan) != step_rows(samples, dataclasses.replace(plan, seed=4))
    longer = step_rows(samples, dataclasses.replace(plan, steps=9))
    assert longer[:7] == step_rows(samples, plan)


def test_draws_of_two_purposes_differ_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    one, two = (torch.rand(3, generator=draws(0, name, 0)) for name in ("order", "chunks"))
    assert not torch.equal(one, two)
    assert torch.equal(one, torch.rand(3, generator=draws(0, "order", 0)))
    assert torch.equal(before, torch.get_rng_state())
