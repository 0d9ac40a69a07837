"""Conditions: CAST's formula, decided per prompt and row, and its search."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.memory import Delta
from kvedit.models.inspection import inspect
from kvedit.models.tiny import tiny_model
from kvedit.runtime.saying import saying
from kvedit.steering import Condition, find_condition, steered
from kvedit.steering.conditions import cast_similarity
from kvedit.testing.steering import random_delta

TEXTS = ("The refund window is 60 days", "And so it is", "In the box we would wait for the answer")
STEPS, TOL = 4, 1e-6


@lru_cache
def model_of(family: str = "llama") -> Any:
    return tiny_model(family, dtype=torch.float64)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def states_of(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    with torch.no_grad(), kv.tap(model, ("hidden",), [layer]) as seen:
        model(torch.tensor([ids]))
    return seen["hidden", layer][0]


def by_hand(state: torch.Tensor, vector: torch.Tensor) -> float:
    """cos(h, tanh(c c^T h / c.c)), number by number."""
    h, c = state.double().tolist(), vector.double().tolist()
    share = sum(a * b for a, b in zip(h, c, strict=True)) / sum(b * b for b in c)
    projected = [math.tanh(share * b) for b in c]
    dot = sum(a * b for a, b in zip(h, projected, strict=True))
    return dot / math.sqrt(sum(a * a for a in h) * sum(b * b for b in projected))


def middle(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[0] + ordered[1]) / 2


def test_the_formula() -> None:
    states, vector = torch.randn(3, 7), torch.randn(7)
    found = cast_similarity(states, vector)
    assert (found - torch.tensor([by_hand(s, vector) for s in states])).abs().max() <= 1e-6
    # Length of the condition vector counts through tanh, its sign does not.
    assert torch.allclose(cast_similarity(states, -vector), found)


@pytest.mark.parametrize("read", ["mean", "last"])
def test_rows_are_decided_as_if_alone(read: Any) -> None:
    model, tokenizer = model_of()
    conditions, delta = random_delta(model, sites=("residual",), seed=4), random_delta(
        model, sites=("residual",), layers=(1, 2), seed=5, scale=0.3)  # fmt: skip
    rows = [ids_of(tokenizer, text) for text in TEXTS]
    states = [states_of(model, row, 1) for row in rows]
    heads = [s.mean(dim=0) if read == "mean" else s[-1] for s in states]
    values = [by_hand(h, conditions.vectors["residual"][1]) for h in heads]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip

    def alone(row: list[int]) -> torch.Tensor:
        out = model.generate(torch.tensor([row]), **options)
        return torch.cat(out.logits)

    plain = [alone(row) for row in rows]
    with steered(model, delta, 4.0):
        every = [alone(row) for row in rows]
    for above in (True, False):
        condition = Condition(conditions, 1, middle(values), above, read)
        met = [(value > condition.threshold) == above for value in values]
        assert len(set(met)) == 2
        for cached in (True, False):
            with steered(model, delta, 4.0, condition=condition):
                out = model.generate(ids, attention_mask=mask, use_cache=cached, **options)
            for row in range(3):
                logits = torch.stack([step[row] for step in out.logits])
                expected = every[row] if met[row] else plain[row]
                assert (logits - expected).abs().max() <= TOL
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, every, strict=True))


def test_sessions_pieces_and_turns() -> None:
    """The decision is of a turn's prompt, whole or in pieces, and holds until the next one."""
    model, tokenizer = model_of()
    memory = kv.capture(model, tokenizer, "The thing in the box is")
    conditions = random_delta(model, sites=("residual",), seed=4)
    delta = random_delta(model, sites=("residual",), layers=(1, 2), seed=5, scale=0.3)
    turns = [ids_of(tokenizer, text) for text in (" here. And you would wait", " Why is it so?")]

    def replies(condition: Any, pieces: int | None = None) -> tuple[list[Any], torch.Tensor]:
        with (
            steered(model, delta, 4.0, scope="generation", condition=condition),
            kv.attach(model, memory) as session,
        ):
            said = []
            for turn in turns:
                cut = len(turn) if pieces is None else pieces
                if pieces is not None:
                    session.forward(torch.tensor([turn[:cut]]))
                said.append(
                    session.generate([turn[cut:] if pieces else turn], max_new_tokens=STEPS).tokens
                )
            return said, session.memory().layers[2].values

    with kv.tap(model, ("hidden",), [0]) as seen, kv.attach(model, memory) as session:
        session.feed(turns[0])
    value = by_hand(seen["hidden", 0][0].mean(dim=0), conditions.vectors["residual"][0])
    on, off = Condition(conditions, 0, value - 1e-4), Condition(conditions, 0, value + 1e-4)
    always, never = Condition(conditions, 0, -2.0), Condition(conditions, 0, 2.0)
    first = [replies(c)[0][0] for c in (always, on, off, never)]
    assert first[0] == first[1] != first[2] == first[3]
    for condition in (on, off, always):
        whole, pieces = replies(condition), replies(condition, 3)
        assert whole[0] == pieces[0]
        assert (whole[1] - pieces[1]).abs().max() <= TOL
    with (
        pytest.raises(InvalidArgument, match="comes in several passes, and a condition"),
        steered(model, delta, condition=on),
        kv.attach(model, memory) as session,
    ):
        session.forward(torch.tensor([turns[0][:3]]))
        session.forward(torch.tensor([turns[0][3:]]))


