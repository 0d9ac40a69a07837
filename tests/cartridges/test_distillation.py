"""The loss against the dense formula in float64, with the whole vocabulary written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvedit.cartridges import collate
from kvedit.cartridges.distillation import token_losses

VOCABULARY = 300


def dense(logits, batch):
    """KL over the teacher's classes and NLL, row by row, with probabilities and no tricks."""
    kl, nll = [], []
    for row, probabilities in enumerate(logits.double().softmax(dim=1)):
        real = batch.top_logprobs[row] > -torch.inf
        ids = batch.top_ids[row][real]
        student = torch.cat((probabilities[ids], 1 - probabilities[ids].sum(0, keepdim=True)))
        teacher = torch.cat((batch.top_logprobs[row][real], batch.tail[row][None])).double().exp()
        terms = [t * (t.log() - s.log()) for t, s in zip(teacher, student, strict=True) if t > 0]
        kl.append(sum(terms))
        nll.append(-probabilities[batch.targets[row]].log())
    return torch.stack(kl), torch.stack(nll)


def rows_of(batch, seed=0, scale=3.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    made = scale * torch.randn(batch.supervised, VOCABULARY, generator=draw, dtype=dtype)
    return made.requires_grad_()


def test_losses_and_gradients_equal_the_dense_formula(samples):
    batch = collate([samples[:4], samples[4:]])
    logits = rows_of(batch, dtype=torch.float64)
    found = token_losses(logits, batch)
    (found.kl.sum() + 0.5 * found.nll.sum()).backward()
    again = logits.detach().clone().requires_grad_()
    kl, nll = dense(again, batch)
    (kl.sum() + 0.5 * nll.sum()).backward()
    assert torch.allclose(found.kl, kl, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.nll, nll, rtol=1e-10, atol=1e-12)
    assert torch.allclose(logits.grad, again.grad, rtol=1e-8, atol=1e-10)


def test_ragged_choices_and_a_missing_tail_are_left_out(sample_of):
    one, two = sample_of(0, 7, 3, choices=2), sample_of(1, 8, 3, choices=6)
    holed = two.top_logprobs.clone()
    holed[1, 2:] = -torch.inf
    two = dataclasses.replace(two, top_logprobs=holed, tail=torch.full_like(two.tail, -torch.inf))
    batch = collate([[one, two]])
    logits = rows_of(batch)
    found = token_losses(logits, batch)
    kl, _ = dense(logits.detach(), batch)
    assert torch.allclose(found.kl.double(), kl, rtol=1e-5, atol=1e-6)
    found.kl.sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_a_student_that_is_sure_has_an_exact_tail_and_a_finite_gradient(sample_of):
    batch = collate([[sample_of(0, 6, 3)]])
    logits = torch.zeros(batch.supervised, VOCABULARY)
    logits.scatter_(1, batch.top_ids[:, :1], 60.0)
    logits.requires_grad_()
    found = token_losses(logits, batch)
    found.kl.sum().backward()
    # 1 - p is 0 in float32 here, and its logarithm -inf
    top = logits.detach().softmax(dim=1).gather(1, batch.top_ids).sum(dim=1)
    assert bool((top == 1).all())
    kl, _ = dense(logits.detach().double().clamp_max(30.0), batch)
    assert bool(found.kl.isfinite().all())
    assert bool((found.kl > kl).all())
    assert bool(logits.grad.isfinite().all())


def test_choices_that_cover_the_vocabulary_leave_no_tail_and_no_nan(sample_of):
    sample = sample_of(0, 6, 3, choices=300)
    sample = dataclasses.replace(sample, tail=torch.full_like(sample.tail, -torch.inf))
    batch = collate([[sample]])
    logits = rows_of(batch)
    found = token_losses(logits, batch)
    teacher = torch.zeros(batch.supervised, VOCABULARY)
    teacher.scatter_(1, batch.top_ids, batch.top_logprobs)
    whole = torch.nn.functional.kl_div(
        logits.log_softmax(1), teacher, log_target=True, reduction="none"
    )
    assert torch.allclose(found.kl, whole.sum(dim=1), rtol=1e-4, atol=1e-5)
    found.kl.sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_the_teacher_itself_has_no_loss_and_no_gradient(sample_of):
    sample = sample_of(3, 9, 4)
    batch = collate([[sample]])
    logits = torch.full((batch.supervised, VOCABULARY), 0.0)
    rest = batch.tail[:, None] - torch.log(torch.tensor(float(VOCABULARY - 5)))
    logits = (logits + rest).scatter(1, batch.top_ids, batch.top_logprobs).requires_grad_()
    found = token_losses(logits, batch)
    found.kl.sum().backward()
    assert found.kl.detach().abs().max() < 1e-5
    assert logits.grad.abs().max() < 1e-5


def test_next_token_loss_is_cross_entropy(samples):
    batch = collate([samples])
    logits = rows_of(batch)
    expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert torch.allclose(token_losses(logits, batch).nll, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choices", [1, 3, 20])
def test_the_mean_counts_tokens_and_not_choices(choices, sample_of):
    batch = collate([[sample_of(0, 12, 2, choices=choices)]])
    assert token_losses(rows_of(batch), batch).kl.shape == (10,)
