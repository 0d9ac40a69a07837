"""Certificate: what compiled keys do to attention, per head, on queries that no fit has seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

__all__ = ["Certificate", "DistanceFigures", "HeadFigures"]

_SHOWN = 12


@dataclass(frozen=True)
class DistanceFigures:
    """One query head at one distance, or at all of them.

    Args:
        distance: positions from the memory's end; None stands for all distances together.
        mean: achieved bias per unit of the bias that was asked for, mean over queries.
        spread: its standard deviation over queries.
        worst: the largest distance of a query from what was wanted.
        mass_before: mean share of the memory's attention on the biased slots, without bias.
        mass_exact: the same under the exact bias.
        mass_compiled: the same with the compiled keys.
        divergence: mean KL in nats from attention under the exact bias to the compiled one, over
            the memory's slots.
    """

    distance: int | None
    mean: float
    spread: float
    worst: float
    mass_before: float
    mass_exact: float
    mass_compiled: float
    divergence: float


@dataclass(frozen=True)
class HeadFigures:
    """One query head.

    Args:
        layer: its layer.
        head: the query head.
        kv_head: the KV head whose keys it reads.
        strength: largest bias of its KV head's group, in nats, with its sign.
        wanted: what the mean should be: 1 for the head with that bias, 0 for one without bias.
        total: over all distances.
        distances: at each distance.
    """

    layer: int
    head: int
    kv_head: int
    strength: float
    wanted: float
    total: DistanceFigures
    distances: tuple[DistanceFigures, ...]

    @property
    def miss(self) -> float:
        """How far the mean is from what was wanted."""
        return abs(self.total.mean - self.wanted)


@dataclass(frozen=True)
class Certificate:
    """What compiled keys achieve, after storage, on held-out queries.

    A KV head passes if, over all distances, the mean of each of its query heads is within
    ``mean_tolerance`` of what was wanted and the spread at most ``spread_tolerance``. A query
    head of the group whose bias is another one counts too: what it gets unasked is its miss.

    Args:
        heads: figures per query head of every KV head with bias that a later query can see.
        fit: how deltas were fitted.
        storage: dtype or codec in which keys were measured.
        mean_tolerance: per unit.
        spread_tolerance: per unit.
    """

    heads: tuple[HeadFigures, ...]
    fit: str
    storage: str
    mean_tolerance: float
    spread_tolerance: float

    def passes(self, figures: HeadFigures) -> bool:
        """Whether one query head is within the tolerances; NaN is not."""
        spread_fits = figures.total.spread <= self.spread_tolerance
        return figures.miss <= self.mean_tolerance and spread_fits

    @property
    def ok(self) -> bool:
        """Whether every head passes."""
        return all(map(self.passes, self.heads))

    @property
    def failed(self) -> tuple[tuple[int, int], ...]:
        """Returns the KV heads that fail, as ``(layer, kv_head)``, each once."""
        found = ((f.layer, f.kv_head) for f in self.heads if not self.passes(f))
        return tuple(dict.fromkeys(found))

    def share(
        self, mean: float = 0.03, spread: float = 0.10, by: Literal["query", "kv"] = "query"
    ) -> tuple[float, float]:
        """Returns the shares of heads whose mean and whose spread are within a bound each.

        Args:
            mean: bound on how far the mean is from what was wanted.
            spread: bound on the standard deviation over queries.
            by: query heads, or KV heads: all queries of the group together, which share one delta.
        """
        groups: dict[tuple[int, int], list[HeadFigures]] = {}
        for figures in self.heads:
            key = (figures.layer, figures.kv_head if by == "kv" else figures.head)
            groups.setdefault(key, []).append(figures)
        pooled = [_pooled(group) for group in groups.values()]
        count = max(len(pooled), 1)
        near = sum(miss <= mean for miss, _ in pooled)
        narrow = sum(found <= spread for _, found in pooled)
        return near / count, narrow / count

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**dataclasses.asdict(self), "ok": self.ok, "failed": list(map(list, self.failed))}

    def complaint(self) -> str:
        """Returns the heads that fail, with their figures, in one line each."""
        lines = [_line(figures) for figures in self._worst() if not self.passes(figures)]
        more = f"\n… and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        return "\n".join(lines[:_SHOWN]) + more

    def _worst(self) -> list[HeadFigures]:
        def badness(figures: HeadFigures) -> float:
            return max(
                figures.miss / max(self.mean_tolerance, 1e-12),
                figures.total.spread / max(self.spread_tolerance, 1e-12),
            )

        return sorted(self.heads, key=badness, reverse=True)

    def __str__(self) -> str:
        """A summary, the figures by distance, and the worst heads."""
        if not self.heads:
            return "certificate: no later query sees a biased slot"
        shares = (*self.share(), *self.share(by="kv"))
        verdict = "passes" if self.ok else f"{len(self.failed)} KV heads fail"
        lines = [
            f"certificate: fit {self.fit}, keys in {self.storage}, {len(self.heads)} query heads: "
            f"{verdict} (mean within {self.mean_tolerance:g}, spread up to "
            f"{self.spread_tolerance:g})",
            "mean within 0.03: {0:.1%} of query heads, {2:.1%} of KV heads; spread up to 0.10: "
            "{1:.1%} of query heads, {3:.1%} of KV heads".format(*shares),
            "distance  mean: least, median, most  spread: median, most   worst  "
            "mass: before, exact, compiled      KL",
        ]
        lines += [_row(group) for group in self._groups()]
        return "\n".join([*lines, "worst heads:", *map(_line, self._worst()[:_SHOWN])])

    def _groups(self) -> list[list[tuple[HeadFigures, DistanceFigures]]]:
        pairs = [(f, d) for f in self.heads for d in (*f.distances, f.total)]
        known = sorted({d.distance for _, d in pairs if d.distance is not None})
        return [[pair for pair in pairs if pair[1].distance == at] for at in (*known, None)]


def _pooled(group: Sequence[HeadFigures]) -> tuple[float, float]:
    """Returns how far the mean over equally many queries per head is off, and their spread."""
    missed = [figures.total.mean - figures.wanted for figures in group]
    middle = fmean(missed)
    squares = [figures.total.spread**2 for figures in group]
    return abs(middle), math.sqrt(fmean(squares) + fmean((m - middle) ** 2 for m in missed))


def _row(group: Sequence[tuple[HeadFigures, DistanceFigures]]) -> str:
    # Heads of a group that were asked for less are shown by how far they are from that.
    means = [found.mean - head.wanted + 1 for head, found in group]
    spreads = [found.spread for _, found in group]
    masses = (
        sum(getattr(found, name) for _, found in group) / len(group)
        for name in ("mass_before", "mass_exact", "mass_compiled", "divergence")
    )
    before, exact, compiled, divergence = masses
    at = group[0][1].distance
    worst = max(found.worst for _, found in group)
    return (
        f"{'all' if at is None else at:>8}  {min(means):11.3f} {median(means):7.3f} "
        f"{max(means):6.3f}  {median(spreads):14.3f} {max(spreads):6.3f}  {worst:6.2f}  "
        f"{before:12.4f} {exact:6.4f} {compiled:9.4f}  {divergence:7.4f}"
    )


def _line(figures: HeadFigures) -> str:
    total = figures.total
    return (
        f"  layer {figures.layer} query head {figures.head} (KV head {figures.kv_head}): bias "
        f"{figures.strength:+.2f}, per unit {total.mean:.3f} (wanted {figures.wanted:.3f}) ± "
        f"{total.spread:.3f}, worst off by {total.worst:.2f}; mass {total.mass_before:.4f} -> "
        f"{total.mass_compiled:.4f} (exact {total.mass_exact:.4f})"
    )
