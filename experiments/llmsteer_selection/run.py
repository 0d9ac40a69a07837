"""What LLMSteer selects, and what steering on it does: against one prefix, chance and the oracle.

    python experiments/llmsteer_selection/run.py FOLDER --squad FILE [--n 120]

FILE is in SQuAD's shape. Selection is scored by the answer's tokens: how many of them are chosen,
against how many of all tokens are. Then every selection steers the answers to the same questions.
Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.editors.receiving import PREFIXES, select_tokens
from kvedit.evals import bootstrap
from kvedit.evals.answering import evaluate_tasks
from kvedit.evals.prefills import Prefills
from kvedit.evals.qa import read_squad
from kvedit.evals.tasks import Task
from kvedit.memory import KVMemory, SpanQuery
from kvedit.runtime import ModelReader

SEED = 0
FRACTION = 0.2  # of the context's tokens, per prefix
BIAS = 0.7  # nats: attention odds doubled

Selection = Callable[[Task, KVMemory, Any], dict[int, torch.Tensor]]


def llmsteer(prefixes: Sequence[str], filtered: bool) -> Selection:
    """Returns LLMSteer's selection under some prefixes."""

    def select(task: Task, memory: KVMemory, reader: Any) -> dict[int, torch.Tensor]:
        return select_tokens(
            memory,
            reader,
            fraction=FRACTION,
            prefixes=prefixes,
            drop_sink=filtered,
            drop_punctuation=filtered,
        )

    return select


def chance(task: Task, memory: KVMemory, reader: Any) -> dict[int, torch.Tensor]:
    """Returns as many tokens per layer as LLMSteer selects, drawn without looking."""
    like = llmsteer(PREFIXES, True)(task, memory, reader)
    drawn = torch.Generator().manual_seed(int(task.key[:8], 16) + SEED)
    found = {}
    for layer, chosen in like.items():
        order = torch.randperm(len(chosen), generator=drawn)
        found[layer] = torch.zeros_like(chosen)
        found[layer][order[: int(chosen.sum())]] = True
    return found


def oracle(task: Task, memory: KVMemory, reader: Any) -> dict[int, torch.Tensor]:
    """Returns the tokens of the sentence that holds the answer."""
    span = memory.resolve(SpanQuery(text=task.span_text, occurrence="all"))
    return {i: span.inside(torch.arange(memory.tokens_count)) for i in memory.layers}


SELECTIONS: dict[str, Selection] = {
    "two prefixes, filtered": llmsteer(PREFIXES, True),
    "two prefixes, unfiltered": llmsteer(PREFIXES, False),
    "one prefix, filtered": llmsteer(PREFIXES[:1], True),
    "random, as many": chance,
    "oracle: the answer's sentence": oracle,
}


def overlap(task: Task, memory: KVMemory, chosen: dict[int, torch.Tensor]) -> tuple[float, float]:
    """Returns the shares of the answer's tokens and of all tokens that are chosen, over layers."""
    text = task.answers[0]
    span = memory.resolve(SpanQuery(text=text, occurrence="all"))
    answer = span.inside(torch.arange(memory.tokens_count))
    stacked = torch.stack([chosen[i] for i in sorted(chosen)]).double()
    return float(stacked[:, answer].mean()), float(stacked.mean())


def main() -> None:
    """Scores every selection, then steers with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--n", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    reader = ModelReader(model, tokenizer)
    tasks = read_squad(args.squad, args.n, SEED)
    prefills = Prefills(model, tokenizer)
    shared = {"prefills": prefills, "seed": SEED, "max_new_tokens": 16, "stop": "\n"}
    base = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        None,
        name="unedited",
        path=args.folder / "unedited.jsonl",
        **shared,
    )
    print(base, flush=True)
    for name in SELECTIONS:
        started = time.perf_counter()
        chosen = Chosen(name, reader)
        hits, share = zip(*_overlaps(args.folder, chosen, tasks, prefills), strict=True)
        print(
            f"{name}: answer tokens chosen {bootstrap.mean(list(hits), SEED)}, all tokens "
            f"{bootstrap.mean(list(share), SEED)}",
            flush=True,
        )
        for apply in ("bias", "baked"):
            report = evaluate_tasks(
                model,
                tokenizer,
                tasks,
                partial(chosen.steer, apply=apply),
                name=f"{name}, {apply}",
                strength=BIAS,
                path=args.folder / f"{slug(name)}-{apply}.jsonl",
                **shared,
            )
            print(report, difference(report, base), flush=True)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)


class Chosen:
    """One selection, made once per task."""

    def __init__(self, name: str, reader: Any) -> None:
        """Remembers nothing yet."""
        self.name, self.reader = name, reader
        self._known: dict[str, dict[int, torch.Tensor]] = {}

    def of(self, task: Task, memory: KVMemory) -> dict[int, torch.Tensor]:
        """Returns the tokens chosen for a task."""
        if task.key not in self._known:
            self._known[task.key] = SELECTIONS[self.name](task, memory, self.reader)
        return self._known[task.key]

    def steer(self, task: Task, memory: KVMemory, apply: str) -> KVMemory:
        """Returns the memory steered on them."""
        return emphasised(memory, self.of(task, memory), self.reader, apply)


def _overlaps(
    folder: Path, chosen: Chosen, tasks: Sequence[Task], prefills: Prefills
) -> list[tuple[float, float]]:
    path = folder / f"{slug(chosen.name)}-overlap.json"
    if not path.exists():
        memories = ((task, prefills.memory(task.context)) for task in tasks)
        found = [overlap(task, memory, chosen.of(task, memory)) for task, memory in memories]
        path.write_text(json.dumps(found))
    return [tuple(pair) for pair in json.loads(path.read_text())]


def emphasised(
    memory: KVMemory, chosen: dict[int, torch.Tensor], reader: Any, apply: str
) -> KVMemory:
    """Returns the memory with BIAS on the chosen tokens, kept or baked into the context."""
    if apply == "baked":
        heads = {i: memory.model.layers[i].query_heads for i in chosen}
        bias = {i: chosen[i].float().expand(heads[i], -1) * BIAS for i in chosen}
        return reader.reread(memory, bias)
    changed = {
        i: layer.add_bias(
            chosen[i].float().expand(memory.model.layers[i].query_heads, -1).clone() * BIAS
        )
        for i, layer in memory.layers.items()
    }
    return memory.with_layers(changed)


def difference(report: Any, base: Any) -> str:
    """Returns the paired differences of F1 and exact match from the unedited memory."""
    from kvedit.evals.answering import task_difference

    pairs = {metric: task_difference(report, base, metric) for metric in ("f1", "passed")}
    return "  " + ", ".join(f"Δ{metric} {found}" for metric, found in pairs.items())


def slug(name: str) -> str:
    """Returns a file name."""
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    main()
