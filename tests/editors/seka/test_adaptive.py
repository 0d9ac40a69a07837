"""AdaSeka against numpy: the query, the weights, the sum of projectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.editors import AdaSeka
from kvedit.editors.seka.adaptive import expert_weights
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory.operand import operand_facts

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3", "gpt2")
SPANS = ("you would", {"tokens": [-6, -2]})
QUESTION = " and what is that?"
TOLERANCE = 1e-5


def last_query(found: Any, layer: int) -> np.ndarray:
    """The query [kv_head, dim] of the question's last token: its group's mean, rotated back."""
    ids = found.reader.encode(QUESTION)
    with kv.attach(found.model, found.memory) as session, kv.tap(found.model, ["queries"]) as tap:
        session.forward(ids[None])
    spec = found.memory.model.layers[layer]
    position = found.memory.next_position + len(ids) - 1
    turn = found.rotation(layer, position)
    queries = tap["queries", layer][0, :, -1].double().numpy() @ turn  # rows times R: R^-1 q
    group = spec.query_heads // spec.kv_heads
    return np.stack([queries[h * group : (h + 1) * group].mean(0) for h in range(spec.kv_heads)])


def reference(found: Any, layer: int, gain: float, top: int) -> np.ndarray:
    facts = operand_facts(found.experts, "experts")
    (entry,) = [e for e in facts["layers"] if e["layer"] == layer]
    layer_kv, spec = found.memory.layers[layer], found.memory.model.layers[layer]
    experts = found.experts.layers[layer].keys.double().numpy()
    experts = experts.reshape(spec.kv_heads, len(facts["names"]), facts["rank"], -1)[:, :, :top]
    keys, queries = layer_kv.keys.double().numpy().copy(), last_query(found, layer)
    inside = np.zeros(keys.shape[1], dtype=bool)
    for span in SPANS:
        inside |= found.memory.resolve(span).mask(layer_kv).numpy()
    for head in range(spec.kv_heads):
        scores, projectors = [], []
        for expert, vectors in enumerate(experts[head]):
            sigma = np.linalg.norm(vectors, axis=1)
            u = (vectors / sigma[:, None]).T
            passes = entry["difference"][expert][head] >= 0.2
            scores.append(sum((queries[head] @ u[:, k]) * sigma[k] for k in range(top)) * passes)
            projectors.append(u @ u.T)
        if not any(scores):
            continue
        alpha = np.array(scores) / max(abs(score) for score in scores)
        matrix = sum(a * p for a, p in zip(alpha, projectors, strict=True))
        for slot in np.flatnonzero(inside):
            turn = found.rotation(layer, int(layer_kv.positions[slot]))
            k = turn.T @ keys[head, slot]
            keys[head, slot] = turn @ (k + gain * matrix @ k)
    return keys


@pytest.mark.parametrize(("gain", "top"), [(1.0, 3), (-0.7, 1), (2.0, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_equal_the_reference(family: str, gain: float, top: int, bench: Any) -> None:
    found = bench(family)
    edited = AdaSeka(SPANS, QUESTION, gain, top)(found.memory, found.experts, reader=found.reader)
    moved = 0.0
    for layer, old in found.memory.layers.items():
        new = edited.layers[layer]
        if layer not in found.experts.layers:
            assert new is old
            continue
        expected = reference(found, layer, gain, top)
        assert np.abs(new.keys.double().numpy() - expected).max() <= TOLERANCE
        moved = max(moved, float((new.keys - old.keys).abs().max()))
    assert moved > 1e-2


def test_the_question_counts(bench: Any) -> None:
    found = bench("llama")
    one, two, again = (
        AdaSeka("you would", q)(found.memory, found.experts, reader=found.reader)
        for q in (" what is it", " whom do you mean by that", " what is it")
    )
    assert one.digest == again.digest != two.digest


def test_weights_are_relative_to_the_largest() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    experts = torch.zeros(3, 2, 2, 2)
    experts[0, 0, 0] = torch.tensor([3.0, 0.0])  # aligned, sigma 3
    experts[0, 1, 0] = torch.tensor([-1.0, 5.0])  # against
    experts[1, 0, 1] = torch.tensor([0.0, -4.0])
    expected = torch.tensor([[1.0, -1 / 3], [-1.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(expert_weights(query, experts), expected)
    assert torch.equal(expert_weights(7 * query, experts), expert_weights(query, experts))


def test_an_expert_that_does_not_pass_has_no_weight(bench: Any) -> None:
    """The published code then falls back to equal weights for all experts of the head."""
    found = bench("llama")
    facts = operand_facts(found.experts, "experts")["layers"]
    differences = np.array([entry["difference"] for entry in facts])  # [layer, expert, head]
    floor = float((differences.min() + np.partition(differences.ravel(), 1)[1]) / 2)
    layer, expert, head = np.argwhere(differences < floor)[0]
    strict, loose = (
        AdaSeka(SPANS, QUESTION, min_difference=least)(
            found.memory, found.experts, reader=found.reader
        )
        for least in (floor, 0.0)
    )
    index = facts[layer]["layer"]
    changed = (strict.layers[index].keys != loose.layers[index].keys).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [head]


def test_wrong_use_is_refused(bench: Any) -> None:
    found = bench("llama")
    edit = AdaSeka("you would", QUESTION)
    with pytest.raises(InvalidArgument, match="pass reader="):
        edit(found.memory, found.experts)
    with pytest.raises(InvalidArgument, match=r"found \['KVMemory', 'projectors'\]"):
        edit(found.memory, found.projectors, reader=found.reader)
    with pytest.raises(InvalidArgument, match="hold 8 columns, found 9"):
        AdaSeka("you would", QUESTION, top=9)(found.memory, found.experts, reader=found.reader)
    with pytest.raises(IncompatibleModel, match="fingerprints differ"):
        edit(found.memory, bench("qwen3").experts, reader=found.reader)
    with pytest.raises(InvalidArgument, match="no head of the layers"):
        AdaSeka("you would", QUESTION, min_difference=1e6)(
            found.memory, found.experts, reader=found.reader
        )


@pytest.mark.parametrize(
    "wrong", [{"question": ""}, {"top": 0}, {"top": True}, {"gain": None}, {"spans": []}]
)
def test_wrong_parameters_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        AdaSeka(**{"spans": "a", "question": "b", **wrong})
