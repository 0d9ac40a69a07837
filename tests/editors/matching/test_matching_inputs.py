"""What is read, how budgets are cut, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import AttentionMatching, SpotLight
from kvedit.editors.matching.budgets import by_mass, proportional, slots_of
from kvedit.editors.matching.queries import split
from kvedit.editors.matching.study import REPEAT, passages, room
from kvedit.errors import InvalidArgument, KVEditError, UnsupportedModel
from kvedit.testing import CONTEXT, tiny_model


def test_the_context_is_repeated_behind_an_instruction(subject: Any, reader: Any) -> None:
    found = subject("llama")
    (tokens,) = passages(found.memory, reader("llama"), "repeat", 0)
    text = found.tokenizer.decode(tokens)
    assert text == f"\n\n{REPEAT}\n\n{CONTEXT}"


def test_of_a_chat_the_messages_are_repeated(reader: Any, subject: Any) -> None:
    found = subject("llama")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]
    memory = kv.capture(found.model, found.tokenizer, chat)
    (tokens,) = passages(memory, reader("llama"), "repeat", 0)
    asked = reader("llama").turn(memory, REPEAT)
    assert torch.equal(tokens[: len(asked)], asked)
    assert found.tokenizer.decode(tokens[len(asked) :]) == "Be brief.\nWho is it?\n"


def test_long_contexts_are_repeated_in_pieces(subject: Any, reader: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("kvedit.editors.matching.study._PIECE", 20)
    found = subject("llama")
    pieces = passages(found.memory, reader("llama"), "repeat", 0)
    assert len(pieces) == -(-found.memory.tokens_count // 20)
    ends = torch.cat([piece[-20:] for piece in pieces[:-1]])
    first = int((found.memory.source.offsets[:, 1] > 0).nonzero()[0])
    assert torch.equal(ends, found.memory.tokens[first : first + len(ends)])
    assert torch.equal(pieces[1][-28:-20], found.memory.tokens[first + 12 : first + 20])


def test_prompts_are_answered_by_the_model(subject: Any, reader: Any) -> None:
    found = subject("llama")
    (asked,) = passages(found.memory, reader("llama"), ("Who?",), 0)
    (answered,) = passages(found.memory, reader("llama"), ("Who?",), 4)
    reply = reader("llama").ask(found.memory, "\n\nWho?\n\n", 4)
    assert torch.equal(answered[: len(asked)], asked)
    assert found.tokenizer.decode(answered[len(asked) :]) == reply != ""


def test_nothing_is_read_past_the_models_positions() -> None:
    model, tokenizer = tiny_model("gpt2")
    ids = torch.arange(1000) % 200 + 50
    memory = kv.capture(model, tokenizer, ids)
    reader = kv.runtime.ModelReader(model, tokenizer)
    assert room(memory) == 24
    assert max(map(len, passages(memory, reader, "repeat", 0))) <= 24
    full = kv.capture(model, tokenizer, torch.arange(1024) % 200 + 50)
    with pytest.raises(InvalidArgument, match="nothing can be read over it"):
        passages(full, reader, "repeat", 0)
    assert AttentionMatching(0.1, queries="context")(full, reader=reader).slots == 102


def test_queries_are_split_into_blocks() -> None:
    fitted, checked, held = split(400, 400, 0)
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(400))
    assert held.tolist() == [i for i in range(400) if i // 16 % 8 == 7]
    assert fitted[checked].tolist() == [i for i in range(400) if i // 16 % 8 == 4]
    some, chosen, rest = split(400, 40, 1)
    assert len(some) == 40 and len(rest) == 5 and bool(chosen.any())
    assert set(some.tolist()) < set(fitted.tolist())
    assert not torch.equal(some, split(400, 40, 2)[0])
    few, few_checked, few_held = split(8, 8, 0)
    assert (len(few), int(few_checked.sum()), len(few_held)) == (7, 1, 1)


@pytest.mark.parametrize(
    ("total", "weights", "low", "high", "wanted"),
    [
        (10, [1, 1], [0, 0], [9, 9], [5, 5]),
        (9, [1, 2], [0, 0], [9, 9], [3, 6]),
        (10, [1, 9], [3, 0], [9, 9], [3, 7]),
        (10, [1, 9], [0, 0], [9, 6], [4, 6]),
        (7, [1, 1, 1], [0, 0, 0], [9, 9, 9], [3, 2, 2]),
        (99, [1, 1], [0, 0], [4, 5], [4, 5]),
        (0, [1, 1], [1, 2], [4, 5], [1, 2]),
    ],
)
def test_slots_are_shared_in_proportion(
    total: int, weights: Any, low: Any, high: Any, wanted: Any
) -> None:
    assert proportional(total, weights, low, high) == wanted


def test_slots_go_where_attention_is() -> None:
    peaked = torch.tensor([[0.97, *[0.01] * 3, *[0.0] * 16]])
    flat = torch.full((1, 20), 0.05)
    counts = by_mass({0: peaked, 3: flat}, {0: 8, 3: 8}, 0)
    assert counts == {0: [2], 3: [14]}


@pytest.mark.parametrize(("budget", "slots"), [(0.29, 29), (1.0, 100), (0.001, 1), (7, 7)])
def test_a_budget_is_a_share_or_a_number(budget: Any, slots: int) -> None:
    assert slots_of(budget, 100, "here") == slots


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": 1}, "budget"),
        ({"budget": True}, "budget"),
        ({"keys": "best"}, "keys must be one of attention"),
        ({"score": "sum"}, "score must be one of"),
        ({"solver": "lstsq"}, "solver must be one of"),
        ({"pooling": 4}, "pooling must be odd"),
        ({"pooling": 0}, "pooling must be a whole number"),
        ({"bias": 1}, "bias must be true or false"),
        ({"bias_range": [1.0, 2.0]}, "bias_range"),
        ({"bias_range": [0.0, 0.0]}, "bias_range"),
        ({"bias_range": [float("-inf"), 0.0]}, "finite"),
        ({"refine": float("nan")}, "refine must be a finite number"),
        ({"queries": "all"}, "queries must be one of repeat"),
        ({"queries": []}, "one prompt or more"),
        ({"queries": ["a", 3]}, "one prompt or more"),
        ({"max_queries": 3}, "max_queries"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": "gcv"}, "ridge must be a finite number"),
        ({"chunk": 0}, "chunk"),
        ({"layers": []}, "layers"),
        ({"layers": ["a"]}, "layers"),
        ({"allocate": "greedy"}, "allocate"),
        ({"allocate": {"0": [0.0, 1.0]}}, "above 0"),
        ({"allocate": 3}, "allocate"),
        ({"sinks": -1}, "sinks"),
        ({"budget": 4, "sinks": 3, "recent": 2}, r"less than sinks \+ recent"),
        ({"fold_bias": True, "allocate": "mass"}, "allocate must be 'uniform'"),
        ({"fold_bias": True, "values": False}, "values must be true"),
        ({"on_policy": True, "queries": "random"}, "on_policy has no meaning"),
        ({"layers_per_pass": 2}, "on_policy=True"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        AttentionMatching(**{"budget": 0.5, **options})


def test_options_from_config_files_are_the_same_editor() -> None:
    listed = AttentionMatching(0.5, bias_range=[-5, 6], queries=["a"], allocate={"1": [1, 2]},
                               layers=[1], ridge=0)  # fmt: skip
    plain = AttentionMatching(0.5, bias_range=(-5.0, 6.0), queries=("a",),
                              allocate=((1, (1.0, 2.0)),), layers=(1,), ridge=0.0)  # fmt: skip
    assert listed == plain and hash(listed) == hash(plain)
    assert AttentionMatching(**listed.parameters()) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 200}, r"a budget of 200 slots, layer 0 has \d+"),
        ({"budget": 0.1, "sinks": 9}, "is less than the 9 that sinks and recent keep"),
        ({"budget": 4, "chunk": 10}, "raise chunk or the budget"),
        ({"layers": [99]}, "unknown layer '99'"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(
    options: Any, message: str, subject: Any, reader: Any
) -> None:
    with pytest.raises(KVEditError, match=message):
        AttentionMatching(**{"budget": 0.5, **options})(
            subject("llama").memory, reader=reader("llama")
        )


def test_it_says_what_it_needs(subject: Any, reader: Any) -> None:
    memory, ready = subject("llama").memory, reader("llama")
    with pytest.raises(InvalidArgument, match="pass reader="):
        AttentionMatching(0.5)(memory)
    with pytest.raises(InvalidArgument, match="an operand of kind 'queries'"):
        AttentionMatching(0.5, queries="calibrated")(memory)
    with pytest.raises(InvalidArgument, match="run-time rules"):
        AttentionMatching(0.5)(SpotLight("box", 0.3)(memory), reader=ready)
    with pytest.raises(InvalidArgument, match="at least 8 are needed"):
        AttentionMatching(0.5, queries=["?"], answer_tokens=0)(memory, reader=ready)


def test_layers_with_windows_are_left_alone_or_refused_by_name(subject: Any, reader: Any) -> None:
    with pytest.raises(UnsupportedModel, match="layer 0 has sliding attention"):
        AttentionMatching(0.5, layers=[0])(subject("gemma3").memory, reader=reader("gemma3"))
    model, tokenizer = tiny_model("mistral")
    memory = kv.capture(model, tokenizer, CONTEXT)
    with pytest.raises(InvalidArgument, match="no layer with full attention"):
        AttentionMatching(0.5)(memory, reader=kv.runtime.ModelReader(model, tokenizer))


def test_memories_of_no_tokens_are_matched_for_prompts_only(subject: Any, reader: Any) -> None:
    memory = subject("llama").memory
    layers = {
        i: type(layer)(layer.keys, layer.values, layer.positions, torch.full_like(layer.source, -1))
        for i, layer in memory.layers.items()
    }
    bare = kv.KVMemory(layers, memory.model, memory.next_position)
    for queries in ("repeat", "context"):
        with pytest.raises(InvalidArgument, match="this memory has none"):
            AttentionMatching(8, queries=queries)(bare, reader=reader("llama"))
    editor = AttentionMatching(8, queries=["What is in the box?"], answer_tokens=4)
    assert editor(bare, reader=reader("llama")).slots == 8


def test_folding_needs_equal_heads(subject: Any, reader: Any) -> None:
    memory = kv.editors.Suppress({"slots": [2, 40]}, strength="inf", kv_heads=[1])(
        subject("llama").memory
    )
    with pytest.raises(InvalidArgument, match="fold_bias needs as many slots"):
        AttentionMatching(30, fold_bias=True)(memory, reader=reader("llama"))
    folded = AttentionMatching(12, fold_bias=True)(memory, reader=reader("llama"))
    assert folded.servable()
