"""Masked and packed: the same attention, exact keys and values, and what can't be packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize, Keep, Knorm, KVZip, SnapKV, SpotLight, Suppress
from kvedit.errors import InvalidArgument
from kvedit.models.cache_argument import cache_argument
from kvedit.testing import recompute
from kvedit.testing.tolerances import FP64_ORACLE, VISIBLE_EFFECT

EDITORS = [
    lambda layout: Knorm(0.3, sinks=1, layout=layout),
    lambda layout: SnapKV(14, window=4, layout=layout),
]
FULL = ("llama", "qwen3", "gpt_neox", "smollm3", "gpt2")
MIXED = ("gemma3", "cohere2", "gpt_oss")


@pytest.mark.parametrize("family", [*FULL, *MIXED])
@pytest.mark.parametrize("make", EDITORS, ids=["knorm", "snap-kv"])
def test_masked_and_packed_give_the_same_attention(
    make: Any, family: str, subject: Any, continued: Any
) -> None:
    found = subject(family)
    masked, packed = (found.apply(make(layout)) for layout in ("masked", "packed"))
    logits = [continued(found.model, memory, found.continuation) for memory in (masked, packed)]
    scale = logits[0].abs().max()
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * scale
    assert (logits[0] - found.logits).abs().max() > VISIBLE_EFFECT
    for index, layer in packed.layers.items():
        if found.memory.model.layers[index].window is not None:
            assert layer is found.memory.layers[index] is masked.layers[index]
            continue
        assert layer.slots < masked.layers[index].slots  # the union is larger
        assert layer.bias is None and masked.layers[index].bias is not None
        assert (layer.source == -1).all()
        assert (masked.layers[index].source == masked.layers[index].positions).all()
    assert packed.next_position == masked.next_position == found.memory.next_position


def test_packed_slots_are_each_heads_own_bits(subject: Any, kept_sets: Any) -> None:
    found = subject("qwen3")
    masked, packed = (found.apply(make) for make in (Knorm(9), Knorm(9, layout="packed")))
    for index, layer in packed.layers.items():
        whole = found.memory.layers[index]
        sets = [sorted(kept) for kept in kept_sets(masked, index)]
        assert sets[0] != sets[1]
        for head, kept in enumerate(sets):
            assert torch.equal(layer.keys[head], whole.keys[head, kept])
            assert torch.equal(layer.values[head], whole.values[head, kept])
        # Nominal positions: the later of the two heads'.
        assert layer.positions.tolist() == [max(pair) for pair in zip(*sets, strict=True)]
    assert packed.servable().ok
    assert not masked.servable().ok


def test_heads_that_agree_keep_their_tokens_in_either_layout(subject: Any) -> None:
    found = subject("llama")
    for layout in ("masked", "packed"):
        edited = found.apply(Knorm(9, heads="shared", layout=layout))
        for layer in edited.layers.values():
            assert layer.bias is None and layer.slots == 9
            assert torch.equal(layer.source, layer.positions)
        assert edited.servable().ok


@pytest.mark.parametrize("family", FULL)
def test_decoding_after_it_is_transformers_own_over_the_packed_keys(
    family: str, subject: Any
) -> None:
    """Turn by turn, against a plain cache and positions that go on behind the whole context."""
    from transformers import DynamicCache

    found = subject(family)
    packed = found.apply(Knorm(12, layout="packed"))
    cache = DynamicCache()
    for index, layer in packed.layers.items():
        cache.update(layer.keys[None], layer.values[None], index)
    at, ids = found.memory.next_position, found.continuation
    turns = [ids[:5], ids[5:6], ids[6:9], ids[9:]]
    with kv.attach(found.model, packed) as session:
        ours = torch.cat([session.forward(turn[None])[0] for turn in turns])
        grown = session.memory()
    plain = []
    for turn in turns:
        with torch.no_grad():
            options = {cache_argument(found.model): cache}
            positions = torch.arange(at, at + len(turn))[None]
            # A mask over slots: transformers' default counts positions, of which it has fewer.
            mask = torch.zeros(
                1, 1, len(turn), cache.get_seq_length() + len(turn), dtype=at_dtype(found)
            )
            mask[..., -len(turn) :] += torch.full((len(turn), len(turn)), -1e30).triu(1)
            plain.append(
                found.model(
                    turn[None], position_ids=positions, attention_mask=mask, **options
                ).logits[0]
            )
        at += len(turn)
    assert (ours - torch.cat(plain)).abs().max() <= FP64_ORACLE
    assert grown.next_position == at
    assert grown.layers[0].slots == 12 + len(ids)


def at_dtype(found: Any) -> torch.dtype:
    return found.model.dtype


def test_generation_over_several_turns(subject: Any) -> None:
    found = subject("llama", torch.float32)
    chat = [{"role": "user", "content": "The box holds an answer. " * 3}]
    memory = kv.capture(found.model, found.tokenizer, chat)
    replies = []
    for layout in ("masked", "packed"):
        edited = found.apply(SnapKV(24, window=8, layout=layout), memory)
        with kv.attach(found.model, edited, found.tokenizer) as session:
            said = [session.generate(text, max_new_tokens=6) for text in ("What?", "And then?")]
            grown = session.memory()
        replies.append([reply.tokens for reply in said])
        assert grown.tokens_count - grown.next_position == 0
        again = found.apply(Knorm(20, recent=5), grown)  # what has grown can be compacted again
        with kv.attach(found.model, again, found.tokenizer) as session:
            assert session.generate("So?", max_new_tokens=3).tokens
    assert replies[0] == replies[1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_after_other_edits_it_equals_the_recomputation(
    family: str, subject: Any, continued: Any, kept_sets: Any
) -> None:
    """Bias stays, and what a head lost it never gets back."""
    found = subject(family)
    memory = Drop({"tokens": [10, 20]})(found.memory)
    memory = Emphasize("you would", strength=1.5)(memory)
    memory = Suppress({"tokens": [30, 45]}, strength=float("inf"), kv_heads=(1,))(memory)
    memory = Suppress({"tokens": [25, 28]}, strength=float("inf"), heads=(0,))(memory)
    for editor in (
        Knorm(0.4), Knorm(9, heads="shared"), SnapKV(15, window=3), KVZip(0.4, chunk=30),
    ):  # fmt: skip
        edited = found.apply(editor, memory)
        logits = continued(found.model, edited, found.continuation)
        expected = recompute(found.model, edited, found.continuation)
        assert (logits - expected).abs().max() <= FP64_ORACLE
        for index, layer in edited.layers.items():
            second = kept_sets(edited, index)[1]
            assert not second & set(range(30, 45))
            assert not second & set(range(10, 20))
            old = memory.layers[index]
            assert old.bias is not None and layer.bias is not None
            where = [old.source.tolist().index(s) for s in layer.source.tolist()]
            finite = layer.bias > -torch.inf
            assert torch.equal(layer.bias[finite], old.bias[:, where][finite])


def test_packing_takes_the_bias_along(subject: Any, continued: Any) -> None:
    found = subject("qwen3")
    memory = Emphasize({"tokens": [3, 40]}, strength=2.0, heads=(1, 2))(found.memory)
    masked, packed = (
        found.apply(Knorm(0.3, layout=layout), memory) for layout in ("masked", "packed")
    )
    logits = [continued(found.model, memory, found.continuation) for memory in (masked, packed)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    assert set(packed.layers[0].bias.unique().tolist()) == {0.0, 2.0}


def test_what_cannot_be_packed_says_why(subject: Any) -> None:
    found = subject("llama")
    with pytest.raises(InvalidArgument, match=r"keep \[\d+, \d+\] slots.*layout='masked'"):
        found.apply(KVZip(0.3, layout="packed"))
    lost = Suppress({"tokens": [0, 30]}, strength=float("inf"), kv_heads=(0,))(found.memory)
    with pytest.raises(InvalidArgument, match=r"keep \[12, 27\] slots"):
        found.apply(Knorm(0.5, layout="packed"), lost)
    assert found.apply(Knorm(20, layout="packed"), lost).layers[0].slots == 20
    ruled = SpotLight("you would", target=0.4)(found.memory)
    with pytest.raises(InvalidArgument, match="rules that name tokens"):
        found.apply(Knorm(0.5, layout="packed"), ruled)
    sliding = subject("gemma3")
    with pytest.raises(InvalidArgument, match=r"layer 0 attends within a window"):
        sliding.apply(Knorm(3, layers=(0,), layout="packed"))
    assert (
        sliding.apply(Knorm(3, layers=(0,), layout="packed", heads="shared")).layers[0].slots == 3
    )


def test_ragged_layers_keep_at_least_one_slot_per_head(subject: Any, kept_sets: Any) -> None:
    found = subject("llama")
    edited = found.apply(KVZip(0.04, sinks=0))  # two slots per head
    sizes = [len(kept) for i in edited.layers for kept in kept_sets(edited, i)]
    assert min(sizes) >= 1
    assert sum(sizes) == 2 * len(sizes)
    assert len(set(sizes)) > 1
    alone = Keep({"tokens": [4, 6]}, layers=(0,))(found.memory)
    shared = found.apply(KVZip(0.3, heads="shared", sinks=1), alone)
    assert all(kept_sets(shared, i)[0] == kept_sets(shared, i)[1] for i in shared.layers)
