"""From contrast set to delta: estimators per head, lineage, clusters, report, pruning."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.memory import Delta
from kvedit.steering import (
    Contrast,
    Estimator,
    Readings,
    delta_of,
    extract,
    extract_clusters,
    extraction_report,
    few_shot_reasoning,
    prune_heads,
    read_contrast,
)
from kvedit.steering.extracting import cluster_deltas

SITES = ("keys", "values", "residual", "attention")
TEXTS = [
    ("First we count the jars, then we add the boxes", "Nine"),
    ("One, two and three make six!", "A thing is here"),
    ("It is so", "It is not so, and there is more to be said"),
    ("Step by step", "At once!"),
    ("We reason it out,", "It is seven;"),
    ("Because of that?", "Three"),
]


@pytest.fixture(scope="module")
def planted():
    """Readings whose sides differ along one dim of one head, beside noise."""
    from kvedit.models.tiny import tiny_model

    spec = read_contrast(*tiny_model("llama"), Contrast.of(TEXTS[:1])).model
    draw = torch.Generator().manual_seed(0)
    shapes = {"keys": (40, 2, 16), "values": (40, 2, 16), "residual": (40, 64)}
    sides = [
        {s: {i: torch.randn(shapes[s], generator=draw) for i in range(3)} for s in shapes}
        for _ in range(2)
    ]
    sides[0]["values"][1][:, 1, 3] += 4.0
    return Readings(sides[0], sides[1], spec, {"contrast": "c"})


@pytest.mark.parametrize("estimator", ["mean", "pca", "lda", "logistic"])
def test_every_head_is_estimated_by_itself(tiny, estimator):
    model, tokenizer = tiny()
    contrast = Contrast.of(TEXTS)
    readings = read_contrast(model, tokenizer, contrast, sites=SITES)
    delta = extract(model, tokenizer, contrast, sites=SITES, estimator=estimator)
    chosen = Estimator(estimator)
    for site, layers in readings.positive.items():
        for layer, states in layers.items():
            other = readings.negative[site][layer]
            if site in ("keys", "values"):
                for head in range(2):
                    expected = chosen(states[:, head].double(), other[:, head].double())
                    found = delta.vectors[site][layer][head]
                    torch.testing.assert_close(found, expected.float())
            else:
                expected = chosen(states.double(), other.double())
                torch.testing.assert_close(delta.vectors[site][layer], expected.float())


def test_a_delta_tells_how_it_was_found(tiny, tmp_path):
    model, tokenizer = tiny()
    contrast = Contrast.of(TEXTS)
    estimator = {"name": "pca", "centred": True}
    delta = extract(model, tokenizer, contrast, layers=[1], read=-1, estimator=estimator, seed=7)
    assert delta.layers == (1,) and delta.sites == ("keys", "values")
    assert delta.facts["contrast"] == contrast.digest
    assert delta.facts["estimator"] == {"name": "pca", "unit": False, "centred": True}
    assert (delta.facts["read"], delta.facts["pairs"], delta.facts["dtype"]) == (-1, 6, "float32")
    node = delta.lineage.head
    assert (node.operation, node.reproducibility, node.seed) == ("extract", "reader", 7)
    again = extract(model, tokenizer, TEXTS, layers=[-2], read=-1, estimator=estimator, seed=7)
    assert (again.digest, again.lineage.head.id) == (delta.digest, node.id)
    with kv.Store(tmp_path) as store:
        store.put(delta.operand(), "d")
        assert Delta.of(store.get("d")).digest == delta.digest


def test_deltas_of_two_models_do_not_mix(tiny):
    one = extract(*tiny(), TEXTS[:2])
    other = extract(*tiny(seed=1), TEXTS[:2])
    prints = [delta.model.fingerprint.weights[:12] for delta in (one, other)]
    with pytest.raises(IncompatibleModel, match=" and ".join(prints)):
        one + other


def test_extraction_changes_no_model_and_goes_on_from_a_folder(tiny, tmp_path):
    model, tokenizer = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delta = extract(model, tokenizer, TEXTS, sites=SITES, folder=tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert extract(model, tokenizer, TEXTS, sites=SITES, folder=tmp_path).digest == delta.digest
    other = extract(model, tokenizer, TEXTS, sites=SITES, folder=tmp_path, estimator="pca")
    assert other.digest != delta.digest
    norms = zip(other.norms()["residual"].values(), delta.norms()["residual"].values(), strict=True)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in norms)


def test_templates_make_deltas(tiny):
    model, tokenizer = tiny()
    contrast = few_shot_reasoning(pairs=2, shots=1)
    delta = extract(model, tokenizer, contrast, sites=SITES)
    assert delta.facts["pairs"] == 2
    # Both sides end with the same token, so the first layer's keys and values do not differ.
    for site in ("keys", "values"):
        assert delta.norms()[site][0] == 0 and delta.norms()[site][2] > 1e-2
    report = extraction_report(read_contrast(model, tokenizer, contrast, layers=[0]), folds=2)
    assert {(one.accuracy, one.ordered, one.explained) for one in report.findings} == {
        (0.5, 0.5, 0)
    }


# -- clusters ----------------------------------------------------------------------------------


def test_clusters_of_pairs_give_a_delta_each(planted):
    positive = {s: {i: v.clone() for i, v in each.items()} for s, each in planted.positive.items()}
    for layers in positive.values():
        for states in layers.values():
            states[25:] += 5.0
            states[:25] -= 5.0
    both = Readings(positive, planted.negative, planted.model, planted.facts)
    first, second = cluster_deltas(both, 2, seed=0)
    assert first.facts["members"] == list(range(25))
    assert second.facts["members"] == list(range(25, 40))
    for delta, rows in ((first, slice(0, 25)), (second, slice(25, 40))):
        for site, layers in delta.vectors.items():
            for layer, vector in layers.items():
                apart = (positive[site][layer] - planted.negative[site][layer])[rows]
                torch.testing.assert_close(vector, apart.mean(dim=0), atol=1e-5, rtol=1e-5)
    whole = delta_of(both)
    parts = (first * 25 + second * 15) / 40
    for layer, vector in whole.vectors["keys"].items():
        torch.testing.assert_close(parts.vectors["keys"][layer], vector, atol=1e-5, rtol=1e-5)


def test_extracted_clusters(tiny):
    model, tokenizer = tiny()
    deltas = extract_clusters(model, tokenizer, TEXTS, 2, sites="values", layers=[-1])
    members = [delta.facts["members"] for delta in deltas]
    assert sorted(members[0] + members[1]) == list(range(6)) and len(members[0]) >= len(members[1])
    assert deltas[0].digest != deltas[1].digest


# -- report ------------------------------------------------------------------------------------


def test_report_finds_the_planted_head(planted):
    report = extraction_report(planted, folds=4)
    assert len(report.findings) == 3 * 2 * 2 + 3 == len(report.rows())
    best = max(report.findings, key=lambda one: one.accuracy)
    assert (best.site, best.layer, best.head) == ("values", 1, 1)
    assert best.accuracy > 0.9 and best.ordered > 0.95
    others = [one.accuracy for one in report.findings if one is not best]
    assert all(0.2 < share < 0.8 for share in others)
    assert sum(others) / len(others) == pytest.approx(0.5, abs=0.08)
    assert report.by_layer("values")[1] == best
    assert report.table().count("\n") == 1 + len(report.findings)
    assert "| residual | 2 |  |" in report.table()
    with pytest.raises(UnknownName, match="site 'queries'"):
        report.by_layer("queries")


def test_a_look_at_a_report_shows_the_longest_of_each_site(planted):
    report = extraction_report(planted, folds=4)
    head, columns, *rows = repr(report).splitlines()
    assert head.startswith(f"{planted.pairs} pairs, held out in 4 folds; 15 vectors, the 3 longest")
    assert len({len(row) for row in (columns, *rows)}) == 1  # aligned
    shown = [row.split() for row in rows]
    for site in ("keys", "values", "residual"):
        every = [one for one in report.findings if one.site == site]
        longest = sorted(every, key=lambda one: one.norm, reverse=True)[:3]
        found = [(row[1], row[-5]) for row in shown if row[0] == site]
        assert found == [(str(one.layer), f"{one.norm:.3g}") for one in longest]
    assert columns.split() == list(report.rows()[0])
    one = extraction_report(planted.part(range(4)), folds=2)
    few = type(one)(one.findings[:2], one.pairs, one.folds)
    assert repr(few).splitlines()[0] == "4 pairs, held out in 2 folds; 2 vectors"


def test_figures_of_a_report_are_what_they_say(planted):
    report = extraction_report(planted, "lda")
    one = next(f for f in report.findings if (f.site, f.layer, f.head) == ("values", 1, 1))
    first, second = (
        side["values"][1][:, 1].double() for side in (planted.positive, planted.negative)
    )
    vector = Estimator("lda")(first, second)
    along = (first - second) @ vector / vector.norm()
    assert one.norm == pytest.approx(float(vector.norm()))
    assert one.norm == pytest.approx(float((first - second).mean(dim=0).norm()))
    around = torch.cat((first, second)).square().sum(dim=1).mean().sqrt()
    assert one.relative == pytest.approx(one.norm / float(around))
    explained = along.square().sum() / (first - second).square().sum()
    assert one.explained == pytest.approx(float(explained))


def test_accuracy_is_of_pairs_that_the_direction_has_not_seen():
    """In so many dims a direction tells its own training pairs apart, whatever they are."""
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(12, 1, 400, generator=draw) for _ in range(2))
    from kvedit.steering.report import _held_out

    index = list(range(12))
    estimator = Estimator("lda")
    states = first[:, 0].double(), second[:, 0].double()
    parts = [index[i::4] for i in range(4)]
    held, _ = _held_out(*states, estimator, parts)
    direction = estimator(*states)
    middle = torch.cat(states).mean(dim=0)
    seen = sum(float(((s - middle) @ direction * sign > 0).double().mean())
               for s, sign in zip(states, (1, -1), strict=True)) / 2  # fmt: skip
    assert seen == 1.0 and 0.2 < held < 0.8


def test_folds_out_of_range(planted):
    for folds in (1, 41):
        with pytest.raises(InvalidArgument, match="2 to 40"):
            extraction_report(planted, folds=folds)


def test_heads_pruned_by_norm(planted):
    delta = delta_of(planted)
    one = prune_heads(delta, 1)
    assert one.vectors["values"][1][1].any() and not one.vectors["values"][1][0].any()
    assert list(one.vectors["values"]) == [1] == list(one.vectors["keys"])
    assert list(one.vectors["residual"]) == [0, 1, 2]  # a stream has no heads
    norms = {(i, h): float(v[h].norm()) for i, v in delta.vectors["keys"].items() for h in (0, 1)}
    for keep, count in ((3, 3), (0.3, 2), (0.5, 3), (6, 6)):
        part = prune_heads(delta, keep, site="keys")
        kept = {(i, h) for i, v in part.vectors["keys"].items() for h in (0, 1) if v[h].any()}
        assert kept == set(sorted(norms, key=norms.get, reverse=True)[:count])
    each = prune_heads(delta, 1, per_layer=True)
    assert all(sum(bool(v[h].any()) for h in (0, 1)) == 1 for v in each.vectors["values"].values())
    for keep in (0, 7, 1.5, 0.0, True):
        with pytest.raises(InvalidArgument, match="keep"):
            prune_heads(delta, keep)
    with pytest.raises(InvalidArgument, match="values"):
        prune_heads(delta.only(sites="residual"), 1)


# -- a real model ------------------------------------------------------------------------------


@pytest.mark.slow
def test_reasoning_is_told_apart_by_a_real_model(smollm):
    """Held-out pairs of few-shot prompts; and keys that rotation does not blur."""
    model, tokenizer = smollm
    contrast = few_shot_reasoning(pairs=12, shots=2, seed=0)
    layers = [10, 20, 29]
    found = read_contrast(
        model, tokenizer, contrast, sites=SITES, layers=layers, batch=6
    )  # fmt: skip
    report = extraction_report(found, folds=4)
    assert all(best.accuracy >= 0.9 for best in report.by_layer("values").values())
    assert all(best.accuracy >= 0.9 for best in report.by_layer("residual").values())
    single = read_contrast(
        model, tokenizer, Contrast.of(contrast.pairs[:1]), sites=SITES, layers=layers, batch=1
    )
    for site, each in single.positive.items():
        for layer, vector in each.items():
            other = found.positive[site][layer][:1]
            assert float((vector - other).norm() / vector.norm()) <= 1e-4, (site, layer)
