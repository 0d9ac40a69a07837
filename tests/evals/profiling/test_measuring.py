"""Batched rows against each head set alone, through the public editors and kv.score."""

import dataclasses

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize, Suppress
from kvedit.errors import AmbiguousSpan, InvalidArgument, SpanNotFound
from kvedit.evals.profiling import Setting, measure, single_heads, single_layers
from kvedit.memory.heads import HeadSet

STRENGTH = 3.0


def steered(memory, span, heads):
    """The memory under a public editor, one call per layer."""
    for layer, chosen in heads.heads:
        which = {"query": "heads", "kv": "kv_heads"}[heads.kind]
        memory = Emphasize(span, strength=STRENGTH, layers=(layer,), **{which: chosen})(memory)
    return memory


def read_on(model, tokenizer, memory, prompt, rerun):
    """The memory and prompt behind which steering begins, by a session of its own."""
    if rerun == "prompt":
        return memory, prompt
    with kv.attach(model, memory, tokenizer) as session:
        session.feed(prompt)
        ids = session.source().tokens[memory.tokens_count :]
    with kv.attach(model, memory, tokenizer) as session:
        session.forward(ids[None, :-1])
        return session.memory(), ids[-1:]


def margin(model, tokenizer, memory, prompt, probe):
    wanted, rival = kv.score(model, tokenizer, memory, prompt, [probe.wanted, probe.rival])
    return wanted.logprob - rival.logprob


def following(model, tokenizer, memory, prompt):
    with kv.attach(model, memory, tokenizer) as session:
        return session.feed(prompt)[0].double().log_softmax(0)


