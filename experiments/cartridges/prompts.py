"""Which seed prompts should self-study use? What a small model makes of each, and what it teaches.

    python experiments/cartridges/prompts.py FOLDER [--documents …] [--n 16] [--steps 40]

For every kind of seed prompt, and for the openings that help small models, the model asks itself
about a document; its own answers over the whole document train a cartridge from the first slots
of an eighth. Probes are asked as in run.py. A line per kind is kept in the folder; samples and
training resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from material import NAMES, Material  # beside this file
from starts import STARTS

import kvedit as kv
from kvedit.cartridges import TrainPlan, train
from kvedit.cartridges.study import (
    KINDS,
    OPENINGS,
    Chunking,
    Corpus,
    Decoding,
    Document,
    Filters,
    SampleSet,
    StudySettings,
    synthesize,
)
from kvedit.evals.journal import Journal

RATIO = 8
SETS = (*KINDS, "openings")


def studied(text: Material, kind: str, n: int) -> SampleSet:
    """Returns what the model asks itself about a document from one kind of seed prompts."""
    settings = StudySettings(
        chunking=Chunking("cover", 60, 200),
        kinds=() if kind == "openings" else (kind,),
        prompts=OPENINGS if kind == "openings" else (),
        question=Decoding(32, 0.4, 0.9), answer=Decoding(32), filters=Filters(cut_answers=False),
        tries=3,
    )  # fmt: skip
    body = text.context[0]["content"]
    corpus = Corpus.of(Document(text.name, body))
    place = text.folder / "prompts" / f"{text.name}-{kind.replace(' ', '-')}"
    return synthesize(text.model, text.tokenizer, corpus, place, settings, n,
                      source=text.full.source)  # fmt: skip


def line(text: Material, kind: str, n: int, steps: int) -> dict[str, Any]:
    """Returns what came of one kind: how much was kept, and what the cartridge recalls."""
    samples = studied(text, kind, n)
    found = {
        "kind": kind,
        "attempts": samples.attempts,
        "kept": len(samples),
        "dropped": dict(samples.dropped),
        "answer_tokens": round(fmean(len(s) - s.start for s in samples), 1),
        "question": samples[0].question,
    }
    plan = TrainPlan(steps=steps, lr=5e-3, pack=64, packs=2, rows=2, checkpoint_every=20, keep=1)
    place = text.folder / "prompts" / f"{text.name}-{kind.replace(' ', '-')}-training"
    start = STARTS["first-p"](text, RATIO, 0)
    memory = train(text.model, start, samples, plan, tokenizer=text.tokenizer, folder=place)
    return {**found, "probes": text.ask({f"studied {kind}": memory})[f"studied {kind}"]}


def main() -> None:
    """Runs what is missing, and prints a line per kind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    print("| document | seed prompts | attempts | kept | tokens per answer | KL | gold KL | "
          "first question |\n|---|---|---:|---:|---:|---:|---:|---|")  # fmt: skip
    for name in options.documents:
        text = Material(name, model, tokenizer, options.folder)
        facts = {"document": text.full.digest, "n": options.n, "steps": options.steps}
        journal = Journal(options.folder / "prompts" / f"{name}.jsonl", facts)
        for kind in SETS:
            if kind not in journal.done:
                one = line(text, kind, options.n, options.steps)
                journal.add({"key": kind, **one})
            done = journal.done[kind]
            kl, gold = (fmean(p[m] for p in done["probes"].values()) for m in ("kl", "kl_gold"))
            print(f"| {name} | {kind} | {done['attempts']} | {done['kept']} | "
                  f"{done['answer_tokens']} | {kl:.3f} | {gold:.3f} | {done['question']!r} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
