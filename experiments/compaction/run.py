"""Is Attention Matching better than every selection that keeps as many slots?

    python experiments/compaction/run.py FOLDER --data FILE [--ratios 10] [--methods …]
    python experiments/compaction/run.py FOLDER --data FILE --table [--figure FILE]

FILE has SQuAD's shape. The articles nearest to a thousand tokens are captured as chats and made
smaller; their questions are asked as further turns, and no method knows them. A journal per
article holds what every memory said: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from methods import METHODS  # beside this file
from table import figure, journal_path, tables  # beside this file

import kvedit as kv
from kvedit.cartridges.study import context_of
from kvedit.evals import read_squad
from kvedit.evals.journal import Journal
from kvedit.evals.prefills import Prefills
from kvedit.evals.recall import Document, RecallQuestion, by_document, recall
from kvedit.memory import KVMemory
from kvedit.runtime import ModelReader

ANSWER_TOKENS = 16
ROWS = 32
"""Questions side by side: more than an article of the default choice has."""


class Article:
    """A document, its whole memory, its questions, and what was found about it."""

    def __init__(self, document: Document, reader: ModelReader, folder: Path) -> None:
        """Captures the document and opens its journals."""
        self.name, self.reader, self.folder = document.name, reader, folder
        self.model, self.tokenizer = reader.model, reader.tokenizer
        title = document.name.replace("_", " ")
        self.full = kv.capture(
            self.model, self.tokenizer, context_of(self.tokenizer, title, document.text)
        )
        self.probes = [bare(question) for question in document.questions]
        self.prefills = Prefills(self.model, self.tokenizer, keep_bytes=1 << 30)
        facts = {
            "kind": "compaction",
            "model": str(self.full.model.identity()["fingerprint"]),
            "document": self.full.digest,
            "answer_tokens": ANSWER_TOKENS,
        }
        self.journal = Journal(journal_path(folder, document.name), facts)

    def frame(self) -> None:
        """Asks the full context and no context, between which everything else lies."""
        if "nothing" in self.journal.done:
            return
        for name, record in self.ask("nothing", None).items():
            self.journal.add({"key": name, "method": name, "ratio": 1, "seed": 0, **record})

    def unit(self, name: str, ratio: float, seed: int) -> None:
        """Makes a smaller memory and asks it, if the journal lacks it."""
        key = f"{name} @{ratio:g} #{seed}"
        if key in self.journal.done:
            return
        cpu, wall = time.process_time(), time.perf_counter()
        memory = METHODS[name].make(self.full, self.reader, 1 / ratio, seed)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found = self.ask(name, memory)[name]
        self.journal.add({"key": key, "method": name, "ratio": ratio, "seed": seed,
                          "cpu": round(cpu, 2), "wall": round(wall, 2), **found})  # fmt: skip
        kl = fmean(scores["kl"] for scores in found["probes"].values())
        print(f"{self.name} {key}: KL {kl:.3f}, CPU {cpu:.1f} s", flush=True)

    def ask(self, name: str, memory: KVMemory | None) -> dict[str, dict[str, Any]]:
        """Returns the size, scores and answers of a memory, and those of the full context."""
        report = recall(
            self.model, self.tokenizer, {name: memory}, self.probes, full=self.full,
            max_new_tokens=ANSWER_TOKENS, batch_size=ROWS, prefills=self.prefills,
            path=self.folder / "recall" / f"{self.name}.jsonl",
        )  # fmt: skip
        return {
            side: {
                "size": report.sizes[side].to_json(),
                "probes": {r.key: {**dict(r.scores), "answer": r.answer} for r in report.of(side)},
            }
            for side in report.names
        }


def bare(question: RecallQuestion) -> RecallQuestion:
    """Returns a question as a user's turn: without the words that set it off from a text."""
    asked = question.prompt.strip().removeprefix("Question:").removesuffix("Answer:").strip()
    return replace(question, prompt=asked)


def nearest(documents: Sequence[Document], tokenizer: Any, tokens: int, n: int) -> list[Document]:
    """Returns the ``n`` documents whose lengths are nearest to ``tokens``."""
    sizes = {document.name: len(tokenizer(document.text).input_ids) for document in documents}
    return sorted(documents, key=lambda document: abs(sizes[document.name] - tokens))[:n]


def main() -> None:
    """Runs what is missing, then prints the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    model, tokenizer = kv.load("smollm2-135m")
    found = by_document(read_squad(options.data, context="article"))
    chosen = nearest(found, tokenizer, options.tokens, options.articles)
    if not options.table:
        reader = ModelReader(model, tokenizer)
        articles = [Article(document, reader, options.folder) for document in chosen]
        for article in articles:
            article.frame()
        for ratio in options.ratios:
            for name in options.methods:
                for seed in options.seeds if METHODS[name].drawn else options.seeds[:1]:
                    for article in articles:
                        article.unit(name, ratio, seed)
    names = [document.name for document in chosen]
    print(tables(options.folder, names))
    if options.figure:
        figure(options.folder, names).savefig(options.figure, dpi=110, bbox_inches="tight")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="questions in SQuAD's shape")
    parser.add_argument("--articles", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000, help="length to look for")
    parser.add_argument("--ratios", type=float, nargs="+", default=[10])
    parser.add_argument("--methods", nargs="+", choices=METHODS,
                        default=[name for name in METHODS if name != "AM, omp"])  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--figure", type=Path, help="draw KL against size into this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
