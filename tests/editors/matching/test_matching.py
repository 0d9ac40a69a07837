"""AttentionMatching on tiny models: what it keeps, what it fits, what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import AttentionMatching, Emphasize, Suppress, build
from kvedit.editors.matching import match, match_report, reference_queries
from kvedit.editors.matching.fitting import fit_block
from kvedit.editors.matching.keys import METHODS
from kvedit.editors.matching.layers import match_layer
from kvedit.editors.matching.logits import Block, by_group
from kvedit.editors.matching.queries import collect, read_passages, reference
from kvedit.editors.matching.study import passages
from kvedit.testing import make_test_operand

FAMILIES = ("llama", "gemma2", "gemma3", "qwen3", "gpt_neox", "cohere2", "gpt_oss", "gpt2")
BUDGET = 12


def heads_of(layer: Any, group: int, head: int) -> torch.Tensor:
    """Which packed slots a KV head has, bool [slot]."""
    if layer.bias is None:
        return torch.ones(layer.slots, dtype=torch.bool)
    return (layer.bias[head * group : (head + 1) * group] > -torch.inf).any(dim=0)


def origins(memory: Any, edited: Any, index: int, head: int) -> list[int]:
    """Which slots of the memory a KV head kept, found by their keys."""
    group = memory.model.layers[index].group
    kept = edited.layers[index].keys[head][heads_of(edited.layers[index], group, head)]
    same = (kept[:, None] == memory.layers[index].keys[head][None]).all(dim=2)
    assert bool(same.any(dim=1).all()), "a kept key is none of the head's own"
    return same.int().argmax(dim=1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_and_the_report_is_what_a_dense_reference_finds(
    family: str, subject: Any, reader: Any, attended: Any, full_layers: Any
) -> None:
    memory = subject(family).memory
    editor = AttentionMatching(BUDGET)
    edited, report = match(memory, editor, reader(family))
    changed = [i for i in memory.layers if edited.layers[i] is not memory.layers[i]]
    assert changed == full_layers(memory)
    assert edited.next_position == memory.next_position
    queries = collect(memory, editor, changed, reader=reader(family), operand=None)
    rows = {(row.layer, row.head): row for row in report.heads}
    for index in changed:
        spec, layer = memory.model.layers[index], edited.layers[index]
        assert layer.slots == BUDGET and layer.source.eq(-1).all()
        assert layer.positions.diff().ge(0).all() and layer.positions.max() < memory.next_position
        held = queries.layers[index][:, queries.held_out]
        for head in range(spec.kv_heads):
            origins(memory, edited, index, head)
            error, size, gap = 0.0, 0.0, 0.0
            for member in range(head * spec.group, (head + 1) * spec.group):
                before, mass = attended(memory.layers[index], spec, held, member)
                after, new_mass = attended(layer, spec, held, member)
                error += float(((after - before) ** 2).sum())
                size += float((before**2).sum())
                gap += float(abs(new_mass - mass).mean()) / spec.group
            row = rows[index, head]
            assert row.output_error == pytest.approx((error / size) ** 0.5, rel=1e-4)
            assert row.mass_error == pytest.approx(gap, rel=1e-4, abs=1e-6)
            assert (row.slots, row.kept) == (memory.slots, BUDGET)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_matched_attention_is_what_the_runtime_computes(
    family: str, subject: Any, reader: Any, full_layers: Any, continued: Any
) -> None:
    """Keeping all but a few slots and fitting the rest changes next tokens little."""
    found = subject(family)
    near = AttentionMatching(found.memory.slots - 2)(found.memory, reader=reader(family))
    far = AttentionMatching(4, keys="first", bias=False, values=False)(
        found.memory, reader=reader(family)
    )
    wanted = found.logits
    errors = [
        float((continued(found.model, edited, found.continuation) - wanted).abs().mean())
        for edited in (near, far)
    ]
    assert errors[0] < 0.2 * errors[1]


def test_all_slots_give_the_memory_itself(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    for budget in (1.0, memory.slots):
        edited, report = match(memory, AttentionMatching(budget), reader("llama"))
        assert all(edited.layers[i] is memory.layers[i] for i in memory.layers)
        assert report.output_error == 0 and report.mass_error == 0


def test_all_slots_but_fitted_give_the_same_attention(
    subject: Any, reader: Any, attended: Any
) -> None:
    """Folding a bias that is zero fits every slot, and leaves attention as it was."""
    memory = subject("llama").memory
    zero = {i: dataclasses.replace(layer, bias=torch.zeros(4, layer.slots)) for i, layer in
            memory.layers.items()}  # fmt: skip
    memory = memory.with_layers(zero)
    edited, report = match(memory, AttentionMatching(1.0, fold_bias=True), reader("llama"))
    assert all(layer.bias is None for layer in edited.layers.values())
    assert report.output_error < 1e-5 and report.mass_error < 1e-5


@pytest.mark.parametrize("keys", METHODS)
def test_weights_of_all_slots_are_one(keys: str, subject: Any, reader: Any) -> None:
    """The fit itself, with one slot that is dead: nothing else stands for it."""
    memory = subject("qwen3").memory
    how = AttentionMatching(1.0, keys=keys, max_queries=64)
    spec, layer = memory.model.layers[0], memory.layers[0]
    queries = collect(memory, how, [0], reader=reader("qwen3"), operand=None)
    states = by_group(queries.layers[0][:, queries.fitted], spec)
    dead = torch.zeros(spec.query_heads, layer.slots)
    dead[:, 3] = -40.0
    block = Block.of(layer.add_bias(dead), spec)
    count = layer.slots - 1
    none = torch.zeros(0, dtype=torch.int64)
    for fit in fit_block(block, states, queries.checked, [count, count], none, how, 0):
        if 3 in fit.index:  # random and first may keep it and lose another
            continue
        assert float(fit.beta.abs().max()) < 0.02
        torch.testing.assert_close(
            fit.values, layer.values[fits_head(block, fit)][fit.index].double(), rtol=0, atol=1e-3
        )


def fits_head(block: Block, fit: Any) -> int:
    errors = [float((block.values[h][fit.index] - fit.values).abs().max()) for h in range(2)]
    return errors.index(min(errors))


def test_bias_and_values_each_lower_the_error(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory

    def errors(**options: Any) -> Any:
        return match(memory, AttentionMatching(8, **options), reader("llama"))[1]

    neither = errors(bias=False, values=False)
    bias, values, both = errors(values=False), errors(bias=False), errors()
    assert bias.mass_error < 0.5 * neither.mass_error
    assert values.mass_error == neither.mass_error
    assert values.output_error < 0.8 * neither.output_error
    assert both.mass_error == bias.mass_error
    assert both.output_error < 0.8 * bias.output_error


def test_a_bias_of_the_memory_is_part_of_the_logits(subject: Any, reader: Any) -> None:
    """What it pushes up is chosen, and what is kept keeps it."""
    memory = Emphasize({"slots": [20, 24]}, strength=6.0)(subject("llama").memory)
    plain = AttentionMatching(6, bias=False, values=False)(
        subject("llama").memory, reader=reader("llama")
    )
    edited = AttentionMatching(6, bias=False, values=False)(memory, reader=reader("llama"))
    for index, layer in edited.layers.items():
        for head in range(layer.heads):
            kept = origins(memory, edited, index, head)
            assert {20, 21, 22, 23} <= set(kept)
            old = memory.layers[index].bias[2 * head : 2 * head + 2, kept]
            assert torch.equal(layer.bias[2 * head : 2 * head + 2], old)
    assert any({20, 21, 22, 23} - set(origins(memory, plain, 0, head)) for head in range(2))
    fitted, report = match(memory, AttentionMatching(20), reader("llama"))
    assert all(layer.bias is not None for layer in fitted.layers.values())
    assert report.mass_error < 0.2


@pytest.mark.parametrize("keys", METHODS)
def test_evicted_slots_are_never_chosen(keys: str, subject: Any, reader: Any) -> None:
    memory = Suppress({"slots": [2, 8]}, strength="inf", kv_heads=[1])(subject("llama").memory)
    memory = Suppress({"slots": [10, 12]}, strength="inf", heads=[0])(memory)
    slots = memory.slots
    editor = AttentionMatching(slots - 3, keys=keys, max_queries=64)
    edited, report = match(memory, editor, reader("llama"))
    rows = {(row.layer, row.head): row for row in report.heads}
    for index, layer in edited.layers.items():
        kept = origins(memory, edited, index, 1)
        assert kept == [s for s in range(slots) if not 2 <= s < 8]
        assert rows[index, 1].kept == slots - 6 and rows[index, 0].kept == slots - 3
        assert layer.bias[2:, slots - 6 :].eq(-torch.inf).all()  # the head has no more
        # Half of a group that lost a slot still lacks it.
        both = origins(memory, edited, index, 0)
        lost = [place for place, slot in enumerate(both) if slot in (10, 11)]
        assert layer.bias[0, lost].eq(-torch.inf).all()
        assert layer.bias[1, lost].isfinite().all()


def test_sinks_and_recent_slots_stay_as_they_are(subject: Any, reader: Any) -> None:
    memory = subject("gpt_neox").memory
    edited = AttentionMatching(9, sinks=2, recent=3)(memory, reader=reader("gpt_neox"))
    last = memory.slots - 3
    for index, layer in edited.layers.items():
        for head in range(layer.heads):
            kept = origins(memory, edited, index, head)
            assert kept[:2] == [0, 1] and kept[-3:] == [last, last + 1, last + 2]
            for place in (0, 1, -3, -2, -1):
                old = memory.layers[index].values[head, kept[place]]
                assert torch.equal(layer.values[head, place], old)
        assert layer.bias[:, [0, 1, -3, -2, -1]].eq(0).all()


def test_folded_it_is_plain_and_says_what_that_costs(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    edited, report = match(memory, AttentionMatching(10, fold_bias=True), reader("llama"))
    assert edited.servable()
    both, best = match(memory, AttentionMatching(10), reader("llama"))
    assert not both.servable()
    assert best.mass_error < report.mass_error
    biased = Emphasize({"slots": [20, 24]}, strength=2.0)(memory)
    assert AttentionMatching(10, fold_bias=True)(biased, reader=reader("llama")).servable()


def test_chunks_are_fitted_by_themselves(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    how = AttentionMatching(16, chunk=20, sinks=1)
    edited = how(memory, reader=reader("llama"))
    for index in memory.layers:
        for head in range(2):
            kept = origins(memory, edited, index, head)
            each = [sum(c * 20 <= s < c * 20 + 20 for s in kept) for c in range(3)]
            assert sum(each) == 16 and min(each) >= 4
    spec, layer = memory.model.layers[0], memory.layers[0]
    queries = collect(memory, how, [0], reader=reader("llama"), operand=None)
    states = by_group(queries.layers[0][:, queries.fitted], spec)
    second = Block.of(layer, spec).cut(slice(20, 40))
    none = torch.zeros(0, dtype=torch.int64)
    kept = origins(memory, edited, 0, 1)
    places = [place for place, slot in enumerate(kept) if 20 <= slot < 40]
    counts = [sum(20 <= s < 40 for s in origins(memory, edited, 0, h)) for h in range(2)]
    fit = fit_block(second, states, queries.checked, counts, none, how, 1)[1]
    assert (fit.index + 20).tolist() == [kept[place] for place in places]
    torch.testing.assert_close(
        edited.layers[0].values[1, places], fit.values.to(layer.values), rtol=1e-6, atol=1e-6
    )


def test_heads_compete_by_mass(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    even = AttentionMatching(12, score="mean")
    uniform = match(memory, even, reader("llama"))[1]
    edited, shared = match(memory, dataclasses.replace(even, allocate="mass"), reader("llama"))
    counts = [row.kept for row in shared.heads]
    assert sum(counts) == sum(row.kept for row in uniform.heads) and len(set(counts)) > 1
    assert sum(r.coverage for r in shared.heads) > sum(r.coverage for r in uniform.heads)
    for index, layer in edited.layers.items():
        rows = [row.kept for row in shared.heads if row.layer == index]
        assert layer.slots == max(rows)
        assert [int(heads_of(layer, 2, h).sum()) for h in range(2)] == rows


def test_heads_compete_by_peak(subject: Any, reader: Any) -> None:
    """Counted again: the slots with the highest peaks of all heads, above each head's floor."""
    memory, budget = subject("llama").memory, 12
    how = AttentionMatching(budget, allocate="peak")
    report = match(memory, how, reader("llama"))[1]
    queries = collect(memory, how, [0, 1, 2], reader=reader("llama"), operand=None)
    ranked, counts = [], {}
    for index, layer in memory.layers.items():
        states = queries.layers[index][:, queries.fitted]
        for head, keys in enumerate(layer.keys):
            group = states[head * 2 : head * 2 + 2].flatten(0, 1)
            weights = (group @ keys.T * memory.model.layers[index].scale).softmax(dim=1)
            peaks = weights.amax(dim=0).sort(descending=True).values.tolist()
            counts[index, head] = 3  # a fifth of 12, rounded up
            ranked += [(peak, index, head) for peak in peaks[3 : int(0.75 * layer.slots)]]
    ranked.sort(reverse=True)
    for _, index, head in ranked[: 6 * budget - 6 * 3]:
        counts[index, head] += 1
    assert {(row.layer, row.head): row.kept for row in report.heads} == counts
    assert len(set(counts.values())) > 1


