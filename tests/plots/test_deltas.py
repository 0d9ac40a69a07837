"""delta_norms: a panel per site, norms in their cells, grey where there is no vector."""

import pytest
import torch

import kvedit as kv
from kvedit.models import tiny_model
from kvedit.plots import delta_norms
from kvedit.testing.steering import random_delta

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def delta():
    """Values in all layers, the stream in two of them; one head's values are zero."""
    model, tokenizer = tiny_model("llama")
    found = random_delta(model, tokenizer, sites=("values", "residual"))
    vectors = {site: dict(layers) for site, layers in found.vectors.items()}
    del vectors["residual"][1]
    vectors["values"][2] = vectors["values"][2] * torch.tensor([[0.0], [3.0]])
    return kv.Delta(vectors, found.model)


def test_norms_stand_in_their_cells(delta):
    figure = delta_norms(delta)
    assert figure._repr_png_().startswith(b"\x89PNG")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.images}
    assert list(panels) == ["values", "residual"]
    values, stream = (axes.images[0].get_array() for axes in panels.values())
    assert values.shape == (3, 2) and stream.shape == (3, 1)
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1)):
        expected = float(delta.vectors["values"][layer][head].norm())
        assert float(values[layer, head]) == pytest.approx(expected, rel=1e-6)
    for layer in (0, 2):
        expected = float(delta.vectors["residual"][layer].norm())
        assert float(stream[layer, 0]) == pytest.approx(expected, rel=1e-6)
    # Zero, and a layer without a vector: grey.
    assert values.mask.tolist() == [[False, False], [False, False], [True, False]]
    assert stream.mask.tolist() == [[False], [True], [False]]
    assert [axes.get_xlabel() for axes in panels.values()] == ["KV head", "stream"]
    assert delta.model.name in figure.get_suptitle()


def test_one_site_of_zeros_can_be_drawn(delta):
    nothing = delta.only(sites="values", layers=[-1]) * 0.0
    figure = delta_norms(nothing, title="nothing")
    assert figure._repr_png_().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert axes.images[0].get_array().mask.all()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["2"]
    assert figure.get_suptitle() == "nothing"
