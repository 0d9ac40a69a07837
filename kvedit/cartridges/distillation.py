"""Distillation to a teacher's stored top-k: cross-entropy and KL over k tokens and all others.

The teacher's distribution p is known for its k likeliest tokens, and in sum for the rest (the
tail), so student q and teacher are compared over these k + 1 classes::

    KL = Σ_k p_k (log p_k − log q_k) + p_rest (log p_rest − log q_rest)

which is at most the KL over the whole vocabulary (data processing inequality), and equals it where
the student spreads its tail as the teacher does. Without the tail term, mass that the student puts
on tokens outside the top k costs it nothing but what the others lose. The loss is a mean over
tokens, not over stored entries: a token counts once, however many choices it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvedit.cartridges.packing import Batch

__all__ = ["TokenLosses", "token_losses"]

_GONE = -1e30
"""Logit of a token that is left out. Finite: a logsumexp over nothing but -inf has no gradient."""


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of each supervised token, in nats, float32 or wider.

    Args:
        kl: ``[query]``, from the teacher's classes to the student's.
        nll: ``[query]``, of the token that stands there.
    """

    kl: torch.Tensor
    nll: torch.Tensor


def token_losses(logits: torch.Tensor, batch: Batch) -> TokenLosses:
    """Returns the losses of every supervised token.

    Args:
        logits: ``[query, vocabulary]``.
        batch: the batch that they belong to.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    top = wide.gather(1, batch.top_ids)
    # A padded choice repeats the row's first one, and must not count twice.
    top = top.masked_fill(batch.top_logprobs == -torch.inf, _GONE)
    # The tail from its own logits, not as 1 - Σ: what is left of 1 cancels where the top is sure.
    rest = wide.scatter(1, batch.top_ids, _GONE).logsumexp(dim=1)
    normaliser = torch.logaddexp(top.logsumexp(dim=1), rest)
    target = wide.gather(1, batch.targets[:, None]).squeeze(1)
    classes = torch.cat((top, rest[:, None]), dim=1) - normaliser[:, None]
    teacher = torch.cat((batch.top_logprobs, batch.tail[:, None]), dim=1).to(wide)
    return TokenLosses(_divergence(teacher, classes), normaliser - target)


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    known = teacher != -torch.inf
    # 0 log 0 is 0, and -inf - -inf is not a number, in the gradient as well.
    difference = torch.where(known, teacher - student, 0)
    return (teacher.exp() * difference).sum(dim=1)
