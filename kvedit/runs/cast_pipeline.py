"""The pipeline of conditional steering (CAST, arXiv 2409.05907): steer what a prompt calls for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.steering import Method, Steering, StyleReport
from kvedit.evals.steering.entering import Entry
from kvedit.memory import Delta
from kvedit.runs.condition import Labelled, read_labelled
from kvedit.runs.kinds import Kind, ask_kind, f1, kinds_table
from kvedit.runs.stage import Say, Stage, perform
from kvedit.runs.steer import STEERED, SteerPlan, SteerRun, steer_plan
from kvedit.runs.steered_reuse import reply_at, second_process
from kvedit.runs.steering_report import SteeringRun, style_metrics
from kvedit.runs.steps import Answer
from kvedit.runs.ways import Continuous
from kvedit.steering.conditions import Condition
from kvedit.steering.searching import FoundCondition

__all__ = ["Plan", "plan", "run"]

SECTIONS = ("condition",)
_IF_MET, _CONDITION = "steered if met", "/condition"


@dataclass(frozen=True)
class Plan:
    """A config that was checked.

    Args:
        steer: what every steering pipeline has.
        labelled: prompts by which the condition is found.
    """

    steer: SteerPlan
    labelled: Labelled

    @property
    def config(self) -> Mapping[str, Any]:
        """The config."""
        return self.steer.config


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    steer = steer_plan(config, SECTIONS)
    if not isinstance(steer.way, Continuous):
        raise InvalidArgument(
            "a condition is decided while the model reads a prompt, so it goes with "
            "steering=continuous; what is in a cache is steered for good"
        )
    return Plan(steer, read_labelled(config["condition"], steer.style))


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> SteeringRun:
    """Returns what conditional steering does; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


class _Conditional:
    """What steers: always, or if the condition is met."""

    def __init__(self, run: SteerRun, condition: Condition, strength: float) -> None:
        self.run, self.condition, self.strength = run, condition, strength

    def always(self) -> Steering:
        return self.run.steer(self.run.part, self.strength)

    def if_met(self, delta: Delta, strength: float) -> Steering:
        way, model = self.run.plan.way, self.run.loaded.model
        made: Steering = way.steering(model, delta, strength, condition=self.condition)
        return made

    def entries(self) -> tuple[Entry, Entry, Entry]:
        conditional = partial(self.if_met, self.run.part, self.strength)
        return Entry(), Entry(self.always), Entry(conditional)


def _report(checked: Plan, stage: Stage) -> SteeringRun:
    run = SteerRun.begin(checked.steer, stage)
    way, style = run.plan.way, run.plan.style
    asker = style.asker(run.loaded, way.hold, way.offset)
    found = stage.step(
        "condition",
        lambda: checked.labelled.find(run.loaded, asker, run.part),
        lambda found: {"layer": found.best.layer, "f1": found.best.f1},
    )
    bystanders = run.bystanders()
    strength, calibrated = run.strength(bystanders)
    steering = _Conditional(run, found.condition, strength)
    identity = f"{run.part.digest}/{found.condition.delta.digest}/{found.best}"
    report = run.style(
        strength,
        bystanders,
        {
            STEERED: Method(partial(run.steer, run.part), strength, None, run.part.digest),
            _IF_MET: Method(partial(steering.if_met, run.part), strength, None, identity),
        },
    )
    kinds = stage.step(
        "kinds",
        lambda: [
            ask_kind(asker, found.condition, steering.entries(), texts, style.markers)
            for texts in ([q.prompt for q in style.questions], style.bystanders)
        ],
        lambda kinds: {"met": kinds[0].fired, "met wrongly": kinds[1].fired},
    )
    kept = (
        run.put(
            run.found.delta.operand(), "", run.found.measures() | style_metrics(report, _IF_MET)
        ),
        run.put(found.condition.delta.operand(), _CONDITION, _held_out(found, kinds)),
    )
    prompts = [text for kind in kinds for text in kind.prompts[: style.again]]
    answers = stage.step("ask", lambda: _answers(run, steering, prompts))
    one = style.asker(run.loaded, way.hold, way.offset, rows=1)
    section = {**run.plan.config["steering"], "strength": strength, "target_kl": None}
    second = stage.step(
        "reuse",
        lambda: second_process(
            run.plan.config, one, prompts=prompts, delta=kept[0].record, steering=section,
            condition={"ref": kept[1].record, **_parameters(found.condition)},
        ),
        lambda reply: reply["seconds"] if reply else {},
    )  # fmt: skip
    return SteeringRun(
        task=str(run.plan.config["task"]),
        model=run.plan.config["model"]["name"],
        dtype=str(run.loaded.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        delta=run.found.to_json(),
        style=report,
        chosen=_IF_MET,
        calibrated=calibrated,
        tables={"held-out prompts, by what they shall do": kinds_table(kinds, (STEERED, _IF_MET))},
        told=_told(report, found, kinds),
        facts=_facts(checked, found),
        kept=kept,
        answers=answers,
        second=second,
        seconds=stage.seconds,
    )


def _answers(run: SteerRun, steering: _Conditional, prompts: Sequence[str]) -> dict[str, Answer]:
    way = run.plan.way
    asker = run.plan.style.asker(run.loaded, way.hold, way.offset, rows=1)
    entry = steering.entries()[-1]
    places = asker.places(prompts)
    return {p: reply_at(asker, at, entry) for p, at in zip(prompts, places, strict=True)}


def _parameters(condition: Condition) -> dict[str, Any]:
    return {name: getattr(condition, name) for name in ("layer", "threshold", "above", "read")}


def _held_out(found: FoundCondition, kinds: Sequence[Kind]) -> dict[str, float]:
    condition = found.condition
    return {
        "condition/layer": condition.layer,
        "condition/threshold": condition.threshold,
        "condition/above": float(condition.above),
        "condition/f1": found.best.f1,
        "condition/f1 held out": f1(*kinds),
    }


def _told(report: StyleReport, found: FoundCondition, kinds: Sequence[Kind]) -> str:
    wanted, others = kinds
    none, always, conditional = wanted.marked
    return (
        f"condition at layer {found.condition.layer} met by {wanted.fired} of {wanted.n} questions "
        f"and {others.fired} of {others.n} unrelated prompts held out, {report.markers.name} in "
        f"{conditional} of {wanted.n} answers (unsteered {none}, always steered {always}), "
        f"unrelated answers changed {others.changed[1]} of {others.n} (always steered "
        f"{others.changed[0]})"
    )


def _facts(checked: Plan, found: FoundCondition) -> dict[str, Any]:
    condition = found.condition
    return {
        "found on": f"{len(checked.labelled.met)} and {len(checked.labelled.unmet)} prompts",
        "layer": condition.layer,
        "met": f"{'above' if condition.above else 'below'} {condition.threshold:.4g}",
        "F1 on them": found.best.f1,
        "F1 if always met": found.always,
        "layers tried": len(found.points),
    }
