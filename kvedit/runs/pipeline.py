"""The pipeline: the steps one after the other, each noted by the tracker. It knows no Hydra."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

import kvedit
from kvedit.editors import REGISTRY, build
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.models.cache_folder import write_atomically
from kvedit.runs import steps
from kvedit.runs.report import COLUMNS, Report, Side
from kvedit.runs.reuse import Request, reuse_elsewhere
from kvedit.runs.targets import check_keys, fill, refuse_targets
from kvedit.store import Store
from kvedit.store.refs import check_labels, check_name
from kvedit.tracking import RunFacts, Tracker, library_versions, open_tracker

if TYPE_CHECKING:
    from kvedit.memory import KVMemory
    from kvedit.store import Record

__all__ = ["Plan", "Say", "plan", "run"]

Result = TypeVar("Result")
Say = Callable[[str], None]

SECTIONS = (
    "answer", "capture", "document", "editor", "model", "questions", "reuse", "store", "task",
    "threads", "tracker",
)  # fmt: skip
"""Keys of a config."""


@dataclass(frozen=True)
class Plan:
    """A config that was checked: nothing was loaded or written yet.

    Args:
        task: name of the run.
        threads: torch threads, or None.
        config: the config's sections, as plain data.
        context: what is captured.
        editor: the editor.
        question: the question that the edit is about.
        unrelated: questions that it should leave alone.
    """

    task: str
    threads: int | None
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
    refuse_targets(config)
    for key in config:
        if key not in SECTIONS:
            raise UnknownName("key of the config", key, SECTIONS)
    if not config.get("editor"):
        raise InvalidArgument(
            "nothing to do: choose a recipe (recipes=quickstart), or an editor (editor=..., of "
            f"{', '.join(REGISTRY)}) and a document"
        )
    for key in SECTIONS:
        if key not in config:
            raise InvalidArgument(f"the config lacks {key}; compose it from kvedit/conf/run.yaml")
    threads = config["threads"]
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InvalidArgument(f"threads: expected a number from 1 on, or null, found {threads!r}")
    question, unrelated = fill("questions", _questions, config["questions"])
    context = fill("document", steps.read_document, config["document"])
    check_keys("model", steps.load_model, config["model"])
    check_keys("capture", steps.capture, config["capture"], given=2)
    check_keys("answer", steps.answer, config["answer"], given=3)
    check_keys("reuse", _second_process, config["reuse"], given=2)
    fill("store", _check_store, config["store"])
    return Plan(
        str(config["task"]), threads, config, context, _editor(config["editor"]),
        question, unrelated,
    )  # fmt: skip


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
    if checked.threads is not None:
        torch.set_num_threads(checked.threads)
    versions = {"kvedit": kvedit.__version__, **library_versions()}
    facts = RunFacts(checked.task, config, versions)
    options = {"tracker": "none"} | (config["tracker"] or {})
    with open_tracker(options.pop("tracker"), folder, facts, **options) as tracker:
        report = _Run(checked, tracker, say).report()
        tracker.table("results", COLUMNS, report.rows())
        tracker.artifact(
            config["store"]["name"], Path(config["store"]["path"]),
            {"record": report.record, "content": report.after.digest, "version": report.version},
        )  # fmt: skip
    results = json.dumps(report.to_json(), indent=2, ensure_ascii=False, default=str)
    write_atomically(folder / "results.json", results.encode())
    return report


class _Run:
    """One run: it times the steps and tells tracker and user of each."""

    def __init__(self, checked: Plan, tracker: Tracker, say: Say) -> None:
        self.plan, self.tracker, self.say = checked, tracker, say
        self.seconds: dict[str, float] = {}

    def report(self) -> Report:
        config, question, step = self.plan.config, self.plan.question, self.step
        loaded = step("load", lambda: steps.load_model(**config["model"]))
        context, options = self.plan.context, config["capture"]
        memory = step("capture", lambda: steps.capture(loaded, context, **options), _size)
        # Before any question is asked: a span that isn't there is found out early.
        others = steps.operands(loaded, self.plan.editor, config["store"]["path"], self.say)
        edited = step("edit", lambda: steps.edit(loaded, memory, self.plan.editor, others), _size)
        before = step("ask", lambda: self.side(loaded, memory), _likelihood)
        lossless = step(
            "check", lambda: steps.lossless(loaded, memory, question.text), _one("difference")
        )
        after = step("ask_edited", lambda: self.side(loaded, edited), _likelihood)
        given = {text: before.answers[text] for text in self.plan.unrelated}
        drift = step("compare", lambda: steps.diverge(loaded, memory, edited, given), _drift)
        record = step("put", lambda: _put(edited, **config["store"]), _one("version", "version"))
        second = step(
            "reuse", lambda: _second_process(self.plan, record, **config["reuse"]), _times
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
            seconds=self.seconds,
            second=second,
        )

    def step(
        self,
        name: str,
        work: Callable[[], Result],
        measure: Callable[[Result], Mapping[str, float]] = lambda _: {},
    ) -> Result:
        started = time.perf_counter()
        result = work()
        self.seconds[name] = seconds = time.perf_counter() - started
        found = measure(result)
        metrics = {f"{name}/{key}": value for key, value in {"seconds": seconds, **found}.items()}
        self.tracker.log(len(self.seconds) - 1, metrics)
        told = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        self.say(f"{name:<10} {seconds:6.1f} s   {told}".rstrip())
        return result

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


def _editor(section: Mapping[str, Any]) -> Any:
    parameters = dict(section)
    name = parameters.pop("editor", "")
    check_keys("editor", REGISTRY.load(name), parameters)
    return build(editor=name, **parameters)


def _check_store(path: str, name: str, message: str = "", tags: Sequence[str] = ()) -> None:
    check_name(name)
    check_labels(message, tags)
    Store(path).close()


def _put(
    memory: KVMemory, path: str, name: str, message: str = "", tags: Sequence[str] = ()
) -> Record:
    with Store(path) as store:
        return store.put(memory, name, message=message, tags=tags)


def _second_process(
    checked: Plan,
    record: Record,
    enabled: bool = True,
    verify: Literal["full", "off"] = "full",
    repeats: int = 3,
) -> dict[str, Any] | None:
    if not enabled:
        return None
    config = checked.config
    return reuse_elsewhere(
        Request(
            store=config["store"]["path"],
            ref=record.record,
            model=config["model"],
            questions=checked.questions,
            answer=config["answer"],
            verify=verify,
            repeats=repeats,
            threads=torch.get_num_threads(),
        )
    )


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
