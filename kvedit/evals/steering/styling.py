"""evaluate_style: methods beside their baselines, on the same questions and bystanders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.answering import TaskResult
from kvedit.evals.journal import Journal
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.steering.asker import Asker, Place
from kvedit.evals.steering.bystanders import Bystanders
from kvedit.evals.steering.entering import Change, Entry
from kvedit.evals.steering.markers import STEP_BY_STEP, Markers
from kvedit.evals.steering.methods import Baselines, Method
from kvedit.evals.steering.report import StyleReport, StyleRow
from kvedit.evals.steering.scores import score_answer
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["evaluate_style"]


def evaluate_style(
    asker: Asker,
    questions: Sequence[RecallQuestion],
    methods: Mapping[str, Method],
    baselines: Baselines,
    bystanders: Bystanders,
    *,
    markers: Markers = STEP_BY_STEP,
    path: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> StyleReport:
    """Returns what each method does to style, and what it costs, baselines first.

    Answers are greedy. All methods see the same questions with the same tokens, but for what
    prompt baselines say besides.

    Args:
        asker: the model, and how it is asked; ``max_new_tokens`` caps every answer.
        questions: different questions; see :func:`word_problems` and the readers.
        methods: names and methods.
        baselines: rows that are always there: ``"none"``, ``"prompt"``, ``"few-shot"``, random.
        bystanders: unrelated prompts; they may have an asker of their own, with shorter answers.
        markers: what tells the style; fix it before you look at answers.
        path: journal of results, JSON lines; a run that was cut goes on where it stopped. A method
            is known by name, strength and identity there.
        seed: seed of the bootstrap.
        progress: whether to show a bar.

    Raises:
        InvalidArgument: if there is no question or one comes twice, a name is a baseline's, or
            the journal is another's.
    """
    keys = [question.key for question in questions]
    if not keys or len(set(keys)) < len(keys):
        raise InvalidArgument(
            f"expected different questions, found {len(keys)} of which {len(set(keys))} differ"
        )
    given = baselines.methods()
    taken = sorted(set(given) & set(methods))
    if taken:
        raise InvalidArgument(f"the name {taken[0]!r} is a baseline's: choose another")
    facts = {"kind": "style", "markers": markers.digest, "bystanders": bystanders.digest}
    journal = Journal(path, {**facts, **asker.facts})
    run = _Run(asker, tuple(questions), bystanders, markers, journal)
    rows: dict[str, StyleRow] = {}
    for name, method in _shown({**given, **methods}, progress):
        rows[name] = run.row(name, method)
    return StyleReport(rows, markers, "none", seed)


def _shown(methods: dict[str, Method], shown: bool) -> Iterable[tuple[str, Method]]:
    if not shown:
        return methods.items()
    from tqdm.auto import tqdm

    bar: Iterable[tuple[str, Method]] = tqdm(
        methods.items(), desc="style", unit="method", disable=None
    )
    return bar


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of :func:`evaluate_style`."""

    asker: Asker
    questions: tuple[RecallQuestion, ...]
    bystanders: Bystanders
    markers: Markers
    journal: Journal

    def row(self, name: str, method: Method) -> StyleRow:
        """Journals what is missing of a method, and returns its row."""
        own = digest_bytes(canonical_json([name, method.strength, method.identity]))[:16]
        waiting = [q for q in self.questions if f"{own}:{q.key}" not in self.journal.done]
        size = self.asker.batch_size
        make = None if method.apply is None else method.make
        entry = Entry(make)
        for start in range(0, len(waiting), size):
            batch = waiting[start : start + size]
            for record in self._answers(batch, method, entry):
                self.journal.add({**record, "key": f"{own}:{record['key']}"})
        keys = self.bystanders.keys
        missing = [i for i, key in enumerate(keys) if f"{own}~{key}" not in self.journal.done]
        if missing:
            found = self.bystanders.moved(make, missing, method.transform)
            for key, moved in found.items():
                self.journal.add({"key": f"{own}~{key}", "scores": moved.to_json(), "answer": ""})
        return StyleRow(
            method.strength,
            tuple(self._result(f"{own}:{q.key}", q.key) for q in self.questions),
            tuple(self._result(f"{own}~{key}", key) for key in keys),
        )

    def _answers(
        self, batch: Sequence[RecallQuestion], method: Method, entry: Entry
    ) -> Iterable[dict[str, Any]]:
        prompts = [self.asker.as_turns(question.prompt) for question in batch]
        if method.transform is not None:
            prompts = [method.transform(prompt) for prompt in prompts]
        # The unedited model reads what is in memory: outside of the block.
        places = self.asker.places(prompts)
        with entry.on() as change:
            replies = self.asker.reply(places, change)
            openings = self._openings(places, change)
        for question, reply, opening in zip(batch, replies, openings, strict=True):
            most = self.asker.max_new_tokens
            scores = score_answer(question, reply, opening, self.markers, most)
            yield {"key": question.key, "scores": scores, "answer": reply.text}

    def _openings(self, places: Sequence[Place], change: Change) -> list[float | None]:
        """Returns the log-probability of the style's opening at each place, nats."""
        if not self.markers.opening:
            return [None] * len(places)
        spelled = [self.asker.spell(place, self.markers.opening) for place in places]
        read = self.asker.along(places, spelled, change)
        return [
            float(sum(found[step, token] for step, token in enumerate(ids)))
            for found, ids in zip(read, spelled, strict=True)
        ]

    def _result(self, key: str, name: str) -> TaskResult:
        record = self.journal.done[key]
        return TaskResult(name, tuple(sorted(record["scores"].items())), record["answer"])
