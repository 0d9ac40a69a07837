"""recall_curves: what stands where."""

from __future__ import annotations

import pytest

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.answering import TaskResult
from kvedit.evals.recall import RecallQuestion, RecallReport, Size

pytest.importorskip("matplotlib")
from kvedit.plots.recall import recall_curves

NAMES = ("full", "nothing", "truncate@8", "truncate@2", "tuned")
RATIOS = (1.0, None, 8.0, 2.0, 10.0)


def report() -> RecallReport:
    questions = tuple(RecallQuestion(f"{i}?", ("x",)) for i in range(6))
    results = {
        name: tuple(
            TaskResult(q.key, (("f1", 1 / (1 + at)), ("kl", at + (i % 2) * at / 4)), "")
            for i, q in enumerate(questions)
        )
        for at, name in enumerate(NAMES)
    }
    sizes = {n: Size(8, 8, 8, 8, r, r) for n, r in zip(NAMES, RATIOS, strict=True)}
    return RecallReport(questions, results, sizes)


def test_each_method_is_a_curve_in_the_order_of_its_ratios() -> None:
    figure = recall_curves(report())
    left, right = figure.axes
    for axes, metric in ((left, "kl"), (right, "f1")):
        curves = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
        assert set(curves) == {"truncate", "tuned"}
        at = {name: report().mean(name, metric).value for name in NAMES}
        assert curves["truncate"][:, 1] == pytest.approx([at["truncate@2"], at["truncate@8"]])
        assert curves["truncate"][:, 0] == pytest.approx([2, 8], rel=0.02)
        assert curves["tuned"][0] == pytest.approx([10, at["tuned"]], rel=0.02)
        assert curves["tuned"][0][0] != 10  # methods stand beside each other
        across = {
            line.get_label(): line.get_ydata()[0]
            for line in axes.lines
            if not line.get_label().startswith("_")
        }
        assert across == {"full": at["full"], "nothing": at["nothing"]}
        assert axes.get_xscale() == "log"
        assert [t.get_text() for t in axes.get_xticklabels()] == ["2x", "8x", "10x"]
    assert "n = 6" in figure._suptitle.get_text()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_bars_are_the_bootstrap_interval() -> None:
    (axes,) = recall_curves(report(), ["kl"], methods={"mine": ["tuned"]}).axes
    (container,) = axes.containers
    ((low, high),) = [s[:, 1] for s in container.lines[2][0].get_segments()]
    expected = report().mean("tuned", "kl")
    assert (low, high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert expected.low < expected.high and container.get_label() == "mine"


def test_what_can_not_be_drawn_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="metric"):
        recall_curves(report(), [])
    with pytest.raises(UnknownName, match="kk"):
        recall_curves(report(), ["kk"])
    with pytest.raises(UnknownName, match="absent"):
        recall_curves(report(), methods={"m": ["absent"]})
    with pytest.raises(InvalidArgument, match="compression ratio"):
        recall_curves(report(), methods={"m": ["nothing"]})
