"""compile_residual: the fit against brute force, its fidelity as read, and honest negatives."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Steer
from kvedit.errors import InvalidArgument
from kvedit.models.inspection import inspect
from kvedit.models.tiny import tiny_model
from kvedit.runtime import ModelReader
from kvedit.steering import compile_residual, steered
from kvedit.steering.projecting import output_maps
from kvedit.testing.steering import random_delta

CONTEXT = "The refund window is 60 days, and you would not wait for it. That is all."
PROMPTS = [
    " and so it is",
    " Why would you wait?",
    " In the box is the answer",
    " The thing is here",
    " It is for the refund",
    " of it",
    " That was not all of the thing",
    " Is it?",
]


@lru_cache
def setup(family: str, rope: str | None = None) -> Any:
    model, tokenizer = tiny_model(family, dtype=torch.float64, rope=rope)
    return model, tokenizer, kv.capture(model, tokenizer, CONTEXT), ModelReader(model, tokenizer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "gemma3"])
def test_output_maps_are_the_projections(family: str) -> None:
    model, tokenizer, _, reader = setup(family)
    maps = output_maps(reader, inspect(model, tokenizer).spec, [0, 2])
    names = ("o_proj", "dense", "c_proj")
    found = [m for n, m in model.named_modules() if n.split(".")[-1] in names and "mlp" not in n]
    for layer in (0, 2):
        weight = found[layer].weight
        weight = weight.T if type(found[layer]).__name__ == "Conv1D" else weight
        assert (maps[layer].flatten(1) - weight).abs().max() <= 1e-6


def added(reader: Any, memory: Any, edited: Any, prompt: str, layer: int) -> torch.Tensor:
    """What an edit adds to a layer's attention output, [query, hidden], as the model reads it."""
    ids = reader.encode(prompt)
    both = [
        reader.read(m, ids, ("attention_output",))["attention_output"][layer][0]
        for m in (edited, memory)
    ]
    return both[0] - both[1]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_the_fidelity_is_what_the_model_reads(family: str) -> None:
    """One layer, whose inputs an edit of its own values leaves as they were."""
    model, tokenizer, memory, reader = setup(family)
    delta = random_delta(model, tokenizer, sites=("residual",), layers=(1,), scale=0.3)
    target = 2.0 * delta.vectors["residual"][1].double()
    compiled = compile_residual(reader, memory, delta, PROMPTS, strength=2.0, into="same")
    edited = Steer(at="all")(memory, compiled.delta.operand())
    parts = torch.cat([added(reader, memory, edited, PROMPTS[n], 1) for n in (3, 7)])
    told = compiled.fidelity[0]
    assert told.queries == len(parts)
    explained = 1 - (parts - target).square().sum(-1).mean() / target.square().sum()
    assert told.explained == pytest.approx(float(explained), abs=1e-5)
    cosine = torch.cosine_similarity(parts, target[None], dim=-1).mean()
    assert told.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert told.explained <= told.reach + 1e-9
    assert 0 < told.mass <= 1


def test_it_is_the_least_squares() -> None:
    """No other change of values does better on the queries that it was fitted on."""
    model, tokenizer, memory, reader = setup("llama")
    delta = random_delta(model, tokenizer, sites=("residual",), layers=(1,), scale=0.3)
    target = delta.vectors["residual"][1].double()
    compiled = compile_residual(reader, memory, delta, PROMPTS, ridge=0.0, into="same")
    fitted = [p for n, p in enumerate(PROMPTS) if n not in (3, 7)]

    def error(values: kv.Delta) -> float:
        edited = Steer(at="all")(memory, values.operand())
        parts = [added(reader, memory, edited, p, 1) for p in fitted]
        return float((torch.cat(parts) - target).square().sum())

    best = error(compiled.delta)
    for seed in range(3):
        noise = random_delta(
            model, tokenizer, sites=("values",), layers=(1,), seed=seed, scale=0.02
        )
        assert error(compiled.delta + noise) > best
        assert error(compiled.delta - noise) > best


def test_own_heads_carry_it_and_shared_ones_do_not() -> None:
    """The documented limit: a KV head per query head reaches the whole stream."""
    told = {}
    for family in ("gpt_neox", "llama"):
        model, tokenizer, memory, reader = setup(family)
        delta = random_delta(model, tokenizer, sites=("residual",), layers=(1,), scale=0.3)
        for at in ("all", "last"):
            compiled = compile_residual(reader, memory, delta, PROMPTS, at=at, into="same")
            told[family, at] = compiled.fidelity[0]
    spec = {f: tiny_model(f)[0].config for f in ("gpt_neox", "llama")}
    assert getattr(spec["gpt_neox"], "num_key_value_heads", 4) == 4
    assert told["gpt_neox", "all"].reach > 0.999
    assert told["llama", "all"].reach < 0.7
    for family in ("gpt_neox", "llama"):
        # All slots hold nearly all attention, which hardly varies; one slot's share varies widely.
        assert told[family, "all"].explained > told[family, "last"].explained
        assert told[family, "all"].mass > told[family, "last"].mass


