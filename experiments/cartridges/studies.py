"""Studies: which variants are trained and compared, and after how many steps they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvedit.cartridges import Freeze, Objective


@dataclass(frozen=True)
class Variant:
    """One way to make a cartridge.

    Args:
        start: name in :data:`starts.STARTS`.
        note: what is different, in the table; empty for nothing.
        plan: fields of the training plan that are.
        answers: which answers are trained on: right ones, the model's own, both.
    """

    start: str = "first-p"
    note: str = ""
    plan: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    answers: str = "both"

    @property
    def name(self) -> str:
        """Its name in journals and tables."""
        return f"{self.start}, {self.note}" if self.note else self.start

    @property
    def teacher(self) -> bool:
        """Whether attention outputs are matched, for which training reads the full memory."""
        return bool(self.plan.get("objective", Objective()).attention)


@dataclass(frozen=True)
class Study:
    """Variants, sizes and steps that one table compares.

    Args:
        variants: what is compared.
        steps: after how many steps each is asked; 0 asks the start.
        ratios: how many times smaller than the document.
        base: the variant that others are compared to.
    """

    variants: tuple[Variant, ...]
    steps: tuple[int, ...]
    ratios: tuple[float, ...] = (8,)
    base: str = ""


SLOW = "lr 5e-3"
"""All studies but the first use this rate, which is the better one there for every start."""


def _slow(start: str = "first-p", note: str = "", answers: str = "both", **plan: Any) -> Variant:
    return Variant(start, f"{SLOW}, {note}" if note else SLOW, {"lr": 5e-3, **plan}, answers)


def _objective(note: str, **weights: float) -> Variant:
    return _slow(note=note, objective=Objective(**weights))


def _freeze(note: str, **parts: Any) -> Variant:
    return _slow(note=note, freeze=Freeze(**parts))


FIRST = _slow()
MATCHED = _slow("matched by self-study")
STUDIES: dict[str, Study] = {
    "warm_start": Study(
        (FIRST, MATCHED, Variant("first-p"), Variant("matched by self-study")),
        (0, 40, 120), base=FIRST.name,
    ),
    "starts": Study(
        (FIRST, _slow("random"), _slow("other text"), _slow("sampled chunks"), _slow("summary"),
         _slow("KVZip"), _slow("matched: keys"), _slow("matched: keys, values"),
         _slow("matched: keys, values, β"), MATCHED),
        (0, 40), base=FIRST.name,
    ),
    "sizes": Study((FIRST, MATCHED), (0, 40), (2, 5, 10, 20, 50), FIRST.name),
    "losses": Study(
        (FIRST, _objective("next token", distill=0.0, next_token=1.0),
         _objective("KL + next token", next_token=1.0),
         _objective("attention outputs", distill=0.0, attention=1.0),
         _objective("KL + attention outputs", attention=1.0),
         _slow(note="right answers alone", answers="right"),
         _slow(note="own answers alone", answers="own")),
        (40,), base=FIRST.name,
    ),
    "freezing": Study(
        (FIRST, _freeze("keys frozen", keys=True), _freeze("values frozen", values=True),
         _freeze("nothing frozen", sinks=0), _freeze("bias trained", bias=False),
         _freeze("lower half frozen", layers=tuple(range(15))),
         _freeze("upper half frozen", layers=tuple(range(15, 30)))),
        (40,), base=FIRST.name,
    ),
}  # fmt: skip
