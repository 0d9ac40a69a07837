"""sweep: every layer at every strength, what it gains and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.frontier import Point
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.steering.asker import Asker
from kvedit.evals.steering.bystanders import Bystanders
from kvedit.evals.steering.entering import Apply, Steering
from kvedit.evals.steering.methods import Baselines, Method
from kvedit.evals.steering.report import StyleReport
from kvedit.evals.steering.styling import evaluate_style

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """A report whose methods are layers at strengths, baselines beside them.

    Args:
        layers: the layers, or names of sets of layers.
        strengths: the strengths.
        report: a row per pair, called as :meth:`name` says, and the baselines' rows.
    """

    layers: tuple[int | str, ...]
    strengths: tuple[float, ...]
    report: StyleReport

    @staticmethod
    def name(layer: int | str, strength: float) -> str:
        """Returns the name of a pair's row."""
        return f"{_label(layer)} at {strength:g}"

    def grid(self, metric: str = "marked") -> torch.Tensor:
        """Returns a metric's means, ``[layer, strength]`` float32.

        Raises:
            UnknownName: if there is no such metric.
        """
        rows = [
            [
                self.report.mean(self.name(layer, strength), metric).value
                for strength in self.strengths
            ]
            for layer in self.layers
        ]
        return torch.tensor(rows)

    def points(self, gain: str = "marked", cost: str = "kl") -> list[Point]:
        """Returns a point per pair and baseline; pairs of one layer have one name, as a curve."""
        labels = {
            self.name(layer, strength): _label(layer)
            for layer in self.layers
            for strength in self.strengths
        }
        points = self.report.points(gain, cost)
        return [replace(point, name=labels.get(point.name, point.name)) for point in points]

    def best(self, at_most: float, gain: str = "marked", cost: str = "kl") -> Point | None:
        """Returns the pair that gains most of those whose mean cost is within a cap, or None.

        It was chosen on these questions; what it gains is to be read off others.
        """
        names = {_label(layer) for layer in self.layers}
        fit = [p for p in self.points(gain, cost) if p.name in names and p.cost.value <= at_most]
        return max(fit, key=lambda p: (p.gain.value, -p.cost.value), default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        axes = {"layers": list(self.layers), "strengths": list(self.strengths)}
        return {**axes, "report": self.report.to_json()}


def sweep(
    asker: Asker,
    questions: Sequence[RecallQuestion],
    apply: Callable[[Any, float], Steering],
    layers: Sequence[int | str],
    strengths: Sequence[float],
    baselines: Baselines,
    bystanders: Bystanders,
    *,
    identity: str = "",
    **options: Any,
) -> Sweep:
    """Returns what every layer does at every strength, with baselines beside it.

    Args:
        asker: see :func:`~kvedit.evals.steering.styling.evaluate_style`.
        questions: the questions.
        apply: from a layer (an item of ``layers``) and a strength to what steers.
        layers: layers, or names of sets of layers that ``apply`` knows.
        strengths: strengths.
        baselines: rows that are always there.
        bystanders: unrelated prompts.
        identity: what tells this sweep from another in a journal, such as the delta's digest.
        **options: ``markers``, ``path`` (a journal: a cut run goes on), ``seed`` and ``progress``
            of :func:`~kvedit.evals.steering.styling.evaluate_style`.

    Raises:
        InvalidArgument: if layers or strengths are missing, or one comes twice.
    """
    for name, given in (("layers", layers), ("strengths", strengths)):
        if not given or len(set(given)) < len(given):
            raise InvalidArgument(f"expected different {name}, found {list(given)}")
    methods = {
        Sweep.name(layer, strength): Method(_bound(apply, layer), float(strength), None, identity)
        for layer in layers
        for strength in strengths
    }
    report = evaluate_style(asker, questions, methods, baselines, bystanders, **options)
    return Sweep(tuple(layers), tuple(float(strength) for strength in strengths), report)


def _bound(apply: Callable[[Any, float], Steering], layer: int | str) -> Apply:
    return lambda strength: apply(layer, strength)


def _label(layer: int | str) -> str:
    return f"layer {layer}" if isinstance(layer, int) else layer
