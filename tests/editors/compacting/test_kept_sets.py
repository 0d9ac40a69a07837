"""Every method's kept sets against its paper's formula, written out in numpy on transformers' own
keys, values, queries and attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvedit.editors import (
    TOVA,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVZip,
    RandomKeep,
    SnapKV,
    StreamingLLM,
    Truncate,
)

FAMILIES = ("llama", "qwen3", "gemma3")
every_family = pytest.mark.parametrize("family", FAMILIES)
PROMPT = " and how long would you wait?"


def full_layers(found: Any) -> list[int]:
    return [i for i, spec in enumerate(found.memory.model.layers) if spec.window is None]


def top(scores: np.ndarray, count: int, always: Any = ()) -> set[int]:
    scores = scores.copy()
    scores[list(always)] = np.inf
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def by_kv_head(rows: np.ndarray, heads: int) -> np.ndarray:
    """[query_head, …] to [kv_head, group, …]."""
    return rows.reshape(heads, -1, *rows.shape[1:])


def compare(found: Any, editor: Any, expected: Any, kept_sets: Any) -> None:
    """``expected(layer)`` gives one set per KV head; sliding layers stay as they are."""
    edited = found.apply(editor)
    assert full_layers(found)
    for index, layer in edited.layers.items():
        if index in full_layers(found):
            assert kept_sets(edited, index) == expected(index)
        else:
            assert layer is found.memory.layers[index]
    assert edited.next_position == found.memory.next_position


@every_family
@pytest.mark.parametrize(
    ("editor", "kept"),
    [
        (Truncate(11), lambda n: range(11)),
        (Truncate(0.25), lambda n: range(n // 4)),
        (Truncate(11, keep="last"), lambda n: range(n - 11, n)),
        (Truncate(11, sinks=3, keep="last"), lambda n: [0, 1, 2, *range(n - 8, n)]),
        (Truncate(11, recent=2), lambda n: [*range(9), n - 2, n - 1]),
        (StreamingLLM(13), lambda n: [0, 1, 2, 3, *range(n - 9, n)]),
        (StreamingLLM(13, sinks=0), lambda n: range(n - 13, n)),
    ],
    ids=repr,
)
def test_by_place(family: str, editor: Any, kept: Any, subject: Any, kept_sets: Any) -> None:
    found = subject(family)
    expected = set(kept(found.memory.tokens_count))
    compare(found, editor, lambda i: [expected] * 2, kept_sets)
    edited = found.apply(editor)
    assert all(layer.bias is None for layer in edited.layers.values())


@every_family
@pytest.mark.parametrize("heads", ["each", "shared"])
def test_knorm(family: str, heads: Any, subject: Any, own_pass: Any, kept_sets: Any) -> None:
    found = subject(family)
    own = own_pass(found.model, found.memory.tokens)

    def expected(layer: int) -> list[set[int]]:
        scores = -np.sqrt((own.keys[layer] ** 2).sum(-1))
        rows = scores if heads == "each" else [scores.mean(0)] * 2
        return [top(row, 14, always=[0, 1]) for row in rows]

    compare(found, Knorm(14, sinks=2, heads=heads), expected, kept_sets)


@every_family
def test_key_diff(family: str, subject: Any, own_pass: Any, kept_sets: Any) -> None:
    found = subject(family)
    own = own_pass(found.model, found.memory.tokens)

    def expected(layer: int) -> list[set[int]]:
        unit = own.keys[layer] / np.linalg.norm(own.keys[layer], axis=-1, keepdims=True)
        anchor = unit.mean(1)
        anchor /= np.linalg.norm(anchor, axis=-1, keepdims=True)
        return [top(-unit[h] @ anchor[h], math.floor(0.3 * unit.shape[1])) for h in range(2)]

    compare(found, KeyDiff(0.3), expected, kept_sets)


@every_family
@pytest.mark.parametrize("heads", ["each", "shared"])
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_tova(
    family: str, heads: Any, prompt: Any, subject: Any, own_pass: Any, kept_sets: Any
) -> None:
    found = subject(family)
    ids, count = with_prompt(found, prompt)
    own = own_pass(found.model, ids)

    def expected(layer: int) -> list[set[int]]:
        last = own.attention[layer][:, -1, :count]
        rows = [last.mean(0)] * 2 if heads == "shared" else by_kv_head(last, 2).mean(1)
        return [top(row, 12) for row in rows]

    compare(found, TOVA(12, heads=heads, prompt=prompt), expected, kept_sets)


def with_prompt(found: Any, prompt: str | None) -> tuple[list[int], int]:
    ids = found.memory.tokens.tolist()
    asked = found.tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    return ids + asked, len(ids)


def pooled(row: np.ndarray, kernel: int, pooling: str) -> np.ndarray:
    half, found = kernel // 2, np.zeros_like(row)
    for slot in range(len(row)):
        around = row[max(0, slot - half) : slot + half + 1]
        found[slot] = around.sum() / kernel if pooling == "average" else around.max()
    return found


@every_family
@pytest.mark.parametrize(("kernel", "pooling"), [(5, "average"), (3, "max"), (1, "max")])
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_snap_kv(
    family: str, kernel: int, pooling: Any, prompt: Any,
    subject: Any, own_pass: Any, kept_sets: Any,
) -> None:  # fmt: skip
    found, window = subject(family), 6
    ids, count = with_prompt(found, prompt)
    own = own_pass(found.model, ids)
    early = count - window if prompt is None else count

    def expected(layer: int) -> list[set[int]]:
        seen = own.attention[layer][:, -window:, :early].mean(1)
        smooth = np.stack([pooled(row, kernel, pooling) for row in seen])
        rows = by_kv_head(smooth, 2).mean(1)
        late = set(range(early, count))
        return [top(row, 17 - len(late)) | late for row in rows]

    editor = SnapKV(17, window=window, kernel=kernel, pooling=pooling, prompt=prompt)
    compare(found, editor, expected, kept_sets)


def rotation(position: int, inverse: np.ndarray) -> np.ndarray:
    """RoFormer's matrix in the half layout, for column vectors."""
    half = len(inverse)
    turn = np.zeros((2 * half, 2 * half))
    for pair, frequency in enumerate(inverse):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turn[pair, pair], turn[pair, pair + half] = cos, -sin
        turn[pair + half, pair], turn[pair + half, pair + half] = sin, cos
    return turn


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"future": 20, "epsilon": 0.02, "sinks": 2},
        {"covariance": False, "value_norm": False, "sinks": 0},
        {"prompt": PROMPT, "future": 20},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_expected_attention(
    family: str, options: dict[str, Any], subject: Any, own_pass: Any, kept_sets: Any
) -> None:
    found = subject(family)
    sinks, epsilon = options.get("sinks", 4), options.get("epsilon", 0.0)
    ids, count = with_prompt(found, options.get("prompt"))
    own, config = own_pass(found.model, ids), found.model.config
    first = sinks if "prompt" not in options else count
    dim = own.keys[0].shape[-1]
    scale = getattr(config, "query_pre_attn_scalar", dim) ** -0.5
    inverse = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    mean = np.mean(
        [rotation(count + t, inverse) for t in range(options.get("future", 512))], axis=0
    )

    def expected(layer: int) -> list[set[int]]:
        shares = []
        for head, queries in enumerate(own.queries[layer]):
            keys = own.keys[layer][head // 2, sinks:count]
            drawn = queries[first:]
            mu = mean @ drawn.mean(0)
            sigma = mean @ np.cov(drawn.T, bias=True) @ mean.T
            exponent = scale * keys @ mu
            if options.get("covariance", True):
                exponent += scale**2 / 2 * np.einsum("ja,ab,jb->j", keys, sigma, keys)
            share = np.exp(exponent - exponent.max())
            shares.append(share / share.sum())
        rows = by_kv_head(np.stack(shares), 2).mean(1)
        if options.get("value_norm", True):
            norms = np.linalg.norm(own.values[layer][:, sinks:count], axis=-1)
            rows = (rows + epsilon) * norms
        return [{*range(sinks), *(s + sinks for s in top(row, 15 - sinks))} for row in rows]

    compare(found, ExpectedAttention(15, **options), expected, kept_sets)


def repeat_passes(found: Any, chunk: int, overlap: int) -> list[tuple[int, int, list[int]]]:
    def encode(text: str) -> list[int]:
        return found.tokenizer(text, add_special_tokens=False).input_ids

    ids, passes = found.memory.tokens.tolist(), []
    assert ids[0] == found.tokenizer.bos_token_id
    for start in range(1, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        if start == 1:
            asked = encode("\n\nRepeat the previous context exactly.")
        else:
            asked = encode("\n\nRepeat the part of the previous context exactly, starting with")
            asked += ids[start - overlap : start]
        passes.append((start, stop, [*ids, *asked, *encode("\n"), *ids[start:stop]]))
    return passes


@every_family
@pytest.mark.parametrize("chunk", [2048, 20])
@pytest.mark.parametrize("pool", ["model", "layer", "head"])
def test_kvzip(
    family: str, chunk: int, pool: Any, subject: Any, own_pass: Any, kept_sets: Any
) -> None:
    found, sinks = subject(family), 4
    count, layers = found.memory.tokens_count, full_layers(found)
    scores = np.zeros((max(layers) + 1, 2, count))
    for start, stop, ids in repeat_passes(found, chunk, 5):
        own = own_pass(found.model, ids)
        seen = sorted({*range(sinks), 0, *range(start, stop), *range(count, len(ids))})
        for layer in layers:
            rows = own.attention[layer][:, count:]
            rows = rows / rows[:, :, seen].sum(-1, keepdims=True)  # softmax over these alone
            best = by_kv_head(rows, 2).max((1, 2))
            for slot in (0, *range(start, stop)):
                scores[layer, :, slot] = np.maximum(scores[layer, :, slot], best[:, slot])
    scores[:, :, :sinks] = np.inf
    each = math.floor(0.3 * count)
    if pool == "model":
        flat = top(scores[layers].ravel(), each * 2 * len(layers))
        chosen = {divmod(i, count) for i in flat}
        expected = {
            layer: [{s for h, s in chosen if h == n * 2 + head} for head in range(2)]
            for n, layer in enumerate(layers)
        }
    elif pool == "layer":
        chosen_by = {
            i: {divmod(s, count) for s in top(scores[i].ravel(), 2 * each)} for i in layers
        }
        expected = {
            i: [{s for h, s in chosen_by[i] if h == head} for head in range(2)] for i in layers
        }
    else:
        expected = {i: [top(row, each) for row in scores[i]] for i in layers}
    editor = KVZip(0.3, pool=pool, chunk=chunk, overlap=5)
    compare(found, editor, expected.__getitem__, kept_sets)
    if len(layers) > 1:  # with one layer of two heads they may tie
        sizes = {len(kept) for sets in expected.values() for kept in sets}
        assert (len(sizes) == 1) == (pool == "head")


def test_random_keep_draws_without_replacement_and_by_name(subject: Any, kept_sets: Any) -> None:
    found = subject("llama")
    seen = np.zeros(found.memory.tokens_count)
    sets = []
    for seed in range(40):
        edited = found.apply(RandomKeep(18, seed=seed))
        for layer in edited.layers:
            for kept in kept_sets(edited, layer):
                assert len(kept) == 18
                seen[list(kept)] += 1
                sets.append(frozenset(kept))
    assert len(set(sets)) == len(sets) == 40 * 3 * 2  # seeds, layers and heads differ
    share = seen / len(sets)
    assert abs(share - 1 / 3).max() < 5 * math.sqrt(2 / 9 / len(sets))  # 54 slots, five sigma
    alone = found.apply(RandomKeep(18, seed=3, layers=(1,)))
    whole = found.apply(RandomKeep(18, seed=3))
    assert kept_sets(alone, 1) == kept_sets(whole, 1)
    shared = found.apply(RandomKeep(18, seed=3, heads="shared"))
    assert kept_sets(shared, 0)[0] == kept_sets(shared, 0)[1]
    assert shared.layers[0].bias is None
    assert torch.equal(shared.layers[0].source.sort().values, shared.layers[0].source)


@pytest.mark.parametrize("editor", [Knorm(3, layers=(0, 1)), TOVA(0.5, layers=(0,))], ids=repr)
def test_a_sliding_layer_that_is_named_chooses_within_its_window(
    editor: Any, subject: Any, own_pass: Any, kept_sets: Any
) -> None:
    """Gemma 3's window is 8: the next token sees seven slots."""
    found = subject("gemma3")
    own, count = own_pass(found.model, found.memory.tokens), found.memory.tokens_count
    edited = found.apply(editor)
    for layer in editor.layers:
        if isinstance(editor, Knorm):
            norms = np.linalg.norm(own.keys[layer][:, -7:], axis=-1)
            rows, keep = -norms, 3
        else:
            rows, keep = [own.attention[layer][:, -1, -7:].mean(0)] * 2, 3  # half of 7
        assert kept_sets(edited, layer) == [{count - 7 + s for s in top(r, keep)} for r in rows]
    assert edited.layers[2] is found.memory.layers[2]
