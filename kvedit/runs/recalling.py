"""Recalling: what the pipelines that end in a recall table have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.evals.recall import RecallReport, recall
from kvedit.evals.recall.size import Size
from kvedit.memory import KVMemory
from kvedit.runs import sections, steps
from kvedit.runs.asking import Asked, ask
from kvedit.runs.recall_report import Kept, RecallRun, label_metrics
from kvedit.runs.reuse import second_process
from kvedit.runs.stage import Stage

__all__ = ["NOTHING", "TRUNCATION", "Recalling", "sized", "truncated"]

NOTHING, TRUNCATION = "no context", "truncation"
"""Names of two memories that every table has."""


@dataclass(frozen=True, eq=False)
class Recalling:
    """A run with its model, questions and store.

    Args:
        config: the config.
        asked: what memories are asked.
        stage: the run's clock and tracker.
        loaded: the model.
    """

    config: Mapping[str, Any]
    asked: Asked
    stage: Stage
    loaded: steps.Loaded

    @classmethod
    def load(cls, config: Mapping[str, Any], asked: Asked, stage: Stage) -> Recalling:
        """Returns a run after the model was loaded."""
        loaded = stage.step("load", lambda: steps.load_model(**config["model"]))
        return cls(config, asked, stage, loaded)

    def capture(self, context: Any, name: str = "capture") -> KVMemory:
        """Returns the memory of a context."""
        options = self.config["capture"]
        return self.stage.step(name, lambda: steps.capture(self.loaded, context, **options), sized)

    def compare(
        self, full: KVMemory, memories: Mapping[str, KVMemory | None], rival: str
    ) -> RecallReport:
        """Returns what each memory recalls, beside the full context."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        questions, options = self.asked.questions(full), self.asked.options(full)
        return self.stage.step(
            "recall",
            lambda: recall(
                model, tokenizer, memories, questions, full=full, baseline=rival, **options
            ),
            lambda report: {f"kl {name}": report.mean(name, "kl").value for name in memories},
        )

    def keep(self, memory: KVMemory, report: RecallReport, label: str, suffix: str = "") -> Kept:
        """Returns what the store holds after a memory was put, with its means beside it.

        Args:
            memory: the memory.
            report: what it recalls.
            label: its name there.
            suffix: put behind the store's name.
        """
        section = dict(self.config["store"])
        name = section.pop("name") + suffix
        metrics = label_metrics(report, label)
        record = self.stage.step(
            f"put{suffix}",
            lambda: sections.put(memory, name=name, metrics=metrics, **section),
            lambda record: {"version": record.version},
        )
        return Kept.of(memory, record, section["path"], name)

    def report(
        self,
        memory: KVMemory,
        full: KVMemory,
        found: RecallReport,
        kept: tuple[Kept, ...],
        chosen: str,
        rival: str,
        facts: Mapping[str, Any],
    ) -> RecallRun:
        """Returns the run's report, after a second process answered from the stored memory.

        Args:
            memory: the memory that was stored first.
            full: the full context's.
            found: the recall table.
            kept: what was stored.
            chosen: name of the memory that the run is about.
            rival: name of the one that it is compared with.
            facts: further facts.
        """
        config, prompts = self.config, self.asked.prompts(full)
        answers = self.stage.step(
            "ask", lambda: ask(self.loaded, memory, prompts, config["answer"])
        )
        second = self.stage.step(
            "reuse",
            lambda: second_process(config, kept[0].record, prompts, **config["reuse"]),
            lambda reply: reply["seconds"] if reply else {},
        )
        return RecallRun(
            task=str(config["task"]),
            model=config["model"]["name"],
            dtype=str(memory.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            recall=found,
            chosen=chosen,
            rival=rival,
            facts=facts,
            kept=kept,
            answers=answers,
            second=second,
            seconds=self.stage.seconds,
        )


def truncated(memory: KVMemory, full: KVMemory) -> KVMemory:
    """Returns the full context's first slots, as many as another memory keeps per KV head."""
    from kvedit.editors import build

    kept = max(2, round(Size.of(memory, full).kept))
    first: KVMemory = build("truncate", budget=kept)(full) if kept < full.slots else full
    return first


def sized(memory: KVMemory) -> Mapping[str, float]:
    """Returns a memory's size, as a step reports it."""
    return {"tokens": memory.tokens_count, "slots": memory.slots, "bytes": memory.nbytes}
