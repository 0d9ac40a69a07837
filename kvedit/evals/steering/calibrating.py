"""calibrate_strength: the strength at which steering moves unrelated answers by a given KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.bootstrap import Mean, mean
from kvedit.evals.journal import Journal
from kvedit.evals.searching import Crossing, find_crossing, find_rungs
from kvedit.evals.steering.bystanders import Bystanders
from kvedit.evals.steering.entering import Apply, Steering

__all__ = ["CalibratedStrength", "Parts", "Pilot", "StrengthKL", "calibrate_strength"]

Pilot = Callable[[], Steering]
"""Makes something that steers, other than what is calibrated."""

Parts = tuple[Sequence[int], Sequence[int]]
"""Indices of the prompts to choose by, and of those to report."""


@dataclass(frozen=True)
class StrengthKL:
    """A strength and its KL(base‖steered) on unrelated prompts, nats per token.

    Args:
        strength: the strength.
        chosen_by: KL on the prompts by which strengths are chosen.
        held_out: KL on the other prompts.
    """

    strength: float
    chosen_by: Mean
    held_out: Mean

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "strength": self.strength,
            "chosen_by": self.chosen_by.to_json(),
            "held_out": self.held_out.to_json(),
        }

    def __str__(self) -> str:
        """Strength and held-out KL."""
        return f"strength {self.strength:.5g}: KL {self.held_out} on {self.held_out.n} held out"


@dataclass(frozen=True)
class CalibratedStrength:
    """A strength for a target KL; for a ladder of strengths, the two neighbours around it.

    Args:
        name: the method.
        target_kl: the target, nats per token.
        nearest: the strength that comes nearest on the prompts by which it was chosen.
        bracket: for a ladder, the neighbours below and above the target, in this order; None for
            a strength that can have any value.
        trace: ``(strength, KL)`` of every strength tried, on the prompts by which it was chosen.
        crossings: how often the scan crossed the target; above 1, KL is not monotone, and the
            first crossing was taken.
        needed: held-out prompts at which the half-width of a 95 % interval would be 5 % of the
            target, from the spread that was seen; None below two prompts.
        seed: seed of split and bootstrap.
    """

    name: str
    target_kl: float
    nearest: StrengthKL
    bracket: tuple[StrengthKL, StrengthKL] | None
    trace: tuple[tuple[float, float], ...]
    crossings: int
    needed: int | None
    seed: int

    @property
    def strength(self) -> float:
        """The strength."""
        return self.nearest.strength

    @property
    def error(self) -> float:
        """How far the held-out KL is from the target, as a signed share of it."""
        return self.nearest.held_out.value / self.target_kl - 1

    def within(self, share: float = 0.05) -> bool:
        """Whether the held-out KL is within this share of the target."""
        return abs(self.error) <= share

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        bracket = None if self.bracket is None else [end.to_json() for end in self.bracket]
        shown = {"nearest": self.nearest.to_json(), "bracket": bracket, "error": self.error}
        return {**asdict(replace(self, bracket=None)), **shown}

    def __repr__(self) -> str:
        """The strength and its KL, or both neighbours."""
        lines = [f"{self.name}: KL {self.target_kl:g} nats per token on unrelated prompts"]
        if self.bracket is None:
            lines.append(f"  {self.nearest} ({self.error:+.1%})")
        else:
            lines += [
                f"  {side} {found}"
                for side, found in zip(("below:", "above:"), self.bracket, strict=True)
            ]
        if self.crossings > 1:
            lines.append(f"  KL is not monotone: {self.crossings} crossings, the first was taken")
        return "\n".join(lines)


def calibrate_strength(
    apply: Apply,
    bystanders: Bystanders,
    target_kl: float,
    *,
    bracket: tuple[float, float] = (0.0, 1.0),
    ladder: Sequence[float] | None = None,
    pilot: Pilot | Sequence[Pilot] | None = None,
    parts: Parts | None = None,
    share: float = 0.5,
    scan: int = 3,
    tolerance: float = 0.01,
    most: int = 24,
    grow: int = 8,
    name: str = "steering",
    path: str | Path | None = None,
    seed: int = 0,
) -> CalibratedStrength:
    """Returns the strength at which unrelated answers move by a given KL, whatever steers.

    KL(base‖steered) is read along the unedited model's own answers. The strength is chosen on
    one part of the prompts and its KL reported on the other (:meth:`Bystanders.split`). The two
    means differ by chance as well: ``needed`` says how many prompts would make that small.

    Args:
        apply: from a strength to what steers: an edit of a memory, an edited memory, or a context
            manager; see :data:`~kvedit.evals.steering.entering.Steering`.
        bystanders: unrelated prompts, and how they are asked. Share them between methods.
        target_kl: KL to hit, nats per token.
        bracket: first and last strength of the scan, for strengths that can have any value. KL at
            the first should be below the target; the last may be too small, see ``grow``.
        ladder: the only strengths there are, from weak to strong: multiplicities of
            :class:`~kvedit.editors.Duplicate`, budgets of :class:`~kvedit.editors.Truncate` from
            large to small. The result then has both neighbours of the target.
        pilot: makes something else that steers, such as a random direction in the same place:
            the two parts are then alike in how far it moves them, rather than in entropy. It is a
            better guess of how far a prompt can be moved, and not made by the method either. Of
            several, the parts are alike in each (:meth:`Bystanders.split`).
        parts: indices of the prompts by which the strength is chosen, and of those on which it is
            reported, such as of one split for several methods, or the same the other way round;
            None draws them, by ``pilot``, ``share`` and ``seed``.
        share: fraction of prompts by which the strength is chosen.
        scan: strengths of the scan, both ends included.
        tolerance: distance from the target at which to stop, as a share of it.
        most: strengths to try, at most. A step in KL ends there, at the nearest side.
        grow: how often the bracket may be made twice as long if the target lies beyond it.
        name: the method's name.
        path: journal of KLs, JSON lines; a run that was cut goes on where it stopped. What
            ``apply`` steers with is not seen there, so it belongs into the name.
        seed: seed of split and bootstrap.

    Raises:
        InvalidArgument: if a number or an index is out of range, or the target is not crossed.
    """
    _check(target_kl, bracket, ladder, scan, tolerance, most)
    facts = {"kind": "strengths", "name": name, "bystanders": bystanders.digest}
    known = _Known(bystanders, Journal(path, facts))
    if parts is None:
        parts = bystanders.split(share, seed, None if pilot is None else known.by(pilot))
    first, rest = _checked(parts, bystanders.n)

    def read(strength: float, part: Sequence[int]) -> list[float]:
        return known.kl(repr(strength), lambda: apply(strength), part)

    def measure(strength: float) -> float:
        return fmean(read(strength, first))

    found = _search(
        measure, target_kl, bracket, ladder,
        scan=scan, tolerance=tolerance * target_kl, most=most, grow=grow,
    )  # fmt: skip

    def both(strength: float) -> StrengthKL:
        parts = (read(strength, part) for part in (first, rest))
        return StrengthKL(strength, *(mean(values, seed) for values in parts))

    ends = None
    if ladder is not None:
        low, high = sorted((found.first, found.second), key=found.at)
        ends = (both(low), both(high))
    return CalibratedStrength(
        name=name,
        target_kl=target_kl,
        nearest=both(found.nearest),
        bracket=ends,
        trace=found.trace,
        crossings=found.crossings,
        needed=_needed(read(found.nearest, rest), target_kl),
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Known:
    """KLs prompt by prompt, in a journal, so that another split finds what is known."""

    bystanders: Bystanders
    journal: Journal

    def kl(self, name: str, make: Callable[[], Steering], part: Sequence[int]) -> list[float]:
        """Returns the KL of each prompt of a part, nats per token."""
        keys = [f"{name}:{self.bystanders.keys[index]}" for index in part]
        waiting = zip(part, keys, strict=True)
        missing = [index for index, key in waiting if key not in self.journal.done]
        if missing:
            for key, moved in self.bystanders.moved(make, missing).items():
                self.journal.add({"key": f"{name}:{key}", **moved.to_json()})
        return [float(self.journal.done[key]["kl"]) for key in keys]

    def by(self, pilot: Pilot | Sequence[Pilot]) -> dict[str, float] | list[dict[str, float]]:
        """Returns key to KL under a pilot, or a list of these."""
        every, keys = range(self.bystanders.n), self.bystanders.keys
        if callable(pilot):
            return dict(zip(keys, self.kl("pilot", pilot, every), strict=True))
        found = [self.kl(f"pilot {number}", one, every) for number, one in enumerate(pilot)]
        return [dict(zip(keys, values, strict=True)) for values in found]


def _checked(parts: Parts, n: int) -> Parts:
    first, rest = (sorted(set(part)) for part in parts)
    if not first or not rest or set(first) & set(rest) or not {*first, *rest} <= set(range(n)):
        raise InvalidArgument(
            f"parts: expected two lists of prompts' indices from 0 to {n - 1}, with none in both, "
            f"found {len(first)} and {len(rest)}, {len(set(first) & set(rest))} in both"
        )
    return first, rest


def _check(
    target: float,
    bracket: tuple[float, float],
    ladder: Sequence[float] | None,
    scan: int,
    tolerance: float,
    most: int,
) -> None:
    if target <= 0 or tolerance <= 0 or not 2 <= scan <= most:
        raise InvalidArgument(
            "expected a target and a tolerance above 0 and 2 <= scan <= most, found "
            f"{target}, {tolerance}, {scan} and {most}"
        )
    if bracket[0] == bracket[1]:
        raise InvalidArgument(f"expected two different ends of the bracket, found {bracket}")
    if ladder is not None and (len(ladder) < 2 or len(set(ladder)) < len(ladder)):
        raise InvalidArgument(f"expected a ladder of different strengths, found {list(ladder)}")


def _search(
    measure: Callable[[float], float],
    target: float,
    bracket: tuple[float, float],
    ladder: Sequence[float] | None,
    *,
    scan: int,
    tolerance: float,
    most: int,
    grow: int,
) -> Crossing:
    if ladder is not None:
        return find_rungs(measure, target, list(ladder), scan=scan, name="KL")
    return find_crossing(
        measure, target, bracket, scan=scan, tolerance=tolerance, most=most, grow=grow, name="KL"
    )


def _needed(values: Sequence[float], target: float) -> int | None:
    if len(values) < 2:
        return None
    return max(2, round((1.96 * stdev(values) / (0.05 * target)) ** 2))
