"""profile: what it writes, that it goes on after a kill, and the held-out controls."""

import dataclasses
import json

import pytest

import kvedit
import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.conflicts import Conflict
from kvedit.evals.profiling import (
    HeadAtlas,
    Probe,
    Setting,
    kl_curves,
    measure_all,
    profile,
    profiler,
    random_control,
    read_probes,
    single_heads,
)
from kvedit.memory.heads import HeadSet

SETTING = Setting(3.0)


@pytest.fixture
def counted(monkeypatch):
    """Counts measured probes, and dies before the one that ``stop`` names."""

    class Counter:
        count, stop = 0, None

    real = profiler.measure

    def measure(*args):
        if Counter.count == Counter.stop:
            raise KeyboardInterrupt
        Counter.count += 1
        return real(*args)

    monkeypatch.setattr(profiler, "measure", measure)
    return Counter


def timeless(atlas):
    return dataclasses.replace(atlas, minutes=0.0)


def test_an_atlas_says_what_was_done(tiny, probes):
    model, tokenizer = tiny("llama")
    atlas = profile(model, tokenizer, probes, SETTING, kind="query", seed=4, task="shops")
    spec = kv.capture(model, tokenizer, "x").model
    assert {score.heads.pairs[0] for score in atlas.scores} == {
        one.pairs[0] for one in single_heads(spec, "query")
    }
    gains = [score.gain for score in atlas.scores]
    assert gains == sorted(gains, reverse=True)
    assert (atlas.n, atlas.seed, atlas.task, atlas.phase) == (4, 4, "shops", "decode")
    assert (atlas.strength, atlas.rerun, atlas.kind) == (3.0, "last", "query")
    assert atlas.model == spec and atlas.version == kvedit.__version__
    effects = measure_all(model, tokenizer, probes, [atlas.top(1)], SETTING)
    assert atlas.scores[0].gain == pytest.approx(float(effects.gains.mean()), abs=1e-5)
    assert atlas.base_margin == pytest.approx(float(effects.base.mean()), abs=1e-5)
    again = profile(model, tokenizer, probes, SETTING, kind="query", seed=4, task="shops")
    assert timeless(again) == timeless(atlas)


@pytest.mark.parametrize("options", [{"search": "heads"}, {"search": "greedy", "count": 3}])
def test_a_run_that_was_killed_goes_on(tiny, probes, tmp_path, counted, options):
    model, tokenizer = tiny("llama")
    plain = profile(model, tokenizer, probes, SETTING, **options)
    whole, counted.count = counted.count, 0
    out = tmp_path / "atlas.json"
    for stop in (1, 3):
        counted.stop = stop
        with pytest.raises(KeyboardInterrupt):
            profile(model, tokenizer, probes, SETTING, out=out, **options)
        assert not out.exists()
        lines = (tmp_path / "atlas.cases.jsonl").read_bytes()
        (tmp_path / "atlas.cases.jsonl").write_bytes(lines + lines.splitlines()[-1][:40])  # torn
    counted.stop = None
    resumed = profile(model, tokenizer, probes, SETTING, out=out, **options)
    assert counted.count == whole  # nothing was measured twice
    assert timeless(resumed) == timeless(plain)
    assert HeadAtlas.read(out) == resumed
    done = counted.count
    assert profile(model, tokenizer, probes, SETTING, out=out, **options) == resumed
    assert counted.count == done
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_more_probes_may_join_and_another_setting_may_not(tiny, probes, tmp_path, counted):
    model, tokenizer = tiny("llama")
    out = tmp_path / "atlas.json"
    profile(model, tokenizer, probes[:2], SETTING, out=out)
    assert profile(model, tokenizer, probes, SETTING, out=out).n == 4
    assert counted.count == 4
    profile(model, tokenizer, probes, Setting(3.0, rows=2), out=out)  # changes no number
    assert counted.count == 4
    for other in (Setting(2.0), Setting(3.0, "prompt"), Setting(3.0, continuation="first")):
        with pytest.raises(InvalidArgument, match=r"atlas\.cases\.jsonl holds"):
            profile(model, tokenizer, probes, other, out=out)
    model, tokenizer = tiny("qwen3")
    with pytest.raises(InvalidArgument, match="model"):
        profile(model, tokenizer, probes, SETTING, out=out)


def test_a_changed_probe_is_measured_anew(tiny, probes, tmp_path, counted):
    model, tokenizer = tiny("llama")
    out = tmp_path / "atlas.json"
    first = profile(model, tokenizer, probes, SETTING, out=out)
    changed = [dataclasses.replace(probes[0], rival=" boats"), *probes[1:]]
    second = profile(model, tokenizer, changed, SETTING, out=out)
    assert counted.count == 5
    assert first.probes != second.probes
    others = {
        dataclasses.replace(probes[0], **part).digest
        for part in (
            {"context": f"{probes[0].context} Yes."},
            {"span": "Previously"},
            {"span": {"text": "Previously", "occurrence": 1}},
            {"prompt": " The shop sells"},
            {"wanted": " chairs"},
            {"unrelated": None},
        )
    }
    assert len({probe.digest for probe in (*probes, changed[0])} | others) == 5 + 6


