"""received: how much attention each token gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from kvedit.errors import InvalidArgument, ShapeMismatch
from kvedit.plots.grid import Grid, draw, draw_bars, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvedit.memory import KVMemory

__all__ = ["received", "token_labels"]

_VISIBLE = str.maketrans({"\n": "↵", "\t": "→", "\r": "↵", " ": "␣"})


def received(
    values: torch.Tensor | Mapping[int, torch.Tensor],
    tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    log: bool = True,
    title: str = "",
) -> Figure:
    """Returns a picture of the attention that each slot receives, as a share of all of it.

    A few first tokens often receive nearly all (they are sinks), so the scale is logarithmic.
    In a causal pass early tokens are also seen by more queries than late ones.

    Args:
        values: ``[slot]``, ``[query_head, slot]`` or ``[batch, query_head, slot]``: attention
            summed over queries, as the site ``received`` of ``kv.tap`` has it; or a mapping from
            layer to such a tensor, whose heads are averaged.
        tokens: a label per slot, see :func:`token_labels`; None numbers the slots.
        row: row of the batch.
        log: whether the scale is logarithmic.
        title: above the picture; empty describes what is drawn.

    Raises:
        ShapeMismatch: if a tensor has other axes.
        InvalidArgument: if there are no values, layers differ in slots, or labels don't fit.
        MissingDependency: without matplotlib.
    """
    if isinstance(values, Mapping):
        shares = _stack({layer: _share(one, row).mean(dim=0) for layer, one in values.items()})
        described, named = "Attention received, mean of heads", "layer"
        rows = [str(layer) for layer in values]
    else:
        shares = _share(values, row)
        described, named, rows = "Attention received", "query head", None
    x = "slot" if tokens is None else "token of the context"
    grid = Grid(
        shares,
        title or described,
        x,
        named,
        "share of\nattention",
        columns=tokens,
        rows=rows,
        log=log,
    )
    figure, axes = new_figure(*grid.inches())
    if isinstance(values, torch.Tensor) and values.ndim == 1:
        draw_bars(axes, grid)
    else:
        draw(axes, grid)
    return figure


def token_labels(memory: KVMemory) -> list[str]:
    """Returns the text of each token of a memory, white space made visible (``␣``, ``↵``).

    Raises:
        InvalidArgument: if no tokens made the memory.
    """
    source = memory.source
    if source is None:
        raise InvalidArgument("this memory has no tokens: number its slots instead")
    texts = [source.text[start:stop] for start, stop in source.offsets.tolist()]
    # A token without text is a special one, such as a BOS that the text does not spell.
    return [text.translate(_VISIBLE) if text else "<s>" for text in texts]


def _share(values: torch.Tensor, row: int) -> torch.Tensor:
    """Returns ``[head, slot]`` fractions of each head's attention; one head for ``[slot]``."""
    found = values.detach().float().cpu()
    if found.ndim == 3:
        found = found[row]
    if found.ndim == 1:
        found = found[None]
    if found.ndim != 2:
        raise ShapeMismatch(
            "attention received: expected [slot], [query_head, slot] or [batch, query_head, slot], "
            f"found shape {list(values.shape)}"
        )
    return found / found.sum(dim=1, keepdim=True).clamp_min(1e-30)


def _stack(shares: Mapping[int, torch.Tensor]) -> torch.Tensor:
    sizes = {len(share) for share in shares.values()}
    if len(sizes) != 1:
        found = sorted(sizes) or "no layers"
        raise InvalidArgument(f"layers must have equally many slots to share one axis: {found}")
    return torch.stack(list(shares.values()))
