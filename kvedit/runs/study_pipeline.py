"""The pipeline of self-study: a corpus becomes a folder of samples."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvedit.cartridges.study import SampleSet
from kvedit.runs import sections, steps
from kvedit.runs.material import Material, read_material
from kvedit.runs.report import align
from kvedit.runs.stage import Artifact, Say, Stage, perform
from kvedit.runs.studying import Study, read_study, study
from kvedit.runs.targets import fill

__all__ = ["Plan", "StudyReport", "plan", "run"]

SECTIONS = ("study",)
_SHOWN, _WRAP = 4, 96


@dataclass(frozen=True)
class Plan:
    """A config that was checked.

    Args:
        task: name of the run.
        config: the config.
        material: what is studied.
        study: how.
    """

    task: str
    config: Mapping[str, Any]
    material: Material
    study: Study


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    sections.check_known(config, SECTIONS)
    sections.check_shared(config, SECTIONS)
    material = fill("document", read_material, config["document"])
    wanted = fill("study", read_study, config["study"], material)
    return Plan(str(config["task"]), config, material, wanted)


@dataclass(frozen=True)
class StudyReport:
    """What a study made.

    Args:
        task: name of the run.
        model: name of the model.
        folder: where the samples are.
        digest: of what they say.
        samples: how many.
        wanted: how many were wanted.
        attempts: attempts that the folder holds.
        dropped: reason to attempts without a sample.
        kinds: kind of seed prompt to samples.
        tokens: tokens of all samples, questions and answers.
        supervised: answer tokens.
        shown: first questions and answers.
        seconds: seconds of the steps.
    """

    task: str
    model: str
    folder: str
    digest: str
    samples: int
    wanted: int
    attempts: int
    dropped: Mapping[str, int]
    kinds: Mapping[str, int]
    tokens: int
    supervised: int
    shown: Sequence[tuple[str, str]]
    seconds: Mapping[str, float]

    gain = None
    columns = ("study", "number")

    @classmethod
    def of(
        cls, task: str, model: str, made: SampleSet, wanted: int, seconds: Mapping[str, float]
    ) -> StudyReport:
        """Returns the report of a set; ``seconds`` has those of the step ``study``."""
        kinds = made.column("kind")
        samples = list(made)
        return cls(
            task=task,
            model=model,
            folder=str(made.folder),
            digest=made.digest,
            samples=len(made),
            wanted=wanted,
            attempts=made.attempts,
            dropped=dict(made.dropped),
            kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            tokens=sum(map(len, samples)),
            supervised=sum(len(sample) - sample.start for sample in samples),
            shown=[(sample.question, sample.answer) for sample in samples[:_SHOWN]],
            seconds=seconds,
        )

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The folder of samples."""
        facts = {"digest": self.digest, "samples": self.samples}
        return (Artifact(f"{self.task}-samples", Path(self.folder), facts),)

    def rows(self) -> list[tuple[str, str]]:
        """Returns the table."""
        counts = {
            "attempts": self.attempts,
            "samples": self.samples,
            **{f"  of kind {kind}": n for kind, n in self.kinds.items()},
            **{f"dropped: {reason}": n for reason, n in self.dropped.items()},
            "tokens": self.tokens,
            "  of answers, supervised": self.supervised,
        }
        return [(name, str(number)) for name, number in counts.items()]

    def text(self) -> str:
        """Returns table, first samples and one sentence."""
        pairs = [
            f"{textwrap.shorten(question, _WRAP)}\n  {textwrap.shorten(answer, _WRAP)}"
            for question, answer in self.shown
        ]
        return "\n\n".join([align([self.columns, *self.rows()]), "\n".join(pairs), self.headline()])

    def headline(self) -> str:
        """Returns the main numbers in one sentence."""
        minutes = self.seconds["study"] / 60
        return (
            f"{self.task}: {self.samples} of {self.wanted} samples from {self.attempts} attempts, "
            f"{self.supervised} supervised tokens, {minutes:.1f} minutes, in {self.folder}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return asdict(self)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> StudyReport:
    """Returns what a study made; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


def _report(checked: Plan, stage: Stage) -> StudyReport:
    model = checked.config["model"]
    loaded = stage.step("load", lambda: steps.load_model(**model))
    made = stage.step(
        "study",
        lambda: study(
            loaded, checked.material, checked.study, stage.folder / "samples",
            tracker=stage.inner(),
        ),
        _counts,
    )  # fmt: skip
    return StudyReport.of(checked.task, model["name"], made, checked.study.n, stage.seconds)


def _counts(made: SampleSet) -> Mapping[str, float]:
    return {"samples": len(made), "attempts": made.attempts}
