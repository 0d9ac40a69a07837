"""Step-by-step style by one edit of the cache: against nothing, random, saying it, and hooks.

    python experiments/cache_steering/run.py FOLDER pilot
    python experiments/cache_steering/run.py FOLDER main --seeds 0 1 2

Each seed draws its own contrast pairs, questions, bystanders and random directions. Journals in
FOLDER hold every answer: a killed run goes on where it was, a finished one only prints its tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from keys import raw_delta, raw_in_cache  # beside this file
from setup import (  # beside this file
    BYSTANDERS,
    C_K,
    C_V,
    C_V_SMALL,
    INSTRUCTION,
    KEY_QUESTIONS,
    LAYER,
    LEAST,
    PILOT,
    QUESTIONS,
    RESIDUAL,
    Draw,
    in_cache,
    markers,
    on_from_offset,
)
from table import tables  # beside this file

import kvedit as kv
from kvedit.evals.steering import (
    Baselines,
    Method,
    StyleReport,
    evaluate_style,
)
from kvedit.steering import extract

SITES = ("keys", "values", "residual")


def delta_of(draw: Draw) -> kv.Delta:
    """Returns the seed's mean difference at the last prompt token."""
    return extract(draw.model, draw.tokenizer, draw.contrast,
                   sites=SITES,
                   folder=draw.folder / f"read{draw.seed}")  # fmt: skip


def report(draw: Draw, delta: kv.Delta, methods: dict[str, Method], random_at: float,
           questions: int | None = None) -> StyleReport:  # fmt: skip
    """Answers what the journal lacks, baselines always among it."""
    baselines = Baselines.of(in_cache, delta, random_at, instruction=INSTRUCTION,
                             examples=draw.examples, seeds=(draw.seed,))  # fmt: skip
    return evaluate_style(
        draw.asker, draw.questions[:questions], methods, baselines, draw.bystanders,
        markers=markers(LEAST), path=draw.folder / f"seed{draw.seed}.jsonl",
    )  # fmt: skip


def pilot(model: Any, tokenizer: Any, folder: Path) -> None:
    """Tries strengths on questions that are asked nowhere else."""
    draw = Draw(model, tokenizer, folder, PILOT, 16, 8)
    delta = delta_of(draw)
    methods = {f"V {c}": Method(lambda c: in_cache(delta, c), float(c), None, delta.digest)
               for c in (2, 3, 4, 6, 8)}  # fmt: skip
    methods |= {
        f"residual {layer}, {c}": Method(on_from_offset(model, delta, "residual", [layer]),
                                         float(c), None, delta.digest)
        for layer in (10, 16) for c in (1, 2, 4)
    }  # fmt: skip
    print(report(draw, delta, methods, 4.0))


def main_rows(draw: Draw) -> StyleReport:
    """Returns the rows of the main question."""
    delta = delta_of(draw)
    hook = on_from_offset(draw.model, delta, "residual", [LAYER])
    rows = {
        "values": Method(lambda c: in_cache(delta, c), C_V, None, delta.digest),
        "residual": Method(hook, RESIDUAL, None, f"{delta.digest} {LAYER}"),
    }
    return report(draw, delta, rows, C_V)


def key_rows(draw: Draw) -> StyleReport:
    """Returns the rows about keys, on the first of the seed's questions."""
    delta = delta_of(draw)
    own, turned = delta.digest, delta.vectors["keys"]
    raw = raw_delta(
        draw.model, draw.tokenizer, draw.contrast, draw.folder / f"read{draw.seed}", SITES
    )
    even = {i: v * (turned[i].norm() / v.norm()) for i, v in raw.items()}
    edits: dict[str, Callable[[float], Any]] = {
        "values, less": lambda c: in_cache(delta, c),
        "keys un-rotated": lambda c: in_cache(delta, c, C_K),
        "keys raw": lambda c: raw_in_cache(delta, c, raw, C_K),
        "keys raw, equal norm": lambda c: raw_in_cache(delta, c, even, C_K),
    }
    rows = {name: Method(edit, C_V_SMALL, None, own) for name, edit in edits.items()}
    longer = sorted(float(v.norm() / turned[i].norm()) for i, v in raw.items() if i)
    middle = longer[len(longer) // 2]
    print(f"seed {draw.seed}: raw keys are {middle:.2f} times as long (median)", flush=True)
    return report(draw, delta, rows, C_V, KEY_QUESTIONS)


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=("pilot", "main"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    if options.part == "pilot":
        pilot(model, tokenizer, options.folder)
        return
    draws = [Draw(model, tokenizer, options.folder, seed, QUESTIONS, BYSTANDERS)
             for seed in options.seeds]  # fmt: skip
    found: list[dict[int, StyleReport]] = [{}, {}]
    for part, reports in zip((main_rows, key_rows), found, strict=True):
        for draw in draws:
            reports[draw.seed] = part(draw)
            print(f"{part.__name__}, seed {draw.seed}\n{reports[draw.seed]}", flush=True)
    print(tables(*found))


if __name__ == "__main__":
    main()