def test_a_loop_of_ones_own() -> None:
    """The first pass makes the cache; what was decided in it is known in those that follow."""
    model, tokenizer = model_of()
    conditions = random_delta(model, sites=("residual",), seed=4)
    delta = random_delta(model, sites=("residual",), layers=(2,), seed=5, scale=0.5)
    ids = torch.tensor([ids_of(tokenizer, TEXTS[0])])

    def second(condition: Any) -> torch.Tensor:
        with (
            steered(model, delta, 4.0, scope="generation", condition=condition),
            torch.no_grad(),
        ):
            first = model(ids)
            with saying():
                return model(torch.tensor([[11]]), cache=first.cache).logits

    always, never = (second(Condition(conditions, 0, cut)) for cut in (-2.0, 2.0))
    assert torch.equal(always, second(None))
    assert (always - never).abs().max() > 1e-3


def test_and_and_or() -> None:
    model, tokenizer = model_of()
    conditions = random_delta(model, sites=("residual",), seed=4)
    delta = random_delta(model, sites=("residual",), layers=(2,), scale=0.5)
    ids = torch.tensor([ids_of(tokenizer, TEXTS[0])])
    yes, no = Condition(conditions, 0, -2.0), Condition(conditions, 1, 2.0)

    def logits(condition: Any) -> torch.Tensor:
        with steered(model, delta, 3.0, condition=condition), torch.no_grad():
            return model(ids).logits

    on, off = logits(yes), logits(no)
    assert (on - off).abs().max() > 1e-3
    assert torch.equal(logits(yes & no), off)
    assert torch.equal(logits(yes | no), on)
    assert torch.equal(logits((yes | no) & yes), on)
    assert torch.equal(logits((yes & no) | no), off)


def test_search_finds_what_was_put_there() -> None:
    """The condition vector is the mean difference of prompts with one word and with another."""
    model, tokenizer = model_of("qwen3")
    spec, hidden = inspect(model, tokenizer).spec, model.config.hidden_size
    yes = [
        f"{a} refund {b}" for a in ("The", "A", "No") for b in ("is here", "of 60 days", "window")
    ]
    no = [f"{a} box {b}" for a in ("The", "A", "No") for b in ("is here", "of the thing", "answer")]
    labelled = [(t, True) for t in yes] + [(t, False) for t in no]
    means = {}
    for label, texts in ((True, yes), (False, no)):
        rows = [kv.capture(model, tokenizer, t).tokens.tolist() for t in texts]
        means[label] = torch.stack([states_of(model, r, 1).mean(dim=0) for r in rows]).mean(dim=0)
    noise = torch.Generator().manual_seed(0)
    vectors = {
        0: torch.randn(hidden, generator=noise) * 0.01,
        1: (means[True] - means[False]).float(),
    }
    delta = Delta({"residual": vectors}, spec)
    found = find_condition(model, tokenizer, delta, labelled, batch=5)
    assert (found.best.layer, found.best.f1) == (1, 1.0)
    assert found.points[0].f1 < 1.0
    assert found.always == pytest.approx(2 / 3)
    # The search's own figures, from prompts that are read one by one.
    for text, label in labelled:
        state = states_of(model, kv.capture(model, tokenizer, text).tokens.tolist(), 1).mean(dim=0)
        assert (by_hand(state, vectors[1]) > found.best.threshold) == (label == found.best.above)
    flipped = find_condition(
        model, tokenizer, delta, [(t, not label) for t, label in labelled], layers=[1]
    )
    assert flipped.best.f1 == 1.0
    assert flipped.best.above != found.best.above
    memory = kv.capture(model, tokenizer, "The thing in the box is")
    behind = find_condition(
        model, tokenizer, delta, labelled, layers=[-2], memory=memory, read="last"
    )
    assert behind.condition.layer == 1


def test_refusals_say_what_to_do() -> None:
    model, tokenizer = model_of()
    conditions = random_delta(model, sites=("residual",), layers=(1,))
    with pytest.raises(InvalidArgument, match=r"residual vector other than zero at layer 2.*\[1\]"):
        Condition(conditions, 2, 0.0)
    with pytest.raises(InvalidArgument, match="read must be"):
        Condition(conditions, 1, 0.0, read="first")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="steer later layers"):
        with steered(
            model, random_delta(model, sites=("residual",)), condition=Condition(conditions, 1, 0.0)
        ):
            raise AssertionError
    with pytest.raises(InvalidArgument, match="attention of layer 1 comes before"):
        with steered(model, random_delta(model, sites=("attention",), layers=(1,)),
                     condition=Condition(conditions, 1, 0.0)):  # fmt: skip
            raise AssertionError
    with pytest.raises(InvalidArgument, match="expected a Condition"):
        with steered(model, conditions, condition=0.5):  # type: ignore[arg-type]
            raise AssertionError
    other, _ = tiny_model("llama", seed=9, dtype=torch.float64)
    theirs = random_delta(other, sites=("residual",), layers=(1,))
    with (
        pytest.raises(IncompatibleModel),
        steered(model, conditions, condition=Condition(theirs, 1, 0.0)),
    ):
        raise AssertionError
    with pytest.raises(InvalidArgument, match="prompts of both kinds, found 2"):
        find_condition(model, tokenizer, conditions, [("a", True), ("b", True)])
    with pytest.raises(UnknownName, match="layer"):
        find_condition(model, tokenizer, conditions, [("a", True), ("b", False)], layers=[7])
