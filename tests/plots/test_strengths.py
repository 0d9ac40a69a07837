"""strength_map: numbers in few cells, strengths upright below them."""

import pytest
import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.answering import TaskResult
from kvedit.evals.steering import STEP_BY_STEP, StyleReport, Sweep
from kvedit.evals.steering.report import StyleRow
from kvedit.plots import strength_map

pytest.importorskip("matplotlib")

STRENGTHS = (0.5, 2.0)


def found(layers):
    """A sweep in which the share of marked answers is 1 where layer and strength are both high."""

    def row(strength, marked, kl):
        answer = TaskResult("q", (("marked", marked),), "")
        return StyleRow(strength, (answer,), (TaskResult("b", (("kl", kl),), ""),))

    rows = {"none": row(None, 0.0, 0.0)}
    for layer in layers:
        for c in STRENGTHS:
            rows[Sweep.name(layer, c)] = row(c, float(layer * c >= 4), 0.1 * (layer + 1) * c)
    return Sweep(tuple(layers), STRENGTHS, StyleReport(rows, STEP_BY_STEP))


def test_a_panel_per_metric_with_upright_strengths():
    figure = strength_map(found([0, 3]), ("marked", "kl"))
    assert figure._repr_png_().startswith(b"\x89PNG")
    marked, kl = figure.axes[:2]
    assert [axes.get_title() for axes in (marked, kl)] == ["marked", "kl"]
    assert marked.images[0].get_array().tolist() == [[0, 0], [0, 1]]
    expected = torch.tensor([[0.05, 0.2], [0.2, 0.8]])
    torch.testing.assert_close(torch.tensor(kl.images[0].get_array()), expected)
    assert [text.get_text() for text in kl.texts] == ["0.05", "0.2", "0.2", "0.8"]
    for axes in (marked, kl):
        ticks = axes.get_xticklabels()
        assert [(tick.get_text(), tick.get_rotation()) for tick in ticks] == [("0.5", 0), ("2", 0)]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "3"]


def test_many_layers_have_colours_only():
    assert not strength_map(found(range(13)), ("kl",)).axes[0].texts
    with pytest.raises(InvalidArgument, match="a metric at least"):
        strength_map(found([1]), ())
