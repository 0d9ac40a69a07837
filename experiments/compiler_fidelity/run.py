"""Compiled keys against the exact bias, on conflicts: efficacy, collateral, and KL between the two.

    python experiments/compiler_fidelity/run.py FOLDER [--n 200]

Every variant and strength is a journal in FOLDER: a run that is cut goes on where it stopped. What
the certificate says, and what attention does afterwards, is in benchmarks/compiler_fidelity.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.editors import Compile, Emphasize
from kvedit.evals import bootstrap
from kvedit.evals.conflict_library import fact_conflicts
from kvedit.evals.conflicts import Conflict
from kvedit.evals.evaluating import evaluate
from kvedit.evals.prefills import Prefills
from kvedit.evals.report import Report, difference
from kvedit.memory import KVMemory
from kvedit.runs.operands import supply
from kvedit.store.codecs import approximate

SEED = 2
STRENGTHS = (0.7, 1.4, 2.3, 3.5, 4.605)
STORED = {
    "bfloat16": lambda memory: memory.to(dtype=torch.bfloat16),
    "int8": lambda memory: approximate(memory, "int8")[0],
}
METRICS = ("efficacy", "delta_logp", "top1", "kl", "flipped")


def exact(case: Conflict, memory: KVMemory, strength: float) -> KVMemory:
    """Returns the memory with bias."""
    return Emphasize(span=case.span_text, strength=strength)(memory)


class Compiled:
    """Memories with the bias in their keys.

    A compile with its certificate takes seconds, and deltas are linear in the bias. So each case
    is compiled once, at one nat, and scaled; the first cases are compiled at every strength, and
    must come out the same.
    """

    checked = 10

    def __init__(self, queries: KVMemory, cases: Sequence[Conflict]) -> None:
        """Compiles nothing yet."""
        self.queries = queries
        self._check = {case.key for case in cases[: self.checked]}
        self._deltas: dict[str, dict[int, torch.Tensor]] = {}

    def __call__(
        self,
        case: Conflict,
        memory: KVMemory,
        strength: float,
        store: Callable[[KVMemory], KVMemory] = lambda memory: memory,
    ) -> KVMemory:
        """Returns the compiled memory, as it comes back from the store."""
        deltas = self._of(case, memory)
        changed = {
            i: replace(layer, keys=layer.keys + strength * deltas[i])
            for i, layer in memory.layers.items()
        }
        made = memory.with_layers(changed)
        if case.key in self._check:
            whole = self._compile(case, memory, strength)
            for i, layer in whole.layers.items():
                assert torch.allclose(layer.keys, made.layers[i].keys, atol=1e-4)
        return store(made)

    def _of(self, case: Conflict, memory: KVMemory) -> dict[int, torch.Tensor]:
        if case.key not in self._deltas:
            unit = self._compile(case, memory, 1.0)
            self._deltas[case.key] = {
                i: layer.keys - memory.layers[i].keys for i, layer in unit.layers.items()
            }
        return self._deltas[case.key]

    def _compile(self, case: Conflict, memory: KVMemory, strength: float) -> KVMemory:
        made = Compile(on_fail="refuse")(exact(case, memory, strength), self.queries)
        for index, layer in made.layers.items():
            # No hook and no mask: nothing but keys and values of the same shapes.
            assert layer.bias is None
            assert layer.keys.shape == memory.layers[index].keys.shape
        assert made.servable()
        return made


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    with kv.Store(args.folder / "operands") as store:
        (queries,) = supply(Compile(), store, model, tokenizer, print)
    cases, prefills = fact_conflicts(args.n, SEED), Prefills(model, tokenizer)
    compiled = Compiled(queries, cases)

    def report(name: str, method: Any, strength: float) -> Report:
        path = args.folder / f"{name}-{strength}.jsonl"
        return evaluate(
            model, tokenizer, cases, method,
            name=name, strength=strength, path=path, prefills=prefills, seed=SEED,
        )  # fmt: skip

    print(f"| memory | nats | {' | '.join(METRICS)} | efficacy minus exact |")
    for strength in STRENGTHS:
        started = time.perf_counter()
        base = report("exact", partial(exact, strength=strength), strength)
        print(line(base, None), flush=True)
        method = partial(compiled, strength=strength)
        print(line(report("compiled", method, strength), base), flush=True)
        for name, stored in STORED.items() if strength in (2.3, 4.605) else ():
            method = partial(compiled, strength=strength, store=stored)
            print(line(report(f"compiled, {name}", method, strength), base), flush=True)
        between = apart(args.folder, prefills, cases, strength, compiled)
        print(
            f"KL(exact||compiled) at {strength}: own prompts {between[0]}, unrelated {between[1]}"
        )
        print(f"{time.perf_counter() - started:.0f} s", flush=True)


def line(report: Report, base: Report | None) -> str:
    """Returns a row of the table."""
    cells = " | ".join(str(report.mean(metric)) for metric in METRICS)
    against = "" if base is None else str(difference(report, base, "efficacy"))
    return f"| {report.name} | {report.strength:g} | {cells} | {against} |"


def apart(
    folder: Path, prefills: Prefills, cases: Sequence[Conflict], strength: float, compiled: Compiled
) -> tuple[Any, Any]:
    """Returns mean KL(exact||compiled) of the next token, behind own and unrelated prompts."""
    path = folder / f"apart-{strength}.json"
    if not path.exists():
        rows = []
        for case in cases:
            memory = prefills.memory(case.context)
            pair = exact(case, memory, strength), compiled(case, memory, strength)
            logits = [_next(prefills, one, (case.prompt, *case.unrelated)) for one in pair]
            kl = (logits[0].exp() * (logits[0] - logits[1])).sum(dim=-1)
            rows.append((float(kl[0]), float(kl[1:].mean())))
        path.write_text(json.dumps(rows))
    own, unrelated = zip(*json.loads(path.read_text()), strict=True)
    return bootstrap.mean(list(own), SEED), bootstrap.mean(list(unrelated), SEED)


def _next(prefills: Prefills, memory: KVMemory, prompts: Sequence[str]) -> torch.Tensor:
    """Returns next-token log-probabilities ``[prompt, vocabulary]``, float64."""
    model, tokenizer = prefills.model, prefills.tokenizer
    with kv.attach(model, memory, tokenizer, rows=len(prompts)) as session:
        return session.feed(list(prompts), chat=False).double().log_softmax(dim=-1)


if __name__ == "__main__":
    main()
