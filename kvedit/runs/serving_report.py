"""ServingRun: what an endpoint answered, beside what the library answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kvedit.runs.report import align
from kvedit.runs.stage import Artifact

__all__ = ["Exchange", "ServingRun"]

_WRAP = 96


@dataclass(frozen=True)
class Exchange:
    """One question to one memory.

    Args:
        side: ``"before"`` or ``"after"`` the edit.
        question: the question.
        own: the library's answer.
        own_logprobs: natural log-probabilities of its tokens.
        alone: the endpoint's answer, with nothing else under way.
        streamed: its answers token by token.
        crowded: its answer while others were asked for.
        logprobs: log-probabilities that it told.
        cached: slots of the memory that it used, by its own count.
        first: seconds to the first piece of a stream, the median.
        whole: seconds to its end, the median.
    """

    side: str
    question: str
    own: str
    own_logprobs: tuple[float, ...]
    alone: str
    streamed: tuple[str, ...]
    crowded: str
    logprobs: tuple[float, ...]
    cached: int
    first: float
    whole: float

    @property
    def equal(self) -> bool:
        """Whether all of the endpoint's answers are the library's."""
        counts = len(self.logprobs) == len(self.own_logprobs)
        return counts and {self.own} == {self.alone, self.crowded, *self.streamed}

    @property
    def distance(self) -> float:
        """Largest difference of a log-probability, in nats; inf if tokens differ in number."""
        if len(self.logprobs) != len(self.own_logprobs):
            return float("inf")
        pairs = zip(self.logprobs, self.own_logprobs, strict=True)
        return max(abs(a - b) for a, b in pairs)


@dataclass(frozen=True)
class ServingRun:
    """All that a run of the serve pipeline measured.

    Args:
        task: name of the run.
        model: name of the model.
        dtype: dtype of the memories.
        threads: torch threads of both processes.
        slots: slots of the edited memory.
        exchanges: all questions to both versions.
        together: requests that were under way at once, in the crowd.
        started: seconds until the endpoint took requests.
        pid: its process.
        record: record digest of the edited memory.
        version: its version.
        store: folder of the store and the stored name.
        seconds: seconds of the steps of this process.
    """

    task: str
    model: str
    dtype: str
    threads: int
    slots: int
    exchanges: tuple[Exchange, ...]
    together: int
    started: float
    pid: int
    record: str
    version: int
    store: tuple[str, str]
    seconds: Mapping[str, float]

    @property
    def gain(self) -> float:
        """Share of answers that are the library's."""
        return self.equal / len(self.exchanges)

    @property
    def equal(self) -> int:
        """How many answers are the library's, alone, streamed and among others."""
        return sum(each.equal for each in self.exchanges)

    @property
    def distance(self) -> float:
        """Largest difference of a log-probability, in nats."""
        return max(each.distance for each in self.exchanges)

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the table."""
        return ("question", "memory", "equal", "log p apart", "first token, s", "whole, s")

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The stored memory."""
        path, name = self.store
        return (Artifact(name, Path(path), {"record": self.record, "version": self.version}),)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table: a line per question and memory."""
        return [
            (
                textwrap.shorten(each.question, 40, placeholder="..."),
                each.side,
                "yes" if each.equal else "no",
                f"{each.distance:.1e}",
                f"{each.first:.3f}",
                f"{each.whole:.3f}",
            )
            for each in self.exchanges
        ]

    def text(self) -> str:
        """Returns everything for people: the table, the answers, one sentence."""
        answers = []
        for each in self.exchanges:
            said = textwrap.shorten(each.alone, _WRAP, placeholder="...")
            answers.append(f"{each.question} [{each.side}]\n  {said}")
        return "\n\n".join((align([self.columns, *self.rows()]), *answers, self.headline()))

    def headline(self) -> str:
        """Returns the main numbers in one sentence."""
        return (
            f"{self.task}: {self.equal} of {len(self.exchanges)} answers over HTTP equal to "
            f"kv.generate (alone, streamed, {self.together} at once), log p apart by "
            f"{self.distance:.1e}, first token after "
            f"{median(each.first for each in self.exchanges):.2f} s over {self.slots} slots"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data, with what is derived from it."""
        derived = {"gain": self.gain, "equal": self.equal, "distance": self.distance}
        return {**asdict(self), **derived}