@pytest.mark.parametrize(("family", "better"), [("qwen3", "next"), ("gpt_neox", "same")])
def test_which_attention_to_compile_into(family: str, better: str) -> None:
    """Behind the layer where its MLP follows attention, in it where both stand side by side."""
    model, tokenizer, memory, reader = setup(family)
    delta = random_delta(model, tokenizer, sites=("residual",), layers=(1,), scale=0.3)
    left = {
        into: compile_residual(reader, memory, delta, PROMPTS, into=into).left
        for into in ("next", "same")
    }
    assert left[better] < 0.5
    assert min(left, key=left.__getitem__) == better


def test_what_is_left_is_what_the_hook_does() -> None:
    model, tokenizer, memory, reader = setup("qwen3")
    delta = random_delta(model, tokenizer, sites=("residual",), layers=(0, 1), scale=0.3)
    compiled = compile_residual(reader, memory, delta, PROMPTS, strength=1.5)
    edited = Steer(at="all")(memory, compiled.delta.operand())
    missing = effect = 0.0
    for prompt in (PROMPTS[3], PROMPTS[7]):
        ids, states = reader.encode(prompt)[None], []
        for base, hooked in ((memory, False), (memory, True), (edited, False)):
            with kv.attach(model, base) as session, kv.tap(model, ("hidden",), [-1]) as seen:
                with steered(model, delta, 1.5) if hooked else nullcontext():
                    session.forward(ids)
            states.append(seen["hidden", -1])
        missing += float((states[2] - states[1]).square().sum())
        effect += float((states[1] - states[0]).square().sum())
    assert compiled.left == pytest.approx((missing / effect) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("family", "rope"), [("qwen3", None), ("llama", "yarn")])
def test_keys_act_to_first_order(family: str, rope: str | None) -> None:
    """Small keys, fitted along: their effect is as the first order says, YaRN's factor counted."""
    model, tokenizer, memory, reader = setup(family, rope)
    assert (memory.model.layers[1].rope.scaling > 1) == (rope == "yarn")
    delta = random_delta(model, tokenizer, sites=("residual",), layers=(1,), scale=0.3)
    small, slots = 1e-4, {"slots": (2, 6)}
    plain = compile_residual(reader, memory, delta, PROMPTS, strength=small, at=slots, into="same")
    both = compile_residual(
        reader, memory, delta, PROMPTS, strength=small, at=slots, keys=True, into="same"
    )
    assert both.fidelity[0].reach >= plain.fidelity[0].reach
    edited = Steer(keys=1.0, values=1.0, at=slots)(memory, both.delta.operand())
    parts = torch.cat([added(reader, memory, edited, PROMPTS[n], 1) for n in (3, 7)])
    target = small * delta.vectors["residual"][1].double()
    explained = 1 - (parts - target).square().sum(-1).mean() / target.square().sum()
    assert both.fidelity[0].explained == pytest.approx(float(explained), abs=2e-3)


def test_the_result_is_a_delta_like_any_other(tmp_path: Any) -> None:
    model, tokenizer, memory, reader = setup("llama")
    delta = random_delta(model, tokenizer, sites=("residual", "attention"), scale=0.3)
    compiled = compile_residual(reader, memory, delta, PROMPTS[:3], strength=1.5)
    assert [each.layer for each in compiled.fidelity] == [1, 2]
    assert [node.name for node in compiled.delta.lineage.nodes] == [
        "random",
        "capture",
        "compile_residual",
    ]
    store = kv.Store(tmp_path)
    store.put(compiled.delta.operand(), "compiled")
    again = kv.Delta.of(store.get("compiled"))
    one = Steer(at="all")(memory, compiled.delta.operand())
    assert Steer(at="all")(memory, again.operand()).digest == one.digest


def test_refusals() -> None:
    model, tokenizer, memory, reader = setup("llama")
    with pytest.raises(InvalidArgument, match="no residual or attention vectors to compile"):
        compile_residual(reader, memory, random_delta(model, tokenizer), PROMPTS)
    stream = random_delta(model, tokenizer, sites=("residual",))
    with pytest.raises(InvalidArgument, match="two prompts or more"):
        compile_residual(reader, memory, stream, PROMPTS[:1])
