"""Residual vectors compiled into slots of a stored context, against the hook they stand for.

python experiments/cache_steering/compiled.py FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from setup import INSTRUCTION, OPENS, Draw  # beside this file

import kvedit as kv
from kvedit.evals import unrelated_prompts
from kvedit.evals.steering import (
    Asker,
    Baselines,
    Bystanders,
    Method,
    evaluate_style,
    word_problems,
)
from kvedit.runtime import ModelReader
from kvedit.runtime.text import encode_turn
from kvedit.steering import compile_residual, extract, steered
from kvedit.steering.compiling import Compiled

SEED, QUESTIONS, BYSTANDERS, REFERENCE = 300, 16, 8, 12
CONTEXT = (
    {"role": "user", "content": "I keep a small shop and often have sums to do. Can you help me?"},
    {"role": "assistant", "content": "Of course. Tell me what you sell and what you would like to "
     "know, and I will answer as well as I can."},
)  # fmt: skip
CASES = ((range(9, 10), 2.0), (range(16, 17), 2.0), (range(24, 25), 2.0), (range(18, 30), 0.1))
"""Layers and strength: the hook's strength, which the compiled change is to reproduce."""


def reference(tokenizer: Any, memory: kv.KVMemory) -> list[torch.Tensor]:
    """Returns other questions as turns behind the context; every fourth is held out by the fit."""
    asked = word_problems(REFERENCE, SEED + 1)
    turns = [encode_turn(tokenizer, memory.source, [{"role": "user", "content": q.prompt}], True)
             for q in asked]  # fmt: skip
    return [turn.tokens[memory.tokens_count :] for turn in turns]


def shown(name: str, found: Compiled) -> str:
    """Returns a line: means over layers."""

    def mean(field: str) -> float:
        return sum(getattr(each, field) for each in found.fidelity) / len(found.fidelity)

    fields = ("explained", "reach", "cosine", "length", "mass", "change")
    return " | ".join([name, *(f"{mean(field):.2f}" for field in fields), f"{found.left:.2f}"])


def main() -> None:
    """Compiles, asks, and prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    draw = Draw(model, tokenizer, folder, SEED, QUESTIONS, BYSTANDERS)
    delta = extract(model, tokenizer, draw.contrast, sites=("keys", "values", "residual"),
                    folder=folder / f"read{SEED}")  # fmt: skip
    memory = kv.capture(model, tokenizer, list(CONTEXT))
    reader, prompts = ModelReader(model, tokenizer), reference(tokenizer, memory)
    rows: dict[str, Method] = {}
    for layers, c in CASES:
        name, part = f"{layers[0]}-{layers[-1]}", delta.only(sites="residual", layers=list(layers))
        rows[f"hook {name}"] = Method(lambda c, d=part: steered(model, d, c), c, None, part.digest)
        for at in ("all", "last"):
            made = compile_residual(reader, memory, part, prompts, strength=c, at=at)
            print(shown(f"{name} {at}", made), flush=True)
            edited = kv.editors.Steer(values=1.0, at=at)(memory, made.delta.operand())
            rows[f"compiled {name} {at}"] = Method(lambda _, m=edited: m, c, None, edited.digest)
    ask = Asker(model, tokenizer, memory, max_new_tokens=40, batch_size=16)
    apart = Bystanders(Asker(model, tokenizer, memory, max_new_tokens=16, batch_size=16),
                       unrelated_prompts(BYSTANDERS, SEED))  # fmt: skip
    baselines = Baselines.of(in_cache_of(memory), delta, 1.0, instruction=INSTRUCTION,
                             examples=draw.examples, seeds=(SEED,))  # fmt: skip
    print(evaluate_style(ask, draw.questions, rows, baselines, apart, markers=OPENS,
                         path=folder / "compiled.jsonl"))  # fmt: skip


def in_cache_of(memory: kv.KVMemory) -> Any:
    """Returns how a random direction is put into the context's slots: values of all of them."""
    return lambda delta, c: kv.editors.Steer(values=c, at="all")(memory, delta.operand())


if __name__ == "__main__":
    main()
