"""The plausibility gate: what is kept, what is taken back, and that nothing else moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize, Suppress
from kvedit.errors import InvalidArgument
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import GateRule, MassRule, ScaleRule, write_rule
from kvedit.memory.span import Span
from kvedit.models.cache_argument import cache_argument
from kvedit.models.inspection import inspect
from kvedit.runtime.ranking import rank_layers

TEXT = (
    "The shop sells lamps, clocks and radios. The refund window is 60 days. Shipping is free for "
    "members. Please keep the receipt."
)
SPAN = Span(((3, 7), (12, 19)))
STRONG = MassRule(SPAN, 0.97)
NEVER = 1e-300  # no logit is that far below the maximum: everything is plausible


def ruled(memory, *rules):
    return replace(memory, rules=tuple(map(write_rule, rules)))


def prompts(count, length=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 300, (count, 1, length), generator=generator)


def step(model, memory, ids):
    """Logits at the last position, and the new tokens' keys and values by layer."""
    with kv.attach(model, memory) as session:
        logits = session.forward(ids)[0, -1]
        states = [x.clone() for slots in session.cache.layers for x in slots.recent(ids.shape[1])]
    return logits, states


def same(a, b):
    return torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1]))


def margin(raw, steered):
    """Log of the share of the unsteered maximum that the steered choice has, unsteered."""
    return float(raw[steered.argmax()] - raw.max())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beta_one_never_changes_the_most_likely_token(tiny, family):
    model, tokenizer = tiny(family)
    plain = kv.capture(model, tokenizer, TEXT)
    kept = fell = 0
    for ids in prompts(16):
        raw = step(model, plain, ids)
        steered = step(model, ruled(plain, STRONG), ids)
        gated = step(model, ruled(plain, STRONG, GateRule(1.0)), ids)
        assert int(gated[0].argmax()) == int(raw[0].argmax())
        kept += same(gated, steered)
        if torch.equal(gated[0], raw[0]):
            assert same(gated, raw)  # keys and values too
            fell += 1
    # The prompts show both; gemma3 finds half of the layers plausible wherever it refuses all.
    assert kept and kept < 16
    assert fell or family == "gemma3"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 7}], ids=["greedy", "sample"])
def test_where_everything_is_plausible_the_gate_is_not_there(tiny, family, options):
    model, tokenizer = tiny(family)
    memory = Emphasize(span="60 days", strength=3.0)(kv.capture(model, tokenizer, TEXT))
    free = ruled(memory, STRONG, ScaleRule(SPAN, 1.4))
    gated = ruled(memory, STRONG, ScaleRule(SPAN, 1.4), GateRule(NEVER))
    lists = []
    for one in (free, gated):
        with kv.attach(model, one, tokenizer) as session:
            reply = session.generate([torch.tensor([11, 12])], max_new_tokens=8, **options)
            session.flush()
            states = [x.clone() for slots in session.cache.layers for x in slots.states()]
        lists.append((reply.tokens, states))
    assert lists[0][0] == lists[1][0]
    assert all(map(torch.equal, lists[0][1], lists[1][1]))


def test_half_of_the_layers_stay_where_all_are_too_many(tiny):
    model, tokenizer = tiny("smollm3")
    plain = kv.capture(model, tokenizer, TEXT)
    spec = plain.model
    order = (2, 0, 3, 1)
    half = HeadSet.all(spec, order[:2])
    found = 0
    for ids in prompts(24):
        raw = step(model, plain, ids)
        full = step(model, ruled(plain, STRONG), ids)
        less = step(model, ruled(plain, replace(STRONG, heads=half)), ids)
        low, high = margin(raw[0], full[0]), margin(raw[0], less[0])
        if not low < high:
            continue
        found += 1
        beta = math.exp((low + high) / 2)
        assert same(step(model, ruled(plain, STRONG, GateRule(beta, order)), ids), less)
        # Right below and right above, all layers and the half are taken and refused.
        loose = GateRule(math.exp(low - 1e-3), order)
        assert same(step(model, ruled(plain, STRONG, loose), ids), full)
        if high < 0:
            strict = GateRule(math.exp(min(0.0, high + 1e-3)), order)
            assert not same(step(model, ruled(plain, STRONG, strict), ids), less)
    assert found >= 3


