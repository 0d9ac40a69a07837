"""The pipeline of steering: a delta, its strength, a table, the store, a second process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvedit.evals.steering import CalibratedStrength, Method, StyleReport
from kvedit.evals.steering.entering import Entry
from kvedit.runs.extraction import COLUMNS
from kvedit.runs.recall_report import Kept
from kvedit.runs.stage import Say, Stage, perform
from kvedit.runs.steer import STEERED, SteerPlan, SteerRun, counted, steer_plan
from kvedit.runs.steered_reuse import behind, reply_at, second_process
from kvedit.runs.steering_report import SteeringRun, style_metrics
from kvedit.runs.steps import Answer
from kvedit.steering.prompting import prompted

__all__ = ["plan", "run"]

_DELTA, _LAYERS = "/delta", 4


def plan(config: Mapping[str, Any]) -> SteerPlan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    return steer_plan(config)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> SteeringRun:
    """Returns what steering does; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


def _report(checked: SteerPlan, stage: Stage) -> SteeringRun:
    run = SteerRun.begin(checked, stage)
    bystanders = run.bystanders()
    strength, calibrated = run.strength(bystanders)
    method = Method(partial(run.steer, run.part), strength, None, run.part.digest)
    style = run.style(strength, bystanders, {STEERED: method})
    metrics = run.found.measures() | style_metrics(style, STEERED)
    finish = _in_cache if checked.way.hold == "prompt" else _while_running
    kept, answers, second = finish(run, strength, metrics)
    return SteeringRun(
        task=str(checked.config["task"]),
        model=checked.config["model"]["name"],
        dtype=str(run.loaded.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        delta=run.found.to_json(),
        style=style,
        chosen=STEERED,
        calibrated=calibrated,
        tables={"delta": [COLUMNS, *run.found.longest(_LAYERS)]},
        told=_told(style, strength),
        facts=_facts(run, strength, calibrated),
        kept=kept,
        answers=answers,
        second=second,
        seconds=stage.seconds,
    )


Finish = tuple[tuple[Kept, ...], dict[str, Answer], Mapping[str, Any] | None]


def _in_cache(run: SteerRun, strength: float, metrics: Mapping[str, float]) -> Finish:
    """Stores steered prompts; the second process goes on behind them, without the delta."""
    way, style = run.plan.way, run.plan.style
    asker = style.asker(run.loaded, way.hold, way.offset, rows=1)
    delta = run.put(run.found.delta.operand(), _DELTA, metrics)
    edit, memories = way.steering(run.loaded.model, run.part, strength), {}
    for question in style.questions[: style.again]:
        prompt = asker.as_turns(question.prompt)
        memories[question.prompt] = edit(
            prompted(run.loaded.model, run.loaded.tokenizer, None, prompt, chat=style.chat)
        )
    kept = [
        run.put(memory, "" if place == 0 else f"/{place + 1}", metrics)
        for place, memory in enumerate(memories.values())
    ]

    def answered() -> dict[str, Answer]:
        return {text: reply_at(asker, behind(asker, m)) for text, m in memories.items()}

    answers = run.stage.step("ask", answered)
    records = {text: one.record for text, one in zip(memories, kept, strict=True)}
    second = run.stage.step(
        "reuse", lambda: second_process(run.plan.config, asker, memories=records), _times
    )
    return (*kept, delta), answers, second


def _while_running(run: SteerRun, strength: float, metrics: Mapping[str, float]) -> Finish:
    """Stores the delta; the second process takes it from there and steers with it."""
    way, style, config = run.plan.way, run.plan.style, run.plan.config
    asker = style.asker(run.loaded, way.hold, way.offset, rows=1)
    delta = run.put(run.found.delta.operand(), "", metrics)
    prompts = [question.prompt for question in style.questions[: style.again]]

    def answered() -> dict[str, Answer]:
        entry, places = Entry(lambda: run.steer(run.part, strength)), asker.places(prompts)
        return {p: reply_at(asker, at, entry) for p, at in zip(prompts, places, strict=True)}

    answers = run.stage.step("ask", answered)
    section = {**config["steering"], "strength": strength, "target_kl": None}
    asked = {"prompts": prompts, "delta": delta.record, "steering": section}
    second = run.stage.step("reuse", lambda: second_process(config, asker, **asked), _times)
    return (delta,), answers, second


def _told(style: StyleReport, strength: float) -> str:
    count: dict[str, str] = {}
    for name in style.names:
        # Random directions are called "random SEED": one number per seed.
        short = "random" if name.startswith("random ") else name
        number = str(counted(style, name))
        count[short] = f"{count[short]}/{number}" if short in count else number
    others = ", ".join(f"{name} {n}" for name, n in count.items() if name != STEERED)
    told = (
        f"{style.markers.name} in {count[STEERED]} of {style.n} answers at strength {strength:.4g}"
    )
    told = f"{told} ({others})"
    if "accuracy" in style.metrics:
        none = counted(style, style.baseline, "accuracy")
        told += f", right {counted(style, STEERED, 'accuracy')} ({style.baseline} {none})"
    return told


def _facts(run: SteerRun, strength: float, calibrated: CalibratedStrength | None) -> dict[str, Any]:
    facts = {
        "pairs": "-" if run.plan.contrast is None else len(run.plan.contrast),
        "layers steered": len(run.part.layers),
        "sites steered": ", ".join(run.part.sites),
        "delta": run.found.delta.digest[:12],
        "strength": strength,
    }
    if calibrated is not None:
        facts["held-out KL at it"] = str(calibrated.nearest.held_out)
    return facts


def _times(second: Mapping[str, Any] | None) -> Mapping[str, float]:
    return second["seconds"] if second else {}
