"""The solves against few-line references in numpy: normal equations, weights, stationarity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvedit.editors.compiling.directions import COPIES, NODES, gather
from kvedit.editors.compiling.queries import QuerySample, reach, spread
from kvedit.editors.compiling.softmax import FLOOR, Sets, log_odds, refine

START, LENGTH = 40, 200
RIDGE = 1e-3


def turned(queries: np.ndarray, spec, positions: np.ndarray) -> np.ndarray:
    """RoPE in complex numbers, ``[…, sample, dim]``, half layout."""
    if spec.rope is None:
        return queries * spec.scale
    count = len(spec.rope.inv_freq)
    angle = positions[:, None] * np.array(spec.rope.inv_freq)
    pairs = queries[..., :count] + 1j * queries[..., count : 2 * count]
    pairs = pairs * np.exp(1j * angle) * spec.rope.scaling
    parts = (pairs.real, pairs.imag, queries[..., 2 * count :])
    return np.concatenate(parts, -1) * spec.scale


def layer_of(compiling, family: str, index: int):
    return QuerySample(compiling(family).queries).layer(index)


def solved(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """Weighted ridge regression."""
    matrix = np.einsum("n,nd,ne->de", weights, rows, rows)
    matrix += ridge * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
    return np.linalg.solve(matrix, np.einsum("n,n,nd->d", weights, targets, rows))


@pytest.mark.parametrize(
    ("family", "index"),
    [("llama", 1), ("gpt_neox", 2), ("qwen3", 0), ("gpt2", 1), ("cohere2", 2), ("gemma3", 0)],
)
@pytest.mark.parametrize("balance", [0.0, 2.0])
def test_directions_solve_the_stated_least_squares(compiling, family, index, balance):
    sample = layer_of(compiling, family, index)
    spec, fit = sample.spec, sample.fit.numpy()
    bias = np.linspace(-1.5, 2.0, spec.group)  # another bias on each query head of the group
    normal = gather(sample, START, LENGTH, RIDGE, balance)
    found = np.einsum("g,kgd->kd", bias, normal.directions().numpy())

    count = fit.shape[2] * COPIES
    at = START + spread(count, LENGTH).numpy()
    nodes = START + spread(NODES, LENGTH, ends=True).numpy()
    for head in range(spec.kv_heads):
        rows, targets, weights = [], [], []
        for member in range(spec.group):
            rows.append(turned(np.tile(fit[head, member], (COPIES, 1)), spec, at))
            weights.append(np.full(count, 1 / (spec.group * count)))
            targets.append(np.full(count, bias[member]))
            for text in np.split(fit[head, member], sample.texts):
                rows.append(turned(np.tile(text.mean(0), (NODES, 1)), spec, nodes))
                weights.append(np.full(NODES, balance / (spec.group * sample.texts * NODES)))
                targets.append(np.full(NODES, bias[member]))
        wanted = solved(*map(np.concatenate, (rows, targets, weights)), RIDGE)
        np.testing.assert_allclose(found[head], wanted, atol=1e-5 * np.abs(wanted).max())


def test_ridge_is_the_published_solution_at_the_texts_own_positions(compiling):
    sample = layer_of(compiling, "llama", 0)
    spec, fit = sample.spec, sample.fit.numpy()
    found = gather(sample, START, LENGTH, RIDGE, 0.0, own=True).directions().sum(1).numpy()
    for head in range(spec.kv_heads):
        rows = turned(fit[head], spec, sample.positions.numpy()).reshape(-1, fit.shape[-1])
        second, mean = rows.T @ rows / len(rows), rows.mean(0)
        second += RIDGE * np.trace(second) / len(second) * np.eye(len(second))
        wanted = np.linalg.solve(second, mean)
        np.testing.assert_allclose(found[head], wanted, atol=1e-5 * np.abs(wanted).max())


def softmax_case(compiling, family="llama", index=1, seed=0):
    subject = compiling(family)
    sample = layer_of(compiling, family, index)
    normal = gather(sample, START, LENGTH, RIDGE, 1.0)
    keys = subject.memory.layers[index].keys[1].double()
    bias = torch.zeros(sample.spec.group, len(keys), dtype=torch.float64)
    bias[0, 5:9], bias[1, 5:9], bias[:, 12:15] = 2.0, 1.0, -0.7
    return normal, keys, bias


def test_log_odds_are_those_of_a_set_against_all_others_under_their_bias(compiling):
    normal, keys, bias = softmax_case(compiling)
    logits = normal.queries[1] @ keys.mT
    for sets in (Sets.of(bias), Sets.each(bias)):
        found = log_odds(sets.log_mass(logits), sets.bias)
        weights = np.exp(logits.numpy())
        biased = weights * np.exp(bias.numpy())[:, None]
        for number in range(sets.bias.shape[1]):
            inside = (sets.members == number).numpy()
            wanted = np.log(weights[..., inside].sum(-1)) - np.log(biased[..., ~inside].sum(-1))
            np.testing.assert_allclose(found[..., number].numpy(), wanted, atol=1e-6)
            assert torch.equal(sets.bias[:, number], bias[:, inside][:, 0])


def test_strength_makes_the_cross_entropy_stationary(compiling):
    normal, keys, bias = softmax_case(compiling)
    sets = Sets.of(bias)
    odds = log_odds(sets.log_mass(normal.queries[1] @ keys.mT), sets.bias)
    deltas = refine(normal, 1, odds, sets, rounds=60)
    queries = normal.queries[1].numpy().reshape(-1, keys.shape[1])
    matrix, right = normal.matrix[1].numpy(), normal.right[1].numpy()

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for number, delta in enumerate(deltas.numpy()):
        offset = odds[..., number].numpy().reshape(-1)
        wanted = np.repeat(sets.bias[:, number].numpy(), odds.shape[1])
        reached = queries @ delta
        error = sigmoid(offset + reached) - sigmoid(offset + wanted)
        gap = np.where(np.abs(reached - wanted) < 1e-9, 1, reached - wanted)
        weight = np.where(gap == 1, sigmoid(offset) * sigmoid(-offset), error / gap).mean()
        pull = FLOOR * weight * (matrix @ delta - sets.bias[:, number].numpy() @ right)
        gradient = queries.T @ error / len(queries) + pull
        assert np.abs(gradient).max() < 1e-5
        # Without a refinement the gradient is not small: the test can fail.
        plain = sets.bias[:, number].numpy() @ normal.directions()[1].numpy()
        if np.abs(wanted).max():
            shift = sigmoid(offset + queries @ plain) - sigmoid(offset + wanted)
            assert np.abs(queries.T @ shift / len(queries)).max() > 1e-4


def test_slot_weighs_each_slots_queries_by_the_attention_on_it(compiling):
    normal, keys, bias = softmax_case(compiling)
    sets = Sets.each(bias)
    logits = normal.queries[1] @ keys.mT
    deltas = refine(normal, 1, log_odds(sets.log_mass(logits), sets.bias), sets, rounds=1)
    target = (logits + bias[:, None]).softmax(-1).numpy()
    queries = normal.queries[1].numpy()
    matrix, right = normal.matrix[1].numpy(), normal.right[1].numpy()
    for slot in (5, 8, 13):
        weight = target[..., slot] * (1 - target[..., slot])
        floor = FLOOR * weight.mean()
        left = np.einsum("gn,gnd,gne->de", weight, queries, queries) / weight.size + floor * matrix
        aim = bias[:, slot].numpy()
        side = np.einsum("gn,g,gnd->d", weight, aim, queries) / weight.size + floor * (aim @ right)
        found = deltas[sets.members[slot]].numpy()
        wanted = np.linalg.solve(left, side)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_spread_covers_the_range_and_is_denser_at_its_ends():
    found = spread(4000, 1000)
    assert (int(found.min()), int(found.max())) == (0, 999)
    counts = torch.histc(found.double(), 10, 0, 999)
    assert counts.min() > 200
    assert counts[0] > 2 * counts[5]
    assert counts[-1] > 2 * counts[5]
    assert spread(3, 101, ends=True).tolist() == [0, 50, 100]


def test_reach_ends_where_no_query_sees_the_memory(compiling):
    memory = compiling("gemma3").memory
    assert reach(memory, 0, 1024) == memory.model.layers[0].window - 1
    assert reach(memory, 2, 1024) == 1024
    assert reach(memory, 2, 10**9) == memory.model.max_position - memory.next_position
