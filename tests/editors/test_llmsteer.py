"""LLMSteer: its selection against attention summed by hand, its edits against one full pass."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, LLMSteer, build
from kvedit.editors.receiving import PREFIXES, received_attention, select_tokens
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.runtime import ModelReader
from kvedit.testing.tolerances import FP64_ORACLE, VISIBLE_EFFECT

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox")
every_family = pytest.mark.parametrize("family", FAMILIES)


def reader_of(found: Any) -> ModelReader:
    return ModelReader(found.model, found.tokenizer)


def received_by_hand(found: Any, prefix: str) -> list[torch.Tensor]:
    """Column sums over heads and queries of transformers' own attentions, context columns."""
    before = found.tokenizer(prefix, add_special_tokens=False, return_tensors="pt").input_ids[0]
    bos, context = found.memory.tokens[:1], found.memory.tokens[1:]
    assert bos.tolist() == [found.tokenizer.bos_token_id]
    ids = torch.cat((bos, before, context))[None]
    found.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = found.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    finally:
        found.model.set_attn_implementation("sdpa")
    sums = [layer[0].double().sum(dim=(0, 1)) for layer in seen]
    return [torch.cat((one[:1], one[1 + len(before) :])) for one in sums]


def selected_by_hand(found: Any, k: int, prefixes: Any = PREFIXES) -> dict[int, set[int]]:
    sets: dict[int, list[set[int]]] = {}
    for prefix in prefixes:
        for layer, sums in enumerate(received_by_hand(found, prefix)):
            top = sorted(range(len(sums)), key=lambda token: -float(sums[token]))[:k]
            sets.setdefault(layer, []).append(set(top))
    return {layer: set.intersection(*both) for layer, both in sets.items()}


def as_sets(selection: dict[int, torch.Tensor]) -> dict[int, set[int]]:
    return {layer: set(mask.nonzero().squeeze(1).tolist()) for layer, mask in selection.items()}


@every_family
def test_attention_received_is_transformers_own(family: str, subject: Any) -> None:
    found = subject(family)
    sums = received_attention(found.memory, reader_of(found), PREFIXES[0])
    for layer, expected in enumerate(received_by_hand(found, PREFIXES[0])):
        assert (sums[layer] - expected).abs().max() <= 1e-4  # sums of some hundred fp32 weights


@every_family
@pytest.mark.parametrize("k", [5, 11])
def test_selection_is_top_k_and_top_k(family: str, k: int, subject: Any) -> None:
    found = subject(family)
    selection = select_tokens(
        found.memory, reader_of(found), k=k, drop_sink=False, drop_punctuation=False
    )
    by_hand = selected_by_hand(found, k)
    assert as_sets(selection) == by_hand
    assert all(len(tokens) <= k for tokens in by_hand.values())
    single = [as_sets(select_tokens(found.memory, reader_of(found), k=k, prefixes=[prefix],
                                    drop_sink=False, drop_punctuation=False))
              for prefix in PREFIXES]  # fmt: skip
    either = as_sets(select_tokens(found.memory, reader_of(found), k=k, combine="or",
                                   drop_sink=False, drop_punctuation=False))  # fmt: skip
    for layer, tokens in by_hand.items():
        assert all(len(one[layer]) == k for one in single)
        assert tokens == single[0][layer] & single[1][layer]
        assert either[layer] == single[0][layer] | single[1][layer]


@every_family
@pytest.mark.parametrize("apply", ["baked", "bias", "both"])
def test_every_way_to_apply_equals_one_full_pass(
    apply: Any, family: str, subject: Any, continued: Any, full_pass: Any
) -> None:
    found, heads = subject(family), {0: (0, 3), 1: (1,), 2: (0, 1, 2)}
    editor = LLMSteer(30.0, k=16, heads=heads, drop_sink=False, drop_punctuation=False, apply=apply)
    edited = found.apply(editor)
    bias = {}
    for layer, tokens in selected_by_hand(found, 16).items():
        bias[layer] = torch.zeros(4, found.memory.tokens_count)
        for head in heads.get(layer, ()):
            bias[layer][head, sorted(tokens)] = math.log(30.0)
    before, after = ({} if apply == "bias" else bias), ({} if apply == "baked" else bias)
    logits = continued(found.model, edited, found.continuation)
    expected = full_pass(found.model, found.memory.tokens, found.continuation, before, after)
    assert (logits - expected).abs().max() <= FP64_ORACLE
    assert (logits - found.logits).abs().max() > VISIBLE_EFFECT
    assert any(layer.bias is not None for layer in edited.layers.values()) == (apply != "baked")


