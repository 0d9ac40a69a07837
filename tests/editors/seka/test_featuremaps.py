"""Feature maps: learning and editing in the image of a map, against numpy, and where it ends."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.editors import AdaSeka, Seka
from kvedit.editors.seka import (
    learn_experts,
    learn_projectors,
    random_projectors,
    synthetic_triplets,
)
from kvedit.editors.seka.featuremaps import FEATURE_MAPS, named_map
from kvedit.editors.seka.samples import sample_keys
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory.operand import operand_facts

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3", "gpt2")
SPANS = ("you would", {"tokens": [-6, -2]})
QUESTION = " and what is that?"
TRIPLETS = synthetic_triplets(seed=0, n=4)
FORWARD = {
    "tanh": np.tanh,
    "elu": lambda x: np.where(x >= 0, x, np.expm1(np.minimum(x, 0))),
    "squared_exponential": lambda x: np.exp(-(x**2) / 2),
}
BACKWARD = {
    "tanh": lambda y: np.arctanh(np.clip(y, -0.9999, 0.9999)),
    "elu": lambda y: np.where(y >= 0, y, np.log(np.clip(y, -0.9999, 0) + 1)),
    "squared_exponential": lambda y: -2 * np.log(np.maximum(y, 1e-4)),
}
every_map = pytest.mark.parametrize("name", FORWARD)


def learned(found: Any, name: str, **options: Any) -> Any:
    return learn_projectors(
        found.reader, found.spec, TRIPLETS, layers=[-1], feature_map=name, **options
    )


@every_map
@pytest.mark.parametrize("family", FAMILIES)
def test_projectors_are_learned_on_mapped_keys(family: str, name: Any, bench: Any) -> None:
    found, phi = bench(family), FORWARD[name]
    operand = learned(found, name, share=0.8)
    (entry,) = operand_facts(operand, "projectors")["layers"]
    samples = sample_keys(found.reader, found.spec, TRIPLETS, [entry["layer"]])
    h, plus, minus = (
        phi(kept[entry["layer"]].numpy())
        for kept in (samples.alone, samples.relevant, samples.irrelevant)
    )
    rows = operand.layers[entry["layer"]].keys.double().numpy()
    first = max(entry["positive"])
    for head in range(h.shape[0]):
        for other, ranks, kept in (
            (plus[head], entry["positive"], rows[head, :first]),
            (minus[head], entry["negative_lead"], rows[head, first:]),
        ):
            u, s, _ = np.linalg.svd(h[head].T @ other / len(other))
            rank = 1 + int((s.cumsum() / s.sum() < 0.8).sum())
            assert ranks[head] == rank
            assert np.abs(kept.T @ kept - u[:, :rank] @ u[:, :rank].T).max() <= 1e-5
        moved = np.linalg.norm(plus[head] - minus[head], axis=1).mean()
        assert entry["difference"][head] == pytest.approx(moved, rel=1e-5)


@every_map
def test_experts_are_learned_on_mapped_keys(name: Any, bench: Any) -> None:
    found, phi = bench("qwen3"), FORWARD[name]
    operand = learn_experts(
        found.reader, found.spec, {"a": TRIPLETS}, layers=[-1], rank=2, feature_map=name
    )
    (entry,) = operand_facts(operand, "experts")["layers"]
    samples = sample_keys(found.reader, found.spec, TRIPLETS, [entry["layer"]])
    h, plus = (phi(kept[entry["layer"]].numpy()) for kept in (samples.alone, samples.relevant))
    vectors = operand.layers[entry["layer"]].keys.double().numpy()
    for head in range(h.shape[0]):
        u, s, _ = np.linalg.svd(h[head].T @ plus[head] / h.shape[1])
        for k in range(2):
            side = 1 if h[head].mean(axis=0) @ u[:, k] >= 0 else -1
            assert np.abs(vectors[head, k] - side * s[k] * u[:, k]).max() <= 1e-5 * s[0]


@every_map
@pytest.mark.parametrize("gains", [(0.8, 0.2), (6.0, -1.0), (-1.5, None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_equal_the_reference(family: str, gains: Any, name: Any, bench: Any) -> None:
    """One slot at a time: back from its rotation, through the map, and to its place again."""
    found, phi, back = bench(family), FORWARD[name], BACKWARD[name]
    operand = learned(found, name, min_difference=0.0)
    edited = Seka(SPANS, *gains, feature_map=name)(found.memory, operand)
    (entry,) = operand_facts(operand, "projectors")["layers"]
    layer, first = entry["layer"], max(entry["positive"])
    rows = operand.layers[layer].keys.double().numpy()
    old, new = (m.layers[layer].keys.double().numpy() for m in (found.memory, edited))
    inside = np.zeros(old.shape[1], dtype=bool)
    for span in SPANS:
        inside |= found.memory.resolve(span).mask(found.memory.layers[layer]).numpy()
    assert np.array_equal(new[:, ~inside], old[:, ~inside])
    for head in range(old.shape[0]):
        plus, lead = (part.T @ part for part in (rows[head, :first], rows[head, first:]))
        for slot in np.flatnonzero(inside):
            turn = found.rotation(layer, slot)
            y = phi(turn.T @ old[head, slot])
            added = gains[0] * plus @ y
            if gains[1] is not None:
                added = (added + gains[1] * (y - lead @ y)) / 2
            expected = turn @ back(y + added)
            assert np.abs(new[head, slot] - expected).max() <= 1e-5 * (1 + np.abs(expected).max())
    assert np.abs(new - old).max() > 1e-3


@every_map
def test_adaseka_in_a_feature_map(name: Any, bench: Any) -> None:
    """One expert: alpha is 1 or -1 per head, so k' is one of two, wherever the query points."""
    found, phi, back = bench("qwen3"), FORWARD[name], BACKWARD[name]
    operand = learn_experts(
        found.reader, found.spec, {"a": TRIPLETS}, layers=[-1], rank=2, feature_map=name,
        min_difference=0.0,
    )  # fmt: skip
    edit = AdaSeka(SPANS, QUESTION, 0.7, 2, feature_map=name)
    edited = edit(found.memory, operand, reader=found.reader)
    (layer,) = operand.layers
    vectors = operand.layers[layer].keys.double().numpy()
    slot = int(found.memory.resolve(SPANS[0]).mask(found.memory.layers[layer]).nonzero()[0])
    turn = found.rotation(layer, slot)
    for head in range(vectors.shape[0]):
        u = vectors[head] / np.linalg.norm(vectors[head], axis=1, keepdims=True)
        y = phi(turn.T @ found.memory.layers[layer].keys[head, slot].double().numpy())
        new = edited.layers[layer].keys[head, slot].double().numpy()
        gaps = [np.abs(new - turn @ back(y + a * 0.7 * u.T @ u @ y)).max() for a in (1, -1)]
        assert min(gaps) <= 1e-5 < max(gaps)


