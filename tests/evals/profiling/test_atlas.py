"""HeadAtlas: its file, its orders, and the models that it refuses."""

import dataclasses
import json

import pytest

import kvedit as kv
from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.evals.profiling import HeadAtlas, HeadScore, intersection, task_agnostic, union
from kvedit.memory.heads import HeadSet


@pytest.fixture
def spec(tiny):
    model, tokenizer = tiny("llama")
    return kv.capture(model, tokenizer, "x").model


def build(spec, pairs, kind="kv", search="heads", **changes):
    scores = tuple(
        HeadScore(HeadSet.of([pair], kind), 3.0 - i, (2.0 - 2 * i, 4.0), 0.5, (0.4, 0.6), 0.1, None)
        for i, pair in enumerate(pairs)
    )
    facts = {"strength": 4.6, "phase": "decode", "rerun": "last", "continuation": "whole"}
    facts |= {"n": 9, "seed": 0, "base_margin": -1.0, "base_efficacy": 0.2, "probes": "ab"}
    facts |= {"version": "0", "minutes": 0.5, "kind": kind, "search": search, "model": spec}
    return HeadAtlas(**{"scores": scores, **facts, **changes})


def with_costs(atlas, costs, gains):
    scores = [
        dataclasses.replace(score, kl=kl, gain=gain)
        for score, kl, gain in zip(atlas.scores, costs, gains, strict=True)
    ]
    return dataclasses.replace(atlas, scores=tuple(scores))


def test_it_comes_back_from_its_file(spec, tmp_path):
    atlas = build(spec, [(2, 1), (0, 0)], task="capitals")
    atlas.write(tmp_path / "deep" / "atlas.json")
    assert HeadAtlas.read(tmp_path / "deep" / "atlas.json") == atlas
    text = (tmp_path / "deep" / "atlas.json").read_text()
    assert spec.fingerprint.weights in text and spec.fingerprint.tokenizer in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "atlas.json"),
        ("[]", "format 1"),
        ('{"head_atlas": 2}', "found 2"),
        ('{"head_atlas": 1, "scores": []}', "damaged"),
        ('{"head_atlas": 1, "scores": [{"heads": 3}], "model": {}}', "atlas.json"),
    ],
)
def test_what_is_no_atlas_is_refused(tmp_path, text, message):
    (tmp_path / "atlas.json").write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        HeadAtlas.read(tmp_path / "atlas.json")


def test_an_atlas_of_nothing_is_refused(spec):
    with pytest.raises(InvalidArgument, match="at least one"):
        build(spec, [])
    with pytest.raises(InvalidArgument, match="No such file"):
        HeadAtlas.read("missing.json")


def test_top_joins_the_first_sets(spec, tmp_path):
    atlas = build(spec, [(2, 1), (0, 0), (0, 1)])
    assert atlas.top(1).pairs == ((2, 1),)
    assert atlas.top(3).heads == ((0, (0, 1)), (2, (1,)))
    for k in (0, 4):
        with pytest.raises(InvalidArgument, match="holds 3 sets"):
            atlas.top(k)
    path = tmp_path / "heads.json"
    atlas.top(2).to_query(spec).write_pasta(path)
    assert json.loads(path.read_text()) == {"0": [0, 1], "2": [2, 3]}  # two query heads per KV head
    with pytest.raises(InvalidArgument, match="to_query"):
        atlas.top(2).write_pasta(path)


def test_orders_by_certainty_and_by_equal_collateral(spec):
    atlas = build(spec, [(0, 0), (1, 0), (2, 0)])
    sure = dataclasses.replace(atlas.scores[1], gain_interval=(2.5, 2.6))
    atlas = dataclasses.replace(atlas, scores=(atlas.scores[0], sure, atlas.scores[2]))
    assert [s.heads.pairs[0] for s in atlas.ordered("lower")] == [(1, 0), (0, 0), (2, 0)]
    # at equal KL, strengths scale by 1 / sqrt(KL), and gains with them: 3, 4, 1
    costly = with_costs(atlas, (4.0, 0.25, 1.0), (6.0, 2.0, 1.0))
    assert [s.heads.pairs[0] for s in costly.ordered("equal_kl")] == [(1, 0), (0, 0), (2, 0)]
    assert costly.top(1, by="equal_kl").pairs == ((1, 0),)
    # what costs nothing measurable does not win by dividing by nothing
    free = with_costs(atlas, (0.0, 0.25, 1.0), (1e-9, 2.0, 1.0))
    assert free.top(1, by="equal_kl").pairs == ((1, 0),)


