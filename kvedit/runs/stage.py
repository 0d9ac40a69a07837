"""Stage: where a run happens. It times steps, tells user and tracker, and writes results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

import kvedit
from kvedit.memory.files import write_atomically
from kvedit.tracking import RunFacts, Tracker, library_versions, open_tracker

__all__ = ["Artifact", "Findings", "Inner", "Say", "Stage", "perform"]

Result = TypeVar("Result")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """Something that a run leaves behind, for the tracker.

    Args:
        name: what it is called.
        path: where it is.
        facts: plain data about it.
    """

    name: str
    path: Path
    facts: Mapping[str, Any]


class Findings(Protocol):
    """What a run found: for people, for a table, and as plain data."""

    @property
    def gain(self) -> float | None:
        """The number that a sweep may maximise."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the table."""

    @property
    def artifacts(self) -> Sequence[Artifact]:
        """What the run leaves behind."""

    def rows(self) -> Sequence[Sequence[str]]:
        """Returns the table."""

    def text(self) -> str:
        """Returns everything for people."""

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data."""


class Stage:
    """One run's folder, tracker and clock.

    Args:
        folder: the run's folder.
        tracker: takes a metric per step, and what a step logs itself.
        say: takes progress, line by line.

    Attributes:
        seconds: name of a step to what it took.
    """

    def __init__(self, folder: Path, tracker: Tracker, say: Say = print) -> None:
        """Nothing is written yet."""
        self.folder, self.tracker, self.say = folder, tracker, say
        self.seconds: dict[str, float] = {}
        self._next = 0

    def step(
        self,
        name: str,
        work: Callable[[], Result],
        measure: Callable[[Result], Mapping[str, float]] = lambda _: {},
    ) -> Result:
        """Returns what ``work`` returns, after its time and measures were noted.

        Args:
            name: name of the step.
            work: does it.
            measure: numbers about the result.
        """
        started = time.perf_counter()
        result = work()
        self.seconds[name] = seconds = time.perf_counter() - started
        found = measure(result)
        self.log(
            self._next,
            {f"{name}/{key}": value for key, value in {"seconds": seconds, **found}.items()},
        )
        told = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        self.say(f"{name:<10} {seconds:6.1f} s   {told}".rstrip())
        return result

    def inner(self) -> Inner:
        """Returns the tracker for a step that counts from 0 itself, such as training."""
        return Inner(self, self._next)

    def log(self, number: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics under a number; later steps have higher ones."""
        self.tracker.log(number, metrics)
        self._next = max(self._next, number + 1)


class Inner(Tracker):
    """A tracker whose numbers go on behind the stage's: trackers take no lower ones.

    Args:
        stage: the run; it closes the tracker behind it.
        first: number of this one's step 0.

    Attributes:
        seen: step and metrics of every log.
    """

    def __init__(self, stage: Stage, first: int) -> None:
        """Nothing is logged yet."""
        self.stage, self.first = stage, first
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics at a step of its own counting."""
        self.seen.append((step, dict(metrics)))
        self.stage.log(self.first + step, metrics)

    def values(self, name: str) -> list[float]:
        """Returns what was logged under a name, in order."""
        return [metrics[name] for _, metrics in self.seen if name in metrics]

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hands a table on."""
        self.stage.tracker.table(name, columns, rows)

    def artifact(self, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Hands an artifact on."""
        self.stage.tracker.artifact(name, path, metadata)

    def close(self) -> None:
        """Does nothing: the stage's tracker stays open."""


Found = TypeVar("Found", bound=Findings)


def perform(
    config: Mapping[str, Any], folder: Path, say: Say, work: Callable[[Stage], Found]
) -> Found:
    """Returns what ``work`` finds, with ``results.json`` and the tracker's table written.

    Args:
        config: the run's whole config; its task, threads and tracker are used.
        folder: the run's folder.
        say: takes progress.
        work: the run itself.
    """
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    versions = {"kvedit": kvedit.__version__, **library_versions()}
    options = {"tracker": "none"} | (config["tracker"] or {})
    facts = RunFacts(str(config["task"]), config, versions)
    with open_tracker(options.pop("tracker"), folder, facts, **options) as tracker:
        found = work(Stage(folder, tracker, say))
        tracker.table("results", found.columns, found.rows())
        for made in found.artifacts:
            tracker.artifact(made.name, made.path, made.facts)
    results = json.dumps(found.to_json(), indent=2, ensure_ascii=False, default=str)
    write_atomically(folder / "results.json", results.encode())
    return found
