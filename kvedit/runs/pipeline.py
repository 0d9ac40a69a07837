"""The pipeline of edits: capture, edit, compare, store, reuse. It knows no Hydra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.editors import REGISTRY
from kvedit.errors import InvalidArgument
from kvedit.runs import sections, steps
from kvedit.runs.report import Report, Side
from kvedit.runs.reuse import second_process
from kvedit.runs.stage import Say, Stage, perform
from kvedit.runs.targets import fill

if TYPE_CHECKING:
    from kvedit.memory import KVMemory

__all__ = ["Plan", "Say", "plan", "run"]

SECTIONS = ("editor",)
"""Keys of the config beside those that all pipelines have."""


@dataclass(frozen=True)
class Plan:
    """A config that was checked: nothing was loaded or written yet.

    Args:
        task: name of the run.
        config: the config's sections, as plain data.
        context: what is captured.
        editor: the editor.
        question: the question that the edit is about.
        unrelated: questions that it should leave alone.
    """

    task: str
    config: Mapping[str, Any]
    context: Any
    editor: Any
    question: steps.Question
    unrelated: tuple[str, ...]

    @property
    def questions(self) -> tuple[str, ...]:
        """All questions."""
        return (self.question.text, *self.unrelated)


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config, with what can be built without a model.

    Args:
        config: plain data with the sections of ``kvedit/conf/run.yaml``.

    Raises:
        InvalidArgument: if a value is missing or out of range, or something is to be instantiated.
        UnknownName: if a key or an editor does not exist.
    """
    sections.check_known(config, SECTIONS)
    if not config.get("editor"):
        raise InvalidArgument(
            "nothing to do: choose a recipe (recipes=quickstart), or an editor (editor=..., of "
            f"{', '.join(REGISTRY)}) and a document"
        )
    sections.check_shared(config, SECTIONS)
    question, unrelated = fill("questions", _questions, config["questions"])
    context = fill("document", steps.read_document, config["document"])
    editor = sections.build_editor(config["editor"])
    return Plan(str(config["task"]), config, context, editor, question, unrelated)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> Report:
    """Returns what a run measured, from the capture to the second process.

    Args:
        config: see :func:`plan`.
        folder: the run's folder: ``results.json``, and what the tracker writes.
        say: takes progress, line by line.

    Raises:
        KVEditError: if something is refused; the store then is as it was before.
    """
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _Run(checked, stage).report())


class _Run:
    """One run."""

    def __init__(self, checked: Plan, stage: Stage) -> None:
        self.plan, self.stage = checked, stage

    def report(self) -> Report:
        config, question, step = self.plan.config, self.plan.question, self.stage.step
        loaded = step("load", lambda: steps.load_model(**config["model"]))
        context, options = self.plan.context, config["capture"]
        memory = step("capture", lambda: steps.capture(loaded, context, **options), _size)
        # Before any question is asked: a span that isn't there is found out early.
        others = steps.operands(loaded, self.plan.editor, config["store"]["path"], self.stage.say)
        edited = step("edit", lambda: steps.edit(loaded, memory, self.plan.editor, others), _size)
        before = step("ask", lambda: self.side(loaded, memory), _likelihood)
        lossless = step(
            "check", lambda: steps.lossless(loaded, memory, question.text), _one("difference")
        )
        after = step("ask_edited", lambda: self.side(loaded, edited), _likelihood)
        given = {text: before.answers[text] for text in self.plan.unrelated}
        drift = step("compare", lambda: steps.diverge(loaded, memory, edited, given), _drift)
        record = step(
            "put", lambda: sections.put(edited, **config["store"]), _one("version", "version")
        )
        reuse, asked = config["reuse"], self.plan.questions
        second = step(
            "reuse", lambda: second_process(config, record.record, asked, **reuse), _times
        )
        return Report(
            task=self.plan.task,
            model=config["model"]["name"],
            dtype=str(memory.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            tokens=memory.tokens_count,
            question=question,
            editor={"editor": config["editor"]["editor"], **self.plan.editor.parameters()},
            before=before,
            after=after,
            drift=drift,
            lossless=lossless,
            record=record.record,
            version=record.version,
            store=(config["store"]["path"], config["store"]["name"]),
            seconds=self.stage.seconds,
            second=second,
        )

    def side(self, loaded: steps.Loaded, memory: KVMemory) -> Side:
        options = self.plan.config["answer"]
        return Side(
            digest=memory.digest,
            slots=memory.slots,
            bytes=memory.nbytes,
            likelihood=steps.likelihood(loaded, memory, self.plan.question),
            answers={t: steps.answer(loaded, memory, t, **options) for t in self.plan.questions},
        )


def _questions(
    edited: Mapping[str, Any], unrelated: Sequence[str] = ()
) -> tuple[steps.Question, tuple[str, ...]]:
    question = fill("questions.edited", steps.Question, edited)
    if question.text in unrelated or len(set(unrelated)) < len(unrelated):
        raise InvalidArgument("questions: every question may stand there once")
    return question, tuple(unrelated)


def _one(key: str, attribute: str | None = None) -> Callable[[Any], Mapping[str, float]]:
    return lambda result: {key: getattr(result, attribute) if attribute else result}


def _size(memory: KVMemory) -> Mapping[str, float]:
    return {"tokens": memory.tokens_count, "slots": memory.slots, "bytes": memory.nbytes}


def _likelihood(side: Side) -> Mapping[str, float]:
    return side.likelihood


def _drift(drift: steps.Drift | None) -> Mapping[str, float]:
    return {"kl": drift.kl, "worst": drift.worst, "agreement": drift.agreement} if drift else {}


def _times(second: Mapping[str, Any] | None) -> Mapping[str, float]:
    return second["seconds"] if second else {}
