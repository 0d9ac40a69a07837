"""Learning against numpy in float64, from keys that a plain forward pass makes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvedit.editors.seka import (
    dense_projectors,
    learn_experts,
    learn_projectors,
    random_projectors,
    synthetic_triplets,
)
from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName
from kvedit.memory.operand import operand_facts
from kvedit.models.cache_argument import cache_argument

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3", "gpt2")
TRIPLETS = synthetic_triplets(seed=0, n=4)
TOLERANCE = 1e-5


def reference_keys(found: Any, triplets: Any, layer: int) -> list[np.ndarray]:
    """h, h+, h- as [kv_head, token, dim]: transformers' own cache, rotated back by hand."""
    rope, kept = found.spec.layers[layer].rope, [[], [], []]
    for context, relevant, irrelevant, answer in triplets:
        for rows, question in zip(kept, (None, relevant, irrelevant), strict=True):
            text = f"Context: {context}"
            text = text if question is None else f"Question: {question}\n{text}"
            coded = found.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            # No question holds an answer, so its first place is the one in the context.
            start = text.index(answer)
            stop = start + len(answer)
            at = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < stop and b > start]
            cache = DynamicCache()
            ids = torch.tensor([coded["input_ids"]])
            with torch.no_grad():
                found.model(ids, **{cache_argument(found.model): cache}, use_cache=True)
            keys = cache.layers[layer].keys[0].numpy()
            rows.append(np.stack([unrotated(keys[:, i], rope, i) for i in at], axis=1))
    return [np.concatenate(rows, axis=1) for rows in kept]


def unrotated(keys: np.ndarray, rope: Any, position: int) -> np.ndarray:
    """Keys [kv_head, dim] of one position before rotation in halves, pair by pair."""
    if rope is None:
        return keys
    assert rope.layout == "half" and rope.scaling == 1.0
    out, pairs = keys.copy(), len(rope.inv_freq)
    for pair, frequency in enumerate(rope.inv_freq):
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        x, y = keys[:, pair], keys[:, pair + pairs]
        out[:, pair], out[:, pair + pairs] = x * cos + y * sin, y * cos - x * sin
    return out


def reference_projectors(h: np.ndarray, plus: np.ndarray, minus: np.ndarray, share: float) -> Any:
    """P+ and P- of one head from explicitly formed cross-covariances."""
    made = []
    for other, lead in ((plus, True), (minus, False)):
        u, s, _ = np.linalg.svd(h.T @ other / len(h))
        k = 1
        while s[:k].sum() < share * s.sum() and k < len(s):
            k += 1
        part = u[:, :k] if lead else u[:, k:]
        made.append((part @ part.T, k))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_projectors_equal_the_reference(family: str, share: float, bench: Any) -> None:
    found = bench(family)
    operand = learn_projectors(found.reader, found.spec, TRIPLETS, layers=[-1], share=share)
    facts = operand_facts(operand, "projectors")
    layer = len(found.spec.layers) - 1
    assert [entry["layer"] for entry in facts["layers"]] == [layer]
    h, plus, minus = reference_keys(found, TRIPLETS, layer)
    assert facts["tokens"] == h.shape[1] and facts["skipped"] == 0
    positive, negative = dense_projectors(operand, layer)
    for head in range(found.spec.layers[layer].kv_heads):
        one, two = reference_projectors(h[head], plus[head], minus[head], share)
        for mine, (matrix, _) in ((positive, one), (negative, two)):
            assert np.abs(mine[head].numpy() - matrix).max() <= TOLERANCE
        ranks = [facts["layers"][0][name][head] for name in ("positive", "negative_lead")]
        assert ranks == [one[1], two[1]]
        moved = np.linalg.norm(plus[head] - minus[head], axis=1).mean()
        assert facts["layers"][0]["difference"][head] == pytest.approx(moved, rel=1e-5)
        assert moved > 0.05


