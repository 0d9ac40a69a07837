"""On a model that reads: the context helps, less of it helps less, and nothing helps least."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.evals.recall import RecallQuestion, losslessness, recall
from kvedit.memory import KVMemory

pytestmark = pytest.mark.slow

FACTS = {
    "Ann Lee": ("Oslo", "4417"), "Bo Diaz": ("Lima", "9032"), "Cy Park": ("Turin", "2286"),
    "Dee Fox": ("Quito", "7751"), "Eli Roth": ("Perth", "1593"), "Flo Beck": ("Riga", "6648"),
}  # fmt: skip
TEXT = " ".join(
    f"{name} lives in {city} and has the number {number}." for name, (city, number) in FACTS.items()
)


def questions() -> list[RecallQuestion]:
    cities = tuple(city for city, _ in FACTS.values())
    numbers = [
        RecallQuestion(f" {name} lives in {city} and has the number", (number,))
        for name, (city, number) in FACTS.items()
    ]
    return numbers + [
        RecallQuestion(f" {name} lives in", choices=cities, correct=index)
        for index, name in enumerate(FACTS)
    ]


def first(memory: KVMemory, share: float) -> KVMemory:
    kept = torch.arange(round(memory.slots * share))
    return memory.with_layers({i: layer.select(kept) for i, layer in memory.layers.items()})


def test_less_context_is_further_from_all_of_it(smollm: Any) -> None:
    model, tokenizer = smollm
    full = kv.capture(model, tokenizer, TEXT)
    memories = {"half": first(full, 0.5), "nothing": None}
    found = recall(
        model, tokenizer, memories, questions(), full=full, baseline="nothing",
        max_new_tokens=8,
    )  # fmt: skip
    assert 0 == found.mean("full", "kl").value < found.mean("half", "kl").value
    assert found.difference("full", metric="nll_gold").high < 0
    assert found.difference("full", metric="margin").low > 0
    assert found.mean("full", "choice").value > found.mean("nothing", "choice").value
    assert found.mean("full", "contains").value > found.mean("nothing", "contains").value
    # Numbers of people in the kept half are still known better than those of the others.
    nll = [dict(result.scores)["nll_gold"] for result in found.of("half")[:6]]
    assert sum(nll[:3]) < sum(nll[3:])
    control = losslessness(model, tokenizer, full, lambda memory: memory, [questions()[0].prompt])
    assert control and control.digest_kept
