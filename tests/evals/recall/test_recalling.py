"""recall, against the plain model over whole texts: softmax written out, one pass per question."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop
from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.evals import Prefills
from kvedit.evals.recall import RecallQuestion, recall
from kvedit.evals.recall.reading import Listener
from kvedit.memory import KVMemory
from kvedit.testing import CONTEXT, tiny_model

OTHER = "In the old house by the sea there was a box, and in the box was another one."
QUESTIONS = (
    RecallQuestion("\nQuestion: How long?\nAnswer:", ("60 days", "sixty days")),
    RecallQuestion(" and the answer is", ("that you would wait",), document="a"),
    RecallQuestion(" you would", choices=("wait", "not be there", "x"), correct=1),
    RecallQuestion(" that", facts=(("kind", "free"),)),
    RecallQuestion(" you can", choices=("the", "that you would not wait"), correct=0),
)
NEW = 6
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox", "gpt2")


@lru_cache
def setting(family: str) -> tuple[Any, Any, KVMemory, dict[str, Any]]:
    model, tokenizer = tiny_model(family)
    full = kv.capture(model, tokenizer, CONTEXT)
    sides = {"other": kv.capture(model, tokenizer, OTHER), "nothing": None}
    return model, tokenizer, full, sides


@lru_cache
def report(family: str, batch_size: int = 3) -> Any:
    model, tokenizer, full, sides = setting(family)
    return recall(
        model, tokenizer, sides, QUESTIONS, full=full, max_new_tokens=NEW, batch_size=batch_size
    )


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def ahead(model: Any, before: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities from which each token of an answer is drawn, by one pass, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + answer[:-1]])).logits[0]
    return logits[len(before) - 1 :].double().log_softmax(dim=-1)


def greedy(model: Any, tokenizer: Any, before: list[int]) -> list[int]:
    found: list[int] = []
    while len(found) < NEW and tokenizer.eos_token_id not in found:
        found.append(int(ahead(model, before, [*found, 0])[-1].argmax()))
    return found


def begins(tokenizer: Any, name: str, question: RecallQuestion) -> list[int]:
    """What stands before the answer, as ids."""
    if name == "nothing":
        return list(tokenizer(question.prompt.lstrip()).input_ids)
    text = {"full": CONTEXT, "other": OTHER}[name]
    return list(tokenizer(text).input_ids) + plain(tokenizer, question.prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_that_of_the_plain_model(family: str) -> None:
    model, tokenizer, _, _ = setting(family)
    found = report(family)
    assert found.names == ("full", "other", "nothing")
    for index, question in enumerate(QUESTIONS):
        reference = greedy(model, tokenizer, begins(tokenizer, "full", question))
        p = ahead(model, begins(tokenizer, "full", question), reference)
        for name in found.names:
            result = found.of(name)[index]
            scores = dict(result.scores)
            before = begins(tokenizer, name, question)
            q = ahead(model, before, reference)
            kl = (p.exp() * (p - q)).sum(dim=-1)
            near = {"rel": 1e-3, "abs": 1e-4}
            assert scores["kl"] == pytest.approx(float(kl.mean()), **near)
            assert scores["kl_worst"] == pytest.approx(float(kl.max()), **near)
            each = q.gather(1, torch.tensor(reference)[:, None])
            assert scores["nll_reference"] == pytest.approx(-float(each.mean()), **near)
            same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean()
            assert scores["agreement"] == float(same)
            free = greedy(model, tokenizer, before)
            assert result.answer == tokenizer.decode(free, skip_special_tokens=True)
            assert scores["length"] == len(free)
            assert scores["same"] == float(free == reference)
            assert scores["generation_gap"] == scores["agreement"] - scores["overlap"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gold_answers_and_options_are_those_of_the_plain_model(family: str) -> None:
    model, tokenizer, _, _ = setting(family)
    found = report(family)
    for index, question in enumerate(QUESTIONS):
        for name in found.names:
            scores = dict(found.of(name)[index].scores)
            if question.gold is None:
                assert not {"nll_gold", "kl_gold", "choice", "em"} & set(scores)
                continue
            before, whole = (begins(tokenizer, n, question) for n in (name, "full"))
            gold = plain(tokenizer, f" {question.gold}")
            p, q = ahead(model, whole, gold), ahead(model, before, gold)
            kl = (p.exp() * (p - q)).sum(dim=-1).mean()
            assert scores["kl_gold"] == pytest.approx(float(kl), rel=1e-3, abs=1e-4)
            each = q.gather(1, torch.tensor(gold)[:, None])
            assert scores["nll_gold"] == pytest.approx(-float(each.mean()), abs=1e-4)
            hits = [int(row.argmax()) == token for row, token in zip(q, gold, strict=True)]
            assert scores["gold_top1"] == sum(hits) / len(gold)
            if not question.choices:
                continue
            sums = []
            for option in question.choices:
                ids = plain(tokenizer, f" {option}")
                row = ahead(model, before, ids).gather(1, torch.tensor(ids)[:, None])
                sums.append(float(row.sum()))
            right = sums[question.correct]
            best = max(s for s in sums if s is not right)
            assert scores["margin"] == pytest.approx(right - best, abs=1e-3)
            assert scores["choice"] == float(right > best)
            per = [s / len(t) for s, t in zip(sums, question.choices, strict=True)]
            assert scores["choice_norm"] == float(per[question.correct] == max(per))
            assert scores["choice_gap"] == scores["choice"] - scores["choice_free"]


def test_options_are_of_one_token_and_of_several_and_right_ones_win_and_lose() -> None:
    _, tokenizer, _, _ = setting("llama")
    lengths = {len(plain(tokenizer, f" {text}")) for q in QUESTIONS for text in q.choices}
    assert min(lengths) == 1 and len(lengths) > 2
    values = report("llama").values("full", "margin").values()
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_at_no_distance_from_itself(family: str) -> None:
    for result in report(family).of("full"):
        scores = dict(result.scores)
        assert (scores["kl"], scores["kl_worst"], scores["agreement"]) == (0, 0, 1)
        assert (scores["same"], scores["overlap"], scores["generation_gap"]) == (1, 1, 0)
        assert scores.get("kl_gold", 0) == 0


def test_a_bias_of_nothing_is_at_no_distance_either() -> None:
    # Another content digest, so that it is read and not looked up.
    model, tokenizer, full, _ = setting("llama")
    biased = full.with_layers(
        {0: dataclasses.replace(full.layers[0], bias=torch.zeros(4, full.slots))}
    )
    found = run("llama", None, memories={"zero bias": biased})
    assert biased.digest != full.digest
    assert max(map(abs, found.values("zero bias", "kl").values())) < 1e-6
    assert found.mean("zero bias", "overlap").value == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_same_exactly_where_every_forced_token_agrees(family: str) -> None:
    # One answer of the plain model fixes both sides: a gap can come from other answers alone.
    for name in ("full", "other", "nothing"):
        for result in report(family).of(name):
            scores = dict(result.scores)
            assert (scores["same"] == 1) == (scores["agreement"] == 1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_change_nothing(batch_size: int) -> None:
    expected, found = report("gemma3"), report("gemma3", batch_size)
    for name in expected.names:
        for a, b in zip(expected.of(name), found.of(name), strict=True):
            assert a.answer == b.answer
            assert dict(a.scores) == pytest.approx(dict(b.scores), abs=2e-4)


def test_a_chat_is_asked_as_a_chat() -> None:
    model, tokenizer = tiny_model("qwen3")
    system = {"role": "system", "content": CONTEXT}
    full = kv.capture(model, tokenizer, [system])
    asked = [RecallQuestion("\nHow long?\n", ("60 days",)), RecallQuestion("Who would wait?")]
    found = recall(model, tokenizer, {"nothing": None}, asked, full=full, max_new_tokens=NEW)
    for index, question in enumerate(asked):
        turn = {"role": "user", "content": question.prompt.strip()}
        ids = {
            name: list(
                tokenizer.apply_chat_template(
                    [*head, turn], add_generation_prompt=True, return_dict=True
                )["input_ids"]
            )
            for name, head in (("full", [system]), ("nothing", []))
        }
        answers = {name: greedy(model, tokenizer, before) for name, before in ids.items()}
        for name, answer in answers.items():
            assert found.of(name)[index].answer == tokenizer.decode(answer)
        p, q = (ahead(model, before, answers["full"]) for before in ids.values())
        kl = float((p.exp() * (p - q)).sum(dim=-1).mean())
        assert dict(found.of("nothing")[index].scores)["kl"] == pytest.approx(kl, rel=1e-3)
        if question.answers:
            gold = plain(tokenizer, "60 days")  # no space before it: it begins a message
            each = ahead(model, ids["full"], gold).gather(1, torch.tensor(gold)[:, None])
            scores = dict(found.of("full")[index].scores)
            assert scores["nll_gold"] == pytest.approx(-float(each.mean()), abs=1e-4)


def test_answers_end_where_the_stop_text_does() -> None:
    model, tokenizer, full, _ = setting("llama")
    free = [result.answer for result in report("llama").of("full")]
    stop = free[0][2:4]
    found = recall(
        model, tokenizer, {}, QUESTIONS, full=full, max_new_tokens=NEW, stop=stop, batch_size=4
    )
    for text, result in zip(free, found.of("full"), strict=True):
        assert result.answer == text.split(stop)[0]
    # Rows that stop early are padded in generation; padding is no part of an answer.
    first = greedy(model, tokenizer, begins(tokenizer, "full", QUESTIONS[0]))
    end = next(n for n in range(1, NEW + 1) if stop in tokenizer.decode(first[:n]))
    assert end < NEW
    assert dict(found.of("full")[0].scores)["length"] == end


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Notes the memory of every call of a method of the listener."""
    seen: list[Any] = []
    original = getattr(Listener, name)

    def noting(self: Listener, memory: Any, *args: Any, **options: Any) -> Any:
        seen.append(memory)
        return original(self, memory, *args, **options)

    monkeypatch.setattr(Listener, name, noting)
    return seen


