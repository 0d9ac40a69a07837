"""Reading: batches, padding, chats, tokens read; and going on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from kvedit.errors import (
    AmbiguousSpan,
    ContextTooLong,
    InvalidArgument,
    SpanNotFound,
    UnknownName,
)
from kvedit.memory import Source, Span, SpanQuery
from kvedit.models.tiny import tiny_model
from kvedit.steering import Contrast, Readings, read_contrast, reading
from kvedit.steering.contexts import read_tokens, side_source

SITES = ("keys", "values", "residual", "attention")
TEXTS = [
    ("First we count the jars, then we add the boxes, therefore nine", "Nine"),
    ("One two three four five six seven eight nine ten eleven twelve", "A thing is here"),
    ("It is so", "It is not so, and there is more to be said about that than this"),
    ("Step by step", "At once!"),
]
CHATS = [
    ([("user", "How many?"), ("assistant", "First, we count")], [("user", "How many is that?")]),
    ([("user", "Where?")], [("user", "Where is the box, if it is not in the hall?")]),
]


def flat(readings):
    return {
        (side, site, layer): vector
        for side, each in (("+", readings.positive), ("-", readings.negative))
        for site, layers in each.items()
        for layer, vector in layers.items()
    }


def distance(one, other):
    pairs = zip(flat(one).values(), flat(other).values(), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


FAMILIES = "llama gemma3 gpt_neox qwen3 gpt2 opt gpt_oss llama4_text"
MORE = "gemma2 mistral cohere2"  # windows again, as in Gemma 3


@pytest.mark.parametrize(
    "family",
    [*FAMILIES.split(), *(pytest.param(name, marks=pytest.mark.slow) for name in MORE.split())],
)
def test_batches_and_padding_change_nothing(tiny, family):
    model, tokenizer = tiny(family)
    contrast = Contrast.of(TEXTS)
    for read in ("last", "mean"):
        single = read_contrast(model, tokenizer, contrast, sites=SITES, read=read, batch=1)
        for batch in (3, 8):
            many = read_contrast(model, tokenizer, contrast, sites=SITES, read=read, batch=batch)
            assert distance(many, single) <= 1e-6, (read, batch)


@pytest.mark.parametrize("rope", ["linear", "yarn", "longrope", "llama3", "dynamic"])
def test_rotation_of_every_type_is_undone(tiny, rope):
    model, tokenizer = tiny("llama", rope=rope)
    seen = []
    hooks = [
        block.self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.append(out[0, -1]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(tokenizer(TEXTS[0][0], return_tensors="pt")["input_ids"])
    for hook in hooks:
        hook.remove()
    found = read_contrast(model, tokenizer, Contrast.of(TEXTS), sites="keys", batch=4)
    for layer, keys in enumerate(seen):
        mine = found.positive["keys"][layer][0].flatten()
        torch.testing.assert_close(mine, keys, atol=2e-6, rtol=2e-6)


def test_rows_are_given_back_in_the_order_of_the_pairs(tiny):
    model, tokenizer = tiny()
    whole = read_contrast(model, tokenizer, Contrast.of(TEXTS), batch=3)
    for index, pair in enumerate(TEXTS):
        one = read_contrast(model, tokenizer, Contrast.of([pair]))
        assert distance(whole.part([index]), one) <= 1e-6
    swapped = read_contrast(model, tokenizer, Contrast.of([(b, a) for a, b in TEXTS]), batch=3)
    for site, layers in whole.positive.items():
        for layer, states in layers.items():
            assert torch.equal(states, swapped.negative[site][layer])


def test_chats_end_with_the_prompt_or_stay_open(tiny):
    _, tokenizer = tiny()
    asked, answered = CHATS[0][1], CHATS[0][0]
    plain = [{"role": role, "content": content} for role, content in asked]
    cut = Contrast.of([(asked, answered)]).pairs[0]
    expected = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert side_source(tokenizer, cut.positive, None).text == expected
    assert side_source(tokenizer, cut.positive, True).text == expected
    without = side_source(tokenizer, cut.positive, False).text
    assert expected.startswith(without) and len(without) < len(expected)
    assert side_source(tokenizer, cut.negative, None).text.endswith("First, we count")
    closed = side_source(tokenizer, cut.negative, False).text
    assert "First, we count" in closed and not closed.endswith("count")


def test_chats_are_read_as_their_rendering(tiny):
    model, tokenizer = tiny()
    contrast = Contrast.of(CHATS)
    texts = [
        tuple(
            tokenizer(side_source(tokenizer, side, None).text, add_special_tokens=False)[
                "input_ids"
            ]
            for side in (pair.positive, pair.negative)
        )
        for pair in contrast.pairs
    ]
    chats = read_contrast(model, tokenizer, contrast, sites=SITES, batch=4)
    ids = read_contrast(model, tokenizer, Contrast.of(texts), sites=SITES, batch=4)
    assert distance(chats, ids) == 0
    assert chats.facts["tokens"] == ids.facts["tokens"]
    assert chats.facts["contrast"] != ids.facts["contrast"]


def test_a_tokenizer_without_template_is_named(tiny):
    _, tokenizer = tiny()
    pair = Contrast.of(CHATS).pairs[0]
    with pytest.raises(InvalidArgument, match="chat template"):
        side_source(None, pair.positive, None)

    class Refusing:
        chat_template = "x"

        def apply_chat_template(self, *args, **options):
            raise RuntimeError("roles must alternate")

    with pytest.raises(InvalidArgument, match=r"does not take.*roles must alternate"):
        side_source(Refusing(), pair.positive, None)


# -- tokens read -------------------------------------------------------------------------------


def test_tokens_read(tiny):
    _, tokenizer = tiny()
    source = side_source(tokenizer, "The box is red. The box is blue.", None)

    def spelled(read):
        index = read_tokens(source, read, tokenizer).tolist()
        return "".join(source.text[source.offsets[i, 0] : source.offsets[i, 1]] for i in index)

    total = len(source)
    assert read_tokens(source, "last", tokenizer).tolist() == [total - 1]
    assert read_tokens(source, -2, tokenizer).tolist() == [total - 2]
    assert read_tokens(source, -total, tokenizer).tolist() == [0]
    assert read_tokens(source, "mean", tokenizer).tolist() == list(range(1, total))
    assert "red" in spelled("red") and len(spelled("red")) < 8
    assert "blue" in spelled(SpanQuery(sentence="blue"))
    assert spelled({"text": "box", "occurrence": 2}) == spelled({"text": "box", "occurrence": 1})
    assert read_tokens(source, SpanQuery(tokens=(-3, -1)), tokenizer).tolist() == [
        total - 3, total - 2,
    ]  # fmt: skip
    with pytest.raises(AmbiguousSpan):
        spelled("box")
    with pytest.raises(SpanNotFound, match="nothing matches"):
        spelled("list")
    for wrong in (0, 3, -total - 1, True):
        with pytest.raises(InvalidArgument, match="counts from the end"):
            spelled(wrong)


def test_mean_leaves_special_tokens_out(tiny):
    _, tokenizer = tiny()
    special = tokenizer.all_special_ids[0]
    plain = tokenizer("The box", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([plain[0], special, *plain, special])
    source = Source(ids, "", torch.zeros(len(ids), 2, dtype=torch.int64))
    assert read_tokens(source, "mean", tokenizer).tolist() == list(range(2, 2 + len(plain)))
    alone = Source(ids[1:2], "", torch.zeros(1, 2, dtype=torch.int64))
    assert read_tokens(alone, "mean", tokenizer).tolist() == [0]


def test_a_span_is_the_mean_of_its_tokens(tiny):
    model, tokenizer = tiny()
    pairs = Contrast.of([("We count the jars here", "Then the jars are full of sand and salt")])
    found = read_contrast(model, tokenizer, pairs, sites=SITES, read="the jars", batch=2)
    source = side_source(tokenizer, pairs.pairs[0].positive, None)  # the shorter side
    index = [i for a, b in SpanQuery(text="the jars").find(source).ranges for i in range(a, b)]
    assert len(index) > 1
    singles = [
        read_contrast(model, tokenizer, pairs, sites=SITES, read=i - len(source)).positive
        for i in index
    ]
    for site, layers in found.positive.items():
        for layer, vector in layers.items():
            expected = torch.stack([one[site][layer] for one in singles]).mean(dim=0)
            torch.testing.assert_close(vector, expected, atol=2e-6, rtol=2e-6)


# -- refusals ----------------------------------------------------------------------------------


def test_what_can_not_be_read_is_refused(tiny):
    model, tokenizer = tiny()
    contrast = Contrast.of(TEXTS)

    def run(**arguments):
        read_contrast(model, tokenizer, contrast, **arguments)

    with pytest.raises(UnknownName, match=r"site of a delta 'key'.*keys"):
        run(sites="key")
    with pytest.raises(InvalidArgument, match="which sites"):
        run(sites=())
    with pytest.raises(UnknownName, match="layer '3'"):
        run(layers=[3])
    with pytest.raises(InvalidArgument, match="batch"):
        run(batch=0)
    with pytest.raises(InvalidArgument, match="counts from the end"):
        run(read=0)
    with pytest.raises(InvalidArgument, match="no Span"):
        run(read=Span(((0, 1),)))
    with pytest.raises(InvalidArgument, match="slots"):
        run(read=SpanQuery(slots=(0, 1)))
    with pytest.raises(InvalidArgument, match=r"-9 for a context|found -9"):
        run(read=-9)
    with pytest.raises(InvalidArgument, match="needs a tokenizer"):
        read_contrast(model, None, contrast)


def test_contexts_past_the_positions_are_refused(tiny):
    long = list(range(10, 80))
    model, _ = tiny("llama", rope="dynamic")
    with pytest.raises(ContextTooLong, match=r"70 tokens.*up to 64"):
        read_contrast(model, None, Contrast.of([(long, long[:3])]))
    model, _ = tiny("gpt2")
    with pytest.raises(ContextTooLong, match="up to 1024"):
        read_contrast(model, None, Contrast.of([(long * 20, long[:3])]))


def test_layers_and_hooks(tiny):
    model, tokenizer = tiny()
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    found = read_contrast(model, tokenizer, Contrast.of(TEXTS), sites=SITES, layers=[-1, 0])
    assert found.layers == (0, 2) and found.sites == SITES and found.pairs == 4
    with pytest.raises(UnknownName, match="reading 'keys, 1'"):
        found.sides("keys", 1)
    after = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert before == after


def test_readings_must_fit_each_other(tiny):
    spec = read_contrast(*tiny(), Contrast.of(TEXTS[:1])).model
    one, two = torch.ones(1, 2, 16), torch.ones(2, 2, 16)
    with pytest.raises(ValueError, match="equal shapes"):
        Readings({"keys": {0: one}}, {"keys": {0: two}}, spec, {})
    with pytest.raises(InvalidArgument, match="one row per pair"):
        both = {"keys": {0: one, 1: two}}
        Readings(both, both, spec, {})


# -- going on ----------------------------------------------------------------------------------


def stopped(monkeypatch, after):
    """Makes reading fail after some batches, and counts them."""
    real, seen = reading.pick, []

    def pick(*args):
        if len(seen) >= after:
            raise KeyboardInterrupt
        seen.append(len(args[2]))
        return real(*args)

    monkeypatch.setattr(reading, "pick", pick)
    return seen


def test_a_stopped_reading_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny()
    contrast = Contrast.of(TEXTS)

    def run(folder=None):
        return read_contrast(model, tokenizer, contrast, sites=SITES, batch=3, folder=folder)

    whole = run()
    with monkeypatch.context() as patch:
        stopped(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "read")
    with monkeypatch.context() as patch:
        seen = stopped(patch, 99)
        assert distance(run(tmp_path / "read"), whole) == 0
        assert seen == [2]  # eight rows in batches of three: one was left
    with monkeypatch.context() as patch:
        seen = stopped(patch, 0)
        assert distance(run(tmp_path / "read"), whole) == 0
        assert not seen
    assert sorted(file.name for file in (tmp_path / "read").iterdir()) == [
        "batch-00000.safetensors", "batch-00001.safetensors", "batch-00002.safetensors",
        "journal.jsonl",
    ]  # fmt: skip


def test_what_a_kill_leaves_is_read_again(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny()

    def run():
        return read_contrast(model, tokenizer, Contrast.of(TEXTS), batch=2, folder=tmp_path)

    whole = run()
    journal, batch = tmp_path / "journal.jsonl", tmp_path / "batch-00001.safetensors"
    data = batch.read_bytes()
    for damage, expected in (
        (lambda: journal.write_bytes(journal.read_bytes()[:-10]), 1),  # the last line cut short
        (lambda: batch.write_bytes(data[:-3]), 1),
        (lambda: batch.write_bytes(data[:-1] + bytes([data[-1] ^ 1])), 1),
        (batch.unlink, 1),
        (lambda: (tmp_path / ".batch-00009.safetensors.x").write_bytes(b"half"), 0),
    ):
        damage()
        with monkeypatch.context() as patch:
            seen = stopped(patch, 99)
            assert distance(run(), whole) == 0
            assert len(seen) == expected


def test_a_folder_of_something_else_is_refused(tiny, tmp_path):
    model, tokenizer = tiny()
    contrast = Contrast.of(TEXTS)
    read_contrast(model, tokenizer, contrast, folder=tmp_path)
    other, _ = tiny(seed=1)
    for arguments, match in (
        ({"read": "mean"}, "read"), ({"sites": "keys"}, "sites"), ({"batch": 5}, "batch"),
        ({"layers": [0]}, "layers"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=f"something else .*{match}"):
            read_contrast(model, tokenizer, contrast, folder=tmp_path, **arguments)
    with pytest.raises(InvalidArgument, match="model"):
        read_contrast(other, tokenizer, contrast, folder=tmp_path)
    with pytest.raises(InvalidArgument, match="contrast, pairs, tokens"):
        read_contrast(model, tokenizer, Contrast.of(TEXTS[:2]), folder=tmp_path)
    (tmp_path / "journal.jsonl").write_text("no journal\n")
    with pytest.raises(InvalidArgument, match="no journal of ours"):
        read_contrast(model, tokenizer, contrast, folder=tmp_path)
    header = json.dumps({"format": "other"})
    (tmp_path / "journal.jsonl").write_text(header + "\n")
    with pytest.raises(InvalidArgument, match="something else"):
        read_contrast(model, tokenizer, contrast, folder=tmp_path)


CHILD = """
import sys, time
from kvedit.models.tiny import tiny_model
from kvedit.steering import Contrast, read_contrast, reading
real = reading.pick
def slow(*args):
    time.sleep(0.3)
    return real(*args)
