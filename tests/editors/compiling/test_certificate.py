"""The certificate against numpy, against what a session's attention does, and after storage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.editors.compiling import Compile, certify
from kvedit.editors.compiling.certificate import Certificate
from kvedit.editors.compiling.measuring import attention_logits, certified_distances, seen
from kvedit.editors.compiling.queries import QuerySample
from kvedit.editors.compiling.softmax import Sets
from kvedit.store.codecs import approximate

LOOSE = {"mean_tolerance": 1e6, "spread_tolerance": 1e6}
SLOTS = slice(-9, -2)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox"])
def test_figures_are_those_of_softmax_written_out(compiling, biased, family):
    subject = compiling(family)
    memory = biased(subject.memory, {(1, 0): 2.0, (1, 1): 2.0, (1, 2): 0.5}, SLOTS)
    certificate = certify(memory, subject.queries, Compile(horizon=300))
    edited = Compile(horizon=300, **LOOSE)(memory, subject.queries)
    spec, layer = memory.model.layers[1], memory.layers[1]
    sample, group = QuerySample(subject.queries).layer(1), spec.group
    chosen = np.zeros(layer.slots, dtype=bool)
    chosen[SLOTS] = True
    asked = {0, 1, 2} | {2 + extra for extra in range(spec.group)}  # whole groups
    assert {f.head for f in certificate.heads} == asked
    for figures in certificate.heads:
        strong = layer.bias[figures.kv_head * group : (figures.kv_head + 1) * group, SLOTS].max()
        own = float(layer.bias[figures.head, SLOTS][0])
        units, masses = [], []
        for row in figures.distances:
            at = memory.next_position + row.distance
            held = sample.held_out[figures.kv_head, figures.head % group]
            queries = sample.placed(held, torch.full((len(held),), at)).numpy()
            visible = seen(layer.positions, spec, at).numpy()
            logits = []
            for keys in (layer.keys, edited.layers[1].keys):
                raw = queries @ keys[figures.kv_head].double().numpy().T
                raw = spec.softcap * np.tanh(raw / spec.softcap) if spec.softcap else raw
                logits.append(np.where(visible, raw, -np.inf))
            before, after = (softmax(x)[:, chosen].sum(-1) for x in logits)
            exact = softmax(logits[0] + own * chosen)[:, chosen].sum(-1)
            inside = chosen & visible
            gained = np.log(np.exp(logits[1][:, inside]).sum(-1))
            gained = gained - np.log(np.exp(logits[0][:, inside]).sum(-1))
            units.append(gained / float(strong))
            masses.append((before.mean(), exact.mean(), after.mean()))
            np.testing.assert_allclose(row.mean, units[-1].mean(), atol=1e-5)
            np.testing.assert_allclose(row.spread, units[-1].std(), atol=1e-5)
            found = (row.mass_before, row.mass_exact, row.mass_compiled)
            np.testing.assert_allclose(found, masses[-1], atol=1e-5)
        total, pooled = figures.total, np.concatenate(units)
        assert figures.wanted == pytest.approx(own / float(strong))
        np.testing.assert_allclose(total.mean, pooled.mean(), atol=1e-5)
        np.testing.assert_allclose(total.spread, pooled.std(), atol=1e-5)
        np.testing.assert_allclose(total.worst, np.abs(pooled - figures.wanted).max(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "cohere2"])
def test_the_measured_mass_is_that_of_the_session(compiling, biased, family):
    """Layer 0's queries don't depend on the memory: what is predicted there is what happens."""
    subject = compiling(family)
    memory = biased(subject.memory, {(0, h): 1.7 for h in range(4)}, SLOTS)
    edited = Compile(**LOOSE)(memory, subject.queries)
    ids = subject.tokenizer(" and who", add_special_tokens=False, return_tensors="pt").input_ids
    held = torch.zeros(memory.slots, dtype=torch.bool)
    held[SLOTS] = True
    groups = {"span": held, "memory": torch.ones_like(held)}
    spec = memory.model.layers[0]
    for kept in (subject.memory, edited):
        with kv.attach(subject.model, kept) as session:
            with kv.tap(subject.model, ["queries", "mass"], groups=groups) as tap:
                session.forward(ids)
        queries = tap["queries", 0][0].double() * spec.scale
        layer = kept.layers[0]
        for number in range(ids.shape[1]):
            visible = seen(layer.positions, spec, memory.next_position + number)
            for head in range(spec.query_heads):
                keys = layer.keys[head // spec.group]
                logits = attention_logits(queries[head, number : number + 1], keys, spec, visible)
                predicted = logits.softmax(-1)[0, held].sum()
                mass = tap["mass", 0][:, 0, head, number].double()
                torch.testing.assert_close(mass[0] / mass[1], predicted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "int8", "int4"])
def test_storage_is_counted(compiling, biased, storage):
    subject = compiling("llama")
    memory = biased(subject.memory, {(1, 0): 1.0, (1, 1): 1.0}, SLOTS)
    plain = certify(memory, subject.queries)
    rounded = certify(memory, subject.queries, Compile(storage=storage))
    assert rounded.storage == storage
    assert plain.storage == "float32"
    # What a store would hold of the compiled memory, measured as any keys are.
    edited = Compile(**LOOSE)(memory, subject.queries)
    if storage.endswith("16"):
        keys = edited.layers[1].keys.to(getattr(torch, storage))
    else:
        keys = approximate(edited, storage)[0].layers[1].keys
    sample, spec = QuerySample(subject.queries).layer(1), memory.model.layers[1]
    at, chosen = memory.next_position, memory.layers[1].bias[0].ne(0)
    placed = sample.placed(sample.held_out[0, 0], torch.full((sample.held_out.shape[2],), at))
    every = torch.ones_like(chosen)
    gained = [
        attention_logits(placed, k[0], spec, every)[:, chosen].logsumexp(-1)
        for k in (keys, memory.layers[1].keys)
    ]
    row = rounded.heads[0].distances[0]
    assert row.distance == 0
    assert row.mean == pytest.approx(float((gained[0] - gained[1]).mean()), abs=1e-5)
    assert row.mean != plain.heads[0].distances[0].mean


def test_sets_with_several_strengths_give_one_slope(compiling, biased):
    subject = compiling("llama")
    memory = biased(subject.memory, {(1, 0): 2.0, (1, 1): 2.0}, slice(3, 8))
    memory = biased(memory, {(1, 0): -1.0, (1, 1): -1.0}, slice(12, 20))
    figures = certify(memory, subject.queries, Compile(horizon=1)).heads[0]
    edited = Compile(horizon=1, **LOOSE)(memory, subject.queries)
    sample, spec = QuerySample(subject.queries).layer(1), memory.model.layers[1]
    held = sample.held_out[0, 0]
    placed = sample.placed(held, torch.full((len(held),), memory.next_position))
    every = torch.ones(memory.layers[1].slots, dtype=torch.bool)
    gained = []
    for slots in (slice(3, 8), slice(12, 20)):
        pair = [
            attention_logits(placed, m.layers[1].keys[0], spec, every)[:, slots].logsumexp(-1)
            for m in (edited, memory)
        ]
        gained.append(pair[0] - pair[1])
    slope = (2.0 * gained[0] - 1.0 * gained[1]) / (2.0**2 + 1.0**2)
    assert figures.wanted == pytest.approx(1.0)
    assert figures.strength == 2.0
    assert figures.total.mean == pytest.approx(float(slope.mean()), abs=1e-5)
    assert figures.total.spread == pytest.approx(float(slope.std(correction=0)), abs=1e-5)


def test_sets_sum_their_members(compiling):
    logits = torch.randn(3, 5, 6, dtype=torch.float64)
    logits[..., 4] = -torch.inf
    bias = torch.tensor([[0.0, 1.0, 1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 0.0, 0.0, 2.0, 2.0]])
    sets = Sets.of(bias.double())
    assert sets.bias.shape == (2, 4)
    found = sets.log_mass(logits)
    for number in range(4):
        wanted = logits[..., sets.members == number].logsumexp(-1)
        torch.testing.assert_close(found[..., number], wanted)
    alone = Sets.each(bias.double()).log_mass(logits)
    assert alone.shape[-1] == 5
    assert bool(alone[..., 3].isneginf().all())


def test_distances_go_from_the_end_to_the_horizon():
    assert certified_distances(1) == [0]
    assert certified_distances(8) == [0, 7]
    assert certified_distances(1024) == [0, 256, 1000]
    assert certified_distances(5000) == [0, 256, 1000, 2000, 4000]
    assert certified_distances(7000) == [0, 256, 1000, 2000, 4000, 6999]


def test_a_certificate_is_plain_data_and_a_table(compiling, biased):
    subject = compiling("llama")
    memory = biased(subject.memory, {(0, 0): 1.0, (2, 3): 1.0}, SLOTS)
    certificate = certify(memory, subject.queries)
    data = json.loads(json.dumps(certificate.to_json()))
    assert len(data["heads"]) == 4
    assert data["failed"] == [list(pair) for pair in certificate.failed]
    assert data["heads"][0]["distances"][0]["distance"] == 0
    text = str(certificate)
    assert "layer 2 query head 3 (KV head 1)" in text
    assert all(f"\n{distance:>8}" in text for distance in (0, 256, 1000, "all"))
    group = [figures for figures in certificate.heads if figures.layer == 0]
    units = torch.tensor([[f.total.mean - f.wanted, f.total.spread] for f in group]).double()
    miss = float(units[:, 0].mean().abs())
    spread = float((units[:, 1].square().mean() + units[:, 0].var(correction=0)).sqrt())
    alone = Certificate(tuple(group), "balanced", "float32", 1.0, 1.0)
    assert alone.share(miss * 1.001, spread * 1.001, by="kv") == (1.0, 1.0)
    assert alone.share(miss * 0.999, spread * 0.999, by="kv") == (0.0, 0.0)
    wide = Certificate(certificate.heads, "balanced", "float32", 1e6, 1e6)
    assert wide.ok
    assert wide.share(1e6, 1e6) == (1.0, 1.0)
    assert wide.share(-1.0, -1.0) == (0.0, 0.0)
