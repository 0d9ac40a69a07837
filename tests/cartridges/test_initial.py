"""Starts: what they are made of, against captures and counts."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import initial, train
from kvedit.cartridges.plan import TrainPlan
from kvedit.editors import Drop, Keep
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.models.rope import unrotate

CORPUS = " ".join(f"Item {n} costs {n * 7} coins and stands in hall {n % 5}." for n in range(40))


def tokens_of(found, text):
    return kv.capture(found.model, found.tokenizer, text).tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_first_tokens_are_a_capture_of_the_text_cut_short(family, subject):
    found = subject(family)
    made = initial.first_tokens(found.model, found.tokenizer, CORPUS, 24)
    expected = kv.capture(found.model, None, tokens_of(found, CORPUS)[:24])
    assert (made.slots, made.next_position) == (24, 24)
    for a, b in zip(made.layers.values(), expected.layers.values(), strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_of_a_memory_they_are_its_first_slots_and_its_source_stays(subject):
    found = subject()
    made = initial.first_tokens(found.model, found.tokenizer, found.memory, 0.25)
    count = int(found.memory.slots * 0.25)
    assert (made.slots, made.next_position) == (count, count)
    assert made.source == found.memory.source
    assert torch.equal(made.layers[1].keys, found.memory.layers[1].keys[:, :count])
    gap = Drop(span="thing")(found.memory)
    with pytest.raises(InvalidArgument, match="each of the first"):
        initial.first_tokens(found.model, found.tokenizer, gap, 20)


def test_chunks_are_whole_apart_in_order_and_of_the_corpus(subject):
    found = subject()
    tokens = tokens_of(found, CORPUS).tolist()
    made = initial.sampled_chunks(found.model, found.tokenizer, CORPUS, 45, chunk=10, seed=3)
    lead = int(tokens[0] == found.tokenizer.bos_token_id)
    assert made.slots == lead + (45 - lead) // 10 * 10
    read = made.tokens.tolist()
    assert read[:lead] == tokens[:lead]
    after = lead
    for start in range(lead, len(read), 10):
        piece = read[start : start + 10]
        place = next(i for i in range(after, len(tokens)) if tokens[i : i + 10] == piece)
        after = place + 10
    expected = kv.capture(found.model, None, made.tokens)
    assert torch.equal(made.layers[2].values, expected.layers[2].values)


def test_chunks_are_placed_evenly_and_by_their_seed(subject):
    found = subject()
    ids = torch.arange(10, 34)  # 24 tokens, 3 chunks of 7: 3 free ones, 20 placements
    seen = {
        tuple(
            initial.sampled_chunks(found.model, None, ids, 21, chunk=7, seed=seed).tokens.tolist()
        )
        for seed in range(40)
    }
    assert len(seen) > 12
    assert all(list(one) == sorted(set(one)) for one in seen)
    one, two = (initial.sampled_chunks(found.model, None, ids, 21, chunk=7) for _ in range(2))
    assert one.digest == two.digest


def test_a_corpus_beyond_the_model_s_context_can_be_sampled(subject):
    found = subject()
    long = torch.arange(10, 300).repeat(100)
    assert len(long) > found.memory.model.max_position
    made = initial.sampled_chunks(found.model, None, long, 32, chunk=16)
    assert made.slots == 32
    assert initial.first_tokens(found.model, None, long, 8).tokens.tolist() == list(range(10, 18))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_random_vectors_have_the_model_s_statistics_before_rope(family, subject):
    found = subject(family)
    made = initial.random_vectors(found.model, found.tokenizer, 400, seed=1)
    known = initial.text_tokens(found.model, found.tokenizer, 512)
    for index, layer in made.layers.items():
        rope = made.model.layers[index].rope
        drawn = unrotate(layer.keys, rope, layer.positions)[:, 1:]
        real = unrotate(known.layers[index].keys, rope, known.layers[index].positions)[:, 1:]
        for a, b in ((drawn, real), (layer.values[:, 1:], known.layers[index].values[:, 1:])):
            deviation = b.std(dim=1)
            # 400 draws: the mean errs by a twentieth of a deviation, a deviation by 1 in 28
            assert ((a.mean(dim=1) - b.mean(dim=1)).abs() < 0.3 * deviation).all()
            assert ((a.std(dim=1) / deviation - 1).abs() < 0.25).all()
        assert torch.equal(layer.keys[:, 0], known.layers[index].keys[:, 0])
        assert set(layer.source.tolist()) == {-1}
    assert (made.source, made.next_position) == (None, 400)


def test_unit_vectors_are_normal_and_follow_the_seed(subject):
    found = subject()
    make = [
        initial.random_vectors(
            found.model, found.tokenizer, 300, seed=seed, scale="unit", sink=False
        )
        for seed in (0, 0, 1)
    ]
    assert make[0].digest == make[1].digest != make[2].digest
    keys = make[0].layers[0].keys
    assert abs(float(keys.mean())) < 0.05
    assert abs(float(keys.std()) - 1) < 0.05


def test_a_summary_is_what_the_model_wrote_read_on_its_own(subject):
    found = subject()
    made = initial.summary(found.model, found.tokenizer, found.memory, 16)
    assert 2 <= made.slots <= 16
    expected = kv.capture(found.model, None, made.tokens)
    assert torch.equal(made.layers[0].keys, expected.layers[0].keys)


def test_any_editor_gives_a_start(subject, samples):
    found = subject()
    made = initial.edited(found.model, found.tokenizer, found.memory, Keep(span="60 days"))
    assert made.slots < found.memory.slots
    text = initial.edited(found.model, found.tokenizer, CORPUS[:60], kv.editors.Chain())
    assert text.digest == kv.capture(found.model, found.tokenizer, CORPUS[:60]).digest
    assert train(found.model, made, samples, TrainPlan(steps=1)).slots == made.slots


def test_what_stands_for_a_context_is_continued_like_it(subject):
    found = subject()
    start = initial.random_vectors(found.model, found.tokenizer, 8)
    made = initial.stand_for(start, found.memory)
    assert made.source == found.memory.source
    assert set(made.layers[0].source.tolist()) == {-1}
    assert made.layers[0].keys is start.layers[0].keys
    names = [node.name for node in made.lineage.nodes]
    assert names == ["random_vectors", "capture", "stand_for"]
    with pytest.raises(IncompatibleModel, match="differ"):
        initial.stand_for(start, subject("qwen3").memory)


def test_starts_that_can_not_be_made_are_refused(subject):
    found = subject()
    model, tokenizer = found.model, found.tokenizer
    with pytest.raises(InvalidArgument, match="500 slots were asked for and the corpus has"):
        initial.first_tokens(model, tokenizer, "Short.", 500)
    with pytest.raises(InvalidArgument, match="hold no chunk of 64"):
        initial.sampled_chunks(model, tokenizer, CORPUS, 40)
    with pytest.raises(InvalidArgument, match="empty"):
        initial.first_tokens(model, tokenizer, "", 5)
    with pytest.raises(InvalidArgument, match="empty"):
        initial.sampled_chunks(model, tokenizer, "", 5)
    with pytest.raises(InvalidArgument, match="budget"):
        initial.first_tokens(model, tokenizer, CORPUS, 1.5)
    with pytest.raises(InvalidArgument, match="scale"):
        initial.random_vectors(model, tokenizer, 5, scale="big")