def test_heads_get_what_a_schedule_gives_them(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    weights = {0: [1, 2], 1: [1, 1], 2: [3, 1]}
    report = match(memory, AttentionMatching(9, allocate=weights), reader("llama"))[1]
    assert [row.kept for row in report.heads] == [6, 12, 6, 6, 18, 6]
    with pytest.raises(kv.errors.InvalidArgument, match="layer 1 has 2 KV heads, found 0 weights"):
        AttentionMatching(9, allocate={0: [1, 2], 2: [1, 2]})(memory, reader=reader("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("biased", [False, True])
def test_one_pass_on_policy_is_a_pass_per_layer(
    family: str, biased: bool, subject: Any, reader: Any, full_layers: Any
) -> None:
    memory = subject(family).memory
    if biased:
        memory = Emphasize({"slots": [20, 24]}, strength=2.0, heads=[1, 2])(memory)
    options: dict[str, Any] = {"sinks": 1, "fold_bias": biased}
    once = AttentionMatching(12, on_policy=True, **options)(memory, reader=reader(family))
    each = AttentionMatching(12, on_policy=True, layers_per_pass=1, **options)(
        memory, reader=reader(family)
    )
    off = AttentionMatching(12, **options)(memory, reader=reader(family))
    layers = full_layers(memory)
    for index in layers:
        a, b = once.layers[index], each.layers[index]
        assert torch.equal(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-3)
    last = layers[-1]
    if len(layers) > 1:
        assert not torch.equal(once.layers[last].values, off.layers[last].values)


def test_on_policy_queries_are_those_over_what_was_matched(subject: Any, reader: Any) -> None:
    """Read over the result, the model asks what the result was fitted for."""
    memory, how = subject("llama").memory, AttentionMatching(12, on_policy=True)
    edited = how(memory, reader=reader("llama"))
    texts = passages(memory, reader("llama"), "repeat", 0)
    over = reference(memory, how, read_passages(edited, reader("llama"), texts, [0, 1, 2]))
    for index in range(3):
        again = match_layer(memory, index, over, [12, 12], how)[0]
        assert torch.equal(again.keys, edited.layers[index].keys)
        torch.testing.assert_close(again.values, edited.layers[index].values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.bias, edited.layers[index].bias, atol=1e-4, rtol=1e-4)


def test_a_pass_that_would_hold_too_many_logits_is_refused(
    subject: Any, reader: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("kvedit.editors.matching.policy._LOGITS", 1000)
    with pytest.raises(kv.errors.InvalidArgument, match="set layers_per_pass"):
        AttentionMatching(12, on_policy=True)(subject("llama").memory, reader=reader("llama"))
    AttentionMatching(12, on_policy=True, layers_per_pass=2)(
        subject("llama").memory, reader=reader("llama")
    )


@pytest.mark.parametrize(
    "queries",
    ["repeat", "context", "self_study", "self_study+repeat", "random", ["Who?", "What is it?"]],
)
def test_every_source_of_queries_gives_a_memory(queries: Any, subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    editor = AttentionMatching(10, queries=queries, answer_tokens=3)
    edited, report = match(memory, editor, reader("llama"))
    assert edited.slots == 10 and 0 < report.output_error < 1.5
    given = reference_queries(memory, editor, reader("llama"))
    assert set(given) == {0, 1, 2}
    assert {states.shape[0] for states in given.values()} == {4}


def test_calibrated_queries_are_an_operand(subject: Any) -> None:
    found = subject("qwen3")
    editor = AttentionMatching(10, queries="calibrated")
    operand = make_test_operand("queries", found.model, found.tokenizer)
    assert (editor.operands, editor.reproducibility) == (("queries",), "pure")
    edited = editor(found.memory, operand)
    assert edited.lineage.head.inputs[1] == operand.lineage.head.id
    assert match(found.memory, editor, None, operand)[0].digest == edited.digest


def test_a_match_is_the_edit(subject: Any, reader: Any) -> None:
    memory = subject("gemma3").memory
    editor = AttentionMatching(0.3, keys="omp_fast", refine=-4.0)
    edited = editor(memory, reader=reader("gemma3"))
    again, report = match(memory, editor, reader("gemma3"))
    assert again.digest == edited.digest
    assert again.lineage.head.id == edited.lineage.head.id
    node = edited.lineage.head
    assert build(node.name, **json.loads(node.parameters)) == editor
    assert json.loads(json.dumps(report.to_json()))["heads"][0]["layer"] == report.heads[0].layer
    assert "held-out queries" in repr(report)


def test_any_edit_can_be_measured(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    queries = reference_queries(memory, AttentionMatching(8), reader("llama"))
    errors = [
        match_report(memory, edited, queries).output_error
        for edited in (
            AttentionMatching(8)(memory, reader=reader("llama")),
            build("knorm", budget=8, layout="packed")(memory),
            kv.editors.Keep({"slots": [0, 8]})(memory),
        )
    ]
    assert errors[0] < min(errors[1:])
    with pytest.raises(kv.errors.InvalidArgument, match="no layer"):
        match_report(memory, memory, queries)


def test_keys_of_low_weight_are_replaced(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    plain = match(memory, AttentionMatching(20), reader("llama"))[1]
    refined = match(memory, AttentionMatching(20, refine=-6.9), reader("llama"))[1]
    assert sum(row.clamped for row in refined.heads) < sum(row.clamped for row in plain.heads)


def test_half_precision_memories_stay_half(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory.to(dtype=torch.bfloat16)
    edited = AttentionMatching(12)(memory, reader=reader("llama"))
    assert edited.dtype == torch.bfloat16
    assert all(layer.bias.dtype == torch.float32 for layer in edited.layers.values())
