"""Attention outputs of a pass at supervised tokens, and how far two passes' outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kvedit.cartridges.packing import Batch
from kvedit.models.attention_call import AttentionCall, Output
from kvedit.models.route import observing

__all__ = ["keeping_outputs", "output_errors"]


@contextmanager
def keeping_outputs(batch: Batch) -> Iterator[dict[int, torch.Tensor]]:
    """Fills a mapping with each layer's attention output at supervised tokens.

    Yields:
        Layer to ``[query, query_head, dim]``, before the output projection.
    """
    kept: dict[int, torch.Tensor] = {}
    with observing(_Keeper(batch, kept)):
        yield kept


class _Keeper:
    def __init__(self, batch: Batch, kept: dict[int, torch.Tensor]) -> None:
        self.batch, self.kept = batch, kept

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        output, weights = run(call)
        self.kept[call.layer] = output[self.batch.rows, self.batch.columns]
        return output, weights


def output_errors(
    student: dict[int, torch.Tensor], teacher: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Returns each token's relative squared error of attention outputs, averaged over layers.

    ``|o_S − o_T|² / |o_T|²`` over all heads of a layer: what attention matching fits in closed
    form for one layer (Zweiger et al. 2026, arXiv 2602.16284), here for all layers at once and
    with what the student's earlier layers already got wrong.

    Args:
        student: layer to ``[query, query_head, dim]``.
        teacher: the same layers of the teacher.

    Returns:
        ``[query]``, float32 or wider; 0 where both agree.
    """
    errors = []
    for layer, wanted in teacher.items():
        wide = wanted if wanted.dtype == torch.float64 else wanted.float()
        scale = wide.square().sum(dim=(1, 2)).clamp_min(torch.finfo(wide.dtype).tiny)
        errors.append((student[layer].to(wide) - wide).square().sum(dim=(1, 2)) / scale)
    return torch.stack(errors).mean(dim=0)
