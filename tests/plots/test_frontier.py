"""frontier: what stands where, and what has no place on a logarithmic scale."""

from __future__ import annotations

import pytest

from kvedit import plots
from kvedit.errors import InvalidArgument
from kvedit.evals import Report
from kvedit.evals.results import CaseResult, Moved, Preference

pytest.importorskip("matplotlib")


def report(name: str, strength: float | None, wins: int, kl: float, n: int = 8) -> Report:
    results = tuple(
        CaseResult(
            str(i),
            Preference(0.0, -1.0 if i < wins else 1.0, 0.0, 0.0, True, True),
            unrelated=(Moved(kl * (1 + i / n), False),),
        )
        for i in range(n)
    )
    return Report(name, results, strength)


REPORTS = [
    report("none", None, 2, 0.0),
    report("loud", 4.0, 7, 2.0),
    report("loud", 1.0, 4, 0.1),
    report("few heads", 2.0, 6, 0.05),
]


def curves(figure):
    (axes,) = figure.axes
    return axes, {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}


def test_each_method_is_a_curve_in_the_order_of_its_strengths() -> None:
    figure = plots.frontier(REPORTS)
    axes, found = curves(figure)
    assert set(found) == {"none", "loud", "few heads"}
    assert found["loud"] == [pytest.approx([0.14375, 0.5]), pytest.approx([2.875, 0.875])]
    assert found["few heads"] == [pytest.approx([0.071875, 0.75])]
    assert axes.get_xscale() == "log"
    # What costs nothing stands left of everything else.
    assert 0 < found["none"][0][0] < 0.071875
    assert {text.get_text() for text in axes.texts} == {"1", "2", "4", "(at 0)"}
    assert "n = 8" in axes.get_title()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_front_leaves_out_what_is_dominated() -> None:
    (axes,) = plots.frontier(REPORTS).axes
    (front,) = [line for line in axes.lines if line.get_label() == "undominated"]
    heights = sorted(set(front.get_ydata()))
    assert heights == [0.25, 0.75, 0.875]


def test_intervals_never_leave_the_scale() -> None:
    figure = plots.frontier(REPORTS, gain="top1", title="a $title")
    (axes,) = figure.axes
    assert axes.get_title() == "a $title"
    for container in axes.containers:
        for bars in container.lines[2]:
            for segment in bars.get_segments():
                assert (segment[:, 0] > 0).all()


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="none of 0"):
        plots.frontier([])
    with pytest.raises(InvalidArgument, match="fluency"):
        plots.frontier(REPORTS, gain="fluency")