reading.pick = slow
model, tokenizer = tiny_model("llama")
read_contrast(model, tokenizer, Contrast.of(eval(sys.argv[2])), batch=1, folder=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_batch(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny()
    whole = read_contrast(model, tokenizer, Contrast.of(TEXTS), batch=1)
    journal = tmp_path / "journal.jsonl"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), repr(TEXTS)])
    limit = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert child.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    child.kill()
    child.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 2 <= done < 8
    seen = stopped(monkeypatch, 99)
    found = read_contrast(model, tokenizer, Contrast.of(TEXTS), batch=1, folder=tmp_path)
    assert distance(found, whole) <= 1e-6  # the child may use another number of threads
    assert len(seen) == 8 - done


@pytest.mark.parametrize(
    "attn",
    ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)],  # it compiles
)
def test_backends_read_the_same(tiny, attn):
    contrast = Contrast.of(TEXTS)
    plain = read_contrast(*tiny(), contrast, sites=SITES)
    other = read_contrast(*tiny_model("llama", attn=attn), contrast, sites=SITES)
    assert distance(other, plain) <= 2e-6


def test_half_precision_is_read_in_float32(tiny):
    contrast = Contrast.of(TEXTS)
    plain = read_contrast(*tiny(), contrast, sites=SITES)
    half = read_contrast(*tiny_model("llama", dtype=torch.bfloat16), contrast, sites=SITES)
    assert half.facts["dtype"] == "bfloat16"
    assert all(vector.dtype == torch.float32 for vector in flat(half).values())
    assert 1e-4 < distance(half, plain) < 0.1
