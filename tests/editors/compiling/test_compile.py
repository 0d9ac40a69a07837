"""Compile: what it writes, what it leaves alone, what it refuses; and how edits add up."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import kvedit as kv
from kvedit.editors import build
from kvedit.editors.compiling import Compile, certify
from kvedit.editors.compiling.directions import gather
from kvedit.editors.compiling.queries import QuerySample, reach
from kvedit.errors import IncompatibleModel, InvalidArgument, NotCertified
from kvedit.memory.operand import make_operand, operand_facts

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox", "cohere2", "gpt2", "gemma2", "gpt_oss")
LOOSE = {"mean_tolerance": 1e6, "spread_tolerance": 1e6}
HEADS = {(0, 1): 1.5, (0, 2): -0.5, (1, 0): 2.0, (1, 1): 2.0, (2, 3): 0.7}
SLOTS = slice(-9, -2)


def aligned(subject, noise: float, kv_head: int | None = None, seed: int = 0):
    """Queries that are one vector and a little noise: a key delta acts on them as bias does.

    Without RoPE, or the vector would turn. ``kv_head`` gets plain noise instead.
    """
    generator = torch.Generator().manual_seed(seed)
    facts = operand_facts(subject.queries, "queries")
    facts = {name: facts[name] for name in ("fit", "held_out", "texts", "positions")}
    vectors = {}
    for index, layer in subject.queries.layers.items():
        common = torch.randn(layer.keys.shape[0], 1, layer.keys.shape[2], generator=generator)
        bent = common + noise * torch.randn(layer.keys.shape, generator=generator)
        if kv_head is not None:
            bent[kv_head] = torch.randn(bent[kv_head].shape, generator=generator)
        vectors[index] = bent
    model = subject.memory.model
    return make_operand("queries", vectors, model, subject.queries.lineage, **facts)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_move_by_the_bias_times_the_directions(compiling, biased, family):
    subject = compiling(family)
    memory = biased(subject.memory, HEADS, SLOTS)
    editor = Compile(**LOOSE)
    edited = editor(memory, subject.queries)
    for index, layer in edited.layers.items():
        before, spec = memory.layers[index], memory.model.layers[index]
        if before.bias is None:
            assert layer is before
            continue
        sample = QuerySample(subject.queries).layer(index)
        length = reach(memory, index, editor.horizon)
        found = gather(sample, memory.next_position, length, editor.ridge, editor.balance)
        directions = found.directions()
        for head in range(spec.kv_heads):
            rows = before.bias[head * spec.group : (head + 1) * spec.group].double()
            wanted = before.keys[head].double() + rows.mT @ directions[head]
            torch.testing.assert_close(layer.keys[head].double(), wanted, atol=1e-5, rtol=1e-6)
        untouched = before.bias.eq(0).all(dim=0)
        assert torch.equal(layer.keys[:, untouched], before.keys[:, untouched])


def test_a_compiled_memory_is_plain_keys_and_values_of_the_same_shapes(compiling, biased):
    subject = compiling("llama")
    memory = biased(subject.memory, HEADS, SLOTS)
    assert not memory.servable()
    edited = Compile(**LOOSE)(memory, subject.queries)
    assert edited.servable()
    assert edited.rules == subject.memory.rules
    for layer, plain in zip(edited.layers.values(), subject.memory.layers.values(), strict=True):
        assert layer.bias is None
        assert (layer.keys.shape, layer.keys.dtype) == (plain.keys.shape, plain.keys.dtype)
        assert layer.values is plain.values
        assert layer.positions is plain.positions
    assert edited.nbytes == subject.memory.nbytes
    ids = torch.tensor([[5, 9, 11]])
    with kv.attach(subject.model, edited) as session:
        assert all(layer.bias is None for layer in session.cache.layers)
        served = session.forward(ids)
    with kv.attach(subject.model, subject.memory) as session:
        assert not torch.allclose(served, session.forward(ids), atol=1e-3)


@pytest.mark.parametrize("fit", ["ridge", "distance", "balanced"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_linear_fits_add_up_and_invert(compiling, biased, fit, family):
    subject = compiling(family)
    editor = Compile(fit=fit, **LOOSE)
    first, second = {(0, 0): 1.0, (2, 1): -0.4}, {(0, 0): 0.6, (0, 3): 1.1}
    one = editor(biased(subject.memory, first, SLOTS), subject.queries)
    both = editor(biased(one, second, slice(3, 8)), subject.queries)
    summed = biased(biased(subject.memory, first, SLOTS), second, slice(3, 8))
    at_once = editor(summed, subject.queries)
    taken = editor(biased(one, {k: -v for k, v in first.items()}, SLOTS), subject.queries)
    for index, layer in subject.memory.layers.items():
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(both.layers[index].keys, at_once.layers[index].keys, **close)
        torch.testing.assert_close(taken.layers[index].keys, layer.keys, **close)
    assert not torch.equal(one.layers[0].keys, subject.memory.layers[0].keys)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_bias_on_the_rest_of_the_memory_leaves_the_span_alone(compiling, family):
    subject = compiling(family)
    emphasis = kv.editors.Emphasize("That is", strength=2.0, reference="rest_of_memory")
    memory = emphasis(subject.memory)
    edited = Compile(**LOOSE)(memory, subject.queries)
    span = memory.find("That is")
    for index, layer in edited.layers.items():
        inside = span.mask(layer)
        assert torch.equal(layer.keys[:, inside], subject.memory.layers[index].keys[:, inside])
        moved = (layer.keys - subject.memory.layers[index].keys)[:, ~inside]
        # One and the same delta on all of the rest: the bias is one number there.
        assert float((moved - moved[:, :1]).abs().max()) < 1e-5
        assert float(moved.abs().max()) > 1e-3


@pytest.mark.parametrize("fit", ["ridge", "distance", "balanced", "strength", "slot"])
def test_queries_that_share_one_vector_compile_exactly(compiling, biased, fit):
    subject = compiling("gpt2")
    queries = aligned(subject, noise=1e-4)
    # All query heads alike: a group of one vector each can only take one bias.
    heads = {(i, h): 2.3 for i in (0, 2) for h in range(4)}
    memory = biased(subject.memory, heads, SLOTS)
    editor = Compile(fit=fit, ridge=1e-9, on_fail="refuse", mean_tolerance=1e-3)
    certificate = certify(memory, queries, editor)
    assert certificate.ok
    assert len(certificate.heads) == 8
    for figures in certificate.heads:
        assert abs(figures.total.mean - 1) < 1e-3
        assert figures.total.spread < 1e-2
        assert abs(figures.total.mass_compiled - figures.total.mass_exact) < 1e-3
        assert figures.total.mass_exact > figures.total.mass_before + 0.05
        assert figures.total.divergence < 1e-3
    assert editor(memory, queries).servable()


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_fail_and_are_reported(compiling, biased, family):
    subject = compiling(family)
    memory = biased(subject.memory, {(i, h): 2.0 for i in (0, 1, 2) for h in range(4)}, SLOTS)
    certificate = certify(memory, subject.queries)
    assert not certificate.ok
    assert "KV heads fail" in str(certificate)
    with pytest.raises(NotCertified, match=r"(?s)fail the certificate.*layer \d query head"):
        Compile(on_fail="refuse")(memory, subject.queries)
    kept = Compile(on_fail="keep")(memory, subject.queries)
    failed = set(certificate.failed)
    for index, layer in kept.layers.items():
        before, group = memory.layers[index], memory.model.layers[index].group
        for head in range(layer.heads):
            stays = (index, head) in failed
            assert torch.equal(layer.keys[head], before.keys[head]) == stays or not stays
            if stays:
                rows = slice(head * group, (head + 1) * group)
                assert torch.equal(layer.bias[rows], before.bias[rows])


def test_only_the_heads_that_fail_keep_their_bias(compiling, biased):
    subject = compiling("gpt2")
    queries = aligned(subject, noise=1e-3, kv_head=1)
    memory = biased(subject.memory, {(1, h): 1.2 for h in range(4)}, SLOTS)
    certificate = certify(memory, queries)
    assert certificate.failed == ((1, 1),)
    edited = Compile()(memory, queries)
    layer, before = edited.layers[1], memory.layers[1]
    assert layer.bias[1].equal(before.bias[1])
    assert not layer.bias[[0, 2, 3]].any()
    assert layer.keys[1].equal(before.keys[1])
    assert all(not layer.keys[head].equal(before.keys[head]) for head in (0, 2, 3))


def test_a_memory_without_bias_stays_as_it_is(compiling):
    subject = compiling("llama")
    edited = Compile()(subject.memory, subject.queries)
    assert all(edited.layers[i] is layer for i, layer in subject.memory.layers.items())
    assert "no later query" in str(certify(subject.memory, subject.queries))


def test_bias_that_no_later_query_sees_is_compiled_without_complaint(compiling, biased):
    subject = compiling("mistral")  # all layers slide over 8 positions
    memory = biased(subject.memory, {(0, 0): 3.0}, slice(0, 4))
    certificate = certify(memory, subject.queries)
    assert certificate.heads == ()
    assert certificate.ok
    assert Compile(on_fail="refuse")(memory, subject.queries).servable()


def test_half_precision_keeps_its_dtype(compiling, biased):
    subject = compiling("llama")
    memory = biased(subject.memory.to(dtype=torch.bfloat16), HEADS, SLOTS)
    edited = Compile(**LOOSE)(memory, subject.queries)
    assert {layer.keys.dtype for layer in edited.layers.values()} == {torch.bfloat16}


def test_eviction_is_refused_by_name(compiling):
    subject = compiling("llama")
    evicted = kv.editors.Suppress("That is", strength=float("inf"))(subject.memory)
    with pytest.raises(InvalidArgument, match=r"layer 0 has slots that are evicted.*Drop"):
        Compile()(evicted, subject.queries)


def test_operands_that_do_not_fit_are_refused(compiling, biased):
    subject = compiling("llama")
    memory = biased(subject.memory, HEADS, SLOTS)
    with pytest.raises(InvalidArgument, match="'queries'"):
        Compile()(memory)
    with pytest.raises(InvalidArgument, match="'queries'"):
        certify(memory, memory)
    with pytest.raises(IncompatibleModel, match="another model"):
        Compile()(memory, compiling("qwen3").queries)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fit": "best"},
        {"on_fail": "shrug"},
        {"storage": "int3"},
        {"horizon": 0},
        {"horizon": 2.5},
        {"ridge": -1.0},
        {"mean_tolerance": float("nan")},
        {"balance": "much"},
    ],
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Compile(**wrong)


def test_lineage_names_the_calibration_and_replays(compiling, biased):
    subject = compiling("llama")
    memory = biased(subject.memory, HEADS, SLOTS)
    edited = Compile(horizon=77, **LOOSE)(memory, subject.queries)
    node = edited.lineage.head
    assert node.name == "compile"
    assert node.inputs == (memory.lineage.head.id, subject.queries.lineage.head.id)
    assert node.reproducibility == "pure"
    options = {f.name: getattr(Compile(horizon=77, **LOOSE), f.name) for f in FIELDS}
    assert build("compile", **options)(memory, subject.queries).digest == edited.digest


FIELDS = dataclasses.fields(Compile)


def test_sinks_and_softcap_are_layers_of_the_families_tried(compiling):
    found = [compiling(family).memory.model.layers for family in FAMILIES]
    facts = SimpleNamespace(
        softcap=any(spec.softcap for layers in found for spec in layers),
        sinks=any(spec.sinks for layers in found for spec in layers),
        nope=any(spec.rope is None for layers in found for spec in layers),
        windows=any(spec.window for layers in found for spec in layers),
    )
    assert all(vars(facts).values())