def test_wrong_use_is_refused(tiny, probes):
    model, tokenizer = tiny("llama")
    with pytest.raises(InvalidArgument, match="twice"):
        profile(model, tokenizer, [probes[0], dataclasses.replace(probes[0])], SETTING)
    with pytest.raises(InvalidArgument, match="at least one"):
        profile(model, tokenizer, [], SETTING)
    with pytest.raises(InvalidArgument, match="search"):
        profile(model, tokenizer, probes, SETTING, search="all")
    with pytest.raises(InvalidArgument, match="kind"):
        profile(model, tokenizer, probes, SETTING, kind="key")


def test_probes_come_from_files_and_conflicts(tmp_path, probes):
    path = tmp_path / "probes.json"
    plain = {
        "context": "A b. C d.",
        "span": {"text": "C d", "occurrence": 1},
        "prompt": " C",
        "wanted": " d",
        "rival": " b",
    }
    path.write_text(json.dumps([plain, {**plain, "unrelated": " A"}]))
    first, second = read_probes(path)
    assert first.span.occurrence == 1 and first.unrelated is None and second.unrelated == " A"
    conflict = Conflict("A b. C d.", "C d", " C", " d", " b", unrelated=(" A", " E"))
    assert Probe.of_conflict(conflict).unrelated == " A"
    assert Probe.of_conflict(conflict).span.text == "C d"
    for wrong, message in (
        ([], "list of probes"),
        ([{**plain, "rival": " d"}], "number 0: .*both"),
        ([plain, {"context": "A"}], r"number 1: a probe needs \['span'"),
        ([{**plain, "wish": " d"}], "wish"),
        ([{**plain, "prompt": ""}], "prompt must be a text"),
        ([{**plain, "unrelated": ""}], "unrelated must be a text"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InvalidArgument, match=message):
            read_probes(path)
    with pytest.raises(InvalidArgument, match="missing"):
        read_probes(tmp_path / "missing.json")


def test_a_probe_names_its_memory(tiny, probes):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, probes[0].context)
    held = dataclasses.replace(probes[0], context=memory)
    assert held.digest != probes[0].digest
    text = measure_all(model, tokenizer, probes[:1], [HeadSet.of([(0, 0)])], SETTING)
    kept = measure_all(model, tokenizer, [held], [HeadSet.of([(0, 0)])], SETTING)
    assert float(text.margins[0, 0]) == pytest.approx(float(kept.margins[0, 0]), abs=1e-6)


def test_random_heads_are_drawn_by_seed(tiny, probes):
    model, tokenizer = tiny("llama")
    spec = kv.capture(model, tokenizer, "x").model
    chosen = HeadSet.of([(0, 0), (2, 1)], "kv")
    found = random_control(model, tokenizer, probes, chosen, SETTING, draws=3, seed=7)
    assert found.chosen.heads == chosen
    assert [one.heads for one in found.random] == [
        HeadSet.random(spec, 2, 7 + i, "kv") for i in range(3)
    ]
    mean = sum(one.gain for one in found.random) / 3
    assert found.difference.gain == pytest.approx(found.chosen.gain - mean)
    low, high = found.difference.gain_interval
    assert low <= found.difference.gain <= high
    with pytest.raises(InvalidArgument, match="draws"):
        random_control(model, tokenizer, probes, chosen, SETTING, draws=0)


def test_strengths_of_equal_collateral(tiny, probes):
    model, tokenizer = tiny("llama")
    spec = kv.capture(model, tokenizer, "x").model
    sets = [HeadSet.all(spec), HeadSet.of([(1, 0)], "kv")]
    curves = kl_curves(model, tokenizer, probes, sets, SETTING)
    target = 0.5 * min(max(curve) for curve in curves.kl)
    found = curves.at(target)
    assert found[0] < found[1]  # one head is cheaper
    effects = measure_all(
        model, tokenizer, probes, sets, SETTING, strengths=[at for at in found if at]
    )
    assert effects.kl.mean(dim=0).tolist() == pytest.approx([target, target], rel=0.1)
    assert curves.at(1e9) == (None, None)
    assert curves.at(1e-12) == (None, None)
    bare = [dataclasses.replace(probe, unrelated=None) for probe in probes]
    with pytest.raises(InvalidArgument, match="unrelated"):
        kl_curves(model, tokenizer, bare, sets, SETTING)
