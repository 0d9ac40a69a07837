"""evaluate: metrics recomputed from the model alone; resumption; what is captured and how often."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals import (
    Conflict,
    Prefills,
    Report,
    by_editor,
    difference,
    evaluate,
    few_shot,
    mark,
    ngram_entropy,
    repeat_span,
    unedited,
)
from kvedit.evals.results import CaseResult, Moved, Preference
from kvedit.memory import KVMemory
from kvedit.testing import tiny_model


def case(place: str, new: str, old: str) -> Conflict:
    return Conflict(
        context=(
            f"The boat is on the river. Previously, the {place} was {old}. Currently, the {place} "
            f"is {new}. The dog is in the house."
        ),
        span_text=f"the {place} is {new}.",
        prompt=f" The {place} is",
        new=f" {new}",
        old=f" {old}",
        paraphrases=(f" They say the {place} is", f" So the {place} is now"),
        unrelated=(" The boat is on the", " The dog is in the"),
        neighbourhood=(" The other thing is",),
    )


CASES = [
    case("box", "there", "here with you"),
    case("answer", "in the south", "of the north"),
    case("window", "for the man", "there"),
    case("thing", "so", "and"),
]


def louder(found: Conflict, memory: KVMemory) -> KVMemory:
    return Emphasize(found.span_text, strength=2.0)(memory)


@lru_cache
def tiny(family: str = "llama") -> tuple[Any, Any]:
    return tiny_model(family)


def following(model: Any, tokenizer: Any, context: str, prompt: str) -> torch.Tensor:
    """Log-probabilities [vocabulary] after a context and a prompt, from nothing."""
    tokens = tokenizer(context).input_ids
    tokens = tokens + tokenizer(prompt, add_special_tokens=False).input_ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(dim=-1)


def test_preferences_are_those_of_the_model_alone() -> None:
    model, tokenizer = tiny()
    report = evaluate(model, tokenizer, CASES)
    for one, result in zip(CASES, report.results, strict=True):
        assert result.key == one.key
        for prompt, found in zip(one.questions, (result.own, *result.paraphrases), strict=True):
            expected = following(model, tokenizer, one.context, prompt)
            new, old = (
                tokenizer(text, add_special_tokens=False).input_ids for text in (one.new, one.old)
            )
            assert found.new_first == pytest.approx(float(expected[new[0]]), abs=1e-4)
            assert found.old_first == pytest.approx(float(expected[old[0]]), abs=1e-4)
            assert found.top1 == (int(expected.argmax()) == new[0])
            assert found.told_apart == (new[0] != old[0])
            whole = sum(
                float(
                    following(model, tokenizer, one.context, prompt + tokenizer.decode(new[:i]))[t]
                )
                for i, t in enumerate(new)
            )
            assert found.new_whole == pytest.approx(whole, abs=1e-3)


def test_the_unedited_memory_moves_nothing() -> None:
    model, tokenizer = tiny()
    report = evaluate(model, tokenizer, CASES, mass=True)
    assert report.name == "unedited"
    assert {report.mean(m).value for m in ("kl", "flipped", "neighbourhood_kl")} == {0.0}
    assert torch.equal(report.mass(after=False), report.mass())
    copied = evaluate(model, tokenizer, CASES, lambda _, memory: dataclasses.replace(memory))
    assert copied.kl.value == 0 and copied.mean("neighbourhood_flipped").value == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_collateral_is_the_divergence_of_two_texts(family: str) -> None:
    model, tokenizer = tiny(family)
    swapped = [one.context.replace("Previously", "Once") for one in CASES]
    replaced = {one.key: text for one, text in zip(CASES, swapped, strict=True)}

    def other(one: Conflict, memory: KVMemory) -> KVMemory:
        found: KVMemory = kv.capture(model, tokenizer, replaced[one.key])
        return found

    report = evaluate(model, tokenizer, CASES, other)
    for one, text, result in zip(CASES, swapped, report.results, strict=True):
        moved = (*result.unrelated, *result.neighbourhood)
        prompts = (*one.unrelated, *one.neighbourhood)
        for prompt, found in zip(prompts, moved, strict=True):
            p, q = (following(model, tokenizer, c, prompt) for c in (one.context, text))
            kl = float((p.exp() * (p - q)).sum())
            assert kl > 1e-5
            assert found.kl == pytest.approx(kl, rel=2e-3, abs=1e-6)
            assert found.flipped == (int(p.argmax()) != int(q.argmax()))


def test_emphasis_moves_answers_attention_and_collateral() -> None:
    model, tokenizer = tiny()
    plain = evaluate(model, tokenizer, CASES, mass=True)
    report = evaluate(model, tokenizer, CASES, louder, strength=2.0, mass=True)
    assert report.kl.value > 1e-5
    assert report.mean("delta_logp").value != plain.mean("delta_logp").value
    before = report.mass(after=False)
    assert before.shape == (len(model.model.layers), model.config.num_attention_heads)
    assert torch.equal(before, plain.mass())
    # Queries of the first layer are the same, so odds grow by e**2 in each case.
    for result in report.results:
        low, high = torch.tensor(result.mass_before[0]), torch.tensor(result.mass_after[0])
        odds = (high / (1 - high)) / (low / (1 - low))
        assert torch.allclose(odds, torch.tensor(2.0).exp().expand_as(odds), rtol=1e-3)


def test_greedy_answers_are_those_of_generate() -> None:
    model, tokenizer = tiny()
    report = evaluate(model, tokenizer, CASES[:2], louder, max_new_tokens=6)
    for one, result in zip(CASES, report.results, strict=False):
        memory = kv.capture(model, tokenizer, one.context)
        edited = louder(one, memory)
        options = {"max_new_tokens": 6, "do_sample": False}
        assert result.answer == kv.generate(model, tokenizer, edited, one.prompt, **options)
        assert 1 <= result.length <= 6
        for prompt, moved in zip(one.unrelated, result.unrelated, strict=True):
            texts = [kv.generate(model, tokenizer, m, prompt, **options) for m in (memory, edited)]
            assert moved.flipped == (texts[0] != texts[1])
    known = [ngram_entropy(result.answer) for result in report.results]
    known = [value for value in known if value is not None]
    assert report.mean("fluency").n == len(known)


def test_an_editor_gets_span_operands_and_reader() -> None:
    model, tokenizer = tiny()
    made = by_editor(lambda span: Emphasize(span, strength=2.0))
    a, b = (evaluate(model, tokenizer, CASES, method, name="same") for method in (made, louder))
    assert a == b
    given: list[Any] = []

    class Double:
        def __call__(self, *memories: KVMemory, reader: Any = None) -> KVMemory:
            given.append((memories, reader))
            return memories[0]

    memory = kv.capture(model, tokenizer, CASES[0].context)
    method = by_editor(lambda span: Double(), memory, reader="a reader")
    assert method(CASES[0], memory) is memory
    assert given == [((memory, memory), "a reader")]


def test_a_run_that_was_cut_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    path = tmp_path / "runs" / "louder.jsonl"
    asked: list[str] = []

    def counted(one: Conflict, memory: KVMemory) -> KVMemory:
        if len(asked) == 2 and "stop" not in asked:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.append(one.key)
        return louder(one, memory)

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, CASES, counted, path=path)
    with path.open("a") as file:
        file.write('{"key": "to')  # as a kill in the middle of a write leaves it
    report = evaluate(model, tokenizer, CASES, counted, path=path)
    assert asked == [CASES[0].key, CASES[1].key, "stop", CASES[2].key, CASES[3].key]
    whole = evaluate(model, tokenizer, CASES, louder, name="counted")
    assert report == whole
    assert evaluate(model, tokenizer, CASES, counted, path=path) == whole
    assert len(asked) == 5
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    path = tmp_path / "a.jsonl"
    evaluate(model, tokenizer, CASES[:1], louder, strength=2.0, path=path)
    with pytest.raises(InvalidArgument, match=r"'strength': \(2.0, 3.0\)"):
        evaluate(model, tokenizer, CASES[:1], louder, strength=3.0, path=path)
    with pytest.raises(InvalidArgument, match="mass"):
        evaluate(model, tokenizer, CASES[:1], louder, strength=2.0, path=path, mass=True)
    other, words = tiny("qwen3")
    with pytest.raises(InvalidArgument, match="model"):
        evaluate(other, words, CASES[:1], louder, strength=2.0, path=path)
    (tmp_path / "b.jsonl").write_text("not json\n")
    with pytest.raises(InvalidArgument, match="no journal"):
        evaluate(model, tokenizer, CASES[:1], louder, path=tmp_path / "b.jsonl")


def test_contexts_are_captured_once_for_all_methods() -> None:
    model, tokenizer = tiny()
    kept = Prefills(model, tokenizer)
    for strength in (0.5, 1.0, 2.0):
        evaluate(model, tokenizer, CASES, louder, strength=strength, prefills=kept)
    assert kept.captures == len(CASES)
    small = Prefills(model, tokenizer, keep_bytes=0)
    a = evaluate(model, tokenizer, CASES, louder, prefills=small)
    assert small.captures == 2 * len(CASES)
    assert a.results == evaluate(model, tokenizer, CASES, louder, prefills=kept).results


def test_prefills_drop_what_was_used_least_recently() -> None:
    model, tokenizer = tiny()
    size = kv.capture(model, tokenizer, "One box.").nbytes
    kept = Prefills(model, tokenizer, keep_bytes=int(2.5 * size))
    for text in ("One box.", "Two box.", "One box.", "Old box."):
        kept.memory(text)
    assert kept.captures == 3
    kept.memory("One box.")
    assert kept.captures == 3
    kept.memory("Two box.")
    assert kept.captures == 4
    with pytest.raises(InvalidArgument, match="another model"):
        evaluate(*tiny("qwen3"), CASES, prefills=kept)


def test_prompt_baselines_are_compared_with_the_unchanged_text() -> None:
    model, tokenizer = tiny()
    changed = evaluate(model, tokenizer, CASES, transform=mark, name="marked")
    for one, result in zip(CASES, changed.results, strict=True):
        assert result.key == one.key
        p, q = (
            following(model, tokenizer, text, one.unrelated[0])
            for text in (one.context, mark(one).context)
        )
        assert result.unrelated[0].kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=2e-3)


def test_baselines_change_the_text_as_they_say() -> None:
    one, *others = CASES
    span = one.span_text
    assert mark(one, '"').context == one.context.replace(span, f'"{span}"')
    assert mark(one, "**").questions == one.questions
    again = repeat_span(one, 2)
    assert again.context == f"{one.context} The box is there. The box is there."
    shown = few_shot([*others, one])(one)
    assert shown.context.endswith("\n\n" + one.context)
    assert shown.context.startswith(f"{others[0].context}{others[0].prompt}{others[0].new}.\n\n")
    assert shown.context.count(one.context) == 1
    for wrong in (lambda: mark(one, ""), lambda: repeat_span(one, 0), lambda: few_shot([])):
        with pytest.raises(InvalidArgument):
            wrong()


def preference(new: float, old: float, apart: bool = True) -> Preference:
    return Preference(new, old, new - 1, old, top1=new > -1, told_apart=apart)


def test_metrics_by_hand() -> None:
    a = CaseResult(
        "a",
        preference(-0.5, -2.0),
        (preference(-3.0, -1.0), preference(-1.0, -1.5)),
        (Moved(0.1, False), Moved(0.3, True)),
        (Moved(0.5, True),),
        "one two three four five",
        7,
        ((0.1, 0.3),),
        ((0.2, 0.6),),
    )
    b = CaseResult("b", preference(-2.0, -2.0, apart=False))
    report = Report("hand", (a, b))
    expected = {
        "efficacy": {"a": 1.0},
        "efficacy_whole": {"a": 1.0, "b": 0.0},
        "paraphrase_efficacy": {"a": 0.5},
        "paraphrase_efficacy_whole": {"a": 0.0},
        "delta_logp": {"a": 1.5},
        "delta_logp_whole": {"a": 0.5, "b": -1.0},
        "top1": {"a": 1.0, "b": 0.0},
        "kl": {"a": 0.2},
        "flipped": {"a": 0.5},
        "neighbourhood_kl": {"a": 0.5},
        "neighbourhood_flipped": {"a": 1.0},
        "length": {"a": 7.0},
        "fluency": {"a": (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2},
        "mass_before": {"a": 0.2},
        "mass_after": {"a": 0.4},
    }
    for metric, values in expected.items():
        assert report.values(metric) == pytest.approx(values), metric
    assert set(report.to_json()["metrics"]) == set(expected)
    assert "efficacy" in repr(report) and "(n=1)" in repr(report)
    assert CaseResult.from_json(json.loads(json.dumps(a.to_json()))) == a
    with pytest.raises(UnknownName, match="kl"):
        report.mean("KL")
    with pytest.raises(InvalidArgument, match="mass"):
        Report("none", (b,)).mass()


def test_differences_are_paired_by_case() -> None:
    better = tuple(CaseResult(str(i), preference(i - 5.0, -6.0)) for i in range(6))
    worse = tuple(CaseResult(str(i), preference(i - 5.5, -6.0)) for i in reversed(range(6)))
    found = difference(Report("a", better), Report("b", worse), "delta_logp")
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.clear


def test_a_conflict_may_have_nothing_that_should_stay() -> None:
    model, tokenizer = tiny()
    bare = dataclasses.replace(CASES[0], unrelated=(), neighbourhood=(), paraphrases=())
    report = evaluate(model, tokenizer, [bare], louder, max_new_tokens=2)
    assert report.kl.n == report.mean("paraphrase_efficacy").n == 0
    assert report.efficacy.n == 1
    full = evaluate(model, tokenizer, CASES[:1], louder)
    assert report.values("delta_logp")[bare.key] == pytest.approx(
        full.values("delta_logp")[CASES[0].key], abs=1e-4
    )


def test_nonsense_is_refused() -> None:
    model, tokenizer = tiny()
    for cases in ([], [CASES[0], CASES[0]]):
        with pytest.raises(InvalidArgument, match="different conflicts"):
            evaluate(model, tokenizer, cases, unedited)
