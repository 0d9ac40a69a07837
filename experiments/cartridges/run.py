"""How should a cartridge be made? KL to the full context, for many starts, sizes and losses.

    python experiments/cartridges/run.py FOLDER STUDY [--documents …] [--seeds 0 1 2]
    python experiments/cartridges/run.py FOLDER STUDY --table

Studies: see studies.py. The documents, with questions to train on and others to probe with, lie
beside this file. A journal per document, seed and size holds what every variant said after every
number of steps, and training has checkpoints: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from material import ANSWER_TOKENS, NAMES, TRAINED_TOKENS, Material  # beside this file
from starts import STARTS
from studies import STUDIES, Study, Variant
from table import journal_path, tables

import kvedit as kv
from kvedit.cartridges import TrainPlan, train
from kvedit.evals.journal import Journal
from kvedit.memory import KVMemory


class Run:
    """All variants of one document, size and seed."""

    def __init__(self, text: Material, ratio: float, seed: int) -> None:
        """Opens the journal."""
        self.text, self.ratio, self.seed = text, ratio, seed
        facts = {
            "kind": "warm_start",
            "model": str(text.full.model.identity()["fingerprint"]),
            "document": text.full.digest,
            "study": False,
            "slots": text.slots(ratio),
            "answer_tokens": [ANSWER_TOKENS, TRAINED_TOKENS],
            "seed": seed,
        }
        self.journal = Journal(journal_path(text.folder, text.name, seed, ratio), facts)
        self.cpu = 0.0

    def make(self, variant: Variant, steps: Sequence[int]) -> None:
        """Makes a start, asks it, trains it, and asks it again."""
        missing = [step for step in steps if _key(variant, step) not in self.journal.done]
        if not missing:
            return
        began = time.process_time()
        start = STARTS[variant.start](self.text, self.ratio, self.seed)
        self.cpu = time.process_time() - began
        if 0 in missing:
            self._note(variant, 0, start)
        if max(missing) > 0:
            self._train(variant, start, missing)

    def _train(self, variant: Variant, start: KVMemory, steps: Sequence[int]) -> None:
        place = self.text.folder / "checkpoints" / slug(
            f"{self.text.name}-{self.ratio:g}-{self.seed}-{variant.name}"
        )  # fmt: skip
        resumed, samples = place.exists(), self.text.chosen(variant.answers)
        self._began = time.process_time()

        def on_eval(step: int, memory: KVMemory) -> None:
            now = time.process_time()
            self.cpu = math.nan if resumed else self.cpu + now - self._began
            if step and step in steps:
                self._note(variant, step, memory)
            self._began = time.process_time()

        settings: dict[str, Any] = {
            "steps": max(steps), "lr": 2e-2, "pack": 64, "packs": 2, "rows": 2,
            "seed": self.seed, "eval_every": math.gcd(*steps), "checkpoint_every": 20, "keep": 1,
        }  # fmt: skip
        plan = TrainPlan(**{**settings, **variant.plan})
        train(self.text.model, start, samples, plan, tokenizer=self.text.tokenizer,
              teacher=self.text.full if variant.teacher else None,
              folder=place, on_eval=on_eval)  # fmt: skip
        shutil.rmtree(place)

    def _note(self, variant: Variant, step: int, memory: KVMemory) -> None:
        found = self.text.ask({variant.name: memory})[variant.name]
        slots = max(layer.slots for layer in memory.layers.values())
        cpu = None if math.isnan(self.cpu) else round(self.cpu, 2)
        key = _key(variant, step)
        self.journal.add({"key": key, "start": variant.name, "step": step, "slots": slots,
                          "tokens": self.text.full.slots, "cpu": cpu, "probes": found})  # fmt: skip
        kl, gold = (fmean(one[name] for one in found.values()) for name in ("kl", "kl_gold"))
        print(f"{self.text.name} {self.ratio:g}x seed {self.seed} {key}: KL {kl:.3f}, "
              f"gold {gold:.3f}, CPU {cpu} s", flush=True)  # fmt: skip


def _key(variant: Variant, step: int) -> str:
    return f"{variant.name} @{step}"


def frame(text: Material) -> None:
    """Asks the full context and no context, between which everything else lies."""
    journal = Journal(journal_path(text.folder, text.name, None, 1), {"full": text.full.digest})
    if "nothing" not in journal.done:
        for name, found in text.ask({"nothing": None}).items():
            journal.add({"key": name, "probes": found})


def main() -> None:
    """Runs what is missing, then prints the tables."""
    options = _options()
    torch.set_num_threads(1)
    study = STUDIES[options.study]
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        model, tokenizer = kv.load("smollm2-135m")
        texts = [Material(name, model, tokenizer, options.folder) for name in options.documents]
        for text in texts:
            frame(text)
        for run, variant in _units(texts, study, options):
            run.make(variant, study.steps)
    print(tables(options.folder, study, options.documents, options.seeds))


def _units(texts: Sequence[Material], study: Study, options: Any) -> Iterator[tuple[Run, Variant]]:
    """Yields seed by seed, so that what is there early covers all documents."""
    for seed in options.seeds:
        for ratio in study.ratios:
            for variant in study.variants:
                for text in texts:
                    if options.variants is None or variant.name in options.variants:
                        yield Run(text, ratio, seed), variant


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--documents", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="names of variants; all are the default")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser.parse_args()


def slug(name: str) -> str:
    """Returns a file name."""
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    main()
