"""Mass and scale rules against a few lines of float64: full logits, softmax, closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize, Suppress
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import GateRule, MassRule, ScaleRule, read_rules, write_rule
from kvedit.memory.span import Span
from kvedit.models import explicit
from kvedit.models.attention_call import AttentionCall
from kvedit.models.cache_argument import cache_argument
from kvedit.models.route import observing

TEXT = (
    "The shop sells lamps, clocks and radios. The refund window is 60 days. Shipping is free for "
    "members. Please keep the receipt."
)
SPAN = Span(((3, 7), (12, 19)))  # two ranges, the second near the end: windows see some of it
FAMILIES = ["llama", "gemma3", "qwen3", "gpt_neox", "gpt_oss", "cohere2", "gemma2"]
SITES = ("queries", "keys", "values", "output", "scores")


def ruled(memory, *rules):
    return replace(memory, rules=tuple(map(write_rule, rules)))


def reference(queries, keys, values, facts, seen, bias, sinks, rules, source, masks):
    """One row of one layer in float64.

    Args:
        queries: [query_head, query, dim]; keys, values: [head, slot, dim].
        seen: bool [query, slot].
        bias: [query_head, slot].
        sinks: [query_head] or None.
        rules: in order.
        source: [slot], -1 for new tokens.
        masks: bool [query_head] of each rule.
    """
    group = queries.shape[0] // keys.shape[0]
    wide = keys.double().repeat_interleave(group, dim=0)
    scores = queries.double() @ wide.transpose(1, 2) * facts.scale
    for rule, heads in zip(rules, masks, strict=True):
        if isinstance(rule, ScaleRule):
            scaled = heads[:, None, None] & rule.span.inside(source)
            scores = torch.where(scaled, scores * rule.factor, scores)
    if facts.softcap:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    scores = (scores + bias.double()[:, None, :]).masked_fill(~seen, -torch.inf)

    def weights(logits):
        if sinks is None:
            return logits.softmax(-1)
        column = sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)
        return torch.cat((logits, column), -1).softmax(-1)[..., :-1]

    for rule, heads in zip(rules, masks, strict=True):
        if not isinstance(rule, MassRule):
            continue
        inside = rule.span.inside(source)
        psi = weights(scores)[..., inside].sum(-1)
        if rule.form == "exact":
            add = math.log(rule.target / (1 - rule.target)) - torch.log(psi / (1 - psi))
        else:
            add = math.log(rule.target) - torch.log(psi)
        add = add.clamp_min(0) if rule.raise_only else add
        add = torch.where((psi > 0) & (psi < 1) & heads[:, None], add, 0)
        scores = scores + add[..., None] * inside
    pattern = weights(scores)
    wide = values.double().repeat_interleave(group, dim=0)
    return scores, pattern, pattern @ wide


def check(tap, session, memories, spec, tolerance=1e-5):
    """Every layer and row of the last pass against the reference."""
    cache = session.cache
    for layer, facts in enumerate(spec.layers):
        slots = cache.layers[layer]
        at = torch.cat((slots.positions, cache.positions), dim=1)
        held = torch.ones_like(slots.positions).bool() if slots.valid is None else slots.valid
        real = torch.cat((held, cache.valid), dim=1)
        source = torch.nn.functional.pad(slots.source, (0, cache.fed), value=-1)
        sinks = getattr(session.inspection.attention[layer], "sinks", None)
        sinks = None if sinks is None else sinks.detach()
        for row, memory in enumerate(memories):
            queries = tap["queries", layer].shape[2]
            mine = cache.positions[row, -queries:]
            seen = real[row] & (at[row] <= mine[:, None])
            if facts.window:
                seen &= at[row] > mine[:, None] - facts.window
            bias = torch.zeros(facts.query_heads, at.shape[1])
            if memory.layers[layer].bias is not None:
                bias[:, : memory.layers[layer].slots] = memory.layers[layer].bias
            rules = read_rules(memory.rules)
            every = torch.ones(facts.query_heads, dtype=torch.bool)
            masks = [every if r.heads is None else r.heads.mask(spec, layer) for r in rules]
            given = (tap[site, layer][row] for site in ("queries", "keys", "values"))
            scores, _, output = reference(
                *given, facts, seen, bias, sinks, rules, source[row], masks
            )
            valid = cache.valid[row, -queries:]
            found = tap["output", layer][row].transpose(0, 1)[:, valid].double()
            size = max(1.0, float(tap["values", layer][row].abs().max()))
            assert float((found - output[:, valid]).abs().max()) / size <= tolerance, (layer, row)
            shown = tap["scores", layer][row][:, valid].double()
            close = torch.isclose(shown, scores[:, valid], rtol=0, atol=2e-5 * size + 2e-5)
            assert bool((close | (shown == scores[:, valid])).all()), (layer, row)


RULES = {
    "exact": (MassRule(SPAN, 0.4),),
    "exact-both-ways": (MassRule(SPAN, 0.05, raise_only=False),),
    "spotlight": (MassRule(SPAN, 0.3, form="spotlight"),),
    "scale": (ScaleRule(SPAN, 1.7),),
    "heads": (
        MassRule(SPAN, 0.6, heads=HeadSet.of([(0, 1), (1, 0), (1, 3)])),
        ScaleRule(Span(((0, 5),)), 0.5, heads=HeadSet.of([(0, 0)], "kv")),
    ),
    "several": (
        MassRule(SPAN, 0.5, raise_only=False),
        MassRule(Span(((5, 15),)), 0.2, form="spotlight", raise_only=False),
        ScaleRule(SPAN, -0.5),
        ScaleRule(SPAN, 1.5),
    ),
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(RULES))
def test_rules_are_their_closed_forms(tiny, family, attn, name):
    model, tokenizer = tiny(family, attn)
    memory = ruled(kv.capture(model, tokenizer, TEXT), *RULES[name])
    ids = torch.randint(10, 300, (2, 5), generator=torch.Generator().manual_seed(1))
    with kv.attach(model, memory, rows=2) as session, kv.tap(model, SITES) as tap:
        for fed in (ids, ids[:, :1]):
            session.forward(fed)
            check(tap, session, [memory] * 2, memory.model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_rows_of_a_batch_have_rules_of_their_own(tiny, family):
    model, tokenizer = tiny(family)
    plain = kv.capture(model, tokenizer, TEXT)
    short = kv.capture(model, tokenizer, "The refund window is 60 days. Please keep it all.")
    biased = Emphasize(span="60 days", strength=1.5)(plain)
    memories = [
        ruled(plain, *RULES["exact"]),
        plain,
        ruled(short, *RULES["several"]),
        ruled(biased, MassRule(SPAN, 0.5, form="spotlight"), *RULES["heads"]),
    ]
    ids = torch.randint(10, 300, (4, 6), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(6) >= torch.tensor([0, 2, 3, 1])[:, None]
    with kv.attach(model, memories) as session, kv.tap(model, SITES) as tap:
        session.forward(ids, valid)
        check(tap, session, memories, plain.model)
        session.forward(ids[:, :1])
        check(tap, session, memories, plain.model)
        order = torch.tensor([3, 2, 2, 1])
        session.cache.select_rows(order)
        model(
            input_ids=ids[:, :2],
            **{cache_argument(model): session.cache},
            position_ids=session.cache.next_positions[:, None] + torch.arange(2),
        )
        check(tap, session, [memories[row] for row in order], plain.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_exact_rule_the_mass_is_the_target(tiny, family):
    model, tokenizer = tiny(family)
    plain = kv.capture(model, tokenizer, TEXT)
    heads = HeadSet.of([(layer, head) for layer in range(len(plain.layers)) for head in (0, 1)])
    memory = ruled(plain, MassRule(SPAN, 0.35, raise_only=False, heads=heads))
    masses = {}
    for name, one in (("plain", plain), ("ruled", memory)):
        with kv.attach(model, one) as session, kv.tap(model, ["mass"], groups={"s": SPAN}) as tap:
            session.forward(torch.tensor([[11, 12, 13]]))
            masses[name] = [tap["mass", layer][0, 0] for layer in tap.layers]
    moved = 0
    for layer, found in enumerate(masses["ruled"]):
        chosen = found[:2]
        at_target = (chosen - 0.35).abs() <= 1e-5
        unseen = chosen == 0  # the whole span is out of a window
        assert bool((at_target | unseen).all())
        moved += int(at_target.sum())
        if layer == 0:  # later layers differ by their input
            assert torch.allclose(found[2:], masses["plain"][0][2:], atol=1e-6)
    assert moved >= 6


def test_raise_only_leaves_a_mass_above_the_target(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    logits = {}
    for name, one in (("plain", plain), ("low", ruled(plain, MassRule(SPAN, 1e-9)))):
        with kv.attach(model, one) as session:
            logits[name] = session.forward(torch.tensor([[11, 12, 13]]))
    assert torch.allclose(logits["plain"], logits["low"], atol=1e-5)


def test_of_two_rules_for_one_span_the_last_is_met(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    part = Span(((3, 5),))
    rules = (MassRule(part, 0.7, raise_only=False), MassRule(SPAN, 0.2, raise_only=False))
    groups = {"part": part, "span": SPAN}
    with kv.attach(model, ruled(plain, *rules)) as session:
        with kv.tap(model, ["mass"], groups=groups) as tap:
            session.forward(torch.tensor([[11]]))
    mass = tap["mass", 0]
    assert torch.allclose(mass[1], torch.tensor(0.2), atol=1e-5)
    # The second rule scales the span as a whole: what the first one moved within it stays.
    rest = ruled(plain, rules[0])
    with kv.attach(model, rest) as session, kv.tap(model, ["mass"], groups=groups) as tap:
        session.forward(torch.tensor([[11]]))
    first = tap["mass", 0]
    assert torch.allclose(mass[0] / mass[1], first[0] / first[1], atol=1e-5)


def test_heads_that_see_nothing_of_the_span_or_nothing_else_are_left_alone(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    ids = torch.tensor([[11, 12, 13]])
    evicted = Suppress(span={"tokens": (3, 7)}, strength=math.inf)(plain)
    rule = MassRule(Span(((3, 7),)), 0.5)
    dropped = Drop(span={"tokens": (3, 7)})(plain)
    for one in (evicted, dropped):
        logits = []
        for memory in (one, ruled(one, rule)):
            with kv.attach(model, memory) as session:
                logits.append(session.forward(ids))
        assert bool(logits[1].isfinite().all())
        assert torch.allclose(*logits, atol=1e-5)


def test_plain_memories_run_no_explicit_attention(tiny, monkeypatch):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    absent = ruled(plain, MassRule(Span(((500, 501),)), 0.5), ScaleRule(SPAN, 1.0))

    def refuse(call):
        raise AssertionError("explicit attention ran")

    monkeypatch.setattr("kvedit.models.route.run_explicit", refuse)
    for memory in (plain, Emphasize(span="60 days", strength=2.0)(plain), absent):
        with kv.attach(model, memory) as session:
            session.forward(torch.tensor([[11, 12]]))
    with kv.attach(model, ruled(plain, *RULES["exact"])) as session:
        with pytest.raises(AssertionError, match="explicit attention ran"):
            session.forward(torch.tensor([[11, 12]]))


def test_many_queries_in_parts_are_the_same(tiny, monkeypatch):
    for family in ("llama", "gemma3", "gpt_oss"):
        model, tokenizer = tiny(family)
        memory = ruled(
            Emphasize(span="60 days", strength=1.0)(kv.capture(model, tokenizer, TEXT)),
            *RULES["exact"],
        )
        ids = torch.randint(10, 300, (2, 7), generator=torch.Generator().manual_seed(3))
        valid = torch.arange(7) >= torch.tensor([0, 2])[:, None]
        logits = []
        for limit in (1 << 26, 1500):
            monkeypatch.setattr(explicit, "_SCORES_AT_ONCE", limit)
            with kv.attach(model, memory, rows=2) as session:
                logits.append(session.forward(ids, valid)[valid])
        assert torch.allclose(*logits, atol=1e-5)


def test_generation_beams_and_grown_memories_keep_rules(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    memory = ruled(plain, *RULES["exact"], ScaleRule(SPAN, 1.5))
    prompt, more = torch.tensor([11, 12, 13]), torch.tensor([[21, 22]])
    with kv.attach(model, memory, tokenizer) as session:
        session.feed([prompt])
        grown = session.memory()
        at_once = session.forward(more)
    assert grown.rules == memory.rules
    with kv.attach(model, grown, tokenizer) as session:
        assert torch.allclose(session.forward(more), at_once, atol=1e-5)
    with kv.attach(model, memory, tokenizer) as session:
        first = session.forward(torch.cat((prompt[None], more), dim=1))
        session.cache.crop(-2)
        assert torch.allclose(session.forward(more), first[:, 3:], atol=1e-5)
    # One beam and one row are the same as greedy; more beams run rows in changing order.
    greedy = kv.generate(model, None, memory, prompt, max_new_tokens=6)
    sampled = kv.generate(
        model, None, memory, prompt, max_new_tokens=6, num_return_sequences=3, top_k=1
    )
    assert sampled == [greedy] * 3
    beams = kv.generate(model, None, memory, prompt, max_new_tokens=6, num_beams=3)
    assert _logprob(model, memory, prompt, beams) >= _logprob(model, memory, prompt, greedy) - 1e-4


def _logprob(model, memory, prompt, tokens):
    return kv.score(model, None, memory, prompt, [torch.tensor(tokens)])[0].logprob


def test_half_precision_meets_the_target(tiny):
    model, tokenizer = tiny("llama", None, torch.bfloat16)
    memory = ruled(kv.capture(model, tokenizer, TEXT), MassRule(SPAN, 0.35, raise_only=False))
    with kv.attach(model, memory) as session:
        with kv.tap(model, ["mass"], groups={"s": SPAN}) as tap:
            session.forward(torch.tensor([[11, 12, 13]]))
    for layer in tap.layers:
        assert torch.allclose(tap["mass", layer], torch.tensor(0.35), atol=1e-5)


def test_rules_that_do_not_fit_the_model_are_refused(tiny):
    model, tokenizer = tiny("llama")
    plain = kv.capture(model, tokenizer, TEXT)
    wrong = [
        (ruled(plain, MassRule(SPAN, 0.5, heads=HeadSet.of([(0, 99)]))), "head 99"),
        (ruled(plain, ScaleRule(SPAN, 2.0, heads=HeadSet.of([(77, 0)]))), "77"),
        (ruled(plain, GateRule(0.5, layers=(55,))), "layer 55"),
        (ruled(plain, GateRule(0.5), GateRule(0.4)), "one gate"),
        (ruled(plain, MassRule(SPAN, 0.5), GateRule(0.5, layers=(0,))), "leave out layers"),
    ]
    for memory, message in wrong:
        with pytest.raises(InvalidArgument, match=message), kv.attach(model, memory):
            pass
    with pytest.raises(UnsupportedModel, match="mass, scale, gate"):
        with kv.attach(model, replace(plain, rules=({"rule": "rise", "version": 1},))):
            pass


def test_a_flash_backend_takes_rules_masks_and_bias(tiny):
    model, tokenizer = tiny("gemma3")
    plain = kv.capture(model, tokenizer, TEXT)
    memory = ruled(Emphasize(span="60 days", strength=1.5)(plain), *RULES["exact"])
    found = {}

    class Other:
        """Runs each call as it is, and again as if the model used FlashAttention."""

        def around(self, call, run):
            other = run(replace(call, backend="fa2"))[0]
            output = run(call)
            found[call.layer] = (output[0], other)
            return output

    with kv.attach(model, memory) as session, observing(Other()):
        session.forward(torch.randint(10, 300, (1, 5)))
    assert len(found) == 4
    assert all(torch.equal(*pair) for pair in found.values())


class _Nothing:
    """An adjustment that adjusts nothing."""

    def products(self, scores):
        return scores

    def logits(self, scores, sinks):
        return scores


@pytest.mark.parametrize("limit", [1 << 26, 1, 200])
def test_explicit_attention_is_attention(monkeypatch, limit):
    monkeypatch.setattr(explicit, "_SCORES_AT_ONCE", limit)
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator)
    call = AttentionCall(
        torch.nn.Identity(), "sdpa", query, key, value, None, True, 0.3, {}, None, _Nothing()
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(explicit.run_explicit(call)[0].transpose(1, 2), expected, atol=1e-6)
