"""Report: what a run found, as a table, as one sentence, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvedit.memory.show import human_bytes
from kvedit.runs.stage import Artifact
from kvedit.runs.steps import Answer, Drift, Question

__all__ = ["COLUMNS", "Report", "Side", "align", "told"]

COLUMNS = ("", "before", "after", "change")
"""Columns of the table."""

_WRAP = 96


@dataclass(frozen=True)
class Side:
    """A memory before or after the edit.

    Args:
        digest: its content digest.
        slots: slots of its longest layer.
        bytes: bytes of its tensors.
        likelihood: log-probabilities of target and rival, in nats.
        answers: question to answer.
    """

    digest: str
    slots: int
    bytes: int
    likelihood: Mapping[str, float]
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class Report:
    """All that a run measured.

    Args:
        task: name of the run.
        model: name of the model.
        dtype: dtype of the memory.
        threads: torch threads of both processes.
        tokens: tokens of the captured context.
        question: the question that the edit is about.
        editor: the editor's name and parameters.
        before: the captured memory.
        after: the edited memory.
        drift: what the edit did to unrelated questions, or None if there are none.
        lossless: largest difference of a logit between capture-then-ask and a full prefill.
        record: record digest in the store.
        version: version of the stored name.
        store: folder of the store and the stored name.
        seconds: seconds of the steps of this process.
        second: the second process's reply, or None if there was none.
    """

    task: str
    model: str
    dtype: str
    threads: int
    tokens: int
    question: Question
    editor: Mapping[str, Any]
    before: Side
    after: Side
    drift: Drift | None
    lossless: float
    record: str
    version: int
    store: tuple[str, str]
    seconds: Mapping[str, float]
    second: Mapping[str, Any] | None = None

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the table."""
        return COLUMNS

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The stored memory."""
        path, name = self.store
        facts = {"record": self.record, "content": self.after.digest, "version": self.version}
        return (Artifact(name, Path(path), facts),)

    @property
    def gain(self) -> float | None:
        """By how many nats the edit raised the target's log-probability; None without target."""
        if "target" not in self.before.likelihood:
            return None
        return self.after.likelihood["target"] - self.before.likelihood["target"]

    @property
    def speedup(self) -> float | None:
        """Seconds of a full prefill over seconds of reuse; None without second process."""
        if self.second is None:
            return None
        seconds = self.second["seconds"]
        return float(seconds["prefill"] / (seconds["get"] + seconds["first_token"]))

    @property
    def equal_logits(self) -> int | None:
        """Of how many questions both processes have the very same first logits, bit by bit."""
        if self.second is None:
            return None
        theirs = {text: given["logits"] for text, given in self.second["answers"].items()}
        return sum(int(a.logits == theirs[text]) for text, a in self.after.answers.items())

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Returns the table, with :data:`COLUMNS`."""
        return [*self._memory_rows(), *self._effect_rows(), *self._reuse_rows()]

    def text(self) -> str:
        """Returns everything for people: the table, the answers, the sentence."""
        parts = [align([COLUMNS, *self.rows()]), self._answers(), self.headline()]
        return "\n\n".join(part for part in parts if part)

    def headline(self) -> str:
        """Returns the main numbers in one sentence."""
        parts = []
        if self.gain is not None:
            before, after = (side.likelihood["target"] for side in (self.before, self.after))
            parts.append(f"log p({_name(self.question.target)}) {before:.2f} -> {after:.2f}")
        if self.drift is not None:
            parts.append(f"unrelated KL {self.drift.kl:.4f} nats/token")
        if self.speedup is not None:
            parts.append(f"first token {self.speedup:.1f}x as fast as by prefill")
            equal, of = self.equal_logits, len(self.after.answers)
            parts.append(f"logits bit-equal in a second process: {_yes(equal == of)}")
        return f"{self.task}: " + ", ".join(parts or [f"stored as version {self.version}"])

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data, with what is derived from it."""
        derived = {
            "gain": self.gain,
            "speedup": self.speedup,
            "bit_equal": None
            if self.second is None
            else self.equal_logits == len(self.after.answers),
        }
        return {**asdict(self), **derived}

    def _memory_rows(self) -> list[tuple[str, str, str, str]]:
        first, second = self.before, self.after
        grown = second.bytes - first.bytes
        change = f"{'-' if grown < 0 else '+'}{human_bytes(abs(grown))}" if grown else ""
        return [
            ("tokens", str(self.tokens), str(self.tokens), ""),
            ("slots", str(first.slots), str(second.slots), ""),
            ("bytes", human_bytes(first.bytes), human_bytes(second.bytes), change),
        ]

    def _effect_rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for name, text in (("target", self.question.target), ("rival", self.question.rival)):
            if name in self.before.likelihood:
                old, new = self.before.likelihood[name], self.after.likelihood[name]
                label = f"log p({_name(text)}), nats"
                rows.append((label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}"))
        if self.drift is not None:
            rows.append(("unrelated: KL, nats/token", "", "", f"{self.drift.kl:.4f}"))
            label = f"unrelated: top-1 agreement, {self.drift.tokens} tokens"
            rows.append((label, "", "", f"{self.drift.agreement:.1%}"))
        rows.append(
            (
                "unedited memory vs full prefill: max logit difference",
                "",
                "",
                f"{self.lossless:.1e}",
            )
        )
        return rows

    def _reuse_rows(self) -> list[tuple[str, str, str, str]]:
        if self.second is None:
            return []
        seconds = self.second["seconds"]
        reuse = seconds["get"] + seconds["first_token"]
        equal = f"{self.equal_logits} of {len(self.after.answers)}"
        checked = "verified" if self.second["verified"] else "unverified"
        return [
            ("second process", "prefill", "reuse", "ratio"),
            ("seconds to first token", f"{seconds['prefill']:.3f}", f"{reuse:.3f}",
             f"{self.speedup:.1f}x"),
            (f"  of it get, {checked}", "", f"{seconds['get']:.3f}", ""),
            ("logits bit-equal to the first process", "", "", f"{equal} questions"),
        ]  # fmt: skip

    def _answers(self) -> str:
        blocks = []
        for text, old in self.before.answers.items():
            lines = [text, f"  before  {_short(old.text)}"]
            lines.append(f"  after   {_short(self.after.answers[text].text)}")
            if self.second is not None:
                same = self.second["answers"][text]["text"] == self.after.answers[text].text
                again = "the same" if same else _short(self.second["answers"][text]["text"])
                lines.append(f"  second process  {again}")
            blocks.append("\n".join(lines))
        return "\n".join(blocks)


def told(value: Any) -> str:
    """Returns a fact as a report shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WRAP else f"{line[: _WRAP - 3]}..."


def _name(text: str | None) -> str:
    return repr((text or "").strip())


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
