"""evaluate_tasks: free answers under an edit, graded: instructions, needles, questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.bootstrap import Difference, Mean, mean, paired_difference
from kvedit.evals.fluency import ngram_entropy
from kvedit.evals.journal import Journal
from kvedit.evals.prefills import Prefills
from kvedit.evals.tasks import Task, grade, group_by
from kvedit.memory import KVMemory
from kvedit.models.inspection import inspect
from kvedit.runtime.attaching import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TaskReport", "TaskResult", "evaluate_tasks", "task_difference"]

TaskMethod = Callable[[Task, KVMemory], KVMemory]


@dataclass(frozen=True)
class TaskResult:
    """One answer.

    Args:
        key: the task's key.
        scores: name and score in [0, 1], as :func:`~kvedit.evals.tasks.grade` has them; also
            ``fluency`` in bits and ``length`` in tokens.
        answer: the text.
    """

    key: str
    scores: tuple[tuple[str, float], ...]
    answer: str


@dataclass(frozen=True)
class TaskReport:
    """What a method does to a set of tasks.

    Args:
        name: the method.
        tasks: the tasks.
        results: one per task.
        strength: the method's strength; None if it has none.
        seed: seed of the bootstrap.
    """

    name: str
    tasks: tuple[Task, ...]
    results: tuple[TaskResult, ...]
    strength: float | None = None
    seed: int = 0

    @property
    def n(self) -> int:
        """Number of tasks."""
        return len(self.results)

    def values(self, metric: str = "passed") -> dict[str, float]:
        """Returns a metric task by task, for the tasks that have it.

        Raises:
            UnknownName: if no task has it.
        """
        found = {r.key: dict(r.scores)[metric] for r in self.results if metric in dict(r.scores)}
        if not found:
            raise UnknownName("metric", metric, {m for r in self.results for m, _ in r.scores})
        return found

    def mean(self, metric: str = "passed") -> Mean:
        """Returns a metric's mean, with its 95 % bootstrap interval."""
        return mean(list(self.values(metric).values()), self.seed)

    def by(self, fact: str, metric: str = "passed") -> Mapping[Any, Mean]:
        """Returns the mean for each value of a fact, such as ``depth`` or ``rule``."""
        values = self.values(metric)
        return {
            group: mean([values[key] for key in keys if key in values], self.seed)
            for group, keys in group_by(self.tasks, fact).items()
        }

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that some task has."""
        return tuple(dict.fromkeys(name for r in self.results for name, _ in r.scores))

    def to_json(self) -> dict[str, Any]:
        """Returns the summary as plain data; single results are in the journal."""
        found = {name: self.mean(name).to_json() for name in self.metrics}
        head = {"name": self.name, "strength": self.strength, "n": self.n, "seed": self.seed}
        return {**head, "metrics": found}

    def __repr__(self) -> str:
        """One line per metric."""
        lines = [f"{self.name}: n={self.n}, seed {self.seed}"]
        return "\n".join([*lines, *(f"  {name:12}{self.mean(name)}" for name in self.metrics)])


def task_difference(a: TaskReport, b: TaskReport, metric: str = "passed") -> Difference:
    """Returns the mean of ``a - b`` over common tasks: a paired bootstrap."""
    return paired_difference(a.values(metric), b.values(metric), a.seed)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    method: TaskMethod | None = None,
    *,
    name: str | None = None,
    strength: float | None = None,
    max_new_tokens: int = 48,
    stop: str | None = None,
    role: str | None = None,
    path: str | Path | None = None,
    prefills: Prefills | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> TaskReport:
    """Returns how well tasks are done over edited memories, by greedy answers.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: what to do.
        method: edits a task's memory; None leaves it.
        name: the method's name; None takes the function's.
        strength: its strength, for the report.
        max_new_tokens: tokens of an answer.
        stop: text that ends an answer, such as a line break for short answers.
        role: None captures the context as text and continues it by the prompt; a role, such as
            ``"system"``, captures it as a chat message and asks the prompt as a user turn.
        path: journal of results; see :func:`~kvedit.evals.evaluate`.
        prefills: captured contexts, to share between calls.
        batch_size: answers generated side by side, each over its own memory.
        seed: seed of the bootstrap.
        progress: whether to show a bar.

    Raises:
        InvalidArgument: if there is no task, a task comes twice, or the journal is another's.
    """
    keys = [task.key for task in tasks]
    if not keys or len(set(keys)) < len(keys) or batch_size < 1:
        raise InvalidArgument(
            f"expected different tasks and batch_size >= 1, found {len(keys)} of which "
            f"{len(set(keys))} differ, and {batch_size}"
        )
    kept = prefills or Prefills(model, tokenizer)
    given = "unedited" if method is None else str(getattr(method, "__name__", "method"))
    named = name or given
    fingerprint = str(inspect(model, tokenizer).spec.identity()["fingerprint"])
    facts = {"name": named, "strength": strength, "model": fingerprint, "role": role}
    options = {"max_new_tokens": max_new_tokens, "stop": stop}
    journal = Journal(path, {"kind": "tasks", **facts, **options})
    waiting = [task for task in tasks if task.key not in journal.done]
    for batch in _batches(waiting, batch_size, named, progress):
        memories = [kept.memory(task.context, role) for task in batch]
        if method is not None:
            memories = [method(*pair) for pair in zip(batch, memories, strict=True)]
        for record in _answers(kept, batch, memories, role, options):
            journal.add(record)
    results = tuple(_result(journal.done[key]) for key in keys)
    return TaskReport(named, tuple(tasks), results, strength, seed)


def _batches(tasks: list[Task], size: int, name: str, shown: bool) -> Iterable[list[Task]]:
    batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    if not shown:
        return batches
    from tqdm.auto import tqdm

    bar: Iterable[list[Task]] = tqdm(batches, desc=name, unit="batch", disable=None)
    return bar


def _answers(
    prefills: Prefills,
    tasks: list[Task],
    memories: list[KVMemory],
    role: str | None,
    options: dict[str, Any],
) -> Iterable[dict[str, Any]]:
    prompts = [task.prompt if role is None else task.prompt.strip() for task in tasks]
    with attach(prefills.model, memories, prefills.tokenizer) as session:
        found: Any = session.generate(prompts, do_sample=False, **options)
    for task, reply in zip(tasks, found if isinstance(found, list) else [found], strict=True):
        scores = {**grade(task, reply.text), "length": float(len(reply.tokens))}
        entropy = ngram_entropy(reply.text)
        if entropy is not None:
            scores["fluency"] = entropy
        yield {"key": task.key, "scores": scores, "answer": reply.text}


def _result(record: dict[str, Any]) -> TaskResult:
    return TaskResult(record["key"], tuple(sorted(record["scores"].items())), record["answer"])
