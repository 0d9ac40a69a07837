"""Steer: what the pipelines of steering have in common, from the config to the style table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.steering import (
    Bystanders,
    CalibratedStrength,
    Method,
    Steering,
    StyleReport,
    calibrate_strength,
    evaluate_style,
)
from kvedit.memory import Delta, KVMemory
from kvedit.runs import sections, steps
from kvedit.runs.contrasting import contrast_of
from kvedit.runs.extraction import Extracted, Extraction, read_extraction
from kvedit.runs.recall_report import Kept
from kvedit.runs.stage import Stage
from kvedit.runs.styling import Style, read_style
from kvedit.runs.ways import read_way
from kvedit.steering.contrast import Contrast

__all__ = ["SECTIONS", "STEERED", "SteerPlan", "SteerRun", "counted", "steer_plan"]

SECTIONS = ("extract", "steering", "style")
STEERED = "steered"
"""The row that a run is about."""

Steer = Callable[[Delta, float], Steering]


@dataclass(frozen=True)
class SteerPlan:
    """A config that was checked.

    Args:
        config: the config.
        contrast: the pairs; None for a stored delta.
        extraction: how the delta is found.
        way: how it steers.
        style: what is asked.
    """

    config: Mapping[str, Any]
    contrast: Contrast | None
    extraction: Extraction
    way: Any
    style: Style


def steer_plan(config: Mapping[str, Any], own: tuple[str, ...] = ()) -> SteerPlan:
    """Returns a checked config; nothing was loaded or written yet.

    Args:
        config: the config.
        own: further sections that the pipeline needs.

    Raises:
        InvalidArgument: if a value is missing or out of range.
        UnknownName: if a key does not exist.
    """
    sections.check_known(config, ("contrast", *SECTIONS, *own))
    sections.check_shared(config, (*SECTIONS, *own))
    document = config["document"]
    if document.get("path") is not None or document.get("text") is not None:
        raise InvalidArgument(
            "document: this pipeline asks its questions without a context; leave path and text null"
        )
    extraction, way = read_extraction(config["extract"]), read_way(config["steering"])
    contrast = None
    if extraction.ref is None:
        if not config.get("contrast"):
            raise InvalidArgument(
                "there is nothing to extract from: choose a contrast (contrast=few_shot_reasoning, "
                "contrast=file contrast.path=...), or a stored delta (extract.ref=NAME)"
            )
        contrast = contrast_of(config["contrast"])
        way.check_sites(extraction.sites)
    return SteerPlan(config, contrast, extraction, way, read_style(config["style"]))


@dataclass(frozen=True, eq=False)
class SteerRun:
    """A run with its model and delta.

    Args:
        plan: what was checked.
        stage: the run's clock and tracker.
        loaded: the model.
        found: the delta and its report.
        part: what of the delta steers.
    """

    plan: SteerPlan
    stage: Stage
    loaded: steps.Loaded
    found: Extracted
    part: Delta

    @classmethod
    def begin(cls, plan: SteerPlan, stage: Stage) -> SteerRun:
        """Returns a run with its model loaded, and its delta extracted or taken from the store."""
        loaded = stage.step("load", lambda: steps.load_model(**plan.config["model"]))
        contrast, extraction = plan.contrast, plan.extraction
        if contrast is not None:
            found = stage.step(
                "extract",
                lambda: extraction.run(loaded, contrast, stage.folder / "readings"),
                Extracted.measures,
            )
        else:
            path = plan.config["store"]["path"]
            delta = Delta.of(sections.get(path, str(extraction.ref)))
            found = Extracted(delta, None, None)
        return cls(plan, stage, loaded, found, plan.way.part(found.delta))

    def steer(self, delta: Delta, strength: float) -> Steering:
        """Returns what steers with a delta."""
        made: Steering = self.plan.way.steering(self.loaded.model, delta, strength)
        return made

    def put(
        self, memory: KVMemory, suffix: str = "", metrics: Mapping[str, float] | None = None
    ) -> Kept:
        """Returns what the store holds after a memory or an operand was put.

        Args:
            memory: the memory.
            suffix: behind the store's name.
            metrics: put beside it.
        """
        section = dict(self.plan.config["store"])
        name = section.pop("name") + suffix
        record = self.stage.step(
            f"put{suffix}",
            lambda: sections.put(memory, name=name, metrics=metrics, **section),
            lambda record: {"version": record.version},
        )
        return Kept.of(memory, record, section["path"], name)

    def bystanders(self) -> Bystanders:
        """Returns the unrelated prompts."""
        way = self.plan.way
        return self.plan.style.unrelated(self.loaded, way.hold, way.offset)

    def strength(self, bystanders: Bystanders) -> tuple[float, CalibratedStrength | None]:
        """Returns the strength, given or found at the target KL."""
        way = self.plan.way
        if way.strength is not None:
            return float(way.strength), None
        found = self.stage.step(
            "strength",
            lambda: calibrate_strength(
                partial(self.steer, self.part), bystanders, way.target_kl, bracket=way.bracket,
                tolerance=0.05, most=12, seed=self.plan.style.seed, name=STEERED,
            ),
            lambda found: {"strength": found.strength, "kl": found.nearest.held_out.value},
        )  # fmt: skip
        return found.strength, found

    def style(
        self, strength: float, bystanders: Bystanders, methods: Mapping[str, Method]
    ) -> StyleReport:
        """Returns the methods beside their baselines."""
        style, way = self.plan.style, self.plan.way
        asker = style.asker(self.loaded, way.hold, way.offset)
        baselines = style.baselines(self.steer, self.part, strength)
        return self.stage.step(
            "style",
            lambda: evaluate_style(
                asker, style.questions, methods, baselines, bystanders, markers=style.markers,
                path=self.stage.folder / "style.jsonl", seed=style.seed,
            ),
            lambda report: {f"marked {n}": report.mean(n, "marked").value for n in report.names},
        )  # fmt: skip


def counted(report: StyleReport, name: str, metric: str = "marked") -> int:
    """Returns in how many answers of a method a metric of 0 or 1 is 1."""
    return round(sum(report.values(name, metric).values()))
