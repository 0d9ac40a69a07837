"""Measures attention matching on the packaged model; prints the tables of docs/matching.md.

A thousand tokens of a document are captured and compacted ten times. Then questions are read over
the compacted and over the whole memory, each with the answer that the model gave over the whole
one, and next-token distributions are compared. No query of these was fitted. Times are CPU
seconds and wall seconds of one thread, the reading of reference queries included:

    python benchmarks/attention_matching.py
    python benchmarks/attention_matching.py --variants both omp_fast --budget 0.05 --json am.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import kvedit as kv
from kvedit.editors.matching import AttentionMatching, match
from kvedit.evals.bootstrap import mean_interval
from kvedit.evals.divergence import token_divergence
from kvedit.memory import KVMemory
from kvedit.runtime import ModelReader
from kvedit.runtime.text import encode_turn

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = (
    "What does a put do first?",
    "Which library stores the payload of a pack?",
    "What is a ref?",
    "How are the blocks of a memory named?",
    "What happens when a process dies in the middle of a write?",
    "Why does the store keep a log beside the index?",
    "What does an edit cost in bytes?",
    "How can somebody find an old version of a memory?",
    "What is a manifest?",
    "Which tiers are there, and what is each for?",
    "What does verify do, and what happens if it is off?",
    "Write one sentence that sums up the text.",
    "Name three words that the text uses for places where memories lie.",
    "What would a reader of this text have to install?",
    "Who is the text written for?",
    "What is the difference between a tag and a branch?",
)
ANSWER_TOKENS = 24

VARIANTS: dict[str, dict[str, Any]] = {
    "first": {"keys": "first", "bias": False, "values": False},
    "random": {"keys": "random", "bias": False, "values": False},
    "keys": {"bias": False, "values": False},
    "keys+bias": {"values": False},
    "keys+values": {"bias": False},
    "both": {},
    "fold_bias": {"fold_bias": True},
    "clamp": {"solver": "clamp", "bias_range": (-3.0, 3.0)},
    "omp_fast": {"keys": "omp_fast"},
    "omp_refined": {"keys": "omp_fast", "refine": -7.0},
    "omp": {"keys": "omp"},
    "refined": {"refine": -6.99},
    "narrow": {"bias_range": (-3.0, 7.0)},
    "max": {"score": "max"},
    "mean": {"score": "mean"},
    "pooled": {"pooling": 7},
    "sinks": {"sinks": 4},
    "recent": {"recent": 16},
    "mass": {"allocate": "mass"},
    "chunk": {"chunk": 256},
    "no_ridge": {"ridge": 0.0},
    "ridge_1e-3": {"ridge": 1e-3},
    "on_policy": {"on_policy": True},
    "on_policy_omp_fast": {"on_policy": True, "keys": "omp_fast"},
    "on_policy_mass": {"on_policy": True, "allocate": "mass"},
    "context": {"queries": "context"},
    "self_study": {"queries": "self_study"},
    "self_study+repeat": {"queries": "self_study+repeat"},
    "random_queries": {"queries": "random"},
}
DEFAULT = (
    "first", "random", "keys", "keys+bias", "keys+values", "both", "fold_bias", "clamp",
    "omp_fast", "omp", "mass", "on_policy", "on_policy_omp_fast", "context", "random_queries",
)  # fmt: skip


def main() -> None:
    """Prints one line per variant."""
    options = _options()
    torch.set_num_threads(1)
    model, tokenizer = kv.load(options.model)
    ids = tokenizer((ROOT / options.document).read_text(encoding="utf-8")).input_ids
    memory = kv.capture(model, tokenizer, tokenizer.decode(ids[: options.tokens]))
    reader = ModelReader(model, tokenizer)
    probes = _probes(model, tokenizer, memory, options.prompts)
    print(f"{memory.slots} slots, budget {options.budget}, {len(probes)} prompts", flush=True)
    print(f"{'variant':20} {'KL':>6} {'95 %':>15} {'top-1':>6} {'output':>7} {'mass':>6} "
          f"{'cond':>8} {'bound':>6} {'CPU s':>6} {'wall s':>6}", flush=True)  # fmt: skip
    found = {}
    for name in options.variants:
        editor = AttentionMatching(options.budget, **VARIANTS[name])
        found[name] = _row(model, memory, editor, reader, probes)
        _print(name, found[name])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--document", default="docs/store.md")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--budget", type=lambda text: int(text) if text.isdigit() else float(text),
                        default=0.1)  # fmt: skip
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    parser.add_argument("--json", help="file for all figures")
    return parser.parse_args()


def _probes(
    model: Any, tokenizer: Any, memory: KVMemory, count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns for each question its tokens, answer included, and the whole memory's logits."""
    prompts = [f"\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS[:count]]
    found = []
    for prompt in prompts:
        answer = kv.generate(
            model, tokenizer, memory, prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        source = encode_turn(tokenizer, memory.source, prompt + answer)
        tokens = source.tokens[memory.tokens_count :]
        found.append((tokens, _logits(model, memory, tokens)))
    return found


def _logits(model: Any, memory: KVMemory, tokens: torch.Tensor) -> torch.Tensor:
    with kv.attach(model, memory) as session:
        return session.forward(tokens[None])[0]


def _row(
    model: Any, memory: KVMemory, editor: AttentionMatching, reader: ModelReader, probes: Any
) -> dict[str, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    edited, report = match(memory, editor, reader)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    pairs = [token_divergence(logits, _logits(model, edited, ids)) for ids, logits in probes]
    kls = [float(kl.mean()) for kl, _ in pairs]
    conditions = sorted(h.condition for h in report.heads if h.condition is not None)
    return {
        "kl": fmean(kls),
        "interval": mean_interval(kls, 0),
        "top1": fmean(float(same.double().mean()) for _, same in pairs),
        "output_error": report.output_error,
        "mass_error": report.mass_error,
        "condition": conditions[len(conditions) // 2] if conditions else None,
        "at_bound": sum(head.clamped or 0 for head in report.heads),
        "kept": sum(head.kept for head in report.heads),
        "cpu": cpu,
        "wall": wall,
        "editor": {f.name: str(getattr(editor, f.name)) for f in dataclasses.fields(editor)},
    }


def _print(name: str, row: dict[str, Any]) -> None:
    low, high = row["interval"] or (float("nan"), float("nan"))
    condition = "" if row["condition"] is None else f"{row['condition']:.0e}"
    print(f"{name:20} {row['kl']:6.3f} {f'{low:.3f} to {high:.3f}':>15} {row['top1']:6.1%} "
          f"{row['output_error']:7.3f} {row['mass_error']:6.3f} {condition:>8} "
          f"{row['at_bound']:6} {row['cpu']:6.1f} {row['wall']:6.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