def test_the_measure_of_the_published_code(bench: Any) -> None:
    found = bench("llama")
    operand = learn_projectors(found.reader, found.spec, TRIPLETS, layers=[-1], measure="frobenius")
    (entry,) = operand_facts(operand, "projectors")["layers"]
    _, plus, minus = reference_keys(found, TRIPLETS, entry["layer"])
    expected = np.sqrt(((plus - minus) ** 2).sum(axis=(1, 2))) / plus.shape[1]
    assert np.allclose(entry["difference"], expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_experts_equal_the_reference(family: str, bench: Any) -> None:
    found = bench(family)
    sets = {"a": TRIPLETS[:3], "b": synthetic_triplets(5, 3)}
    operand = learn_experts(found.reader, found.spec, sets, layers=[-1], rank=3)
    facts = operand_facts(operand, "experts")
    assert (facts["names"], facts["rank"]) == (["a", "b"], 3)
    layer = len(found.spec.layers) - 1
    heads = found.spec.layers[layer].kv_heads
    vectors = operand.layers[layer].keys.reshape(heads, 2, 3, -1).double().numpy()
    for expert, triplets in enumerate(sets.values()):
        h, plus, _ = reference_keys(found, triplets, layer)
        for head in range(heads):
            u, s, _ = np.linalg.svd(h[head].T @ plus[head] / h.shape[1])
            for k in range(3):
                side = 1 if h[head].mean(axis=0) @ u[:, k] >= 0 else -1
                expected = side * s[k] * u[:, k]
                assert np.abs(vectors[head, expert, k] - expected).max() <= TOLERANCE * s[0]


def test_the_first_layer_does_not_know_the_question(bench: Any) -> None:
    """Its keys depend on a token alone, so its heads never pass the filter."""
    found = bench("llama")
    operand = learn_projectors(found.reader, found.spec, TRIPLETS, layers=[0, -1])
    first, last = operand_facts(operand, "projectors")["layers"]
    assert max(first["difference"]) <= 1e-5  # float32 angles
    assert min(last["difference"]) > 0.2


def test_learning_again_gives_the_same_bits(bench: Any) -> None:
    found = bench("qwen3")
    one, two, other = (
        learn_projectors(found.reader, found.spec, iter(triplets), layers=[-1])
        for triplets in (TRIPLETS, TRIPLETS, TRIPLETS[:3])
    )
    assert one.digest == two.digest != other.digest
    assert one.lineage.head.id == two.lineage.head.id != other.lineage.head.id
    stricter = learn_projectors(found.reader, found.spec, TRIPLETS, layers=[-1], min_difference=9)
    assert stricter.lineage.head.id != one.lineage.head.id


def test_a_prefix_is_read_first(bench: Any) -> None:
    found = bench("llama")
    plain, after = (
        learn_projectors(found.reader, found.spec, TRIPLETS, layers=[-1], prefix=prefix)
        for prefix in ((), (1,))
    )
    assert not torch.equal(plain.layers[2].keys, after.layers[2].keys)
    assert (
        operand_facts(after, "projectors")["tokens"] == operand_facts(plain, "projectors")["tokens"]
    )


def test_only_so_many_are_read_and_the_default_is_the_last_ten_layers(bench: Any) -> None:
    found = bench("llama")
    many = learn_projectors(found.reader, found.spec, TRIPLETS, limit=2)
    few = learn_projectors(found.reader, found.spec, TRIPLETS[:2])
    assert many.digest == few.digest
    assert list(many.layers) == [0, 1, 2]


def test_random_projectors_keep_ranks_and_heads(bench: Any) -> None:
    operand = bench("gemma3").projectors
    drawn, again, other = (random_projectors(operand, seed) for seed in (1, 1, 2))
    assert drawn.digest == again.digest != other.digest
    facts, known = operand_facts(drawn, "projectors"), operand_facts(operand, "projectors")
    assert facts["layers"] == known["layers"]
    assert (facts["origin"], known["origin"]) == ("random", "learned")
    for entry in facts["layers"]:
        for matrix, name in zip(
            dense_projectors(drawn, entry["layer"]), ("positive", "negative_lead"), strict=True
        ):
            assert (matrix @ matrix - matrix).abs().max() <= TOLERANCE
            assert (matrix - matrix.mT).abs().max() <= TOLERANCE
            ranks = torch.tensor(entry[name], dtype=torch.float32)
            ranks = ranks if name == "positive" else matrix.shape[-1] - ranks
            assert (matrix.diagonal(dim1=1, dim2=2).sum(dim=1) - ranks).abs().max() <= 1e-4
    node = drawn.lineage.head
    assert (node.name, node.inputs) == ("random_projectors", (operand.lineage.head.id,))


def test_facts_are_plain_data(bench: Any) -> None:
    for kind, operand in (
        ("projectors", bench("llama").projectors),
        ("experts", bench("llama").experts),
    ):
        facts = operand_facts(operand, kind)
        assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.0}, "share must lie in"),
        ({"share": float("nan")}, "share must lie in"),
        ({"limit": 0}, "limit: expected at least 1"),
        ({"measure": "median"}, "measure 'mean' or 'frobenius'"),
        ({"min_difference": -1.0}, "min_difference of 0 or more"),
        ({"layers": []}, "at least one layer"),
    ],
)
def test_wrong_options_are_refused(change: Any, message: str, bench: Any) -> None:
    found = bench("llama")
    with pytest.raises(InvalidArgument, match=message):
        learn_projectors(found.reader, found.spec, TRIPLETS, **change)


def test_wrong_triplets_are_refused(bench: Any) -> None:
    found = bench("llama")
    with pytest.raises(InvalidArgument, match="four texts each"):
        learn_projectors(found.reader, found.spec, [])
    with pytest.raises(InvalidArgument, match="four texts each"):
        learn_projectors(found.reader, found.spec, [("context", "question", "answer")])
    with pytest.raises(InvalidArgument, match="expected the answer 'Rome' in its context"):
        learn_projectors(found.reader, found.spec, [("It is big.", "What?", "Who?", "Rome")])
    with pytest.raises(UnknownName, match="unknown layer '7'"):
        learn_projectors(found.reader, found.spec, TRIPLETS, layers=[7])
    with pytest.raises(ShapeMismatch, match="layer 2 keys"):
        learn_projectors(found.reader, bench("qwen3").spec, TRIPLETS, layers=[2])
    with pytest.raises(InvalidArgument, match="at least one set"):
        learn_experts(found.reader, found.spec, {})


def test_an_answer_that_is_cut_differently_is_skipped(bench: Any) -> None:
    found = bench("llama")

    class Cutting:
        """A tokenizer that cuts texts without a question into other tokens."""

        read = staticmethod(found.reader.read)

        @staticmethod
        def encode(text: str) -> torch.Tensor:
            ids = found.reader.encode(text)
            return ids if text.startswith("Question") or "harp" not in text else ids.flip(0)

    odd = ("She plays the harp.", "What does she play?", "Where is it?", "harp")
    operand = learn_projectors(Cutting(), found.spec, [odd, *TRIPLETS], layers=[-1])
    assert operand_facts(operand, "projectors")["skipped"] == 1
    with pytest.raises(InvalidArgument, match="1 had not"):
        learn_projectors(Cutting(), found.spec, [odd], layers=[-1])
