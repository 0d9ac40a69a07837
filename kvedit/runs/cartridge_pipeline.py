"""The pipeline of training: samples, a start, training, recall, the store, a second process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvedit.cartridges import Sample, TrainPlan, train
from kvedit.cartridges.study import SampleSet
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runs import sections
from kvedit.runs.asking import Asked, read_recall
from kvedit.runs.beside import Other, read_others
from kvedit.runs.material import Material, read_material
from kvedit.runs.recall_report import RecallRun
from kvedit.runs.recalling import NOTHING, TRUNCATION, Recalling, sized, truncated
from kvedit.runs.stage import Inner, Say, Stage, perform
from kvedit.runs.starting import Around, check_start, start
from kvedit.runs.steps import operands
from kvedit.runs.studying import Study, check_turns, read_study, study
from kvedit.runs.targets import check_keys, fill
from kvedit.runs.training import read_plan

__all__ = ["Plan", "plan", "run"]

SECTIONS = ("start", "train", "samples", "recall")
_OPTIONAL = ("editor", "study", "distractors")
_START, _TRAINED = "start", "trained"


@dataclass(frozen=True)
class Plan:
    """A config that was checked.

    Args:
        config: the config.
        material: what the cartridge stands for.
        study: how samples are made, or None where there are some.
        editor: what a start is edited by, or None.
        train: how it is trained.
        others: memories that stand beside the cartridge in some steps.
        asked: what memories are asked.
    """

    config: Mapping[str, Any]
    material: Material
    study: Study | None
    editor: Any
    train: TrainPlan
    others: tuple[Other, ...]
    asked: Asked


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    sections.check_known(config, (*SECTIONS, *_OPTIONAL))
    sections.check_shared(config, SECTIONS)
    material = fill("document", read_material, config["document"])
    editor = _editor(config)
    check_keys("samples", _samples_section, config["samples"])
    made = None
    if config["samples"].get("folder") is None:
        if not config.get("study"):
            raise InvalidArgument(
                "there is nothing to train on: set samples.folder, or study=small to make samples"
            )
        made = fill("study", read_study, config["study"], material)
    asked = fill("recall", read_recall, config["recall"])
    training = read_plan(config["train"])
    others = read_others(config.get("distractors"), training.distractors)
    return Plan(config, material, made, editor, training, others, asked)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> RecallRun:
    """Returns what a cartridge recalls; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


def _report(checked: Plan, stage: Stage) -> RecallRun:
    run = Recalling.load(checked.config, checked.asked, stage)
    full = run.capture(checked.material.context(run.loaded.tokenizer))
    path = checked.config["store"]["path"]
    stored = partial(sections.get, path)

    def supplied(editor: Any) -> Sequence[KVMemory]:
        return operands(run.loaded, editor, path, stage.say)

    around = Around(run.loaded, full, checked.editor, supplied, stored)
    others = [_beside(other, run, number, stored) for number, other in enumerate(checked.others)]
    begun = stage.step("start", lambda: start(around, checked.config["start"]), sized)
    samples, held_out = _samples(checked, run, full)
    tracker = stage.inner()
    trained = stage.step(
        "train",
        lambda: train(
            run.loaded.model, begun, samples, checked.train, tokenizer=run.loaded.tokenizer,
            held_out=held_out, distractors=others, folder=stage.folder / "checkpoints",
            tracker=tracker, teacher=full if checked.train.objective.attention else None,
        ),
        lambda memory: _losses(tracker),
    )  # fmt: skip
    memories = {
        NOTHING: None,
        TRUNCATION: truncated(begun, full),
        _START: begun,
        _TRAINED: trained,
    }
    found = run.compare(full, memories, TRUNCATION)
    kept = (run.keep(trained, found, _TRAINED),)
    facts = {
        "start": checked.config["start"]["start"],
        "distractors": len(others),
        "samples": len(samples),
        "samples held out": len(held_out),
        "supervised tokens": sum(len(sample) - sample.start for sample in samples),
        **{f"held-out {name}": value for name, value in _losses(tracker).items()},
    }
    return run.report(trained, full, found, kept, _TRAINED, TRUNCATION, facts)


def _beside(
    other: Other, run: Recalling, number: int, stored: Callable[[str], KVMemory]
) -> KVMemory:
    def captured(material: Material) -> KVMemory:
        return run.capture(material.context(run.loaded.tokenizer), f"distractor/{number}")

    return other.memory(stored, captured)


def _samples(
    checked: Plan, run: Recalling, full: KVMemory
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    section = checked.config["samples"]
    wanted, stage = checked.study, run.stage
    if wanted is None:
        made = SampleSet(section["folder"])
        check_turns(run.loaded, made, full.source)
    else:
        made = stage.step(
            "study",
            lambda: study(
                run.loaded, checked.material, wanted, stage.folder / "samples",
                source=full.source, tracker=stage.inner(),
            ),
            lambda found: {"samples": len(found), "attempts": found.attempts},
        )  # fmt: skip
    share = section.get("held_out")
    return made.split(share) if share else (made, ())


def _samples_section(folder: str | None = None, held_out: float | None = None) -> None:
    """Names the keys of the section ``samples``."""


def _editor(config: Mapping[str, Any]) -> Any:
    """Returns the start's editor; other starts have none, whatever the recipe names."""
    check_start(config["start"])
    if config["start"]["start"] != "editor":
        return None
    if not config.get("editor"):
        raise InvalidArgument(
            "start=editor begins with what an editor leaves: choose one (editor=attention_matching)"
        )
    return sections.build_editor(config["editor"])


def _losses(tracker: Inner) -> dict[str, float]:
    values = tracker.values("eval/kl")
    return {"kl before": values[0], "kl best": min(values)} if values else {}
