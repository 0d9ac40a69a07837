"""Drift, losslessness and composition on tiny models, against the plain model."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize, Shift
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.recall import RecallQuestion, composition, drift, losslessness, recall
from kvedit.memory import KVMemory
from kvedit.testing import CONTEXT, tiny_model, tolerances

PROMPTS = [" and the answer is", " you would not", " that was in the box"]
A, B = "The answer for you is that there is a box.", " In the house was a thing with no name."


@lru_cache
def captured(family: str) -> tuple[Any, Any, KVMemory]:
    model, tokenizer = tiny_model(family)
    return model, tokenizer, kv.capture(model, tokenizer, CONTEXT)


def cut(memory: KVMemory, slots: int) -> KVMemory:
    kept = torch.arange(slots)
    return memory.with_layers({i: layer.select(kept) for i, layer in memory.layers.items()})


def test_drift_is_recall_from_both_sides(tmp_path: Path) -> None:
    model, tokenizer, full = captured("llama")
    small = cut(full, 20)
    found = drift(
        model, tokenizer, {"small": small}, PROMPTS, full=full, max_new_tokens=4, path=tmp_path
    )
    asked = [RecallQuestion(prompt) for prompt in PROMPTS]
    sides = {"nothing": None, "small": small}
    for since, reference in (("full", "full"), ("nothing", "nothing")):
        alone = recall(
            model, tokenizer, sides, asked, full=full, reference=reference, max_new_tokens=4
        )
        assert found.kl("small", since) == alone.mean("small", "kl")
        flipped = found.flipped("small", since)
        assert flipped.value == 1 - alone.mean("small", "same").value
        assert flipped.low <= flipped.value <= flipped.high
        assert found.kl(since, since).value == 0 == found.flipped(since, since).value
    assert found.kl("small", "nothing").value > 1e-3
    further = found.kl("small", "nothing").value - found.kl("full", "nothing").value
    assert found.excess("small").value == pytest.approx(further)
    assert found.excess("full").value == 0
    assert {p.name for p in tmp_path.iterdir()} == {"from-full.jsonl", "from-nothing.jsonl"}
    assert len(repr(found).splitlines()) == 2 + 3
    assert set(json.loads(json.dumps(found.to_json()))) == {"from_full", "from_nothing"}
    with pytest.raises(InvalidArgument, match="list of prompts"):
        drift(model, tokenizer, {}, "text", full=full)
    with pytest.raises(InvalidArgument, match="since"):
        found.kl("small", "small")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "gpt2"])
def test_a_store_loses_nothing(family: str, tmp_path: Path) -> None:
    model, tokenizer, full = captured(family)
    store = kv.Store(tmp_path / "memories")

    def there_and_back(memory: KVMemory) -> KVMemory:
        store.put(memory, "control")
        return store.get("control")

    found = losslessness(model, tokenizer, full, there_and_back, PROMPTS)
    assert found and found.digest_kept
    assert found.difference == found.direct <= tolerances.FP32_LOGITS
    assert (found.agreement, found.prompts) == (1, 3)
    behind = [tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS]
    assert found.tokens == sum(map(len, behind))
    assert json.loads(json.dumps(found.to_json()))["passed"] is True


def test_the_plain_model_is_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, full = captured("llama")
    small = cut(full, 20)
    found = losslessness(model, tokenizer, full, lambda _: small, PROMPTS)
    worst = 0.0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([tokenizer(CONTEXT).input_ids + ids])).logits[0]
        with kv.attach(model, small) as session:
            over = session.forward(torch.tensor([ids]))[0]
        apart = whole[-len(ids) :].log_softmax(-1) - over.log_softmax(-1)
        worst = max(worst, float(apart.abs().max()))
    assert not found and not found.digest_kept
    assert found.difference == pytest.approx(worst, rel=1e-4)
    assert found.direct < 1e-4 < 0.1 < found.difference
    assert found.kl > 1e-3


def test_a_loss_on_the_way_is_seen_and_a_move_is_none() -> None:
    model, tokenizer, full = captured("llama")
    moved = losslessness(model, tokenizer, full, Shift(30), PROMPTS)
    assert moved and not moved.digest_kept

    def rounded(memory: KVMemory) -> KVMemory:
        return memory.to(dtype=torch.float16).to(dtype=torch.float32)

    def misplaced(memory: KVMemory) -> KVMemory:
        return dataclasses.replace(memory, next_position=memory.next_position + 1)

    for path in (rounded, misplaced, Emphasize("answer", strength=0.1)):
        assert not losslessness(model, tokenizer, full, path, PROMPTS)


def test_only_a_capture_as_it_was_is_a_control() -> None:
    model, tokenizer, full = captured("llama")
    bare = dataclasses.replace(
        full,
        source=None,
        layers={
            i: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
            for i, layer in full.layers.items()
        },
    )
    for memory, message in (
        (bare, "no source tokens"),
        (Shift(3)(full), "unedited capture"),
        (Emphasize("answer", strength=1.0)(full), "unedited capture"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            losslessness(model, tokenizer, memory, lambda m: m, PROMPTS)
    with pytest.raises(InvalidArgument, match="list of prompts"):
        losslessness(model, tokenizer, full, lambda m: m, [])


QUESTIONS = (
    RecallQuestion(" The answer is", ("a box",), document="A"),
    RecallQuestion(" In the house was", ("a thing",), document="B"),
    RecallQuestion(" with no", ("name",), document="B"),
)


def parts() -> tuple[Any, Any, dict[str, KVMemory], KVMemory]:
    model, tokenizer = tiny_model("llama")
    memories = {name: kv.capture(model, tokenizer, text) for name, text in (("A", A), ("B", B))}
    return model, tokenizer, memories, kv.capture(model, tokenizer, A + B)


def test_compositions_are_asked_in_every_order() -> None:
    model, tokenizer, memories, full = parts()
    seen: list[list[str]] = []

    def anew(given: Any) -> KVMemory:
        # The composition that no other one can beat: reading both texts in this order.
        seen.append([next(n for n, m in memories.items() if m is memory) for memory in given])
        return kv.capture(model, tokenizer, "".join(memory.source.text for memory in given))

    found = composition(
        model, tokenizer, memories, anew, QUESTIONS, full=full, others={"nothing": None},
        max_new_tokens=4,
    )  # fmt: skip
    assert seen == [["A", "B"], ["B", "A"]]
    assert found.orders == ("A + B", "B + A")
    assert found.report.names == ("full", "A + B", "B + A", "A alone", "B alone", "nothing")
    assert found.report.mean("A + B", "kl").value == 0  # it is the full context
    first, second = (found.report.values(order, "nll_gold") for order in found.orders)
    spread = [abs(first[q.key] - second[q.key]) for q in QUESTIONS]
    assert found.spread("nll_gold").value == pytest.approx(sum(spread) / 3)
    assert min(spread) > 1e-3
    keys = [q.key for q in QUESTIONS]
    place = found.place("nll_gold")
    front = (first[keys[0]] + second[keys[1]] + second[keys[2]]) / 3
    assert place[0].value == pytest.approx(front) and place[0].n == place[1].n == 3
    alone = found.report.values("B alone", "nll_gold")
    both = [(first[k] + second[k]) / 2 - alone[k] for k in keys[1:]]
    assert found.cost("nll_gold")["B"] == pytest.approx(sum(both) / 2)
    answers = [found.report.of(order) for order in found.orders]
    differ = [a.answer != b.answer for a, b in zip(*answers, strict=True)]
    assert found.flipped().value == pytest.approx(sum(differ) / 3)
    assert json.loads(json.dumps(found.to_json()))["orders"] == ["A + B", "B + A"]
    assert "spread of nll_gold" in repr(found)


def test_a_composition_that_knows_no_order_has_no_spread() -> None:
    model, tokenizer, memories, full = parts()
    found = composition(
        model, tokenizer, memories, lambda given: memories["A"], QUESTIONS,
        full=full, max_new_tokens=3,
    )  # fmt: skip
    assert found.spread("nll_gold").value == 0 == found.flipped().value
    assert found.cost("nll_gold")["A"] == pytest.approx(0, abs=1e-6)


def test_orders_are_drawn_where_there_are_too_many() -> None:
    model, tokenizer, memories, full = parts()
    names = "ABCDEFGH"
    many = dict.fromkeys(names, memories["A"])
    asked = [RecallQuestion(" that", document=name) for name in names]
    found = composition(
        model, tokenizer, many, lambda given: given[0], asked,
        full=full, most_orders=3, max_new_tokens=1,
    )  # fmt: skip
    assert len(set(found.orders)) == 3 and found.orders[0] == " + ".join(names)
    assert all(sorted(order.split(" + ")) == list(names) for order in found.orders)


def test_compositions_without_sense_are_refused() -> None:
    model, tokenizer, memories, full = parts()

    def attempt(given: dict[str, KVMemory], asked: Any = QUESTIONS) -> None:
        composition(model, tokenizer, given, lambda g: g[0], asked, full=full)

    with pytest.raises(InvalidArgument, match="two parts"):
        attempt({"A": memories["A"]})
    with pytest.raises(InvalidArgument, match="two parts"):
        attempt({"A + B": memories["A"], "B": memories["B"]})
    with pytest.raises(UnknownName, match="document of a question"):
        attempt(memories, [*QUESTIONS, RecallQuestion("x", document="C")])
    with pytest.raises(InvalidArgument, match=r"no question about \['A'\]"):
        attempt(memories, QUESTIONS[1:])
