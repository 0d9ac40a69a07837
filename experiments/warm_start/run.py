"""Where should a cartridge start? KL to the full context after some steps, for several starts.

    python experiments/warm_start/run.py FOLDER [--steps 0 40 120] [--documents …] [--seeds 0 1 2]
    python experiments/warm_start/run.py FOLDER --table

The documents, with questions to train on and other questions to probe with, lie beside this file.
Each document is compressed eight times. A journal per document and seed holds what every start
said after every number of steps, and training has checkpoints: a killed run goes on where it was.
``--study`` trains on what the model asks itself instead of on the given questions.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from table import journal_path, tables  # beside this file

import kvedit as kv
from kvedit.cartridges import Sample, TrainPlan, initial, train
from kvedit.cartridges.study import (
    OPENINGS,
    Chunking,
    Corpus,
    Decoding,
    Document,
    SampleSet,
    StudySettings,
    context_of,
    samples_from,
    save_samples,
    synthesize,
)
from kvedit.editors.matching import AttentionMatching
from kvedit.evals.journal import Journal
from kvedit.evals.prefills import Prefills
from kvedit.evals.recall import RecallQuestion, recall
from kvedit.memory import KVMemory

HERE = Path(__file__).parent / "documents"
RATIO = 8
ANSWER_TOKENS = 16
TRAINED_TOKENS = 32


class Text:
    """A document, its memory, its questions, and all that is made of it once."""

    def __init__(self, name: str, model: Any, tokenizer: Any, folder: Path, study: bool) -> None:
        """Reads the document and captures it."""
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.folder, self.study = folder, study
        self.text = (HERE / f"{name}.txt").read_text(encoding="utf-8").strip()
        self.facts = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        self.context = context_of(tokenizer, name.replace("_", " ").title(), self.text)
        self.full = kv.capture(model, tokenizer, self.context)
        # Four chunks behind the chat's first token fill all slots.
        self.chunk = round((self.full.slots / RATIO - 1) / 4)
        self.slots = 1 + 4 * self.chunk
        self.prefills = Prefills(model, tokenizer, keep_bytes=1 << 30)
        self.probes = [
            RecallQuestion(
                fact["probe"],
                tuple(fact["answers"]),
                grading=("f1", "contains"),
                document=name,
            )
            for fact in self.facts
        ]

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """Samples to train on, kept in the folder."""
        if self.study:
            return self._studied()
        place = self.folder / "samples" / self.name
        if place.exists():
            return SampleSet(place)
        given = [(question, answer) for fact in self.facts for question, answer in fact["train"]]
        # Every question twice: answered right, and as the model answers over the full context.
        pairs = [*given, *((question, None) for question, _ in given)]
        made = samples_from(self.model, self.tokenizer, pairs, self.full, document=self.name,
                            answer=Decoding(TRAINED_TOKENS))  # fmt: skip
        return save_samples(place, made, {"model": self.full.model.identity()["fingerprint"]})

    def _studied(self) -> SampleSet:
        settings = StudySettings(
            chunking=Chunking("cover", 60, 200), kinds=(), prompts=OPENINGS,
            question=Decoding(32, 0.4, 0.9), answer=Decoding(48),
        )  # fmt: skip
        place = self.folder / "study" / self.name
        corpus = Corpus.of(Document(self.name, self.text))
        return synthesize(
            self.model, self.tokenizer, corpus, place, settings, 64, source=self.full.source
        )

    def frame(self) -> None:
        """Asks the full context and no context, between which everything else lies."""
        journal = Journal(journal_path(self.folder, self.name, None), {"full": self.full.digest})
        if "nothing" not in journal.done:
            for name, found in self.ask({"nothing": None}).items():
                journal.add({"key": name, "probes": found})

    def ask(self, memories: dict[str, KVMemory | None]) -> dict[str, dict[str, Any]]:
        """Returns memory to its probes' scores and free answers; the full context is in it."""
        report = recall(
            self.model, self.tokenizer, memories, self.probes, full=self.full,
            max_new_tokens=ANSWER_TOKENS, prefills=self.prefills,
            path=self.folder / "recall" / f"{self.name}.jsonl",
        )  # fmt: skip
        return {
            name: {r.key: {**dict(r.scores), "answer": r.answer} for r in report.of(name)}
            for name in report.names
        }


def first(text: Text, seed: int) -> KVMemory:
    """Returns the first tokens' slots."""
    return initial.first_tokens(text.model, text.tokenizer, text.full, text.slots)


def chunks(text: Text, seed: int) -> KVMemory:
    """Returns four chunks from all over the document, read as one text."""
    made = initial.sampled_chunks(
        text.model, text.tokenizer, text.context, text.slots, chunk=text.chunk, seed=seed
    )
    return initial.stand_for(made, text.full)


