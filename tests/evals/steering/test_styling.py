"""Methods beside their baselines: every row is there, scored as by hand, and a cut run goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals import evaluate_style, pareto
from kvedit.evals.answering import TaskResult
from kvedit.evals.steering import (
    Asker,
    Baselines,
    Bystanders,
    Markers,
    Method,
    StyleReport,
    sweep,
    word_problems,
)
from kvedit.evals.steering.report import StyleRow
from kvedit.plots import frontier, strength_map
from kvedit.steering import go_on, prompted, steered

from .conftest import PROMPTS

MARKERS = Markers("letters", ("e", "th"), least=2, opening="The")
QUESTIONS = word_problems(5, seed=0)


def one_shot(delta, strength):
    operand = delta.operand()
    return lambda memory: kv.editors.Steer(values=strength)(memory, operand)


@pytest.fixture(scope="module")
def few(once):
    return replace(once, max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def baselines(delta):
    return Baselines.of(
        one_shot, delta, 3.0, instruction="Write the.", examples=[("1+1?", "The 2.")], seeds=(0, 1)
    )


@pytest.fixture(scope="module")
def bystanders(once):
    return Bystanders(once, PROMPTS[:3])


def run(few, delta, baselines, bystanders, **options):
    steer = Method(lambda c: one_shot(delta, c), 3.0, identity=delta.digest)
    return evaluate_style(
        few, QUESTIONS, {"steer": steer}, baselines, bystanders, markers=MARKERS, **options
    )


@pytest.fixture(scope="module")
def first_run(delta, few, baselines, bystanders, tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "style.jsonl"
    return run(few, delta, baselines, bystanders, path=path), path


def test_every_row_is_there_and_scored_as_by_hand(tiny, delta, first_run, bystanders) -> None:
    model, tokenizer = tiny
    found, _ = first_run
    assert found.names == ("none", "prompt", "few-shot", "random 0", "random 1", "steer")
    assert found.n == 5
    turns = {
        "none": lambda q: [{"role": "user", "content": q}],
        "prompt": lambda q: [{"role": "user", "content": f"{q}\nWrite the."}],
        "few-shot": lambda q: [
            {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "The 2."},
            {"role": "user", "content": q},
        ],
        "steer": lambda q: [{"role": "user", "content": q}],
    }  # fmt: skip
    offset = tokenizer("\n", add_special_tokens=False)["input_ids"]
    opening = tokenizer("The", add_special_tokens=False)["input_ids"]
    for name, turn in turns.items():
        for question, result in zip(QUESTIONS, found.of(name).answers, strict=True):
            memory = prompted(model, tokenizer, None, turn(question.prompt))
            if name == "steer":
                memory = one_shot(delta, 3.0)(memory)
            answer = go_on(model, tokenizer, memory, max_new_tokens=6)
            assert result.answer == answer and result.key == question.key
            scores = dict(result.scores)
            assert scores["markers"] == ("e" in answer.lower()) + ("th" in answer.lower())
            assert scores["marked"] == (scores["markers"] == 2)
            assert scores["capped"] == (scores["length"] == 6)
            (told,) = kv.score(model, None, memory, offset, [opening])
            assert scores["opening"] == pytest.approx(told.logprob, abs=1e-4)
    moved = bystanders.moved(lambda: one_shot(delta, 3.0))
    assert found.mean("steer", "kl").value == pytest.approx(
        sum(m.kl for m in moved.values()) / 3, rel=1e-4
    )
    assert found.mean("none", "kl").value == 0 and found.mean("prompt", "kl").value > 1e-3
    change = found.difference("steer", metric="opening")
    a, b = found.values("steer", "opening"), found.values("none", "opening")
    assert change.value == pytest.approx(sum(a[k] - b[k] for k in a) / 5) and change.n == 5


def test_continuous_steering_is_a_row_like_any(tiny, delta, baselines) -> None:
    model, _ = tiny
    asker = Asker(*tiny, offset="\n", chat=True, max_new_tokens=4, batch_size=3)
    residual = delta.only(sites="residual")
    make = Baselines.of(
        lambda d, c: steered(model, d, c), residual, [1.0, 3.0], instruction="x",
        examples=[("a", "b")],
    )  # fmt: skip
    method = Method(lambda c: steered(model, residual, c, scope="generation"), 3.0)
    found = evaluate_style(
        asker, QUESTIONS[:2], {"hook": method}, make, Bystanders(asker, PROMPTS[:2]),
        markers=replace(MARKERS, opening=""),
    )  # fmt: skip
    assert found.names[3:] == ("random 0 at 1", "random 0 at 3", "hook")
    assert found.mean("hook", "kl").value > 1e-3 and "opening" not in found.metrics
    assert [found.of(name).strength for name in found.names] == [None] * 3 + [1.0, 3.0, 3.0]


def test_a_cut_run_goes_on(
    delta, few, baselines, bystanders, first_run, tmp_path, monkeypatch
) -> None:
    path, whole = tmp_path / "style.jsonl", first_run[0].to_json(results=True)
    lines = first_run[1].read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6 * (5 + 3)
    path.write_text("".join(lines[:21]) + lines[21][:9])
    again = run(few, delta, baselines, bystanders, path=path).to_json(results=True)
    assert list(again["methods"]) == list(whole["methods"])
    for name, method in whole["methods"].items():
        other = again["methods"][name]
        assert [r["answer"] for r in other["results"]] == [r["answer"] for r in method["results"]]
        for metric, mean in method["metrics"].items():
            assert other["metrics"][metric]["value"] == pytest.approx(mean["value"], abs=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(Asker, "reply", None)  # nothing is asked again
        run(few, delta, baselines, bystanders, path=path)
    with pytest.raises(InvalidArgument, match="something else"):
        run(replace(few, max_new_tokens=5), delta, baselines, bystanders, path=path)


def test_names_and_baselines_are_checked(delta, few, baselines, bystanders) -> None:
    method = Method(lambda c: one_shot(delta, c), 1.0)
    with pytest.raises(InvalidArgument, match="'none' is a baseline's"):
        evaluate_style(few, QUESTIONS, {"none": method}, baselines, bystanders)
    with pytest.raises(InvalidArgument, match="different questions"):
        evaluate_style(few, QUESTIONS[:1] * 2, {}, baselines, bystanders)
    with pytest.raises(InvalidArgument, match="strength"):
        Method(lambda c: one_shot(delta, c))
    for wrong in ({"random": {}}, {"instruction": " "}, {"examples": ()}):
        with pytest.raises(InvalidArgument):
            replace(baselines, **wrong)


def made(values: dict[str, list[float]], metric: str = "marked") -> StyleReport:
    rows = {
        name: StyleRow(
            None, tuple(TaskResult(str(i), ((metric, v),), "") for i, v in enumerate(vs)), ()
        )
        for name, vs in values.items()
    }
    return StyleReport(rows, MARKERS)


def test_a_report_shows_intervals_also_where_every_case_is_alike() -> None:
    found = made({"none": [0.0] * 50, "all": [1.0] * 50, "half": [0.0, 1.0] * 25})
    none, every = found.mean("none", "marked"), found.mean("all", "marked")
    # Wilson (1927) at 0 of n: up to z^2 / (n + z^2).
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(
        3.8415 / 53.8415, rel=1e-4
    )
    assert every.high == pytest.approx(1) and every.low == pytest.approx(1 - none.high)
    half = found.mean("half", "marked")
    assert 0.35 < half.low < 0.5 < half.high < 0.65
    gap = found.difference("all", "half")
    assert gap.value == 0.5 and gap.clear and not found.difference("none").clear
    lengths = made({"none": [4.0] * 5}, "length").mean("none", "length")
    assert (lengths.low, lengths.high) == (4, 4)


def test_a_report_is_plain_data_and_a_table(first_run) -> None:
    found, _ = first_run
    shown = json.loads(json.dumps(found.to_json(results=True)))
    assert shown["markers"] == json.loads(json.dumps(MARKERS.to_json()))
    steer = shown["methods"]["steer"]
    assert steer["metrics"]["kl"]["n"] == 3 and len(steer["results"]) == 8
    assert set(steer["differences"]) == set(steer["metrics"])
    assert "differences" not in shown["methods"]["none"]
    text = repr(found)
    assert text.startswith("letters: n=5 questions, 3 bystanders, seed 0\nmethod")
    assert len(text.splitlines()) == 8 and all(name in text for name in found.names)
    marked = found.table(["marked", "kl"], markdown=True).splitlines()
    assert marked[0] == "| method | strength | marked | kl |" and len(marked) == 8
    with pytest.raises(UnknownName, match="metric"):
        found.table(["marks"])
    with pytest.raises(UnknownName, match="method"):
        found.mean("steered", "kl")
    with pytest.raises(UnknownName, match="baseline"):
        replace(found, baseline="nothing")


def test_a_sweep_is_a_grid_a_curve_a_layer_and_two_pictures(
    delta, few, baselines, bystanders, tmp_path
) -> None:
    def apply(layer, strength):
        return one_shot(delta.only(layers=[layer]), strength)

    path = tmp_path / "sweep.jsonl"
    found = sweep(
        few, QUESTIONS[:3], apply, [1, 2], [1, 4.0], baselines, bystanders,
        identity=delta.digest, markers=MARKERS, path=path,
    )  # fmt: skip
    grid = found.grid("kl")
    assert grid.shape == (2, 2) and bool((grid > 0).all())
    expected = bystanders.moved(lambda: apply(2, 4.0))
    assert float(grid[1, 1]) == pytest.approx(sum(m.kl for m in expected.values()) / 3, rel=1e-3)
    assert bool((grid[:, 1] > grid[:, 0]).all())
    points = found.points("opening", "kl")
    assert [p.name for p in points[5:]] == ["layer 1"] * 2 + ["layer 2"] * 2
    assert [p.strength for p in points[5:]] == [1.0, 4.0, 1.0, 4.0]
    within = float(grid.min()) * 1.001
    assert found.best(within, "opening").cost.value <= within and found.best(0.0) is None
    assert set(pareto(points)) <= set(points)
    assert json.loads(json.dumps(found.to_json()))["layers"] == [1, 2]
    axes = strength_map(found).axes
    assert [a.get_title() for a in axes[:2]] == ["marked", "kl"]
    assert [t.get_text() for t in axes[1].texts] == [f"{v:.2g}" for v in grid.flatten().tolist()]
    torch.testing.assert_close(torch.tensor(axes[1].images[0].get_array()), grid)
    legend = {t.get_text() for t in frontier(points, gain="opening").axes[0].get_legend().texts}
    assert {"layer 1", "layer 2", "random 0", "prompt", "none"} <= legend
    size = path.stat().st_size
    options = {"identity": delta.digest, "markers": MARKERS, "path": path}
    assert sweep(few, QUESTIONS[:3], apply, [1], [1], baselines, bystanders, **options)
    assert path.stat().st_size == size
    with pytest.raises(InvalidArgument, match="layers"):
        sweep(few, QUESTIONS, apply, [1, 1], [1], baselines, bystanders)