@pytest.mark.parametrize("rerun", ["last", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt_neox"])
def test_rows_agree_with_each_candidate_alone(tiny, probes, family, rerun):
    model, tokenizer = tiny(family)
    memory = kv.capture(model, tokenizer, probes[0].context)
    every = [
        *single_heads(memory.model, "query"),
        *single_heads(memory.model, "kv"),
        *single_layers(memory.model, "kv"),
        HeadSet.random(memory.model, 4, seed=1),
    ]
    found = measure(model, tokenizer, probes[0], every, Setting(STRENGTH, rerun))
    probe = probes[0]
    span = memory.resolve(probe.span)
    start, prompt = read_on(model, tokenizer, memory, probe.prompt, rerun)
    other, unrelated = read_on(model, tokenizer, memory, probe.unrelated, rerun)
    plain = following(model, tokenizer, other, unrelated)
    assert found.base == pytest.approx(margin(model, tokenizer, start, prompt, probe), abs=1e-5)
    for heads, value, kl in zip(every, found.margins, found.kl, strict=True):
        alone = margin(model, tokenizer, steered(start, span, heads), prompt, probe)
        assert value == pytest.approx(alone, abs=1e-5)
        after = following(model, tokenizer, steered(other, span, heads), unrelated)
        expected = float((plain.exp() * (plain - after)).sum())
        assert kl == pytest.approx(expected, abs=1e-5)
    assert max(abs(value - found.base) for value in found.margins) > 0.05  # it does something
    assert max(found.kl) > 0.01


def test_batches_of_any_size_give_the_same(tiny, probes):
    model, tokenizer = tiny("llama")
    sets = single_heads(kv.capture(model, tokenizer, "x").model, "query")
    cases = [measure(model, tokenizer, probes[1], sets, Setting(2.0, rows=n)) for n in (1, 5, 128)]
    for case in cases[1:]:
        assert case.margins == pytest.approx(cases[0].margins, abs=1e-5)
        assert case.kl == pytest.approx(cases[0].kl, abs=1e-5)


def test_a_memory_with_bias_keeps_it(tiny, probes):
    model, tokenizer = tiny("llama")
    probe = probes[0]
    memory = Suppress("Previously", strength=2.0)(kv.capture(model, tokenizer, probe.context))
    heads = HeadSet.of([(0, 1)], "kv")
    given = dataclasses.replace(probe, context=memory)
    found = measure(model, tokenizer, given, [heads], Setting(STRENGTH, "prompt"))
    assert found.base == pytest.approx(
        margin(model, tokenizer, memory, probe.prompt, probe), abs=1e-5
    )
    after = steered(memory, memory.resolve(probe.span), heads)
    expected = margin(model, tokenizer, after, probe.prompt, probe)
    assert found.margins[0] == pytest.approx(expected, abs=1e-5)
    plain = measure(model, tokenizer, probe, [heads], Setting(STRENGTH, "prompt"))
    assert abs(plain.base - found.base) > 1e-3


def test_a_row_of_its_own_strength(tiny, probes):
    model, tokenizer = tiny("llama")
    heads = HeadSet.of([(1, 0), (2, 1)], "kv")
    mixed = measure(model, tokenizer, probes[0], [heads, heads], Setting(9.0), (1.0, STRENGTH))
    for value, strength in zip(mixed.margins, (1.0, STRENGTH), strict=True):
        alone = measure(model, tokenizer, probes[0], [heads], Setting(strength))
        assert value == pytest.approx(alone.margins[0], abs=1e-5)
    assert abs(mixed.margins[0] - mixed.margins[1]) > 1e-2
    with pytest.raises(ValueError, match="zip"):
        measure(model, tokenizer, probes[0], [heads], Setting(1.0), (1.0, 2.0))


def test_a_chat_is_asked_as_a_chat(tiny, probes):
    model, tokenizer = tiny("llama")
    messages = [{"role": "user", "content": probes[0].context}]
    messages += [{"role": "assistant", "content": "Noted."}]
    probe = dataclasses.replace(probes[0], context=messages, prompt="What does it sell?")
    heads = HeadSet.of([(1, 0)], "kv")
    memory = kv.capture(model, tokenizer, messages)
    for rerun in ("last", "prompt"):
        found = measure(model, tokenizer, probe, [heads], Setting(STRENGTH, rerun))
        assert found.base == pytest.approx(
            margin(model, tokenizer, memory, probe.prompt, probe), abs=1e-5
        )
    after = steered(memory, memory.resolve(probe.span), heads)
    expected = margin(model, tokenizer, after, probe.prompt, probe)
    assert found.margins[0] == pytest.approx(expected, abs=1e-5)


def test_the_first_token_alone(tiny, probes):
    model, tokenizer = tiny("llama")
    probe = dataclasses.replace(probes[0], wanted=" clocks and more", rival=" lamps")
    setting = Setting(2.0, "prompt", continuation="first")
    found = measure(model, tokenizer, probe, single_layers(_spec(tiny), "kv"), setting)
    memory = kv.capture(model, tokenizer, probe.context)
    scores = kv.score(model, tokenizer, memory, probe.prompt, [probe.wanted, probe.rival])
    assert len(scores[0].tokens) > 1
    first = [float(score.logprobs[0]) for score in scores]
    assert found.base == pytest.approx(first[0] - first[1], abs=1e-5)
    same = dataclasses.replace(probe, rival=" clocks or less")
    with pytest.raises(InvalidArgument, match="same token"):
        measure(model, tokenizer, same, single_layers(_spec(tiny), "kv"), setting)


def test_what_cannot_be_measured_is_refused(tiny, probes):
    model, tokenizer = tiny("llama")
    sets = single_layers(_spec(tiny), "kv")
    missing = dataclasses.replace(probes[0], span="nowhere")
    with pytest.raises(SpanNotFound, match="nowhere"):
        measure(model, tokenizer, missing, sets, Setting(1.0))
    twice = dataclasses.replace(probes[0], span="shop")
    with pytest.raises(AmbiguousSpan, match="occurrence"):
        measure(model, tokenizer, twice, sets, Setting(1.0))
    with pytest.raises(InvalidArgument, match="layers"):
        measure(model, tokenizer, probes[0], [HeadSet.of([(9, 0)])], Setting(1.0))
    for wrong in ({"strength": 0.0}, {"strength": float("inf")}, {"strength": 1.0, "rows": 0}):
        with pytest.raises(InvalidArgument):
            Setting(**wrong)
    for name in ("rerun", "continuation"):
        with pytest.raises(InvalidArgument, match=name):
            Setting(1.0, **{name: "some"})


def test_the_session_and_the_memory_stay_as_they_were(tiny, probes):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, probes[0].context)
    before = memory.digest
    given = dataclasses.replace(probes[0], context=memory)
    measure(model, tokenizer, given, single_layers(memory.model, "kv"), Setting(2.0))
    assert memory.digest == before
    assert torch.is_grad_enabled()


def _spec(tiny):
    model, tokenizer = tiny("llama")
    return kv.capture(model, tokenizer, "x").model
