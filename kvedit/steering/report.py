"""What an extraction found, layer by layer and head by head; and heads pruned by it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory import Delta, HeadSet
from kvedit.steering.estimators import Estimator
from kvedit.steering.extracting import EstimatorLike
from kvedit.steering.readings import Readings

__all__ = ["ExtractionReport", "Finding", "extraction_report", "prune_heads"]

_HEAD = ("site", "layer", "head", "norm", "relative", "explained", "accuracy", "ordered")
_SHOWN = 3  # vectors of each site that a look at the report shows


@dataclass(frozen=True)
class Finding:
    """One vector of a delta, and how well it tells the sides apart.

    Where the sides differ by rounding only, the vector is zero and tells nothing: accuracy and
    order are then 0.5.

    Args:
        site: site of the delta.
        layer: layer.
        head: KV head; None for the residual stream and attention's output.
        norm: Euclidean length.
        relative: length over the root mean square length of the vectors that it was found in.
        explained: share in [0, 1] of the differences' squared length that lies along it.
        accuracy: share of held-out vectors that stand on their side of the middle between the
            training means, projected on a direction found without them; 0.5 is chance.
        ordered: share of held-out pairs whose positive side projects higher.
    """

    site: str
    layer: int
    head: int | None
    norm: float
    relative: float
    explained: float
    accuracy: float
    ordered: float


@dataclass(frozen=True)
class ExtractionReport:
    """Findings of all sites, layers and heads.

    Args:
        findings: one per vector.
        pairs: number of pairs.
        folds: parts of the pairs that were held out in turn.
    """

    findings: tuple[Finding, ...]
    pairs: int
    folds: int

    def rows(self) -> list[dict[str, Any]]:
        """Returns plain data, one row per vector."""
        return [asdict(one) for one in self.findings]

    def by_layer(self, site: str) -> dict[int, Finding]:
        """Returns each layer's best head of a site: the one with the highest accuracy.

        Raises:
            UnknownName: if there is no such site.
        """
        best: dict[int, Finding] = {}
        for one in self.findings:
            known = best.get(one.layer)
            if one.site == site and (known is None or _rank(one) > _rank(known)):
                best[one.layer] = one
        if not best:
            raise UnknownName("site", site, {one.site for one in self.findings})
        return best

    def table(self) -> str:
        """Returns a Markdown table."""
        rows = (_HEAD, ("---",) * len(_HEAD), *map(_cells, self.findings))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _longest(self, count: int) -> list[Finding]:
        """Returns the longest vectors of each site, the longest first."""
        sites: dict[str, list[Finding]] = {}
        for one in self.findings:
            sites.setdefault(one.site, []).append(one)
        ordered = (sorted(each, key=lambda one: -one.norm) for each in sites.values())
        return [one for each in ordered for one in each[:count]]

    def __repr__(self) -> str:
        """The longest vectors of each site, with the numbers of pairs and vectors above them."""
        chosen = self._longest(_SHOWN)
        head = f"{self.pairs} pairs, held out in {self.folds} folds; {len(self.findings)} vectors"
        if len(chosen) < len(self.findings):
            head += f", the {_SHOWN} longest of each site:"
        rows = (_HEAD, *map(_cells, chosen))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join([head, *("  ".join(row) for row in padded)])


def _cells(one: Finding) -> tuple[str, ...]:
    shares = (f"{share:.2f}" for share in (one.explained, one.accuracy, one.ordered))
    head = "" if one.head is None else str(one.head)
    return (one.site, str(one.layer), head, f"{one.norm:.3g}", f"{one.relative:.3g}", *shares)


def extraction_report(
    readings: Readings, estimator: EstimatorLike = "mean", *, folds: int = 4, seed: int = 0
) -> ExtractionReport:
    """Returns how long each vector is, what it explains, and how it separates held-out pairs.

    Every pair is held out once: the direction and the middle between the sides are found in the
    other folds.

    Args:
        readings: vectors of all pairs, of :func:`~kvedit.steering.reading.read_contrast`.
        estimator: a name, or an estimator.
        folds: parts of the pairs; as many as there are pairs at most.
        seed: of the division into folds.

    Raises:
        InvalidArgument: if there are fewer than two pairs, or folds are out of range.
    """
    chosen = Estimator.of(estimator)
    if not 2 <= folds <= readings.pairs:
        raise InvalidArgument(
            f"folds: expected 2 to {readings.pairs} (the number of pairs), found {folds}"
        )
    order = list(range(readings.pairs))
    random.Random(seed).shuffle(order)
    parts = [sorted(order[start::folds]) for start in range(folds)]
    found = []
    for site, layer, head, first, second in _vectors(readings):
        found.append(_finding(site, layer, head, first, second, chosen, parts))
    return ExtractionReport(tuple(found), readings.pairs, folds)


def prune_heads(
    delta: Delta, keep: int | float, *, site: str = "values", per_layer: bool = False
) -> Delta:
    """Returns a delta of the KV heads with the longest vectors; the others' vectors are zero.

    Args:
        delta: a delta with keys or values; both are pruned, streams stay.
        keep: number of heads, or a share above 0 and below 1, rounded up.
        site: whose vectors' length counts, ``"keys"`` or ``"values"``.
        per_layer: whether ``keep`` counts in each layer; otherwise over all. Vectors of later
            layers are mostly longer.

    Raises:
        InvalidArgument: if the delta lacks that site, or ``keep`` is out of range.
    """
    if site not in ("keys", "values") or site not in delta.vectors:
        raise InvalidArgument(
            f"prune by keys or values that the delta has ({', '.join(delta.sites)}), found {site!r}"
        )
    sizes = [
        (float(norm), layer, head)
        for layer, vector in delta.vectors[site].items()
        for head, norm in enumerate(vector.norm(dim=-1))
    ]
    groups = [[one for one in sizes if one[1] == layer] for layer in delta.vectors[site]]
    chosen = []
    for group in groups if per_layer else [sizes]:
        count = _count(keep, len(group))
        longest = sorted(group, key=lambda one: (-one[0], one[1], one[2]))
        chosen += [(layer, head) for _, layer, head in longest[:count]]
    return delta.only(heads=HeadSet.of(chosen, "kv"))


def _count(keep: int | float, total: int) -> int:
    if isinstance(keep, float) and 0 < keep < 1:
        return math.ceil(keep * total)
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= total:
        raise InvalidArgument(
            f"keep: expected 1 to {total} heads, or a share between 0 and 1; found {keep!r}"
        )
    return keep


def _rank(one: Finding) -> tuple[float, float]:
    return one.accuracy, one.explained


def _vectors(
    readings: Readings,
) -> Iterator[tuple[str, int, int | None, torch.Tensor, torch.Tensor]]:
    for site, layers in readings.positive.items():
        for layer, states in layers.items():
            first, second = readings.sides(site, layer)
            for head in range(first.shape[1]):
                named = head if states.ndim == 3 else None
                yield site, layer, named, first[:, head], second[:, head]


def _finding(
    site: str,
    layer: int,
    head: int | None,
    first: torch.Tensor,
    second: torch.Tensor,
    estimator: Estimator,
    parts: list[list[int]],
) -> Finding:
    vector = estimator(first, second)
    apart = first - second
    size, total = float(vector.norm()), float(apart.square().sum())
    around = float(torch.cat((first, second)).square().sum(dim=1).mean().sqrt())
    along = float((apart @ (vector / size)).square().sum()) if size > 0 else 0.0
    right, ordered = _held_out(first, second, estimator, parts)
    return Finding(
        site=site, layer=layer, head=head, norm=size,
        relative=size / around if around > 0 else 0.0,
        explained=along / total if total > 0 else 0.0,
        accuracy=right, ordered=ordered,
    )  # fmt: skip


def _held_out(
    first: torch.Tensor, second: torch.Tensor, estimator: Estimator, parts: list[list[int]]
) -> tuple[float, float]:
    right = ordered = 0.0
    for held in parts:
        rest = [index for part in parts if part is not held for index in part]
        direction = estimator(first[rest], second[rest])
        middle = (first[rest].mean(dim=0) + second[rest].mean(dim=0)) / 2
        above, below = ((side[held] - middle) @ direction for side in (first, second))
        # A vector in the middle is on neither side, and counts half.
        right += float(_over(above).sum() + _over(-below).sum()) / 2
        ordered += float(_over(above - below).sum())
    return right / len(first), ordered / len(first)


def _over(scores: torch.Tensor) -> torch.Tensor:
    return (scores > 0).double() + (scores == 0).double() / 2
