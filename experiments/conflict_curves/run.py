"""Strength curves of every re-weighting method on conflicts, and efficacy at equal collateral.

    python experiments/conflict_curves/run.py FOLDER --heads atlas.json [--n 100] [--only NAME …]

Every method and strength is a journal in FOLDER: a run that is cut goes on where it stopped, and
two processes may share the work by --only. ``--equal-kl 0.1`` looks for each method's
strength at that collateral on a quarter of the conflicts and evaluates it on the rest; ``--table``
prints what is there and draws the figure.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.baselines import few_shot, mark, repeat_span
from kvedit.evals.conflict_library import capitals, fact_conflicts
from kvedit.evals.conflicts import Conflict
from kvedit.evals.evaluating import evaluate, unedited
from kvedit.evals.prefills import Prefills
from kvedit.evals.profiling import HeadAtlas
from kvedit.evals.report import Report
from kvedit.evals.strength import at_equal_kl
from kvedit.memory import HeadSet, KVMemory
from kvedit.plots import frontier
from kvedit.runs.operands import supply
from kvedit.runtime import ModelReader

SEED = 1
BIAS = (0.7, 1.4, 2.3, 3.5, 4.605)
Build = Callable[[Conflict, float], Any]


@dataclass(frozen=True)
class Family:
    """A method over its strengths.

    Args:
        build: case and strength to an editor; None edits nothing.
        strengths: in the method's own unit.
        transform: changes the text instead.
    """

    build: Build | None
    strengths: tuple[float | None, ...]
    transform: Callable[[Conflict], Conflict] | None = None


def families(chosen: HeadSet, drawn: HeadSet, shots: Sequence[Conflict]) -> Mapping[str, Family]:
    """Returns all methods by name."""
    editors = kv.editors
    pasta = partial(_pasta, heads=None, phase="decode")
    some = {"heads": chosen.to_json()}
    return {
        "unedited": Family(None, (None,)),
        "bias, all heads": Family(pasta, BIAS),
        "bias, profiled heads": Family(partial(_pasta, heads=chosen, phase="decode"), BIAS),
        "bias, random heads": Family(partial(_pasta, heads=drawn, phase="decode"), BIAS),
        "both phases, all heads": Family(partial(_pasta, heads=None, phase="both"), BIAS[2::2]),
        "baked, all heads": Family(partial(_pasta, heads=None, phase="prefill"), BIAS[2::2]),
        "both phases, profiled heads": Family(
            partial(_pasta, heads=chosen, phase="both"), BIAS[2::2]
        ),
        "baked, profiled heads": Family(partial(_pasta, heads=chosen, phase="prefill"), BIAS[2::2]),
        "SpotLight, exact": Family(
            lambda case, target: editors.SpotLight(spans=case.span_text, target=target),
            (0.01, 0.02, 0.05, 0.1, 0.3),
        ),
        "SpotLight, paper": Family(
            lambda case, target: editors.SpotLight(
                spans=case.span_text, target=target, form="spotlight"
            ),
            (0.01, 0.02, 0.05, 0.1, 0.3),
        ),
        "SpotLight, exact, profiled heads": Family(
            lambda case, target: editors.SpotLight(spans=case.span_text, target=target, **some),
            (0.05, 0.1, 0.2, 0.4, 0.8),
        ),
        "SEKA": Family(
            lambda case, gain: editors.Seka(
                spans=case.span_text, gain_positive=gain, gain_negative=gain / 4
            ),
            (0.4, 0.8, 1.6, 3.2, 6.4),
        ),
        "AdaSEKA": Family(
            lambda case, gain: editors.AdaSeka(
                spans=case.span_text, question=case.prompt, gain=gain
            ),
            (0.05, 0.1, 0.2, 0.4, 1.0),
        ),
        "key scaling": Family(
            lambda case, factor: editors.ScaleKeys(spans=case.span_text, factor=factor),
            (1.1, 1.2, 1.5, 2.0, 4.0),
        ),
        "value scaling": Family(
            lambda case, factor: editors.ScaleValues(spans=case.span_text, factor=factor),
            (1.25, 1.5, 2.0, 3.0, 4.0),
        ),
        "duplication": Family(
            lambda case, times: editors.Duplicate(spans=case.span_text, times=int(times)),
            (2.0, 4.0, 10.0, 33.0),
        ),
        "Directer": Family(
            lambda case, factor: editors.Directer(spans=case.span_text, factor=factor),
            (1.5, 4.0, 100.0),
        ),
        "LLMSteer, bias": Family(
            lambda case, b: editors.LLMSteer(alpha=math.exp(b), fraction=0.2, apply="bias"),
            (0.7, 1.4, 2.3),
        ),
        "prompt: asterisks": Family(None, (None,), mark),
        "prompt: quotes": Family(None, (None,), partial(mark, sign='"')),
        "prompt: repeated": Family(None, (None,), repeat_span),
        "prompt: 3-shot": Family(None, (None,), few_shot(shots)),
    }


def _pasta(case: Conflict, bias: float, heads: HeadSet | None, phase: str) -> Any:
    # alpha multiplies everything else: bias = -log alpha, moved against every other key.
    alpha = math.exp(-bias)
    return kv.editors.Pasta(
        spans=case.span_text, alpha=alpha, heads=heads, reference="all_others", phase=phase
    )


@dataclass(frozen=True, eq=False)
class Bench:
    """What all evaluations share."""

    folder: Path
    cases: Sequence[Conflict]
    prefills: Prefills

    def report(
        self, name: str, family: Family, strength: float | None, cases: Sequence[Conflict], tag: str
    ) -> Report:
        """Returns one method at one strength, measured or read from its journal."""
        model, tokenizer = self.prefills.model, self.prefills.tokenizer
        reader = ModelReader(model, tokenizer)
        others = self._operands(family, strength)

        def method(case: Conflict, memory: KVMemory) -> KVMemory:
            return family.build(case, strength)(memory, *others, reader=reader)

        return evaluate(
            model,
            tokenizer,
            cases,
            unedited if family.build is None else method,
            name=name,
            strength=strength,
            transform=family.transform,
            path=self.folder / f"{_slug(name, strength)}{tag}.jsonl",
            prefills=self.prefills,
            seed=SEED,
        )

    def _operands(self, family: Family, strength: float | None) -> list[KVMemory]:
        if family.build is None:
            return []
        model, tokenizer = self.prefills.model, self.prefills.tokenizer
        with kv.Store(self.folder / "operands") as store:
            return supply(family.build(self.cases[0], strength), store, model, tokenizer, print)


def unseen(n: int) -> list[Conflict]:
    """Returns conflicts about facts on which the heads were not chosen (experiments/head_atlas)."""
    others = ("currency", "language", "symbol", "author")
    trained = (*capitals(55, 0, 2)[:25], *fact_conflicts(55, 0, others, 2)[:25])
    seen = {case.prompt for case in trained}
    return [case for case in fact_conflicts(n + len(seen), SEED) if case.prompt not in seen][:n]


def _slug(name: str, strength: float | None) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{name}-{strength}")


def main() -> None:
    """Runs what is missing, or prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=100, help="conflicts")
    parser.add_argument("--only", nargs="*", help="methods")
    parser.add_argument("--heads", type=Path, required=True, help="a head atlas")
    parser.add_argument("--top", type=int, default=5, help="how many of its heads")
    parser.add_argument("--equal-kl", type=float, help="find each method's strength at this KL")
    parser.add_argument("--table", action="store_true", help="print and draw; run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    drawn = unseen(args.n + 3)
    bench = Bench(args.folder, drawn[: args.n], Prefills(model, tokenizer))
    spec = kv.models.inspect(model, tokenizer).spec
    chosen = HeadAtlas.read(args.heads).top(args.top)
    known = families(chosen, HeadSet.random(spec, args.top, SEED, "kv"), drawn[args.n :])
    wanted = {name: known[name] for name in args.only or known}
    if args.table:
        table(bench, wanted)
    elif args.equal_kl:
        for name, family in wanted.items():
            equal(bench, name, family, args.equal_kl)
    else:
        for name, family in wanted.items():
            for strength in family.strengths:
                started = time.perf_counter()
                report = bench.report(name, family, strength, bench.cases, "")
                print(f"{row(report)} {time.perf_counter() - started:.0f} s", flush=True)


def equal(bench: Bench, name: str, family: Family, target: float) -> None:
    """Prints a method at the strength where its KL is the target, chosen on other cases."""
    if len(family.strengths) < 2:
        return

    def at(strength: float, cases: Sequence[Conflict]) -> Report:
        # Journals are of one list of cases each.
        return bench.report(name, family, strength, cases, f"-equal-{len(cases)}")

    bracket = (family.strengths[0] / 8, family.strengths[-1])
    try:
        found = at_equal_kl(at, bench.cases, target, bracket, scan=6, most=12, seed=SEED)
    except InvalidArgument as error:
        print(f"{name}: {error}", flush=True)
        return
    print(f"{row(found.report)} calibrated KL {found.calibrated_kl:.3g}", flush=True)


METRICS = ("efficacy", "paraphrase_efficacy", "delta_logp", "top1", "kl", "flipped")


def row(report: Report) -> str:
    """Returns a line of the table."""
    strength = "" if report.strength is None else f"{report.strength:.3g}"
    cells = " | ".join(str(report.mean(metric)) for metric in METRICS)
    return f"| {report.name} | {strength} | {report.n} | {cells} |"


def table(bench: Bench, wanted: Mapping[str, Family]) -> None:
    """Prints every report that is complete, and draws efficacy against KL."""
    reports = []
    print(f"| method | strength | n | {' | '.join(METRICS)} |")
    print("|---|---:|---:|" + "---|" * len(METRICS))
    for name, family in wanted.items():
        for strength in family.strengths:
            if (bench.folder / f"{_slug(name, strength)}.jsonl").exists():
                report = bench.report(name, family, strength, bench.cases, "")
                reports.append(report)
                print(row(report))
    frontier(reports).savefig(bench.folder / "frontier.png", dpi=120)


if __name__ == "__main__":
    main()
