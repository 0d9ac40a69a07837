"""head_atlas: what emphasis in each single head does, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.plots.grid import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvedit.evals.profiling import HeadAtlas, HeadScore

__all__ = ["head_atlas"]

_LABELS = {
    "gain": "gain, nats",
    "efficacy": "efficacy, %",
    "kl": "unrelated KL, nats",
}


def head_atlas(
    found: HeadAtlas, value: Literal["gain", "efficacy", "kl"] = "gain", *, marked: int = 5
) -> Figure:
    """Returns a picture of a head atlas: a row per head, a column per layer.

    Gains, of log p(wanted) - log p(rival), are coloured around zero: red helps the emphasised
    text, blue harms it. A black dot marks a gain whose interval is clear of zero, a number the
    rank of the best heads.

    Args:
        found: an atlas of single heads; heads that were not tried stay grey.
        value: what is drawn.
        marked: how many of the best heads are numbered.

    Raises:
        InvalidArgument: if the atlas is of layers or grown sets, or the value was not measured.
        MissingDependency: without matplotlib.
    """
    if value not in _LABELS:
        raise InvalidArgument(f"value must be one of {sorted(_LABELS)}, found {value!r}")
    if any(len(score.heads) > 1 for score in found.scores):
        raise InvalidArgument(
            f"this atlas holds sets of several heads (search {found.search!r}): the picture is of "
            "single heads"
        )
    table = _table(found, value)
    figure, axes = new_figure(max(5.0, 2.5 + 0.26 * table.shape[1]), 1.7 + 0.34 * len(table))
    image = axes.imshow(table.numpy(), aspect="auto", **_colours(table, value))
    axes.set_facecolor("0.88")
    _mark(axes, found, marked, dots=value == "gain")
    tried = f"{found.strength:.3g} nats, n={found.n}"
    name = f"{found.model.name}, {found.task}" if found.task else found.model.name
    axes.set_title(f"Emphasis in one head: {name} ({tried})", fontsize="medium", parse_math=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head" if found.kind == "kv" else "query head")
    axes.set_yticks(range(len(table)))
    figure.colorbar(image, ax=axes, pad=0.02).set_label(_LABELS[value])
    return figure


def _table(found: HeadAtlas, value: str) -> torch.Tensor:
    sizes = [s.query_heads if found.kind == "query" else s.kv_heads for s in found.model.layers]
    table = torch.full((max(sizes), len(sizes)), torch.nan)
    for score in found.scores:
        number = getattr(score, value)
        if number is None:
            raise InvalidArgument(f"this atlas has no {value}: its probes measured none")
        layer, head = score.heads.pairs[0]
        table[head, layer] = 100 * number if value == "efficacy" else number
    return table


def _colours(table: torch.Tensor, value: str) -> dict[str, Any]:
    if value != "gain":
        return {"cmap": "viridis", "vmin": 0.0}
    known = table[~table.isnan()].abs()
    reach = max(float(known.max()), 1e-6)
    return {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}


def _mark(axes: Any, found: HeadAtlas, marked: int, dots: bool) -> None:
    for rank, score in enumerate(found.scores):
        layer, head = score.heads.pairs[0]
        if rank < marked:
            box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "alpha": 0.85, "lw": 0}
            axes.text(layer, head, str(rank + 1), ha="center", va="center", fontsize=8, bbox=box)
        elif dots and _clear(score):
            axes.plot(layer, head, ".", color="black", markersize=3)


def _clear(score: HeadScore) -> bool:
    return score.gain_interval is not None and not (
        score.gain_interval[0] <= 0 <= score.gain_interval[1]
    )
