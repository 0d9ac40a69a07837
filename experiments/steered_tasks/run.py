"""What re-weighting does to answers that run freely: instructions, needles and questions.

    python experiments/steered_tasks/run.py FOLDER --squad FILE --heads atlas.json [--n 48]

FILE is in SQuAD's shape. Every method, strength and set is a journal in FOLDER: a run that is cut
goes on where it stopped, and processes may share the work by --tasks and --only. ``--table`` prints
what is complete and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import kvedit as kv
from kvedit.editors.autopasta import PROMPT, key_sentences
from kvedit.errors import SpanNotFound
from kvedit.evals import bootstrap
from kvedit.evals.answering import TaskReport, evaluate_tasks
from kvedit.evals.asking import Question, Reading, read_questions
from kvedit.evals.divergence import token_divergence
from kvedit.evals.instructions import instruction_tasks
from kvedit.evals.journal import Journal
from kvedit.evals.needles import needle_tasks
from kvedit.evals.prefills import Prefills
from kvedit.evals.profiling import HeadAtlas
from kvedit.evals.qa import read_squad
from kvedit.evals.tasks import Task, group_by
from kvedit.memory import HeadSet, KVMemory
from kvedit.runtime import ModelReader

SEED = 0
KINDS = ("instruction", "needle", "qa")
TOKENS = {"instruction": 40, "needle": 8, "qa": 16}
STOP = {"instruction": None, "needle": "\n", "qa": "\n"}
BIAS = (0.7, 1.4, 2.3)
REPLY = 48  # tokens of AutoPasta's quote
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Method:
    """A method at one strength.

    Args:
        name: the method.
        strength: in its own unit; None if it has none.
        build: task to editor; None edits nothing.
        kinds: sets that it is for.
        rewrite: task to another context, read in place of its own.
        gated: judges whole passes, so that given answers can't be scored token by token.
    """

    name: str
    strength: float | None = None
    build: Callable[[Task], Any] | None = None
    kinds: tuple[str, ...] = KINDS
    rewrite: Callable[[Task], str] | None = None
    gated: bool = False

    @property
    def slug(self) -> str:
        """File name."""
        return "".join(c if c.isalnum() else "-" for c in f"{self.name}-{self.strength}")


def methods(chosen: HeadSet, drawn: HeadSet) -> list[Method]:
    """Returns all methods, the unedited memory first."""
    editors = kv.editors

    def biased(name: str, heads: HeadSet | None) -> list[Method]:
        def at(b: float) -> Callable[[Task], Any]:
            return lambda task: editors.Boost(
                task.span_text, math.exp(b), None, heads, phase="decode"
            )

        return [Method(name, b, at(b)) for b in BIAS]

    def spotlight(target: float) -> Callable[[Task], Any]:
        return lambda task: editors.SpotLight(task.span_text, target)

    def llmsteer(b: float) -> Callable[[Task], Any]:
        return lambda task: editors.LLMSteer(math.exp(b), fraction=0.2, apply="bias")

    def autopasta(task: Task) -> Any:
        return editors.AutoPasta(
            asked(task),
            math.exp(-BIAS[-1]),
            reference="all_others",
            max_new_tokens=REPLY,
            phase="decode",
        )

    return [
        Method("unedited"),
        *biased("bias, all heads", None),
        *biased("bias, profiled heads", chosen),
        *biased("bias, random heads", drawn),
        Method("span repeated", rewrite=lambda task: f"{task.context} {task.span_text}"),
        Method(
            "span removed",
            rewrite=lambda task: task.context.replace(f"{task.span_text} ", "").removesuffix(
                f" {task.span_text}"
            ),
            kinds=("instruction",),
        ),
        *(Method("SpotLight, exact", t, spotlight(t)) for t in (0.1, 0.3)),
        Method(
            "Directer", 4.0, lambda task: editors.Directer(task.span_text, factor=4.0), gated=True
        ),
        *(Method("LLMSteer, bias", b, llmsteer(b), ("needle", "qa")) for b in BIAS[:2]),
        Method("AutoPasta", BIAS[-1], autopasta, ("qa",)),
    ]


def asked(task: Task) -> str:
    """Returns the question in a prompt."""
    return task.prompt.removeprefix("\nQuestion: ").removesuffix("\nAnswer:")


class Remembering(ModelReader):
    """A reader that asks the same thing, and reads the same attention, once."""

    def __init__(self, model: Any, tokenizer: Any, path: Path) -> None:
        """Reads the replies of an earlier run."""
        super().__init__(model, tokenizer)
        self._replies = Journal(path, {"kind": "replies", "tokens": REPLY})
        self._seen: dict[Any, Any] = {}

    def ask(self, memory: KVMemory, prompt: str, max_new_tokens: int = REPLY) -> str:
        """Returns the model's reply to a prompt."""
        key = json.dumps([memory.source.text, prompt])
        if key not in self._replies.done:
            reply = super().ask(memory, prompt, max_new_tokens)
            self._replies.add({"key": key, "reply": reply})
        return self._replies.done[key]["reply"]

    def read(self, memory: KVMemory | None, tokens: torch.Tensor, *rest: Any, **more: Any) -> Any:
        """Returns what is seen while tokens are read."""
        if memory is not None or more or rest != (("received",),):
            return super().read(memory, tokens, *rest, **more)
        key = tuple(tokens.tolist())
        if key not in self._seen:
            self._seen[key] = super().read(memory, tokens, *rest)
        return self._seen[key]


