"""Material: a document with its memory, the samples to train on, and the probes to ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import kvedit as kv
from kvedit.cartridges import Sample
from kvedit.cartridges.study import Decoding, SampleSet, context_of, samples_from, save_samples
from kvedit.evals.prefills import Prefills
from kvedit.evals.recall import RecallQuestion, recall
from kvedit.memory import KVMemory

DOCUMENTS = Path(__file__).parent / "documents"
NAMES = tuple(sorted(path.stem for path in DOCUMENTS.glob("*.txt")))
ANSWER_TOKENS = 16
TRAINED_TOKENS = 32
ANSWERS = ("both", "right", "own")


class Material:
    """A document, and all that is made of it once."""

    def __init__(self, name: str, model: Any, tokenizer: Any, folder: Path) -> None:
        """Reads the document and captures it as a chat."""
        self.name, self.model, self.tokenizer, self.folder = name, model, tokenizer, folder
        text = (DOCUMENTS / f"{name}.txt").read_text(encoding="utf-8").strip()
        self.facts = json.loads((DOCUMENTS / f"{name}.json").read_text(encoding="utf-8"))
        self.context = context_of(tokenizer, name.replace("_", " ").title(), text)
        self.full = kv.capture(model, tokenizer, self.context)
        self.prefills = Prefills(model, tokenizer, keep_bytes=1 << 30)
        self.probes = [
            RecallQuestion(
                fact["probe"], tuple(fact["answers"]), grading=("f1", "contains"), document=name
            )
            for fact in self.facts
        ]

    def chunk(self, ratio: float) -> int:
        """Returns the length of four chunks that fill all slots but the chat's first token's."""
        return max(1, round((self.full.slots / ratio - 1) / 4))

    def slots(self, ratio: float) -> int:
        """Returns how many slots a memory has that is so many times smaller."""
        return 1 + 4 * self.chunk(ratio)

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """All samples, kept in the folder: each question with the right and the model's answer."""
        place = self.folder / "samples" / self.name
        if place.exists():
            return SampleSet(place)
        given = [(question, answer) for fact in self.facts for question, answer in fact["train"]]
        pairs = [*given, *((question, None) for question, _ in given)]
        made = samples_from(self.model, self.tokenizer, pairs, self.full, document=self.name,
                            answer=Decoding(TRAINED_TOKENS))  # fmt: skip
        return save_samples(place, made, {"model": self.full.model.identity()["fingerprint"]})

    def chosen(self, answers: str) -> Sequence[Sample]:
        """Returns the samples with both answers, the right ones, or the model's own."""
        right = sum(len(fact["train"]) for fact in self.facts)
        cut = {"both": slice(None), "right": slice(right), "own": slice(right, None)}[answers]
        return list(self.samples)[cut]

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
