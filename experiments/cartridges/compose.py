"""What is left of three documents when their cartridges stand in one memory?

    python experiments/cartridges/compose.py FOLDER [--orders 2] [--steps 40]

Each document is compressed eight times: matched, and trained with and without the other two beside
it (distractors). The three stand behind each other by RoPE, or one over the other at their own
positions, as PEFT adds adapters. Probes of all documents are asked; the reference is one prompt
that holds all three. A JSON file per row is kept in the folder, and training has checkpoints: a
killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from material import ANSWER_TOKENS, NAMES, Material  # beside this file
from starts import STARTS

import kvedit as kv
from kvedit.cartridges import TrainPlan, compose, train
from kvedit.cartridges.study import Corpus, Document, corpus_context
from kvedit.evals.recall import composition
from kvedit.memory import KVMemory

RATIO = 8
START = "matched by self-study"
METRICS = ("kl", "kl_gold", "f1")
ROWS = (
    ("full", True), ("matched", True), ("trained alone", True), ("trained alone", False),
    ("trained with distractors", True), ("trained with distractors", False),
)  # fmt: skip
"""Kinds of parts, and whether they stand behind each other by RoPE."""


class Trio:
    """Three documents and their memories."""

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        """Captures each document, and all three as one."""
        self.folder, self.steps, self.seed = folder, steps, seed
        self.model, self.tokenizer = kv.load("smollm2-135m")
        self.texts = {n: Material(n, self.model, self.tokenizer, folder) for n in NAMES}
        documents = [
            Document(name.replace("_", " ").title(), self.source(name)) for name in self.texts
        ]
        whole = corpus_context(self.tokenizer, Corpus(tuple(documents)))
        self.full = kv.capture(self.model, self.tokenizer, whole)
        self._starts: dict[str, KVMemory] = {}

    @staticmethod
    def source(name: str) -> str:
        """Returns a document's text."""
        return (Path(__file__).parent / "documents" / f"{name}.txt").read_text().strip()

    def start(self, name: str) -> KVMemory:
        """Returns the matched memory of a document."""
        if name not in self._starts:
            self._starts[name] = STARTS[START](self.texts[name], RATIO, self.seed)
        return self._starts[name]

    def trained(self, name: str, distractors: bool) -> KVMemory:
        """Returns the trained cartridge of a document."""
        others = [self.start(other) for other in NAMES if other != name] if distractors else []
        plan = TrainPlan(
            steps=self.steps, lr=5e-3, pack=64, packs=2, rows=2, seed=self.seed,
            checkpoint_every=20, keep=1,
            distractors=0.5 if distractors else 0.0, max_distractors=2,
        )  # fmt: skip
        place = self.folder / "compose" / f"{name}-{'beside' if distractors else 'alone'}"
        return train(self.model, self.start(name), self.texts[name].samples, plan,
                     tokenizer=self.tokenizer, distractors=others, folder=place)  # fmt: skip

    def parts(self, kind: str) -> dict[str, KVMemory]:
        """Returns the memories of all documents, of one kind."""
        made = {
            "full": lambda name: self.texts[name].full,
            "matched": self.start,
            "trained alone": lambda name: self.trained(name, False),
            "trained with distractors": lambda name: self.trained(name, True),
        }[kind]
        return {name: made(name) for name in NAMES}

    def row(self, kind: str, rotate: bool, orders: int) -> dict[str, Any]:
        """Returns what one kind of memory recalls when composed, and alone."""
        place = self.folder / "compose" / f"{kind}-{'rotated' if rotate else 'own'}.json"
        if place.exists():
            return dict(json.loads(place.read_text()))
        parts = self.parts(kind)

        def joined(memories: Sequence[KVMemory]) -> KVMemory:
            one: KVMemory = compose(memories, rotate=rotate)
            return one

        probes = [probe for text in self.texts.values() for probe in text.probes]
        found = composition(
            self.model, self.tokenizer, parts, joined, probes, full=self.full,
            most_orders=orders, seed=self.seed, max_new_tokens=ANSWER_TOKENS,
            path=self.folder / "recall" / f"compose-{kind}-{rotate}.jsonl",
        )  # fmt: skip
        report = found.report
        row: dict[str, Any] = {"slots": sum(m.slots for m in parts.values())}
        first = found.orders[0]
        row["composed"] = {metric: str(report.mean(first, metric)) for metric in METRICS}
        for metric in METRICS:
            alone = [
                value
                for name in NAMES
                for key, value in report.values(f"{name} alone", metric).items()
                if key in {probe.key for probe in self.texts[name].probes}
            ]
            row.setdefault("alone", {})[metric] = f"{sum(alone) / len(alone):.3f}"
        row["spread of KL over orders"] = str(found.spread("kl"))
        row["place"] = {str(at): str(value) for at, value in found.place("kl").items()}
        row["orders"] = list(found.orders)
        place.write_text(json.dumps(row, indent=1) + "\n")
        return row


def main() -> None:
    """Runs what is missing, and prints one line per row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (options.folder / "compose").mkdir(parents=True, exist_ok=True)
    trio = Trio(options.folder, options.steps, options.seed)
    print("| parts | placed | slots | composed: KL | gold KL | F1 | own part alone: KL | gold KL "
          "| spread over orders |\n|---|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for kind, rotate in ROWS:
        row = trio.row(kind, rotate, options.orders)
        made, alone = row["composed"], row["alone"]
        placed = "by RoPE" if rotate else "own positions"
        print(f"| {kind} | {placed} | {row['slots']} | {made['kl']} | {made['kl_gold']} | "
              f"{made['f1']} | {alone['kl']} | {alone['kl_gold']} | "
              f"{row['spread of KL over orders']} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