# --- log-probabilities: what is still told where free answers are all right or all wrong --------


@dataclass(frozen=True)
class Probe:
    """What is scored for a task.

    Args:
        prompts: pairs of a prompt and texts that may follow it.
        unrelated: prompts whose next token should stay, with the texts that should follow.
    """

    prompts: tuple[tuple[str, tuple[str, ...]], ...]
    unrelated: tuple[tuple[str, str], ...]


def probe(task: Task, others: Mapping[str, Sequence[Task]]) -> Probe:
    """Returns what is scored for a task; ``others`` are questions by their context."""
    if task.kind == "instruction":
        return _instruction_probe(task)
    if task.kind == "needle":
        return _needle_probe(task)
    behind = [one for one in others[task.context] if one.span_text != task.span_text][:1]
    return Probe(
        ((task.prompt, (f" {task.answers[0]}",)),),
        tuple((one.prompt, f" {one.answers[0]}") for one in behind),
    )


def _instruction_probe(task: Task) -> Probe:
    subject = task.prompt.split("say about ")[1].split("?\n")[0]
    form = rf"The [a-z ]+ of {re.escape(subject)} is .+?\.(?= |$)"
    said = re.findall(form, task.context)
    pair = conforming(task, said), violating(task, said)
    if not task.rule.holds(pair[0]) or task.rule.holds(pair[1]):
        raise ValueError(f"these do not keep and break {task.rule}: {pair}")
    split = [sentence.removesuffix(".").rsplit(" is ", 1) for sentence in said]
    return Probe(
        ((task.prompt, pair),), tuple((f" {start} is", f" {value}") for start, value in split)
    )


def conforming(task: Task, said: Sequence[str]) -> str:
    """Returns an answer that keeps the task's rule."""
    rule, plain = task.rule, " ".join(said[:2])
    first, second = (sentence.removesuffix(".") for sentence in said[:2])
    if rule.name == "json":
        pairs = [s.removesuffix(".").rsplit(" is ", 1) for s in said[:2]]
        return " " + json.dumps(dict(pairs), ensure_ascii=False)
    return {
        "uppercase": f" {plain.upper()}",
        "lowercase": f" {plain.lower()}",
        "no_commas": f" {first} and t{second[1:]}.",
        "bullets": "".join(f"\n* {said[i % len(said)]}" for i in range(rule.number)),
        "ends_with": f" {plain} {rule.phrase}",
    }[rule.name]