@every_map
def test_no_gain_gives_back_the_key_where_the_map_has_an_inverse(name: Any) -> None:
    keys = torch.linspace(-4, 4, 81, dtype=torch.float64)
    added = named_map(name).added(keys, torch.zeros_like)
    if name == "squared_exponential":  # the published one leaves out the root and the sign
        assert torch.allclose(keys + added, keys**2)
    else:
        assert added.abs().max() <= 1e-9


def test_inverses_end_where_their_map_does() -> None:
    keys = torch.tensor([-60.0, -3.0, -0.5, 0.0, 0.5, 3.0, 60.0], dtype=torch.float64)
    for factor in (-1e3, -1.5, 2.0, 1e3):
        found = {
            name: keys + each.added(keys, lambda y, factor=factor: factor * y)
            for name, each in FEATURE_MAPS.items()
        }
        assert all(bool(changed.isfinite().all()) for changed in found.values())
        assert found["tanh"].abs().max() <= math.atanh(1 - 1e-4) + 1e-9
        assert found["elu"].min() >= math.log(1e-4) - 1e-9
        assert found["squared_exponential"].max() <= -2 * math.log(1e-4) + 1e-9


def test_what_was_learned_with_another_map_is_refused(bench: Any, tmp_path: Any) -> None:
    found = bench("llama")
    tanh = learned(found, "tanh")
    with pytest.raises(InvalidArgument, match="learned with 'tanh', the editor has 'none'"):
        Seka(SPANS)(found.memory, tanh)
    with pytest.raises(InvalidArgument, match="learned with 'none', the editor has 'elu'"):
        Seka(SPANS, feature_map="elu")(found.memory, found.projectors)
    with pytest.raises(InvalidArgument, match="the experts were learned with 'none'"):
        edit = AdaSeka(SPANS, QUESTION, feature_map="elu")
        edit(found.memory, found.experts, reader=found.reader)
    store = kv.Store(tmp_path)
    store.put(tanh, "tanh")
    for operand in (store.get("tanh"), random_projectors(tanh, 0)):
        Seka(SPANS, feature_map="tanh")(found.memory, operand)


def test_unknown_maps_are_refused(bench: Any) -> None:
    found = bench("llama")
    for make in (
        lambda: Seka("a", feature_map="tan"),
        lambda: AdaSeka("a", "b", feature_map="tan"),
        lambda: learned(found, "tan"),
    ):
        with pytest.raises(UnknownName, match="unknown feature map 'tan'"):
            make()


def test_operands_without_a_map_are_what_they_were(bench: Any) -> None:
    """No new fact and no new parameter: digests and lineages of before stay."""
    found = bench("llama")
    for operand in (learned(found, "none"), found.experts):
        (facts,) = operand.rules
        assert "feature_map" not in facts
        assert "feature_map" not in json.loads(operand.lineage.head.parameters)
    assert "feature_map" in json.loads(learned(found, "elu").lineage.head.parameters)
