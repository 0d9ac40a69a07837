"""RecallRun: what memories of one context recall, which of them was stored, and what came back."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvedit.evals.recall import RecallReport
from kvedit.memory import KVMemory
from kvedit.runs.report import align, told
from kvedit.runs.stage import Artifact
from kvedit.runs.steps import Answer
from kvedit.store import Record

__all__ = ["Kept", "RecallRun", "label_metrics"]

_METRICS = ("kl", "agreement", "nll_gold", "f1", "contains")
_WRAP, _EXAMPLES = 96, 3


@dataclass(frozen=True)
class Kept:
    """A memory in the store.

    Args:
        store: folder of the store.
        name: its name.
        version: version of the name.
        record: record digest.
        content: content digest.
        servable: whether an engine without bias and rules can serve it.
    """

    store: str
    name: str
    version: int
    record: str
    content: str
    servable: bool

    @classmethod
    def of(cls, memory: KVMemory, record: Record, store: str, name: str) -> Kept:
        """Returns what was put."""
        servable = bool(memory.servable())
        return cls(store, name, record.version, record.record, memory.digest, servable)

    def artifact(self) -> Artifact:
        """Returns what a tracker notes of it."""
        facts = {"record": self.record, "content": self.content, "version": self.version}
        return Artifact(self.name, Path(self.store), facts)


def label_metrics(report: RecallReport, name: str) -> dict[str, float]:
    """Returns a memory's means, as they are stored beside it."""
    found = {metric: report.mean(name, metric) for metric in _METRICS if metric in report.metrics}
    return {f"recall/{metric}": mean.value for metric, mean in found.items() if mean.n}


@dataclass(frozen=True)
class RecallRun:
    """All that a run of the cartridge, compaction or composition pipeline measured.

    Args:
        task: name of the run.
        model: name of the model.
        dtype: dtype of the memories.
        threads: torch threads of both processes.
        recall: what each memory recalls.
        chosen: the memory that the run is about.
        rival: the one that it is compared with.
        facts: further facts, name to text or number.
        kept: what was stored, the chosen memory first.
        answers: the stored memory's answers in this process.
        second: the second process's reply, or None if there was none.
        seconds: seconds of the steps of this process.
    """

    task: str
    model: str
    dtype: str
    threads: int
    recall: RecallReport
    chosen: str
    rival: str
    facts: Mapping[str, Any]
    kept: tuple[Kept, ...]
    answers: Mapping[str, Answer]
    second: Mapping[str, Any] | None
    seconds: Mapping[str, float]

    @property
    def gain(self) -> float:
        """KL to the full context of the rival less that of the chosen memory, nats per token."""
        return self.recall.mean(self.rival, "kl").value - self.recall.mean(self.chosen, "kl").value

    @property
    def equal_logits(self) -> int | None:
        """To how many questions both processes have the very same first logits, bit by bit."""
        if self.second is None:
            return None
        theirs = self.second["answers"]
        return sum(int(given.logits == theirs[text]["logits"]) for text, given in self.own())

    def own(self) -> list[tuple[str, Answer]]:
        """Returns question and answer pairs of this process."""
        return list(self.answers.items())

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the table."""
        return ("memory", "tokens", "kept", "ratio", *self._metrics())

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What was stored."""
        return tuple(kept.artifact() for kept in self.kept)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table: a line per memory, means with their 95 % intervals."""
        rows = []
        for name in self.recall.names:
            size = self.recall.sizes[name]
            ratio = "-" if size.ratio is None else f"{size.ratio:.3g}x"
            cells = [self._cell(name, metric) for metric in self._metrics()]
            rows.append((name, f"{size.tokens:g}", f"{size.kept:.4g}", ratio, *cells))
        return rows

    def text(self) -> str:
        """Returns everything for people: tables, answers, one sentence."""
        facts = [(name, told(value)) for name, value in self.facts.items()]
        parts = [
            f"recall: {self.recall.n} questions, reference 'full', 95 % intervals over questions",
            align([self.columns, *self.rows()]),
            align(facts) if facts else "",
            self._examples(),
            self.headline(),
        ]
        return "\n\n".join(part for part in parts if part)

    def headline(self) -> str:
        """Returns the main numbers in one sentence."""
        mine, other = (self.recall.mean(n, "kl").value for n in (self.chosen, self.rival))
        ratio = self.recall.sizes[self.chosen].ratio
        same = "no second process"
        if self.second is not None:
            yes = self.equal_logits == len(self.answers)
            same = f"logits bit-equal in a second process: {'yes' if yes else 'no'}"
        smaller = "" if ratio is None else f" at {ratio:.3g}x"
        return (
            f"{self.task}: KL to the full context {mine:.3f} nats/token{smaller} ({self.chosen}), "
            f"{other:.3f} ({self.rival}), stored as {self.kept[0].name}, {same}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        names = ("task", "model", "dtype", "threads", "chosen", "rival")
        return {
            **{name: getattr(self, name) for name in names},
            "gain": self.gain,
            "recall": self.recall.to_json(results=True),
            "questions": {q.key: q.prompt for q in self.recall.questions},
            "facts": dict(self.facts),
            "kept": [asdict(kept) for kept in self.kept],
            "answers": {text: asdict(given) for text, given in self.own()},
            "second": self.second,
            "bit_equal": None if self.second is None else self.equal_logits == len(self.answers),
            "seconds": dict(self.seconds),
        }

    def _metrics(self) -> list[str]:
        return [metric for metric in _METRICS if metric in self.recall.metrics]

    def _cell(self, name: str, metric: str) -> str:
        mean = self.recall.mean(name, metric)
        if not mean.n:
            return "-"
        spread = "" if mean.low is None else f" [{mean.low:.2f}, {mean.high:.2f}]"
        return f"{mean.value:.3f}{spread}"

    def _examples(self) -> str:
        names = [n for n in ("full", self.rival, self.chosen) if n in self.recall.names]
        width = max(map(len, names))
        blocks = []
        for place, question in enumerate(self.recall.questions[:_EXAMPLES]):
            lines = [question.prompt.strip()]
            for name in dict.fromkeys(names):
                said = self.recall.of(name)[place].answer
                lines.append(f"  {name.ljust(width)}  {textwrap.shorten(said, _WRAP)}")
            blocks.append("\n".join(lines))
        return "\n".join(blocks)