@pytest.mark.parametrize(
    "editor",
    [Emphasize(span="60 days", strength=6.0), Suppress(span="60 days", strength=math.inf)],
    ids=["bias", "evict"],
)
def test_static_bias_is_taken_back_as_rules_are(tiny, editor):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    biased = editor(plain)
    fell = 0
    for ids in prompts(24):
        raw, steered = step(model, plain, ids), step(model, biased, ids)
        gated = step(model, ruled(biased, GateRule(1.0)), ids)
        assert int(gated[0].argmax()) == int(raw[0].argmax())
        if margin(raw[0], steered[0]) == 0:
            assert same(gated, steered)
        fell += same(gated, raw)
    assert fell


def test_a_gate_without_steering_changes_nothing(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert same(
            step(model, plain, prompts(1)[0]),
            step(model, ruled(plain, GateRule(0.5)), prompts(1)[0]),
        )
    finally:
        handle.remove()
    assert len(passes) == 2


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_rows_are_judged_and_kept_each_by_itself(tiny, family):
    model, tokenizer = tiny(family)
    plain = kv.capture(model, tokenizer, TEXT)
    memories = [
        ruled(plain, STRONG, GateRule(1.0)),
        plain,
        ruled(plain, STRONG),
        ruled(plain, STRONG, GateRule(NEVER)),
        ruled(Emphasize(span="60 days", strength=4.0)(plain), STRONG, GateRule(0.5)),
    ]
    ids = prompts(5, length=6)[:, 0]
    valid = torch.arange(6) >= torch.tensor([0, 2, 0, 3, 1])[:, None]
    more = prompts(5, length=1, seed=6)[:, 0]
    with kv.attach(model, memories) as session:
        first, second = session.forward(ids, valid), session.forward(more)
        states = [session.memory(row) for row in range(5)]
    for row, memory in enumerate(memories):
        with kv.attach(model, memory) as session:
            alone = session.forward(ids[row][valid[row]][None])
            assert torch.allclose(first[row, -1], alone[0, -1], atol=2e-5), row
            assert torch.allclose(second[row], session.forward(more[row][None])[0], atol=2e-5), row
            for layer, kept in session.memory().layers.items():
                assert torch.allclose(states[row].layers[layer].keys, kept.keys, atol=2e-5)
                assert torch.allclose(states[row].layers[layer].values, kept.values, atol=2e-5)


def test_the_last_real_position_judges_under_right_padding(tiny):
    model, tokenizer = tiny("llama")
    memory = ruled(kv.capture(model, tokenizer, TEXT), STRONG, GateRule(1.0))
    for ids in prompts(8):
        padded = torch.cat((ids, torch.zeros(1, 2, dtype=torch.int64)), dim=1)
        with kv.attach(model, memory) as session:
            found = session.forward(padded, torch.arange(6)[None] < 4)[0, 3]
        assert torch.allclose(found, step(model, memory, ids)[0], atol=1e-5)


@pytest.mark.parametrize("dies_in", [1, 2, 3])
def test_an_exception_in_any_pass_leaves_the_session_as_it_was(tiny, dies_in):
    model, tokenizer = tiny("llama")
    memory = ruled(kv.capture(model, tokenizer, TEXT), STRONG, GateRule(1.0))
    ids = next(ids for ids in prompts(24) if _falls_back(model, memory, ids))
    block = inspect(model).attention[1]
    passes = 0

    def die(*_):
        nonlocal passes
        passes += 1
        if passes == dies_in:
            raise RuntimeError("power cut")

    with kv.attach(model, memory) as session:
        handle = block.register_forward_pre_hook(die)
        try:
            with pytest.raises(RuntimeError, match="power cut"):
                session.forward(ids)
        finally:
            handle.remove()
        session.cache.recover()
        assert (session.cache.fed, session.cache.steered.trying) == (0, False)
        assert all(slots.fed == 0 for slots in session.cache.layers)
        assert int(session.cache.next_positions) == memory.next_position
        assert torch.equal(session.forward(ids)[0, -1], step(model, memory, ids)[0])


def _falls_back(model, memory, ids):
    return same(step(model, memory, ids), step(model, replace(memory, rules=()), ids))


def test_a_tap_last_sees_what_stands(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    memory = ruled(plain, STRONG, GateRule(1.0))
    ids = next(ids for ids in prompts(24) if _falls_back(model, memory, ids))
    shown = []
    for one in (plain, memory):
        with kv.attach(model, one) as session, kv.tap(model, ["mass"], groups={"s": SPAN}) as tap:
            session.forward(ids)
        shown.append(tap["mass", 1])
    assert torch.equal(*shown)


def test_several_samples_and_beams_run_behind_a_gate(tiny):
    model, tokenizer = tiny("llama")
    memory = ruled(kv.capture(model, tokenizer, TEXT), STRONG, GateRule(0.8))
    prompt = torch.tensor([11, 12, 13])
    greedy = kv.generate(model, None, memory, prompt, max_new_tokens=6)
    several = kv.generate(
        model, None, memory, prompt, max_new_tokens=6, num_return_sequences=3, top_k=1
    )
    assert several == [greedy] * 3
    beams = kv.generate(model, None, memory, prompt, max_new_tokens=6, num_beams=3)
    assert 1 <= len(beams) <= 6


def test_a_model_called_without_named_outputs_is_refused_and_nothing_stays(tiny):
    model, tokenizer = tiny("llama")
    memory = ruled(kv.capture(model, tokenizer, TEXT), STRONG, GateRule(0.5))
    with kv.attach(model, memory) as session:
        with pytest.raises(InvalidArgument, match="return_dict"):
            model(
                torch.tensor([[11]]),
                **{cache_argument(model): session.cache},
                position_ids=torch.tensor([[memory.next_position]]),
                return_dict=False,
            )
        assert session.cache.fed == 0


def test_layers_are_ranked_by_what_they_do_to_others(tiny):
    model, tokenizer = tiny("gemma3")
    plain = kv.capture(model, tokenizer, TEXT)
    ids = torch.tensor([11, 12])
    ranked = rank_layers(model, plain, SPAN, ids, factor=3.0)
    assert sorted(ranked) == [0, 1, 2, 3]
    by_hand = {}
    for layer in range(4):
        rule = ScaleRule(SPAN, 3.0, HeadSet.all(plain.model, [layer]))
        moved = [_streams(model, one, ids) for one in (plain, ruled(plain, rule))]
        parts = [
            1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
            for index in range(4)
            if index != layer
            for a, b in zip(moved[0][index], moved[1][index], strict=True)
        ]
        by_hand[layer] = float(sum(parts)) / 3
    for layer, value in by_hand.items():
        assert ranked[layer] == pytest.approx(value, abs=1e-9)
    # What comes after all others can't disturb them.
    assert list(ranked)[-1] == 3
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True)
    assert ranked[3] == pytest.approx(0, abs=1e-12)
    gate = GateRule(0.5, layers=tuple(ranked))
    assert step(model, ruled(plain, STRONG, gate), ids[None])[0].isfinite().all()


def _streams(model, memory, ids):
    """Input and output of each attention module of one pass."""
    found, handles = {}, []
    for layer, module in enumerate(inspect(model).attention.values()):
        handles.append(
            module.register_forward_hook(
                lambda m, a, k, out, at=layer: found.update({at: (k["hidden_states"], out[0])}),
                with_kwargs=True,
            )
        )
    with kv.attach(model, memory) as session:
        session.forward(ids[None])
    for handle in handles:
        handle.remove()
    return found