def noise(text: Text, seed: int) -> KVMemory:
    """Returns random vectors with the model's own statistics."""
    made = initial.random_vectors(text.model, text.tokenizer, text.slots, seed=seed)
    return initial.stand_for(made, text.full)


def matched(**options: Any) -> Callable[[Text, int], KVMemory]:
    """Returns a start that attention matching makes."""

    def start(text: Text, seed: int) -> KVMemory:
        editor = AttentionMatching(text.slots, **options)
        return initial.edited(text.model, text.tokenizer, text.full, editor)

    return start


STARTS: dict[str, Callable[[Text, int], KVMemory]] = {
    "first-p": first,
    "matched: keys, values": matched(bias=False),
    "matched: keys, values, β": matched(),
    "matched: keys": matched(bias=False, values=False),
    "sampled chunks": chunks,
    "random": noise,
}


class Run:
    """All units of one document and seed."""

    def __init__(self, text: Text, seed: int, steps: Sequence[int]) -> None:
        """Opens the journal."""
        self.text, self.seed, self.steps = text, seed, sorted(steps)
        self.folder = text.folder
        facts = {
            "kind": "warm_start",
            "model": str(text.full.model.identity()["fingerprint"]),
            "document": text.full.digest,
            "study": text.study,
            "slots": text.slots,
            "answer_tokens": [ANSWER_TOKENS, TRAINED_TOKENS],
            "seed": seed,
        }
        self.journal = Journal(journal_path(self.folder, text.name, seed), facts)
        self.cpu = 0.0

    def start(self, name: str) -> None:
        """Makes a start, asks it, trains it, and asks it again."""
        if all(self._key(name, step) in self.journal.done for step in self.steps):
            return
        began = time.process_time()
        start = STARTS[name](self.text, self.seed)
        self.cpu = time.process_time() - began
        if 0 in self.steps:
            self._note(name, 0, start)
        if self.steps[-1] == 0:
            return
        place = self.folder / "checkpoints" / f"{self.text.name}-{self.seed}-{slug(name)}"
        resumed, samples = place.exists(), self.text.samples
        self._began = time.process_time()

        def on_eval(step: int, memory: KVMemory) -> None:
            now = time.process_time()
            self.cpu = math.nan if resumed else self.cpu + now - self._began
            if step and step in self.steps:
                self._note(name, step, memory)
            self._began = time.process_time()

        plan = TrainPlan(
            steps=self.steps[-1], lr=2e-2, pack=64, packs=2, rows=2, seed=self.seed,
            eval_every=math.gcd(*self.steps), checkpoint_every=20, keep=1,
        )  # fmt: skip
        train(self.text.model, start, samples, plan, tokenizer=self.text.tokenizer,
              folder=place, on_eval=on_eval)  # fmt: skip
        shutil.rmtree(place)

    def _note(self, name: str, step: int, memory: KVMemory) -> None:
        key = self._key(name, step)
        if key in self.journal.done:
            return
        found = self.text.ask({name: memory})[name]
        slots = max(layer.slots for layer in memory.layers.values())
        cpu = None if math.isnan(self.cpu) else round(self.cpu, 2)
        self.journal.add({"key": key, "start": name, "step": step, "slots": slots,
                          "tokens": self.text.full.slots, "cpu": cpu, "probes": found})  # fmt: skip
        kl = fmean(scores["kl"] for scores in found.values())
        print(f"{self.text.name} seed {self.seed} {key}: KL {kl:.3f}, CPU {cpu} s", flush=True)

    @staticmethod
    def _key(name: str, step: int) -> str:
        return f"{name} @{step}"


def main() -> None:
    """Runs what is missing, then prints the tables."""
    options = _options()
    torch.set_num_threads(1)
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        model, tokenizer = kv.load("smollm2-135m")
        texts = [
            Text(name, model, tokenizer, options.folder, options.study)
            for name in options.documents
        ]
        for text in texts:
            text.frame()
        for seed, text, name in _units(texts, options):
            Run(text, seed, options.steps).start(name)
    print(tables(options.folder, options.documents, options.seeds))


def _units(texts: Sequence[Text], options: Any) -> Iterator[tuple[int, Text, str]]:
    """Yields seed by seed, so that what is there early covers all documents."""
    for seed in options.seeds:
        for text in texts:
            for name in options.starts:
                once = seed == options.seeds[0] and text is texts[0]
                if name != "random" or once or options.random:
                    yield seed, text, name


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = sorted(path.stem for path in HERE.glob("*.txt"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 40, 120])
    parser.add_argument("--documents", nargs="+", choices=known, default=known)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--random", action="store_true",
                        help="random vectors everywhere, not only once")  # fmt: skip
    parser.add_argument("--study", action="store_true", help="train on self-study")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser.parse_args()


def slug(name: str) -> str:
    """Returns a file name."""
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    main()