def violating(task: Task, said: Sequence[str]) -> str:
    """Returns an answer that says the same and breaks the rule."""
    plain = " ".join(said[:2])
    first, second = (sentence.removesuffix(".") for sentence in said[:2])
    if task.rule.name == "bullets":
        return "".join(f" {said[i % len(said)]}" for i in range(task.rule.number))
    return {
        "no_commas": f" {first}, and t{second[1:]}.",
        "ends_with": f" {plain} Thank you for reading.",
    }.get(task.rule.name, f" {plain}")


def _needle_probe(task: Task) -> Probe:
    found = re.findall(r"The code for the door of the (\w+) is (\d{4})\.", task.context)
    wrong = [(key, code) for key, code in found if code != task.answers[0]]
    codes = (task.answers[0], *(code for _, code in wrong))
    prompts = [(task.prompt, tuple(f" {code}" for code in codes))]
    for key, code in wrong:
        prompts.append((f" The code for the door of the {key} is", (f" {code}", f" {codes[0]}")))
    return Probe(tuple(prompts), ())


def scores(task: Task, reading: Reading | None, kl: list[float], facts: list[float]) -> Any:
    """Returns the numbers of one task."""
    found = {}
    if kl:
        found["kl"] = fmean(kl)
    if facts:
        found["others_logp"] = fmean(facts)
    if reading is None:
        return found
    first = [answer.whole for answer in reading.answers[0]]
    if task.kind == "instruction":
        return {**found, "margin": first[0] - first[1]}
    if task.kind == "qa":
        return {**found, "logp": first[0]}
    decoys = [[answer.whole for answer in answers] for answers in reading.answers[1:]]
    return {
        "logp": first[0],
        "chosen": float(first[0] > max(first[1:])),
        "decoys": fmean(float(own > needle) for own, needle in decoys),
        "decoys_margin": fmean(own - needle for own, needle in decoys),
    }


# --- the runs ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """What all evaluations share."""

    folder: Path
    tasks: Mapping[str, Sequence[Task]]
    others: Mapping[str, Sequence[Task]]
    prefills: Prefills
    reader: Remembering
    role: str | None

    def edited(self, method: Method, task: Task, memory: KVMemory) -> KVMemory:
        """Returns a task's memory under a method; unedited where it finds no span to steer to."""
        if method.rewrite is not None:
            return self.prefills.memory(method.rewrite(task), self.role)
        if method.build is None:
            return memory
        try:
            return method.build(task)(memory, reader=self.reader)
        except SpanNotFound:
            if method.name != "AutoPasta":
                raise
            return memory

    def answers(self, method: Method, kind: str) -> TaskReport:
        """Returns free answers, made or read from the journal."""
        return evaluate_tasks(
            self.prefills.model,
            self.prefills.tokenizer,
            self.tasks[kind],
            lambda task, memory: self.edited(method, task, memory),
            name=method.name,
            strength=method.strength,
            max_new_tokens=TOKENS[kind],
            stop=STOP[kind],
            role=self.role,
            path=self.path(method, kind, "answers"),
            prefills=self.prefills,
            seed=SEED,
        )

    def scored(self, method: Method, kind: str) -> Values:
        """Returns log-probabilities and KL by metric and task, made or read from the journal."""
        if self.role is not None:
            return {}
        facts = {"kind": "scores", "name": method.name, "strength": method.strength}
        journal = Journal(self.path(method, kind, "scores"), facts)
        for task in self.tasks[kind]:
            if task.key not in journal.done:
                journal.add({"key": task.key, "scores": self._score(method, task)})
        found: Values = {}
        for task in self.tasks[kind]:
            for metric, value in journal.done[task.key]["scores"].items():
                found.setdefault(metric, {})[task.key] = value
        return found

    def complete(self, method: Method, kind: str) -> bool:
        """Whether all tasks of a kind are in the journals of a method."""
        parts = ("answers",) if self.role is not None else ("answers", "scores")
        keys = {task.key for task in self.tasks[kind]}
        for part in parts:
            path = self.path(method, kind, part)
            if not path.exists():
                return False
            lines = map(json.loads, path.read_text().splitlines())
            if not keys <= {line.get("key") for line in lines}:
                return False
        return True

    def path(self, method: Method, kind: str, part: str) -> Path:
        """Returns the file of a journal."""
        role = "" if self.role is None else f"-{self.role}"
        return self.folder / f"{kind}{role}-{method.slug}-{part}.jsonl"

    def _score(self, method: Method, task: Task) -> dict[str, float]:
        plain = self.prefills.memory(task.context)
        memory = self.edited(method, task, plain)
        wanted = probe(task, self.others)
        reading = None
        if not method.gated:
            reading = self._read(memory, [Question(*pair) for pair in wanted.prompts])
        if not wanted.unrelated:
            return scores(task, reading, [], [])
        before = self.prefills.once(
            ("unrelated", task.key), lambda: _sized(self._unrelated(plain, wanted, True))
        )
        after = self._unrelated(memory, wanted, not method.gated)
        kl = token_divergence(before.logprobs, after.logprobs)[0].tolist()
        facts = [answers[0].whole for answers in after.answers if answers]
        return scores(task, reading, kl, facts)

    def _unrelated(self, memory: KVMemory, wanted: Probe, answered: bool) -> Reading:
        return self._read(
            memory,
            [Question(p, (answer,) if answered else ()) for p, answer in wanted.unrelated],
        )

    def _read(self, memory: KVMemory, questions: list[Question]) -> Reading:
        return read_questions(self.prefills.model, self.prefills.tokenizer, memory, questions)