def test_filters_leave_candidates_out_before_they_are_counted(subject: Any) -> None:
    found = subject("llama")
    source = found.memory.source
    spelled = [source.text[a:b] for a, b in source.offsets.tolist()]
    plain = [t for t, text in enumerate(spelled) if any(c.isalnum() for c in text)]
    assert len(plain) < len(spelled)
    everything = {"k": len(spelled), "drop_sink": False, "drop_punctuation": False}
    reader = reader_of(found)
    full = as_sets(select_tokens(found.memory, reader, **everything))
    assert all(tokens == set(range(len(spelled))) for tokens in full.values())
    words = as_sets(select_tokens(found.memory, reader, **{**everything, "drop_punctuation": True}))
    assert all(tokens == set(plain) for tokens in words.values())
    no_sink = as_sets(select_tokens(found.memory, reader, **{**everything, "drop_sink": True}))
    assert all(tokens == set(range(1, len(spelled))) for tokens in no_sink.values())
    few = select_tokens(found.memory, reader, k=3, prefixes=PREFIXES[:1])
    assert all(int(mask.sum()) == 3 for mask in few.values())


def test_of_a_chat_only_messages_are_candidates(subject: Any) -> None:
    found = subject("llama")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which day?"}]
    memory = kv.capture(found.model, found.tokenizer, chat)
    selection = select_tokens(memory, reader_of(found), fraction=1.0, drop_punctuation=False)
    inside = {
        token for message in memory.source.messages
        for token in range(*memory.source.token_range(message.start, message.stop))
    }  # fmt: skip
    assert all(tokens == inside for tokens in as_sets(selection).values())
    assert len(inside) < len(memory.source)


def test_the_prefix_stands_behind_bos_if_there_is_one(subject: Any) -> None:
    found, seen = subject("llama"), []

    class Watched(ModelReader):
        def read(self, memory: Any, tokens: Any, sites: Any) -> Any:
            seen.append(tokens.tolist())
            return super().read(memory, tokens, sites)

    reader = Watched(found.model, found.tokenizer)
    before = found.tokenizer(PREFIXES[0], add_special_tokens=False).input_ids
    selection = select_tokens(found.memory, reader, fraction=1.0)
    bos, *rest = found.memory.tokens.tolist()
    assert seen[0] == [bos, *before, *rest]
    assert not any(bool(mask[0]) for mask in selection.values())
    ids = kv.capture(found.model, found.tokenizer, found.memory.tokens[1:])
    select_tokens(ids, reader, fraction=1.0)
    assert seen[2] == [*before, *rest]


def test_a_fraction_is_of_the_context_and_rounds_up(subject: Any) -> None:
    found = subject("qwen3")
    total = found.memory.tokens_count
    for fraction in (0.01, 0.3, 1.0):
        by_share = LLMSteer(4.0, fraction=fraction, combine="or", apply="bias")
        by_count = LLMSteer(4.0, k=math.ceil(fraction * total), combine="or", apply="bias")
        one, two = (e.select(found.memory, reader_of(found)) for e in (by_share, by_count))
        assert all(torch.equal(one[layer], two[layer]) for layer in one)


def test_the_paper_s_prefixes_are_the_defaults() -> None:
    editor = build("llm_steer", alpha=2.0, k=3, apply="baked")
    assert editor.prefixes == PREFIXES
    assert len(PREFIXES) == 2
    assert editor == LLMSteer(2, 3, apply="baked")
    assert editor.reproducibility == "reader"


class Pretended(ModelReader):
    """A reader under whose prefixes given context tokens receive most attention."""

    def __init__(self, found: Any, *tops: list[int]) -> None:
        super().__init__(found.model, found.tokenizer)
        object.__setattr__(self, "tops", list(tops))
        object.__setattr__(self, "context", found.memory.tokens_count)

    def read(self, memory: Any, tokens: Any, sites: Any) -> Any:
        received = torch.ones(1, 4, len(tokens))
        received[..., [len(tokens) - self.context + token for token in self.tops.pop(0)]] = 9.0
        return {"received": dict.fromkeys(range(3), received)}


