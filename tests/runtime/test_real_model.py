"""The main job on a real model: SmolLM2-135M-Instruct, from its package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvedit as kv
from kvedit.editors import Chain, Drop, Emphasize, Shift, Suppress
from kvedit.memory.rules import GateRule, MassRule, write_rule
from kvedit.memory.span import SpanQuery
from kvedit.testing import recompute
from kvedit.testing.tolerances import FP32_LOGITS

pytestmark = pytest.mark.slow

DOCUMENT = (
    "Harbour & Hill sells tents, boots and stoves. The shop is open from Tuesday to Saturday, from "
    "half past nine to six. Under the old policy, which ended in March, refunds were possible for "
    "30 days. Since the first of April, refunds are possible for 60 days. Ropes can't be returned. "
    "A new zip costs 18 euros and takes three days. Rucksacks have a warranty of ten years. "
)
CHAT = [{"role": "system", "content": DOCUMENT}]


def _prompt(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def test_a_memory_continues_as_the_full_prefill_does(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, DOCUMENT * 3, chunk=128)
    tail = _prompt(tokenizer, " In short, the answer to the first question is")
    whole = torch.cat((memory.tokens[None], tail), dim=1)
    with torch.no_grad():
        expected = model(whole).logits[0, len(memory.tokens) :]
    with kv.attach(model, memory) as session:
        found = session.forward(tail)[0]
    assert (found - expected).abs().max() <= FP32_LOGITS
    plain = model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=24, do_sample=False
    )[0, whole.shape[1] :].tolist()
    with kv.attach(model, memory) as session:
        assert list(session.generate(tail[0], max_new_tokens=24).tokens) == plain


def test_edits_equal_the_masked_recomputation(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, DOCUMENT)
    tail = _prompt(tokenizer, " Refunds are possible for")
    edits = (
        Emphasize(span="60 days", strength=2.3),
        Emphasize(span="60 days", alpha=0.01, layers=(3, -1), heads=(0, 4, 8)),
        Drop(span={"sentence": "old policy"}, layers=(0, 5, 29)),
        Chain((Drop(span="30 days", kv_heads=(1,)), Suppress(span="zip", strength=3.0))),
    )
    for editor in edits:
        edited = editor(memory)
        with kv.attach(model, edited) as session:
            found = session.forward(tail)[0]
        expected = recompute(model, edited, tail[0])
        # Logits reach about 20 here, thirty layers deep.
        assert (found - expected).abs().max() <= FP32_LOGITS


def test_emphasis_moves_the_answer_and_shift_does_not(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, CHAT)
    choices = [" 60 days", " 30 days"]

    def margin(one):
        ask = [{"role": "user", "content": "What is the refund window?"}]
        with kv.attach(model, one, tokenizer) as session:
            session.feed([ask])
            grown = session.memory()
        first, second = kv.score(
            model, tokenizer, grown, "Refunds are possible for", choices, chat=False
        )
        return first.logprob - second.logprob

    base = margin(memory)
    raised = margin(Emphasize(span={"sentence": "Since the first"}, strength=1.0)(memory))
    lowered = margin(Suppress(span={"sentence": "Since the first"}, strength=1.0)(memory))
    assert lowered < base < raised
    assert margin(Shift(500)(memory)) == pytest.approx(base, abs=1e-2)


def test_three_chat_turns_equal_one_long_prompt(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, CHAT)
    before = memory.digest
    messages = list(CHAT)
    with kv.attach(model, memory, tokenizer) as session:
        for question in ("When is the shop open?", "And what does a zip cost?", "Thank you."):
            reply = session.generate(question, max_new_tokens=24)
            messages.append({"role": "user", "content": question})
            whole = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            plain = model.generate(
                whole, attention_mask=torch.ones_like(whole), max_new_tokens=24, do_sample=False
            )[0, whole.shape[1] :].tolist()
            assert list(reply.tokens) == plain
            messages.append({"role": "assistant", "content": reply.text})
    assert memory.digest == before


def test_a_second_load_finds_the_same_memory_home(smollm, tmp_path):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, DOCUMENT)
    store = kv.Store(tmp_path)
    store.put(memory, "handbook")
    other, _ = kv.load("smollm2-135m", attn="eager")
    answers = {
        one.config._attn_implementation: kv.generate(
            one, tokenizer, store.get("handbook"), " In short:", max_new_tokens=8
        )
        for one in (model, other)
    }
    assert len(answers) == 2 and len(set(answers.values())) == 1
    half, _ = kv.load("smollm2-135m", dtype="bfloat16")
    with pytest.raises(kv.errors.IncompatibleModel, match="dtype"):
        kv.generate(half, tokenizer, memory, " In short:")
    rounded = store.get("handbook", dtype=torch.bfloat16)
    kv.generate(half, tokenizer, rounded, " In short:", max_new_tokens=2)


def test_a_mass_rule_is_met_in_all_heads_and_a_gate_holds_it_back(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, DOCUMENT)
    span = SpanQuery(text="refunds are possible for 60 days").resolve(memory)
    ruled = replace(memory, rules=(write_rule(MassRule(span, 0.3, raise_only=False)),))
    prompt = _prompt(tokenizer, " Refunds are possible for")
    with kv.attach(model, ruled) as session, kv.tap(model, ["mass"], groups={"s": span}) as tap:
        session.forward(prompt)
        session.forward(prompt[:, :1])
    for layer in tap.layers:
        for mass in tap.all("mass", layer):
            assert (mass - 0.3).abs().max() <= 1e-5
    gated = replace(ruled, rules=(*ruled.rules, write_rule(GateRule(1.0))))
    choices = []
    for one in (memory, ruled, gated):
        with kv.attach(model, one, tokenizer) as session:
            choices.append(int(session.feed(" The weather on the moon is")[0].argmax()))
    assert choices[2] == choices[0]