def _sized(reading: Reading) -> tuple[Reading, int]:
    return reading, reading.logprobs.nbytes


def main() -> None:
    """Runs what is missing, or prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--squad", type=Path, required=True, help="questions, in SQuAD's shape")
    parser.add_argument("--heads", type=Path, required=True, help="a head atlas")
    parser.add_argument("--top", type=int, default=5, help="how many of its groups")
    parser.add_argument("--n", type=int, default=48, help="tasks per set, about")
    parser.add_argument("--tasks", nargs="*", default=KINDS, choices=KINDS, help="sets")
    parser.add_argument("--only", nargs="*", help="methods")
    parser.add_argument("--role", help="contexts as a chat's message of this role; answers only")
    parser.add_argument("--table", action="store_true", help="print what is complete")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    spec = kv.models.inspect(model, tokenizer).spec
    chosen = HeadAtlas.read(args.heads).top(args.top)
    known = methods(chosen, HeadSet.random(spec, args.top, SEED, "kv"))
    others: dict[str, list[Task]] = {}
    for task in read_squad(args.squad):
        others.setdefault(task.context, []).append(task)
    sets = {
        "instruction": instruction_tasks(args.n, SEED),
        "needle": needle_tasks(max(1, args.n // 5), SEED),
        "qa": read_squad(args.squad, args.n, SEED),
    }
    reader = Remembering(model, tokenizer, args.folder / "replies.jsonl")
    bench = Bench(args.folder, sets, others, Prefills(model, tokenizer), reader, args.role)
    wanted = [method for method in known if args.only is None or method.name in args.only]
    if args.table:
        for kind in args.tasks:
            table(bench, kind, known)
        return
    for method in wanted:
        for kind in args.tasks:
            if kind in method.kinds:
                began, spent = time.perf_counter(), time.process_time()
                report = bench.answers(method, kind)
                bench.scored(method, kind)
                print(
                    f"{kind}: {method.name} {method.strength or ''}: {report.mean()} "
                    f"{time.perf_counter() - began:.0f} s, CPU {time.process_time() - spent:.0f} s",
                    flush=True,
                )


# --- the tables ----------------------------------------------------------------------------

COLUMNS = {
    "instruction": (("passed", "length"), ("margin", "others_logp", "kl")),
    "needle": (("passed",), ("chosen", "logp", "decoys", "decoys_margin")),
    "qa": (("passed", "f1", "holds"), ("logp", "others_logp", "kl")),
}
GROUPS = {"instruction": ("rule", ("margin",)), "needle": ("depth", ("logp",))}
SAID = {"passed", "f1", "holds", "length", "chosen", "decoys", "kl"}  # the others only as changes


def values(bench: Bench, method: Method, kind: str) -> Values:
    """Returns every metric by task."""
    report = bench.answers(method, kind)
    found = {metric: report.values(metric) for metric in report.metrics}
    if kind == "qa":
        found["holds"] = {
            result.key: float(any(a.lower() in result.answer.lower() for a in task.answers))
            for task, result in zip(report.tasks, report.results, strict=True)
        }
    return {**found, **bench.scored(method, kind)}


def table(bench: Bench, kind: str, known: Sequence[Method]) -> None:
    """Prints a set's means, their changes from the unedited memory, and groups of tasks."""
    done = [m for m in known if kind in m.kinds and bench.complete(m, kind)]
    found = {method: values(bench, method, kind) for method in done}
    if not done or done[0].build is not None:
        print(f"{kind}: nothing is complete, or not the unedited memory")
        return
    base = found[done[0]]
    print(f"\n{kind}, n = {len(bench.tasks[kind])}, role {bench.role}\n")
    columns = [column for part in COLUMNS[kind] for column in part if column in base]
    heads = [title for column in columns for title in _titles(column)]
    _line("method", "strength", *heads)
    _line(*["---"] * (2 + len(heads)))
    for method in done:
        cells = [c for column in columns for c in _cells(column, found[method], base)]
        _line(method.name, "" if method.strength is None else f"{method.strength:g}", *cells)
    if kind in GROUPS:
        fact, changed = GROUPS[kind]
        groups(bench.tasks[kind], fact, [m for m in changed if m in base], found, base)
    if any(method.name == "AutoPasta" for method in done):
        refusals(bench)