def test_orders_that_were_not_measured_are_refused(spec):
    atlas = build(spec, [(0, 0), (1, 0)])
    with pytest.raises(InvalidArgument, match="unrelated"):
        with_costs(atlas, (None, None), (1.0, 0.0)).top(1, by="equal_kl")
    single = dataclasses.replace(atlas.scores[0], gain_interval=None)
    with pytest.raises(InvalidArgument, match="one probe"):
        dataclasses.replace(atlas, scores=(single,)).top(1, by="lower")
    with pytest.raises(InvalidArgument, match="nested"):
        dataclasses.replace(atlas, search="greedy").top(1, by="lower")
    with pytest.raises(InvalidArgument, match="'lower'"):
        atlas.top(1, by="best")


def test_other_models_are_refused(spec):
    atlas = build(spec, [(0, 0)])
    assert atlas.top(1, model=spec) == atlas.top(1)
    tuned = dataclasses.replace(
        spec, name="tuned", fingerprint=dataclasses.replace(spec.fingerprint, weights="live:else")
    )
    with pytest.raises(IncompatibleModel, match=r"weights.*strict=False"):
        atlas.top(1, model=tuned)
    assert atlas.top(1, model=tuned, strict=False) == atlas.top(1)
    wider = dataclasses.replace(spec.layers[1], query_heads=8)
    other = dataclasses.replace(spec, layers=(spec.layers[0], wider, spec.layers[2]))
    shorter = dataclasses.replace(spec, layers=spec.layers[:2])
    for strict in (True, False):
        with pytest.raises(IncompatibleModel, match=r"layer 1 \(query, KV\) heads: atlas \(4, 2\)"):
            atlas.check(other, strict)
        with pytest.raises(IncompatibleModel, match="layers: atlas 3, model 2"):
            atlas.check(shorter, strict)


def test_tasks_combine_as_in_pasta(spec):
    tasks = {
        "json": build(spec, [(0, 0), (1, 0), (2, 0)]),
        "pronouns": build(spec, [(1, 0), (2, 1), (0, 0)]),
        "facts": build(spec, [(2, 1), (1, 0), (1, 1)]),
    }
    every = list(tasks.values())
    assert intersection(every, 2).pairs == ((1, 0),)
    assert union(every, 1).pairs == ((0, 0), (1, 0), (2, 1))
    assert task_agnostic(tasks, "facts", 3).pairs == ((0, 0), (1, 0))
    assert task_agnostic(tasks, "json", 2).pairs == ((1, 0), (2, 1))
    assert intersection(every, 2).kind == "kv"
    with pytest.raises(InvalidArgument, match="first 1 of all 3"):
        intersection(every, 1)
    with pytest.raises(UnknownName, match="jso"):
        task_agnostic(tasks, "jso", 2)
    with pytest.raises(InvalidArgument, match="at least one atlas"):
        task_agnostic({"json": tasks["json"]}, "json", 2)
    with pytest.raises(InvalidArgument, match="one kind"):
        union([tasks["json"], build(spec, [(0, 0)], kind="query")], 1)


def test_atlases_of_different_models_do_not_mix(spec):
    tuned = dataclasses.replace(
        spec, fingerprint=dataclasses.replace(spec.fingerprint, weights="live:else")
    )
    pair = [build(spec, [(0, 0)]), build(tuned, [(0, 0)])]
    with pytest.raises(IncompatibleModel, match="weights"):
        intersection(pair, 1)
    assert intersection(pair, 1, strict=False).pairs == ((0, 0),)
