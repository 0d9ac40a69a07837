"""HeadSet: one form for every way to name heads, and explicit conversions between kinds."""

from __future__ import annotations

import json

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.memory import HeadSet
from kvedit.models.tiny import tiny_model


@pytest.fixture(scope="module")
def spec():
    model, tokenizer = tiny_model("llama")
    return kv.capture(model, tokenizer, "a box").model


def test_every_spelling_of_one_set_is_equal(spec):
    wanted = HeadSet(((0, (1,)), (2, (0, 3))))
    for spelling in (
        {0: [1], 2: [3, 0]},
        {"0": [1], "2": [0, 3, 3]},
        [(2, 0), (0, 1), (2, 3)],
        {"heads": {"0": [1], "2": [0, 3]}, "kind": "query"},
        wanted.to_json(),
        wanted,
    ):
        assert HeadSet.of(spelling) == wanted
        assert hash(HeadSet.of(spelling)) == hash(wanted)
    assert len(wanted) == 3
    assert wanted.pairs == ((0, 1), (2, 0), (2, 3))


@pytest.mark.parametrize(
    "bad", [{}, {0: []}, {"a": [1]}, {0: [-1]}, {0: [1.5]}, [1, 2], 3, {0: [True]}, "all"]
)
def test_what_is_no_head_set_is_refused(bad):
    with pytest.raises(InvalidArgument):
        HeadSet.of(bad)


def test_kinds_convert_by_groups(spec):
    facts = spec.layers[0]
    assert facts.group > 1, "the conversion is trivial without grouped queries"
    kv_heads = HeadSet.of({1: [facts.kv_heads - 1]}, "kv")
    query = kv_heads.to_query(spec)
    first = (facts.kv_heads - 1) * facts.group
    assert query.pairs == tuple((1, first + i) for i in range(facts.group))
    assert query.to_kv(spec) == kv_heads
    # One query head touches its whole group: that is wider, and never silently narrower.
    assert HeadSet.of({1: [first]}).to_kv(spec) == kv_heads
    assert kv_heads.mask(spec, 1).nonzero().flatten().tolist() == [h for _, h in query.pairs]
    assert not kv_heads.mask(spec, 0).any()


def test_heads_that_the_model_lacks_are_refused(spec):
    for bad in ({99: [0]}, {0: [spec.layers[0].query_heads]}):
        with pytest.raises(InvalidArgument, match=r"found (head )?\d+"):
            HeadSet.of(bad).check(spec)
    with pytest.raises(InvalidArgument, match="kv heads"):
        HeadSet.of({0: [spec.layers[0].kv_heads]}, "kv").to_query(spec)


def test_all_and_random(spec):
    every = HeadSet.all(spec)
    assert len(every) == sum(layer.query_heads for layer in spec.layers)
    assert all(bool(every.mask(spec, i).all()) for i in range(len(spec.layers)))
    drawn = HeadSet.random(spec, 3, seed=0)
    assert len(drawn) == 3
    assert set(drawn.pairs) < set(every.pairs)
    assert drawn == HeadSet.random(spec, 3, seed=0)
    assert len({HeadSet.random(spec, 3, seed=seed) for seed in range(8)}) > 1
    torch.manual_seed(5)
    state = torch.get_rng_state()
    HeadSet.random(spec, 2, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(InvalidArgument, match="asked for"):
        HeadSet.random(spec, 10_000, seed=0)


def test_pastalib_files_are_read_and_written(spec, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"2": [3, 0], "0": [1]}))
    found = HeadSet.read_pasta(path)
    assert found == HeadSet.of({0: [1], 2: [0, 3]})
    found.write_pasta(path)
    assert json.loads(path.read_text()) == {"0": [1], "2": [0, 3]}
    with pytest.raises(InvalidArgument, match="to_query"):
        HeadSet.of({0: [0]}, "kv").write_pasta(path)
    path.write_text("[1]")
    with pytest.raises(InvalidArgument, match="expected"):
        HeadSet.read_pasta(path)
    with pytest.raises(InvalidArgument, match="head file"):
        HeadSet.read_pasta(tmp_path / "none.json")