def groups(
    tasks: Sequence[Task],
    fact: str,
    changed: Sequence[str],
    found: Mapping[Method, Values],
    base: Values,
) -> None:
    """Prints what passed, and changes of other metrics, for each value of a fact."""
    by = group_by(tasks, fact)
    for metric in ("passed", *changed):
        print(f"\n{metric} by {fact}{'' if metric == 'passed' else ', minus unedited'}\n")
        _line("method", "strength", *(f"{group} (n={len(keys)})" for group, keys in by.items()))
        _line(*["---"] * (2 + len(by)))
        for method, of in found.items():
            if metric not in of:
                continue
            cells = []
            for keys in by.values():
                mine = {key: of[metric][key] for key in keys}
                same = bootstrap.paired_difference(mine, base[metric], SEED)
                cells.append(f"{fmean(mine.values()):.2f}" if metric == "passed" else _said(same))
            _line(method.name, "" if method.strength is None else f"{method.strength:g}", *cells)


def refusals(bench: Bench) -> None:
    """Prints how often AutoPasta found a sentence, and how often the right one."""
    named = right = count = 0
    for task in bench.tasks["qa"]:
        memory = bench.prefills.memory(task.context, bench.role)
        reply = bench.reader.ask(memory, PROMPT.replace("{question}", asked(task)), REPLY)
        count += 1
        try:
            span = key_sentences(memory, reply)
        except SpanNotFound:
            continue
        named += 1
        right += bool(set(_tokens(span)) & set(_tokens(memory.resolve(task.span_text))))
    print(f"\nAutoPasta: {count} questions, {count - named} refused, {right} the right sentence")


def _tokens(span: Any) -> Iterator[int]:
    return (token for start, stop in span.ranges for token in range(start, stop))


def _titles(column: str) -> list[str]:
    return [column] * (column in SAID) + [f"Δ {column}"] * (column not in ("kl",))


def _cells(column: str, of: Values, base: Values) -> list[str]:
    if column not in of:
        return ["not scored"] * len(_titles(column))
    mean = bootstrap.mean(list(of[column].values()), SEED)
    change = bootstrap.paired_difference(of[column], base[column], SEED)
    shown = {column: _said(mean), f"Δ {column}": _said(change)}
    return [shown[title] for title in _titles(column)]


def _said(mean: bootstrap.Mean) -> str:
    if mean.low is None:
        return f"{mean.value:.3g}"
    return f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]"


def _line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