def test_an_empty_selection_is_an_error(subject: Any) -> None:
    found = subject("llama")
    options = {"k": 2, "drop_punctuation": False, "apply": "bias"}
    apart = Pretended(found, [5, 6], [7, 8])
    with pytest.raises(SpanNotFound, match="raise k or fraction, or take combine='or'"):
        LLMSteer(5.0, **options)(found.memory, reader=apart)
    shared = LLMSteer(5.0, **options)(found.memory, reader=Pretended(found, [5, 6], [6, 8]))
    union = LLMSteer(5.0, combine="or", **options)
    either = union(found.memory, reader=Pretended(found, [5, 6], [7, 8]))
    for edited, tokens in ((shared, [6]), (either, [5, 6, 7, 8])):
        for layer in edited.layers.values():
            assert layer.bias[0].nonzero().squeeze(1).tolist() == tokens
            assert torch.equal(layer.bias[:, tokens[0]], torch.full((4,), math.log(5.0)))


def test_dropped_slots_are_not_steered(subject: Any) -> None:
    found = subject("llama")
    dropped = Drop({"tokens": (3, 6)})(found.memory)
    editor = LLMSteer(5.0, k=2, drop_punctuation=False, apply="bias")
    edited = editor(dropped, reader=Pretended(found, [5, 6], [5, 6]))
    layer = edited.layers[0]
    assert layer.source[layer.bias[0] > 0].tolist() == [6]
    with pytest.raises(SpanNotFound, match="no steered layer has a token"):
        editor(dropped, reader=Pretended(found, [4, 5], [4, 5]))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": 0.5}, "alpha must be 1 or above, found 0.5"),
        ({"alpha": "much"}, "alpha: expected a finite number, found 'much'"),
        ({"k": None}, "one of k and fraction, found k=None, fraction=None"),
        ({"fraction": 0.5}, "one of k and fraction, found k=3, fraction=0.5"),
        ({"k": 0}, "k: expected a whole number from 1, found 0"),
        ({"k": 2.5}, "k: expected a whole number from 1, found 2.5"),
        ({"k": None, "fraction": 1.5}, r"fraction must lie in \(0, 1\], found 1.5"),
        ({"combine": "xor"}, "combine must be 'and' or 'or', found 'xor'"),
        ({"prefixes": ()}, "prefixes: expected one text or more, found"),
        ({"prefixes": ("a", 3)}, "prefixes: expected one text or more, found"),
        ({"drop_sink": 1}, "drop_sink must be true or false, found 1"),
        ({"apply": "compiled"}, "apply must be one of .*found 'compiled'"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"alpha": 3.0, "k": 3, "apply": "bias", **parameters}
    with pytest.raises(InvalidArgument, match=message):
        LLMSteer(**given)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "one of k and fraction, found k=None, fraction=None"),
        ({"k": 0}, "k must be 1 or above.*found k=0"),
        ({"fraction": 2.0}, "fraction lie in .*found k=None, fraction=2.0"),
        ({"k": 1, "combine": "xor"}, "combine 'and' or 'or' .*found 'xor'"),
        ({"k": 1, "prefixes": []}, "a list of prefixes, found"),
        ({"k": 1, "prefixes": "Read."}, "a list of prefixes, found"),
    ],
    ids=str,
)
def test_the_function_checks_too(parameters: dict[str, Any], message: str, subject: Any) -> None:
    found = subject("llama")
    with pytest.raises(InvalidArgument, match=message):
        select_tokens(found.memory, reader_of(found), **parameters)


def test_nothing_left_to_choose_from(subject: Any) -> None:
    found = subject("llama")
    marks = kv.capture(found.model, found.tokenizer, "?! ...")
    with pytest.raises(InvalidArgument, match="relax drop_sink or drop_punctuation"):
        select_tokens(marks, reader_of(found), k=2)


def test_it_needs_tokens_and_a_model(subject: Any) -> None:
    found = subject("llama")
    editor = LLMSteer(3.0, k=4, apply="bias")
    with pytest.raises(InvalidArgument, match="reads with the model"):
        editor(found.memory)
    with pytest.raises(InvalidArgument, match=r"make ModelReader\(model, tokenizer\)"):
        editor(found.memory, reader=ModelReader(found.model))
    layers = {
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in found.memory.layers.items()
    }
    bare = dataclasses.replace(found.memory, layers=layers, source=None)
    with pytest.raises(InvalidArgument, match="this memory has none"):
        found.apply(editor, bare)
    with pytest.raises(InvalidArgument, match="3 layers, found 8"):
        found.apply(LLMSteer(3.0, k=4, heads={8: [0]}, apply="bias"))