def run(family: str, path: Path | None, **changes: Any) -> Any:
    model, tokenizer, full, sides = setting(family)
    options = {"memories": sides, "full": full, "max_new_tokens": NEW, "batch_size": 3, **changes}
    return recall(model, tokenizer, questions=QUESTIONS, path=path, **options)


def test_a_cut_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = run("llama", whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for keep in (1, 2, 5, 8, len(lines) - 1):
        cut.write_bytes(b"".join(lines[:keep]) + lines[-1][:7])
        assert run("llama", cut) == expected
        assert sorted(cut.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_memories_may_come_later_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, full, sides = setting("llama")
    path = tmp_path / "recall.jsonl"
    run("llama", path, memories={"other": sides["other"]})
    asked = watch(monkeypatch, "reply")
    both = run("llama", path)
    assert asked == [None, None]  # two batches of nothing
    assert both.of("other") == report("llama").of("other")
    # The same name with another memory is another memory.
    dropped = Drop({"tokens": [1, 9]})(full)
    changed = run("llama", path, memories={"other": dropped})
    assert asked[2:] == [dropped] * 2
    assert changed.of("other") != both.of("other")


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recall.jsonl"
    run("llama", path)
    other = setting("llama")[3]["other"]
    for changes in ({"max_new_tokens": 5}, {"stop": "x"}, {"reference": "other"}, {"full": other}):
        with pytest.raises(InvalidArgument, match="results of something else"):
            run("llama", path, **changes)


def test_the_reference_is_read_once_for_all_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, full, sides = setting("llama")
    read, replied = watch(monkeypatch, "read"), watch(monkeypatch, "reply")
    kept = Prefills(model, tokenizer)
    run("llama", None, prefills=kept)
    assert len(read) == len(replied) == 2 * 3  # batches, memories
    more = {"dropped": Drop({"tokens": [1, 9]})(full)}
    added = run("llama", None, prefills=kept, memories=more)
    assert len(read) == len(replied) == 2 * 3 + 2
    assert read[-2:] == replied[-2:] == [more["dropped"]] * 2
    # Another memory of a name that was there is read anew.
    renamed = run("llama", None, prefills=kept, memories={"other": more["dropped"]})
    assert renamed.of("other") == added.of("dropped") != report("llama").of("other")
    read.clear()
    tight = Prefills(model, tokenizer, keep_bytes=0)
    assert run("llama", None, prefills=tight) == report("llama")
    assert run("llama", None, prefills=tight, memories={}).of("full") == report("llama").of("full")
    assert len(read) == 2 * 3 + 2


def test_another_reference_turns_the_comparison_around() -> None:
    model, tokenizer, _, _ = setting("llama")
    found = run("llama", None, reference="nothing")
    for index, question in enumerate(QUESTIONS):
        before = [begins(tokenizer, name, question) for name in ("nothing", "full")]
        reference = greedy(model, tokenizer, before[0])
        p, q = (ahead(model, ids, reference) for ids in before)
        kl = float((p.exp() * (p - q)).sum(dim=-1).mean())
        assert dict(found.of("full")[index].scores)["kl"] == pytest.approx(kl, rel=1e-3)
    assert set(found.values("nothing", "kl").values()) == {0.0}


def test_a_memory_without_a_text_is_asked_with_the_same_tokens() -> None:
    model, tokenizer, full, _ = setting("llama")
    bare = dataclasses.replace(
        full,
        source=None,
        layers={
            i: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
            for i, layer in full.layers.items()
        },
    )
    found = recall(model, tokenizer, {"bare": bare}, QUESTIONS, full=full, max_new_tokens=NEW)
    assert set(found.values("bare", "kl").values()) == {0.0}
    assert found.mean("bare", "same").value == 1


def test_what_can_not_be_asked_is_refused() -> None:
    model, tokenizer, full, sides = setting("llama")
    for questions in ([], [QUESTIONS[0]] * 2):
        with pytest.raises(InvalidArgument, match="different questions"):
            recall(model, tokenizer, sides, questions, full=full)
    with pytest.raises(InvalidArgument, match="pass it as full="):
        run("llama", None, memories={"full": full})
    for role in ("reference", "baseline"):
        with pytest.raises(UnknownName, match=f"{role} among memories 'absent'"):
            run("llama", None, **{role: "absent"})
    with pytest.raises(InvalidArgument, match="batch_size"):
        run("llama", None, batch_size=0)
    with pytest.raises(IncompatibleModel):
        run("llama", None, memories={"alien": setting("qwen3")[2]})


def test_a_report_is_plain_data() -> None:
    data = json.loads(json.dumps(report("llama").to_json(results=True)))
    assert data["n"] == 5 and set(data["memories"]) == {"full", "other", "nothing"}
    assert len(data["memories"]["other"]["results"]) == 5
