"""SteeringRun: what steering does beside its baselines, what was stored, and what came back."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvedit.evals.bootstrap import Mean
from kvedit.evals.steering import CalibratedStrength, StyleReport
from kvedit.runs.recall_report import Kept
from kvedit.runs.report import align, told
from kvedit.runs.stage import Artifact
from kvedit.runs.steps import Answer

__all__ = ["SteeringRun", "style_metrics"]

_METRICS = ("marked", "opening", "accuracy", "length", "distinct_2", "repeat", "kl", "flipped")
_WRAP, _EXAMPLES = 96, 2


def style_metrics(report: StyleReport, name: str) -> dict[str, float]:
    """Returns a method's means, as they are stored beside what steers."""
    return {
        f"style/{metric}": report.mean(name, metric).value
        for metric in report.metrics
        if report.mean(name, metric).n
    }


@dataclass(frozen=True)
class SteeringRun:
    """All that a run of the steering or cast pipeline measured.

    Args:
        task: name of the run.
        model: name of the model.
        dtype: dtype of the model.
        threads: torch threads of both processes.
        delta: what steers: digest, sites, layers, contrast, estimator.
        style: the methods side by side, baselines first.
        chosen: the method that the run is about.
        calibrated: how its strength was found, or None if it was given.
        tables: title to further tables, first rows being headers.
        told: the headline's beginning, behind the name of the run.
        facts: further facts, name to text or number.
        kept: what was stored, the main one first.
        answers: answers of this process that the second one must repeat.
        second: the second process's reply, or None if there was none.
        seconds: seconds of the steps of this process.
    """

    task: str
    model: str
    dtype: str
    threads: int
    delta: Mapping[str, Any]
    style: StyleReport
    chosen: str
    calibrated: CalibratedStrength | None
    tables: Mapping[str, Sequence[Sequence[str]]]
    told: str
    facts: Mapping[str, Any]
    kept: tuple[Kept, ...]
    answers: Mapping[str, Answer]
    second: Mapping[str, Any] | None
    seconds: Mapping[str, float]

    @property
    def gain(self) -> float:
        """Share of marked answers, steered less unsteered."""
        return self.style.difference(self.chosen, metric="marked").value

    @property
    def equal_logits(self) -> int | None:
        """To how many prompts both processes have the same logits all along, bit by bit."""
        if self.second is None:
            return None
        theirs = self.second["answers"]
        return sum(
            int((given.logits, list(given.tokens)) == (it["logits"], list(it["tokens"])))
            for text, given in self.answers.items()
            for it in (theirs[text],)
        )

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the table."""
        return ("method", "strength", *self._metrics())

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What was stored."""
        return tuple(kept.artifact() for kept in self.kept)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table: a line per method, means with their 95 % intervals."""
        rows = []
        for name in self.style.names:
            strength = self.style.of(name).strength
            cells = [_cell(self.style.mean(name, metric)) for metric in self._metrics()]
            rows.append((name, "-" if strength is None else f"{strength:.4g}", *cells))
        return rows

    def text(self) -> str:
        """Returns everything for people: tables, answers, one sentence."""
        style = self.style
        moved = len(style.of(style.baseline).moved)
        facts = [(name, told(value)) for name, value in self.facts.items()]
        parts = [
            f"{style.markers.name}: {style.n} questions, {moved} unrelated prompts, 95 % intervals",
            align([self.columns, *self.rows()]),
            *(f"{title}\n{align(list(map(tuple, rows)))}" for title, rows in self.tables.items()),
            repr(self.calibrated) if self.calibrated else "",
            align(facts) if facts else "",
            self._examples(),
            self.headline(),
        ]
        return "\n\n".join(part for part in parts if part)

    def headline(self) -> str:
        """Returns the main numbers in one sentence."""
        same = "no second process"
        if self.second is not None:
            yes = self.equal_logits == len(self.answers)
            same = f"logits bit-equal in a second process: {'yes' if yes else 'no'}"
        kl = self.style.mean(self.chosen, "kl").value
        return (
            f"{self.task}: {self.told}, KL on unrelated prompts {kl:.3g} nats/token, stored as "
            f"{self.kept[0].name}, {same}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        names = ("task", "model", "dtype", "threads", "chosen", "told")
        return {
            **{name: getattr(self, name) for name in names},
            "gain": self.gain,
            "delta": dict(self.delta),
            "style": self.style.to_json(results=True),
            "calibrated": None if self.calibrated is None else self.calibrated.to_json(),
            "tables": {title: [list(row) for row in rows] for title, rows in self.tables.items()},
            "facts": dict(self.facts),
            "kept": [asdict(kept) for kept in self.kept],
            "answers": {text: asdict(given) for text, given in self.answers.items()},
            "second": self.second,
            "bit_equal": None if self.second is None else self.equal_logits == len(self.answers),
            "seconds": dict(self.seconds),
        }

    def _metrics(self) -> list[str]:
        return [metric for metric in _METRICS if metric in self.style.metrics]

    def _examples(self) -> str:
        names = list(dict.fromkeys((self.style.baseline, self.chosen)))
        width = max(map(len, names))
        blocks = []
        for place in range(min(_EXAMPLES, self.style.n)):
            lines = []
            for name in names:
                said = self.style.of(name).answers[place].answer
                lines.append(f"  {name.ljust(width)}  {textwrap.shorten(said, _WRAP)}")
            blocks.append("\n".join([f"question {place + 1}", *lines]))
        return "\n".join(blocks)


def _cell(found: Mean) -> str:
    if not found.n:
        return "-"
    # Rounded: an end that is 0 but for float rounding is shown as 0.
    ends = [round(end, 6) for end in (found.low, found.high) if end is not None]
    spread = f" [{ends[0]:.2g}, {ends[1]:.2g}]" if ends else ""
    return f"{found.value:.3g}{spread}"
